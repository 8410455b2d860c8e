//! An issuer's key takes the place of another: what of the former one stands, and what a thief of it can do.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

mod support;

use mesh_protocol::envelope::Envelope;
use mesh_protocol::id::{Hash, NodeId};
use mesh_protocol::key::SigningKey;
use mesh_protocol::offline::{GrantReason, GrantRequest, Memory};
use mesh_protocol::record::{FormerKey, Issuer, NodeGrant, NodeRecord, TrustPolicy};
use mesh_protocol::trust::{Change, RequestError, TrustError, View};
use proptest::prelude::*;
use support::*;

fn successor() -> SigningKey {
    key(20)
}

fn seal_by(grant: &NodeGrant, signer: &SigningKey) -> Envelope {
    Envelope::seal(mesh(), grant, &[signer])
}

/// The policy in which another key has the issuer's place, and its key before stands as far as said.
fn replaced(view: &View, generation: u64, serial: u64) -> Envelope {
    next_policy(view, |policy| {
        let held = &mut policy.issuers[0];
        held.former = vec![FormerKey { key: held.key, generation, serial }];
        held.key = successor().verify_key();
    })
}

fn without_former(view: &View) -> Envelope {
    next_policy(view, |policy| policy.issuers[0].former.clear())
}

/// Two members with records, generation 1, serials 1 and 2.
fn members() -> View {
    let mut view = view();
    for n in [1, 2] {
        view.apply(&seal_grant(&grant(n))).unwrap();
        view.apply(&seal_record(n, &record(n))).unwrap();
    }
    view
}

fn renewed(n: u8) -> NodeGrant {
    NodeGrant { generation: 2, ..grant(n) }
}

#[track_caller]
fn refuse(view: &mut View, envelope: &Envelope, words: &str) {
    let error = support::refuse(view, envelope);
    assert!(error.to_string().contains(words), "{error}");
}

#[test]
fn a_planned_change_puts_nobody_out_at_any_step() {
    let mut view = members();
    let policy = replaced(&view, 1, 2);
    assert_eq!(view.apply(&policy).unwrap(), Change::Policy { version: 2, dropped: vec![] });
    assert!(view.is_former(&grant(1)) && view.next_generation(node(1), &name("east")) == 2);
    for n in [1, 2] {
        view.apply(&seal_by(&renewed(n), &successor())).unwrap();
        let member = view.member(node(n)).unwrap();
        assert!(member.record.is_some() && !member.speaks_under_its_grant(), "what it said stays good");
        assert!(!view.is_former(&member.grant.object));
    }
    let spoken = NodeRecord { seq: 2, grant: seal_by(&renewed(1), &successor()).hash(mesh()), ..record(1) };
    view.apply(&seal_record(1, &spoken)).unwrap();
    let last = without_former(&view);
    assert_eq!(view.apply(&last).unwrap(), Change::Policy { version: 3, dropped: vec![] });
    let silent = view.member(node(2)).unwrap();
    assert!(silent.record.is_some(), "also of a node that was away");
    // Who starts afresh hears nothing that it would have to refuse: the silent node's word comes when that node does.
    let policies: Vec<Envelope> = view.policies().iter().map(|policy| policy.envelope.clone()).collect();
    let mut fresh = View::pinned(mesh(), &policies).unwrap();
    view.envelopes().for_each(|envelope| drop(fresh.apply(envelope).unwrap()));
    assert_eq!(fresh.members().count(), 2);
    assert!(fresh.member(node(1)).unwrap().record.is_some() && fresh.member(node(2)).unwrap().record.is_none());
}

#[test]
fn who_starts_afresh_in_between_takes_what_stands() {
    let mut view = members();
    view.apply(&replaced(&view, 1, 2)).unwrap();
    view.apply(&seal_by(&renewed(1), &successor())).unwrap();
    let policies: Vec<Envelope> = view.policies().iter().map(|policy| policy.envelope.clone()).collect();
    let mut fresh = View::pinned(mesh(), &policies).unwrap();
    view.envelopes().for_each(|envelope| drop(fresh.apply(envelope).unwrap()));
    for n in [1, 2] {
        assert_eq!(fresh.member(node(n)), view.member(node(n)));
    }
}

#[test]
fn what_a_thief_of_the_former_key_signs_is_bounded() {
    let mut view = members();
    view.apply(&replaced(&view, 1, 2)).unwrap();
    let thief = issuer();
    refuse(&mut view, &seal_by(&grant(3), &thief), "was replaced by trust policy 2");
    for generation in [2, 3, u64::MAX] {
        let widened = NodeGrant { generation, tags: vec![name("db"), name("web")], ..grant(1) };
        refuse(&mut view, &seal_by(&widened, &thief), "stands up to generation 1 and serial 2");
    }
    // Within the numbers he can take a place that nobody has been granted anew; the successor's word puts him out.
    let intruder = NodeGrant { serial: 0, pod_cidrs: grant(1).pod_cidrs, ..grant(3) };
    let change = view.apply(&seal_by(&intruder, &thief)).unwrap();
    assert_eq!(change, Change::Grant { node: node(3), displaced: vec![node(1)] });
    let change = view.apply(&seal_by(&renewed(1), &successor())).unwrap();
    assert_eq!(change, Change::Grant { node: node(1), displaced: vec![node(3)] });
    refuse(&mut view, &seal_by(&NodeGrant { serial: 0, ..grant(3) }, &thief), "");
    refuse(&mut view, &seal_by(&grant(1), &thief), "generation");
    // Both are granted anew, and the policy forgets the key: it is good for nothing.
    view.apply(&seal_by(&renewed(2), &successor())).unwrap();
    view.apply(&without_former(&view)).unwrap();
    let free = NodeGrant { serial: 0, generation: 9, ..grant(4) };
    refuse(&mut view, &seal_by(&free, &thief), "was removed by trust policy 3");
}

#[test]
fn the_successor_grants_above_what_stands_and_never_below() {
    let mut view = members();
    view.apply(&replaced(&view, 7, 2)).unwrap();
    for generation in [0, 1, 7] {
        refuse(&mut view, &seal_by(&NodeGrant { generation, ..grant(3) }, &successor()), "generation");
    }
    refuse(&mut view, &seal_by(&NodeGrant { generation: 1 << 63, ..grant(3) }, &successor()), "out of range");
    view.apply(&seal_by(&NodeGrant { generation: 8, ..grant(3) }, &successor())).unwrap();
    assert_eq!(view.next_generation(node(9), &name("east")), 8);
}

#[test]
fn tokens_of_a_former_key_open_nothing() {
    let mut view = members();
    let limits = token().limits;
    view.token_limits(&limits).unwrap();
    view.apply(&replaced(&view, 1, 2)).unwrap();
    view.token_limits(&limits).unwrap_err();
    let signature = claim().sign(&token_secret(), &support::messages::EXPORTER);
    let exporter = support::messages::EXPORTER;
    let reason = GrantReason::Join { claim: claim(), exporter, signature, limits };
    let request = GrantRequest { grant: NodeGrant { generation: 2, ..grant(1) }, reason, until: NOW + 60 };
    assert!(matches!(view.check_request(&request, NOW), Err(RequestError::Token { .. })));
}

#[test]
fn of_a_stolen_key_nothing_stands_and_its_nodes_come_back_with_what_they_said() {
    let mut view = members();
    // The thief has used up the generations of one node already.
    let last = NodeGrant { generation: (1 << 63) - 1, ..grant(1) };
    view.apply(&seal_grant(&last)).unwrap();
    view.apply(&replaced(&view, 0, 0)).unwrap();
    assert_eq!(view.members().count(), 0);
    let fallen: Vec<NodeId> = view.fallen().map(|(node, _)| *node).collect();
    assert!(fallen.contains(&node(1)) && fallen.contains(&node(2)));
    refuse(&mut view, &seal_grant(&grant(2)), "was replaced by trust policy 2, as stolen");
    for n in [1, 2] {
        let generation = view.next_generation(node(n), &name("east"));
        view.apply(&seal_by(&NodeGrant { generation, ..grant(n) }, &successor())).unwrap();
        assert!(view.member(node(n)).unwrap().record.is_some(), "tunnels go on with the same keys");
    }
    assert_eq!(view.fallen().count(), 0);
    refuse(&mut view, &seal_grant(&last), "as stolen");
}

#[test]
fn a_revoked_node_does_not_come_back_by_a_fall() {
    let mut view = members();
    view.apply(&seal_revocation(&revocation(1))).unwrap();
    view.apply(&replaced(&view, 0, 0)).unwrap();
    assert_eq!(view.fallen().map(|(node, _)| *node).collect::<Vec<_>>(), [node(2)]);
    let again = NodeGrant { generation: 2, ..grant(1) };
    let error = view.apply(&seal_by(&again, &successor())).unwrap_err();
    assert!(matches!(error, TrustError::Revoked { .. }), "{error}");
    // Revoked while it is out: it does not wait any more.
    let second = mesh_protocol::record::Revocation {
        number: 2,
        previous: Some(seal_revocation(&revocation(1)).hash(mesh())),
        ..revocation(2)
    };
    view.apply(&seal_revocation(&second)).unwrap();
    assert_eq!(view.fallen().count(), 0);
}

#[test]
fn former_keys_have_one_place_and_granted_before() {
    type Break = fn(&mut TrustPolicy);
    fn former(seed: u8) -> FormerKey {
        FormerKey { key: key(seed).verify_key(), generation: 1, serial: 1 }
    }
    let cases: &[(&str, Break)] = &[
        ("present and former", |p| p.issuers[0].former = vec![former(2)]),
        ("never an issuer", |p| p.issuers[0].former = vec![former(30)]),
        ("former of two", |p| {
            let other =
                Issuer { key: key(21).verify_key(), clusters: vec![], former: vec![former(2)], ..p.issuers[0].clone() };
            p.issuers[0].key = successor().verify_key();
            p.issuers[0].former = vec![former(2)];
            p.issuers.push(other);
        }),
        ("too many", |p| {
            p.issuers[0].key = successor().verify_key();
            p.issuers[0].former = vec![former(2), former(31), former(32)];
        }),
        ("no generation left", |p| {
            p.issuers[0].key = successor().verify_key();
            p.issuers[0].former = vec![FormerKey { generation: u64::MAX, ..former(2) }];
        }),
    ];
    for (what, change) in cases {
        let mut view = members();
        let policy = next_policy(&view, change);
        let error = view.apply(&policy).unwrap_err();
        assert!(matches!(error, TrustError::InvalidPolicy { .. }), "{what}: {error}");
    }
    let mut view = members();
    let good = replaced(&view, 1, 2);
    let other = replaced(&view, 1, 3);
    view.apply(&good).unwrap();
    assert!(matches!(view.apply(&other), Err(TrustError::Equivocation { .. })), "two successors are two truths");
}

fn renewal(view: &View, held: &Envelope, n: u8, generation: u64) -> GrantRequest {
    let grant = NodeGrant { generation, issued: NOW + 60, expires: NOW + 86_400, ..grant(n) };
    assert_eq!(view.mesh(), mesh());
    GrantRequest { grant, reason: GrantReason::Renewal { held: held.clone() }, until: NOW + 7 * 86_400 }
}

#[test]
fn the_successor_renews_what_stands_and_is_told_what_was_stolen() {
    let policies = |view: &View| {
        let policies: Vec<Envelope> = view.policies().iter().map(|policy| policy.envelope.clone()).collect();
        View::pinned(mesh(), &policies).unwrap()
    };
    let mut planned = members();
    planned.apply(&replaced(&planned, 4, 2)).unwrap();
    // A machine without a network sees the policies only.
    let desk = policies(&planned);
    let request = renewal(&desk, &seal_grant(&grant(1)), 1, 5);
    assert_eq!(desk.check_request(&request, NOW).unwrap().key, successor().verify_key());
    assert!(!desk.is_regrant(&request));
    assert!(desk.check_request(&renewal(&desk, &seal_grant(&grant(1)), 1, 2), NOW).is_err(), "below the floor");
    let beyond = NodeGrant { serial: 9, ..grant(1) };
    let mut forged = renewal(&desk, &seal_grant(&beyond), 1, 5);
    forged.grant.serial = 9;
    assert!(desk.check_request(&forged, NOW).is_err(), "signed by a thief after the change");
    assert_eq!(Memory::first(&desk).serial, 2, "places given before are not given again");

    let mut stolen = members();
    stolen.apply(&replaced(&stolen, 0, 0)).unwrap();
    let desk = policies(&stolen);
    let request = renewal(&desk, &seal_grant(&grant(1)), 1, 1);
    desk.check_request(&request, NOW).unwrap();
    assert!(desk.is_regrant(&request), "a person has to look");
    let foreign = renewal(&desk, &seal_by(&grant(1), &key(40)), 1, 1);
    assert!(desk.check_request(&foreign, NOW).is_err() && !desk.is_regrant(&foreign));
}

#[derive(Debug, Clone)]
struct Word {
    node: u8,
    generation: u64,
    serial: u64,
    block: u8,
    by: u8,
}

fn word() -> impl Strategy<Value = Word> {
    (1u8..5, 1u64..9, 0u64..6, 1u8..4, 0u8..2).prop_map(|(node, generation, serial, block, by)| Word {
        node,
        generation,
        serial,
        block,
        by,
    })
}

impl Word {
    fn envelope(&self) -> Envelope {
        let pod_cidrs = vec![format!("10.1.{}.0/24", self.block).parse().unwrap()];
        let grant = NodeGrant { generation: self.generation, serial: self.serial, pod_cidrs, ..grant(self.node) };
        seal_by(&grant, &if self.by == 0 { issuer() } else { successor() })
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever else was signed, by whomever, and in whichever order it comes: where the successor granted one grant to
    /// each node, on places of their own, those stand in the end, and nobody of the former key is in their way.
    #[test]
    fn the_successors_word_stands_whatever_a_thief_says(
        words in prop::collection::vec(word(), 0..24),
        order in prop::collection::vec(any::<prop::sample::Index>(), 4),
    ) {
        const FLOOR: u64 = 4;
        let mut view = view();
        view.apply(&replaced(&view, FLOOR, 5)).unwrap();
        let honest = |n: u8| seal_by(&NodeGrant { generation: FLOOR + 1, ..grant(n) }, &successor());
        let mut all: Vec<Envelope> = words.iter().filter(|word| word.by == 0).map(Word::envelope).collect();
        for (n, at) in (1u8..5).zip(&order) {
            let at = at.index(all.len() + 1);
            all.insert(at, honest(n));
        }
        for envelope in &all {
            let _ = view.apply(envelope);
            for (_, member) in view.members() {
                let (grant, signers) = (&member.grant.object, member.grant.envelope.signers().collect::<Vec<_>>());
                let by_former = signers.contains(&issuer().verify_key().id());
                prop_assert_eq!(view.is_former(grant), by_former, "generations tell whose word it is");
                prop_assert!(!by_former || (grant.generation <= FLOOR && grant.serial <= 5));
            }
        }
        let held: Vec<Hash> = view.members().map(|(_, member)| member.grant.hash).collect();
        for n in 1u8..5 {
            prop_assert!(held.contains(&honest(n).hash(mesh())), "n{} is out", n);
        }
        prop_assert_eq!(held.len(), 4);
    }
}

#[test]
fn an_identity_key_goes_on_over_a_change_of_issuers() {
    // One that the former key granted to hands over by the present one's grant.
    let mut view = members();
    view.apply(&replaced(&view, 1, 2)).unwrap();
    let next = succeeded(1, &[2]);
    let reason = GrantReason::Succession { held: seal_grant(&grant(1)) };
    let request = GrantRequest { grant: next.clone(), reason, until: NOW + 60 };
    assert_eq!(view.check_request(&request, NOW).unwrap().key, successor().verify_key());
    view.apply(&seal_by(&next, &successor())).unwrap();

    // What fell is granted anew under the key that the node has, not under one it gave up.
    let mut view = members();
    view.apply(&seal_grant(&next)).unwrap();
    view.apply(&replaced(&view, 0, 0)).unwrap();
    assert!(view.member(node(1)).is_none());
    refuse(&mut view, &seal_by(&grant(1), &successor()), "does not carry on the node's identity");
    view.apply(&seal_by(&NodeGrant { generation: 1, ..next }, &successor())).unwrap();
    let key = later_identity(1, 2).verify_key();
    assert_eq!(view.member_with(&key).map(|(node, _)| node), Some(node(1)));
}
