//! What the paths to a node carry, as `meshd` tells it.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use crate::id::{Name, NodeId};

/// What the paths to a node carry.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PathReport {
    /// Who.
    pub node: NodeId,
    /// Its name.
    pub name: Name,
    /// MTU of the links underneath, in bytes; absent where it is not known.
    pub underlay_mtu: Option<u16>,
    /// MTU of the device, in bytes: the largest inner packet on any path.
    pub device_mtu: u16,
    /// One for each pair of lanes that packets were sent on, in order.
    pub paths: Vec<PathStatus>,
}

/// What the path of one pair of lanes carries.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PathStatus {
    /// Number of this node's lane.
    pub lane: u32,
    /// Number of the other node's.
    pub remote_lane: u32,
    /// Where datagrams go.
    pub endpoint: SocketAddr,
    /// Largest datagram known to pass in one piece, IP header included, in bytes.
    pub path_mtu: u16,
    /// Largest inner packet that senders are allowed on it, in bytes.
    pub inner_mtu: u16,
    /// `unanswered`, `searching`, `confirmed` or `black-hole`.
    pub state: String,
    /// Seconds since the last probe was sent.
    pub last_probe: Option<u64>,
    /// Times that large packets were found to vanish.
    pub black_holes: u64,
}
