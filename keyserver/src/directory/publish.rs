//! What nodes say of themselves: records into the history, endpoints from hand to hand.

use std::time::Instant;

use mesh_protocol::control::{Refusal, RefusalCode};
use mesh_protocol::envelope::{Envelope, Kind};
use mesh_protocol::id::NodeId;
use mesh_protocol::record::{Endpoints, NodeRecord};
use mesh_protocol::trust::{Change, TrustError};
use mesh_protocol::{cbor, id::Hash};
use tracing::{error, info};

use super::{ChangeError, Directory, layout, refusal};
use crate::store::{Operation, Range, Txn};

/// Objects a node may publish in a burst.
const BURST: f64 = 20.0;
/// Objects a node may publish in a second, on average.
const PER_SECOND: f64 = 2.0;
/// Proofs of two truths kept: 1,000 of at most 128 KiB; later ones are counted only.
const MAX_EVIDENCE: usize = 1_000;

/// What a node may still publish. Outlives its session, so that reconnecting gains nothing.
#[derive(Debug, Clone, Copy)]
pub(super) struct Allowance {
    left: f64,
    at: Instant,
}

impl Allowance {
    fn take(&mut self, now: Instant) -> bool {
        let gained = now.saturating_duration_since(self.at).as_secs_f64() * PER_SECOND;
        (self.left, self.at) = ((self.left + gained).min(BURST), now);
        let granted = self.left >= 1.0;
        if granted {
            self.left -= 1.0;
        }
        granted
    }
}

/// What was published.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PublishedAs {
    /// Its number.
    pub(crate) seq: u64,
    /// Endpoints, not a record.
    pub(crate) endpoints: bool,
}

impl Directory {
    /// Refuses a node that wants to say more than it may.
    pub(super) fn pace(&mut self, node: NodeId) -> Result<(), Refusal> {
        let fresh = Allowance { left: BURST, at: Instant::now() };
        if self.publishers.entry(node).or_insert(fresh).take(Instant::now()) {
            return Ok(());
        }
        self.metrics.refused_publications.inc();
        Err(refusal(RefusalCode::Busy, "too many publications: at most 2 a second"))
    }

    /// Takes a node's own record or endpoints.
    pub(crate) fn publish(&mut self, node: NodeId, envelope: &Envelope) -> Result<PublishedAs, Refusal> {
        self.pace(node)?;
        let bad = |error: mesh_protocol::envelope::EnvelopeError| refusal(RefusalCode::BadMessage, error.to_string());
        let (speaker, published) = match envelope.kind() {
            Kind::NodeRecord => {
                let record: NodeRecord = envelope.unverified().map_err(bad)?;
                (record.node, PublishedAs { seq: record.seq, endpoints: false })
            }
            Kind::Endpoints => {
                let endpoints: Endpoints = envelope.unverified().map_err(bad)?;
                (endpoints.node, PublishedAs { seq: endpoints.seq, endpoints: true })
            }
            kind => return Err(refusal(RefusalCode::BadMessage, format!("{kind:?} is not a node's to publish"))),
        };
        if speaker != node {
            return Err(refusal(RefusalCode::Record, "a node speaks for itself only"));
        }
        let result =
            if published.endpoints { self.move_node(node, envelope) } else { self.take_record(node, envelope) };
        result.map(|()| published).map_err(|error| {
            self.metrics.refused_publications.inc();
            error.into_refusal(RefusalCode::Record)
        })
    }

    fn move_node(&mut self, node: NodeId, envelope: &Envelope) -> Result<(), ChangeError> {
        let judged = self.history.view.apply(envelope);
        let change =
            judged.inspect_err(|error| self.keep_evidence(node, error, envelope)).map_err(ChangeError::Judged)?;
        if change != Change::Nothing {
            self.hub.moved(node, envelope.clone());
        }
        Ok(())
    }

    fn take_record(&mut self, node: NodeId, envelope: &Envelope) -> Result<(), ChangeError> {
        let change = self.change(envelope, Vec::new(), Vec::new());
        if let Err(ChangeError::Judged(error)) = &change {
            let error = error.clone();
            self.keep_evidence(node, &error, envelope);
        }
        if change? != Change::Nothing {
            self.metrics.records.inc();
            info!(node = %node.short(), revision = self.position().revision, "record stored");
            self.hub.progressed();
            self.close_retired(node);
        }
        Ok(())
    }

    /// A node that signed two truths: what it said before stays, both are kept, somebody is told.
    fn keep_evidence(&mut self, node: NodeId, judged: &TrustError, envelope: &Envelope) {
        let TrustError::Equivocation { kind, .. } = judged else { return };
        self.metrics.equivocations.inc();
        error!(node = %node.short(), error = %judged, "equivocation");
        self.alarm(format!("{judged} (node {})", node.short()));
        let member = self.view().member(node);
        let held = member.and_then(|member| match kind {
            Kind::Endpoints => member.endpoints.as_ref().map(|held| held.envelope.clone()),
            _ => member.record.as_ref().map(|held| held.envelope.clone()),
        });
        let both: Vec<Envelope> = held.into_iter().chain([envelope.clone()]).collect();
        let Hash(hash) = envelope.hash(self.mesh());
        let kept = self.store.range(&Range::prefix(layout::EVIDENCE), None, MAX_EVIDENCE).map_or(0, |kept| kept.len());
        if kept < MAX_EVIDENCE && self.writable().is_ok() {
            let key = [layout::EVIDENCE, hash.as_slice()].concat();
            let put = Operation::Put(key, cbor::to_vec(&both));
            // Refused: logged there, and the alarm stands.
            let _ = self.commit(&Txn { then: vec![put], ..Txn::default() });
        }
    }
}
