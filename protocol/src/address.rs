//! IPv6 addresses that need no registry: a ULA /48 from the mesh id, and parts of it for nodes and clusters.
//!
//! ```text
//! fd | 40 bits of the mesh id | 0000            | 64 bits of the node id        a node's own address
//! fd | 40 bits of the mesh id | cluster (1..)   | node block | ..               pods of a cluster (/64), of a node (/80)
//! ```
//!
//! Source: RFC 4193, section 3 (the global id is a hash, as section 3.2.2 asks for).

use std::net::Ipv6Addr;

use ipnet::Ipv6Net;

use crate::id::{MeshId, NodeId};

/// Prefix length of the pod CIDR that a node gets out of a derived IPv6 pool.
pub const DERIVED_NODE_PREFIX: u8 = 80;

/// The /48 of a mesh.
#[must_use]
pub fn mesh_prefix(mesh: MeshId) -> Ipv6Net {
    subnet(mesh, 0, 48)
}

/// A node's own IPv6 address in the mesh.
#[must_use]
pub fn mesh_v6(mesh: MeshId, node: NodeId) -> Ipv6Addr {
    let mut octets = subnet(mesh, 0, 64).addr().octets();
    octets[8..].copy_from_slice(&node.as_bytes()[..8]);
    Ipv6Addr::from(octets)
}

/// The /64 that holds every node's own address.
#[must_use]
pub fn node_pool_v6(mesh: MeshId) -> Ipv6Net {
    subnet(mesh, 0, 64)
}

/// The IPv6 pool of the `ordinal`-th cluster, counted from 1, for a cluster without an IPv6 pod CIDR of its own.
#[must_use]
pub fn cluster_pool_v6(mesh: MeshId, ordinal: u16) -> Ipv6Net {
    subnet(mesh, ordinal, 64)
}

fn subnet(mesh: MeshId, number: u16, prefix: u8) -> Ipv6Net {
    let mut octets = [0; 16];
    octets[0] = 0xfd;
    octets[1..6].copy_from_slice(&mesh.as_bytes()[..5]);
    octets[6..8].copy_from_slice(&number.to_be_bytes());
    Ipv6Net::new(Ipv6Addr::from(octets), prefix).expect("48 and 64 are prefix lengths")
}
