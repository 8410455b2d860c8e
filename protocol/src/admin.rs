//! What `meshctl` says to a keyserver over its root-only Unix socket: [JSON lines](crate::line).

mod issuer;
mod post_quantum;
mod rotation;

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::UnixSeconds;
use crate::audit::AuditHead;
use crate::id::{KeyId, MeshId, Name, NodeId, Position, TokenId};
use crate::key::VerifyKey;
use crate::record::PostQuantum;

pub use issuer::{FormerIssuer, IssuerProgress};
pub use post_quantum::PostQuantumState;
pub use rotation::{
    KeyPhase, LONGEST_WAIT, NodeKeys, PlannedRotation, RotationChange, RotationFailure, RotationJob, RotationOrder,
    RotationState, TransportRotation,
};

/// Where a keyserver listens for operators unless configured otherwise.
pub const DEFAULT_SOCKET: &str = "/run/mesh-keyserver/admin.sock";

/// A request to the keyserver.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "kebab-case")]
pub enum AdminRequest {
    /// Answer: [`AdminReply::Status`].
    Status,
    /// Add a cluster to the trust policy. Answer: [`AdminReply::Clusters`] with that one.
    ClusterAdd {
        /// Its name.
        cluster: Name,
        /// Its pools, at most one of each family; without IPv6 one is derived from the mesh id.
        pod_cidrs: Vec<IpNet>,
        /// Prefix length of a node's IPv4 pod CIDR; 24 unless given.
        node_prefix: Option<u8>,
        /// Prefix length of a node's IPv6 pod CIDR; 80 unless given.
        node_prefix6: Option<u8>,
    },
    /// Answer: [`AdminReply::Clusters`].
    ClusterList,
    /// Make a join token. Answer: [`AdminReply::Token`].
    TokenCreate {
        /// Where its nodes enrol.
        cluster: Name,
        /// How many.
        uses: u32,
        /// Seconds it lives.
        ttl: u64,
        /// A node may ask for a pod CIDR inside these; none given: inside the cluster's pools.
        cidrs: Vec<IpNet>,
        /// Tags its nodes get.
        tags: Vec<Name>,
    },
    /// Answer: [`AdminReply::Tokens`].
    TokenList,
    /// Void a token, named by its id or the start of it. Answer: [`AdminReply::Tokens`] with that one.
    TokenRevoke {
        /// At least eight hexadecimal digits.
        token: String,
    },
    /// The mesh as a machine without a network has to know it. Answer: [`AdminReply::Mesh`].
    MeshFile,
    /// Adopt a policy, if enough roots have signed it. Answer: [`AdminReply::Policy`].
    PolicyImport {
        /// Text of a [`PolicyProposal`](crate::offline::PolicyProposal), with some of the signatures or all.
        proposal: String,
        /// Also if it leaves nodes outside, which are out at once.
        #[serde(default)]
        drop_nodes: bool,
    },
    /// Have tunnels be post-quantum, or not: of all nodes, by the policy, or of these clusters, by grants. Answer:
    /// [`AdminReply::PostQuantum`].
    SetPostQuantum {
        /// Whether.
        pq: PostQuantum,
        /// Whose nodes are granted anew; empty: the policy changes.
        clusters: Vec<Name>,
    },
    /// Grants that wait for an issuer elsewhere. Answer: [`AdminReply::GrantsPending`].
    GrantsPending,
    /// Take grants that an issuer has signed. Answer: [`AdminReply::GrantsImported`].
    GrantsImport {
        /// Text of [`SignedGrants`](crate::offline::SignedGrants).
        grants: String,
    },
    /// Refuse a node that waits for its grant: what was reserved for it is free again. Answer:
    /// [`AdminReply::GrantsPending`] with that one.
    GrantReject {
        /// Name, id, or the start of an id.
        node: String,
    },
    /// Answer: [`AdminReply::Nodes`].
    NodeList,
    /// Cut a node off everywhere. Answers: [`AdminReply::Revocation`] as nodes confirm, the last one `done`.
    NodeRevoke {
        /// Name, id, or the start of an id.
        node: String,
        /// For people.
        reason: String,
        /// Void every open token of its cluster too.
        #[serde(default)]
        void_tokens: bool,
        /// Milliseconds to wait for nodes that are connected.
        wait: u64,
        /// Text of a [`RevocationFile`](crate::offline::RevocationFile), signed; absent: the keyserver signs.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        signed: Option<String>,
    },
    /// The next revocation of a revoker whose key is elsewhere, to be signed. Answer: [`AdminReply::RevocationDraft`].
    RevocationDraft {
        /// Name, id, or the start of an id.
        node: String,
        /// For people.
        reason: String,
        /// Who will sign.
        revoker: VerifyKey,
    },
    /// Let a revoked node back in, with a new grant that names the revocation it lifts. Answer: [`AdminReply::Nodes`] with
    /// that one.
    NodeRestore {
        /// Name, id, or the start of an id.
        node: String,
    },
    /// The audit log. Answers: [`AdminReply::Audit`] page by page, the last one `done`.
    AuditExport {
        /// Number of the first entry, from 1.
        from: u64,
    },
    /// Have nodes promote their spare keys, as a job. Answers: [`AdminReply::Rotation`], the last one `done`; of a dry run
    /// [`AdminReply::RotationPlan`].
    Rotate {
        /// Whose, when, how many at a time.
        #[serde(flatten)]
        order: RotationOrder,
        /// Milliseconds to wait for nodes that are connected.
        wait: u64,
    },
    /// Follow a job. Answers: [`AdminReply::Rotation`], the last one `done`.
    RotationFollow {
        /// Its number.
        job: u64,
        /// Milliseconds to wait for nodes that are connected.
        wait: u64,
    },
    /// Name the next key of this keyserver in the policy. Answers: [`AdminReply::TransportRotation`], the last one `done`.
    TransportRotate {
        /// It.
        next: VerifyKey,
        /// Milliseconds to wait for nodes that are connected.
        wait: u64,
    },
    /// Give the issuer whose key lies at the keyserver another key; again: follow that. Answers: [`AdminReply::Issuer`], the
    /// last one `done`.
    IssuerRotate {
        /// Nothing that the key before signed stands.
        #[serde(default)]
        stolen: bool,
        /// Milliseconds to wait for nodes that are connected.
        wait: u64,
    },
    /// Take the former keys of that issuer out of the policy, once its nodes are through. Answers: [`AdminReply::Issuer`], the
    /// last one `done`.
    IssuerFinish {
        /// Also while nodes are not connected that hold a grant of a former key.
        #[serde(default)]
        leave_absent: bool,
        /// Milliseconds to wait for nodes that are connected.
        wait: u64,
    },
    /// Answer: [`AdminReply::Rotations`].
    RotationList,
    /// Hold a job, let it go on, or end it. Answer: [`AdminReply::Rotations`] with those that changed, without nodes.
    RotationChange {
        /// Which; absent: all that are not over.
        job: Option<u64>,
        /// What.
        change: RotationChange,
    },
}

/// Why a request failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AdminErrorCode {
    /// The request cannot be read, or contradicts itself.
    BadRequest,
    /// No such cluster, node or token.
    NotFound,
    /// It exists already, or overlaps something that does.
    Conflict,
    /// The store refuses to write.
    Unavailable,
    /// A fault of the keyserver.
    Internal,
}

/// A failure with words for people.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct AdminError {
    /// For programs.
    pub code: AdminErrorCode,
    /// What was tried, on what, what to do.
    pub message: String,
}

/// An answer of the keyserver.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "kebab-case")]
pub enum AdminReply {
    /// It failed.
    Error(AdminError),
    /// The keyserver's state.
    Status(Box<KeyserverStatus>),
    /// Clusters, by name.
    Clusters {
        /// One each.
        clusters: Vec<ClusterStatus>,
    },
    /// A new token. The line is a secret.
    Token {
        /// What to paste into `meshd join`.
        line: String,
        /// About it.
        token: TokenStatus,
    },
    /// Tokens that are not forgotten yet, newest first.
    Tokens {
        /// One each.
        tokens: Vec<TokenStatus>,
    },
    /// The mesh as a machine without a network has to know it.
    Mesh {
        /// Text of a [`MeshFile`](crate::offline::MeshFile).
        file: String,
    },
    /// A revocation to be signed.
    RevocationDraft {
        /// Text of a [`RevocationFile`](crate::offline::RevocationFile).
        file: String,
    },
    /// A policy that was imported.
    Policy {
        /// Its version.
        version: u64,
        /// It is in force; else it waits for more signatures.
        adopted: bool,
        /// Roots that have signed.
        signed: u32,
        /// Roots that have to.
        needed: u32,
        /// Nodes that it does not cover any more: they are out.
        dropped: u32,
        /// Grants that wait for an issuer elsewhere.
        #[serde(default)]
        pending: u32,
    },
    /// Grants that wait for an issuer, in the order of their serials.
    GrantsPending {
        /// One each.
        pending: Vec<PendingStatus>,
        /// Text of [`GrantRequests`](crate::offline::GrantRequests): what the issuer has to see.
        file: String,
    },
    /// What became of each grant that was imported.
    GrantsImported {
        /// One each.
        grants: Vec<ImportedGrant>,
    },
    /// Nodes, by name.
    Nodes {
        /// One each.
        nodes: Vec<NodeStatus>,
    },
    /// How far a revocation is. Progress until `done`.
    Revocation {
        /// Who is cut off.
        node: Name,
        /// Connected nodes that have to confirm.
        online: u32,
        /// Those that did: no packet of the node is accepted there any more.
        confirmed: u32,
        /// Names of connected nodes that did not yet.
        waiting: Vec<Name>,
        /// Names of nodes that were not connected: they learn of it when they come back.
        offline: Vec<Name>,
        /// Milliseconds since the revocation was stored.
        millis: u64,
        /// Nothing follows: all confirmed, or the wait is over.
        done: bool,
    },
    /// Some lines of the audit log.
    Audit {
        /// [`AuditEntry`](crate::audit::AuditEntry) as it was written, oldest first.
        lines: Vec<String>,
        /// Where the log ended when the first page was read.
        head: AuditHead,
        /// Nothing follows.
        done: bool,
    },
    /// How far a rotation is. Progress until `done`.
    Rotation {
        /// Number of its job, which goes on by itself.
        #[serde(default)]
        job: u64,
        /// Wave that is under way, from 1; 0: it has not begun.
        #[serde(default)]
        wave: u32,
        /// How many there are.
        #[serde(default)]
        waves: u32,
        /// Nodes in it.
        total: u32,
        /// Those whose new record is in the directory.
        promoted: Vec<Name>,
        /// Those whose new record every connected node has in force.
        confirmed: Vec<Name>,
        /// Those that refused, and why.
        failed: Vec<RotationFailure>,
        /// Those that are not connected.
        offline: Vec<Name>,
        /// Milliseconds since the request.
        millis: u64,
        /// Nothing follows: all confirmed or failed, or the job is held, or its time has not come, or the wait is over.
        done: bool,
    },
    /// How far it is that nodes know the keyserver's next key. Progress until `done`.
    TransportRotation(TransportRotation),
    /// How far a mesh is with post-quantum tunnels.
    PostQuantum(PostQuantumState),
    /// How far nodes are with an issuer's present key. Progress until `done`.
    Issuer(IssuerProgress),
    /// What a rotation would do.
    RotationPlan {
        /// In the order in which they would be asked.
        nodes: Vec<PlannedRotation>,
    },
    /// Jobs, newest first, and the keys of nodes, by name.
    Rotations {
        /// The newest 64.
        jobs: Vec<RotationJob>,
        /// Every member.
        nodes: Vec<NodeKeys>,
    },
}

impl AdminReply {
    /// Whether no further reply to the same request follows.
    #[must_use]
    pub fn is_final(&self) -> bool {
        match self {
            Self::TransportRotation(told) => told.done,
            Self::Issuer(told) => told.done,
            Self::Revocation { done, .. } | Self::Rotation { done, .. } | Self::Audit { done, .. } => *done,
            _ => true,
        }
    }
}

/// A grant that waits for an issuer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PendingStatus {
    /// Who.
    pub node: NodeId,
    /// Its name.
    pub name: Name,
    /// Its cluster.
    pub cluster: Name,
    /// The key that has to sign.
    pub issuer: VerifyKey,
    /// A member whose grant comes to its end, or is of a key that its issuer had before; else a node that waits to get in, if
    /// `identity` is absent.
    pub renewal: bool,
    /// What it has was signed by a stolen key.
    #[serde(default)]
    pub regrant: bool,
    /// The identity key that a member wants in place of the one it has.
    #[serde(default)]
    pub identity: Option<KeyId>,
    /// A revoked node that is to come back.
    #[serde(default)]
    pub restoration: bool,
    /// Prefixes reserved for it.
    pub prefixes: Vec<IpNet>,
    /// Its serial.
    pub serial: u64,
    /// Seconds since 1970 after which it is forgotten.
    pub until: UnixSeconds,
}

/// What became of an imported grant.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImportedGrant {
    /// For which node.
    pub name: Name,
    /// Why it was refused; absent: it is in force.
    pub error: Option<String>,
}

/// The keyserver's state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyserverStatus {
    /// Program version.
    pub version: String,
    /// The mesh's name.
    pub mesh: Name,
    /// The mesh's id.
    pub mesh_id: MeshId,
    /// `easy-with-root`: the root's key lies here; `easy`: the issuer's key lies here; `strict`: neither does.
    pub trust: String,
    /// A revoker's key lies here: who takes the machine can cut nodes off.
    #[serde(default)]
    pub revokes: bool,
    /// Grants that wait for an issuer.
    #[serde(default)]
    pub pending: u32,
    /// Issuers that have another key and whose former one is named in the policy still.
    #[serde(default)]
    pub issuers: Vec<IssuerProgress>,
    /// Newest policy.
    pub policy_version: u64,
    /// Where the directory stands.
    pub position: Position,
    /// Addresses it listens on.
    pub listen: Vec<SocketAddr>,
    /// Nodes with a valid grant.
    pub nodes: u32,
    /// Nodes connected.
    pub connected: u32,
    /// Seconds since start.
    pub uptime: u64,
    /// What somebody has to look at.
    pub alarms: Vec<String>,
}

/// A cluster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterStatus {
    /// Its name.
    pub cluster: Name,
    /// Its pools.
    pub pod_cidrs: Vec<IpNet>,
    /// Prefix length of a node's IPv4 pod CIDR.
    pub node_prefix: u8,
    /// Prefix length of a node's IPv6 pod CIDR.
    pub node_prefix6: u8,
    /// Nodes in it.
    pub nodes: u32,
}

/// A join token, without its secret half.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenStatus {
    /// Its id.
    pub id: TokenId,
    /// Where its nodes enrol.
    pub cluster: Name,
    /// How many may.
    pub uses: u32,
    /// How many did.
    pub used: u32,
    /// Seconds since 1970 after which nobody may.
    pub expires: UnixSeconds,
    /// An operator voided it.
    pub revoked: bool,
    /// Prefixes a node's own CIDR has to lie in.
    pub cidrs: Vec<IpNet>,
    /// Tags its nodes get.
    pub tags: Vec<Name>,
}

/// A node as the keyserver sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeStatus {
    /// Who.
    pub node: NodeId,
    /// Its name.
    pub name: Name,
    /// Its cluster.
    pub cluster: Name,
    /// Its own addresses in the mesh.
    pub addresses: Vec<IpAddr>,
    /// Its pod CIDRs.
    pub pod_cidrs: Vec<IpNet>,
    /// Generation of its grant.
    pub generation: u64,
    /// Seconds since 1970 after which the grant is void.
    pub expires: UnixSeconds,
    /// Connected now, from there.
    pub connected: Option<SocketAddr>,
    /// Epoch of its current key; absent until it published a record.
    pub key_epoch: Option<u64>,
    /// Revoked.
    pub revoked: bool,
}
