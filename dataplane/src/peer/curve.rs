//! X25519 keys as the curve sees them: which public key belongs to a secret, which keys no honest peer has.

use boringtun::x25519;

use crate::key::{PublicKey, SecretKey};

/// The public key of a secret.
pub(crate) fn public_of(secret: &SecretKey) -> PublicKey {
    let secret = x25519::StaticSecret::from(*secret.expose());
    PublicKey::new(*x25519::PublicKey::from(&secret).as_bytes())
}

/// True for the keys with which every shared secret is zero; boringtun does not look.
///
/// Source: RFC 7748, section 6.1, and the list in libsodium's `x25519_ref10.c`. The top bit of a key is ignored.
pub(crate) fn is_low_order(key: &PublicKey) -> bool {
    const ORDER_8: [[u8; 32]; 2] = [
        [
            0xe0, 0xeb, 0x7a, 0x7c, 0x3b, 0x41, 0xb8, 0xae, 0x16, 0x56, 0xe3, 0xfa, 0xf1, 0x9f, 0xc4, 0x6a, 0xda, 0x09,
            0x8d, 0xeb, 0x9c, 0x32, 0xb1, 0xfd, 0x86, 0x62, 0x05, 0x16, 0x5f, 0x49, 0xb8, 0x00,
        ],
        [
            0x5f, 0x9c, 0x95, 0xbc, 0xa3, 0x50, 0x8c, 0x24, 0xb1, 0xd0, 0xb1, 0x55, 0x9c, 0x83, 0xef, 0x5b, 0x04, 0x44,
            0x5c, 0xc4, 0x58, 0x1c, 0x8e, 0x86, 0xd8, 0x22, 0x4e, 0xdd, 0xd0, 0x9f, 0x11, 0x57,
        ],
    ];
    let mut bytes = *key.as_bytes();
    bytes[31] &= 0x7f;
    let tail_is = |middle: u8, last: u8| bytes[1..31].iter().all(|b| *b == middle) && bytes[31] == last;
    // 0 and 1; p - 1, p and p + 1.
    (tail_is(0, 0) && bytes[0] <= 1)
        || (tail_is(0xff, 0x7f) && (0xec..=0xee).contains(&bytes[0]))
        || ORDER_8.contains(&bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn low_order_keys_are_known() {
        let zero = [0; 32];
        let mut one = zero;
        one[0] = 1;
        let mut top = [0xff; 32];
        for last in [0xec, 0xed, 0xee] {
            top[0] = last;
            assert!(is_low_order(&PublicKey::new(top)), "the top bit does not count");
        }
        assert!(is_low_order(&PublicKey::new(zero)) && is_low_order(&PublicKey::new(one)));
        // What the list says agrees with the curve: such a key shares zero with everybody.
        for key in [zero, one, top] {
            let secret = x25519::StaticSecret::from([5; 32]);
            assert!(!secret.diffie_hellman(&x25519::PublicKey::from(key)).was_contributory());
        }
        assert!(!is_low_order(&public_of(&SecretKey::new([1; 32]))));
    }
}
