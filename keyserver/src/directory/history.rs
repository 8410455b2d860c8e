//! The append-only history of accepted objects, how it lies in the store, and what follows from it.

use std::collections::{BTreeMap, VecDeque};

use mesh_protocol::cbor::{self, CborError};
use mesh_protocol::envelope::{Envelope, NO_MESH};
use mesh_protocol::id::{Hash, MeshId, NodeId, Position};
use mesh_protocol::record::NodeGrant;
use mesh_protocol::trust::{TrustError, View, beginning, next_state};

use crate::store::{self, Range, Store, StoreError};

/// Changes kept in memory for nodes that resume: 16,384 of about 2 KiB are 32 MiB. Who is further behind gets a full map.
const RECENT: usize = 16_384;
/// Changes read from the store at once.
const PAGE: usize = 1_024;

/// How keys and numbers lie in the store.
pub(crate) mod layout {
    use mesh_protocol::id::{NodeId, TokenId};

    /// 32 bytes: the mesh's id.
    pub(crate) const MESH: &[u8] = b"mesh";
    /// 8 bytes, big-endian: which history this is.
    pub(crate) const EPOCH: &[u8] = b"epoch";
    /// 8 bytes, big-endian: grants have a serial above this, whatever the history says.
    pub(crate) const SERIAL_FLOOR: &[u8] = b"serial-floor";
    /// All changes.
    pub(crate) const HISTORY: &[u8] = b"history/";
    /// All tokens.
    pub(crate) const TOKENS: &[u8] = b"token/";
    /// The audit log as far as it is in the store.
    pub(crate) const AUDIT: &[u8] = b"audit/";
    /// All uses of tokens.
    pub(crate) const USES: &[u8] = b"use/";
    /// What is kept for nodes that wait for an issuer elsewhere.
    pub(crate) const RESERVATIONS: &[u8] = b"reserve/";
    /// Identity keys that members wait for.
    pub(crate) const SUCCESSORS: &[u8] = b"successor/";
    /// Tokens voided here before anybody used them, where an issuer elsewhere made them.
    pub(crate) const VOIDED: &[u8] = b"void/";
    /// 8 bytes, big-endian: tokens up to then, in seconds since 1970, are void, because the store was restored then.
    pub(crate) const TOKENS_SINCE: &[u8] = b"tokens-since";
    /// Rotations that operators ordered.
    pub(crate) const ROTATIONS: &[u8] = b"rotation/";
    /// Proofs that somebody signed two truths.
    pub(crate) const EVIDENCE: &[u8] = b"evidence/";

    /// An operator rejected the node that used this token.
    pub(crate) const REJECTED: &[u8] = b"rejected";

    /// One change: its envelope.
    pub(crate) fn history(revision: u64) -> Vec<u8> {
        [HISTORY, &revision.to_be_bytes()].concat()
    }

    /// One rotation: its job.
    pub(crate) fn rotation(job: u64) -> Vec<u8> {
        [ROTATIONS, &job.to_be_bytes()].concat()
    }

    /// One line of the audit log.
    pub(crate) fn audit(number: u64) -> Vec<u8> {
        [AUDIT, &number.to_be_bytes()].concat()
    }

    /// One token: its limits and how often it was used.
    pub(crate) fn token(token: TokenId) -> Vec<u8> {
        [TOKENS, token.as_bytes()].concat()
    }

    /// The request of one node that waits.
    pub(crate) fn reservation(node: NodeId) -> Vec<u8> {
        [RESERVATIONS, node.as_bytes()].concat()
    }

    /// The identity key that one member waits for, and its handover.
    pub(crate) fn successor(node: NodeId) -> Vec<u8> {
        [SUCCESSORS, node.as_bytes()].concat()
    }

    /// Voided at this time: 8 bytes, big-endian, seconds since 1970.
    pub(crate) fn voided(token: TokenId) -> Vec<u8> {
        [VOIDED, token.as_bytes()].concat()
    }

    /// There once `node` enrolled with `token`: asking again, after a lost answer, costs no use. Empty, or [`REJECTED`].
    pub(crate) fn token_use(token: TokenId, node: NodeId) -> Vec<u8> {
        [uses(token).as_slice(), node.as_bytes()].concat()
    }

    /// All uses of a token.
    pub(crate) fn uses(token: TokenId) -> Vec<u8> {
        [USES, token.as_bytes(), b"/"].concat()
    }
}

/// The store does not hold a mesh.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum LoadError {
    /// The store refused.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// It has no mesh in it.
    #[error("the store holds no mesh: {0} is missing")]
    Missing(&'static str),
    /// A change is not what was written.
    #[error("change {revision} of the history does not decode: {source}")]
    Malformed {
        /// Which.
        revision: u64,
        /// Why.
        source: CborError,
    },
    /// A change that the trust rules refuse.
    #[error("change {revision} of the history is refused: {source}")]
    Refused {
        /// Which.
        revision: u64,
        /// Why.
        source: TrustError,
    },
    /// A change is missing in the middle.
    #[error("change {0} of the history is missing")]
    Gap(u64),
}

/// The history and what it amounts to.
pub(crate) struct History {
    /// What was accepted.
    pub(crate) view: View,
    /// Where it stands.
    pub(crate) position: Position,
    /// Hash of it all.
    pub(crate) state: Hash,
    /// Highest serial of a grant.
    pub(crate) serial: u64,
    recent: VecDeque<Envelope>,
    /// The newest grant of every node that ever had one: what revoked nodes were called. About 500 bytes each.
    granted: BTreeMap<NodeId, NodeGrant>,
}

impl History {
    /// Replays the history that `store` holds and verifies each change of it.
    pub(crate) fn load(store: &dyn Store) -> Result<Self, LoadError> {
        let mesh = value(store, layout::MESH)?.ok_or(LoadError::Missing("mesh"))?;
        let mesh = MeshId(mesh.try_into().map_err(|_| LoadError::Missing("mesh"))?);
        let epoch = number(store, layout::EPOCH)?.ok_or(LoadError::Missing("epoch"))?;
        let floor = number(store, layout::SERIAL_FLOOR)?.unwrap_or(0);
        let mut changes = Changes { store, next: 1, page: VecDeque::new() };
        let first = changes.next()?.ok_or(LoadError::Missing("the first policy"))?;
        let view = View::pinned(mesh, std::slice::from_ref(&first))
            .map_err(|source| LoadError::Refused { revision: 1, source })?;
        let start = beginning(epoch);
        let (recent, granted) = (VecDeque::new(), BTreeMap::new());
        let mut history = Self { view, position: start, state: Hash([0; 32]), serial: floor, recent, granted };
        history.push(first);
        while let Some(envelope) = changes.next()? {
            let revision = history.position.revision + 1;
            history.view.apply(&envelope).map_err(|source| LoadError::Refused { revision, source })?;
            history.push(envelope);
        }
        Ok(history)
    }

    /// Appends a change that the view has accepted.
    pub(crate) fn push(&mut self, envelope: Envelope) {
        self.position.revision += 1;
        let mesh = if self.position.revision == 1 { NO_MESH } else { self.view.mesh() };
        self.state = next_state(self.state, envelope.hash(mesh));
        if let Ok(grant) = envelope.unverified::<NodeGrant>() {
            self.serial = self.serial.max(grant.serial);
            self.granted.insert(grant.node, grant);
        }
        self.recent.push_back(envelope);
        if self.recent.len() > RECENT {
            self.recent.pop_front();
        }
    }

    /// The last grants of nodes that are revoked and have not come back.
    pub(crate) fn revoked(&self) -> impl Iterator<Item = &NodeGrant> {
        let is_out = |grant: &&NodeGrant| {
            let revoked = self.view.revoked_up_to(grant.node).is_some_and(|up_to| grant.generation <= up_to);
            revoked && self.view.member(grant.node).is_none()
        };
        self.granted.values().filter(is_out)
    }

    /// A grant as its issuer signed it, looked for from the beginning.
    pub(crate) fn signed(store: &dyn Store, grant: &NodeGrant) -> Result<Option<Envelope>, LoadError> {
        let mut changes = Changes { store, next: 1, page: VecDeque::new() };
        while let Some(envelope) = changes.next()? {
            if envelope.unverified::<NodeGrant>().is_ok_and(|one| one == *grant) {
                return Ok(Some(envelope));
            }
        }
        Ok(None)
    }

    /// The changes after `from`; `None` where only a full map helps: another history, or too long ago, or not yet.
    pub(crate) fn since(&self, from: Position) -> Option<Vec<Envelope>> {
        if from.epoch != self.position.epoch || from.revision == 0 {
            return None;
        }
        let missing = usize::try_from(self.position.revision.checked_sub(from.revision)?).ok()?;
        let skip = self.recent.len().checked_sub(missing)?;
        Some(self.recent.iter().skip(skip).cloned().collect())
    }
}

struct Changes<'a> {
    store: &'a dyn Store,
    next: u64,
    page: VecDeque<store::Entry>,
}

impl Changes<'_> {
    fn next(&mut self) -> Result<Option<Envelope>, LoadError> {
        if self.page.is_empty() {
            let range = Range { start: layout::history(self.next), end: Range::prefix(layout::HISTORY).end };
            self.page = self.store.range(&range, None, PAGE)?.into();
        }
        let Some(entry) = self.page.pop_front() else { return Ok(None) };
        if entry.key != layout::history(self.next) {
            return Err(LoadError::Gap(self.next));
        }
        let revision = self.next;
        let envelope = cbor::from_slice(&entry.value).map_err(|source| LoadError::Malformed { revision, source })?;
        self.next += 1;
        Ok(Some(envelope))
    }
}

fn value(store: &dyn Store, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
    Ok(store::get(store, key)?.map(|entry| entry.value))
}

pub(super) fn number(store: &dyn Store, key: &'static [u8]) -> Result<Option<u64>, StoreError> {
    Ok(value(store, key)?.and_then(|bytes| bytes.try_into().ok()).map(u64::from_be_bytes))
}
