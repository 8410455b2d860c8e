//! What `mesh-cni` and `meshctl` say to `meshd` over its Unix socket: [JSON lines](crate::line).
//!
//! Root may send everything; members of the socket's group may send what [`LocalRequest::is_read_only`].

mod identity;
mod path;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::id::{KeyId, MeshId, Name, NodeId, Position};

pub use identity::{IdentityPhase, IdentityStatus};
pub use path::{PathReport, PathStatus};

/// Where `meshd` listens unless configured otherwise.
pub const DEFAULT_SOCKET: &str = "/run/mesh/meshd.sock";
/// Where `meshd` keeps its state unless configured otherwise.
pub const DEFAULT_STATE_DIR: &str = "/var/lib/mesh";
/// Directory below the state directory where `mesh-cni` leaves releases while `meshd` is down: one file each, named by
/// [`Attachment::file_name`], holding the [`Attachment`] as JSON.
pub const RELEASED_DIR: &str = "released";

/// IPv4 address of every pod's gateway (link-local, RFC 3927).
pub const GATEWAY_V4: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);
/// IPv6 address of every pod's gateway (link-local, RFC 4291).
pub const GATEWAY_V6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);
/// Group of host ends of pod links, for nftables and for finding them again.
pub const POD_LINK_GROUP: u32 = 7100;

/// One pod interface: a container and an interface name inside it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Attachment {
    /// The runtime's id of the sandbox.
    pub container: String,
    /// The interface inside, `eth0` as a rule.
    pub interface: String,
}

impl Attachment {
    /// Name of the link's host end: `mesh` and 11 hexadecimal digits of a hash, 15 bytes in all (IFNAMSIZ).
    #[must_use]
    pub fn host_link(&self) -> String {
        format!("mesh{}", &hex::encode(self.hash())[..11])
    }

    /// Name of the file that queues its release.
    #[must_use]
    pub fn file_name(&self) -> String {
        format!("{}.json", hex::encode(self.hash()))
    }

    fn hash(&self) -> [u8; 32] {
        crate::id::sha256(&[self.container.as_bytes(), b"\0", self.interface.as_bytes()])
    }
}

/// A request to `meshd`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "kebab-case")]
pub enum LocalRequest {
    /// The node's state. Answer: [`LocalReply::Status`].
    Status,
    /// All peers. Answer: [`LocalReply::Peers`].
    Peers,
    /// All mesh routes. Answer: [`LocalReply::Routes`].
    Routes,
    /// What the paths to a node carry. Answer: [`LocalReply::Path`], or an error of [`LocalErrorCode::UnknownNode`].
    Path {
        /// Name, id (or the start of one), or an address in the mesh.
        target: String,
    },
    /// Alarms and evidence. Answer: [`LocalReply::Audit`].
    Audit,
    /// Echo requests to a node through the tunnel. Answers: [`LocalReply::Echo`] for each, then [`LocalReply::Done`].
    Ping {
        /// Name, id (or the start of one), or an address in the mesh.
        target: String,
        /// How many, 1 to 1000.
        count: u32,
        /// IPv6 instead of IPv4.
        #[serde(default)]
        v6: bool,
    },
    /// Promote the spare key of this node. Answers: [`LocalReply::Rotation`] as peers follow, the last one `done`.
    Rotate {
        /// Also while the key before still answers for peers that were away.
        #[serde(default)]
        force: bool,
    },
    /// Replace the identity key of this node, or follow that where it is under way. Answers: [`LocalReply::Identity`] as the
    /// keyserver, its issuer and peers follow, the last one `done`.
    RotateIdentity,
    /// Reserve addresses for a pod. Answer: [`LocalReply::Lease`]. The same attachment gets the same lease.
    Attach {
        /// Which.
        attachment: Attachment,
        /// `namespace/name` of the pod, for people.
        #[serde(default)]
        pod: Option<String>,
    },
    /// Give its addresses back. Answer: [`LocalReply::Done`], also when it had none.
    Detach {
        /// Which.
        attachment: Attachment,
    },
    /// The lease of an attachment. Answer: [`LocalReply::Lease`], or an error of [`LocalErrorCode::UnknownPod`].
    Check {
        /// Which.
        attachment: Attachment,
    },
    /// Whether pods can be attached. Answer: [`LocalReply::Done`], or an error.
    AttachStatus,
    /// Give back the addresses of all attachments but these. Answer: [`LocalReply::Released`].
    Collect {
        /// Those that are valid.
        valid: Vec<Attachment>,
    },
    /// Remove everything of Mesh from this host's network and stop. Answer: [`LocalReply::Done`].
    Down,
}

impl LocalRequest {
    /// Whether a member of the socket's group may send it.
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        matches!(
            self,
            Self::Status
                | Self::Peers
                | Self::Routes
                | Self::Path { .. }
                | Self::Audit
                | Self::Ping { .. }
                | Self::AttachStatus
        )
    }
}

/// Why a request failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LocalErrorCode {
    /// The request cannot be read.
    BadRequest,
    /// Only root may.
    NotPermitted,
    /// Not yet, or not at the moment: try again.
    NotReady,
    /// No free address in the pod CIDR.
    PoolExhausted,
    /// No such attachment.
    UnknownPod,
    /// No such node.
    UnknownNode,
    /// The kernel or the disk refused.
    Internal,
}

/// A failure with words for people.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct LocalError {
    /// For programs.
    pub code: LocalErrorCode,
    /// What was tried, on what, what to do.
    pub message: String,
}

/// An answer of `meshd`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "kebab-case")]
pub enum LocalReply {
    /// Done, nothing to tell.
    Done,
    /// It failed.
    Error(LocalError),
    /// The node's state.
    Status(Box<Status>),
    /// All peers, by name.
    Peers {
        /// One each.
        peers: Vec<PeerStatus>,
    },
    /// All mesh routes, by prefix.
    Routes {
        /// One each.
        routes: Vec<RouteStatus>,
    },
    /// What the paths to a node carry.
    Path(PathReport),
    /// What somebody has to look at.
    Audit {
        /// Alarms that stand.
        alarms: Vec<Alarm>,
        /// Objects that prove a contradiction, oldest first.
        evidence: Vec<EvidenceStatus>,
    },
    /// One echo, or its absence. Progress.
    Echo {
        /// Counted from 1.
        number: u32,
        /// Who was asked.
        address: IpAddr,
        /// Round trip in microseconds; absent after a second without an answer.
        micros: Option<u64>,
    },
    /// How far a rotation is. Progress until `done`.
    Rotation {
        /// Epoch of the key that is current now.
        epoch: u64,
        /// Peers with a session.
        peers: u32,
        /// Those that use the new key.
        confirmed: u32,
        /// All of them do.
        done: bool,
    },
    /// How far a new identity key is. Progress until `done`.
    Identity {
        /// The key before.
        from: KeyId,
        /// The key that follows.
        to: KeyId,
        /// How far.
        phase: IdentityPhase,
        /// Why the keyserver refused, if it did: it is asked again.
        error: Option<String>,
        /// Peers with a session.
        peers: u32,
        /// Those that know this node by the new key.
        confirmed: u32,
        /// All of them do.
        done: bool,
    },
    /// A pod's addresses.
    Lease(Lease),
    /// How many leases were given back.
    Released {
        /// That many.
        count: u32,
    },
}

impl LocalReply {
    /// Whether no further reply to the same request follows.
    #[must_use]
    pub fn is_final(&self) -> bool {
        match self {
            Self::Echo { .. } => false,
            Self::Rotation { done, .. } | Self::Identity { done, .. } => *done,
            _ => true,
        }
    }
}

/// A pod's addresses, and what its link needs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// Who has it.
    pub attachment: Attachment,
    /// `namespace/name` of the pod, for people.
    pub pod: Option<String>,
    /// One address of each family the node has a pod CIDR of.
    pub addresses: Vec<IpAddr>,
    /// MTU of the pod's link, in bytes.
    pub mtu: u16,
    /// Group of the host end.
    pub link_group: u32,
    /// Routing table in which the pod's routes go.
    pub table: u32,
    /// Protocol number of those routes.
    pub route_protocol: u8,
}

/// The state of a node.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// Program version.
    pub version: String,
    /// The mesh's name.
    pub mesh: Name,
    /// The mesh's id.
    pub mesh_id: MeshId,
    /// This node.
    pub node: NodeId,
    /// Its name.
    pub name: Name,
    /// Its cluster.
    pub cluster: Name,
    /// Its own addresses in the mesh.
    pub addresses: Vec<IpAddr>,
    /// Its pod CIDRs.
    pub pod_cidrs: Vec<IpNet>,
    /// Pods attached.
    pub pods: u32,
    /// Everything below is up: ready to carry packets.
    pub ready: bool,
    /// What it still waits for, when not ready.
    pub waiting_for: Vec<String>,
    /// The control session.
    pub control: ControlStatus,
    /// The newest policy's version.
    pub policy_version: u64,
    /// Own keys.
    pub keys: KeyStatus,
    /// The identity key.
    #[serde(default)]
    pub identity: Option<IdentityStatus>,
    /// The device.
    pub device: DeviceStatus,
    /// Peers known, and with a live session.
    pub peers_known: u32,
    /// Peers with a live session.
    pub peers_up: u32,
    /// Those of them that packets go to under a post-quantum preshared key.
    #[serde(default)]
    pub peers_post_quantum: u32,
    /// Seconds since start.
    pub uptime: u64,
    /// Packets dropped by the data plane, by reason; reasons without any are left out.
    pub dropped: std::collections::BTreeMap<String, u64>,
    /// What somebody has to look at.
    pub alarms: Vec<Alarm>,
}

/// The control session's state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ControlStatus {
    /// Connected now.
    pub connected: bool,
    /// The keyserver's address, when connected; else the one tried last.
    pub keyserver: Option<String>,
    /// `quic` or `tls`.
    pub transport: Option<String>,
    /// Where the directory stands.
    pub position: Option<Position>,
    /// Seconds since the newest checkpoint, of running time.
    pub checkpoint_age: Option<u64>,
    /// Running time in seconds after which tunnels close without a new checkpoint: as the trust policy says.
    #[serde(default)]
    pub exposure: u64,
    /// Seconds of running time until tunnels close without a newer checkpoint.
    pub exposure_left: u64,
    /// The keyserver shows an older state than this node has seen.
    pub stale: bool,
    /// Why the last attempt failed, when not connected.
    pub error: Option<String>,
}

/// Own WireGuard keys, by epoch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyStatus {
    /// `seq` of the newest own record.
    pub seq: u64,
    /// Current.
    pub current: u64,
    /// The one before, while it answers.
    pub previous: Option<u64>,
    /// The one after.
    pub spare: u64,
    /// Seconds since the current one was promoted.
    pub current_age: u64,
    /// Seconds until the node rotates by itself; absent if it does not.
    #[serde(default)]
    pub rotates_in: Option<u64>,
    /// The keyserver has the newest record.
    pub published: bool,
    /// Key files are sealed by the credential `mesh.seal`.
    #[serde(default)]
    pub sealed: bool,
}

/// The TUN device and its lanes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceStatus {
    /// Its name.
    pub name: String,
    /// `fast` (multi-queue, virtio header) or `plain`.
    pub mode: String,
    /// Lanes.
    pub lanes: u32,
    /// Why there are fewer than configured, if there are.
    #[serde(default)]
    pub fewer_lanes: Option<String>,
    /// UDP port of lane 0.
    pub port: u16,
    /// Inner MTU, in bytes.
    pub mtu: u16,
    /// Every kind of offload.
    #[serde(default)]
    pub offloads: Vec<OffloadStatus>,
    /// Why offloads were not tried on this kernel, if they were not.
    #[serde(default)]
    pub offloads_untried: Option<String>,
    /// The socket of each lane.
    #[serde(default)]
    pub sockets: Vec<SocketStatus>,
}

/// One kind of offload.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OffloadStatus {
    /// `tso4`, `tso6`, `uso`, `tcp-coalesce`, `udp-coalesce`, `udp-segment` or `udp-gro`.
    pub name: String,
    /// On every lane.
    pub on: bool,
    /// Why not.
    pub reason: Option<String>,
}

/// The UDP socket of a lane.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SocketStatus {
    /// Number of the lane.
    pub lane: u32,
    /// Its port.
    pub port: u16,
    /// Bytes asked for each of the two kernel buffers.
    pub asked_buffer: u64,
    /// Bytes the receive buffer has.
    pub receive_buffer: u64,
    /// Bytes the send buffer has.
    pub send_buffer: u64,
    /// Trains that the kernel refused and that went as single datagrams.
    pub refused_trains: u64,
    /// Super-packets that the device refused and that were written one by one.
    pub refused_super_packets: u64,
}

/// Something that somebody has to look at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Alarm {
    /// Kebab-case name, as in the metric.
    pub name: String,
    /// What happened, to whom.
    pub message: String,
    /// Seconds since it was raised.
    pub age: u64,
}

/// A signed object that contradicts another one, kept in the state directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EvidenceStatus {
    /// Its file, below the state directory.
    pub file: String,
    /// What it is: `checkpoint`, `node-record`, `node-grant`, `endpoints`, `revocation` or `trust-policy`.
    pub kind: String,
    /// What it says, in one line.
    pub says: String,
    /// Ids of the keys that signed it.
    pub signers: Vec<KeyId>,
    /// Seconds since 1970 when it was stored.
    pub stored: u64,
}

/// A peer as this node sees it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PeerStatus {
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
    /// The endpoint in use.
    pub endpoint: Option<SocketAddr>,
    /// A session is live.
    pub up: bool,
    /// Seconds since the last handshake.
    pub last_handshake: Option<u64>,
    /// Bytes of inner packets received.
    pub received_bytes: u64,
    /// Bytes of inner packets sent.
    pub sent_bytes: u64,
    /// Whether packets go to it under a post-quantum preshared key.
    pub post_quantum: bool,
    /// Whether it has no tunnel without: as policy or one of the two grants says.
    #[serde(default)]
    pub post_quantum_required: bool,
    /// The highest `seq` of this node's record that the peer said, inside the tunnel, to have in force.
    #[serde(default)]
    pub acknowledged_seq: Option<u64>,
    /// Lanes it receives on, as its record says.
    #[serde(default)]
    pub lanes: u32,
    /// Pairs of lanes on which handshakes stay unanswered: their flows use lane 0.
    #[serde(default)]
    pub blocked_lanes: Vec<LanePairStatus>,
    /// Its tunnels, the one in use first.
    pub tunnels: Vec<TunnelStatus>,
}

/// One of our lanes with one of a peer's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LanePairStatus {
    /// Number of our lane.
    pub local: u32,
    /// Number of the peer's.
    pub remote: u32,
}

/// One tunnel of a peer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TunnelStatus {
    /// Number of our lane.
    #[serde(default)]
    pub lane: u32,
    /// Number of the peer's.
    #[serde(default)]
    pub remote_lane: u32,
    /// Epoch of our key.
    pub local_epoch: u64,
    /// Epoch of the peer's key.
    pub remote_epoch: u64,
    /// Packets are known to arrive at the other end.
    pub confirmed: bool,
    /// It has a post-quantum preshared key.
    #[serde(default)]
    pub post_quantum: bool,
}

/// One route of the mesh on this host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RouteStatus {
    /// Where to.
    pub prefix: IpNet,
    /// `peer`, `pod`, `own` or `pool`.
    pub kind: String,
    /// Name of the peer or pod.
    pub via: Option<String>,
    /// The link it goes out of; absent for `unreachable`.
    pub link: Option<String>,
    /// Route MTU, in bytes.
    pub mtu: Option<u16>,
}
