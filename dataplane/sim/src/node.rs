//! One node: a lane, its keys, what it received.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use ipnet::IpNet;
use mesh_dataplane::{
    clock::Instant,
    command::{Event, PeerSnapshot},
    drop_reason::DropReason,
    key::{PresharedKey, SecretKey},
    lane::{Lane, LaneConfig, Output},
    table::{LocalKey, PeerId, PeerSpec, RemoteKey, Table, TableSpec},
    udp::Ends,
};

/// See the module.
pub struct Node {
    number: usize,
    lane: Lane,
    output: Output,
    /// Its outer address; more than one may lead to it.
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
    received: Vec<u32>,
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
    pub(crate) fn new(number: usize, seed: u64, now: Instant) -> Self {
        let keys = vec![LocalKey { epoch: 1, secret: secret(number, 1) }];
        let spec = TableSpec { local_keys: keys, ..TableSpec::default() };
        let table = Table::new(spec).expect("a table without peers");
        Self {
            number,
            lane: lane(number, seed, Arc::new(table), now),
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

    /// The address it sends from.
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

    /// The lane itself.
    pub fn lane(&mut self) -> &mut Lane {
        &mut self.lane
    }

    pub(crate) fn has_address(&self, address: SocketAddr) -> bool {
        self.addresses.contains(&address)
    }

    pub(crate) fn promote_key(&mut self) {
        self.epoch += 1;
    }

    pub(crate) fn restart(&mut self, now: Instant) {
        let table = Table::new(TableSpec { local_keys: self.local_keys(), ..TableSpec::default() });
        let table = Arc::new(table.expect("a table without peers"));
        self.seed = self.seed.wrapping_add(1);
        self.lane = lane(self.number, self.seed, table, now);
    }

    /// What control would make of the present state of all nodes.
    pub(crate) fn table(&self, all: &[Node]) -> Arc<Table> {
        let others = all.iter().filter(|node| node.number != self.number && !self.revoked.contains(&node.number));
        // A hostile node sends everything to one peer.
        let others = others.take(if self.unchecked { 1 } else { usize::MAX });
        let peers = others.map(|node| PeerSpec {
            id: PeerId(self.renumbered.filter(|(n, _)| *n == node.number).map_or(node.number as u32, |(_, id)| id)),
            keys: node.remote_keys(),
            preshared_key: self.psk.zip(node.psk).map(|(psk, _)| PresharedKey::new(psk)),
            allowed_ips: if self.unchecked { anywhere() } else { prefixes(node.number) },
            endpoints: if node.hidden {
                Vec::new()
            } else {
                node.stale_addresses.iter().copied().chain([node.address()]).collect()
            },
            keepalive: self.keepalive,
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
        self.lane.set_table(table, now);
        self.collect();
    }

    pub(crate) fn next_number(&mut self) -> u32 {
        self.next_number += 1;
        self.next_number - 1
    }

    pub(crate) fn handle_packet(&mut self, packet: &[u8], now: Instant) {
        let mut buffer = vec![0xee; packet.len().next_multiple_of(16)];
        buffer[..packet.len()].copy_from_slice(packet);
        self.lane.handle_packet(&mut buffer, packet.len(), now, &mut self.output);
        self.collect();
    }

    pub(crate) fn handle_datagram(&mut self, from: Ends, datagram: &[u8], now: Instant) {
        self.lane.handle_datagram(from, datagram, now, &mut self.output);
        self.collect();
    }

    pub(crate) fn handle_timeout(&mut self, now: Instant) {
        self.lane.handle_timeout(now, &mut self.output);
        self.collect();
    }

    pub(crate) fn initiate(&mut self, peer: PeerId, now: Instant) {
        self.lane.initiate(peer, now, &mut self.output);
        self.collect();
    }

    pub(crate) fn poll_timeout(&self) -> Option<Instant> {
        self.lane.poll_timeout()
    }

    pub(crate) fn take_datagrams(&mut self) -> Vec<(Ends, Vec<u8>)> {
        let taken = self.output.datagrams.iter().map(|(to, bytes)| (to.ends, bytes.to_vec())).collect();
        self.output.datagrams.clear();
        taken
    }

    pub(crate) fn received(&self) -> &[u32] {
        &self.received
    }

    pub(crate) fn peer(&self, id: PeerId, now: Instant) -> Option<PeerSnapshot> {
        self.lane.snapshot(now).1.into_iter().find(|peer| peer.id == id)
    }

    /// Tunnels of its lane.
    pub fn tunnels(&self, now: Instant) -> usize {
        self.lane.snapshot(now).0.tunnels
    }

    pub(crate) fn drops(&self, reason: DropReason) -> u64 {
        self.lane.drops().count(reason)
    }

    pub(crate) fn take_events(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.events)
    }

    fn collect(&mut self) {
        for (_, packet) in self.output.packets.iter() {
            if let Some(&[a, b, c, d]) = packet.get(48..52) {
                self.received.push(u32::from_be_bytes([a, b, c, d]));
            }
            self.packets.push(packet.to_vec());
        }
        self.output.packets.clear();
        self.events.extend(std::iter::from_fn(|| self.lane.poll_event()));
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

fn lane(number: usize, seed: u64, table: Arc<Table>, now: Instant) -> Lane {
    let mut bytes = [number as u8; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    let config = LaneConfig { lane: 0, lanes: 1, flow_key: [7; 16], handshakes_per_second: 500, seed: bytes };
    Lane::new(config, table, now)
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
