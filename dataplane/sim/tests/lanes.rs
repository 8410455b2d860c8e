//! Flows between ends of several lanes: where each packet goes, and in which order it comes.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

use std::collections::BTreeMap;

use mesh_dataplane::{command::Event, drop_reason::DropReason, table::PeerId};
use mesh_dataplane_sim::{Sim, millis, minutes, packet, secs};

const FLOWS: u32 = 400;

/// Packet `sequence` of flow `flow`.
fn of_flow(from: usize, to: usize, flow: u32, sequence: u32) -> Vec<u8> {
    let mut packet = packet(from, to, sequence);
    let (near, far) = ((20_000 + flow as u16).to_be_bytes(), 443u16.to_be_bytes());
    // The node with the lower number is the client.
    let ports = if from < to { [near, far] } else { [far, near] };
    packet[20..22].copy_from_slice(&ports[0]);
    packet[22..24].copy_from_slice(&ports[1]);
    packet
}

fn flow_of(packet: &[u8]) -> u16 {
    let port = |at: usize| u16::from_be_bytes([packet[at], packet[at + 1]]);
    port(20).max(port(22))
}

/// One packet of each flow there, and one back.
fn round(sim: &mut Sim, sequence: u32) {
    for flow in 0..FLOWS {
        sim.send_packet(0, &of_flow(0, 1, flow, sequence));
        sim.send_packet(1, &of_flow(1, 0, flow, sequence));
    }
}

/// Asserts that a node got packets of all flows, in order and each on the lane of its flow, and all of `rounds` but those
/// that did not fit into the queue while the sender's handshakes were under way.
fn assert_kept(sim: &Sim, node: usize, rounds: u32) {
    let dropped = sim.drops(1 - node, DropReason::QueueFull);
    assert_in_order(sim, node);
    assert_eq!(sim.node(node).packets.len() as u64 + dropped, u64::from(rounds * FLOWS));
}

/// Asserts that what a node got of all flows came in order, and each packet on the lane of its flow.
fn assert_in_order(sim: &Sim, node: usize) {
    let node = sim.node(node);
    let mut last = BTreeMap::<u16, u32>::new();
    for (packet, lane) in node.packets.iter().zip(&node.lanes_taken) {
        assert_eq!(*lane, node.lane_of(packet), "flow {} changed its lane", flow_of(packet));
        let sequence = u32::from_be_bytes(packet[48..52].try_into().unwrap());
        let before = last.insert(flow_of(packet), sequence);
        assert!(before.is_none_or(|before| before < sequence), "flow {}", flow_of(packet));
    }
    assert_eq!(last.len(), FLOWS as usize);
}

#[test]
fn flows_keep_their_lane_and_order_whatever_the_numbers_of_lanes() {
    for lanes in [[8, 2], [4, 4], [2, 1], [1, 8], [4, 1]] {
        let mut sim = Sim::seeded(31).nodes_with_lanes(&lanes).delay(millis(5));
        // A session for each pair; then everything flows, also after pauses in which sessions end.
        let mut rounds = 0;
        for pause in [secs(2), millis(20), millis(20), secs(8), secs(30), minutes(4), millis(20)] {
            round(&mut sim, rounds);
            rounds += 1;
            sim.advance(pause);
        }
        sim.advance(secs(2));
        let most = lanes[0].max(lanes[1]);
        for (node, other) in [(0, 1), (1, 0)] {
            assert_kept(&sim, node, rounds);
            assert_eq!(sim.node(node).tunnels(sim.now()), most, "{lanes:?}");
            let pairs = sim.node(node).pairs(PeerId(other), sim.now());
            let used = pairs.iter().filter(|pair| pair.traffic.rx_packets > 0).count();
            assert_eq!(used, most, "{lanes:?}: all pairs carry something");
            for lane in 0..lanes[node] {
                let counters = sim.node(node).counters(lane, sim.now());
                assert_eq!((counters.strayed_packets, counters.crossed_packets), (0, 0));
            }
            for pair in pairs {
                let port = 7_100 + pair.tunnels[0].remote_lane as u16;
                assert_eq!(pair.endpoint.map(|endpoint| endpoint.port()), Some(port));
            }
        }
    }
}

#[test]
fn a_plain_peer_is_served_by_lane_0_in_order() {
    let mut sim = Sim::seeded(32).nodes_with_lanes(&[4, 1]).delay(millis(5));
    sim.node_mut(1).plain = true;
    // Plain WireGuard knows one endpoint and no lanes of ours.
    sim.node_mut(0).plain = true;
    sim.publish_all();
    for sequence in 0..6 {
        round(&mut sim, sequence);
        sim.advance(millis(200));
    }
    sim.advance(secs(1));
    assert_eq!(sim.node(0).tunnels(sim.now()), 1);
    assert_eq!(sim.node(1).tunnels(sim.now()), 1);
    // What waits for the first handshake is bounded; the rest arrives in order.
    let mut last = BTreeMap::<u16, u32>::new();
    for packet in &sim.node(1).packets {
        let sequence = u32::from_be_bytes(packet[48..52].try_into().unwrap());
        let before = last.insert(flow_of(packet), sequence);
        assert!(before.is_none_or(|before| before < sequence), "flow {}", flow_of(packet));
    }
    assert_eq!(last.len(), FLOWS as usize);
    let crossed: u64 = (0..4).map(|lane| sim.node(0).counters(lane, sim.now()).crossed_packets).sum();
    let foreign = (0..FLOWS).filter(|flow| sim.node(0).lane_of(&of_flow(0, 1, *flow, 0)) != 0).count();
    assert_eq!(crossed, 6 * foreign as u64);
    assert!(sim.node(0).lanes_taken.iter().all(|lane| *lane == 0), "what it sends comes by lane 0");
}

#[test]
fn flows_of_a_blocked_port_use_lane_0_until_it_is_open() {
    // With fewer and with more lanes than the other end.
    for (lanes, seed) in [([4, 4], 33), ([4, 2], 34), ([1, 2], 35)] {
        let mut sim = Sim::seeded(seed).nodes_with_lanes(&lanes).delay(millis(5));
        // Nothing passes between the ports of the lanes but the first.
        sim.link.set_filter(|sent| sent.to.port() == 7_100 && sent.from.port() == 7_100);
        let blocked_pairs = lanes[0].max(lanes[1]) - 1;
        let mut sent = 0;
        for _ in 0..8 {
            round(&mut sim, sent);
            sent += 1;
            sim.advance(secs(1));
        }
        for (node, other) in [(0, 1), (1, 0)] {
            let pairs = sim.node(node).pairs(PeerId(other), sim.now());
            let blocked: Vec<_> = pairs.iter().flat_map(|pair| pair.blocked.clone()).collect();
            assert_eq!(blocked.len(), blocked_pairs, "{lanes:?} {blocked:?}");
            let mut got = BTreeMap::<u16, Vec<u32>>::new();
            for packet in &sim.node(node).packets {
                let sequence = u32::from_be_bytes(packet[48..52].try_into().unwrap());
                got.entry(flow_of(packet)).or_default().push(sequence);
            }
            assert_eq!(got.len(), FLOWS as usize);
            for (flow, sequences) in got {
                assert!(sequences.is_sorted(), "flow {flow}: {sequences:?}");
                assert!(sequences.contains(&7), "flow {flow}: {sequences:?}");
            }
            assert!(!sim.events(node).iter().any(|event| matches!(event, Event::HandshakeFailed { .. })));
        }
        sim.link.clear_filter();
        // Traffic makes the lanes try again; after that all is as if nothing had been.
        for _ in 0..200 {
            sim.send_packet(0, &of_flow(0, 1, 0, 0));
            round(&mut sim, sent);
            sim.advance(secs(1));
        }
        for (node, other) in [(0, 1), (1, 0)] {
            let pairs = sim.node(node).pairs(PeerId(other), sim.now());
            assert!(pairs.iter().all(|pair| pair.blocked.is_empty()), "{lanes:?}");
            assert!(pairs.iter().all(|pair| pair.tunnels.iter().any(|tunnel| tunnel.confirmed)));
        }
    }
}

#[test]
fn a_handshake_that_reaches_a_lane_of_no_concern_is_dropped() {
    let mut sim = Sim::seeded(36).nodes_with_lanes(&[4, 4]);
    sim.link.recording = Some(Vec::new());
    round(&mut sim, 0);
    sim.advance(secs(2));
    let recording = sim.link.recording.take().unwrap();
    let initiations = recording.iter().filter(|sent| sent.bytes[0] == 1 && sent.to.ip() == sim.node(1).address().ip());
    let initiations: Vec<_> = initiations.cloned().collect();
    assert!(!initiations.is_empty());
    let tunnels = sim.node(1).tunnels(sim.now());
    for sent in initiations {
        let right = usize::from(sent.to.port() - 7_100);
        for lane in (0..4).filter(|lane| *lane != right) {
            let before = sim.drops(1, DropReason::WrongLane);
            sim.inject_to(1, lane, &sent.bytes, sent.from);
            assert_eq!(sim.drops(1, DropReason::WrongLane), before + 1, "lane {lane} in place of {right}");
        }
    }
    assert_eq!(sim.node(1).tunnels(sim.now()), tunnels);
    round(&mut sim, 1);
    sim.advance(secs(1));
    assert_kept(&sim, 0, 2);
    assert_kept(&sim, 1, 2);
}

#[test]
fn a_peer_that_comes_back_with_other_lanes_is_reached_by_them() {
    let mut sim = Sim::seeded(37).nodes_with_lanes(&[4, 4]);
    round(&mut sim, 0);
    sim.advance(secs(2));
    for (lanes, sequence) in [(2, 1), (8, 3), (1, 5)] {
        sim.restart_with_lanes(1, lanes);
        sim.publish_all();
        for node in [0, 1] {
            sim.node_mut(node).clear_packets();
        }
        round(&mut sim, sequence);
        sim.advance(secs(8));
        assert_eq!(sim.node(0).tunnels(sim.now()), lanes.max(4));
        let before = [0, 1].map(|node| sim.node(node).packets.len());
        round(&mut sim, sequence + 1);
        sim.advance(secs(1));
        for node in [0, 1] {
            assert_eq!(sim.node(node).packets.len(), before[node] + FLOWS as usize);
            assert_in_order(&sim, node);
        }
    }
}

#[test]
fn keepalives_hold_the_ways_of_all_lanes_in_use() {
    let mut sim = Sim::seeded(38).nodes_with_lanes(&[2, 2]);
    sim.node_mut(0).keepalive = Some(secs(25));
    sim.publish_all();
    sim.advance(secs(1));
    assert_eq!(sim.node(0).tunnels(sim.now()), 1, "lane 0 is kept up unasked");
    round(&mut sim, 0);
    sim.advance(secs(2));
    assert_eq!(sim.node(0).tunnels(sim.now()), 2);
    sim.link.recording = Some(Vec::new());
    sim.advance(secs(100));
    let recording = sim.link.recording.take().unwrap();
    for port in [7_100, 7_101] {
        let kept = recording.iter().filter(|sent| sent.from.port() == port && sent.bytes[0] == 4).count();
        assert!(kept >= 3, "port {port}: {kept}");
    }
    sim.advance(minutes(5));
    assert_eq!(sim.node(0).tunnels(sim.now()), 1, "another lane is not kept for ever");
}
