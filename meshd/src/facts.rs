//! Plain values that the parts of `meshd` hand to each other: what the directory says, which keys this node has, what
//! the host looks like. [`desired`](crate::desired) computes from them what should be.
//!
//! ```text
//! directory, identity ─ DirectoryFacts, OwnKeys ─┐
//! pods ─ leases ─────────────────────────────────┼─> Facts ─> desired ─> reconcile ─> host, dataplane
//! host/watch ─ HostFacts ────────────────────────┘
//! ```

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use ipnet::IpNet;
use mesh_protocol::id::{MeshId, Name, NodeId, Position};
use mesh_protocol::key::{KemPublic, TunnelKey, TunnelSecret};
use mesh_protocol::local::Lease;

use crate::identity::kem::KemPair;

/// Everything that `desired` looks at.
#[derive(Debug, Clone)]
pub(crate) struct Facts {
    /// What the directory says.
    pub(crate) directory: Arc<DirectoryFacts>,
    /// Own tunnel keys.
    pub(crate) keys: Arc<OwnKeys>,
    /// Leases of attached pods.
    pub(crate) pods: Arc<Vec<Lease>>,
    /// What was seen of the host.
    pub(crate) host: Arc<HostFacts>,
}

/// The verified directory as this node needs it; made anew with each change, from disk at start.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct DirectoryFacts {
    /// The mesh pinned at join.
    pub(crate) mesh: MeshId,
    /// Its name.
    pub(crate) mesh_name: Name,
    /// Newest policy.
    pub(crate) policy_version: u64,
    /// Where the directory stands.
    pub(crate) position: Position,
    /// This node, by its own grant.
    pub(crate) own: OwnGrant,
    /// Prefixes of every cluster, and of the nodes themselves: what must never leave in clear text.
    pub(crate) pools: Vec<Pool>,
    /// All other members that have published a record, sorted by id. Revoked, departed and expired ones are not here.
    pub(crate) peers: Vec<PeerFacts>,
    /// No fresh checkpoint within the policy's exposure: tunnels have to close.
    pub(crate) exposed: bool,
}

/// Addresses of a cluster, or of nodes themselves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Pool {
    /// The cluster; absent for the nodes' own addresses.
    pub(crate) cluster: Option<Name>,
    /// The prefix.
    pub(crate) prefix: IpNet,
}

/// What the issuer gave to this node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct OwnGrant {
    /// Its id.
    pub(crate) node: NodeId,
    /// Its name.
    pub(crate) name: Name,
    /// Its cluster.
    pub(crate) cluster: Name,
    /// Its addresses in the mesh: IPv4, IPv6.
    pub(crate) addresses: Vec<IpAddr>,
    /// Addresses of its pods.
    pub(crate) pod_cidrs: Vec<IpNet>,
}

/// One peer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PeerFacts {
    /// Who.
    pub(crate) node: NodeId,
    /// Small stable number for the data plane: kept as long as the node is a member, never reused in one run.
    pub(crate) number: u32,
    /// Its name.
    pub(crate) name: Name,
    /// Its cluster.
    pub(crate) cluster: Name,
    /// Its addresses in the mesh.
    pub(crate) addresses: Vec<IpAddr>,
    /// Addresses of its pods.
    pub(crate) pod_cidrs: Vec<IpNet>,
    /// `seq` of its record.
    pub(crate) seq: u64,
    /// Its keys with their epochs: current, previous if there, spare.
    pub(crate) current: (u64, TunnelKey),
    /// The key before.
    pub(crate) previous: Option<(u64, TunnelKey)>,
    /// The key after.
    pub(crate) spare: (u64, TunnelKey),
    /// Where it may be reached, best first. Expired ones are hints and come last.
    pub(crate) candidates: Vec<SocketAddr>,
    /// Lanes it receives on.
    pub(crate) lanes: u8,
    /// Its ML-KEM-768 key with its epoch.
    pub(crate) kem: (u64, KemPublic),
    /// No tunnel without a post-quantum preshared key: policy, its grant or ours says so.
    pub(crate) post_quantum: bool,
}

/// Own WireGuard keys. The spare is not in use yet, so its secret is not here.
#[derive(Debug, Clone)]
pub(crate) struct OwnKeys {
    /// `seq` of the own record that names them.
    pub(crate) seq: u64,
    /// What this node initiates with.
    pub(crate) current: (u64, TunnelSecret),
    /// What still answers for peers that were away.
    pub(crate) previous: Option<(u64, TunnelSecret)>,
    /// Epoch of the spare.
    pub(crate) spare_epoch: u64,
    /// Seconds since 1970 when `current` was promoted.
    pub(crate) promoted: u64,
    /// ML-KEM-768 pairs with their epochs, newest first: current, previous.
    pub(crate) kem: Vec<(u64, KemPair)>,
}

/// What was seen of the host.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct HostFacts {
    /// Smallest MTU of the links that lead to the underlay, in bytes.
    pub(crate) underlay_mtu: u16,
    /// Addresses of this host on the underlay, none of them of the mesh.
    pub(crate) underlay_addresses: Vec<IpAddr>,
    /// Host ends of pod links that exist: names.
    pub(crate) pod_links: Vec<String>,
    /// IPv6 is switched on.
    pub(crate) has_ipv6: bool,
}
