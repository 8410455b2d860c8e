//! Two ends agree; nobody else costs a KEM operation.
#![allow(clippy::unwrap_used, reason = "tests")]

use proptest::prelude::*;

use super::*;
use crate::identity::kem::KemPair;

const DAY: u64 = 20_000 * MICROS_PER_DAY;

/// One end: its book, and what the other end's directory says of it.
pub(in crate::psk) struct End {
    pub(in crate::psk) book: Book,
    pub(in crate::psk) facts: DirectoryFacts,
    pub(in crate::psk) keys: OwnKeys,
    pub(in crate::psk) lanes: u8,
}

pub(in crate::psk) fn secret(end: u8, epoch: u64) -> TunnelSecret {
    TunnelSecret::from_bytes([end * 16 + epoch as u8; 32])
}

/// Two ends with so many lanes that know each other by number 1 (of the first) and 2.
pub(in crate::psk) fn ends(lanes: [u8; 2]) -> [End; 2] {
    let mut facts = crate::desired::tests::facts();
    let template = Arc::make_mut(&mut facts.directory).clone();
    let kems = [kem::generate().unwrap(), kem::generate().unwrap()];
    let mut all = [0, 1].map(|n: usize| {
        let end = n as u8 + 1;
        let keys = OwnKeys {
            seq: 1,
            current: (2, secret(end, 2)),
            previous: Some((1, secret(end, 1))),
            spare_epoch: 3,
            promoted: 0,
            kem: vec![(1, kems[n].clone())],
        };
        let mut facts = template.clone();
        facts.own.node = NodeId([end; 32]);
        End { book: Book::new(lanes[n], lanes[n]), facts, keys, lanes: lanes[n] }
    });
    for n in 0..2 {
        meet(&mut all, n);
    }
    all
}

fn public((epoch, secret): &(u64, TunnelSecret)) -> (u64, TunnelKey) {
    (*epoch, secret.public())
}

/// End `n` hears what the other one is now.
fn meet(ends: &mut [End; 2], n: usize) {
    let other = &ends[1 - n];
    let mut peer = crate::desired::tests::peer(2 - n as u8);
    peer.node = other.facts.own.node;
    peer.lanes = other.lanes;
    peer.post_quantum = true;
    peer.current = public(&other.keys.current);
    peer.previous = other.keys.previous.as_ref().map(public);
    peer.spare = (other.keys.spare_epoch, secret(2 - n as u8, other.keys.spare_epoch).public());
    let (epoch, kem) = &other.keys.kem[0];
    peer.kem = (*epoch, kem.public().clone());
    ends[n].facts.peers = vec![peer];
    refresh(&mut ends[n]);
}

/// An end's book hears of its own facts and keys.
fn refresh(end: &mut End) {
    end.book.update(&end.facts, Arc::new(end.keys.clone()));
    end.book.set_day(DAY);
    end.book.compute(usize::MAX);
}

pub(in crate::psk) fn at(millis: u64) -> Now {
    static START: std::sync::LazyLock<Instant> = std::sync::LazyLock::new(Instant::now);
    Now { instant: *START + Duration::from_millis(millis), micros: DAY + millis * 1_000 }
}

/// The first end makes an offer to the second.
pub(in crate::psk) fn made(ends: &mut [End; 2], now: Now) -> (Agreement, Vec<u8>) {
    let agreement = ends[0].book.make(PeerId(2), (ends[0].keys.current.0, ends[1].keys.current.0), now).unwrap();
    let Origin::Own { offer } = &agreement.origin else { panic!("not ours") };
    let offer = offer.to_vec();
    (agreement, offer)
}

#[test]
fn both_ends_have_the_same_keys_for_the_same_pairs_of_lanes() {
    for lanes in [[1, 1], [2, 2], [4, 1], [1, 8], [8, 2]] {
        let mut ends = ends(lanes);
        let (own, offer) = made(&mut ends, at(0));
        let theirs = ends[1].book.open(&offer, at(1)).unwrap();
        assert_eq!((own.peer, theirs.peer), (PeerId(2), PeerId(1)));
        assert_eq!((own.local_epoch, own.remote_epoch), (theirs.remote_epoch, theirs.local_epoch));
        assert_eq!(own.pairs.len(), usize::from(lanes[0].max(lanes[1])));
        let mut keys = BTreeSet::new();
        for (a, b) in own.pairs.iter().zip(&theirs.pairs) {
            assert_eq!((a.lanes.local, a.lanes.remote, a.index), (b.lanes.remote, b.lanes.local, b.index));
            assert_eq!(a.psk, b.psk);
            assert_eq!(a.index >> INDEX_BITS, a.lanes.local as u32);
            keys.insert(*a.psk.expose());
        }
        assert_eq!(keys.len(), own.pairs.len(), "each pair of lanes has its own");
        assert_eq!((ends[0].book.counters.kem, ends[1].book.counters.kem), (1, 1), "one operation serves all lanes");
    }
}

#[test]
fn replayed_and_older_offers_cost_no_kem_operation() {
    let mut ends = ends([2, 2]);
    let (_, first) = made(&mut ends, at(0));
    let (_, second) = made(&mut ends, at(1_000));
    ends[1].book.open(&second, at(1_001)).unwrap();
    for replayed in [&first, &second, &second] {
        assert_eq!(ends[1].book.open(replayed, at(1_002)).unwrap_err(), Refusal::Repeated);
    }
    assert_eq!(ends[1].book.counters.kem, 1);
    // A change of the directory or of the day forgets no number.
    meet(&mut ends, 1);
    ends[1].book.set_day(DAY + MICROS_PER_DAY);
    assert_eq!(ends[1].book.open(&second, at(1_003)).unwrap_err(), Refusal::Repeated);
}

#[test]
fn numbers_rise_although_the_clock_steps_back() {
    let mut ends = ends([1, 1]);
    let (_, first) = made(&mut ends, at(10_000));
    let late = Now { micros: DAY, ..at(20_000) };
    let (_, second) = made(&mut ends, late);
    ends[1].book.open(&first, at(20_001)).unwrap();
    ends[1].book.open(&second, at(20_002)).unwrap();
}

#[test]
fn an_offer_reflected_or_shown_to_somebody_else_is_a_strangers() {
    let mut ends = ends([1, 1]);
    let (_, offer) = made(&mut ends, at(0));
    assert_eq!(ends[0].book.open(&offer, at(1)).unwrap_err(), Refusal::Stranger);
    ends[1].facts.peers.clear();
    refresh(&mut ends[1]);
    assert_eq!(ends[1].book.open(&offer, at(1)).unwrap_err(), Refusal::Stranger);
    assert_eq!(ends[1].book.counters.kem, 0);
}

#[test]
fn a_flood_of_strangers_costs_no_kem_operation_and_no_memory() {
    let mut ends = ends([2, 2]);
    let (_, offer) = made(&mut ends, at(0));
    let pairs = (ends[1].book.pairs.len(), ends[1].book.hints.len());
    for n in 0..20_000u32 {
        // The right hint, which an eavesdropper knows, in half of them.
        let mut forged = offer.clone();
        forged[12..16].copy_from_slice(&n.to_be_bytes());
        if n % 2 == 0 {
            forged[4..8].copy_from_slice(&n.wrapping_mul(2_654_435_761).to_be_bytes());
        }
        assert_eq!(ends[1].book.open(&forged, at(1)).unwrap_err(), Refusal::Stranger);
    }
    let counters = ends[1].book.counters;
    assert_eq!((counters.kem, counters.accepted, counters.strange), (0, 0, 20_000));
    assert_eq!((ends[1].book.pairs.len(), ends[1].book.hints.len()), pairs);
    ends[1].book.open(&offer, at(2)).unwrap();
}

#[test]
fn a_peer_that_offers_without_end_is_held_to_two_a_second() {
    let mut ends = ends([1, 1]);
    let mut accepted = 0;
    for n in 0..100 {
        let (_, offer) = made(&mut ends, at(n * 200));
        accepted += u32::from(ends[1].book.open(&offer, at(n * 200)).is_ok());
    }
    assert!((50..=60).contains(&accepted), "{accepted} in 20 s");
    assert_eq!(ends[1].book.counters.kem, u64::from(accepted));
}

#[test]
fn the_lanes_hear_of_all_hints_and_only_of_changes() {
    let mut ends = ends([1, 1]);
    let (_, offer) = made(&mut ends, at(0));
    let hints = ends[1].book.take_hints().unwrap();
    assert!(hints.contains(&offer[4..12]), "what a lane looks at is the hint");
    assert_eq!(hints.len(), 12, "two keys of ours, two of the peer's, three days");
    assert_eq!(ends[1].book.take_hints(), None);
    ends[1].book.set_day(DAY + MICROS_PER_DAY);
    assert!(ends[1].book.take_hints().is_some_and(|tomorrow| tomorrow.contains(&offer[4..12])));
}

#[test]
fn lanes_that_ask_at_once_get_one_offer() {
    let mut ends = ends([4, 4]);
    made(&mut ends, at(0));
    assert_eq!(ends[0].book.make(PeerId(2), (2, 2), at(50)).unwrap_err(), Refusal::JustMade);
    assert_eq!(ends[0].book.make(PeerId(2), (9, 2), at(50)).unwrap_err(), Refusal::NoSuchTunnel);
    assert_eq!(ends[0].book.make(PeerId(3), (2, 2), at(50)).unwrap_err(), Refusal::NoSuchTunnel);
    made(&mut ends, at(300));
    assert_eq!(ends[0].book.counters.kem, 2);
}

#[test]
fn offers_for_other_lanes_than_there_are_stop_before_the_kem() {
    let mut ends = ends([2, 2]);
    // The initiator believes in lanes that the responder never published.
    ends[0].facts.peers[0].lanes = 4;
    refresh(&mut ends[0]);
    let (_, offer) = made(&mut ends, at(0));
    assert_eq!(ends[1].book.open(&offer, at(1)).unwrap_err(), Refusal::OtherLanes);
    assert_eq!(ends[1].book.counters.kem, 0);
}

#[test]
fn an_end_on_which_fewer_lanes_run_than_it_published_still_agrees() {
    for short in [0, 1] {
        let mut ends = ends([2, 2]);
        let mut fewer = Book::new(1, 2);
        std::mem::swap(&mut ends[short].book, &mut fewer);
        refresh(&mut ends[short]);
        let (own, offer) = made(&mut ends, at(0));
        let theirs = ends[1].book.open(&offer, at(1)).unwrap();
        let first = |agreement: &Agreement| agreement.pairs[0].clone();
        assert_eq!((first(&own).lanes.local, first(&theirs).lanes.local), (0, 0));
        assert_eq!(first(&own).psk, first(&theirs).psk, "lane 0 has its tunnel");
    }
}

#[test]
fn offers_outlive_a_rotation_on_either_side_and_not_two() {
    let mut ends = ends([1, 1]);
    let (_, before) = made(&mut ends, at(0));
    // The responder rotates, its KEM key too; the initiator has not heard.
    let rotate = |end: &mut End, number: u8| {
        let next = end.keys.spare_epoch;
        end.keys.previous = Some(std::mem::replace(&mut end.keys.current, (next, secret(number, next))));
        end.keys.spare_epoch += 1;
        let kem: (u64, KemPair) = (end.keys.kem[0].0 + 1, kem::generate().unwrap());
        end.keys.kem.insert(0, kem);
        end.keys.kem.truncate(2);
        refresh(end);
    };
    rotate(&mut ends[1], 2);
    ends[1].book.open(&before, at(1)).unwrap();
    // The initiator rotates to the key that the responder knows as its spare.
    rotate(&mut ends[0], 1);
    let (_, after) = {
        let agreement = ends[0].book.make(PeerId(2), (3, 2), at(2)).unwrap();
        let Origin::Own { offer } = &agreement.origin else { panic!("not ours") };
        (agreement.pairs.len(), offer.to_vec())
    };
    ends[1].book.open(&after, at(3)).unwrap();
    rotate(&mut ends[1], 2);
    let refused = ends[1].book.open(&before, at(4)).unwrap_err();
    assert_eq!(refused, Refusal::Stranger, "that key is gone");
}

#[test]
fn a_clock_may_be_a_day_off() {
    for (days, works) in [(-2, false), (-1, true), (0, true), (1, true), (2, false)] {
        let mut ends = ends([1, 1]);
        let (_, offer) = made(&mut ends, at(0));
        ends[1].book.set_day(DAY.checked_add_signed(days * MICROS_PER_DAY as i64).unwrap());
        assert_eq!(ends[1].book.open(&offer, at(1)).is_ok(), works, "{days} days");
    }
}

#[test]
fn who_needs_no_preshared_key_has_no_secrets_here() {
    let mut ends = ends([1, 1]);
    let (_, offer) = made(&mut ends, at(0));
    ends[1].facts.peers[0].post_quantum = false;
    refresh(&mut ends[1]);
    assert!(ends[1].book.pairs.is_empty() && ends[1].book.hints.is_empty());
    assert_eq!(ends[1].book.open(&offer, at(1)).unwrap_err(), Refusal::Stranger);
    ends[1].facts.peers[0].post_quantum = true;
    ends[1].facts.exposed = true;
    refresh(&mut ends[1]);
    assert!(ends[1].book.pairs.is_empty(), "cut off: no tunnels");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn damaged_offers_never_reach_the_kem(at_byte in 0usize..1188, bit in 0u8..8, cut in 0usize..1188) {
        let mut ends = ends([1, 1]);
        let (_, mut offer) = made(&mut ends, at(0));
        prop_assert!(ends[1].book.open(&offer[..cut], at(1)).is_err());
        offer[at_byte] ^= 1 << bit;
        prop_assert!(ends[1].book.open(&offer, at(1)).is_err());
        prop_assert_eq!(ends[1].book.counters.kem, 0);
    }
}
