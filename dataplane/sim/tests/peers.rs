//! Peers: idle, roaming, lying.

use mesh_dataplane::{command::Event, drop_reason::DropReason};
use mesh_dataplane_sim::{Sim, millis, minutes, packet, secs};

#[test]
fn idle_peers_cost_nothing() {
    let mut sim = Sim::seeded(1).nodes(2);
    sim.send(0, 1);
    sim.advance(minutes(4));
    for node in 0..2 {
        assert_eq!(sim.node(node).tunnels(sim.now()), 0);
        assert!(sim.events(node).iter().any(|event| matches!(event, Event::PeerIdle { .. })));
    }
    sim.link.recording = Some(Vec::new());
    sim.advance(minutes(60));
    assert_eq!(sim.link.recording.take().unwrap(), []);
    assert_eq!(sim.node_mut(0).lane().poll_timeout(), None, "no timer left");
    sim.send(0, 1);
    sim.advance(secs(1));
    sim.assert_all_arrived(1, 2);
}

#[test]
fn keepalives_hold_a_session_without_traffic() {
    let mut sim = Sim::seeded(2).nodes(2);
    sim.node_mut(0).keepalive = Some(secs(25));
    sim.publish(0);
    sim.advance(minutes(30));
    assert!(sim.peer(0, 1).unwrap().tunnels[0].confirmed);
    assert!(sim.peer(1, 0).unwrap().tunnels[0].confirmed);
    sim.link.recording = Some(Vec::new());
    sim.advance(minutes(5));
    let count = sim.link.recording.take().unwrap().len();
    assert!((10..40).contains(&count), "{count} datagrams in five minutes");
}

#[test]
fn a_peer_that_moves_is_followed_after_its_first_packet() {
    let mut sim = Sim::seeded(3).nodes(2);
    sim.send(0, 1);
    sim.advance(secs(1));
    let new = "198.51.100.77:7100".parse().unwrap();
    sim.node_mut(0).move_to(new);
    sim.send(0, 1);
    sim.advance(millis(5));
    assert_eq!(sim.peer(1, 0).unwrap().endpoint, Some(new));
    let moved = |event: &Event| matches!(event, Event::EndpointMoved { to, .. } if *to == new);
    assert!(sim.events(1).iter().any(moved));
    sim.send(1, 0);
    sim.advance(millis(5));
    assert_eq!(sim.received(0), [0]);
}

/// How many handshakes a node began in what was recorded.
fn begun(sim: &mut Sim, by: usize) -> usize {
    let from = sim.node(by).address();
    let sent = sim.link.recording.take().unwrap();
    sent.iter().filter(|sent| sent.from.ip() == from.ip() && sent.bytes[0] == 1).count()
}

#[test]
fn a_session_that_one_end_lost_is_replaced_before_the_other_misses_an_answer() {
    for (lanes, agreed) in [([1, 1], false), ([2, 2], false), ([4, 1], false), ([1, 4], true), ([2, 2], true)] {
        let mut sim = Sim::seeded(5).nodes_with_lanes(&lanes);
        if agreed {
            sim = sim.agreed();
        }
        let flows: Vec<_> = (0..8).map(|n| sim.flow(0, 1, millis(7 + n))).collect();
        sim.advance(secs(2));
        let away_from_the_table = |sim: &mut Sim| {
            sim.node_mut(1).revoked = vec![0];
            sim.publish(1);
            sim.advance(millis(50));
            sim.node_mut(1).revoked.clear();
            sim.publish(1);
        };
        for restarts in [true, false] {
            if restarts {
                sim.restart(1);
            } else {
                away_from_the_table(&mut sim);
            }
            let before = sim.received(1).len();
            sim.advance(millis(100));
            let arrived = sim.received(1).len() - before;
            // 8 flows, 10 ms each, a handshake takes 3 ms, or 5 after an offer.
            assert!(arrived >= 60, "{lanes:?} {agreed} {restarts}: {arrived} packets in 100 ms");
            sim.advance(secs(30));
        }
        flows.into_iter().for_each(|flow| _ = sim.end_flow(flow));
    }
}

#[test]
fn forged_data_begins_no_handshake_where_a_session_stands_and_few_elsewhere() {
    let forged = [&[4, 0, 0, 0, 7, 7, 7, 0][..], &[0; 56]].concat();
    let mut sim = Sim::seeded(6).nodes(140);
    sim.send(0, 1);
    sim.advance(secs(1));
    sim.link.recording = Some(Vec::new());
    let (near, far) = (sim.node(1).address(), sim.node(2).address());
    let other_port = std::net::SocketAddr::new(far.ip(), far.port() + 9);
    for source in [near, other_port, "198.51.100.9:7100".parse().unwrap()] {
        sim.inject(0, &forged, source);
    }
    assert_eq!(begun(&mut sim, 0), 0);
    // One whose answers do not come is not tried more often than otherwise.
    sim.link.set_filter(|_| false);
    sim.link.recording = Some(Vec::new());
    for _ in 0..100 {
        sim.inject(0, &forged, far);
        sim.advance(millis(10));
    }
    assert_eq!(begun(&mut sim, 0), 1);
    sim.link.recording = Some(Vec::new());
    for node in 3..140 {
        let source = sim.node(node).address();
        sim.inject(0, &forged, source);
    }
    assert_eq!(begun(&mut sim, 0), 100);
    assert_eq!(sim.drops(0, DropReason::UnknownIndex), 3 + 100 + 137);
}

#[test]
fn forged_inner_sources_are_dropped_after_authentication() {
    // Node 0 turns hostile: it uses a table of its own that lets anything out.
    let mut sim = Sim::seeded(4).nodes(3);
    sim.send(0, 1);
    sim.advance(secs(1));
    let forge = |source: [u8; 4], destination: [u8; 4]| {
        let mut bytes = packet(0, 1, 99);
        bytes[12..16].copy_from_slice(&source);
        bytes[16..20].copy_from_slice(&destination);
        bytes
    };
    let cases = [
        (forge([10, 3, 0, 5], [10, 2, 0, 5]), DropReason::WrongSource),
        (forge([8, 8, 8, 8], [10, 2, 0, 5]), DropReason::WrongSource),
        (forge([10, 2, 0, 9], [10, 2, 0, 5]), DropReason::OwnSource),
        (forge([127, 0, 0, 1], [10, 2, 0, 5]), DropReason::MartianSource),
        (forge([224, 0, 0, 1], [10, 2, 0, 5]), DropReason::MartianSource),
        (forge([10, 1, 0, 5], [9, 9, 9, 9]), DropReason::ForeignDestination),
        (forge([10, 1, 0, 5], [10, 3, 0, 5]), DropReason::ForeignDestination),
    ];
    sim.node_mut(0).unchecked = true;
    sim.publish(0);
    for (n, (bytes, reason)) in cases.iter().enumerate() {
        let before = sim.drops(1, *reason);
        sim.send_packet(0, bytes);
        sim.advance(secs(1));
        assert_eq!(sim.drops(1, *reason), before + 1, "case {n}");
    }
    assert_eq!(sim.received(1), [0], "nothing else came in");
    assert_eq!(sim.peer(1, 0).unwrap().refused_packets, cases.len() as u64);
    assert_eq!(sim.drops(1, DropReason::MalformedInner), 0);
}

#[test]
fn foreign_sources_are_refused_by_the_sender() {
    let mut sim = Sim::seeded(5).nodes(2);
    let mut bytes = packet(0, 1, 1);
    bytes[12] = 11;
    sim.send_packet(0, &bytes);
    assert_eq!(sim.drops(0, DropReason::ForeignSource), 1);
    assert_eq!(sim.node(0).tunnels(sim.now()), 0);
}

#[test]
fn unknown_destinations_are_unreachable_and_answers_are_limited() {
    let mut sim = Sim::seeded(6).nodes(2);
    for _ in 0..1_000 {
        sim.send_packet(0, &packet(0, 77, 0));
    }
    assert_eq!(sim.drops(0, DropReason::NoRoute), 1_000);
    let answers = &sim.node(0).packets;
    assert_eq!(answers.len(), 100);
    assert_eq!(answers[0][12..20], [10, 78, 0, 5, 10, 1, 0, 5], "from the destination to the sender");
    assert_eq!(answers[0][20..22], [3, 1]);
}

/// A packet from node 0 to node 1 of `len` bytes, all different.
fn sized(len: u16, dont_fragment: bool) -> Vec<u8> {
    let mut bytes = packet(0, 1, 5);
    bytes.extend((60..len).map(|n| (n % 251) as u8));
    bytes[2..4].copy_from_slice(&len.to_be_bytes());
    bytes[6] = if dont_fragment { 0x40 } else { 0 };
    bytes
}

#[test]
fn packets_too_big_and_not_to_be_fragmented_are_told_the_mtu() {
    let mut sim = Sim::seeded(7).nodes(2);
    sim.send_packet(0, &sized(1421, true));
    assert_eq!(sim.drops(0, DropReason::PacketTooBig), 1);
    let icmp = sim.node(0).packets[0].clone();
    assert_eq!((icmp[20], icmp[21], u16::from_be_bytes([icmp[26], icmp[27]])), (3, 4, 1420));
    assert_eq!(icmp[12..20], [10, 2, 0, 5, 10, 1, 0, 5], "from the destination to the sender");
    assert_eq!(sim.node(0).tunnels(sim.now()), 0);
    sim.send_packet(0, &sized(1420, true));
    sim.advance(secs(1));
    assert_eq!(sim.node(1).packets, [sized(1420, true)]);
}

#[test]
fn other_packets_too_big_are_fragmented_inside_the_tunnel() {
    let mut sim = Sim::seeded(7).nodes(2);
    sim.send(0, 1);
    sim.advance(secs(1));
    for len in [1_421u16, 9_000, 65_535] {
        sim.node_mut(1).packets.clear();
        sim.link.recording = Some(Vec::new());
        sim.send_packet(0, &sized(len, false));
        sim.advance(secs(1));
        let recording = sim.link.recording.take().unwrap();
        assert!(recording.iter().all(|sent| sent.bytes.len() <= 1_420 + 32), "none larger than the path");
        let pieces = &sim.node(1).packets;
        assert!(pieces.len() >= 2 && pieces.iter().all(|piece| piece.len() <= 1_420));
        let payload: Vec<u8> = pieces.iter().flat_map(|piece| piece[20..].to_vec()).collect();
        assert!(payload == sized(len, false)[20..], "{len}");
    }
    assert_eq!(sim.drops(0, DropReason::PacketTooBig), 0);
}

#[test]
fn sealed_packets_are_padded_to_sixteen_and_to_the_mtu_at_most() {
    let mut sim = Sim::seeded(8).nodes(2);
    sim.send(0, 1);
    sim.advance(secs(1));
    for (len, sealed) in [(60u16, 96), (64, 96), (65, 112), (1410, 1420 + 32), (1420, 1452)] {
        sim.link.recording = Some(Vec::new());
        let mut bytes = packet(0, 1, 5);
        bytes.resize(usize::from(len), 7);
        bytes[2..4].copy_from_slice(&len.to_be_bytes());
        sim.send_packet(0, &bytes);
        sim.advance(millis(10));
        assert_eq!(sim.link.recording.take().unwrap()[0].bytes.len(), sealed);
        assert_eq!(sim.node(1).packets.last(), Some(&bytes), "and arrives as it was");
    }
}

#[test]
fn reordering_within_the_window_loses_nothing() {
    let mut sim = Sim::seeded(9).nodes(2);
    sim.send(0, 1);
    sim.advance(secs(1));
    sim.link.jitter = millis(50);
    let flow = sim.flow(0, 1, std::time::Duration::from_micros(100));
    sim.advance(secs(2));
    let sent = sim.end_flow(flow);
    sim.advance(secs(1));
    assert!(!sim.received(1).is_sorted(), "the link does reorder");
    sim.assert_all_arrived(1, sent + 1);
}

#[test]
fn datagrams_that_are_not_wireguard_go_to_control_within_bounds() {
    let mut sim = Sim::seeded(10).nodes(2);
    let from = "203.0.113.1:3478".parse().unwrap();
    let stun = [1, 1, 0, 0, 0x21, 0x12, 0xa4, 0x42, 5, 5];
    sim.inject(1, &stun, from);
    sim.inject(1, &[0x10, 1, 2, 3], from);
    let datagrams = |event: &Event| matches!(event, Event::Datagram { from: f, .. } if *f == from);
    assert_eq!(sim.events(1).iter().filter(|event| datagrams(event)).count(), 2);
    for _ in 0..5_000 {
        sim.inject(1, &[0x10; 100], from);
    }
    assert!(sim.events(1).len() < 1_000);
    assert!(sim.drops(1, DropReason::EventQueueFull) >= 4_000);
    sim.inject(1, &[0x10; 1_501], from);
    assert_eq!(sim.drops(1, DropReason::MalformedDatagram), 1);
}

#[test]
fn an_enrolled_initiation_from_far_in_the_future_is_taken() {
    // Only the order of timestamps counts; a node that went back in time comes back on its next key.
    let mut sim = Sim::seeded(11).nodes(2);
    sim.send(0, 1);
    sim.advance(secs(1));
    sim.rotate_key(0);
    sim.restart(0);
    sim.send(0, 1);
    sim.advance(secs(1));
    sim.assert_all_arrived(1, 2);
}

#[test]
fn packets_that_wait_are_bounded_over_all_peers_and_given_back() {
    let mut sim = Sim::seeded(12).nodes(100);
    sim.link.set_filter(|_| false);
    let send_to_all = |sim: &mut Sim| {
        for other in 1..100 {
            let mut bytes = packet(0, other, 0);
            bytes.resize(1_420, 0);
            bytes[2..4].copy_from_slice(&1_420u16.to_be_bytes());
            for _ in 0..64 {
                sim.send_packet(0, &bytes);
            }
        }
    };
    send_to_all(&mut sim);
    let refused = sim.drops(0, DropReason::QueueFull);
    let kept = 99 * 64 - refused;
    assert!(refused > 0 && kept * 1_420 <= 8 << 20, "{kept} kept");
    sim.advance(secs(100));
    assert_eq!(sim.drops(0, DropReason::HandshakeTimeout), kept);
    sim.link.clear_filter();
    let before = sim.drops(0, DropReason::QueueFull);
    send_to_all(&mut sim);
    assert_eq!(sim.drops(0, DropReason::QueueFull) - before, refused, "as much as the first time");
    sim.advance(secs(10));
    assert_eq!((1..100).map(|n| sim.node(n).packets.len() as u64).sum::<u64>(), kept);
}

#[test]
fn a_number_that_changes_hands_takes_no_tunnel_along() {
    let mut sim = Sim::seeded(13).nodes(3);
    let flow = sim.flow(0, 1, millis(10));
    sim.advance(secs(1));
    assert_eq!(sim.node(1).tunnels(sim.now()), 1);
    // Node 1 learns in one table that node 0 is gone and that its number now is node 2's, which has a key of the same
    // epoch: the old session must not speak for the new holder.
    sim.node_mut(1).revoked = vec![0];
    sim.node_mut(1).renumbered = Some((2, 0));
    sim.publish(1);
    assert_eq!(sim.node(1).tunnels(sim.now()), 0);
    let before = sim.received(1).len();
    sim.advance(secs(1));
    sim.end_flow(flow);
    assert_eq!(sim.received(1).len(), before);
    assert!(sim.drops(1, DropReason::UnknownIndex) > 50);
    sim.send(1, 2);
    sim.advance(secs(1));
    assert_eq!(sim.received(2), [0], "and the new holder is reached with its own key");
}

#[test]
fn a_scan_of_unknown_addresses_does_not_silence_path_mtu_discovery() {
    let mut sim = Sim::seeded(14).nodes(2);
    for _ in 0..1_000 {
        sim.send_packet(0, &packet(0, 77, 0));
    }
    let mut bytes = packet(0, 1, 5);
    bytes.resize(1_500, 0);
    bytes[2..4].copy_from_slice(&1_500u16.to_be_bytes());
    bytes[6] = 0x40;
    sim.send_packet(0, &bytes);
    assert_eq!(sim.node(0).packets.last().unwrap()[20..22], [3, 4]);
}

#[test]
fn segment_sizes_are_cut_by_whichever_end_has_the_smaller_mtu() {
    // The option of a SYN says what the other end may send: both directions count, on both nodes.
    for (mtus, most) in [([1_400, 1_420], 1_360u16), ([1_420, 1_300], 1_260), ([1_420, 1_420], 1_380)] {
        let mut sim = Sim::seeded(15).nodes(2);
        for (node, mtu) in mtus.into_iter().enumerate() {
            sim.node_mut(node).mtu = mtu;
        }
        sim.publish_all();
        for (from, to) in [(0, 1), (1, 0)] {
            let mut syn = packet(from, to, 0);
            syn[9] = 6;
            syn[32..34].copy_from_slice(&[0xa0, 0x02]);
            syn[40..44].copy_from_slice(&[2, 4, 0x23, 0x00]);
            sim.send_packet(from, &syn);
            sim.advance(secs(1));
            let arrived = sim.node(to).packets.last().unwrap();
            assert_eq!(arrived[42..44], most.to_be_bytes(), "{mtus:?} {from}");
        }
    }
}

#[test]
fn a_node_with_two_addresses_answers_from_the_one_that_was_asked() {
    let second = "198.51.100.9:7100".parse().unwrap();
    let mut sim = Sim::seeded(16).nodes(2);
    sim.node_mut(1).add_address(second);
    sim.node_mut(1).stale_addresses = vec![second];
    sim.publish(0);
    // Its preferred address reaches nobody: a network address translator in front of node 0 knows the other one only.
    let preferred = sim.node(1).address();
    sim.link.set_filter(move |sent| sent.from != preferred);
    let flows = [sim.flow(0, 1, millis(100)), sim.flow(1, 0, millis(100))];
    sim.advance(secs(1));
    assert_eq!(sim.peer(0, 1).unwrap().endpoint, Some(second));
    // One way only, so that all that comes back are the signs of life of a plain peer: that is reason enough to stay.
    sim.end_flow(flows[0]);
    sim.advance(minutes(1));
    let sent = sim.end_flow(flows[1]);
    sim.advance(secs(1));
    sim.assert_all_arrived(0, sent);
    // Now the way out from there is lost, and nothing says so.
    sim.link.set_filter(move |sent| sent.from != second && sent.to != second);
    let before = sim.received(0).len();
    let flow = sim.flow(1, 0, millis(100));
    sim.advance(secs(14));
    sim.end_flow(flow);
    assert!(sim.received(0).len() > before, "it sends from another");
    assert_eq!(sim.peer(0, 1).unwrap().endpoint, Some(preferred));
}
