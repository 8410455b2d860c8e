//! Key offers: what is refused, and what a right MAC lets through.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use mesh_protocol::id::{MeshId, NodeId};
use mesh_protocol::key::TunnelSecret;
use mesh_protocol::offer::{CIPHERTEXT_BYTES, Direction, Offer, OfferKeys, Sealed, SharedSecret, is_offer};

static KEYS: LazyLock<OfferKeys> = LazyLock::new(|| {
    let [a, b] = [1, 2].map(|n| TunnelSecret::from_bytes([n; 32]));
    let end = |n: u8, key: &TunnelSecret| (NodeId([n; 32]), key.public());
    let direction = Direction { mesh: MeshId([7; 32]), initiator: end(1, &a), responder: end(2, &b) };
    OfferKeys::new(&SharedSecret::agree(&b, &a.public()), &direction)
});

fuzz_target!(|data: &[u8]| {
    if let Ok(sealed) = Sealed::parse(data) {
        assert!(is_offer(data));
        // Only the corpus holds one with the right MAC.
        if let Ok(offer) = sealed.open(&KEYS) {
            let again = offer.seal(&KEYS, 20_000);
            assert_eq!(Sealed::parse(again.as_slice()).and_then(|sealed| sealed.open(&KEYS)), Ok(offer));
        }
    }
    // What an honest end makes of any numbers comes through.
    if let Some((numbers, rest)) = data.split_at_checked(33) {
        let number = |at: usize| numbers[at..at + 8].iter().fold(0, |sum, byte| sum << 8 | u64::from(*byte));
        let mut ciphertext = Box::new([0; CIPHERTEXT_BYTES]);
        for (place, byte) in ciphertext.iter_mut().zip(rest) {
            *place = *byte;
        }
        let offer = Offer {
            number: number(0),
            initiator_epoch: number(8),
            responder_epoch: number(16),
            kem_epoch: number(24),
            indices: (0..1 << (numbers[32] % 4)).map(|n: u32| n << 21 | u32::from(numbers[0])).collect(),
            ciphertext,
        };
        let datagram = offer.seal(&KEYS, number(0));
        assert_eq!(Sealed::parse(datagram.as_slice()).and_then(|sealed| sealed.open(&KEYS)), Ok(offer));
    }
});
