//! Offers of honest ends arrive as they were made; everything else is refused before its ciphertext is looked at.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;
use crate::id::{MeshId, NodeId};
use crate::key::{KEM_PUBLIC_BYTES, KemPublic, TunnelSecret};

fn secret(number: u8) -> TunnelSecret {
    TunnelSecret::from_bytes([number; 32])
}

fn direction(initiator: u8, responder: u8) -> Direction {
    let end = |number: u8| (NodeId([number; 32]), secret(number).public());
    Direction { mesh: MeshId([7; 32]), initiator: end(initiator), responder: end(responder) }
}

/// Keys of offers from `initiator` to `responder`, as the end `own` computes them.
fn keys(initiator: u8, responder: u8, own: u8) -> OfferKeys {
    let other = if own == initiator { responder } else { initiator };
    OfferKeys::new(&SharedSecret::agree(&secret(own), &secret(other).public()), &direction(initiator, responder))
}

fn offer(indices: Vec<u32>) -> Offer {
    Offer {
        number: 1_700_000_000_000_001,
        initiator_epoch: 3,
        responder_epoch: 4,
        kem_epoch: 5,
        indices,
        ciphertext: Box::new([9; CIPHERTEXT_BYTES]),
    }
}

#[test]
fn only_the_other_end_opens_an_offer_and_only_in_its_direction() {
    let made = offer(vec![1, 0x20_0001]);
    let datagram = made.seal(&keys(1, 2, 1), 20_000);
    assert!(is_offer(datagram.as_slice()) && datagram.len() <= 1232);
    let sealed = Sealed::parse(datagram.as_slice()).unwrap();
    assert_eq!(sealed.open(&keys(1, 2, 2)).unwrap(), made);
    assert_eq!(sealed.hint(), keys(1, 2, 2).hint(20_000));
    for (name, wrong) in
        [("sent back", keys(2, 1, 1)), ("another initiator", keys(3, 2, 2)), ("another responder", keys(1, 3, 3))]
    {
        assert_eq!(sealed.open(&wrong), Err(OfferError::WrongMac), "{name}");
        assert_ne!(sealed.hint(), wrong.hint(20_000), "{name}");
    }
    let elsewhere = Direction { mesh: MeshId([8; 32]), ..direction(1, 2) };
    let elsewhere = OfferKeys::new(&SharedSecret::agree(&secret(2), &secret(1).public()), &elsewhere);
    assert_eq!(sealed.open(&elsewhere), Err(OfferError::WrongMac), "another mesh");
}

#[test]
fn hints_change_daily() {
    let hints: BTreeSet<_> = (20_000..20_100).map(|day| keys(1, 2, 1).hint(day)).collect();
    assert_eq!(hints.len(), 100);
}

#[test]
fn each_byte_of_an_offer_counts() {
    let datagram = offer(vec![5; 4]).seal(&keys(1, 2, 1), 20_000);
    for at in 0..OFFER_BYTES {
        let mut changed = datagram.clone();
        changed[at] ^= 0x10;
        let opened = Sealed::parse(changed.as_slice()).and_then(|sealed| sealed.open(&keys(1, 2, 2)));
        assert!(opened.is_err(), "byte {at}");
    }
    for len in [0, 1, OFFER_BYTES - 1] {
        assert_eq!(Sealed::parse(&datagram[..len]).unwrap_err(), OfferError::Malformed);
    }
    assert!(Sealed::parse(&[datagram.as_slice(), &[0]].concat()).is_err());
}

#[test]
fn preshared_keys_are_bound_to_everything() {
    let kem = |byte: u8| KemPublic::from_bytes(&[byte; KEM_PUBLIC_BYTES]).unwrap();
    let (kem_1, kem_2) = (kem(1), kem(2));
    let derive = |direction, kem, ciphertext: u8, secret: u8, lanes| {
        let agreement = Agreement { direction, kem, ciphertext: &[ciphertext; CIPHERTEXT_BYTES] };
        *agreement.preshared_key(&PresharedSecret::new([secret; 32]), lanes)
    };
    let elsewhere = Direction { mesh: MeshId([8; 32]), ..direction(1, 2) };
    let rotated = Direction { initiator: (NodeId([1; 32]), secret(3).public()), ..direction(1, 2) };
    let all = [
        derive(direction(1, 2), &kem_1, 1, 1, (0, 0)),
        derive(direction(1, 2), &kem_1, 1, 1, (1, 0)),
        derive(direction(1, 2), &kem_1, 1, 1, (0, 1)),
        derive(direction(1, 2), &kem_1, 1, 2, (0, 0)),
        derive(direction(1, 2), &kem_1, 2, 1, (0, 0)),
        derive(direction(1, 2), &kem_2, 1, 1, (0, 0)),
        derive(direction(2, 1), &kem_1, 1, 1, (0, 0)),
        derive(rotated, &kem_1, 1, 1, (0, 0)),
        derive(elsewhere, &kem_1, 1, 1, (0, 0)),
    ];
    assert_eq!(all.iter().collect::<BTreeSet<_>>().len(), all.len());
    assert_eq!(all[0], derive(direction(1, 2), &kem_1, 1, 1, (0, 0)));
}

#[test]
fn both_ends_number_the_pairs_of_lanes_alike() {
    for (a, b) in [(1, 1), (1, 8), (8, 1), (2, 4), (4, 2), (8, 8)] {
        let ours: Vec<_> = lane_pairs(a, b).collect();
        let theirs: Vec<_> = lane_pairs(b, a).map(|(b, a)| (a, b)).collect();
        assert_eq!(ours, theirs);
        assert_eq!(ours.iter().collect::<BTreeSet<_>>().len(), usize::from(a.max(b)));
    }
}

#[test]
fn secrets_do_not_print() {
    let text = format!(
        "{:?} {:?} {:?}",
        keys(1, 2, 1),
        SharedSecret::agree(&secret(1), &secret(2).public()),
        PresharedSecret::new([0xab; 32])
    );
    assert_eq!(text.matches("[redacted]").count(), 3);
    assert!(!text.contains("171"));
}

proptest! {
    #[test]
    fn what_is_said_arrives(
        number: u64, initiator_epoch: u64, responder_epoch: u64, kem_epoch: u64, day: u64,
        power in 0u32..4, index in 0u32..1 << 24, fill: u8,
    ) {
        let made = Offer {
            number, initiator_epoch, responder_epoch, kem_epoch,
            indices: (0..1 << power).map(|n: u32| index ^ n).collect(),
            ciphertext: Box::new([fill; CIPHERTEXT_BYTES]),
        };
        let datagram = made.seal(&keys(1, 2, 1), day);
        let sealed = Sealed::parse(datagram.as_slice()).unwrap();
        prop_assert_eq!(sealed.hint(), keys(1, 2, 2).hint(day));
        prop_assert_eq!(sealed.open(&keys(1, 2, 2)).unwrap(), made);
    }

    #[test]
    fn strangers_bytes_open_nothing(mut bytes in proptest::collection::vec(any::<u8>(), 0..1400), shaped: bool) {
        if shaped {
            bytes.resize(OFFER_BYTES, 0);
            bytes[..4].copy_from_slice(&[KIND, FORMAT, 8, 0]);
        }
        if let Ok(sealed) = Sealed::parse(&bytes) {
            prop_assert_eq!(sealed.open(&keys(1, 2, 2)), Err(OfferError::WrongMac));
        }
    }
}
