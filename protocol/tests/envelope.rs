//! What a signature covers, and what a token and a claim prove.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

mod support;

use mesh_protocol::cbor::{self, CborError};
use mesh_protocol::envelope::{Envelope, EnvelopeError, Kind, MAX_PAYLOAD_BYTES, NO_MESH};
use mesh_protocol::id::MeshId;
use mesh_protocol::record::{Checkpoint, Endpoints, NodeGrant, NodeRecord, Revocation};
use mesh_protocol::token::{JoinToken, TokenError, TokenLimits};
use proptest::prelude::*;
use support::*;

/// The envelope with one of its encoded bytes replaced by others.
fn spliced(envelope: &Envelope, at: usize, byte: u8) -> Envelope {
    let mut bytes = cbor::to_vec(envelope);
    bytes[at] = byte;
    cbor::from_slice(&bytes).unwrap()
}

#[test]
fn kind_format_and_mesh_are_signed() {
    let envelope = Envelope::seal(mesh(), &revocation(1), &[&revoker()]);
    let keys = [revoker().verify_key()];
    envelope.verify(mesh(), &keys, 1).unwrap();
    let bad = EnvelopeError::BadSignature(keys[0].id());
    assert_eq!(envelope.verify(NO_MESH, &keys, 1), Err(bad.clone()));
    assert_eq!(envelope.verify(MeshId([1; 32]), &keys, 1), Err(bad.clone()));
    for kind in [1, 2, 3, 4, 6, 7] {
        assert_eq!(spliced(&envelope, 2, kind).verify(mesh(), &keys, 1), Err(bad.clone()), "kind {kind}");
    }
    let newer = spliced(&envelope, 4, 2);
    assert_eq!(newer.verify(mesh(), &keys, 1), Err(bad));
    let format = EnvelopeError::Format { kind: Kind::Revocation, format: 2 };
    assert_eq!(newer.verified::<Revocation>(mesh(), &keys, 1), Err(format));
    let kind = EnvelopeError::Kind { expected: Kind::NodeGrant, got: Kind::Revocation };
    assert_eq!(envelope.verified::<NodeGrant>(mesh(), &keys, 1), Err(kind));
}

#[test]
fn signatures_are_counted_by_key() {
    let keys = [key(1).verify_key(), key(2).verify_key(), key(3).verify_key()];
    let envelope = Envelope::seal(mesh(), &revocation(1), &[&key(1), &key(9), &key(1), &key(3)]);
    assert_eq!(envelope.signers().count(), 3);
    envelope.verify(mesh(), &keys, 2).unwrap();
    let few = |got, needed| Err(EnvelopeError::TooFewSignatures { got, needed });
    assert_eq!(envelope.verify(mesh(), &keys, 3), few(2, 3));
    assert_eq!(envelope.verify(mesh(), &[keys[0]; 3], 2), few(1, 2), "one key named often is one key");
    assert_eq!(envelope.verify(mesh(), &[], 0), few(0, 1), "at least one, whatever was asked");
}

#[test]
fn oversized_objects_are_refused_where_they_are_made_and_where_they_arrive() {
    let long = Revocation { reason: "x".repeat(MAX_PAYLOAD_BYTES), ..revocation(1) };
    let envelope = Envelope::seal(mesh(), &long, &[&revoker()]);
    assert!(matches!(
        view().apply(&envelope),
        Err(mesh_protocol::trust::TrustError::Envelope(EnvelopeError::TooLarge { .. }))
    ));
    assert!(matches!(cbor::from_slice::<Envelope>(&cbor::to_vec(&envelope)), Err(CborError::Meaning(_))));
    let signers: Vec<_> = (0..17).map(key).collect();
    let many = Envelope::seal(mesh(), &revocation(1), &signers.iter().collect::<Vec<_>>());
    assert!(matches!(cbor::from_slice::<Envelope>(&cbor::to_vec(&many)), Err(CborError::Meaning(_))));
}

#[test]
fn a_line_that_is_no_token_says_why() {
    let line = token().to_line();
    assert_eq!(line.parse::<JoinToken>().unwrap().to_line(), line);
    assert_eq!(format!(" {}\n", *line).parse::<JoinToken>().unwrap().id(), token().id());
    assert_eq!("mesh-".parse::<JoinToken>().unwrap_err(), TokenError::NotAToken);
    for damaged in [&line[..line.len() - 1], &line[..20], "mesh-join-", "mesh-join-AAAA", "mesh-join-!!!!!!!!"] {
        assert_eq!(damaged.parse::<JoinToken>().unwrap_err(), TokenError::Damaged, "{damaged}");
    }
    let long = format!("mesh-join-{}", "A".repeat(9000));
    assert_eq!(long.parse::<JoinToken>().unwrap_err(), TokenError::Damaged);
    let other_seed = JoinToken { secret: key(6), ..token() };
    assert!(matches!(other_seed.to_line().parse::<JoinToken>(), Err(TokenError::Malformed(_))));
    let swapped = JoinToken { checkpoint: token().limits, ..token() };
    assert!(matches!(swapped.to_line().parse::<JoinToken>(), Err(TokenError::Malformed(_))));
    assert!(!format!("{:?}", token()).contains(&hex::encode(*token().secret.seed())));
}

#[test]
fn a_tampered_limit_does_not_verify() {
    let keys = [issuer().verify_key()];
    let mut limits = limits();
    limits.uses = 1000;
    let forged = Envelope::seal(mesh(), &limits, &[&token_secret()]);
    let few = EnvelopeError::TooFewSignatures { got: 0, needed: 1 };
    assert_eq!(forged.verified::<TokenLimits>(mesh(), &keys, 1), Err(few));
    assert_eq!(token().limits.verified::<TokenLimits>(mesh(), &keys, 1).unwrap().uses, 3);
}

#[test]
fn a_claim_is_of_one_connection_and_one_node() {
    let (secret, exporter) = (token_secret(), [7; 32]);
    let signature = claim().sign(&secret, &exporter);
    claim().verify(&secret.verify_key(), &exporter, &signature).unwrap();
    claim().verify(&secret.verify_key(), &[8; 32], &signature).unwrap_err();
    claim().verify(&key(6).verify_key(), &exporter, &signature).unwrap_err();
    let mut other = claim();
    other.identity = identity(2).verify_key();
    other.verify(&secret.verify_key(), &exporter, &signature).unwrap_err();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Whatever bit changes on the way, the object does not verify, or is the very same.
    #[test]
    fn a_mutated_envelope_never_verifies_as_something_else(at: usize, bit in 0u8..8) {
        let envelope = seal_record(1, &record(1));
        let mut bytes = cbor::to_vec(&envelope);
        let at = at % bytes.len();
        bytes[at] ^= 1 << bit;
        if let Ok(mutated) = cbor::from_slice::<Envelope>(&bytes) {
            let keys = [identity(1).verify_key()];
            prop_assert!(mutated.verified::<NodeRecord>(mesh(), &keys, 1).is_err());
        }
    }

    #[test]
    fn a_mutated_token_is_damaged(at in 10usize..900, letter in "[A-Za-z0-9_-]") {
        let line = token().to_line();
        let at = at.min(line.len() - 1);
        let mut mutated = (*line).clone();
        mutated.replace_range(at..=at, &letter);
        prop_assume!(mutated != *line);
        prop_assert_eq!(mutated.parse::<JoinToken>().unwrap_err(), TokenError::Damaged);
    }

    #[test]
    fn objects_come_back_as_they_were(
        seq: u64, epoch in 1u64..u64::MAX, lanes: u8, departed: bool, previous: bool, before: Option<[u8; 32]>,
        number: u64, reason: String, time: u64, revision: u64, port in 1u16.., v4: [u8; 4], v6: [u8; 16],
        prefix in 0u8..=32,
    ) {
        fn back<T: mesh_protocol::envelope::Signed + PartialEq + std::fmt::Debug>(object: &T) {
            let envelope = Envelope::seal(mesh(), object, &[&root(), &issuer()]);
            let bytes = cbor::to_vec(&envelope);
            let again: Envelope = cbor::from_slice(&bytes).unwrap();
            assert_eq!(cbor::to_vec(&again), bytes);
            assert_eq!(&again.verified::<T>(mesh(), &[issuer().verify_key()], 1).unwrap(), object);
        }
        let keys = epoch_key(1, epoch);
        back(&NodeRecord {
            seq, lanes, departed, current: keys, previous: previous.then_some(epoch_key(1, epoch - 1)),
            before: before.map(mesh_protocol::id::Hash), ..record(1)
        });
        back(&Revocation { number, reason, time, up_to_generation: seq, ..revocation(1) });
        let mut checkpoint = Checkpoint { time, ..checkpoint() };
        checkpoint.position.revision = revision;
        back(&checkpoint);
        let candidates = vec![(v4, port).into(), (v6, port).into()];
        back(&Endpoints { seq, candidates, ..endpoints(1) });
        let cidr = ipnet::Ipv4Net::new(v4.into(), prefix).unwrap().trunc();
        back(&NodeGrant {
            mesh_v4: v4.into(), mesh_v6: v6.into(), pod_cidrs: vec![cidr.into()], serial: number, external: departed,
            route_group: departed.then(|| name("group")), lifts: before.map(mesh_protocol::id::Hash), ..grant(1)
        });
        back(&TokenLimits { uses: u32::from(port), expires: time, ..limits() });
        back(&mesh_protocol::record::TrustPolicy { version: number, issued: time, ..policy_1() });
    }
}
