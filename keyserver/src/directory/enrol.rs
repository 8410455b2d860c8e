//! Enrolment: the token, the name, the addresses, and all of it in one transaction with the grant, or with what is
//! reserved until an issuer elsewhere has signed it.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_protocol::cbor;
use mesh_protocol::control::{JoinReply, Refusal, RefusalCode, runs};
use mesh_protocol::envelope::Envelope;
use mesh_protocol::id::{NodeId, TokenId};
use mesh_protocol::key::VerifyKey;
use mesh_protocol::offline::{GrantReason, GrantRequest};
use mesh_protocol::record::NodeGrant;
use mesh_protocol::token::JoinClaim;
use mesh_protocol::trust::RequestError;
use tracing::{debug, info};

use super::token::{KnownToken, token_refused};
use super::{ChangeError, Directory, Frame, layout, refusal, unix_now, watch};
use crate::store::{Compare, Operation, Range};

/// Refused enrolments are logged at most this often; the metric counts all.
const REFUSAL_LOG_PAUSE: Duration = Duration::from_secs(1);

/// A token that somebody says to hold.
#[derive(Debug)]
pub(crate) struct Shown {
    /// From where.
    pub(crate) peer: SocketAddr,
    /// The key of the TLS handshake.
    pub(crate) identity: VerifyKey,
    /// Its exporter.
    pub(crate) exporter: [u8; 32],
    /// The token.
    pub(crate) token: TokenId,
    /// [`JoinToken::show`](mesh_protocol::token::JoinToken::show).
    pub(crate) signature: [u8; 64],
    /// Its signed limits, if the node sent them.
    pub(crate) limits: Option<Envelope>,
}

/// What a joining connection brought.
#[derive(Debug)]
pub(crate) struct JoinAttempt {
    /// From where.
    pub(crate) peer: SocketAddr,
    /// The key of its TLS handshake.
    pub(crate) identity: VerifyKey,
    /// Its exporter.
    pub(crate) exporter: [u8; 32],
    /// What the node asks for.
    pub(crate) claim: JoinClaim,
    /// Signed with the token's seed.
    pub(crate) signature: [u8; 64],
    /// The token's signed limits, if the node sent them.
    pub(crate) limits: Option<Envelope>,
}

/// A token was shown in vain.
#[derive(Debug)]
pub(crate) enum ShowError {
    /// It is not known, or the proof is not one: whoever guesses sees this. Nothing is said of the mesh.
    Stranger,
    /// It is known and held, and good for nothing.
    Refused(Refusal),
}

impl From<Refusal> for ShowError {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

impl ShowError {
    /// As the node is told.
    pub(crate) fn into_refusal(self) -> Refusal {
        match self {
            Self::Stranger => token_refused("it is not known here"),
            Self::Refused(refusal) => refusal,
        }
    }
}

/// What came of it.
#[derive(Debug)]
pub(crate) enum Enrolment {
    /// The node is in.
    Granted {
        /// Its grant.
        grant: Envelope,
        /// The newest checkpoint, after it.
        checkpoint: Envelope,
    },
    /// It is as soon as its issuer has signed.
    Pending {
        /// Seconds since 1970 after which the reservation is void.
        until: u64,
    },
}

impl Directory {
    /// Gives every policy, oldest first, to who holds a token that is good. Who does not is told nothing of the mesh.
    pub(crate) fn show(&mut self, shown: &Shown) -> Result<Arc<[Frame]>, ShowError> {
        let result = self.try_show(shown);
        match &result {
            Ok(_) => {}
            Err(ShowError::Stranger) => {
                self.metrics.refused_joins.inc();
                debug!(peer = %shown.peer, token = %shown.token.short(), "token not known, or not held");
            }
            Err(ShowError::Refused(refusal)) => {
                self.metrics.refused_joins.inc();
                self.log_refused(shown.peer, refusal);
            }
        }
        result
    }

    fn try_show(&mut self, shown: &Shown) -> Result<Arc<[Frame]>, ShowError> {
        let known = self.find_token(shown.token, shown.limits.as_ref())?.ok_or(ShowError::Stranger)?;
        known.limits.verify_shown(&shown.exporter, &shown.signature).map_err(|_| ShowError::Stranger)?;
        let used = self.use_of(shown.token, shown.identity.node_id())?;
        if used.is_none() {
            check_limits(&known)?;
        }
        Ok(self.offer())
    }

    /// Encoded once and shared.
    pub(super) fn offer(&mut self) -> Arc<[Frame]> {
        let newest = self.view().policy_hash();
        if let Some((_, frames)) = self.offer.as_ref().filter(|(held, _)| *held == newest) {
            return frames.clone();
        }
        let policies = self.view().policies().iter().map(|policy| policy.envelope.clone()).collect();
        let frames = runs(policies).into_iter().filter_map(|policies| watch::encode(&JoinReply::Offer { policies }));
        let frames: Arc<[Frame]> = frames.collect();
        self.offer = Some((newest, frames.clone()));
        frames
    }

    /// Lets a node in, or has it wait for its issuer, or says why not.
    pub(crate) fn enrol(&mut self, attempt: &JoinAttempt) -> Result<Enrolment, Refusal> {
        let result = self.try_enrol(attempt);
        match &result {
            Ok(Enrolment::Granted { .. }) => {
                self.metrics.joins.inc();
            }
            Ok(Enrolment::Pending { .. }) => {}
            Err(refusal) => {
                self.metrics.refused_joins.inc();
                self.log_refused(attempt.peer, refusal);
            }
        }
        result
    }

    /// Anybody can be refused, as often as they like: the log does not grow with it.
    fn log_refused(&mut self, peer: SocketAddr, refused: &Refusal) {
        if self.refusal_logged.is_some_and(|logged| logged.elapsed() < REFUSAL_LOG_PAUSE) {
            debug!(%peer, code = ?refused.code, reason = %refused, "enrolment refused");
            return;
        }
        self.refusal_logged = Some(Instant::now());
        info!(%peer, code = ?refused.code, reason = %refused, "enrolment refused");
    }

    fn try_enrol(&mut self, attempt: &JoinAttempt) -> Result<Enrolment, Refusal> {
        self.writable()?;
        let claim = &attempt.claim;
        let node = claim.node();
        let known = self.check_token(attempt)?;
        self.check_unused(&claim.identity, node)?;
        let used = self.use_of(claim.token, node)?;
        if let Some(enrolment) = self.answered_before(claim, &known, used.as_deref())? {
            return Ok(enrolment);
        }
        if known.token.revoked || used.is_none() {
            check_limits(&known)?;
        } else if unix_now() >= known.limits.expires {
            return Err(token_refused("it is expired"));
        }
        if let Some(up_to) = self.view().revoked_up_to(node) {
            return Err(refusal(
                RefusalCode::Revoked,
                format!("node {} is revoked up to generation {up_to}: join with a new identity", node.short()),
            ));
        }
        if self.view().fallen().next().is_some() {
            let message = "nodes wait to be granted anew, because an issuer's key was stolen: nobody else may take their \
                           places, try again when that is done";
            return Err(refusal(RefusalCode::Busy, message));
        }
        let grant = self.draft(claim, node, &known.limits)?;
        let until = grant.issued.saturating_add(super::reserve::RESERVED_FOR);
        let reason = GrantReason::Join {
            claim: claim.clone(),
            exporter: attempt.exporter,
            signature: attempt.signature,
            limits: known.token.limits.clone(),
        };
        let request = GrantRequest { grant, reason, until };
        let issuer = self.view().check_request(&request, unix_now()).map_err(refused)?.key;
        let count = count_use(known, claim.token, node, used.is_some());
        match self.keys.issuer.as_ref().filter(|held| held.verify_key() == issuer) {
            Some(_) => self.grant_now(&request.grant, count),
            None => self.reserve(request, count),
        }
    }

    fn grant_now(&mut self, grant: &NodeGrant, count: TokenUse) -> Result<Enrolment, Refusal> {
        let envelope = self.seal_grant(grant)?;
        let changed = self.change(&envelope, count.compare, count.operations);
        changed.map_err(|error| error.into_refusal(RefusalCode::OutOfScope))?;
        let (node, serial) = (grant.node.short(), grant.serial);
        info!(node = %grant.name, id = %node, cluster = %grant.cluster, serial, "node enrolled");
        Ok(Enrolment::Granted { grant: envelope, checkpoint: self.checkpoint() })
    }

    /// A node that asks again, because the answer was lost or because it waits, gets the same answer, also when the token
    /// has expired meanwhile.
    fn answered_before(
        &mut self,
        claim: &JoinClaim,
        known: &KnownToken,
        used: Option<&[u8]>,
    ) -> Result<Option<Enrolment>, Refusal> {
        let node = claim.node();
        match used {
            None => return Ok(None),
            Some(layout::REJECTED) => return Err(token_refused("an operator rejected this node")),
            Some(_) => {}
        }
        if let Some(until) = self.reservations.waits_as(claim).filter(|_| !known.token.revoked) {
            return Ok(Some(Enrolment::Pending { until }));
        }
        let Some(member) = self.view().member(node) else { return Ok(None) };
        let grant = &member.grant.object;
        let same_cidrs = claim.pod_cidrs.is_empty() || claim.pod_cidrs == grant.pod_cidrs;
        let same = grant.name == claim.name && grant.cluster == known.limits.cluster && grant.tags == known.limits.tags;
        if !same || !same_cidrs || !member.is_valid_at(unix_now()) {
            return Ok(None);
        }
        let grant = member.grant.envelope.clone();
        Ok(Some(Enrolment::Granted { grant, checkpoint: self.checkpoint() }))
    }

    fn check_token(&mut self, attempt: &JoinAttempt) -> Result<KnownToken, Refusal> {
        let claim = &attempt.claim;
        if claim.mesh != self.mesh() {
            return Err(token_refused("it is of another mesh"));
        }
        if claim.identity != attempt.identity {
            return Err(token_refused("the request was made by another identity than the connection's"));
        }
        let known = self.find_token(claim.token, attempt.limits.as_ref())?;
        let known = known.ok_or_else(|| ShowError::Stranger.into_refusal())?;
        claim
            .verify(&known.limits.key, &attempt.exporter, &attempt.signature)
            .map_err(|_| token_refused("the request is not signed with it, for this connection"))?;
        Ok(known)
    }

    /// What is noted of `node`'s use of the token, if it has used it.
    fn use_of(&self, token: TokenId, node: NodeId) -> Result<Option<Vec<u8>>, Refusal> {
        Ok(self.get(&layout::token_use(token, node))?.map(|entry| entry.value))
    }

    pub(super) fn get(&self, key: &[u8]) -> Result<Option<crate::store::Entry>, Refusal> {
        let found = self.store.range(&Range::key(key), None, 1).map_err(|error| super::unavailable(&error))?;
        Ok(found.into_iter().next())
    }
}

/// The part of a transaction that counts a use of a token.
#[derive(Default)]
pub(super) struct TokenUse {
    pub(super) compare: Vec<Compare>,
    pub(super) operations: Vec<Operation>,
}

fn count_use(mut known: KnownToken, token: TokenId, node: NodeId, used_before: bool) -> TokenUse {
    let key = layout::token(token);
    let compare = vec![Compare::ModRevision(key.clone(), known.revision)];
    let mut operations = Vec::new();
    if !used_before {
        known.token.used += 1;
        operations.push(Operation::Put(key, cbor::to_vec(&known.token)));
        operations.push(Operation::Put(layout::token_use(token, node), Vec::new()));
    }
    TokenUse { compare, operations }
}

/// As a node is told.
pub(super) fn refused(error: RequestError) -> Refusal {
    match error {
        RequestError::Trust(error) => ChangeError::Judged(error).into_refusal(RefusalCode::OutOfScope),
        RequestError::Token { .. } | RequestError::Unsigned(_) => refusal(RefusalCode::Token, error.to_string()),
        RequestError::Collides { .. } => refusal(RefusalCode::Taken, error.to_string()),
        error => refusal(RefusalCode::OutOfScope, error.to_string()),
    }
}

fn check_limits(known: &KnownToken) -> Result<(), Refusal> {
    let KnownToken { token, limits, .. } = known;
    if token.revoked {
        return Err(token_refused("it is revoked"));
    }
    if unix_now() >= limits.expires {
        return Err(token_refused("it is expired"));
    }
    if token.used >= limits.uses {
        return Err(token_refused(&format!("it is used up ({} of {})", token.used, limits.uses)));
    }
    Ok(())
}
