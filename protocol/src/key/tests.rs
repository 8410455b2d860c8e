#![allow(clippy::unwrap_used, reason = "tests")]

use super::*;

fn bytes(text: &str) -> [u8; 32] {
    hex::decode(text).unwrap().try_into().unwrap()
}

/// Order of the base point, little-endian (RFC 8032, section 5.1).
const L: [u8; 32] = [
    0xed, 0xd3, 0xf5, 0x5c, 0x1a, 0x63, 0x12, 0x58, 0xd6, 0x9c, 0xf7, 0xa2, 0xde, 0xf9, 0xde, 0x14, 0, 0, 0, 0, 0, 0,
    0, 0, 0, 0, 0, 0, 0, 0, 0, 0x10,
];

#[test]
fn published_vector_verifies() {
    // RFC 8032, section 7.1, test 2.
    let secret = SigningKey::from_seed(bytes("4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb"));
    let public = bytes("3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c");
    assert_eq!(secret.verify_key().as_bytes(), &public);
    let signature = secret.sign(&[0x72]);
    assert!(hex::encode(signature).starts_with("92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"));
    secret.verify_key().verify(&[0x72], &signature).unwrap();
    assert_eq!(secret.verify_key().verify(&[0x73], &signature), Err(KeyError::BadSignature));
}

#[test]
fn a_signature_has_one_form() {
    let secret = SigningKey::from_seed([7; 32]);
    let good = secret.sign(b"once");
    let mut malleable = good;
    let mut carry = 0u16;
    for (byte, l) in malleable[32..].iter_mut().zip(L) {
        let sum = u16::from(*byte) + u16::from(l) + carry;
        *byte = sum.to_le_bytes()[0];
        carry = sum >> 8;
    }
    assert_eq!(secret.verify_key().verify(b"once", &malleable), Err(KeyError::BadSignature), "S + L");
    let mut small_r = good;
    small_r[..32].copy_from_slice(&bytes("0100000000000000000000000000000000000000000000000000000000000000"));
    assert_eq!(secret.verify_key().verify(b"once", &small_r), Err(KeyError::BadSignature), "R of order 1");
}

#[test]
fn weak_and_doubly_encoded_signing_keys_are_refused() {
    let cases = [
        ("0100000000000000000000000000000000000000000000000000000000000000", KeyError::LowOrder),
        ("ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f", KeyError::LowOrder),
        ("0000000000000000000000000000000000000000000000000000000000000000", KeyError::LowOrder),
        ("26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05", KeyError::LowOrder),
        ("c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a", KeyError::LowOrder),
        // y = p, p + 1 and p + 3: not below p, so that each is a second spelling.
        ("edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f", KeyError::Malformed),
        ("eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f", KeyError::Malformed),
        ("f0ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff", KeyError::Malformed),
        ("0200000000000000000000000000000000000000000000000000000000000000", KeyError::Malformed),
    ];
    for (key, error) in cases {
        assert_eq!(VerifyKey::from_bytes(bytes(key)), Err(error), "{key}");
    }
}

#[test]
fn weak_and_doubly_encoded_tunnel_keys_are_refused() {
    let low_order = [
        "0000000000000000000000000000000000000000000000000000000000000000",
        "0100000000000000000000000000000000000000000000000000000000000000",
        "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
        "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
        "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    ];
    for key in low_order {
        assert_eq!(TunnelKey::from_bytes(bytes(key)), Err(KeyError::LowOrder), "{key}");
    }
    for first in 0xed..=0xff {
        let mut key = [0xff; 32];
        key[0] = first;
        key[31] = 0x7f;
        assert_eq!(TunnelKey::from_bytes(key), Err(KeyError::Malformed), "p and above");
    }
    // X25519 ignores the top bit: the same key under another name.
    let key = TunnelSecret::from_bytes([9; 32]).public();
    let mut twin = *key.as_bytes();
    twin[31] |= 0x80;
    assert_eq!(TunnelKey::from_bytes(twin), Err(KeyError::Malformed));
}

#[test]
fn keys_print_and_parse_and_secrets_do_neither() {
    let key = SigningKey::from_seed([3; 32]);
    let text = key.verify_key().to_string();
    assert_eq!(text.parse(), Ok(key.verify_key()));
    let tunnel = TunnelSecret::from_bytes([4; 32]);
    assert_eq!(tunnel.public().to_string().parse(), Ok(tunnel.public()));
    for bad in ["", "AAAA", &text[1..], &format!("{text}="), &format!(" {text}")] {
        assert_eq!(bad.parse::<VerifyKey>(), Err(KeyError::Malformed), "{bad}");
    }
    assert_eq!(format!("{key:?} {tunnel:?}"), "SigningKey([redacted]) TunnelSecret([redacted])");
    assert_eq!(KemPublic::from_bytes(&[0; 1183]), Err(KeyError::Malformed));
}
