//! The verified directory: who else is in the mesh, with which keys and addresses, and how fresh that is.
//!
//! ```text
//! control ─ Items, Live, Checkpoint ─> Directory ─> DirectoryFacts ─> desired
//!                                          │
//!                       files: directory (what was accepted), runtime (hints, exposure, clock)
//! ```
//!
//! Nothing here trusts the keyserver: each object is judged by [`View`]. What is refused is counted and alarmed and
//! never stops the rest; a map that lacks a member changes nothing.

mod alarms;
mod disk;
pub(crate) mod evidence;
mod exposure;
mod facts;
mod fallen;
mod stream;
mod worlds;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use mesh_protocol::UnixSeconds;
use mesh_protocol::envelope::{Envelope, Kind};
use mesh_protocol::id::{Hash, NodeId, Position};
use mesh_protocol::record::{Checkpoint, NodeGrant, NodeRecord};
use mesh_protocol::trust::{Change, CheckpointVerdict, TrustError, View, compare_checkpoints};

use crate::identity::Identity;
use crate::state_dir::{StateDir, StateError};

pub(crate) use alarms::{Alarms, alarm};
pub(crate) use disk::{Evidence, Files};
pub(crate) use exposure::{ALARM_AFTER as UNCONFIRMED_ALARM, Exposure};
pub(crate) use facts::Viewpoint;
pub(crate) use stream::Batch;
use stream::Stream;
pub(crate) use worlds::Taken;
use worlds::{Heard, States};

/// Most objects of a session that are refused only later, when it is known whether a policy after them explains it; about a
/// KiB each. Beyond them each is refused at once.
const MOST_DEFERRED: usize = 1_024;
/// Most evidence kept until it is stored; what comes on top is counted as an alarm only.
const MOST_EVIDENCE: usize = 16;

/// Changes of the directory do not attach to where it stands: ask for everything again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("changes from {from:?} do not follow {at:?}")]
pub(crate) struct Gap {
    /// Where they attach.
    pub(crate) from: Position,
    /// Where the directory stands.
    pub(crate) at: Option<Position>,
}

/// A point in the history and the hash of everything before it, as far as it is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Mark {
    position: Position,
    state: Option<Hash>,
}

/// Everything this node believes about the mesh.
#[derive(Debug)]
pub(crate) struct Directory {
    view: View,
    own: NodeId,
    /// Where a later session resumes: on disk with the view.
    mark: Option<Mark>,
    checkpoint: Option<(Checkpoint, Envelope)>,
    /// Grants before the held ones: records still speak under them until their nodes speak again.
    earlier_grants: BTreeMap<NodeId, Envelope>,
    /// Nodes of which this one knows more than its keyserver has shown: what comes late is no attack.
    ahead: BTreeSet<NodeId>,
    stream: Stream,
    /// Members that a policy put out, until they are granted anew.
    out: BTreeSet<NodeId>,
    /// Until then facts wait for those to be granted anew: tunnels would close, and open again with the next object.
    waits_until: Option<Instant>,
    /// See [`Self::catch_up`].
    catching_up: bool,
    /// Grants and records that were refused meanwhile.
    deferred: Vec<(Envelope, TrustError)>,
    stale: bool,
    /// A keyserver was caught showing two worlds.
    split: bool,
    /// States of the history as far as they were seen.
    states: States,
    /// The newest checkpoint that a peer passed on, if no keyserver's is newer.
    heard: Option<Heard>,
    /// What proved two worlds.
    proof: Option<(Checkpoint, Envelope)>,
    equivocations: u64,
    numbers: BTreeMap<NodeId, u32>,
    next_number: u32,
    refused: u64,
    alarms: Alarms,
    evidence: Vec<Evidence>,
    runtime: disk::Runtime,
    /// Something changed that is not on disk yet.
    unsaved: bool,
}

impl Directory {
    /// The directory of a node that was just admitted: policies and its own grant.
    pub(crate) fn new(view: View, own: NodeId, checkpoint: Option<(Checkpoint, Envelope)>) -> Self {
        let mut states = States::default();
        if let Some((checkpoint, _)) = &checkpoint {
            states.note(checkpoint.position, checkpoint.state);
        }
        Self {
            view,
            own,
            mark: None,
            checkpoint,
            earlier_grants: BTreeMap::new(),
            ahead: BTreeSet::new(),
            stream: Stream::default(),
            out: BTreeSet::new(),
            waits_until: None,
            catching_up: false,
            deferred: Vec::new(),
            stale: false,
            split: false,
            states,
            heard: None,
            proof: None,
            equivocations: 0,
            numbers: BTreeMap::new(),
            next_number: 1,
            refused: 0,
            alarms: Alarms::default(),
            evidence: Vec::new(),
            runtime: disk::Runtime::default(),
            unsaved: true,
        }
    }

    /// Reads it from disk.
    ///
    /// # Errors
    /// [`StateError`] if it is missing, damaged, or of another mesh: never an empty map.
    pub(crate) fn open(state: &StateDir, identity: &Identity) -> Result<Self, StateError> {
        disk::read(state, identity)
    }

    /// Stores both files at once.
    ///
    /// # Errors
    /// [`StateError`]; the files are then as they were.
    pub(crate) fn save(&mut self, state: &StateDir) -> Result<(), StateError> {
        self.files(true).store(state)?;
        self.unsaved = false;
        Ok(())
    }

    /// The accepted objects.
    pub(crate) fn view(&self) -> &View {
        &self.view
    }

    /// Where a session resumes.
    pub(crate) fn position(&self) -> Option<Position> {
        self.mark.map(|mark| mark.position)
    }

    /// The newest checkpoint.
    pub(crate) fn checkpoint(&self) -> Option<&Checkpoint> {
        self.checkpoint.as_ref().map(|(checkpoint, _)| checkpoint)
    }

    /// The keyserver shows an older state than was seen, or two worlds.
    pub(crate) fn is_stale(&self) -> bool {
        self.stale || self.split
    }

    /// Times that somebody was caught signing two truths, since start.
    pub(crate) fn equivocations(&self) -> u64 {
        self.equivocations
    }

    /// Objects refused since start.
    pub(crate) fn refused(&self) -> u64 {
        self.refused
    }

    /// What somebody has to look at.
    pub(crate) fn alarms(&mut self) -> &mut Alarms {
        &mut self.alarms
    }

    /// What is there now is about to be stored.
    pub(crate) fn mark_saved(&mut self) {
        self.unsaved = false;
    }

    /// Whether something changed that is not on disk yet.
    pub(crate) fn is_unsaved(&self) -> bool {
        self.unsaved
    }

    /// Storing failed: try again.
    pub(crate) fn mark_unsaved(&mut self) {
        self.unsaved = true;
    }

    /// The own grant as held here, if it is newer than the one on disk, or that one does not stand any more: of a stolen
    /// key no generation counts.
    pub(crate) fn newer_own_grant(&self, on_disk: &Envelope, object: &NodeGrant) -> Option<(Envelope, NodeGrant)> {
        let grant = &self.view.member(self.own)?.grant;
        let is_newer = grant.object.generation > object.generation;
        let has_fallen = || grant.envelope != *on_disk && self.view.check_grant(on_disk).is_err();
        (is_newer || has_fallen()).then(|| (grant.envelope.clone(), grant.object.clone()))
    }

    /// Whether this node itself is revoked.
    pub(crate) fn is_own_revoked(&self, generation: u64) -> bool {
        self.view.revoked_up_to(self.own).is_some_and(|up_to| up_to >= generation)
            && self.view.member(self.own).is_none()
    }

    /// A session begins: changes have to attach to what is held.
    pub(crate) fn begin_stream(&mut self) {
        self.catching_up = false;
        self.stream = Stream::at(self.mark);
    }

    /// The session began with policies that were news: what follows is older than they are, up to the next checkpoint.
    pub(crate) fn catch_up(&mut self) {
        self.catching_up = true;
    }

    /// Takes one batch of changes. What it holds is applied as far as it is good, in order.
    ///
    /// # Errors
    /// [`Gap`]: nothing was applied, ask for everything.
    pub(crate) fn apply_batch(&mut self, batch: &Batch<'_>, now: Instant) -> Result<(), Gap> {
        self.stream.admit(batch)?;
        for envelope in batch.items {
            self.apply_in_order(envelope, now);
        }
        self.stream.advance(batch, self.view.mesh(), &mut self.states);
        if let Some(checkpoint) = batch.checkpoint {
            self.catching_up = false;
            self.refuse_deferred(now);
            self.apply_checkpoint(checkpoint, now);
        }
        self.settle();
        Ok(())
    }

    /// Takes one object of a stream. What was changed before a policy that the session began with, and does not stand any
    /// more, is history and nobody's mistake.
    fn apply_in_order(&mut self, envelope: &Envelope, now: Instant) {
        if envelope.kind() == Kind::TrustPolicy {
            self.refused += self.deferred.len() as u64;
            self.deferred.clear();
        }
        let Err(error) = self.try_apply(envelope, now) else { return };
        let deferrable = matches!(envelope.kind(), Kind::NodeGrant | Kind::NodeRecord)
            && !matches!(error, TrustError::Equivocation { .. });
        if self.catching_up && deferrable && self.deferred.len() < MOST_DEFERRED {
            self.deferred.push((envelope.clone(), error));
        } else {
            self.refuse(envelope, &error, now);
        }
    }

    /// What no policy explained is refused after all.
    fn refuse_deferred(&mut self, now: Instant) {
        for (envelope, error) in std::mem::take(&mut self.deferred) {
            self.refuse(&envelope, &error, now);
        }
    }

    /// Nobody is out who may be granted anew in what follows.
    pub(crate) fn is_whole(&self) -> bool {
        self.out.is_empty()
    }

    /// Takes endpoints as they come. Those of strangers and old ones are of no interest to anybody.
    pub(crate) fn apply_live(&mut self, items: &[Envelope], now: Instant) {
        for envelope in items.iter().filter(|envelope| envelope.kind() == Kind::Endpoints) {
            match self.view.apply(envelope) {
                Ok(_) | Err(TrustError::NoGrant(_) | TrustError::OldSeq { .. }) => {}
                Err(error) => self.refuse(envelope, &error, now),
            }
        }
    }

    /// Takes one policy, grant, record or revocation.
    pub(crate) fn apply(&mut self, envelope: &Envelope, now: Instant) {
        if let Err(error) = self.try_apply(envelope, now) {
            self.refuse(envelope, &error, now);
        }
    }

    fn try_apply(&mut self, envelope: &Envelope, now: Instant) -> Result<(), TrustError> {
        let before = self.held_grant(envelope);
        match self.view.apply(envelope) {
            Ok(change) => {
                if let Ok(record) = envelope.unverified::<NodeRecord>() {
                    self.ahead.remove(&record.node);
                }
                if change != Change::Nothing {
                    self.note(&change, before, now);
                }
            }
            Err(TrustError::OldSeq { .. } | TrustError::OldGeneration { .. } | TrustError::OtherGrant { .. })
                if self.is_ahead(envelope) => {}
            // A keyserver that was rolled back shows what was once true: said once, as STALE.
            Err(TrustError::OldSeq { .. } | TrustError::OldGeneration { .. }) if self.stale => self.refused += 1,
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// The grant that is held for the node of another one.
    fn held_grant(&self, envelope: &Envelope) -> Option<(NodeId, Envelope)> {
        let grant = envelope.unverified::<NodeGrant>().ok()?;
        let held = self.view.member(grant.node)?;
        Some((grant.node, held.grant.envelope.clone()))
    }

    /// Takes a checkpoint: tells whether it is good news, so that exposure starts over.
    pub(crate) fn apply_checkpoint(&mut self, envelope: &Envelope, now: Instant) -> bool {
        let got = match self.view.checkpoint(envelope) {
            Ok(got) => got,
            Err(error) => {
                self.refuse(envelope, &error, now);
                return false;
            }
        };
        if !self.stream.agrees_with(&got) {
            let message =
                format!("the history up to revision {} is not the one its keyserver signs", got.position.revision);
            self.alarms.raise(alarm::EQUIVOCATION, "history", message, now);
            self.split = true;
            self.equivocations += 1;
            self.keep_evidence(envelope);
            return false;
        }
        if !self.is_one_world(&got) {
            self.two_worlds(&got, envelope, "to this node", now);
            return false;
        }
        let verdict = self.checkpoint().map_or(CheckpointVerdict::Newer, |held| compare_checkpoints(held, &got));
        match verdict {
            CheckpointVerdict::Newer if self.is_withheld(&got, now) => {
                self.stale = true;
                let message = "the keyserver shows peers a newer state than this node: it is not telling all; tunnels \
                               stay up";
                self.alarms.raise(alarm::STALE, "", message.to_owned(), now);
                false
            }
            CheckpointVerdict::Newer => self.hold_checkpoint(got, envelope),
            CheckpointVerdict::Stale => {
                self.stale = true;
                let message = "the keyserver shows an older state than this node has seen: it was restored from a \
                               backup, or is not telling all; tunnels stay up";
                self.alarms.raise(alarm::STALE, "", message.to_owned(), now);
                false
            }
            // Judged above.
            CheckpointVerdict::Equivocation => false,
        }
    }

    fn hold_checkpoint(&mut self, got: Checkpoint, envelope: &Envelope) -> bool {
        self.stream.anchor(&got);
        self.states.note(got.position, got.state);
        let fresh = self.checkpoint().is_none_or(|held| got.time > held.time || got.position != held.position);
        self.unsaved |= fresh;
        self.checkpoint = Some((got, envelope.clone()));
        self.stale = false;
        self.alarms.clear(alarm::STALE);
        self.settle();
        fresh
    }

    /// Moves the point of resumption along with the stream, but never back to what a stale keyserver shows.
    fn settle(&mut self) {
        if let Some(mark) = self.stream.mark().filter(|mark| !self.stale && self.mark != Some(*mark)) {
            self.mark = Some(mark);
            self.unsaved = true;
        }
    }

    fn note(&mut self, change: &Change, before: Option<(NodeId, Envelope)>, now: Instant) {
        self.unsaved = true;
        match change {
            Change::Grant { node, displaced } => {
                self.keep_earlier(before.filter(|(held, _)| held == node));
                if self.out.remove(node) && self.out.is_empty() {
                    self.alarms.clear(alarm::DROPPED);
                }
                for out in displaced {
                    let message =
                        format!("node {} had the name or a prefix of node {} later", out.short(), node.short());
                    self.alarms.raise(alarm::COLLISION, &out.short(), message, now);
                }
            }
            Change::Revoked { node, .. } => {
                self.earlier_grants.remove(node);
                self.out.remove(node);
            }
            Change::Policy { version, dropped } if !dropped.is_empty() => {
                self.out.extend(dropped);
                let message = format!("policy {version} no longer covers {} members", dropped.len());
                self.alarms.raise(alarm::DROPPED, "", message, now);
            }
            _ => {}
        }
    }

    /// Keeps the grant that was held for a node until now, if it is the one that its record names.
    fn keep_earlier(&mut self, before: Option<(NodeId, Envelope)>) {
        let Some((node, before)) = before else { return };
        let record = self.view.member(node).and_then(|member| member.record.as_ref());
        if record.is_none_or(|record| record.object.grant == before.hash(self.view.mesh())) {
            self.earlier_grants.insert(node, before);
        }
    }

    /// Whether an object is of a node of which this one heard more from peers, or by its own grant, than its keyserver has
    /// shown.
    fn is_ahead(&self, envelope: &Envelope) -> bool {
        let grant = envelope.unverified::<NodeGrant>().ok().map(|grant| grant.node);
        let node = grant.or_else(|| Some(envelope.unverified::<NodeRecord>().ok()?.node));
        node.is_some_and(|node| self.ahead.contains(&node))
    }

    fn refuse(&mut self, envelope: &Envelope, error: &TrustError, now: Instant) {
        self.refused += 1;
        tracing::warn!(kind = ?envelope.kind(), %error, "directory object refused");
        if let TrustError::Equivocation { signer, .. } = error {
            let signer = signer.clone();
            self.equivocations += 1;
            self.alarms.raise(alarm::EQUIVOCATION, &signer, error.to_string(), now);
            if let Some(held) = self.held_beside(envelope) {
                self.keep_evidence(&held);
            }
            self.keep_evidence(envelope);
        } else {
            self.alarms.raise(alarm::REFUSED, "", error.to_string(), now);
        }
    }

    /// The held object that `envelope` contradicts.
    fn held_beside(&self, envelope: &Envelope) -> Option<Envelope> {
        use mesh_protocol::record::{Endpoints, Revocation, TrustPolicy};
        let member = |node| self.view.member(node);
        match envelope.kind() {
            Kind::NodeGrant => {
                let grant: NodeGrant = envelope.unverified().ok()?;
                Some(member(grant.node)?.grant.envelope.clone())
            }
            Kind::NodeRecord => {
                let record: NodeRecord = envelope.unverified().ok()?;
                Some(member(record.node)?.record.as_ref()?.envelope.clone())
            }
            Kind::Endpoints => {
                let endpoints: Endpoints = envelope.unverified().ok()?;
                Some(member(endpoints.node)?.endpoints.as_ref()?.envelope.clone())
            }
            Kind::TrustPolicy => {
                let policy: TrustPolicy = envelope.unverified().ok()?;
                let held = self.view.policies().iter().find(|held| held.object.version == policy.version)?;
                Some(held.envelope.clone())
            }
            Kind::Revocation => {
                let revocation: Revocation = envelope.unverified().ok()?;
                let mut held = envelope.signers().filter_map(|by| self.view.revocation(by, revocation.number));
                held.next().map(|held| held.envelope.clone())
            }
            Kind::Checkpoint | Kind::TokenLimits => None,
        }
    }

    fn keep_evidence(&mut self, envelope: &Envelope) {
        if self.evidence.len() < MOST_EVIDENCE {
            // At once: it may be all that is left of an attack.
            self.unsaved = true;
            self.evidence.push(Evidence::of(envelope, self.view.mesh()));
        }
    }

    /// The highest wall clock reading that was stored.
    pub(crate) fn clock_mark(&self) -> UnixSeconds {
        self.runtime.clock
    }
}

#[cfg(test)]
pub(crate) mod tests;
