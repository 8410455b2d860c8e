//! One node: its lanes, its keys, what it received.

use std::{
    net::{IpAddr, SocketAddr},
    sync::{Arc, LazyLock},
    time::Duration,
};

use ipnet::IpNet;
use mesh_dataplane::{
    clock::Instant,
    command::{Event, LaneSnapshot, PeerSnapshot},
    drop_reason::DropReason,
    key::{PresharedKey, SecretKey},
    lane::{Lane, LaneConfig, Output},
    packet::{dscp::Dscp, flow::FlowHash},
    table::{Lanes, LocalKey, PeerId, PeerSpec, Preshared, RemoteKey, Table, TableSpec},
    udp::{Ends, Outer},
};

use crate::control::Control;

const FLOW_KEY: [u8; 16] = [7; 16];
/// What a kernel's steering program would do.
static FLOW: LazyLock<FlowHash> = LazyLock::new(|| FlowHash::new(FLOW_KEY));

/// See the module.
pub struct Node {
    number: usize,
    lanes: Vec<Lane>,
    lane_count: usize,
    output: Output,
    /// What waits to be sent, each with the lane that sends it.
    datagrams: Vec<(usize, Outer, Vec<u8>)>,
    /// The outer address of its lane 0; more than one may lead to it. Lanes have one port after another.
    addresses: Vec<SocketAddr>,
    /// Epoch of its current key; the one before and the next are valid too.
    pub epoch: u64,
    /// Nodes that are not in its table.
    pub revoked: Vec<usize>,
    /// Whether others know its address.
    pub hidden: bool,
    /// Keepalive for all its peers.
    pub keepalive: Option<Duration>,
    /// Preshared key of all pairs, while both have it.
    pub psk: Option<[u8; 32]>,
    /// A preshared key is agreed on for each tunnel with other such nodes; see [`Control`].
    pub agreed: bool,
    /// Who does that.
    pub control: Control,
    table: Arc<Table>,
    /// Over which time it opens tunnels on new keys.
    pub spread: Duration,
    /// Addresses others believe it to have, before the true one.
    pub stale_addresses: Vec<SocketAddr>,
    /// Its inner MTU.
    pub mtu: u16,
    /// A node, and the number that this one knows it by instead of its own.
    pub renumbered: Option<(usize, u32)>,
    /// Lets anything out, as a hostile node would.
    pub unchecked: bool,
    /// Others take it for a plain WireGuard peer.
    pub plain: bool,
    received: Vec<u32>,
    /// For each of `packets` the lane that it came in by.
    pub lanes_taken: Vec<usize>,
    /// All packets written to its TUN, in full.
    pub packets: Vec<Vec<u8>>,
    events: Vec<Event>,
    next_number: u32,
    seed: u64,
}

impl std::fmt::Debug for Node {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Node").field("number", &self.number).field("epoch", &self.epoch).finish_non_exhaustive()
    }
}

impl Node {
    pub(crate) fn new(number: usize, lanes: usize, seed: u64, now: Instant) -> Self {
        let keys = vec![LocalKey { epoch: 1, secret: secret(number, 1) }];
        let spec = TableSpec { local_keys: keys, ..TableSpec::default() };
        let table = Arc::new(Table::new(spec).expect("a table without peers"));
        Self {
            number,
            lanes: start_lanes(number, lanes, seed, &table, now),
            table,
            agreed: false,
            control: Control::new(number),
            lane_count: lanes,
            datagrams: Vec::new(),
            plain: false,
            lanes_taken: Vec::new(),
            output: Output::new(),
            addresses: vec![SocketAddr::from(([192, 0, 2, number as u8 + 1], 7100))],
            epoch: 1,
            revoked: Vec::new(),
            hidden: false,
            keepalive: None,
            psk: None,
            spread: Duration::from_secs(120),
            stale_addresses: Vec::new(),
            mtu: 1_420,
            renumbered: None,
            unchecked: false,
            received: Vec::new(),
            packets: Vec::new(),
            events: Vec::new(),
            next_number: 0,
            seed,
        }
    }

    /// The address that its lane 0 sends from.
    pub fn address(&self) -> SocketAddr {
        self.addresses[self.addresses.len() - 1]
    }

    /// From now on it sends from, and is reached at, another address.
    pub fn move_to(&mut self, address: SocketAddr) {
        self.addresses = vec![address];
    }

    /// It is reached at this address too, but for lack of a reason does not send from it.
    pub fn add_address(&mut self, address: SocketAddr) {
        self.addresses.insert(0, address);
    }

    /// Its lane 0.
    pub fn lane(&mut self) -> &mut Lane {
        &mut self.lanes[0]
    }

    /// Its lanes expect datagrams with this mark.
    pub fn expect(&mut self, mark: [u8; 8]) {
        for lane in &mut self.lanes {
            lane.expect(Arc::new([mark].into()));
        }
    }

    /// The lane that an address leads to.
    pub(crate) fn lane_at(&self, address: SocketAddr) -> Option<usize> {
        (0..self.lanes.len()).find(|lane| self.addresses.contains(&with_port(address, address.port() - *lane as u16)))
    }

    /// The address that a lane sends from; from `local` if it has that.
    pub(crate) fn source(&self, lane: usize, local: Option<IpAddr>) -> SocketAddr {
        let port = self.address().port() + lane as u16;
        let chosen = local.map(|local| SocketAddr::new(local, port));
        chosen.filter(|from| self.lane_at(*from) == Some(lane)).unwrap_or(with_port(self.address(), port))
    }

    /// Takes effect with the next [`restart`](Self::restart).
    pub(crate) fn change_lanes(&mut self, lanes: usize) {
        self.lane_count = lanes;
    }

    pub(crate) fn promote_key(&mut self) {
        self.epoch += 1;
    }

    pub(crate) fn restart(&mut self, now: Instant) {
        let table = Table::new(TableSpec { local_keys: self.local_keys(), ..TableSpec::default() });
        let table = Arc::new(table.expect("a table without peers"));
        self.seed = self.seed.wrapping_add(1);
        self.control.forget();
        self.lanes = start_lanes(self.number, self.lane_count, self.seed, &table, now);
    }

    /// What control would make of the present state of all nodes.
    pub(crate) fn table(&self, all: &[Node]) -> Arc<Table> {
        let others = all.iter().filter(|node| node.number != self.number && !self.revoked.contains(&node.number));
        // A hostile node sends everything to one peer.
        let others = others.take(if self.unchecked { 1 } else { usize::MAX });
        let peers = others.map(|node| PeerSpec {
            id: PeerId(self.renumbered.filter(|(n, _)| *n == node.number).map_or(node.number as u32, |(_, id)| id)),
            keys: node.remote_keys(),
            preshared: if self.agreed && node.agreed {
                Preshared::Agreed { own_first: self.number < node.number }
            } else {
                self.psk.zip(node.psk).map(|(psk, _)| PresharedKey::new(psk)).into()
            },
            allowed_ips: if self.unchecked { anywhere() } else { prefixes(node.number) },
            endpoints: if node.hidden {
                Vec::new()
            } else {
                node.stale_addresses.iter().copied().chain([node.address()]).collect()
            },
            keepalive: self.keepalive,
            lanes: if node.plain { Lanes::Plain } else { Lanes::Each(node.lanes.len() as u8) },
        });
        let spec = TableSpec {
            local_keys: self.local_keys(),
            peers: peers.collect(),
            own_prefixes: if self.unchecked { Vec::new() } else { prefixes(self.number) },
            inner_mtu: self.mtu,
            rotation_spread: self.spread,
            plain: false,
        };
        Arc::new(Table::new(spec).expect("nodes do not overlap"))
    }

    pub(crate) fn set_table(&mut self, table: Arc<Table>, now: Instant) {
        self.table = Arc::clone(&table);
        for n in 0..self.lanes.len() {
            self.lanes[n].set_table(Arc::clone(&table), now);
            self.collect(n, now);
        }
    }

    pub(crate) fn next_number(&mut self) -> u32 {
        self.next_number += 1;
        self.next_number - 1
    }

    pub(crate) fn handle_packet(&mut self, packet: &[u8], now: Instant) {
        let mut buffer = vec![0xee; packet.len().next_multiple_of(16)];
        buffer[..packet.len()].copy_from_slice(packet);
        let lane = FLOW.lane_of(packet, self.lanes.len());
        self.lanes[lane].handle_packet(&mut buffer, packet.len(), now, &mut self.output);
        self.collect(lane, now);
    }

    pub(crate) fn handle_datagram(&mut self, lane: usize, from: Ends, datagram: &[u8], now: Instant) {
        self.lanes[lane].handle_datagram(from, datagram, now, &mut self.output);
        self.collect(lane, now);
    }

    pub(crate) fn handle_timeout(&mut self, now: Instant) {
        for n in 0..self.lanes.len() {
            if self.lanes[n].poll_timeout().is_some_and(|at| at <= now) {
                self.lanes[n].handle_timeout(now, &mut self.output);
                self.collect(n, now);
            }
        }
        let own_lanes = self.lanes.len() as u8;
        for agreement in self.control.handle_timeout(&self.table, own_lanes, now) {
            for n in 0..self.lanes.len() {
                self.lanes[n].agree(&agreement, now, &mut self.output);
                self.collect(n, now);
            }
        }
    }

    pub(crate) fn initiate(&mut self, peer: PeerId, now: Instant) {
        self.lanes[0].initiate(peer, now, &mut self.output);
        self.collect(0, now);
    }

    pub(crate) fn poll_timeout(&self) -> Option<Instant> {
        self.lanes.iter().filter_map(Lane::poll_timeout).chain(self.control.poll_timeout()).min()
    }

    pub(crate) fn take_datagrams(&mut self) -> Vec<(usize, Outer, Vec<u8>)> {
        std::mem::take(&mut self.datagrams)
    }

    pub(crate) fn received(&self) -> &[u32] {
        &self.received
    }

    pub(crate) fn peer(&self, id: PeerId, now: Instant) -> Option<PeerSnapshot> {
        self.pairs(id, now).into_iter().next()
    }

    /// What its lanes know of a peer, one entry for each pair of lanes.
    pub fn pairs(&self, id: PeerId, now: Instant) -> Vec<PeerSnapshot> {
        let all = self.lanes.iter().flat_map(|lane| lane.snapshot(now).1);
        all.filter(|peer| peer.id == id).collect()
    }

    /// Forgets the packets that it received.
    pub fn clear_packets(&mut self) {
        self.packets.clear();
        self.lanes_taken.clear();
    }

    /// The lane that packets like this one belong to.
    pub fn lane_of(&self, packet: &[u8]) -> usize {
        FLOW.lane_of(packet, self.lanes.len())
    }

    /// Counters of one lane.
    pub fn counters(&self, lane: usize, now: Instant) -> LaneSnapshot {
        self.lanes[lane].snapshot(now).0
    }

    /// Tunnels of its lanes.
    pub fn tunnels(&self, now: Instant) -> usize {
        self.lanes.iter().map(|lane| lane.snapshot(now).0.tunnels).sum()
    }

    pub(crate) fn drops(&self, reason: DropReason) -> u64 {
        self.lanes.iter().map(|lane| lane.drops().count(reason)).sum()
    }

    pub(crate) fn take_events(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.events)
    }

    /// Takes what a lane put out. What crosses to lane 0 is handed over at once, in the order it was put out.
    fn collect(&mut self, lane: usize, now: Instant) {
        let mut crossing: Vec<Vec<u8>> = self.output.crossing.iter().map(|(_, packet)| packet.to_vec()).collect();
        self.output.crossing.clear();
        self.datagrams.extend(self.output.datagrams.iter().map(|(to, bytes)| (lane, to, bytes.to_vec())));
        self.output.datagrams.clear();
        for (_, packet) in self.output.packets.iter() {
            if let Some(&[a, b, c, d]) = packet.get(48..52) {
                self.received.push(u32::from_be_bytes([a, b, c, d]));
            }
            self.packets.push(packet.to_vec());
            self.lanes_taken.push(lane);
        }
        self.output.packets.clear();
        while let Some(event) = self.lanes[lane].poll_event() {
            self.events.extend(self.control.take(event, now));
        }
        for packet in &mut crossing {
            let len = packet.len();
            packet.resize(len.next_multiple_of(16), 0xee);
            self.lanes[0].handle_crossed(packet, len, now, &mut self.output);
            self.collect(0, now);
        }
    }

    fn local_keys(&self) -> Vec<LocalKey> {
        let epochs = [self.epoch, self.epoch - 1].into_iter().filter(|epoch| *epoch > 0);
        epochs.map(|epoch| LocalKey { epoch, secret: secret(self.number, epoch) }).collect()
    }

    /// Current, previous and spare.
    fn remote_keys(&self) -> Vec<RemoteKey> {
        let epochs = [self.epoch, self.epoch - 1, self.epoch + 1].into_iter().filter(|epoch| *epoch > 0);
        let key = |epoch| RemoteKey { epoch, public: secret(self.number, epoch).to_public() };
        epochs.map(key).collect()
    }
}

fn start_lanes(number: usize, lanes: usize, seed: u64, table: &Arc<Table>, now: Instant) -> Vec<Lane> {
    let start = |lane: usize| {
        let mut bytes = [number as u8; 32];
        bytes[..8].copy_from_slice(&seed.to_le_bytes());
        bytes[8] ^= lane as u8;
        let config =
            LaneConfig { lane, lanes, flow_key: FLOW_KEY, handshakes_per_second: 500, dscp: Dscp::Clear, seed: bytes };
        Lane::new(config, Arc::clone(table), now)
    };
    (0..lanes).map(start).collect()
}

fn with_port(address: SocketAddr, port: u16) -> SocketAddr {
    SocketAddr::new(address.ip(), port)
}

fn secret(number: usize, epoch: u64) -> SecretKey {
    let mut bytes = [number as u8 + 1; 32];
    bytes[8..16].copy_from_slice(&epoch.to_le_bytes());
    SecretKey::new(bytes)
}

fn anywhere() -> Vec<IpNet> {
    vec!["0.0.0.0/0".parse().expect("a prefix")]
}

fn prefixes(number: usize) -> Vec<IpNet> {
    let net = IpAddr::from([10, number as u8 + 1, 0, 0]);
    vec![IpNet::new(net, 16).expect("16 is a prefix length")]
}

/// A UDP packet between two nodes with a number in it, 60 bytes: not a multiple of 16.
pub fn packet(from: usize, to: usize, number: u32) -> Vec<u8> {
    let mut packet = vec![0; 60];
    packet[0] = 0x45;
    packet[2..4].copy_from_slice(&60u16.to_be_bytes());
    packet[8] = 64;
    packet[9] = 17;
    packet[12..16].copy_from_slice(&[10, from as u8 + 1, 0, 5]);
    packet[16..20].copy_from_slice(&[10, to as u8 + 1, 0, 5]);
    packet[48..52].copy_from_slice(&number.to_be_bytes());
    packet
}
