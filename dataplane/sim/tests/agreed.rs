//! Preshared keys that are agreed on tunnel by tunnel: offers that are lost, late, reordered, repeated, or cross each other.

use mesh_dataplane::{command::Event, drop_reason::DropReason, table::PeerId};
use mesh_dataplane_sim::{OFFER, Sim, millis, minutes, secs};

const INITIATION: u8 = 1;
const RESPONSE: u8 = 2;
const DATA: u8 = 4;

fn pair(seed: u64) -> Sim {
    Sim::seeded(seed).nodes(2).agreed().delay(millis(20))
}

/// First bytes of all datagrams that `from` sent, in order.
fn kinds(sim: &Sim, from: usize) -> Vec<u8> {
    let (sent, address) = (sim.link.recording.as_ref().unwrap(), sim.node(from).address());
    sent.iter().filter(|sent| sent.from.ip() == address.ip()).map(|sent| sent.bytes[0]).collect()
}

fn has_only_preshared_tunnels(sim: &Sim, node: usize, other: usize) -> bool {
    let peer = sim.peer(node, other).unwrap();
    !peer.tunnels.is_empty() && peer.tunnels.iter().all(|tunnel| tunnel.preshared)
}

#[test]
fn the_offer_goes_ahead_of_the_initiation_and_costs_no_round_trip() {
    let time_to_first = |mut sim: Sim| {
        let start = sim.now();
        sim.send(0, 1);
        while sim.received(1).is_empty() && sim.now().since(start) < secs(5) {
            sim.advance(millis(1));
        }
        sim.now().since(start)
    };
    let without = time_to_first(Sim::seeded(1).nodes(2).delay(millis(20)));
    let with = time_to_first(pair(1));
    println!("first packet over a path of 20 ms: {without:?} without, {with:?} with agreed keys");
    assert!(without >= millis(60));
    assert!(with <= without + millis(4), "a millisecond for each end's control, and no round trip: {with:?}");
    let mut sim = pair(1);
    sim.link.recording = Some(Vec::new());
    sim.send(0, 1);
    sim.advance(millis(200));
    // What follows are probes of the path's MTU and their answers.
    assert_eq!(kinds(&sim, 0)[..4], [OFFER, INITIATION, DATA, DATA]);
    assert_eq!(kinds(&sim, 1)[..1], [RESPONSE]);
    assert!(kinds(&sim, 0)[4..].iter().chain(&kinds(&sim, 1)[1..]).all(|kind| *kind == DATA));
    assert!(has_only_preshared_tunnels(&sim, 0, 1) && has_only_preshared_tunnels(&sim, 1, 0));
}

#[test]
fn an_initiation_waits_for_a_late_key() {
    let mut sim = pair(2);
    sim.node_mut(1).control.delay = millis(200);
    sim.send(0, 1);
    sim.advance(millis(240));
    assert_eq!(sim.received(1), [], "parked");
    sim.advance(millis(100));
    assert_eq!(sim.received(1), [0]);
    assert_eq!(sim.drops(1, DropReason::MissingKey), 0);
    // Longer than it waits: the one that is repeated finds the key there.
    let mut sim = pair(2);
    sim.node_mut(1).control.delay = millis(600);
    sim.send(0, 1);
    sim.advance(millis(1_200));
    assert_eq!(sim.received(1), [0]);
    assert!(sim.drops(1, DropReason::MissingKey) > 0);
}

#[test]
fn initiations_without_keys_are_parked_one_by_one_and_dropped() {
    let mut sim = pair(3);
    sim.node_mut(1).control.is_away = true;
    sim.send(0, 1);
    sim.advance(secs(30));
    assert_eq!(sim.received(1), []);
    assert!(sim.drops(1, DropReason::MissingKey) > 5);
    assert_eq!(sim.node(1).tunnels(sim.now()), 0, "no tunnel, and none without a key");
    sim.node_mut(1).control.is_away = false;
    sim.advance(secs(7));
    assert_eq!(sim.received(1), [0], "it waited");
}

#[test]
fn what_is_lost_is_repeated() {
    // The first offer; the first initiation; both twice; everything but the last of the three.
    for (lost_offers, lost_initiations, within) in [(1, 0, 400), (0, 1, 400), (2, 2, 1_200), (2, 1, 1_200)] {
        let mut sim = pair(4);
        let (mut offers, mut initiations) = (0, 0);
        sim.link.set_filter(move |sent| {
            let (count, lost) = match sent.bytes[0] {
                OFFER => (&mut offers, lost_offers),
                INITIATION => (&mut initiations, lost_initiations),
                _ => return true,
            };
            *count += 1;
            *count > lost
        });
        sim.send(0, 1);
        sim.advance(millis(within));
        assert_eq!(sim.received(1), [0], "{lost_offers} offers, {lost_initiations} initiations lost");
        assert_eq!(sim.node(0).control.made, 1, "the same offer again");
    }
}

#[test]
fn what_stays_unanswered_is_offered_anew() {
    let mut sim = pair(5);
    let start = sim.now();
    sim.link.set_filter(|sent| sent.bytes[0] != OFFER);
    sim.send(0, 1);
    sim.advance(secs(12));
    assert_eq!(sim.received(1), []);
    sim.link.clear_filter();
    while sim.received(1).is_empty() {
        sim.advance(millis(100));
        assert!(sim.now().since(start) < secs(20));
    }
    assert!(sim.node(0).control.made >= 3);
    assert_eq!(sim.node(0).tunnels(sim.now()), 1, "those before are gone");
}

#[test]
fn a_peer_that_never_answers_is_given_up() {
    let mut sim = pair(6);
    sim.link.set_filter(|sent| sent.bytes[0] != OFFER);
    sim.send(0, 1);
    sim.advance(secs(110));
    let failed = |event: &Event| matches!(event, Event::HandshakeFailed { peer: PeerId(1), .. });
    assert!(sim.events(0).iter().any(failed));
    assert_eq!(sim.drops(0, DropReason::HandshakeTimeout), 1);
    sim.advance(minutes(5));
    let (made, tunnels) = (sim.node(0).control.made, sim.node(0).tunnels(sim.now()));
    assert!(made < 25 && tunnels == 0, "{made} offers, {tunnels} tunnels");
    sim.link.clear_filter();
    sim.send(0, 1);
    sim.advance(secs(1));
    assert_eq!(sim.received(1), [1]);
}

#[test]
fn reordered_offers_and_initiations_still_meet() {
    for seed in 0..20 {
        let mut sim = Sim::seeded(seed).nodes(2).agreed().delay(millis(5)).jitter(millis(60));
        sim.send(0, 1);
        sim.advance(secs(2));
        assert_eq!(sim.received(1), [0], "seed {seed}");
    }
}

#[test]
fn loss_of_a_third_only_delays() {
    for seed in 0..20 {
        let mut sim = Sim::seeded(seed).nodes(2).agreed().loss(33);
        sim.flow(0, 1, millis(500));
        sim.flow(1, 0, millis(500));
        sim.advance(secs(60));
        assert!(sim.received(1).len() > 50 && sim.received(0).len() > 50, "seed {seed}");
        assert!(has_only_preshared_tunnels(&sim, 0, 1), "seed {seed}");
    }
}

#[test]
fn replayed_offers_and_initiations_change_nothing() {
    let mut sim = pair(7);
    sim.link.recording = Some(Vec::new());
    let flow = sim.flow(0, 1, millis(50));
    sim.advance(secs(5));
    let recorded = sim.link.recording.take().unwrap();
    let old: Vec<_> = recorded.into_iter().filter(|sent| matches!(sent.bytes[0], OFFER | INITIATION)).collect();
    let (stranger, before) = (([192, 0, 2, 99], 7100).into(), sim.peer(1, 0).unwrap());
    for _ in 0..20 {
        for sent in &old {
            sim.inject(1, &sent.bytes, stranger);
            sim.advance(millis(5));
        }
    }
    assert_eq!(sim.node(1).control.opened, 1);
    assert!(sim.node(1).control.refused >= 20);
    let after = sim.peer(1, 0).unwrap();
    assert_eq!((after.endpoint, after.tunnels.len()), (before.endpoint, before.tunnels.len()));
    // After a restart the number is forgotten: a key is made of the old offer, an answer of the old initiation, and nothing
    // comes of it.
    sim.end_flow(flow);
    sim.restart(1);
    for sent in &old {
        sim.inject(1, &sent.bytes, stranger);
        sim.advance(millis(5));
    }
    assert!(sim.peer(1, 0).is_none_or(|peer| peer.tunnels.iter().all(|tunnel| !tunnel.confirmed)));
    assert!(sim.peer(1, 0).is_none_or(|peer| peer.endpoint != Some(stranger)));
}

#[test]
fn a_forged_initiation_with_the_right_index_takes_no_key_away() {
    let mut sim = pair(8);
    sim.link.recording = Some(Vec::new());
    let address = sim.node(0).address();
    let mut passed = 0;
    sim.link.set_filter(move |sent| {
        passed += u32::from(sent.bytes[0] == INITIATION);
        sent.bytes[0] != INITIATION || passed > 1
    });
    sim.send(0, 1);
    sim.advance(millis(100));
    let recorded = sim.link.recording.take().unwrap();
    let mut forged = recorded.iter().find(|sent| sent.bytes[0] == INITIATION).unwrap().bytes.clone();
    // The timestamp; then the first MAC no longer fits, so only a sender who knows our key gets further. Both are tried.
    forged[100] ^= 1;
    sim.inject(1, &forged, address);
    sim.advance(secs(1));
    assert_eq!(sim.received(1), [0]);
    assert_eq!(sim.node(0).control.made, 1);
}

#[test]
fn crossed_offers_make_two_tunnels_and_the_lower_node_sends() {
    for seed in 0..10 {
        let mut sim = Sim::seeded(seed).nodes(2).agreed().delay(millis(20)).jitter(millis(seed * 3));
        let flows = [sim.flow(0, 1, millis(10)), sim.flow(1, 0, millis(10))];
        sim.link.recording = Some(Vec::new());
        sim.advance(secs(2));
        assert!(kinds(&sim, 0).contains(&OFFER) && kinds(&sim, 1).contains(&OFFER), "they cross");
        sim.link.recording = None;
        for (node, other) in [(0, 1), (1, 0)] {
            let peer = sim.peer(node, other).unwrap();
            assert!(peer.tunnels.iter().filter(|tunnel| tunnel.sending).count() == 1, "seed {seed}");
        }
        sim.advance(minutes(15));
        let sent = flows.map(|flow| sim.end_flow(flow));
        sim.advance(secs(1));
        sim.assert_all_arrived(1, sent[0]);
        sim.assert_all_arrived(0, sent[1]);
        for (node, other) in [(0, 1), (1, 0)] {
            let peer = sim.peer(node, other).unwrap();
            assert_eq!(peer.tunnels.len(), 1, "seed {seed}: the other one was retired");
        }
    }
}

#[test]
fn a_restarted_end_is_back_at_once_whoever_speaks_first() {
    for (who, first) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
        let mut sim = pair(9);
        sim.send(0, 1);
        sim.advance(secs(1));
        assert_eq!(sim.received(1), [0]);
        sim.restart(who);
        let start = sim.now();
        if first == who {
            // As meshd does with peers it lately talked to.
            sim.initiate(who, 1 - who);
        }
        let flow = sim.flow(first, 1 - first, millis(100));
        let limit = if first == who { millis(300) } else { secs(20) };
        let before = sim.received(1 - first).len();
        while sim.received(1 - first).len() == before {
            sim.advance(millis(10));
            assert!(sim.now().since(start) < limit, "node {who} restarted, {first} sends");
        }
        // And back: the new tunnel serves both ways.
        let back = sim.flow(1 - first, first, millis(100));
        let had = sim.received(first).len();
        sim.advance(secs(5));
        assert!(sim.received(first).len() >= had + 45, "node {who} restarted, {first} sends");
        sim.end_flow(flow);
        sim.end_flow(back);
    }
}

#[test]
fn one_offer_serves_all_lanes() {
    for (a, b) in [(4, 4), (8, 2), (1, 4)] {
        let mut sim = Sim::seeded(10).nodes_with_lanes(&[a, b]).agreed();
        for port in 0..64u16 {
            let mut packet = mesh_dataplane_sim::packet(0, 1, u32::from(port));
            packet[20..22].copy_from_slice(&port.to_be_bytes());
            sim.send_packet(0, &packet);
        }
        sim.advance(secs(2));
        let mut got = sim.received(1).to_vec();
        got.sort_unstable();
        assert_eq!(got, (0..64).collect::<Vec<_>>(), "{a}/{b}");
        let tunnels = sim.node(0).tunnels(sim.now());
        assert_eq!(tunnels, a.max(b), "{a}/{b}: a tunnel for each pair of lanes");
        assert_eq!((sim.node(0).control.made, sim.node(1).control.made), (1, 0), "{a}/{b}");
    }
}

#[test]
fn where_keys_are_agreed_on_no_tunnel_begins_without() {
    let mut sim = Sim::seeded(11).nodes(2);
    // Node 1 wants agreed keys, node 0 has not heard of it.
    sim.node_mut(0).agreed = true;
    sim.node_mut(1).agreed = true;
    sim.publish(1);
    sim.send(0, 1);
    sim.send(1, 0);
    sim.advance(secs(3));
    assert_eq!((sim.received(1), sim.received(0)), (&[][..], &[][..]));
    sim.publish(0);
    sim.advance(secs(6));
    sim.send(0, 1);
    sim.advance(secs(1));
    assert_eq!(sim.received(0), [0]);
    assert_eq!(sim.received(1).last(), Some(&1));
    assert!(has_only_preshared_tunnels(&sim, 0, 1) && has_only_preshared_tunnels(&sim, 1, 0));
}

#[test]
fn sessions_are_renewed_for_hours_without_another_offer() {
    let mut sim = pair(12);
    let flows = [sim.flow(0, 1, secs(1)), sim.flow(1, 0, secs(3))];
    sim.advance(minutes(180));
    let sent = flows.map(|flow| sim.end_flow(flow));
    sim.advance(secs(1));
    sim.assert_all_arrived(1, sent[0]);
    sim.assert_all_arrived(0, sent[1]);
    assert!(sim.node(0).control.made + sim.node(1).control.made <= 2);
}

#[test]
fn many_packets_one_way_only_keep_the_tunnel() {
    let mut sim = pair(13);
    // Only the end that did not make the offer sends.
    sim.initiate(0, 1);
    sim.advance(secs(1));
    let flow = sim.flow(1, 0, millis(200));
    sim.advance(minutes(30));
    let sent = sim.end_flow(flow);
    sim.advance(secs(1));
    sim.assert_all_arrived(0, sent);
    assert!(sim.node(0).control.made + sim.node(1).control.made <= 3);
}

#[test]
fn a_flood_of_strangers_datagrams_displaces_no_expected_one() {
    let mut sim = pair(14);
    sim.advance(millis(1_500));
    let flood = |sim: &mut Sim| {
        for n in 0..3_000u32 {
            let junk = [&[OFFER ^ 1; 4][..], &n.to_be_bytes(), &[7; 40]].concat();
            sim.inject(1, &junk, ([203, 0, 113, n as u8], 9).into());
        }
    };
    // The offer's number is what stands where the mark is, in the first offer of the simulation: 0, 0, 0, 0, 0, 1, and on.
    let mark = [0, 0, 0, 0, 0, 1, 0, 0];
    flood(&mut sim);
    sim.send(0, 1);
    sim.advance(millis(200));
    assert_eq!(sim.received(1), [], "without a mark it is one of them");
    assert!(sim.drops(1, DropReason::EventQueueFull) > 1_500);
    let mut sim = pair(14);
    sim.advance(millis(1_500));
    sim.node_mut(1).expect(mark);
    flood(&mut sim);
    sim.send(0, 1);
    sim.advance(millis(200));
    assert_eq!(sim.received(1), [0]);
}
