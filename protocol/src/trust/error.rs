//! Why an object is refused.

use ipnet::IpNet;

use crate::envelope::{EnvelopeError, Kind};
use crate::id::{KeyId, MeshId, Name, NodeId};

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
    /// The identity key in the grant is not one that the node chose.
    #[error("grant of {name} does not carry on the node's identity: {reason}")]
    Succession {
        /// Name in the grant.
        name: Name,
        /// What is wrong.
        reason: &'static str,
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
    /// A revocation that cannot hold, whoever signed it.
    #[error("revocation {number} is invalid: {reason}")]
    InvalidRevocation {
        /// Its number.
        number: u64,
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
