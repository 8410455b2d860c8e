//! What hostile bytes are thrown at: shared by the fuzz targets and by a test that replays their corpus.
#![allow(dead_code, unreachable_pub, reason = "each target uses one of the functions")]

use std::{cell::RefCell, net::SocketAddr, sync::Arc, time::Duration};

use mesh_dataplane::{
    Lanes, LocalKey, PeerId, PeerSpec, Preshared, RemoteKey, SecretKey, Table, TableSpec,
    clock::Instant,
    lane::{Lane, LaneConfig, Output},
    packet::{
        checksum,
        coalesce::Coalescer,
        dscp::Dscp,
        flow::FlowHash,
        fragment::Fragments,
        header::{Fragment, Header},
        icmp::{self, Problem},
        mss,
        offload::{Cut, Offloads, Transport},
        own::{self, Own},
        pieces::Assembly,
        reassembly::Reassembly,
        segment::Segments,
    },
    tun::Packets,
};

const NOW: Instant = Instant::from_start(Duration::from_secs(500));

/// Two lanes with a session; the second lets anything out.
struct World {
    victim: Lane,
    hostile: Lane,
    /// What the hostile lane sealed last.
    sealed: Vec<u8>,
}

fn address(host: u8) -> SocketAddr {
    ([192, 0, 2, host], 7100).into()
}

fn lane(own: u8, other: u8, own_prefixes: &[&str], allowed: &[&str]) -> Lane {
    let nets = |texts: &[&str]| texts.iter().map(|text| text.parse().expect("a prefix")).collect();
    let spec = TableSpec {
        local_keys: vec![LocalKey { epoch: 1, secret: SecretKey::new([own; 32]) }],
        peers: vec![PeerSpec {
            id: PeerId(1),
            keys: vec![RemoteKey { epoch: 1, public: SecretKey::new([other; 32]).to_public() }],
            preshared: Preshared::None,
            allowed_ips: nets(allowed),
            endpoints: vec![address(other)],
            keepalive: None,
            lanes: Lanes::Plain,
        }],
        own_prefixes: nets(own_prefixes),
        ..TableSpec::default()
    };
    let config = LaneConfig {
        lane: 0,
        lanes: 1,
        flow_key: [1; 16],
        handshakes_per_second: u32::MAX,
        dscp: Dscp::Copy,
        seed: [own; 32],
    };
    Lane::new(config, Arc::new(Table::new(spec).expect("a right table")), NOW)
}

/// The smallest packet from the hostile peer to the victim.
fn packet() -> Vec<u8> {
    let mut packet = vec![0; 32];
    packet[0] = 0x45;
    packet[3] = 32;
    packet[9] = 17;
    packet[12..20].copy_from_slice(&[10, 2, 0, 1, 10, 1, 0, 1]);
    packet
}

impl World {
    fn new() -> Self {
        let victim = lane(1, 2, &["10.1.0.0/16", "fd01::/16"], &["10.2.0.0/16", "fd02::/16"]);
        let hostile = lane(2, 1, &[], &["0.0.0.0/0", "::/0"]);
        let mut world = Self { victim, hostile, sealed: Vec::new() };
        world.seal(&packet());
        assert_eq!(world.sealed.len(), 64, "a session stands");
        world
    }

    /// Sends a packet out of the hostile lane and lets the two talk until they are quiet.
    fn seal(&mut self, packet: &[u8]) {
        let mut out = Output::new();
        let mut buffer = packet.to_vec();
        buffer.resize(packet.len().next_multiple_of(16), 0);
        self.hostile.handle_packet(&mut buffer, packet.len(), NOW, &mut out);
        for _ in 0..6 {
            let datagrams: Vec<_> = out.datagrams.iter().map(|(_, bytes)| bytes.to_vec()).collect();
            out.clear();
            for datagram in datagrams {
                self.sealed.clone_from(&datagram);
                self.victim.handle_datagram(address(2), &datagram, NOW, &mut out);
            }
            let answers: Vec<_> = out.datagrams.iter().map(|(_, bytes)| bytes.to_vec()).collect();
            out.clear();
            for answer in answers {
                self.hostile.handle_datagram(address(1), &answer, NOW, &mut out);
            }
        }
        self.calm();
    }

    fn calm(&mut self) {
        while self.victim.poll_event().is_some() || self.hostile.poll_event().is_some() {}
    }
}

thread_local! {
    static WORLD: RefCell<World> = RefCell::new(World::new());
}

/// A datagram into a lane: the bytes as they are, over a sealed datagram, and inside one.
pub fn inbound(input: &[u8]) {
    WORLD.with_borrow_mut(|world| {
        let mut out = Output::new();
        world.victim.handle_datagram(address(9), input, NOW, &mut out);
        let mut altered = world.sealed.clone();
        for (byte, change) in altered.iter_mut().zip(input) {
            *byte ^= change;
        }
        altered.extend(input.iter().skip(altered.len()).take(2_000));
        world.victim.handle_datagram(address(9), &altered, NOW, &mut out);
        out.clear();
        world.calm();
        // Whatever the hostile lane takes for a packet arrives authentic.
        let mut inner = input.to_vec();
        inner.truncate(4_000);
        world.seal(&inner);
    });
}

/// Views of headers, and what is made from them.
pub fn header(input: &[u8]) {
    if let Some(own) = Own::parse(input) {
        let mut again = input.to_vec();
        own.write(u16::from_be_bytes([input[2], input[3]]), &mut again);
        assert_eq!(Own::parse(&again), Some(own));
        if let Some((packet, _)) = Assembly::default().take(own, input, 0) {
            assert_eq!(packet.len() + own::LEN, input.len());
        }
    }
    let Some(header) = Header::parse(input) else { return };
    checksum::holds(input, &header);
    assert!(header.len <= input.len() && header.payload <= header.len);
    FlowHash::new([3; 16]).hash(&header, input);
    let mut out = [0; icmp::MAX_LEN];
    for problem in [Problem::Unreachable, Problem::TooBig(1420)] {
        if let Some(len) = icmp::write(problem, input, &header, &mut out) {
            let answer = Header::parse(&out[..len]).expect("we make whole packets");
            assert_eq!((answer.source, answer.destination), (header.destination, header.source));
        }
    }
    if let Some(mut fragments) = Fragments::new(input, &header, 1_280) {
        let mut piece = [0; 1_280];
        while let Some(len) = fragments.write(&mut piece) {
            assert!(Header::parse(&piece[..len]).is_some_and(|piece| piece.source == header.source));
        }
    }
    let mut packet = input[..header.len].to_vec();
    mss::clamp(&mut packet, &header, 1_420);
    assert_eq!(Header::parse(&packet), Some(header), "the headers stay");
}

/// A packet from the TUN.
pub fn outbound(input: &[u8]) {
    WORLD.with_borrow_mut(|world| {
        let mut out = Output::new();
        let mut buffer = input.to_vec();
        world.victim.handle_packet(&mut buffer, input.len(), NOW, &mut out);
        for (_, datagram) in out.datagrams.iter() {
            assert!(datagram.len() <= input.len() + 48 || datagram.len() == 148);
        }
        out.clear();
        world.victim.handle_timeout(NOW, &mut out);
        world.calm();
    });
}

/// A super-packet: how it is to be cut (transport, size of pieces, MTU: five bytes), then its bytes.
pub fn segment(input: &[u8]) {
    let Some((&[transport, a, b, c, d], packet)) = input.split_first_chunk() else { return };
    let transport = if transport & 1 == 0 { Transport::Tcp } else { Transport::Udp };
    let cut = Cut { transport, size: u16::from_be_bytes([a, b]) };
    let mtu = u16::from_be_bytes([c, d]).max(68);
    let mut buffer = [packet, &[0xee; 15]].concat();
    let Some(mut segments) = Segments::new(&mut buffer, packet.len(), cut) else { return };
    let (whole, headers, longest) = (*segments.header(), segments.start().len(), segments.longest());
    let fits = segments.limit(mtu);
    let mut payload = Vec::new();
    while let Some((piece, len)) = segments.next() {
        assert!(len <= longest && (!fits || len <= usize::from(mtu)) && len > headers);
        let header = Header::parse(&piece[..len]).expect("a piece is a packet");
        assert_eq!((header.len, header.source, header.destination), (len, whole.source, whole.destination));
        payload.extend_from_slice(&piece[headers..len]);
        // The padding of a lane.
        piece[len..].fill(0);
    }
    assert_eq!(payload, packet[headers..whole.len], "no byte is lost or changed");
}

/// Packets, each behind its length, of one batch.
fn batch(mut input: &[u8]) -> Option<(Vec<Vec<u8>>, Packets)> {
    let mut packets = Vec::new();
    while let Some((&[a, b], rest)) = input.split_first_chunk()
        && packets.len() < 200
    {
        let (packet, rest) = rest.split_at(rest.len().min(usize::from(u16::from_be_bytes([a, b])) % 3_000));
        packets.push(packet.to_vec());
        input = rest;
    }
    let mut batch = Packets::new(packets.len() * 3_000, packets.len().max(1));
    for packet in &packets {
        batch.room()?[..packet.len()].copy_from_slice(packet);
        batch.push(packet.len(), ());
    }
    Some((packets, batch))
}

/// Fragments put together: what is new is whole, and made of what came.
pub fn reassembly(input: &[u8]) {
    let Some((packets, mut batch)) = batch(input) else { return };
    Reassembly::default().join(&mut batch);
    let mut payload = 0;
    for (_, packet) in batch.iter() {
        payload += packet.len().saturating_sub(20);
        if packets.iter().any(|came| came == packet) {
            continue;
        }
        let header = Header::parse(packet).expect("a packet");
        assert_eq!((header.fragment, header.len), (Fragment::Whole, packet.len()));
        assert!(packets.iter().any(|came| came.len() > 20 && packet[20..].starts_with(&came[20..])));
    }
    let came: usize = packets.iter().map(|packet| packet.len().saturating_sub(20)).sum();
    assert_eq!(payload, came, "nothing is lost, nothing comes twice");
}

/// Packets for a queue, each behind its length in two bytes: joined, and cut again.
pub fn coalesce(input: &[u8]) {
    let Some((packets, mut batch)) = batch(input) else { return };
    let mut coalescer = Coalescer::default();
    coalescer.plan(&mut batch, Offloads::ALL);
    let mut count = 0;
    for run in coalescer.runs() {
        count += run.count;
        let Some(cut) = run.cut.filter(|_| run.count > 1) else { continue };
        let (_, first) = batch.get(run.first).expect("it is in the batch");
        let mut bytes = first.to_vec();
        for n in coalescer.followers(run) {
            bytes.extend_from_slice(&batch.get(n).expect("it is in the batch").1[run.headers.1..]);
        }
        let len = bytes.len();
        let mut segments = Segments::new(&mut bytes, len, cut).expect("a run is a super-packet");
        for n in [run.first].into_iter().chain(coalescer.followers(run)) {
            let (piece, len) = segments.next().expect("as many pieces as packets");
            assert_eq!(&piece[run.headers.1..len], &packets[n][run.headers.1..], "the payload stays");
        }
        assert!(segments.is_done());
    }
    assert_eq!(count, packets.len(), "each packet is in one run");
    for run in coalescer.runs() {
        coalescer.part(&mut batch, run);
    }
    assert!(batch.iter().map(|(_, packet)| packet).eq(packets.iter().map(Vec::as_slice)), "a refused run comes apart");
}
