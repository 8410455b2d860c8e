//! Identity keys follow each other, and nobody else decides which.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

mod support;

use std::collections::BTreeMap;

use mesh_protocol::cbor;
use mesh_protocol::envelope::Envelope;
use mesh_protocol::id::{KeyId, MeshId, NodeId};
use mesh_protocol::key::{SigningKey, VerifyKey};
use mesh_protocol::offline::{GrantReason, GrantRequest, Memory, MemoryError};
use mesh_protocol::record::{Endpoints, Handover, MAX_HANDOVERS, NodeGrant, NodeRecord, Revocation};
use mesh_protocol::trust::{Change, RequestError, TrustError, View};
use proptest::prelude::*;
use support::*;

fn record_under(grant: &NodeGrant, seq: u64, key: &SigningKey) -> Envelope {
    let record = NodeRecord { seq, grant: seal_grant(grant).hash(mesh()), ..record(1) };
    Envelope::seal(mesh(), &record, &[key])
}

fn endpoints_by(seq: u64, key: &SigningKey) -> Envelope {
    Envelope::seal(mesh(), &Endpoints { seq, ..endpoints(1) }, &[key])
}

/// A view as a restart makes it: from what is kept.
fn restarted(view: &View) -> View {
    let mut again = support::view();
    again.restore_key_holders(view.key_holders());
    for envelope in view.envelopes() {
        again.apply(envelope).unwrap();
    }
    again.restore_seen(view.seen().cloned());
    again
}

fn who(view: &View, key: &SigningKey) -> Option<NodeId> {
    view.member_with(&key.verify_key()).map(|(node, _)| node)
}

#[test]
fn another_key_speaks_for_the_same_node_and_the_one_before_no_more() {
    let mut view = with_node_1();
    let (old, new) = (identity(1), later_identity(1, 2));
    let next = succeeded(1, &[2]);
    assert_eq!(view.apply(&seal_grant(&next)).unwrap(), Change::Grant { node: node(1), displaced: vec![] });
    let member = view.member(node(1)).unwrap();
    assert!(member.record.is_some() && member.speaks_with() == Some(old.verify_key()));

    // Until the node speaks with the new key, the one before does.
    for mut view in [view.clone(), restarted(&view)] {
        assert_eq!((who(&view, &old), who(&view, &new)), (Some(node(1)), Some(node(1))));
        view.apply(&record_under(&grant(1), 2, &old)).unwrap();
        view.apply(&endpoints_by(NOW * 2000, &old)).unwrap();
        assert!(matches!(refuse(&mut view, &record_under(&next, 3, &old)), TrustError::Envelope(_)));
        assert!(matches!(refuse(&mut view, &record_under(&grant(1), 3, &new)), TrustError::Envelope(_)));
    }

    view.apply(&record_under(&next, 2, &new)).unwrap();
    for mut view in [view.clone(), restarted(&view)] {
        assert_eq!((who(&view, &old), who(&view, &new)), (None, Some(node(1))));
        assert_eq!(view.identity_holder(&old.verify_key()), Some(node(1)), "for ever");
        assert_eq!(view.member(node(1)).unwrap().grant.object.mesh_v6, grant(1).mesh_v6);
        let old_seq = refuse(&mut view, &record_under(&grant(1), 1, &old));
        assert!(matches!(old_seq, TrustError::OldSeq { held: 2, got: 1, .. }), "{old_seq:?}");
        let gone = refuse(&mut view, &record_under(&grant(1), 3, &old));
        assert!(matches!(gone, TrustError::OtherGrant { .. }), "{gone:?}");
        assert!(matches!(refuse(&mut view, &record_under(&next, 3, &old)), TrustError::Envelope(_)));
        assert!(matches!(refuse(&mut view, &endpoints_by(NOW * 3000, &old)), TrustError::Envelope(_)));
        view.apply(&endpoints_by(NOW * 3000, &new)).unwrap();
        assert!(matches!(refuse(&mut view, &seal_grant(&grant(1))), TrustError::OldGeneration { .. }));
    }
}

#[test]
fn a_succession_that_is_not_signed_by_both_keys_is_nobodys_word() {
    let (one, two, other) = (identity(1), later_identity(1, 2), identity(7));
    let grant = |identity: &SigningKey, succession: Vec<Handover>| NodeGrant {
        generation: 2,
        identity: identity.verify_key(),
        succession,
        ..grant(1)
    };
    let good = handover(1, &one, &two);
    let by_other = handover(1, &other, &two);
    let long = succeeded(1, &(1..=MAX_HANDOVERS as u8 + 1).collect::<Vec<_>>());
    let cases: Vec<(&str, NodeGrant)> = vec![
        ("no handover", grant(&two, vec![])),
        ("the key before did not sign", grant(&two, vec![Handover { given: by_other.given, ..good.clone() }])),
        ("the key after did not sign", grant(&two, vec![Handover { taken: good.given, ..good.clone() }])),
        ("for another node", grant(&two, vec![Handover::sign(mesh(), node(2), &one, &two)])),
        ("for another mesh", grant(&two, vec![Handover::sign(MeshId([9; 32]), node(1), &one, &two)])),
        ("to another key", grant(&other, vec![good.clone()])),
        ("from a stranger", grant(&two, vec![by_other])),
        ("back to a key it had", grant(&one, vec![good.clone(), handover(1, &two, &one)])),
        ("from itself", grant(&one, vec![handover(1, &one, &one)])),
        ("a step left out", grant(&later_identity(1, 3), vec![handover(1, &two, &later_identity(1, 3))])),
        ("too many", NodeGrant { generation: 2, ..long }),
    ];
    for (what, grant) in cases {
        for mut view in [view(), with_node_1()] {
            let error = refuse(&mut view, &seal_grant(&grant));
            assert!(matches!(error, TrustError::Succession { .. }), "{what}: {error:?}");
        }
    }
    let most = succeeded(1, &(1..=MAX_HANDOVERS as u8).collect::<Vec<_>>());
    assert!(cbor::to_vec(&seal_grant(&most)).len() < 16 * 1024, "fits a frame beside a record and a checkpoint");
    view().apply(&seal_grant(&most)).unwrap();
}

#[test]
fn who_was_away_and_who_joins_accept_the_newest_alone() {
    for seen in [&[][..], &[2], &[2, 3]] {
        let mut view = view();
        if !seen.is_empty() {
            view.apply(&seal_grant(&succeeded(1, seen))).unwrap();
        }
        view.apply(&seal_grant(&succeeded(1, &[2, 3, 4, 5]))).unwrap();
        let key = later_identity(1, 5);
        assert_eq!(who(&view, &key), Some(node(1)));
        view.apply(&record_under(&succeeded(1, &[2, 3, 4, 5]), 9, &key)).unwrap();
        // A renewal carries it on.
        view.apply(&seal_grant(&NodeGrant { generation: 9, ..succeeded(1, &[2, 3, 4, 5]) })).unwrap();
        assert_eq!(who(&view, &key), Some(node(1)));
    }
}

#[test]
fn a_stolen_key_that_was_replaced_leads_nowhere() {
    let mut held = with_node_1();
    held.apply(&seal_grant(&succeeded(1, &[2]))).unwrap();
    // Its thief, with the issuer's help, sends the node elsewhere from there.
    let fork = NodeGrant { generation: 7, ..succeeded(1, &[3]) };
    let back = NodeGrant { generation: 7, ..grant(1) };
    let mut dropped = held.clone();
    let without = next_policy(&held, |policy| drop(policy.issuers[0].clusters.remove(0)));
    dropped.apply(&without).unwrap();
    let east = next_policy(&dropped, |policy| policy.issuers[0].clusters.push(cluster("east", "10.1.0.0/16")));
    dropped.apply(&east).unwrap();
    assert!(dropped.member(node(1)).is_none(), "it is out at the moment");
    for mut view in [held.clone(), restarted(&held), dropped] {
        for grant in [&fork, &back] {
            let error = refuse(&mut view, &seal_grant(grant));
            assert!(matches!(error, TrustError::Succession { .. }), "{error:?}");
        }
        view.apply(&seal_grant(&NodeGrant { generation: 7, ..succeeded(1, &[2, 3]) })).unwrap();
    }
}

#[test]
fn an_identity_key_belongs_to_one_node_for_ever() {
    let mut view = with_node_1();
    view.apply(&seal_grant(&grant(2))).unwrap();
    view.apply(&seal_grant(&succeeded(1, &[2, 3]))).unwrap();
    // Whoever has node 1's keys makes node 2 of them, or a node of their own.
    let of_node_2 = |to: &SigningKey| NodeGrant {
        generation: 2,
        identity: to.verify_key(),
        succession: vec![handover(2, &identity(2), to)],
        ..grant(2)
    };
    let anew = |key: &SigningKey| NodeGrant {
        node: key.verify_key().node_id(),
        identity: key.verify_key(),
        mesh_v6: mesh_protocol::address::mesh_v6(mesh(), key.verify_key().node_id()),
        ..grant(5)
    };
    for view in [view.clone(), restarted(&view)] {
        for step in 0..=3 {
            let key = later_identity(1, step);
            let known = step != 1;
            assert_eq!(view.identity_holder(&key.verify_key()), known.then(|| node(1)), "step {step}");
            for grant in [of_node_2(&key), anew(&key)].into_iter().filter(|grant| known && grant.node != node(1)) {
                let error = refuse(&mut view.clone(), &seal_grant(&grant));
                assert!(matches!(error, TrustError::KeyTaken { holder, .. } if holder == node(1)), "{error:?}");
            }
        }
        // The other way round: a node's first key is nobody's next.
        let taken = NodeGrant {
            generation: 4,
            identity: identity(2).verify_key(),
            succession: [succeeded(1, &[2, 3]).succession, vec![handover(1, &later_identity(1, 3), &identity(2))]]
                .concat(),
            ..grant(1)
        };
        let error = refuse(&mut view.clone(), &seal_grant(&taken));
        assert!(matches!(error, TrustError::KeyTaken { holder, .. } if holder == node(2)), "{error:?}");
    }
}

#[test]
fn a_revoked_node_is_out_with_every_key_and_back_with_the_newest_only() {
    let mut view = with_node_1();
    view.apply(&seal_grant(&succeeded(1, &[2]))).unwrap();
    let revocation = seal_revocation(&Revocation { up_to_generation: 2, ..revocation(1) });
    view.apply(&revocation).unwrap();
    for key in [identity(1), later_identity(1, 2)] {
        assert_eq!((who(&view, &key), view.identity_holder(&key.verify_key())), (None, Some(node(1))));
    }
    let later = NodeGrant { generation: 3, ..succeeded(1, &[2, 3]) };
    assert!(matches!(refuse(&mut view, &seal_grant(&later)), TrustError::Revoked { .. }));
    let lifts = Some(revocation.hash(mesh()));
    let with_first = NodeGrant { generation: 3, lifts, ..grant(1) };
    assert!(matches!(refuse(&mut view, &seal_grant(&with_first)), TrustError::Succession { .. }));
    view.apply(&seal_grant(&NodeGrant { generation: 3, lifts, ..succeeded(1, &[2]) })).unwrap();
    assert_eq!((who(&view, &identity(1)), who(&view, &later_identity(1, 2))), (None, Some(node(1))));
}

fn request(held: &NodeGrant, grant: NodeGrant) -> GrantRequest {
    GrantRequest { grant, reason: GrantReason::Succession { held: seal_grant(held) }, until: NOW + 7 * 86_400 }
}

#[test]
fn an_issuer_signs_another_key_for_a_node_that_wants_it_and_nothing_else_with_it() {
    let (view, held) = (view(), succeeded(1, &[2]));
    let good = NodeGrant { issued: NOW + 60, expires: NOW + 86_400, ..succeeded(1, &[2, 3]) };
    assert_eq!(view.check_request(&request(&held, good.clone()), NOW).unwrap().key, issuer().verify_key());
    let forged = Handover { given: [1; 64], ..good.succession[1].clone() };
    for (what, grant) in [
        ("forged", NodeGrant { succession: vec![good.succession[0].clone(), forged], ..good.clone() }),
        ("from the key before", NodeGrant { generation: 3, ..succeeded(1, &[3]) }),
        ("two steps", NodeGrant { generation: 3, ..succeeded(1, &[2, 3, 4]) }),
        ("none", NodeGrant { generation: 3, ..held.clone() }),
        ("another name", NodeGrant { name: name("n9"), ..good.clone() }),
        ("other prefixes", NodeGrant { pod_cidrs: vec!["10.1.0.0/16".parse().unwrap()], ..good.clone() }),
        ("another generation", NodeGrant { generation: 4, ..good.clone() }),
    ] {
        assert!(view.check_request(&request(&held, grant), NOW).is_err(), "{what}");
    }
    // Neither of the other two reasons carries a new key.
    let renewal =
        GrantRequest { reason: GrantReason::Renewal { held: seal_grant(&held) }, ..request(&held, good.clone()) };
    assert!(matches!(view.check_request(&renewal, NOW), Err(RequestError::Differs { .. })));
    let signature = claim().sign(&token_secret(), &support::messages::EXPORTER);
    let (exporter, limits) = (support::messages::EXPORTER, token().limits);
    let reason = GrantReason::Join { claim: claim(), exporter, signature, limits };
    let with_more = NodeGrant { succession: good.succession, ..grant(1) };
    let join = GrantRequest { reason, ..request(&held, with_more) };
    assert!(view.check_request(&join, NOW).is_err());
}

#[test]
fn a_signer_remembers_the_identity_it_signed_last() {
    let mut memory = Memory::first(&view());
    memory.sign(&request(&grant(1), succeeded(1, &[2]))).unwrap();
    let text = serde_json::to_string(&memory).unwrap();
    let mut memory: Memory = serde_json::from_str(&text).unwrap();
    // A stolen keyserver shows the grant from before, and a thief of the key before signs.
    let fork = memory.sign(&request(&grant(1), succeeded(1, &[3])));
    assert!(
        matches!(fork, Err(MemoryError::OldIdentity { held, .. }) if held == later_identity(1, 2).verify_key().id())
    );
    let back = GrantReason::Renewal { held: seal_grant(&grant(1)) };
    let back = GrantRequest { reason: back, ..request(&grant(1), NodeGrant { generation: 2, ..grant(1) }) };
    assert!(matches!(memory.sign(&back), Err(MemoryError::OldIdentity { .. })));
    memory.sign(&request(&succeeded(1, &[2]), succeeded(1, &[2, 3]))).unwrap();
    let older = r#"{"mesh_id":"0000000000000000000000000000000000000000000000000000000000000000","policy_version":1,
        "policy":"0000000000000000000000000000000000000000000000000000000000000000","serial":3}"#;
    assert!(serde_json::from_str::<Memory>(older).unwrap().identities.is_empty());
}

/// One grant that somebody makes: whose, from which of the node's keys to which, on top of which succession, and who signs
/// the handover.
#[derive(Debug, Clone)]
struct Made {
    node: u8,
    generation: u64,
    /// Steps of the succession; even ones are keys that the node has, odd ones its thief's.
    steps: Vec<u8>,
    /// The last handover is signed by another key than the one before.
    forged: bool,
    speaks: bool,
}

fn made() -> impl Strategy<Value = Made> {
    let steps = prop::collection::vec(1u8..5, 0..4);
    (0u8..3, 1u64..8, steps, prop::bool::weighted(0.2), any::<bool>())
        .prop_map(|(node, generation, steps, forged, speaks)| Made { node, generation, steps, forged, speaks })
}

impl Made {
    fn grant(&self) -> NodeGrant {
        let mut grant = NodeGrant { generation: self.generation, ..succeeded(self.node, &self.steps) };
        if let Some(last) = grant.succession.last_mut().filter(|_| self.forged) {
            last.given = handover(self.node, &identity(99), &identity(98)).given;
        }
        grant
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(192))]

    /// Whatever an issuer signs, in whatever order: a node's key is its first one, or was named by the keys before; none
    /// that was accepted is ever left; none is two nodes'; and only the node's keys of today sign for it.
    #[test]
    fn no_order_of_grants_moves_an_identity_off_its_succession(all in prop::collection::vec(made(), 1..12)) {
        let (mut view, mut newest) = (view(), BTreeMap::<NodeId, KeyId>::new());
        let mut owners = BTreeMap::<VerifyKey, NodeId>::new();
        for made in &all {
            let (grant, before) = (made.grant(), format!("{view:?}"));
            if !matches!(view.apply(&seal_grant(&grant)), Ok(Change::Grant { .. })) {
                prop_assert_eq!(format!("{view:?}"), before, "a refusal changed something");
                continue;
            }
            prop_assert!(!made.forged || made.steps.is_empty(), "a forged handover was accepted");
            let keys: Vec<KeyId> = grant.identities().map(VerifyKey::id).collect();
            if let Some(newest) = newest.insert(grant.node, grant.identity.id()) {
                prop_assert!(keys.contains(&newest), "the succession forked");
            }
            for key in grant.identities() {
                prop_assert_eq!(*owners.entry(*key).or_insert(grant.node), grant.node, "a key has two nodes");
                prop_assert_eq!(view.identity_holder(key), Some(grant.node));
            }
            let key = later_identity(made.node, made.steps.last().copied().unwrap_or(0));
            if made.speaks {
                let seq = view.seen().find(|seen| seen.node == grant.node).and_then(|seen| seen.record).map_or(1, |it| it.seq + 1);
                let record = NodeRecord { seq, grant: seal_grant(&grant).hash(mesh()), ..record(made.node) };
                view.apply(&Envelope::seal(mesh(), &record, &[&key])).unwrap();
                prop_assert_eq!(view.member(grant.node).unwrap().speaks_with(), Some(key.verify_key()));
                let admitted = grant.identities().filter(|key| view.member_with(key).is_some()).count();
                prop_assert_eq!(admitted, 1, "a key that was given up speaks");
            }
            let again = restarted(&view);
            prop_assert_eq!(again.member(grant.node).map(|member| &member.grant), view.member(grant.node).map(|member| &member.grant));
            prop_assert!(owners.keys().all(|key| again.identity_holder(key) == view.identity_holder(key)));
        }
    }

    #[test]
    fn any_bytes_are_a_handover_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..256), at: prop::sample::Index, to: u8) {
        let _ = cbor::from_slice::<Handover>(&bytes);
        let mut whole = cbor::to_vec(&handover(1, &identity(1), &later_identity(1, 2)));
        let at = at.index(whole.len());
        let changed = whole[at] != to;
        whole[at] = to;
        if let Ok(handover) = cbor::from_slice::<Handover>(&whole) {
            let good = handover.verify(mesh(), node(1), &later_identity(1, 2).verify_key()).is_ok();
            prop_assert!(!(changed && good), "a changed handover verifies");
        }
    }
}
