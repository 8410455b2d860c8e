#![allow(clippy::unwrap_used, reason = "tests")]

use proptest::prelude::*;

use super::*;

#[derive(Debug, PartialEq, Encode, Decode)]
#[cbor(map)]
struct Two {
    #[n(0)]
    number: u64,
    #[n(1)]
    text: Option<String>,
}

fn read(hex_bytes: &str) -> Result<Two, CborError> {
    from_slice(&hex::decode(hex_bytes).unwrap())
}

#[test]
fn each_departure_from_the_dialect_has_its_error() {
    use CborError::{Forbidden, NotCanonical, TooDeep, TrailingBytes, Truncated};
    let nested = |depth: usize| [vec![0x81; depth], vec![0x00]].concat();
    let cases: Vec<(Vec<u8>, CborError)> = vec![
        (vec![], Truncated),
        (vec![0x18], Truncated),
        (vec![0x43, 1, 2], Truncated),
        (hex::decode("9b8000000000000000").unwrap(), Truncated),
        (hex::decode("bbffffffffffffffff").unwrap(), Truncated),
        (hex::decode("5bffffffffffffffff").unwrap(), Truncated),
        (vec![0x00, 0x00, 0x00], TrailingBytes(2)),
        (nested(17), TooDeep),
        (nested(10_000), TooDeep),
        (vec![0x18, 23], NotCanonical("number is not in its shortest form")),
        (hex::decode("1900ff").unwrap(), NotCanonical("number is not in its shortest form")),
        (hex::decode("1a0000ffff").unwrap(), NotCanonical("number is not in its shortest form")),
        (hex::decode("1b00000000ffffffff").unwrap(), NotCanonical("number is not in its shortest form")),
        (hex::decode("5801aa").unwrap(), NotCanonical("number is not in its shortest form")),
        (hex::decode("9f00ff").unwrap(), NotCanonical("indefinite length")),
        (hex::decode("5f4100ff").unwrap(), NotCanonical("indefinite length")),
        (hex::decode("bf0000ff").unwrap(), NotCanonical("indefinite length")),
        (hex::decode("a200000000").unwrap(), NotCanonical("map keys repeat or do not rise")),
        (hex::decode("a201000000").unwrap(), NotCanonical("map keys repeat or do not rise")),
        (hex::decode("a12000").unwrap(), Forbidden("a map key that is not an unsigned integer")),
        (hex::decode("a1616100").unwrap(), Forbidden("a map key that is not an unsigned integer")),
        (hex::decode("c000").unwrap(), Forbidden("a tag")),
        (vec![0xc1; 1000], Forbidden("a tag")),
        (hex::decode("f97e00").unwrap(), Forbidden("a float or a break")),
        (hex::decode("fb7ff8000000000000").unwrap(), Forbidden("a float or a break")),
        (hex::decode("f814").unwrap(), Forbidden("a float or a break")),
        (vec![0xff], Forbidden("a float or a break")),
        (vec![0xf7], Forbidden("a float or an unassigned value")),
        (vec![0x1c], Forbidden("a reserved length")),
        (hex::decode("62c328").unwrap(), Forbidden("text that is not UTF-8")),
    ];
    for (bytes, error) in cases {
        let start = hex::encode(&bytes[..bytes.len().min(12)]);
        assert_eq!(check(&bytes, u64::MAX), Err(error), "{start}");
    }
    assert_eq!(check(&nested(16), u64::MAX), Ok(()));
}

#[test]
fn unknown_fields_are_ignored_below_128_and_critical_from_there() {
    assert_eq!(read("a3000501616107f6"), Ok(Two { number: 5, text: Some("a".to_owned()) }));
    assert_eq!(read("a200051880f6"), Ok(Two { number: 5, text: None }));
    let signed = |text: &str| from_signed::<Two>(&hex::decode(text).unwrap());
    assert_eq!(signed("a20005187ff6").unwrap().number, 5);
    assert_eq!(signed("a200051880f6"), Err(CborError::CriticalField(128)));
    assert_eq!(signed("a2000507a11880f6"), Err(CborError::CriticalField(128)), "also further in");
}

#[test]
fn what_does_not_say_a_two_has_no_meaning() {
    for other in ["80", "a0", "a10141aa", "a1006161", "a1000101", "a10020"] {
        assert!(matches!(read(other), Err(CborError::Meaning(_) | CborError::TrailingBytes(_))), "{other}");
    }
}

#[test]
fn addresses_and_prefixes_are_exact() {
    let net = |bytes: &[u8]| {
        net::decode(&mut Decoder::new(&to_vec(&minicbor::bytes::ByteVec::from(bytes.to_vec()))), &mut ())
    };
    assert_eq!(net(&[10, 1, 0, 0, 16]).unwrap().to_string(), "10.1.0.0/16");
    for bad in [&[][..], &[16], &[10, 1, 0, 16], &[10, 1, 0, 0, 33], &[10, 1, 0, 1, 16], &[0; 18]] {
        net(bad).unwrap_err();
    }
    let socket = |bytes: &[u8]| {
        socket::decode(&mut Decoder::new(&to_vec(&minicbor::bytes::ByteVec::from(bytes.to_vec()))), &mut ())
    };
    assert_eq!(socket(&[192, 0, 2, 1, 0x1b, 0xbc]).unwrap().to_string(), "192.0.2.1:7100");
    for bad in [&[][..], &[1], &[192, 0, 2, 1, 0, 0], &[192, 0, 2, 1, 1], &[0; 17]] {
        socket(bad).unwrap_err();
    }
}

proptest! {
    #[test]
    fn checking_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let _ = check(&bytes, CRITICAL_KEYS_FROM);
    }

    #[test]
    fn two_encodings_never_mean_the_same(number: u64, text: Option<String>, at: usize, bit in 0u8..8) {
        let two = Two { number, text };
        let bytes = to_vec(&two);
        prop_assert_eq!(from_slice::<Two>(&bytes).unwrap(), Two { number, text: two.text.clone() });
        let mut other = bytes.clone();
        let at = at % other.len();
        other[at] ^= 1 << bit;
        prop_assert!(from_slice::<Two>(&other) != Ok(two));
    }
}
