//! Keys rotate and peers are revoked while packets pass.

use std::net::SocketAddr;

use mesh_dataplane::{command::Event, drop_reason::DropReason};
use mesh_dataplane_sim::{Sim, millis, minutes, secs};

fn epochs(sim: &Sim, node: usize, other: usize) -> Vec<(u64, u64)> {
    let tunnels = sim.peer(node, other).map(|peer| peer.tunnels).unwrap_or_default();
    tunnels.iter().map(|tunnel| (tunnel.local_epoch, tunnel.remote_epoch)).collect()
}

/// Without preshared keys, and with one agreed on for each tunnel.
fn both_ways(sim: impl Fn() -> Sim) -> [Sim; 2] {
    [sim(), sim().agreed()]
}

#[test]
fn rotation_loses_no_packet() {
    let sims =
        (0..3).flat_map(|seed| both_ways(|| Sim::seeded(seed).nodes(2).delay(millis(20)).jitter(millis(seed * 7))));
    for mut sim in sims {
        let flows = [sim.flow(0, 1, millis(5)), sim.flow(1, 0, millis(5))];
        sim.advance(secs(5));
        sim.rotate_key(0);
        sim.advance(secs(3));
        sim.publish(1);
        sim.advance(minutes(12));
        let sent = flows.map(|flow| sim.end_flow(flow));
        sim.advance(secs(1));
        sim.assert_all_arrived(1, sent[0]);
        sim.assert_all_arrived(0, sent[1]);
        assert_eq!(epochs(&sim, 0, 1), [(2, 1)], "the old key is retired");
        assert_eq!(epochs(&sim, 1, 0), [(1, 2)]);
        let retired = |event: &Event| matches!(event, Event::TunnelRetired { local_epoch: 1, remote_epoch: 1, .. });
        assert!(sim.events(0).iter().any(retired));
    }
}

#[test]
fn both_ends_may_rotate_at_once_and_again() {
    for (seed, mut sim) in (0..4).flat_map(|seed| {
        both_ways(|| Sim::seeded(seed).nodes(3).delay(millis(15)).jitter(millis(10))).map(|sim| (seed, sim))
    }) {
        let flows = [sim.flow(0, 1, millis(7)), sim.flow(1, 0, millis(9)), sim.flow(2, 0, millis(50))];
        sim.advance(secs(3));
        for _ in 0..2 {
            sim.rotate_key(0);
            sim.rotate_key(1);
            sim.advance(secs(1));
            sim.rotate_key(2);
            sim.publish_all();
            sim.advance(minutes(3));
        }
        sim.advance(minutes(10));
        let sent = flows.map(|flow| sim.end_flow(flow));
        sim.advance(secs(1));
        sim.assert_all_arrived(1, sent[0]);
        let mut to_0 = sim.received(0).to_vec();
        to_0.sort_unstable();
        assert_eq!(to_0.len(), (sent[1] + sent[2]) as usize, "seed {seed}");
        assert_eq!(epochs(&sim, 0, 1), [(3, 3)], "seed {seed}");
        assert_eq!(epochs(&sim, 1, 0), [(3, 3)], "seed {seed}");
    }
}

#[test]
fn rotation_under_loss_brings_the_new_tunnel_up_all_the_same() {
    for (seed, mut sim) in
        (0..8).flat_map(|seed| both_ways(|| Sim::seeded(seed).nodes(2).loss(20)).map(|sim| (seed, sim)))
    {
        sim.flow(0, 1, millis(50));
        sim.flow(1, 0, millis(50));
        sim.advance(secs(10));
        sim.rotate_key(0);
        sim.publish(1);
        sim.advance(minutes(4));
        let peer = sim.peer(0, 1).unwrap();
        assert!(peer.tunnels.iter().any(|t| (t.local_epoch, t.remote_epoch, t.sending) == (2, 1, true)), "seed {seed}");
    }
}

#[test]
fn old_keys_serve_while_the_new_ones_cannot_be_used() {
    // Node 1 does not hear of the new key beyond the spare it knows, and drops initiations on it: an old version, say.
    let mut sim = Sim::seeded(5).nodes(2);
    let flow = sim.flow(0, 1, millis(20));
    sim.advance(secs(1));
    // The first tunnel's initiations are 148 bytes as well; only those after the rotation are lost.
    sim.rotate_key(0);
    let mut lost = 0;
    let address = sim.node(1).address();
    sim.link.set_filter(move |sent| {
        let initiation = sent.bytes[0] == 1 && sent.to == address;
        lost += u32::from(initiation);
        !initiation || lost > 30
    });
    sim.advance(minutes(1));
    let sent = sim.end_flow(flow);
    sim.advance(secs(1));
    sim.assert_all_arrived(1, sent);
}

#[test]
fn a_new_preshared_key_loses_no_packet() {
    let mut sim = Sim::seeded(6).nodes(2).delay(millis(5));
    for node in 0..2 {
        sim.node_mut(node).psk = Some([1; 32]);
        sim.node_mut(node).spread = secs(10);
    }
    sim.publish_all();
    let flows = [sim.flow(0, 1, millis(10)), sim.flow(1, 0, millis(10))];
    sim.advance(secs(2));
    for node in 0..2 {
        sim.node_mut(node).psk = Some([2; 32]);
    }
    sim.publish_all();
    sim.advance(minutes(8));
    let sent = flows.map(|flow| sim.end_flow(flow));
    sim.advance(secs(1));
    sim.assert_all_arrived(1, sent[0]);
    sim.assert_all_arrived(0, sent[1]);
    assert_eq!(epochs(&sim, 0, 1).len(), 1);
}

#[test]
fn different_preshared_keys_make_no_session() {
    let mut sim = Sim::seeded(6).nodes(2);
    sim.node_mut(0).psk = Some([1; 32]);
    sim.node_mut(1).psk = Some([1; 32]);
    sim.publish(0);
    sim.node_mut(1).psk = None;
    sim.publish(1);
    sim.send(0, 1);
    sim.advance(secs(20));
    assert_eq!(sim.received(1), []);
    assert!(sim.drops(0, DropReason::BadHandshake) > 0);
}

#[test]
fn revocation_drops_at_once() {
    let mut sim = Sim::seeded(7).nodes(3);
    let flows = [sim.flow(0, 1, millis(1)), sim.flow(2, 1, millis(10))];
    sim.advance(secs(2));
    assert_eq!(sim.node(1).tunnels(sim.now()), 2);
    sim.node_mut(1).revoked = vec![0];
    sim.publish(1);
    let before = sim.node(1).packets.iter().filter(|packet| packet[13] == 1).count();
    assert_eq!(sim.node(1).tunnels(sim.now()), 1, "the other peer's stays");
    sim.advance(secs(30));
    assert_eq!(sim.node(1).packets.iter().filter(|packet| packet[13] == 1).count(), before);
    assert!(sim.drops(1, DropReason::UnknownIndex) > 1_000);
    assert!(sim.drops(1, DropReason::UnknownPeer) >= 1, "its handshakes are refused");
    sim.send(1, 0);
    assert_eq!(sim.drops(1, DropReason::NoRoute), 1);
    let sent = flows.map(|flow| sim.end_flow(flow))[1];
    sim.advance(secs(1));
    let from_2 = sim.node(1).packets.iter().filter(|packet| packet[13] == 3).count();
    assert_eq!(from_2, sent as usize);
}

#[test]
fn an_unchanged_table_disturbs_nothing() {
    let mut sim = Sim::seeded(8).nodes(2);
    let flow = sim.flow(0, 1, millis(10));
    sim.advance(secs(1));
    sim.link.recording = Some(Vec::new());
    for _ in 0..50 {
        sim.publish_all();
        sim.advance(millis(200));
    }
    let sent = sim.end_flow(flow);
    sim.advance(secs(1));
    sim.assert_all_arrived(1, sent);
    assert!(sim.link.recording.take().unwrap().iter().all(|sent| sent.bytes[0] == 4));
}

#[test]
fn tunnels_on_new_keys_are_spread_over_time() {
    let mut sim = Sim::seeded(9).nodes(30);
    for other in 1..30 {
        sim.flow(0, other, secs(5));
    }
    sim.advance(secs(10));
    sim.rotate_key(0);
    sim.link.recording = Some(Vec::new());
    sim.advance(secs(60));
    let half = sim.link.recording.take().unwrap().iter().filter(|sent| sent.bytes[0] == 1).count();
    assert!((5..25).contains(&half), "{half} of 29 within half of the spread");
    sim.advance(secs(90));
    for other in 1..30 {
        assert!(epochs(&sim, 0, other).contains(&(2, 1)), "{other}");
    }
}

const INITIATION: u8 = 1;

/// Two nodes that talk, of which each is reached at two addresses.
fn with_two_addresses(seed: u64, agreed: bool) -> Sim {
    let mut sim = Sim::seeded(seed).nodes(2).delay(millis(15));
    if agreed {
        sim = sim.agreed();
    }
    for (node, address) in ["198.51.100.8:7100", "198.51.100.9:7100"].into_iter().enumerate() {
        let address = address.parse().unwrap();
        sim.node_mut(node).add_address(address);
        sim.node_mut(node).stale_addresses = vec![address];
        sim.node_mut(node).spread = millis(50);
    }
    sim.publish_all();
    sim.flow(0, 1, millis(10));
    sim.flow(1, 0, millis(10));
    sim.advance(secs(3));
    sim
}

/// Where each of both sends.
fn endpoints(sim: &Sim) -> [SocketAddr; 2] {
    [(0, 1), (1, 0)].map(|(from, to)| sim.peer(from, to).unwrap().endpoint.unwrap())
}

#[test]
fn a_rotation_stays_at_the_address_that_answers() {
    for (seed, agreed) in [(30, false), (31, true)] {
        let mut sim = with_two_addresses(seed, agreed);
        let before = endpoints(&sim);
        // They began at once, each at the other's second address, and do not go on to change places.
        for _ in 0..100 {
            sim.advance(millis(7));
            assert_eq!(endpoints(&sim), before, "agreed keys: {agreed}");
        }
        for _ in 0..3 {
            // Neither end hears at once of the other's new keys, so that handshakes are begun more than once.
            sim.link.recording = Some(Vec::new());
            sim.rotate_key(0);
            sim.advance(millis(700));
            sim.rotate_key(1);
            sim.advance(millis(700));
            sim.publish(0);
            sim.advance(secs(20));
            let sent = sim.link.recording.take().unwrap();
            assert!(sent.iter().any(|sent| sent.bytes[0] == INITIATION));
            let elsewhere = sent.iter().find(|sent| !before.contains(&sent.to));
            assert!(elsewhere.is_none(), "agreed keys: {agreed}: {elsewhere:?} {before:?}");
            assert_eq!(endpoints(&sim), before);
        }
        assert!(epochs(&sim, 0, 1).contains(&(4, 4)));
    }
}

#[test]
fn a_way_that_ends_during_a_rotation_is_replaced() {
    for (seed, agreed) in [(32, false), (33, true)] {
        let mut sim = with_two_addresses(seed, agreed);
        // Node 0 still hears node 1, which hears nothing.
        let [lost, _] = endpoints(&sim);
        sim.link.set_filter(move |sent| sent.to != lost);
        sim.rotate_key(0);
        sim.rotate_key(1);
        sim.publish_all();
        sim.advance(secs(10));
        assert_ne!(endpoints(&sim)[0], lost, "agreed keys: {agreed}");
        assert!(epochs(&sim, 0, 1).contains(&(2, 2)));
    }
}
