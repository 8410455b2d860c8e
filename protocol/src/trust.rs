//! Who may say what: the rules by which keyserver, `meshd` and `meshctl` accept signed objects.
//!
//! A [`View`] holds what was accepted so far and takes one envelope at a time. It has no clock: whether a grant has
//! expired is asked of it with a time. Whatever is refused changes nothing.
//!
//! ```text
//! mesh id ── policy 1 ── policy n ──┬── issuer ── grant ── record, endpoints
//!                                   ├── revoker ── revocation
//!                                   └── keyserver ── checkpoint
//! ```

mod checkpoint;
mod grant;
mod policy;
mod prefixes;
mod record;
mod revocation;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;

use crate::UnixSeconds;
use crate::envelope::{Envelope, EnvelopeError, Kind};
use crate::id::{Hash, KeyId, MeshId, Name, NodeId, Position};
use crate::record::{Endpoints, NodeGrant, NodeRecord, Revocation, RevocationHead, TrustPolicy};

pub use checkpoint::{CheckpointVerdict, compare_checkpoints};
use prefixes::PrefixOwners;

/// An object was refused. Somebody else's mistake, or an attack: count it, keep what was there.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TrustError {
    /// Not well formed, or not signed by a key that may.
    #[error(transparent)]
    Envelope(#[from] EnvelopeError),
    /// This kind of object is not part of the directory.
    #[error("{0:?} does not belong into the directory")]
    NotADirectoryObject(Kind),
    /// A policy that cannot hold, whoever signed it.
    #[error("trust policy {version} is invalid: {reason}")]
    InvalidPolicy {
        /// Its version.
        version: u64,
        /// What is wrong.
        reason: String,
    },
    /// Not the successor of the policy held.
    #[error("trust policy {got} does not follow policy {held}")]
    PolicyOutOfOrder {
        /// Version held.
        held: u64,
        /// Version that arrived.
        got: u64,
    },
    /// The first policy is not the one that was pinned at join.
    #[error("trust policy 1 is of mesh {got}, not of mesh {pinned}")]
    OtherMesh {
        /// Pinned at join.
        pinned: MeshId,
        /// What the policy hashes to.
        got: MeshId,
    },
    /// The grant goes beyond what its issuer may give.
    #[error("grant of {name} is outside its issuer's scope: {reason}")]
    OutOfScope {
        /// Name in the grant.
        name: Name,
        /// What is outside.
        reason: String,
    },
    /// A grant of a higher generation is held.
    #[error("grant of {name} has generation {got}, {held} is held")]
    OldGeneration {
        /// Name in the grant.
        name: Name,
        /// Generation held.
        held: u64,
        /// Generation that arrived.
        got: u64,
    },
    /// The node is revoked and the grant does not lift that.
    #[error("node {} is revoked up to generation {up_to_generation}", .node.short())]
    Revoked {
        /// Who.
        node: NodeId,
        /// Up to which generation.
        up_to_generation: u64,
    },
    /// Another node was there first with this name.
    #[error("name {name} of node {} is already held by node {}", .node.short(), .holder.short())]
    NameTaken {
        /// The name.
        name: Name,
        /// Who asked for it.
        node: NodeId,
        /// Who holds it.
        holder: NodeId,
    },
    /// Another node was there first with this prefix, or one that overlaps it.
    #[error("{prefix} of {name} overlaps {held} of {holder}")]
    PrefixTaken {
        /// What was asked for.
        prefix: IpNet,
        /// Name of the node that asked.
        name: Name,
        /// The prefix in the way.
        held: IpNet,
        /// Name of the node that holds it.
        holder: Name,
    },
    /// There is no grant for this node.
    #[error("node {} has no grant", .0.short())]
    NoGrant(NodeId),
    /// The record speaks under a grant that is not the node's.
    #[error("record of {name} names another grant than the one held")]
    OtherGrant {
        /// The node's name.
        name: Name,
    },
    /// A higher `seq` is held.
    #[error("{kind:?} of {name} has seq {got}, {held} is held")]
    OldSeq {
        /// Record or endpoints.
        kind: Kind,
        /// The node's name.
        name: Name,
        /// Held.
        held: u64,
        /// Arrived.
        got: u64,
    },
    /// Two different objects where only one can be: keep the old, keep both as evidence, alarm.
    #[error("{kind:?} of {signer} at {number} differs from the one held: somebody signed two truths")]
    Equivocation {
        /// What.
        kind: Kind,
        /// Whose.
        signer: String,
        /// `seq`, generation or number.
        number: u64,
    },
    /// One of the record's keys has another holder, today or earlier.
    #[error("a key of {name} belongs to node {}", .holder.short())]
    KeyTaken {
        /// Name of the node that showed it.
        name: Name,
        /// Who had it first.
        holder: NodeId,
    },
    /// The record contradicts itself.
    #[error("record of {name} is invalid: {reason}")]
    InvalidRecord {
        /// The node's name.
        name: Name,
        /// What is wrong.
        reason: &'static str,
    },
    /// A link of a revoker's chain is missing.
    #[error("revocation {got} of key {} does not follow {held}", .revoker.short())]
    RevocationGap {
        /// Whose chain.
        revoker: KeyId,
        /// Its end here.
        held: u64,
        /// What arrived.
        got: u64,
    },
}

/// What an accepted envelope changed.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Change {
    /// The very same object was held already.
    Nothing,
    /// A newer policy; members that it no longer covers are out.
    Policy {
        /// Its version.
        version: u64,
        /// Who is out.
        dropped: Vec<NodeId>,
    },
    /// A new grant.
    Grant {
        /// For whom.
        node: NodeId,
        /// Members with a higher serial that collided with it, and are out: alarm.
        displaced: Vec<NodeId>,
    },
    /// A newer record.
    Record {
        /// Whose.
        node: NodeId,
    },
    /// Newer endpoints.
    Endpoints {
        /// Whose.
        node: NodeId,
    },
    /// A node is out.
    Revoked {
        /// Who.
        node: NodeId,
        /// It was a member until now.
        was_member: bool,
    },
}

/// An accepted object and the envelope it came in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Accepted<T> {
    /// What it says.
    pub object: T,
    /// What was signed.
    pub envelope: Envelope,
    /// [`Envelope::hash`] of it.
    pub hash: Hash,
}

/// A node with a valid grant, and what it says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// The highest generation seen.
    pub grant: Accepted<NodeGrant>,
    /// Its newest record.
    pub record: Option<Accepted<NodeRecord>>,
    /// Its newest endpoints.
    pub endpoints: Option<Accepted<Endpoints>>,
    /// Hash of the grant before: records under it stay good until the node speaks again.
    previous_grant: Option<Hash>,
}

impl Member {
    /// Whether its grant holds at `now`, to a clock that the caller trusts.
    #[must_use]
    pub fn is_valid_at(&self, now: UnixSeconds) -> bool {
        now < self.grant.object.expires
    }

    /// Whether it left for good by itself.
    #[must_use]
    pub fn has_departed(&self) -> bool {
        self.record.as_ref().is_some_and(|record| record.object.departed)
    }
}

/// Everything that was accepted, from the mesh id down.
#[derive(Debug, Clone)]
pub struct View {
    mesh: MeshId,
    policies: Vec<Accepted<TrustPolicy>>,
    members: BTreeMap<NodeId, Member>,
    names: BTreeMap<Name, NodeId>,
    prefixes: PrefixOwners,
    /// Hashes of WireGuard and KEM keys ever shown, and who showed them first.
    key_holders: BTreeMap<Hash, NodeId>,
    chains: BTreeMap<KeyId, Vec<Accepted<Revocation>>>,
    revoked: BTreeMap<NodeId, RevokedUpTo>,
}

#[derive(Debug, Clone)]
struct RevokedUpTo {
    generation: u64,
    /// Hashes of the revocations that say so: a grant lifts one of them.
    by: BTreeSet<Hash>,
}

impl View {
    /// Starts from a chain of policies, oldest first, whose first hashes to `mesh`.
    ///
    /// # Errors
    /// [`TrustError::OtherMesh`] if it does not; else as [`Self::apply`].
    pub fn pinned(mesh: MeshId, policies: &[Envelope]) -> Result<Self, TrustError> {
        let (first, rest) = policies.split_first().ok_or(TrustError::PolicyOutOfOrder { held: 0, got: 0 })?;
        let first = policy::first(mesh, first)?;
        let mut view = Self {
            mesh,
            policies: vec![first],
            members: BTreeMap::new(),
            names: BTreeMap::new(),
            prefixes: PrefixOwners::default(),
            key_holders: BTreeMap::new(),
            chains: BTreeMap::new(),
            revoked: BTreeMap::new(),
        };
        for envelope in rest {
            view.apply(envelope)?;
        }
        Ok(view)
    }

    /// Takes one policy, grant, record, endpoints or revocation.
    ///
    /// # Errors
    /// Any [`TrustError`]; the view is then as it was.
    pub fn apply(&mut self, envelope: &Envelope) -> Result<Change, TrustError> {
        match envelope.kind() {
            Kind::TrustPolicy => self.apply_policy(envelope),
            Kind::NodeGrant => self.apply_grant(envelope),
            Kind::NodeRecord => self.apply_record(envelope),
            Kind::Endpoints => self.apply_endpoints(envelope),
            Kind::Revocation => self.apply_revocation(envelope),
            kind @ (Kind::Checkpoint | Kind::TokenLimits) => Err(TrustError::NotADirectoryObject(kind)),
        }
    }

    /// The mesh it is of.
    #[must_use]
    pub fn mesh(&self) -> MeshId {
        self.mesh
    }

    /// The newest policy.
    #[must_use]
    pub fn policy(&self) -> &TrustPolicy {
        &self.newest_policy().object
    }

    /// Hash of the newest policy.
    #[must_use]
    pub fn policy_hash(&self) -> Hash {
        self.newest_policy().hash
    }

    /// All policies, oldest first.
    #[must_use]
    pub fn policies(&self) -> &[Accepted<TrustPolicy>] {
        &self.policies
    }

    /// All members, in the order of their ids.
    pub fn members(&self) -> impl Iterator<Item = (&NodeId, &Member)> {
        self.members.iter()
    }

    /// One member.
    #[must_use]
    pub fn member(&self, node: NodeId) -> Option<&Member> {
        self.members.get(&node)
    }

    /// The member of that name.
    #[must_use]
    pub fn member_named(&self, name: &Name) -> Option<(NodeId, &Member)> {
        let node = *self.names.get(name)?;
        Some((node, self.members.get(&node)?))
    }

    /// Who holds a prefix that overlaps `prefix`, and which.
    #[must_use]
    pub fn holder_of(&self, prefix: IpNet) -> Option<(IpNet, NodeId)> {
        self.prefixes.overlapping(prefix).next()
    }

    /// The generation up to which `node` is revoked.
    #[must_use]
    pub fn revoked_up_to(&self, node: NodeId) -> Option<u64> {
        self.revoked.get(&node).map(|revoked| revoked.generation)
    }

    /// All revocations, chain by chain.
    pub fn revocations(&self) -> impl Iterator<Item = &Accepted<Revocation>> {
        self.chains.values().flatten()
    }

    /// The end of each revoker's chain, sorted by key id.
    #[must_use]
    pub fn revocation_heads(&self) -> Vec<RevocationHead> {
        let head = |(revoker, chain): (&KeyId, &Vec<Accepted<Revocation>>)| {
            let last = chain.last()?;
            Some(RevocationHead { revoker: *revoker, number: last.object.number, hash: last.hash })
        };
        self.chains.iter().filter_map(head).collect()
    }

    /// Hashes of keys that were ever shown, and their holders: to be kept with the accepted objects, because retired
    /// keys are in none of those.
    pub fn key_holders(&self) -> impl Iterator<Item = (Hash, NodeId)> + '_ {
        self.key_holders.iter().map(|(key, node)| (*key, *node))
    }

    /// Gives back what [`Self::key_holders`] told before a restart.
    pub fn restore_key_holders(&mut self, holders: impl IntoIterator<Item = (Hash, NodeId)>) {
        for (key, node) in holders {
            self.key_holders.entry(key).or_insert(node);
        }
    }

    /// Everything accepted as it would have to be applied to an empty view: policies, revocations, grants, records.
    /// Endpoints are not part of it.
    pub fn envelopes(&self) -> impl Iterator<Item = &Envelope> {
        let policies = self.policies.iter().map(|policy| &policy.envelope);
        let revocations = self.revocations().map(|revocation| &revocation.envelope);
        let grants = self.members.values().map(|member| &member.grant.envelope);
        let records = self.members.values().filter_map(|member| Some(&member.record.as_ref()?.envelope));
        policies.chain(revocations).chain(grants).chain(records)
    }

    /// Verifies a checkpoint's signature: by a keyserver key of the newest policy.
    ///
    /// # Errors
    /// [`TrustError::Envelope`].
    pub fn checkpoint(&self, envelope: &Envelope) -> Result<crate::record::Checkpoint, TrustError> {
        Ok(envelope.verified(self.mesh, &self.policy().keyservers, 1)?)
    }

    fn newest_policy(&self) -> &Accepted<TrustPolicy> {
        self.policies.last().expect("a view starts with a policy")
    }

    fn accept<T>(&self, object: T, envelope: &Envelope) -> Accepted<T> {
        Accepted { object, envelope: envelope.clone(), hash: envelope.hash(self.mesh) }
    }

    fn remove_member(&mut self, node: NodeId) -> Option<Member> {
        let member = self.members.remove(&node)?;
        self.names.remove(&member.grant.object.name);
        self.prefixes.remove(node, member.grant.object.prefixes());
        Some(member)
    }
}

/// The history's hash after one more change: `SHA-256(state ‖ change)`.
#[must_use]
pub fn next_state(state: Hash, change: Hash) -> Hash {
    Hash(crate::id::sha256(&[state.as_bytes(), change.as_bytes()]))
}

/// The position before anything happened in history `epoch`.
#[must_use]
pub fn beginning(epoch: u64) -> Position {
    Position { epoch, revision: 0 }
}
