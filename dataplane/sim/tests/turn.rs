//! Peers turn to agreed keys, and back, while packets pass: tunnels without such keys serve until there are others, for a
//! bounded time, and begin no session any more.

use std::collections::BTreeSet;

use mesh_dataplane::drop_reason::DropReason;
use mesh_dataplane_sim::{Sent, Sim, millis, minutes, secs};

const INITIATION: u8 = 1;
const RESPONSE: u8 = 2;
const DATA: u8 = 4;
/// A session ends so long after its handshake.
const SESSION: u64 = 180;

/// Two nodes without agreed keys, busy both ways, for five seconds.
fn busy(mut sim: Sim) -> (Sim, [usize; 2]) {
    let flows = [sim.flow(0, 1, millis(5)), sim.flow(1, 0, millis(7))];
    sim.link.recording = Some(Vec::new());
    sim.advance(secs(5));
    (sim, flows)
}

/// All nodes want agreed keys; who is not told goes on without.
fn turn(sim: &mut Sim, agreed: bool, told: &[usize]) {
    for node in 0..2 {
        sim.node_mut(node).agreed = agreed;
    }
    told.iter().for_each(|node| sim.publish(*node));
}

fn assert_nothing_lost(sim: &mut Sim, flows: [usize; 2]) {
    let sent = flows.map(|flow| sim.end_flow(flow));
    sim.advance(secs(1));
    sim.assert_all_arrived(1, sent[0]);
    sim.assert_all_arrived(0, sent[1]);
}

/// What was sent since this was called last.
fn recorded(sim: &mut Sim) -> Vec<Sent> {
    sim.link.recording.replace(Vec::new()).unwrap()
}

/// Whose index a message names, upper 24 bits: the receiver's of data, the sender's of handshakes.
fn index(sent: &Sent) -> u32 {
    u32::from_le_bytes(sent.bytes[4..8].try_into().unwrap()) >> 8
}

fn indices(sent: &[Sent], kinds: &[u8]) -> BTreeSet<u32> {
    sent.iter().filter(|sent| kinds.contains(&sent.bytes[0])).map(index).collect()
}

/// Whether the tunnels in use of both ends, and all others that are left, have preshared keys.
fn preshared(sim: &Sim) -> bool {
    let pairs = |node: usize, other: u32| sim.node(node).pairs(mesh_dataplane::table::PeerId(other), sim.now());
    let all: Vec<_> = pairs(0, 1).into_iter().chain(pairs(1, 0)).collect();
    all.iter().all(|peer| peer.tunnels.iter().all(|tunnel| tunnel.preshared))
        && all.iter().any(|peer| peer.tunnels.iter().any(|tunnel| tunnel.sending))
}

#[test]
fn both_ends_that_turn_at_once_lose_no_packet() {
    for seed in 0..10 {
        let (mut sim, flows) = busy(Sim::seeded(seed).nodes(2).delay(millis(20)).jitter(millis(seed * 9)));
        let plain = indices(&recorded(&mut sim), &[DATA]);
        turn(&mut sim, true, &[0, 1]);
        let during = {
            sim.advance(secs(17));
            recorded(&mut sim)
        };
        assert!(!indices(&during, &[DATA]).is_disjoint(&plain), "seed {seed}: they serve meanwhile");
        assert!(indices(&during, &[INITIATION, RESPONSE]).is_disjoint(&plain), "seed {seed}: and make no session");
        assert!(preshared(&sim), "seed {seed}: and are gone now");
        sim.advance(minutes(4));
        assert!(indices(&recorded(&mut sim), &[DATA]).is_disjoint(&plain), "seed {seed}: nothing passes them any more");
        assert_nothing_lost(&mut sim, flows);
        assert_eq!((sim.node(0).tunnels(sim.now()), sim.node(1).tunnels(sim.now())), (1, 1), "seed {seed}");
    }
}

#[test]
fn an_end_that_hears_of_it_later_costs_no_packet() {
    for (seed, first) in (0..10).map(|seed| (seed, seed as usize % 2)) {
        // The sessions may be any age.
        let (mut sim, flows) = busy(Sim::seeded(seed).nodes(2).delay(millis(15)).jitter(millis(seed * 5)));
        sim.advance(secs(seed * 21));
        turn(&mut sim, true, &[first]);
        sim.advance(secs(5));
        assert!(!preshared(&sim), "seed {seed}");
        sim.publish(1 - first);
        sim.advance(secs(17));
        assert!(preshared(&sim), "seed {seed}");
        sim.advance(minutes(3));
        assert_nothing_lost(&mut sim, flows);
    }
}

#[test]
fn a_peer_that_never_turns_is_cut_off_when_its_session_ends() {
    for seed in 0..4 {
        let (mut sim, flows) = busy(Sim::seeded(seed).nodes(2).delay(millis(5)));
        let plain = indices(&recorded(&mut sim), &[DATA]);
        turn(&mut sim, true, &[0]);
        let address = sim.node(0).address();
        sim.advance(secs(SESSION - 10));
        let sent = recorded(&mut sim);
        let theirs: Vec<Sent> = sent.into_iter().filter(|sent| sent.from == address).collect();
        assert!(indices(&theirs, &[RESPONSE]).is_empty(), "seed {seed}: its handshakes are not answered");
        assert!(indices(&theirs, &[INITIATION]).is_disjoint(&plain), "seed {seed}");
        let halfway = [sim.received(0).len(), sim.received(1).len()];
        assert!(halfway[0] > 23_000 && halfway[1] > 32_000, "seed {seed}: until then all goes on, {halfway:?}");
        sim.advance(secs(11));
        let until = [sim.received(0).len(), sim.received(1).len()];
        recorded(&mut sim);
        sim.advance(minutes(5));
        assert_eq!([sim.received(0).len(), sim.received(1).len()], until, "seed {seed}: not a packet later");
        assert!(indices(&recorded(&mut sim), &[DATA]).is_empty(), "seed {seed}: and none on the wire");
        assert!(sim.drops(0, DropReason::HandshakeTimeout) > 0, "seed {seed}");
        assert!(sim.drops(0, DropReason::QueueFull) > 1_000, "seed {seed}");
        assert!(sim.drops(0, DropReason::MissingKey) > 10, "seed {seed}");
        // At last it hears of it.
        sim.publish(1);
        sim.advance(secs(10));
        assert!(preshared(&sim) && sim.received(0).len() > until[0] && sim.received(1).len() > until[1], "seed {seed}");
        flows.iter().for_each(|flow| {
            sim.end_flow(*flow);
        });
    }
}

#[test]
fn offers_that_cross_in_the_turn_cost_no_packet() {
    let mut crossed = 0;
    for seed in 0..10 {
        let mut sim = Sim::seeded(seed).nodes(2).delay(millis(20)).jitter(millis(seed * 4));
        for node in 0..2 {
            sim.node_mut(node).spread = secs(0);
        }
        sim.publish_all();
        let (mut sim, flows) = busy(sim);
        turn(&mut sim, true, &[0, 1]);
        sim.advance(secs(8));
        crossed += u32::from((sim.node(0).control.made, sim.node(1).control.made) == (1, 1));
        assert!(preshared(&sim), "seed {seed}");
        sim.advance(minutes(8));
        assert_nothing_lost(&mut sim, flows);
        assert_eq!(sim.node(0).tunnels(sim.now()), 1, "seed {seed}");
    }
    assert!(crossed >= 5, "{crossed} of 10 did");
}

#[test]
fn every_pair_of_lanes_turns() {
    for (lanes, apart) in [([4, 4], 0), ([8, 2], 5), ([1, 4], 5)] {
        let mut sim = Sim::seeded(3).nodes_with_lanes(&lanes).delay(millis(10));
        let mut number = 0;
        let mut send = |sim: &mut Sim, time| {
            for _ in 0..time {
                for port in 0..16u16 {
                    for (from, to) in [(0, 1), (1, 0)] {
                        let mut packet = mesh_dataplane_sim::packet(from, to, number);
                        packet[20..22].copy_from_slice(&port.to_be_bytes());
                        sim.send_packet(from, &packet);
                    }
                    number += 1;
                }
                sim.advance(millis(50));
            }
        };
        send(&mut sim, 40);
        turn(&mut sim, true, &[0]);
        send(&mut sim, 20 * apart);
        sim.publish(1);
        send(&mut sim, 400);
        assert!(preshared(&sim), "{lanes:?}");
        sim.assert_all_arrived(0, number);
        sim.assert_all_arrived(1, number);
    }
}

#[test]
fn a_turn_back_costs_no_packet() {
    for (seed, apart) in (0..10).map(|seed| (seed, seed % 3 * 5)) {
        let sim = Sim::seeded(seed).nodes(2).agreed().delay(millis(20)).jitter(millis(seed * 9));
        let (mut sim, flows) = busy(sim);
        sim.advance(secs(seed * 17));
        turn(&mut sim, false, &[seed as usize % 2]);
        sim.advance(secs(apart));
        sim.publish(1 - seed as usize % 2);
        sim.advance(minutes(3));
        assert!(!sim.peer(0, 1).unwrap().tunnels.last().unwrap().preshared, "seed {seed}");
        // And forth again, before and after the agreed one is retired.
        turn(&mut sim, true, &[0, 1]);
        sim.advance(secs(seed * 40));
        turn(&mut sim, false, &[0, 1]);
        sim.advance(minutes(9));
        assert_nothing_lost(&mut sim, flows);
        assert_eq!(sim.node(0).tunnels(sim.now()), 1, "seed {seed}");
        assert!(!sim.peer(0, 1).unwrap().tunnels[0].preshared, "seed {seed}");
    }
}

#[test]
fn a_handshake_under_way_at_the_turn_becomes_no_session() {
    let mut sim = Sim::seeded(5).nodes(2).delay(millis(100));
    sim.link.recording = Some(Vec::new());
    sim.send(0, 1);
    sim.advance(millis(150));
    // The response is on its way to node 0, whose tunnel has no session.
    turn(&mut sim, true, &[0, 1]);
    sim.advance(secs(7));
    assert_eq!(sim.received(1), [0], "it waited for an agreed key");
    assert!(preshared(&sim));
    assert!(sim.drops(0, DropReason::UnknownIndex) > 0);
    // A session that works is not renewed by a response that comes after the turn either.
    let (mut sim, flows) = busy(Sim::seeded(5).nodes(2).delay(millis(100)));
    sim.initiate(0, 1);
    sim.advance(millis(150));
    turn(&mut sim, true, &[0, 1]);
    sim.advance(secs(17));
    assert!(sim.drops(0, DropReason::StaleHandshake) > 0 && preshared(&sim));
    assert_nothing_lost(&mut sim, flows);
}

#[test]
fn a_turn_under_loss_ends_all_the_same() {
    for seed in 0..8 {
        let (mut sim, _) = busy(Sim::seeded(seed).nodes(2).loss(25).delay(millis(20)));
        turn(&mut sim, true, &[0, 1]);
        sim.advance(secs(60));
        assert!(preshared(&sim), "seed {seed}");
    }
}

#[test]
fn who_starts_anew_in_the_turn_begins_no_session_without() {
    for who in 0..2 {
        let (mut sim, flows) = busy(Sim::seeded(9).nodes(2).delay(millis(10)));
        turn(&mut sim, true, &[0, 1]);
        recorded(&mut sim);
        sim.restart(who);
        sim.initiate(who, 1 - who);
        sim.advance(secs(20));
        assert!(preshared(&sim), "node {who}");
        let before = sim.received(1 - who).len();
        sim.advance(secs(1));
        assert!(sim.received(1 - who).len() > before + 100, "node {who}");
        flows.iter().for_each(|flow| {
            sim.end_flow(*flow);
        });
    }
}
