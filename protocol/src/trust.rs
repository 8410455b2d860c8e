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
mod error;
mod grant;
mod identity;
mod issuer;
mod policy;
mod prefixes;
mod record;
mod request;
mod revocation;
mod seen;

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;

use crate::UnixSeconds;
use crate::envelope::{Envelope, Kind};
use crate::id::{Hash, KeyId, MeshId, Name, NodeId, Position};
use crate::key::VerifyKey;
use crate::record::{Endpoints, NodeGrant, NodeRecord, Revocation, RevocationHead, TrustPolicy};

pub use checkpoint::{CheckpointVerdict, compare_checkpoints};
pub use error::TrustError;
pub use policy::{check_policy, free_pool_v6};
use prefixes::PrefixOwners;
pub use request::RequestError;
pub use seen::{Seen, SeenRecord};

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
    /// The grant that `record` names, or else the one before: records under it stay good until the node speaks under the
    /// newest.
    earlier_grant: Option<Box<Accepted<NodeGrant>>>,
}

impl Member {
    /// Whether its grant holds at `now`, to a clock that the caller trusts.
    #[must_use]
    pub fn is_valid_at(&self, now: UnixSeconds) -> bool {
        now < self.grant.object.expires
    }

    /// The grant that its record names, if that is not the newest one. Only where both hold the same name and prefixes:
    /// applied to another view it then collides with nobody.
    fn grant_of_record(&self) -> Option<&Accepted<NodeGrant>> {
        let (record, earlier) = (self.record.as_ref()?, self.earlier_grant.as_ref()?);
        let same =
            earlier.object.name == self.grant.object.name && earlier.object.prefixes().eq(self.grant.object.prefixes());
        (same && record.object.grant == earlier.hash).then_some(earlier)
    }

    /// Whether it said something since its newest grant came to it.
    #[must_use]
    pub fn speaks_under_its_grant(&self) -> bool {
        self.record.as_ref().is_some_and(|record| record.object.grant == self.grant.hash)
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
    /// Members that a policy put out, with what they said last; as many as were members once.
    out: BTreeMap<NodeId, Member>,
    names: BTreeMap<Name, NodeId>,
    prefixes: PrefixOwners,
    /// Hashes of WireGuard and KEM keys ever shown, and of identity keys that followed others, and who showed them first.
    key_holders: BTreeMap<Hash, NodeId>,
    /// How many of those each node has.
    keys_shown: BTreeMap<NodeId, usize>,
    /// What every node ever granted has reached: outlives its membership, so that nothing older comes back.
    seen: BTreeMap<NodeId, Seen>,
    /// The revokers of every policy so far: who a retired one revoked stays revoked.
    revokers: BTreeMap<KeyId, VerifyKey>,
    chains: BTreeMap<KeyId, Vec<Accepted<Revocation>>>,
    revoked: BTreeMap<NodeId, RevokedUpTo>,
}

#[derive(Debug, Clone)]
struct RevokedUpTo {
    generation: u64,
    /// Hashes of the revocations that reach that far: a grant lifts one of them.
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
        let revokers = first.object.revokers.iter().map(|key| (key.id(), *key)).collect();
        let mut view = Self {
            mesh,
            policies: vec![first],
            members: BTreeMap::new(),
            out: BTreeMap::new(),
            names: BTreeMap::new(),
            prefixes: PrefixOwners::default(),
            key_holders: BTreeMap::new(),
            keys_shown: BTreeMap::new(),
            seen: BTreeMap::new(),
            revokers,
            chains: BTreeMap::new(),
            revoked: BTreeMap::new(),
        };
        for envelope in rest {
            view.apply_policy(envelope)?;
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

    /// A revocation that reaches as far as any of `node`: what a grant has to name to lift it.
    #[must_use]
    pub fn to_lift(&self, node: NodeId) -> Option<Hash> {
        self.revoked.get(&node)?.by.first().copied()
    }

    /// All revocations, chain by chain.
    pub fn revocations(&self) -> impl Iterator<Item = &Accepted<Revocation>> {
        self.chains.values().flatten()
    }

    /// One revocation by its place.
    #[must_use]
    pub fn revocation(&self, revoker: KeyId, number: u64) -> Option<&Accepted<Revocation>> {
        let at = usize::try_from(number.checked_sub(1)?).ok()?;
        self.chains.get(&revoker)?.get(at)
    }

    /// Members whose ids come after this one, in the order of their ids.
    pub fn members_after(&self, after: Option<NodeId>) -> impl Iterator<Item = (&NodeId, &Member)> {
        use std::ops::Bound::{Excluded, Unbounded};
        self.members.range((after.map_or(Unbounded, Excluded), Unbounded))
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

    /// Everything accepted as it would have to be applied to an empty view: policies, revocations, grants, records.
    /// A node that has not spoken since its grant was renewed comes with the grant before, which its record names; without
    /// either, if the key that signed that one is no issuer's any more. Endpoints are not part of it.
    pub fn envelopes(&self) -> impl Iterator<Item = &Envelope> {
        let policies = self.policies.iter().map(|policy| &policy.envelope);
        let revocations = self.revocations().map(|revocation| &revocation.envelope);
        let standing = |earlier: &&Accepted<NodeGrant>| self.has_standing_signer(earlier);
        let grants = self.members.values().flat_map(move |member| {
            let earlier = member.grant_of_record().filter(standing);
            earlier.into_iter().chain([&member.grant]).map(|grant| &grant.envelope)
        });
        let records = self.members.values().filter_map(move |member| {
            let record = member.record.as_ref()?;
            let earlier = member.earlier_grant.as_deref().filter(|earlier| earlier.hash == record.object.grant);
            earlier.is_none_or(|earlier| self.has_standing_signer(earlier)).then_some(&record.envelope)
        });
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
