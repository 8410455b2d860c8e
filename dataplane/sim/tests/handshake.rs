//! Handshakes: under loss, crossed, replayed, while one direction is dead.

use mesh_dataplane::{command::Event, drop_reason::DropReason};
use mesh_dataplane_sim::{Sim, millis, minutes, packet, secs};

#[test]
fn first_packet_waits_for_the_handshake_and_arrives() {
    let mut sim = Sim::seeded(1).nodes(2).delay(millis(20));
    sim.send(0, 1);
    sim.advance(millis(59));
    assert_eq!(sim.received(1), []);
    sim.advance(millis(2));
    assert_eq!(sim.received(1), [0], "one and a half round trips");
    sim.send(1, 0);
    sim.advance(millis(20));
    assert_eq!(sim.received(0), [0], "the responder sends at once");
    assert!(sim.events(0).iter().any(|event| matches!(event, Event::PeerUp { .. })));
    assert!(sim.events(1).iter().any(|event| matches!(event, Event::PeerUp { .. })));
}

#[test]
fn handshake_completes_under_heavy_loss() {
    for seed in 0..20 {
        let mut sim = Sim::seeded(seed).nodes(2).loss(40);
        sim.send(0, 1);
        sim.advance(secs(85));
        assert!(sim.peer(0, 1).is_some_and(|peer| peer.tunnels[0].confirmed), "seed {seed}");
    }
}

#[test]
fn crossed_initiations_lose_and_double_nothing() {
    for (seed, jitter) in [(1, 0), (2, 5), (3, 30)] {
        let mut sim = Sim::seeded(seed).nodes(2).delay(millis(20)).jitter(millis(jitter));
        let flows = [sim.flow(0, 1, millis(3)), sim.flow(1, 0, millis(3))];
        sim.advance(secs(1));
        let sent = flows.map(|flow| sim.end_flow(flow));
        sim.advance(secs(6));
        sim.assert_all_arrived(1, sent[0]);
        sim.assert_all_arrived(0, sent[1]);
    }
}

#[test]
fn sessions_are_renewed_without_loss_for_an_hour() {
    let mut sim = Sim::seeded(4).nodes(2).delay(millis(10));
    let flows = [sim.flow(0, 1, millis(100)), sim.flow(1, 0, millis(170))];
    sim.advance(minutes(60));
    let sent = flows.map(|flow| sim.end_flow(flow));
    sim.advance(secs(1));
    sim.assert_all_arrived(1, sent[0]);
    sim.assert_all_arrived(0, sent[1]);
    assert_eq!(sim.node(0).tunnels(sim.now()), 1);
    assert!(sim.peer(0, 1).unwrap().last_handshake.unwrap() < secs(130));
}

#[test]
fn one_way_data_is_renewed_too() {
    let mut sim = Sim::seeded(5).nodes(2);
    let flow = sim.flow(0, 1, millis(250));
    sim.advance(minutes(20));
    let sent = sim.end_flow(flow);
    sim.advance(secs(1));
    sim.assert_all_arrived(1, sent);
}

#[test]
fn packet_after_a_pause_starts_no_needless_handshake() {
    // Whenever the timers run between the packet and its answer.
    for offset in 0..10 {
        let mut sim = Sim::seeded(6).nodes(2).delay(millis(50));
        sim.send(0, 1);
        sim.advance(secs(40) + millis(offset * 100));
        sim.link.recording = Some(Vec::new());
        sim.send(0, 1);
        sim.advance(millis(1_500));
        sim.send(1, 0);
        sim.advance(secs(14));
        let recording = sim.link.recording.take().unwrap();
        let kinds: Vec<_> = recording.iter().map(|sent| (sent.from, sent.bytes[0])).collect();
        assert!(kinds.iter().all(|(_, kind)| *kind == 4), "only data: {kinds:?}");
        assert_eq!((sim.received(1).len(), sim.received(0).len()), (2, 1));
    }
}

#[test]
fn an_unanswered_packet_starts_a_handshake_after_fifteen_seconds() {
    let mut sim = Sim::seeded(7).nodes(2);
    sim.send(0, 1);
    sim.advance(secs(5));
    sim.link.set_filter(|_| false);
    sim.link.recording = Some(Vec::new());
    sim.send(0, 1);
    sim.advance(secs(17));
    let recording = sim.link.recording.take().unwrap();
    assert!(recording.iter().any(|sent| sent.bytes[0] == 1));
}

#[test]
fn replayed_initiation_moves_nothing_and_data_is_not_doubled() {
    let mut sim = Sim::seeded(8).nodes(2);
    sim.link.recording = Some(Vec::new());
    for _ in 0..10 {
        sim.send(0, 1);
    }
    sim.advance(secs(2));
    let recording = sim.link.recording.take().unwrap();
    let before = sim.peer(1, 0).unwrap();
    let attacker = "203.0.113.9:999".parse().unwrap();
    for sent in recording.iter().filter(|sent| sent.to == sim.node(1).address()).cloned().collect::<Vec<_>>() {
        sim.inject(1, &sent.bytes, attacker);
    }
    sim.advance(secs(1));
    let after = sim.peer(1, 0).unwrap();
    assert_eq!(before.endpoint, after.endpoint);
    assert_eq!(before.traffic, after.traffic);
    sim.assert_all_arrived(1, 10);
    assert_eq!(sim.drops(1, DropReason::StaleHandshake), 1);
    assert!(sim.drops(1, DropReason::Replay) >= 10);
}

#[test]
fn replay_into_a_restarted_node_is_answered_once_and_leads_nowhere() {
    let mut sim = Sim::seeded(9).nodes(2);
    sim.link.recording = Some(Vec::new());
    sim.send(0, 1);
    sim.advance(secs(1));
    let recording = sim.link.recording.take().unwrap();
    let initiation = recording.iter().find(|sent| sent.bytes[0] == 1).unwrap().bytes.clone();
    sim.restart(1);
    sim.events(1);
    sim.link.recording = Some(Vec::new());
    // What the true node says on the session that is lost would begin another.
    let true_one = sim.node(0).address();
    sim.link.set_filter(move |sent| sent.from != true_one);
    let attacker = "203.0.113.9:999".parse().unwrap();
    for _ in 0..20 {
        sim.inject(1, &initiation, attacker);
        sim.advance(secs(1));
    }
    let to_attacker = |sent: &&mesh_dataplane_sim::Sent| sent.to == attacker;
    assert_eq!(sim.link.recording.take().unwrap().iter().filter(to_attacker).count(), 1);
    let peer = sim.peer(1, 0).unwrap();
    assert_eq!(peer.endpoint, Some(sim.node(0).address()), "the endpoint is the table's");
    assert!(!peer.tunnels[0].confirmed);
    assert!(sim.events(1).iter().all(|event| !matches!(event, Event::PeerUp { .. } | Event::EndpointMoved { .. })));
    sim.advance(minutes(4));
    assert_eq!(sim.node(1).tunnels(sim.now()), 0, "forgotten");
}

#[test]
fn unanswered_answers_do_not_displace_the_session() {
    // boringtun's ring of eight sessions: node 0 lost its session and initiates, its answers are lost on the way.
    let mut sim = Sim::seeded(10).nodes(2);
    sim.send(0, 1);
    sim.advance(secs(1));
    let flow = sim.flow(1, 0, millis(100));
    sim.advance(secs(2));
    sim.link.set_filter(|sent| sent.bytes[0] != 2);
    for _ in 0..30 {
        sim.initiate(0, 1);
        sim.advance(secs(5));
    }
    let sent = sim.end_flow(flow);
    sim.advance(secs(1));
    sim.assert_all_arrived(0, sent);
}

#[test]
fn a_dead_return_path_does_not_end_a_good_session_early() {
    let mut sim = Sim::seeded(11).nodes(2);
    sim.send(0, 1);
    sim.advance(secs(1));
    let back = sim.node(1).address();
    sim.link.set_filter(move |sent| sent.from != back);
    let flow = sim.flow(0, 1, millis(500));
    sim.advance(secs(170));
    let sent = sim.end_flow(flow);
    sim.advance(secs(1));
    assert_eq!(sim.received(1).len(), sent as usize + 1, "until 180 s after the handshake");
}

#[test]
fn a_frozen_node_sends_its_next_packet_at_once() {
    for pause in [secs(100), minutes(60)] {
        let mut sim = Sim::seeded(12).nodes(2);
        sim.send(0, 1);
        sim.advance(secs(1));
        sim.freeze(pause);
        sim.send(0, 1);
        sim.advance(secs(2));
        sim.assert_all_arrived(1, 2);
    }
}

#[test]
fn peers_that_never_answer_are_given_up_and_tried_again() {
    let mut sim = Sim::seeded(13).nodes(2);
    sim.link.set_filter(|_| false);
    for _ in 0..200 {
        sim.send(0, 1);
    }
    assert_eq!(sim.drops(0, DropReason::QueueFull), 200 - 64);
    sim.advance(secs(100));
    assert_eq!(sim.drops(0, DropReason::HandshakeTimeout), 64);
    assert!(sim.events(0).iter().any(|event| matches!(event, Event::HandshakeFailed { .. })));
    sim.link.clear_filter();
    let number = sim.send(0, 1);
    sim.advance(secs(1));
    assert_eq!(sim.received(1), [number]);
}

#[test]
fn another_candidate_is_tried_within_a_second() {
    let mut sim = Sim::seeded(14).nodes(2);
    sim.node_mut(1).stale_addresses = vec!["198.51.100.1:7100".parse().unwrap(), "198.51.100.2:7100".parse().unwrap()];
    sim.publish_all();
    sim.send(0, 1);
    sim.advance(millis(2_100));
    sim.assert_all_arrived(1, 1);
    assert_eq!(sim.peer(0, 1).unwrap().endpoint, Some(sim.node(1).address()));
}

#[test]
fn a_peer_without_endpoint_waits_to_be_called() {
    let mut sim = Sim::seeded(15).nodes(2);
    sim.node_mut(0).hidden = true;
    sim.publish(1);
    sim.send(1, 0);
    sim.advance(secs(1));
    assert_eq!(sim.drops(1, DropReason::NoEndpoint), 1);
    assert_eq!(sim.node(1).packets.last().map(|icmp| (icmp[9], icmp[20])), Some((1, 3)), "unreachable");
    sim.send(0, 1);
    sim.advance(secs(1));
    sim.send(1, 0);
    sim.advance(secs(1));
    assert_eq!(sim.received(0).len(), 1);
}

#[test]
fn under_load_a_cookie_costs_one_round_trip_and_not_five_seconds() {
    let mut sim = Sim::seeded(16).nodes(2).delay(millis(10));
    // Garbage from the very address of node 0 empties its bucket; it can still prove that it is there.
    sim.link.recording = Some(Vec::new());
    sim.link.set_filter(|_| false);
    let source = sim.node(0).address();
    sim.send(0, 1);
    let initiation = sim.link.recording.take().unwrap().remove(0).bytes;
    for _ in 0..50 {
        sim.inject(1, &initiation, source);
    }
    assert!(sim.drops(1, DropReason::CookieDemanded) >= 40);
    sim.link.clear_filter();
    sim.link.recording = Some(Vec::new());
    sim.restart(0);
    let number = sim.send(0, 1);
    sim.advance(millis(100));
    let replies = sim.link.recording.take().unwrap();
    assert!(replies.iter().any(|sent| sent.bytes[0] == 3), "a cookie was demanded");
    assert!(replies.iter().all(|sent| sent.bytes[0] != 3 || sent.bytes.len() == 64));
    assert_eq!(sim.received(1), [number], "within 100 ms, not 5 s");
}

#[test]
fn datagrams_with_a_broken_frame_are_dropped_in_silence() {
    let mut sim = Sim::seeded(17).nodes(2);
    sim.link.recording = Some(Vec::new());
    let (from, stranger) = (sim.node(0).address(), "203.0.113.9:999".parse().unwrap());
    let mut count = 0;
    for (kind, lens) in [(1u8, [147, 149]), (2, [91, 93]), (3, [63, 65]), (4, [31, 4])] {
        for len in lens {
            let mut bytes = vec![0; len];
            bytes[0] = kind;
            sim.inject(1, &bytes, from);
            count += 1;
        }
        let mut reserved = vec![0; 148];
        (reserved[0], reserved[3]) = (kind, 1);
        sim.inject(1, &reserved, from);
        count += 1;
    }
    for short in [&[][..], &[1], &[1, 0, 0]] {
        sim.inject(1, short, from);
        count += 1;
    }
    assert_eq!(sim.drops(1, DropReason::MalformedDatagram), count);
    let mut wrong_mac = vec![0; 148];
    wrong_mac[0] = 1;
    sim.inject(1, &wrong_mac, from);
    assert_eq!(sim.drops(1, DropReason::WrongMac), 1);
    for (kind, len) in [(2u8, 92), (3, 64), (4, 32), (4, 1_000)] {
        let mut bytes = vec![0; len];
        bytes[0] = kind;
        // Data may be a peer's who has a session that is lost here.
        sim.inject(1, &bytes, if kind == 4 { stranger } else { from });
    }
    assert_eq!(sim.drops(1, DropReason::UnknownIndex), 4);
    assert_eq!(sim.link.recording.take().unwrap(), []);
    assert!(sim.events(1).is_empty());
    assert_eq!(packet(0, 1, 0).len(), 60);
}
