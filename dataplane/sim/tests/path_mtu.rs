//! Paths that carry less than their ends believe, and say nothing.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

use mesh_dataplane::{
    command::{PathSnapshot, PathState},
    drop_reason::DropReason,
    packet::{
        checksum,
        own::{Kind, LEN, Own},
    },
    table::PeerId,
};
use mesh_dataplane_sim::{Sim, millis, minutes, packet, secs};

/// Largest inner packet on a path of 1280 bytes: IPv4, UDP and WireGuard around it.
const NARROW: usize = 1_280 - 60;

/// Part of a TCP stream from node 0 to node 1: whole, of `len` bytes, with the sequence number `sequence`.
fn tcp(len: usize, sequence: u32) -> Vec<u8> {
    let mut bytes = packet(0, 1, 0);
    bytes.resize(len, 0x5a);
    bytes[2..4].copy_from_slice(&(len as u16).to_be_bytes());
    bytes[6] = 0x40;
    bytes[9] = 6;
    let sum = checksum::finish(checksum::sum(&bytes[..20]));
    bytes[10..12].copy_from_slice(&sum.to_be_bytes());
    bytes[20..40].fill(0);
    bytes[24..28].copy_from_slice(&sequence.to_be_bytes());
    bytes[32..34].copy_from_slice(&[0x50, 0x10]);
    let pseudo = checksum::sum(&bytes[12..20]) + (len as u64 - 20) + 6;
    let sum = checksum::finish(pseudo + checksum::sum(&bytes[20..]));
    bytes[36..38].copy_from_slice(&sum.to_be_bytes());
    bytes
}

/// A datagram from node 0 to node 1 that nobody may cut.
fn udp(len: usize) -> Vec<u8> {
    let mut bytes = packet(0, 1, 5);
    bytes.resize(len, 7);
    bytes[2..4].copy_from_slice(&(len as u16).to_be_bytes());
    bytes[6] = 0x40;
    bytes
}

fn path(sim: &Sim) -> PathSnapshot {
    sim.peer(0, 1).unwrap().paths[0]
}

/// Sends a large TCP packet every 20 ms for so many seconds; the longest time in which none of it arrived.
fn bulk(sim: &mut Sim, seconds: u64) -> u64 {
    let (mut quiet, mut longest) = (0, 0);
    for step in 0..seconds * 50 {
        let before = sim.node(1).packets.len();
        sim.send_packet(0, &tcp(1_420, step as u32 * 1_380));
        sim.advance(millis(20));
        quiet = if sim.node(1).packets.len() > before { 0 } else { quiet + 20 };
        longest = longest.max(quiet);
    }
    longest
}

#[test]
fn a_bulk_transfer_survives_a_black_hole_and_the_path_climbs_back() {
    let mut sim = Sim::seeded(41).nodes(2).delay(millis(20));
    bulk(&mut sim, 5);
    assert_eq!((path(&sim).path_mtu, path(&sim).state), (1_480, PathState::Confirmed));
    sim.node_mut(1).clear_packets();
    sim.link.mtu = 1_280;
    let gap = bulk(&mut sim, 10);
    // TCP sends again 0.2, 0.6 and 1.4 s after it stalled: what is found by then costs it no more.
    assert!(gap > 0 && gap < 1_400, "nothing arrived for {gap} ms");
    assert_eq!(path(&sim).state, PathState::BlackHole);
    assert!((1_272..=1_280).contains(&path(&sim).path_mtu), "{:?}", path(&sim));
    assert_eq!(sim.node(0).counters(0, sim.now()).black_holes, 1);
    sim.node_mut(1).clear_packets();
    bulk(&mut sim, 2);
    let payload: usize = sim.node(1).packets.iter().map(|packet| packet.len() - 40).sum();
    assert!(sim.node(1).packets.iter().all(|packet| packet.len() <= NARROW));
    assert!(payload.abs_diff(100 * 1_380) <= 1_380, "{payload} bytes: all of the stream, but what is under way");
    assert_eq!(sim.drops(0, DropReason::PacketTooBig), 0, "TCP is cut, not refused");
    sim.link.mtu = 1_500;
    bulk(&mut sim, 40);
    assert_eq!((path(&sim).path_mtu, path(&sim).state), (1_480, PathState::Confirmed));
    sim.node_mut(1).clear_packets();
    sim.send_packet(0, &tcp(1_420, 1));
    sim.advance(secs(1));
    assert_eq!(sim.node(1).packets, [tcp(1_420, 1)], "whole again");
}

#[test]
fn datagrams_are_told_what_fits_and_1280_bytes_always_arrive() {
    let mut sim = Sim::seeded(42).nodes(2);
    sim.link.mtu = 1_280;
    sim.send_packet(0, &udp(1_000));
    sim.advance(secs(15));
    assert_eq!(path(&sim).inner_mtu, 1_280);
    sim.node_mut(1).clear_packets();
    sim.send_packet(0, &udp(1_400));
    let icmp = sim.node(0).packets.last().unwrap().clone();
    assert_eq!((icmp[20], icmp[21], u16::from_be_bytes([icmp[26], icmp[27]])), (3, 4, 1_280));
    assert_eq!(icmp[12..20], [10, 2, 0, 5, 10, 1, 0, 5], "from the destination to the sender");
    sim.send_packet(0, &udp(1_280));
    sim.advance(secs(1));
    assert_eq!(sim.node(1).packets, [udp(1_280)], "in pieces");
}

#[test]
fn segment_sizes_follow_the_path_both_ways() {
    let mut sim = Sim::seeded(43).nodes(2);
    sim.link.mtu = 1_280;
    for (from, to) in [(0, 1), (1, 0)] {
        sim.send(from, to);
    }
    sim.advance(secs(15));
    for (from, to) in [(0, 1), (1, 0)] {
        let mut syn = packet(from, to, 0);
        syn[9] = 6;
        syn[32..34].copy_from_slice(&[0xa0, 0x02]);
        syn[40..44].copy_from_slice(&[2, 4, 5, 0xb4]);
        sim.send_packet(from, &syn);
        sim.advance(secs(1));
        let arrived = sim.node(to).packets.last().unwrap();
        let most = u16::from_be_bytes([arrived[42], arrived[43]]);
        assert!((NARROW as u16 - 48..=NARROW as u16 - 40).contains(&most), "{most}");
    }
}

#[test]
fn a_broken_tcp_packet_is_not_mended_by_cutting_it() {
    let mut sim = Sim::seeded(44).nodes(2);
    sim.link.mtu = 1_280;
    sim.send(0, 1);
    sim.advance(secs(15));
    sim.node_mut(1).clear_packets();
    let mut broken = tcp(1_420, 1);
    broken[900] ^= 1;
    sim.send_packet(0, &broken);
    sim.advance(secs(1));
    assert_eq!((sim.node(1).packets.len(), sim.drops(0, DropReason::PacketTooBig)), (0, 1));
}

#[test]
fn plain_peers_are_sent_no_probe() {
    let mut sim = Sim::seeded(45).nodes(2);
    sim.node_mut(1).plain = true;
    sim.publish_all();
    sim.link.recording = Some(Vec::new());
    bulk(&mut sim, 30);
    let from = sim.node(0).address();
    let sent = sim.link.recording.take().unwrap();
    let probes = |sent: &&mesh_dataplane_sim::Sent| sent.from == from && sent.dont_fragment;
    assert_eq!(sent.iter().filter(probes).count(), 0);
    assert_eq!(sim.node(0).pairs(PeerId(1), sim.now())[0].paths, []);
}

#[test]
fn each_pair_of_lanes_has_a_path_of_its_own() {
    let mut sim = Sim::seeded(46).nodes_with_lanes(&[2, 2]);
    sim.link.mtu = 1_400;
    for port in 0..50u16 {
        let mut bytes = packet(0, 1, port.into());
        bytes[20..22].copy_from_slice(&port.to_be_bytes());
        sim.send_packet(0, &bytes);
    }
    sim.advance(secs(15));
    let pairs = sim.node(0).pairs(PeerId(1), sim.now());
    let paths: Vec<_> = pairs.iter().flat_map(|pair| &pair.paths).collect();
    assert_eq!(
        paths.iter().map(|path| (path.lane, path.endpoint.port())).collect::<Vec<_>>(),
        [(0, 7_100), (1, 7_101)]
    );
    assert!(paths.iter().all(|path| (1_392..=1_400).contains(&path.path_mtu)), "{paths:?}");
}

#[test]
fn probes_stay_inside_and_cost_an_idle_path_nothing() {
    let mut sim = Sim::seeded(47).nodes(2);
    sim.send(0, 1);
    sim.advance(secs(3));
    assert_eq!(path(&sim).state, PathState::Confirmed, "asked as soon as there was a session");
    for node in 0..2 {
        assert!(sim.node(node).packets.len() <= 1, "no probe is written to a TUN");
        assert_eq!(sim.peer(node, 1 - node).unwrap().refused_packets, 0);
    }
    let mut forged = [0; 48];
    Own { kind: Kind::Answer, size: 60_000, number: 0 }.write(LEN as u16, &mut forged);
    sim.send_packet(0, &forged);
    assert_eq!(sim.drops(0, DropReason::UnroutableDestination), 1, "no user sends one");
    sim.link.recording = Some(Vec::new());
    sim.advance(minutes(2));
    // The signs of life that WireGuard owes for what was sent, and no more.
    assert!(sim.link.recording.take().unwrap().len() <= 4);
}

#[test]
fn while_a_size_is_in_doubt_nothing_is_lost_that_goes_in_pieces() {
    let mut sim = Sim::seeded(48).nodes(2).delay(millis(20));
    bulk(&mut sim, 3);
    sim.node_mut(1).clear_packets();
    sim.link.mtu = 1_280;
    let mut steps = 0;
    let mut arrived = Vec::new();
    for _ in 0..150 {
        sim.node_mut(1).clear_packets();
        sim.send_packet(0, &udp(1_400));
        sim.advance(millis(20));
        steps += 1;
        arrived.push(sim.node(1).packets.contains(&udp(1_400)));
        if path(&sim).state != PathState::Confirmed {
            break;
        }
    }
    let first = arrived.iter().rposition(|arrived| !arrived).unwrap();
    assert!(first < 40 && steps - first > 5, "lost {first} of {steps}: as long as nothing was known");
}
