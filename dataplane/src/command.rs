//! What control and the lanes say to each other: commands down, events and snapshots up.

use std::{
    collections::{BTreeMap, HashSet},
    io,
    net::SocketAddr,
    sync::Arc,
    time::Duration,
};

use crate::{
    drop_reason::DropCounters,
    key::PresharedKey,
    packet::offload::Offloads,
    table::{PeerId, Table},
    udp::SocketState,
};

/// What control asks of the lanes.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Command {
    /// Use this table from now on. Only the newest counts; it never waits behind other commands.
    SetTable(Arc<Table>),
    /// Begin a handshake with this peer on every lane now, as after a restart. Nothing happens for a peer without
    /// endpoint or while a handshake is going on.
    Initiate(PeerId),
    /// Send what is for these peers there from now on, as if their traffic came from there. A table does not do that: it
    /// leaves a peer where its traffic comes from.
    Redirect(Vec<(PeerId, SocketAddr)>),
    /// Use these preshared keys for tunnels with a peer that has [`Preshared::Agreed`](crate::table::Preshared::Agreed).
    Agree(Arc<Agreement>),
    /// Expect datagrams that are not WireGuard's with one of these marks in bytes 4 to 12. They become events by an allowance of
    /// their own, so that a flood of others does not displace them.
    Expect(Arc<HashSet<Mark>>),
    /// Send a datagram that is not WireGuard's from a lane's socket.
    SendDatagram {
        /// Number of the lane.
        lane: usize,
        /// Where to.
        to: SocketAddr,
        /// The payload, at most 1,500 bytes; longer ones are dropped and counted.
        bytes: Vec<u8>,
    },
}

/// Bytes 4 to 12 of a datagram for control, hard to guess: see [`Command::Expect`].
pub type Mark = [u8; 8];

/// Preshared keys that control and a peer agreed on, one for each pair of their lanes.
#[derive(Debug, Clone)]
pub struct Agreement {
    /// The peer.
    pub peer: PeerId,
    /// Epoch of our key.
    pub local_epoch: u64,
    /// Epoch of the peer's key.
    pub remote_epoch: u64,
    /// Whose tunnels they are for.
    pub origin: Origin,
    /// The keys.
    pub pairs: Vec<AgreedPair>,
}

/// Who begins the tunnels of an [`Agreement`].
#[derive(Debug, Clone)]
pub enum Origin {
    /// We do.
    Own {
        /// What is sent ahead of each initiation, so that the peer can agree: at most 1,500 bytes, no WireGuard message.
        offer: Arc<[u8]>,
    },
    /// The peer does, once its data opened on them we too.
    Peer,
}

/// The preshared key of one pair of lanes.
#[derive(Debug, Clone)]
pub struct AgreedPair {
    /// Our lane and the peer's.
    pub lanes: LanePair,
    /// Upper 24 bits of the sender index of the tunnel's initiations. Of our own: chosen at random, the top three name our
    /// lane. Should the lane have such a tunnel already, the key is dropped, and another is asked for.
    pub index: u32,
    /// The key.
    pub psk: PresharedKey,
}

/// What happened on a lane. Events are facts for control; losing some is counted, never waited for.
#[derive(Debug)]
#[non_exhaustive]
pub enum Event {
    /// A peer that had no working session has one.
    PeerUp {
        /// Number of the lane.
        lane: usize,
        /// The peer.
        peer: PeerId,
        /// Where it is reached.
        endpoint: Option<SocketAddr>,
    },
    /// The last session with a peer is over and nobody asked for another.
    PeerIdle {
        /// Number of the lane.
        lane: usize,
        /// The peer.
        peer: PeerId,
    },
    /// Handshakes with this peer went unanswered for 90 seconds; waiting packets were dropped.
    HandshakeFailed {
        /// Number of the lane.
        lane: usize,
        /// The peer.
        peer: PeerId,
    },
    /// A tunnel is usable: both ends proved to have its keys. Comes once for each tunnel, rekeying is silent.
    TunnelConfirmed {
        /// Number of the lane.
        lane: usize,
        /// The peer.
        peer: PeerId,
        /// Epoch of our key.
        local_epoch: u64,
        /// Epoch of the peer's key.
        remote_epoch: u64,
    },
    /// A tunnel is to be begun on these keys, and there is no preshared key for it: see [`Command::Agree`]. Asked again each
    /// second as long as that is so.
    KeyWanted {
        /// Number of the lane.
        lane: usize,
        /// The peer.
        peer: PeerId,
        /// Epoch of our key.
        local_epoch: u64,
        /// Epoch of the peer's key.
        remote_epoch: u64,
    },
    /// A tunnel on older keys was dropped because a newer one carries the traffic.
    TunnelRetired {
        /// Number of the lane.
        lane: usize,
        /// The peer.
        peer: PeerId,
        /// Epoch of our key.
        local_epoch: u64,
        /// Epoch of the peer's key.
        remote_epoch: u64,
    },
    /// Authenticated traffic of a peer came from a new address; replies go there now.
    EndpointMoved {
        /// Number of the lane.
        lane: usize,
        /// The peer.
        peer: PeerId,
        /// Where it was.
        from: Option<SocketAddr>,
        /// Where it is.
        to: SocketAddr,
    },
    /// A datagram that is not WireGuard's arrived. Nothing about it has been checked.
    Datagram {
        /// Number of the lane.
        lane: usize,
        /// Its source, which may be forged.
        from: SocketAddr,
        /// Its payload, at most 1,500 bytes.
        bytes: Vec<u8>,
    },
    /// The TUN queue is gone, most likely because the device was deleted. The lane goes on without
    /// until [`Engine::replace_queue`](crate::Engine::replace_queue).
    QueueLost {
        /// Number of the lane.
        lane: usize,
        /// What the kernel said.
        error: io::Error,
    },
}

/// Counters and state of all lanes at one moment.
#[derive(Debug, Clone, Default)]
pub struct Snapshot {
    /// Every lane that answered.
    pub lanes: Vec<LaneSnapshot>,
    /// Peers that any lane holds state for, lanes added up. Peers never talked to are absent.
    pub peers: BTreeMap<PeerId, PeerSnapshot>,
    /// Drops of all lanes added up.
    pub drops: DropCounters,
}

impl Snapshot {
    /// Adds what one lane said.
    pub(crate) fn merge(&mut self, lane: LaneSnapshot, peers: Vec<PeerSnapshot>) {
        self.drops.merge(&lane.drops);
        self.lanes.push(lane);
        for peer in peers {
            match self.peers.get_mut(&peer.id) {
                Some(known) => known.merge(peer),
                None => {
                    self.peers.insert(peer.id, peer);
                }
            }
        }
    }
}

/// One lane at one moment.
#[derive(Debug, Clone, Default)]
pub struct LaneSnapshot {
    /// Number of the lane.
    pub lane: usize,
    /// Packets and bytes that passed.
    pub traffic: Traffic,
    /// What was dropped, by reason.
    pub drops: DropCounters,
    /// Tunnels the lane owns.
    pub tunnels: usize,
    /// Handshake messages that arrived with a right first MAC.
    pub handshakes: u64,
    /// Cookie replies sent because of load.
    pub cookies_sent: u64,
    /// Events that control did not fetch in time.
    pub events_lost: u64,
    /// False while the TUN queue is lost.
    pub queue_attached: bool,
    /// Packets whose flow hashes to another lane than the one they came on; 0 while flows keep their lane.
    pub strayed_packets: u64,
    /// Packets handed to lane 0: the peer has no other, or theirs does not answer.
    pub crossed_packets: u64,
    /// Times that packets of a size that had passed, or should, were found to vanish on a path.
    pub black_holes: u64,
    /// Super-packets that its queue gives and takes.
    pub offloads: Offloads,
    /// Super-packets that the kernel refused although it had said that it takes them; their packets went one by one.
    pub refused_runs: u64,
    /// Its socket.
    pub socket: SocketState,
}

/// Inner packets and their bytes, both ways.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Inner packets received and accepted.
    pub rx_packets: u64,
    /// Their bytes.
    pub rx_bytes: u64,
    /// Inner packets sent.
    pub tx_packets: u64,
    /// Their bytes.
    pub tx_bytes: u64,
}

impl Traffic {
    pub(crate) fn count_rx(&mut self, len: usize) {
        self.rx_packets += 1;
        self.rx_bytes += len as u64;
    }

    pub(crate) fn count_tx(&mut self, len: usize) {
        self.tx_packets += 1;
        self.tx_bytes += len as u64;
    }

    fn merge(&mut self, other: Traffic) {
        self.rx_packets += other.rx_packets;
        self.rx_bytes += other.rx_bytes;
        self.tx_packets += other.tx_packets;
        self.tx_bytes += other.tx_bytes;
    }
}

/// One peer at one moment.
#[derive(Debug, Clone)]
pub struct PeerSnapshot {
    /// The peer.
    pub id: PeerId,
    /// Where packets to it go, once known.
    pub endpoint: Option<SocketAddr>,
    /// Time since the last handshake was completed, if there was one since the peer came into the table.
    pub last_handshake: Option<Duration>,
    /// Packets and bytes that passed since the peer came into the table.
    pub traffic: Traffic,
    /// The same on the wire: datagrams of all kinds, handshakes and keepalives too, without UDP and IP headers.
    pub wire: Traffic,
    /// Packets from it that were refused after authentication: wrong source, malformed, foreign destination.
    pub refused_packets: u64,
    /// Its tunnels, in the order in which they are preferred for sending, best last.
    pub tunnels: Vec<TunnelSnapshot>,
    /// Pairs of lanes on which handshakes stay unanswered: their flows use lane 0.
    pub blocked: Vec<LanePair>,
    /// What the paths to it carry, one for each pair of lanes that was used.
    pub paths: Vec<PathSnapshot>,
}

/// One of our lanes with one of a peer's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct LanePair {
    /// Number of our lane.
    pub local: usize,
    /// Number of the peer's.
    pub remote: usize,
}

impl PeerSnapshot {
    fn merge(&mut self, other: PeerSnapshot) {
        self.endpoint = self.endpoint.or(other.endpoint);
        self.last_handshake = match (self.last_handshake, other.last_handshake) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        };
        self.traffic.merge(other.traffic);
        self.wire.merge(other.wire);
        self.refused_packets += other.refused_packets;
        self.tunnels.extend(other.tunnels);
        self.blocked.extend(other.blocked);
        self.paths.extend(other.paths);
    }
}

/// One tunnel at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TunnelSnapshot {
    /// Number of the lane that owns it.
    pub lane: usize,
    /// Number of the peer's lane at its other end.
    pub remote_lane: usize,
    /// Epoch of our key.
    pub local_epoch: u64,
    /// Epoch of the peer's key.
    pub remote_epoch: u64,
    /// True if a preshared key is mixed in.
    pub preshared: bool,
    /// True if it has a session that both ends proved to have, and packets may be sent on it.
    pub confirmed: bool,
    /// True for the one that packets to the peer are sent on.
    pub sending: bool,
    /// Time since its session was made.
    pub established: Option<Duration>,
    /// Time since a packet, keepalives not counted, passed it either way.
    pub last_data: Option<Duration>,
}

/// What the path of one pair of lanes carries, at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PathSnapshot {
    /// Number of our lane.
    pub lane: usize,
    /// Number of the peer's lane.
    pub remote_lane: usize,
    /// Where datagrams go.
    pub endpoint: SocketAddr,
    /// Largest datagram, IP header included, that passes in one piece, as far as anything is larger that wants to pass.
    pub path_mtu: u16,
    /// Largest inner packet that senders are allowed, in bytes; 1280 at the least.
    pub inner_mtu: u16,
    /// How far it is known.
    pub state: PathState,
    /// Time since the last probe was sent.
    pub last_probe: Option<Duration>,
    /// Times that packets of a size that had passed, or should, were found to vanish.
    pub black_holes: u64,
}

/// How far the MTU of a path is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PathState {
    /// No probe was answered so far: it is what control says.
    Unanswered,
    /// Sizes are being tried.
    Searching,
    /// The largest packet that control allows was seen to pass.
    Confirmed,
    /// Larger packets vanish on the way; they are cut to what was seen to pass.
    BlackHole,
}

impl PathState {
    /// Name for people and programs: lower case, stable.
    pub fn as_str(self) -> &'static str {
        match self {
            PathState::Unanswered => "unanswered",
            PathState::Searching => "searching",
            PathState::Confirmed => "confirmed",
            PathState::BlackHole => "black-hole",
        }
    }
}
