//! Parts of a packet's way, each as something that can be repeated: what both benches measure.
#![allow(
    dead_code,
    clippy::disallowed_methods,
    reason = "each bench uses its part; only the engine of a lane has a clock"
)]

use std::{net::SocketAddr, sync::Arc, time::Duration};

use mesh_dataplane::{
    LocalKey, PeerId, PeerSpec, Preshared, RemoteKey, SecretKey, Table, TableSpec,
    buffer::Batch,
    clock::Instant,
    lane::{Lane, LaneConfig, Output},
    packet::{
        checksum,
        coalesce::Coalescer,
        dscp::Dscp,
        flow::FlowHash,
        offload::{Cut, Offloads, Transport},
        segment::Segments,
    },
    table::{Lanes, Owner, prefix::PrefixMap},
};
use nix::time::{ClockId, clock_gettime};
use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};

/// Packets of one super-packet.
pub(crate) const TRAIN: usize = 44;
/// Payload of each, with IPv4 and TCP headers of 20 bytes: 1,420 together.
const SEGMENT: usize = 1380;
const HEADERS: usize = 40;
const TAG: usize = 16;

/// The bare AEAD: ring, the version that the tunnels use.
pub(crate) struct Aead {
    key: LessSafeKey,
    counter: u64,
}

impl Aead {
    pub(crate) fn new() -> Self {
        let key = UnboundKey::new(&CHACHA20_POLY1305, &[7; 32]).expect("a key of 32 bytes");
        Self { key: LessSafeKey::new(key), counter: 0 }
    }

    /// Seals all but the last 16 bytes of `buffer`, and puts the tag there.
    pub(crate) fn seal(&mut self, buffer: &mut [u8]) {
        self.counter += 1;
        let (text, tag) = buffer.split_at_mut(buffer.len() - TAG);
        let made = self.key.seal_in_place_separate_tag(nonce(self.counter), Aad::empty(), text).expect("it is short");
        tag.copy_from_slice(made.as_ref());
    }

    /// Opens what was sealed `back` messages before the last.
    pub(crate) fn open(&self, buffer: &mut [u8], back: u64) {
        self.key.open_in_place(nonce(self.counter - back), Aad::empty(), buffer).expect("it is authentic");
    }
}

fn nonce(counter: u64) -> Nonce {
    let mut bytes = [0; NONCE_LEN];
    bytes[4..].copy_from_slice(&counter.to_le_bytes());
    Nonce::assume_unique_for_key(bytes)
}

/// Two lanes with a session.
pub(crate) struct Pair {
    near: Lane,
    far: Lane,
    now: Instant,
    /// What the near lane sealed.
    pub(crate) sealed: Output,
    opened: Output,
}

impl Pair {
    pub(crate) fn new() -> Self {
        let now =
            Instant::from_start(Duration::from(clock_gettime(ClockId::CLOCK_BOOTTIME).expect("the clock is there")));
        let secrets = [SecretKey::new([1; 32]), SecretKey::new([2; 32])];
        let lane = |own: usize| {
            let config = LaneConfig {
                lane: 0,
                lanes: 1,
                flow_key: [3; 16],
                handshakes_per_second: 1_000,
                dscp: Dscp::Clear,
                seed: [own as u8 + 4; 32],
            };
            Lane::new(config, table(&secrets, own), now)
        };
        let mut pair = Self { near: lane(0), far: lane(1), now, sealed: Output::new(), opened: Output::new() };
        pair.near.initiate(PeerId(1), now, &mut pair.sealed);
        // Initiation, response, and the message that confirms the session.
        for _ in 0..2 {
            pair.open_all();
            let answers: Vec<Vec<u8>> = pair.opened.datagrams.iter().map(|(_, bytes)| bytes.to_vec()).collect();
            pair.sealed.clear();
            for answer in answers {
                pair.near.handle_datagram(endpoint(1), &answer, now, &mut pair.sealed);
            }
        }
        let mut packet = datagram(64);
        assert_eq!(pair.seal(&mut packet, 64), 1, "there is no session: {:?}", pair.near.drops());
        pair.open_all();
        assert_eq!(pair.opened.packets.len(), 1, "there is no session: {:?}", pair.far.drops());
        pair
    }

    /// Seals the first `len` bytes of `buffer`; gives the number of datagrams made.
    pub(crate) fn seal(&mut self, buffer: &mut [u8], len: usize) -> usize {
        self.sealed.clear();
        self.near.handle_packet(buffer, len, self.now, &mut self.sealed);
        self.sealed.datagrams.len()
    }

    /// Cuts and seals a super-packet; gives the number of datagrams made.
    pub(crate) fn seal_train(&mut self, train: &mut Train) -> usize {
        self.sealed.clear();
        let mut segments = train.segments();
        while !segments.is_done() {
            self.near.handle_segments(&mut segments, self.now, &mut self.sealed);
        }
        self.sealed.datagrams.len()
    }

    /// Opens what was sealed last; gives the number of packets.
    pub(crate) fn open_all(&mut self) -> usize {
        self.opened.clear();
        for (_, datagram) in self.sealed.datagrams.iter() {
            self.far.handle_datagram(endpoint(0), datagram, self.now, &mut self.opened);
        }
        self.opened.packets.len()
    }

    /// Opens one datagram, once.
    pub(crate) fn open(&mut self, datagram: &[u8]) -> usize {
        self.opened.clear();
        self.far.handle_datagram(endpoint(0), datagram, self.now, &mut self.opened);
        self.opened.packets.len()
    }
}

fn endpoint(of: usize) -> SocketAddr {
    SocketAddr::from(([192, 0, 2, of as u8 + 1], 7100))
}

/// The table of one of two nodes.
fn table(secrets: &[SecretKey; 2], own: usize) -> Arc<Table> {
    let other = 1 - own;
    let net = |of: usize| format!("10.{of}.0.0/16").parse().expect("a prefix");
    let peer = PeerSpec {
        id: PeerId(1),
        keys: vec![RemoteKey { epoch: 1, public: secrets[other].to_public() }],
        preshared: Preshared::None,
        allowed_ips: vec![net(other)],
        endpoints: vec![endpoint(other)],
        keepalive: None,
        lanes: Lanes::Plain,
    };
    let spec = TableSpec {
        local_keys: vec![LocalKey { epoch: 1, secret: secrets[own].clone() }],
        peers: vec![peer],
        own_prefixes: vec![net(own)],
        ..TableSpec::default()
    };
    Arc::new(Table::new(spec).expect("a right table"))
}

/// A packet with a UDP datagram from the near node's network to the far one's, and room behind it.
pub(crate) fn datagram(len: usize) -> Vec<u8> {
    let mut packet = ipv4(len, 17);
    let udp = (len as u16 - 20).to_be_bytes();
    packet[20..28].copy_from_slice(&[0x1b, 0xbc, 0x1b, 0xbd, udp[0], udp[1], 0, 0]);
    packet.resize(len + 64, 0);
    packet
}

fn ipv4(len: usize, protocol: u8) -> Vec<u8> {
    let mut packet: Vec<u8> = (0..len).map(|n| (n * 31) as u8).collect();
    let total = (len as u16).to_be_bytes();
    packet[..20]
        .copy_from_slice(&[0x45, 0, total[0], total[1], 0, 1, 0x40, 0, 64, protocol, 0, 0, 10, 0, 0, 1, 10, 1, 0, 1]);
    let sum = checksum::finish(checksum::sum(&packet[..20])).to_be_bytes();
    packet[10..12].copy_from_slice(&sum);
    packet
}

/// A TCP super-packet of 44 segments.
pub(crate) struct Train {
    buffer: Vec<u8>,
    headers: [u8; HEADERS],
}

impl Train {
    pub(crate) fn new() -> Self {
        let mut buffer = ipv4(HEADERS + TRAIN * SEGMENT, 6);
        buffer[20..40]
            .copy_from_slice(&[0x1b, 0xbc, 0x1b, 0xbd, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 0x20, 0, 0, 0, 0, 0]);
        buffer.resize(buffer.len() + 64, 0);
        let headers = *buffer.first_chunk().expect("it has headers");
        Self { buffer, headers }
    }

    /// Its segments; what cutting it before changed of its headers is put back.
    pub(crate) fn segments(&mut self) -> Segments<'_> {
        self.buffer[..HEADERS].copy_from_slice(&self.headers);
        let cut = Cut { transport: Transport::Tcp, size: SEGMENT as u16 };
        let len = HEADERS + TRAIN * SEGMENT;
        Segments::new(&mut self.buffer, len, cut).expect("a super-packet")
    }

    /// Cuts it; gives the number of segments.
    pub(crate) fn cut(&mut self) -> usize {
        let mut segments = self.segments();
        std::iter::from_fn(|| segments.next().map(|_| ())).count()
    }
}

/// Packets of one flow, as they come out of a tunnel.
pub(crate) struct Joiner {
    coalescer: Coalescer,
    packets: Batch<()>,
}

impl Joiner {
    pub(crate) fn new() -> Self {
        let mut train = Train::new();
        let mut segments = train.segments();
        let mut packets = Batch::new(384 << 10, 128);
        while let Some((packet, len)) = segments.next() {
            packets.room().expect("there is room")[..len].copy_from_slice(&packet[..len]);
            packets.push(len, ());
        }
        Self { coalescer: Coalescer::default(), packets }
    }

    /// Joins them, and parts them again for the next time; gives the number of runs.
    pub(crate) fn join(&mut self) -> usize {
        self.coalescer.plan(&mut self.packets, Offloads::ALL);
        let runs = self.coalescer.runs();
        for run in runs {
            self.coalescer.part(&mut self.packets, run);
        }
        runs.len()
    }
}

/// Ten thousand peers, each with a network of both families.
pub(crate) struct Lookup {
    map: PrefixMap,
    at: u32,
}

impl Lookup {
    pub(crate) const PEERS: u32 = 10_000;

    pub(crate) fn new() -> Self {
        let prefixes = (0..Self::PEERS).flat_map(|peer| {
            let v4 = format!("10.{}.{}.0/24", peer >> 8, peer & 255);
            let v6 = format!("fd00:0:{peer:x}::/48");
            [v4, v6].map(|net| (net.parse().expect("a prefix"), Owner::Peer(PeerId(peer))))
        });
        Self { map: PrefixMap::new(prefixes).expect("no prefix twice"), at: 0 }
    }

    /// Looks up an address of one peer after another, far apart.
    pub(crate) fn next(&mut self) -> Option<Owner> {
        self.at = (self.at + 7_919) % Self::PEERS;
        let [_, _, high, low] = self.at.to_be_bytes();
        self.map.lookup([10, high, low, 9].into())
    }
}

/// The lane of a flow.
pub(crate) fn lane_of(hash: &FlowHash, packet: &[u8]) -> usize {
    hash.lane_of(packet, 4)
}
