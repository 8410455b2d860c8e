//! What an issuer signs, and what it does not, whatever a keyserver shows it.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

mod support;

use mesh_protocol::envelope::Envelope;
use mesh_protocol::key::SigningKey;
use mesh_protocol::offline::{GrantReason, GrantRequest, GrantRequests, InFile, Memory, MemoryError, MeshFile};
use mesh_protocol::record::{NodeGrant, TrustPolicy};
use mesh_protocol::token::{JoinClaim, TokenLimits};
use mesh_protocol::trust::RequestError;
use proptest::prelude::*;
use support::messages::EXPORTER;
use support::*;

fn join() -> GrantRequest {
    let signature = claim().sign(&token_secret(), &EXPORTER);
    let reason = GrantReason::Join { claim: claim(), exporter: EXPORTER, signature, limits: token().limits };
    GrantRequest { grant: NodeGrant { tags: limits().tags, ..grant(1) }, reason, until: NOW + 7 * 86_400 }
}

fn with_grant(change: impl FnOnce(&mut NodeGrant)) -> GrantRequest {
    let mut request = join();
    change(&mut request.grant);
    request
}

fn with_limits(limits: &TokenLimits, signer: &SigningKey) -> GrantRequest {
    let mut request = join();
    let GrantReason::Join { limits: held, .. } = &mut request.reason else { panic!("not a join") };
    *held = Envelope::seal(mesh(), limits, &[signer]);
    request
}

#[test]
fn what_a_token_holder_asked_for_is_signed() {
    let view = view();
    let issuer = view.check_request(&join(), NOW).unwrap();
    assert_eq!(issuer.key, issuer_key());
}

fn issuer_key() -> mesh_protocol::key::VerifyKey {
    issuer().verify_key()
}

#[test]
fn nothing_else_is() {
    let view = view();
    let refused = |request: &GrantRequest| view.check_request(request, NOW).map(|issuer| issuer.key).unwrap_err();
    let differs: [(&str, GrantRequest); 8] = [
        ("another name", with_grant(|grant| grant.name = name("n9"))),
        ("another node", with_grant(|grant| grant.node = identity(9).verify_key().node_id())),
        ("another key", with_grant(|grant| grant.identity = identity(9).verify_key())),
        ("wider prefixes", with_grant(|grant| grant.pod_cidrs = vec!["10.1.0.0/16".parse().unwrap()])),
        ("no tags", with_grant(|grant| grant.tags.clear())),
        ("a route group", with_grant(|grant| grant.route_group = Some(name("group")))),
        ("a plain peer", with_grant(|grant| grant.external = true)),
        ("a lifted revocation", with_grant(|grant| grant.lifts = Some(view.policy_hash()))),
    ];
    for (what, request) in &differs {
        assert!(matches!(refused(request), RequestError::Differs { .. }), "{what}: {}", refused(request));
    }
    let scope = [
        ("a mesh address outside", with_grant(|grant| grant.mesh_v4 = "192.0.2.1".parse().unwrap())),
        ("too long a life", with_grant(|grant| grant.expires = u64::MAX)),
    ];
    for (what, request) in &scope {
        assert!(matches!(refused(request), RequestError::Trust(_)), "{what}: {}", refused(request));
    }
    let cluster = with_grant(|grant| grant.cluster = name("nowhere"));
    assert!(matches!(refused(&cluster), RequestError::NoCluster(_)));
    let own = with_limits(&limits(), &keyserver());
    assert!(matches!(refused(&own), RequestError::Token { .. }), "a token that the keyserver signed itself");
    let other = TokenLimits { key: identity(9).verify_key(), ..limits() };
    assert!(matches!(refused(&with_limits(&other, &issuer())), RequestError::Unsigned(_)), "another token");
    let expired = TokenLimits { expires: NOW, ..limits() };
    assert!(matches!(refused(&with_limits(&expired, &issuer())), RequestError::Over(_)));
    let GrantReason::Join { claim: held, signature, limits, .. } = join().reason else { panic!("not a join") };
    let forged = JoinClaim { name: name("n9"), ..held };
    let mut request = with_grant(|grant| grant.name = name("n9"));
    request.reason = GrantReason::Join { claim: forged, exporter: EXPORTER, signature, limits };
    assert!(matches!(refused(&request), RequestError::Unsigned(_)));
    let late = view.check_request(&join(), NOW + 7 * 86_400).map(|issuer| issuer.key);
    assert!(matches!(late, Err(RequestError::Over(_))));
}

#[test]
fn a_grant_that_would_push_a_member_out_is_not_signed() {
    let mut view = view();
    let member = NodeGrant { serial: 100, pod_cidrs: vec!["10.1.1.0/25".parse().unwrap()], ..grant(2) };
    view.apply(&seal_grant(&member)).unwrap();
    let low = with_grant(|grant| grant.serial = 1);
    assert!(matches!(view.check_request(&low, NOW), Err(RequestError::Collides { .. })));
}

#[test]
fn a_renewal_gives_time_and_nothing_else() {
    let view = view();
    let held = grant(1);
    let renewed =
        NodeGrant { generation: held.generation + 1, issued: NOW + 60, expires: NOW + 86_400, ..held.clone() };
    let request = |grant: NodeGrant| GrantRequest {
        grant,
        reason: GrantReason::Renewal { held: seal_grant(&held) },
        until: NOW + 7 * 86_400,
    };
    view.check_request(&request(renewed.clone()), NOW).unwrap();
    for wrong in [
        NodeGrant { generation: held.generation, ..renewed.clone() },
        NodeGrant { serial: held.serial - 1, ..renewed.clone() },
        NodeGrant { name: name("n9"), ..renewed.clone() },
        NodeGrant { tags: Vec::new(), ..renewed.clone() },
        NodeGrant { pod_cidrs: vec!["10.1.0.0/16".parse().unwrap()], ..renewed.clone() },
    ] {
        assert!(view.check_request(&request(wrong.clone()), NOW).is_err(), "{wrong:?}");
    }
    let mut foreign = request(renewed);
    foreign.reason = GrantReason::Renewal { held: Envelope::seal(mesh(), &held, &[&keyserver()]) };
    assert!(view.check_request(&foreign, NOW).is_err(), "a grant that no issuer signed");
}

#[test]
fn a_revoked_node_comes_back_as_what_it_was_and_behind_all_others() {
    let mut view = view();
    let held = grant(1);
    view.apply(&seal_grant(&held)).unwrap();
    let revocation = Envelope::seal(mesh(), &revocation(1), &[&revoker()]);
    view.apply(&revocation).unwrap();
    let back = NodeGrant {
        generation: held.generation + 1,
        serial: held.serial + 5,
        issued: NOW + 60,
        expires: NOW + 86_400,
        lifts: view.to_lift(held.node),
        ..held.clone()
    };
    let request = |grant: NodeGrant| GrantRequest {
        grant,
        reason: GrantReason::Restoration { held: seal_grant(&held) },
        until: NOW + 7 * 86_400,
    };
    view.check_request(&request(back.clone()), NOW).unwrap();
    // The desk knows the policies only.
    support::view().check_request(&request(back.clone()), NOW).unwrap();
    for wrong in [
        NodeGrant { lifts: None, ..back.clone() },
        NodeGrant { generation: held.generation, ..back.clone() },
        NodeGrant { serial: held.serial, ..back.clone() },
        NodeGrant { name: name("n9"), ..back.clone() },
        NodeGrant { identity: identity(9).verify_key(), ..back.clone() },
        NodeGrant { tags: Vec::new(), ..back.clone() },
        NodeGrant { external: true, ..back.clone() },
        NodeGrant { pod_cidrs: vec!["10.1.0.0/16".parse().unwrap()], ..back.clone() },
    ] {
        assert!(support::view().check_request(&request(wrong.clone()), NOW).is_err(), "{wrong:?}");
    }
    let mut foreign = request(back.clone());
    foreign.reason = GrantReason::Restoration { held: Envelope::seal(mesh(), &held, &[&keyserver()]) };
    assert!(view.check_request(&foreign, NOW).is_err(), "a grant that no issuer signed");
    let mut renewal = request(back.clone());
    renewal.reason = GrantReason::Renewal { held: seal_grant(&held) };
    assert!(support::view().check_request(&renewal, NOW).is_err(), "a renewal lifts nothing");
    // Nobody's place is taken by it.
    let mut memory = Memory { serial: back.serial, ..Memory::first(&view) };
    assert!(matches!(memory.sign(&request(back.clone())), Err(MemoryError::OldSerial { .. })));
    memory.sign(&request(NodeGrant { serial: back.serial + 1, ..back })).unwrap();
}

#[test]
fn a_signer_remembers_policies_and_serials() {
    let view = view();
    let mut memory = Memory::first(&view);
    let request = |serial| with_grant(|grant| grant.serial = serial);
    memory.sign(&request(5)).unwrap();
    memory.sign(&request(6)).unwrap();
    for low in [0, 5, 6] {
        assert!(matches!(memory.sign(&request(low)), Err(MemoryError::OldSerial { .. })), "{low}");
    }
    let mut newer = view.clone();
    let next = TrustPolicy { version: 2, previous: Some(view.policy_hash()), ..policy_1() };
    newer.apply(&Envelope::seal(mesh(), &next, &[&root()])).unwrap();
    memory.see(&newer).unwrap();
    assert!(matches!(memory.see(&view), Err(MemoryError::OlderPolicy { held: 2, got: 1 })));
    let text = serde_json::to_string(&memory).unwrap();
    assert_eq!(serde_json::from_str::<Memory>(&text).unwrap(), memory);
}

#[test]
fn two_grants_with_one_serial_give_one_outcome() {
    let make = |n| NodeGrant { serial: 7, name: name("same"), ..grant(n) };
    let (one, two) = (seal_grant(&make(1)), seal_grant(&make(2)));
    let winner = |first: &Envelope, second: &Envelope| {
        let mut view = view();
        view.apply(first).unwrap();
        let _ = view.apply(second);
        view.member_named(&name("same")).map(|(node, _)| node)
    };
    assert_eq!(winner(&one, &two), winner(&two, &one));
}

#[test]
fn a_proposal_gathers_signatures_made_elsewhere() {
    let next = TrustPolicy { version: 2, ..policy_1() };
    let unsigned = Envelope::unsigned(&next);
    let message = unsigned.signed_bytes(mesh());
    let by =
        |key: &SigningKey| unsigned.clone().with_signature_of(mesh(), &key.verify_key(), key.sign(&message)).unwrap();
    let both = by(&root()).merged(&by(&issuer())).unwrap();
    both.verify(mesh(), &[root().verify_key(), issuer_key()], 2).unwrap();
    assert!(unsigned.clone().with_signature_of(mesh(), &issuer_key(), root().sign(&message)).is_err());
    let other = Envelope::unsigned(&TrustPolicy { version: 3, ..policy_1() });
    assert!(unsigned.merged(&other).is_none());
}

#[test]
fn a_file_survives_a_mail_and_damage_is_noticed() {
    let policies = vec![sealed_policy_1()];
    let mesh = MeshFile {
        mesh: mesh(),
        policies,
        checkpoint: Some(token().checkpoint),
        keyservers: vec!["a:1".into()],
        reached: None,
    };
    let file = GrantRequests { mesh, requests: vec![join()] };
    let text = file.to_text();
    assert_eq!(GrantRequests::from_text(&text).unwrap(), file);
    let mailed = format!("Hello,\r\n\r\n  {}\r\nBye", text.replace('\n', "\r\n  "));
    assert_eq!(GrantRequests::from_text(&mailed).unwrap(), file);
    assert!(MeshFile::from_text(&text).is_err(), "another kind");
    let lines: Vec<&str> = text.lines().collect();
    assert!(GrantRequests::from_text(&[&lines[..2], &lines[3..]].concat().join("\n")).is_err());
    assert!(GrantRequests::from_text(&text.replace("-----END", "")).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn files_of_any_bytes_are_refused_or_read(bytes in proptest::collection::vec(any::<u8>(), 0..400), text in "\\PC{0,200}") {
        let _ = mesh_protocol::cbor::from_slice::<GrantRequests>(&bytes);
        let _ = GrantRequests::from_text(&text);
        let _ = MeshFile::from_text(&format!("-----BEGIN MESH-----\n{text}\n-----END MESH-----"));
    }

    #[test]
    fn no_changed_byte_of_a_file_is_believed(at in 0usize..10_000, to in any::<u8>()) {
        let file = MeshFile { mesh: mesh(), policies: vec![sealed_policy_1()], checkpoint: None, keyservers: Vec::new(), reached: None };
        let mut text = file.to_text().into_bytes();
        let at = at % text.len();
        text[at] = to;
        if let Ok(text) = String::from_utf8(text) && let Ok(read) = MeshFile::from_text(&text) {
            prop_assert_eq!(read, file);
        }
    }
}
