//! Each rule of trust, by the object that breaks it. After every refusal the view is as it was.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

mod support;

use mesh_protocol::envelope::{Envelope, EnvelopeError, Kind, NO_MESH};
use mesh_protocol::id::{Hash, MeshId};
use mesh_protocol::record::{
    Checkpoint, ClusterScope, Endpoints, EpochKey, Issuer, KemKey, NodeGrant, NodeRecord, PostQuantum, Revocation,
    TrustPolicy,
};
use mesh_protocol::trust::{Change, CheckpointVerdict, TrustError, View, compare_checkpoints};
use support::*;

macro_rules! refused {
    ($view:expr, $envelope:expr, $pattern:pat) => {
        let error = refuse($view, &$envelope);
        assert!(matches!(error, $pattern), "{error:?}");
    };
}

#[test]
fn a_chain_of_good_objects_is_accepted() {
    let mut view = with_node_1();
    assert_eq!(view.apply(&seal_grant(&grant(1))).unwrap(), Change::Nothing);
    assert_eq!(view.apply(&seal_record(1, &record(1))).unwrap(), Change::Nothing);
    let live = Envelope::seal(mesh(), &endpoints(1), &[&identity(1)]);
    assert_eq!(view.apply(&live).unwrap(), Change::Endpoints { node: node(1) });
    let checkpoint = Envelope::seal(mesh(), &checkpoint(), &[&keyserver()]);
    view.checkpoint(&checkpoint).unwrap();
    refused!(&mut view, checkpoint, TrustError::NotADirectoryObject(Kind::Checkpoint));
    assert_eq!(view.member_named(&name("n1")).unwrap().0, node(1));
    assert_eq!(view.holder_of("10.1.0.0/20".parse().unwrap()).unwrap().1, node(1));
}

#[test]
fn a_first_policy_is_of_the_pinned_mesh() {
    let pinned = |policy: &TrustPolicy| {
        let envelope = Envelope::seal(NO_MESH, policy, &[&root()]);
        View::pinned(MeshId(envelope.hash(NO_MESH).0), &[envelope]).map(|_| ())
    };
    pinned(&policy_1()).unwrap();
    assert!(matches!(View::pinned(MeshId([9; 32]), &[sealed_policy_1()]), Err(TrustError::OtherMesh { .. })));
    assert!(matches!(View::pinned(mesh(), &[]), Err(TrustError::PolicyOutOfOrder { .. })));
    let second = TrustPolicy { version: 2, ..policy_1() };
    assert!(matches!(pinned(&second), Err(TrustError::PolicyOutOfOrder { .. })));
    let unsigned = Envelope::seal(NO_MESH, &policy_1(), &[&issuer()]);
    let few = TrustError::Envelope(EnvelopeError::TooFewSignatures { got: 0, needed: 1 });
    assert_eq!(View::pinned(mesh(), &[unsigned]).unwrap_err(), few);
}

#[test]
fn invalid_policies_are_refused() {
    type Break = fn(&mut TrustPolicy);
    let cases: &[(&str, Break)] = &[
        ("threshold 0", |p| p.threshold = 0),
        ("threshold above roots", |p| p.threshold = 2),
        ("a root twice", |p| p.roots = vec![root().verify_key(); 2]),
        ("an issuer twice", |p| {
            let more = Issuer { clusters: vec![], ..p.issuers[0].clone() };
            p.issuers.push(more);
        }),
        ("too many roots", |p| p.roots = (0..17).map(|seed| key(seed).verify_key()).collect()),
        ("no keyserver", |p| p.keyservers.clear()),
        ("exposure too short", |p| p.exposure = 599),
        ("cluster twice", |p| p.issuers[0].clusters.push(cluster("east", "10.9.0.0/16"))),
        ("pools overlap", |p| p.issuers[0].clusters.push(cluster("north", "10.1.128.0/17"))),
        ("pool overlaps the mesh pool", |p| p.issuers[0].clusters.push(cluster("north", "100.100.128.0/17"))),
        ("two pools of one family", |p| {
            p.issuers[0].clusters[0].pools = vec!["10.3.0.0/16".parse().unwrap(), "10.4.0.0/16".parse().unwrap()];
        }),
        ("node prefix shorter than the pool", |p| p.issuers[0].clusters[0].node_prefix_v4 = 8),
        ("node prefix too long", |p| p.issuers[0].clusters[0].node_prefix_v4 = 31),
        ("everything as a pool", |p| p.issuers[0].clusters[0] = cluster("east", "0.0.0.0/0")),
        ("link-local pool", |p| p.issuers[0].clusters[0] = cluster("east", "169.254.0.0/20")),
        ("multicast pool", |p| p.issuers[0].clusters[0] = cluster("east", "ff02::/64")),
        ("IPv4-mapped pool", |p| p.issuers[0].clusters[0] = cluster("east", "::ffff:0:0/96")),
        ("mesh pool of everything", |p| p.mesh_pool = "0.0.0.0/0".parse().unwrap()),
        ("pool over the nodes' IPv6 addresses", |p| {
            let pools = vec![mesh_protocol::address::node_pool_v6(mesh()).into()];
            let scope = ClusterScope { pools, ..cluster("north", "10.9.0.0/16") };
            p.issuers[0].clusters.push(scope);
        }),
    ];
    for (what, change) in cases {
        let mut view = with_node_1();
        let policy = next_policy(&view, change);
        let error = refuse(&mut view, &policy);
        assert!(matches!(error, TrustError::InvalidPolicy { version: 2, .. }), "{what}: {error:?}");
    }
}

#[test]
fn policies_follow_each_other() {
    let mut view = view();
    let second = next_policy(&view, |p| p.exposure += 1);
    let other = next_policy(&view, |p| p.exposure += 2);
    let skipping = next_policy(&view, |p| p.version = 3);
    refused!(&mut view, skipping, TrustError::PolicyOutOfOrder { held: 1, got: 3 });
    let elsewhere = next_policy(&view, |p| p.previous = Some(Hash([1; 32])));
    refused!(&mut view, elsewhere, TrustError::PolicyOutOfOrder { held: 1, got: 2 });
    let zero = next_policy(&view, |p| p.version = 0);
    refused!(&mut view, zero, TrustError::PolicyOutOfOrder { .. });
    let by_issuer = Envelope::seal(mesh(), &second.unverified::<TrustPolicy>().unwrap(), &[&issuer()]);
    refused!(&mut view, by_issuer, TrustError::Envelope(EnvelopeError::TooFewSignatures { .. }));
    view.apply(&second).unwrap();
    assert_eq!(view.apply(&second).unwrap(), Change::Nothing);
    assert_eq!(view.apply(&sealed_policy_1()).unwrap(), Change::Nothing);
    refused!(&mut view, other, TrustError::Equivocation { kind: Kind::TrustPolicy, number: 2, .. });
}

#[test]
fn two_roots_of_three_have_to_sign() {
    let keys = [key(1), key(11), key(12)];
    let policy = TrustPolicy { roots: keys.iter().map(|k| k.verify_key()).collect(), threshold: 2, ..policy_1() };
    let first = Envelope::seal(NO_MESH, &policy, &[&keys[0], &keys[2]]);
    let mesh = MeshId(first.hash(NO_MESH).0);
    let mut view = View::pinned(mesh, &[first]).unwrap();
    let next = TrustPolicy { version: 2, previous: Some(view.policy_hash()), ..policy };
    let one = Envelope::seal(mesh, &next, &[&keys[1]]);
    refused!(&mut view, one, TrustError::Envelope(EnvelopeError::TooFewSignatures { got: 1, needed: 2 }));
    assert!(matches!(view.apply(&one.with_signature(mesh, &keys[0])), Ok(Change::Policy { version: 2, .. })));
}

#[test]
fn a_policy_that_no_longer_covers_a_member_drops_it_and_remembers_its_generation() {
    let mut view = with_node_1();
    let renewed = NodeGrant { generation: 2, tags: vec![], serial: 30, ..grant(1) };
    view.apply(&seal_grant(&renewed)).unwrap();
    let without = next_policy(&view, |p| {
        p.issuers[0].clusters.remove(0);
    });
    assert_eq!(view.apply(&without).unwrap(), Change::Policy { version: 2, dropped: vec![node(1)] });
    let again = next_policy(&view, |p| p.issuers[0].clusters.push(cluster("east", "10.1.0.0/16")));
    view.apply(&again).unwrap();
    refused!(&mut view, seal_grant(&grant(1)), TrustError::OldGeneration { held: 2, got: 1, .. });
    let twin = NodeGrant { serial: 31, ..renewed.clone() };
    refused!(&mut view, seal_grant(&twin), TrustError::Equivocation { kind: Kind::NodeGrant, .. });
    view.apply(&seal_grant(&renewed)).unwrap();
}

#[test]
fn a_member_that_comes_back_under_its_grant_does_not_go_back_to_an_older_record() {
    let mut view = with_node_1();
    let newer = NodeRecord { seq: 2, ..record(1) };
    view.apply(&seal_record(1, &newer)).unwrap();
    let east = view.policy().issuers[0].clusters[0].clone();
    let without = next_policy(&view, |p| {
        p.issuers[0].clusters.remove(0);
    });
    view.apply(&without).unwrap();
    refused!(&mut view, seal_record(1, &newer), TrustError::NoGrant(_));
    let again = next_policy(&view, |p| p.issuers[0].clusters.push(east));
    view.apply(&again).unwrap();
    view.apply(&seal_grant(&grant(1))).unwrap();
    refused!(&mut view, seal_record(1, &record(1)), TrustError::OldSeq { held: 2, got: 1, .. });
    assert_eq!(view.apply(&seal_record(1, &newer)).unwrap(), Change::Nothing, "what it said is there");
}

#[test]
fn grants_outside_the_issuers_scope_are_refused() {
    type Break = fn(&mut NodeGrant);
    let cases: &[(&str, Break)] = &[
        ("another cluster", |g| g.cluster = name("north")),
        ("IPv6 address of another node", |g| g.mesh_v6 = grant(2).mesh_v6),
        ("mesh address outside the pool", |g| g.mesh_v4 = "10.0.0.1".parse().unwrap()),
        ("too long a life", |g| g.expires = g.issued + 91 * 86_400),
        ("expired when issued", |g| g.expires = g.issued),
        ("a foreign tag", |g| g.tags.push(name("admin"))),
        ("CIDR of another cluster", |g| g.pod_cidrs = vec!["10.2.0.0/24".parse().unwrap()]),
        ("CIDR wider than the pool", |g| g.pod_cidrs = vec!["10.0.0.0/8".parse().unwrap()]),
        ("everything", |g| g.pod_cidrs = vec!["0.0.0.0/0".parse().unwrap()]),
        ("own CIDRs overlap", |g| g.pod_cidrs.push("10.1.1.128/25".parse().unwrap())),
        ("too many CIDRs", |g| {
            g.pod_cidrs = (0..17).map(|n| format!("10.1.{}.0/24", 100 + n).parse().unwrap()).collect();
        }),
    ];
    for (what, change) in cases {
        let mut changed = grant(1);
        change(&mut changed);
        let error = refuse(&mut view(), &seal_grant(&changed));
        assert!(matches!(error, TrustError::OutOfScope { .. }), "{what}: {error:?}");
    }
    let by_root = Envelope::seal(mesh(), &grant(1), &[&root()]);
    refused!(&mut view(), by_root, TrustError::Envelope(EnvelopeError::TooFewSignatures { .. }));
}

#[test]
fn a_required_preshared_key_cannot_be_granted_away() {
    let mut view = with_node_1();
    assert!(!view.requires_post_quantum(&grant(1), &grant(2)));
    let wanted = NodeGrant { pq: PostQuantum::Required, ..grant(2) };
    assert!(view.requires_post_quantum(&grant(1), &wanted) && view.requires_post_quantum(&wanted, &grant(1)));
    // The policy puts nobody out by it, and no grant, older or newer, takes it back.
    let required = next_policy(&view, |p| p.pq = PostQuantum::Required);
    assert_eq!(view.apply(&required).unwrap(), Change::Policy { version: 2, dropped: vec![] });
    view.apply(&seal_grant(&NodeGrant { generation: 2, pq: PostQuantum::Off, ..grant(1) })).unwrap();
    assert!(view.member(node(1)).is_some() && view.requires_post_quantum(&grant(1), &grant(2)));
}

#[test]
fn generations_rise() {
    let mut view = with_node_1();
    let second = NodeGrant { generation: 2, ..grant(1) };
    let twin = NodeGrant { tags: vec![], ..grant(1) };
    refused!(&mut view, seal_grant(&twin), TrustError::Equivocation { kind: Kind::NodeGrant, number: 1, .. });
    view.apply(&seal_grant(&second)).unwrap();
    refused!(&mut view, seal_grant(&twin), TrustError::OldGeneration { held: 2, got: 1, .. });
    assert!(view.member(node(1)).unwrap().record.is_some(), "a renewal keeps the record");
}

#[test]
fn a_record_survives_renewals_and_a_rebuild_of_the_view() {
    let mut view = with_node_1();
    for generation in 2..5 {
        view.apply(&seal_grant(&NodeGrant { generation, ..grant(1) })).unwrap();
    }
    let envelopes: Vec<Envelope> = view.envelopes().cloned().collect();
    let mut rebuilt = View::pinned(mesh(), &envelopes[..1]).unwrap();
    for envelope in &envelopes {
        rebuilt.apply(envelope).unwrap();
        assert_eq!(view.apply(envelope).unwrap(), Change::Nothing, "a full map changes nothing");
    }
    assert_eq!(rebuilt.member(node(1)), view.member(node(1)));
    let stale = NodeRecord { seq: 2, grant: Hash([1; 32]), ..record(1) };
    refused!(&mut view, seal_record(1, &stale), TrustError::OtherGrant { .. });
}

#[test]
fn the_lower_serial_wins_a_collision() {
    let mut view = with_node_1();
    let named = NodeGrant { name: name("n1"), ..grant(2) };
    refused!(&mut view, seal_grant(&named), TrustError::NameTaken { .. });
    for cidr in ["10.1.1.0/24", "10.1.1.64/26", "10.1.0.0/20"] {
        let overlapping = NodeGrant { pod_cidrs: vec![cidr.parse().unwrap()], ..grant(2) };
        refused!(&mut view, seal_grant(&overlapping), TrustError::PrefixTaken { .. });
        let earlier = NodeGrant { serial: 0, ..overlapping };
        let change = view.clone().apply(&seal_grant(&earlier)).unwrap();
        assert_eq!(change, Change::Grant { node: node(2), displaced: vec![node(1)] });
    }
    let address = NodeGrant { mesh_v4: grant(1).mesh_v4, ..grant(2) };
    refused!(&mut view, seal_grant(&address), TrustError::PrefixTaken { .. });
}

#[test]
fn records_follow_each_other_and_keep_to_their_keys() {
    type Break = fn(&mut NodeRecord);
    let invalid: &[(&str, Break)] = &[
        ("no lane", |r| r.lanes = 0),
        ("nine lanes", |r| r.lanes = 9),
        ("seq above 2^63", |r| r.seq = 1 << 63),
        ("previous of no earlier epoch", |r| r.previous = Some(epoch_key(7, 1))),
        ("spare of no later epoch", |r| r.spare = epoch_key(1, 1)),
        ("one key twice", |r| r.spare.key = r.current.key),
        ("wrong predecessor", |r| r.before = Some(Hash([3; 32]))),
        ("another key in an epoch", |r| r.current = epoch_key(7, 1)),
        ("another KEM key in an epoch", |r| r.kem = record(7).kem),
        ("older keys", |r| {
            r.current = epoch_key(1, 0);
            r.spare = epoch_key(1, 1);
        }),
    ];
    for (what, change) in invalid {
        let mut changed = NodeRecord { seq: 2, ..record(1) };
        change(&mut changed);
        let error = refuse(&mut with_node_1(), &seal_record(1, &changed));
        assert!(matches!(error, TrustError::InvalidRecord { .. }), "{what}: {error:?}");
    }
    let mut view = with_node_1();
    refused!(&mut view, seal_record(2, &record(1)), TrustError::Envelope(EnvelopeError::TooFewSignatures { .. }));
    refused!(&mut view, seal_record(2, &record(2)), TrustError::NoGrant(_));
    let twin = NodeRecord { lanes: 2, ..record(1) };
    refused!(&mut view, seal_record(1, &twin), TrustError::Equivocation { kind: Kind::NodeRecord, number: 1, .. });
    let older = NodeRecord { seq: 0, ..record(1) };
    refused!(&mut view, seal_record(1, &older), TrustError::OldSeq { held: 1, got: 0, .. });
}

#[test]
fn a_key_has_one_holder_also_when_retired() {
    let mut view = with_node_1();
    let rotated = NodeRecord {
        seq: 2,
        current: epoch_key(1, 3),
        spare: epoch_key(1, 4),
        kem: KemKey { epoch: 2, key: record(8).kem.key },
        ..record(1)
    };
    view.apply(&seal_record(1, &rotated)).unwrap();
    view.apply(&seal_grant(&grant(2))).unwrap();
    for epoch in 1..5 {
        let copied = NodeRecord { current: epoch_key(1, epoch), ..record(2) };
        let copied = NodeRecord { current: EpochKey { epoch: 1, ..copied.current }, ..copied };
        refused!(&mut view, seal_record(2, &copied), TrustError::KeyTaken { .. });
    }
    let copied = NodeRecord { kem: record(1).kem, ..record(2) };
    refused!(&mut view, seal_record(2, &copied), TrustError::KeyTaken { .. });
    let mut rebuilt = support::view();
    rebuilt.restore_key_holders(view.key_holders());
    rebuilt.apply(&seal_grant(&grant(2))).unwrap();
    refused!(&mut rebuilt, seal_record(2, &copied), TrustError::KeyTaken { .. });
}

#[test]
fn endpoints_are_bounded_and_rise() {
    let seal = |endpoints: &_| Envelope::seal(mesh(), endpoints, &[&identity(1)]);
    let mut view = with_node_1();
    view.apply(&seal(&endpoints(1))).unwrap();
    let older = Endpoints { seq: 1, ..endpoints(1) };
    refused!(&mut view, seal(&older), TrustError::OldSeq { kind: Kind::Endpoints, .. });
    let twin = Endpoints { candidates: vec![], ..endpoints(1) };
    refused!(&mut view, seal(&twin), TrustError::Equivocation { kind: Kind::Endpoints, .. });
    for bad in ["0.0.0.0:1", "224.0.0.1:1", "255.255.255.255:1", "[::]:1", "[ff02::1]:1", "[::ffff:10.1.1.1]:1"] {
        let candidates = vec![bad.parse().unwrap()];
        let bad = Endpoints { seq: NOW * 1000 + 1, candidates, ..endpoints(1) };
        refused!(&mut view, seal(&bad), TrustError::InvalidRecord { .. });
    }
    let candidates = vec!["192.0.2.1:1".parse().unwrap(); 17];
    let many = Endpoints { seq: NOW * 1000 + 1, candidates, ..endpoints(1) };
    refused!(&mut view, seal(&many), TrustError::InvalidRecord { .. });
}

#[test]
fn revocations_form_a_chain_for_each_revoker() {
    let mut view = with_node_1();
    let first = seal_revocation(&revocation(1));
    let gap = Revocation { number: 2, previous: None, ..revocation(1) };
    refused!(&mut view, seal_revocation(&gap), TrustError::RevocationGap { held: 0, got: 2, .. });
    let zero = Revocation { number: 0, ..revocation(1) };
    refused!(&mut view, seal_revocation(&zero), TrustError::RevocationGap { .. });
    let long = Revocation { reason: "x".repeat(257), ..revocation(1) };
    refused!(&mut view, seal_revocation(&long), TrustError::InvalidRevocation { .. });
    let by_issuer = Envelope::seal(mesh(), &revocation(1), &[&issuer()]);
    refused!(&mut view, by_issuer, TrustError::Envelope(EnvelopeError::TooFewSignatures { .. }));
    assert_eq!(view.apply(&first).unwrap(), Change::Revoked { node: node(1), was_member: true });
    assert_eq!(view.apply(&first).unwrap(), Change::Nothing);
    assert!(view.member(node(1)).is_none() && view.holder_of(grant(1).pod_cidrs[0]).is_none());
    let twin = Revocation { node: node(2), ..revocation(1) };
    refused!(&mut view, seal_revocation(&twin), TrustError::Equivocation { kind: Kind::Revocation, .. });
    let fork = Revocation { number: 2, previous: Some(Hash([1; 32])), ..revocation(2) };
    refused!(&mut view, seal_revocation(&fork), TrustError::RevocationGap { .. });
    refused!(&mut view, seal_grant(&grant(1)), TrustError::Revoked { .. });
    refused!(&mut view, seal_record(1, &record(1)), TrustError::NoGrant(_));
}

#[test]
fn a_grant_lifts_the_revocation_in_force_and_no_other() {
    let mut view = with_node_1();
    let first = seal_revocation(&revocation(1));
    view.apply(&first).unwrap();
    let lift = |generation, hash| NodeGrant { generation, lifts: hash, ..grant(1) };
    let first_hash = Some(first.hash(mesh()));
    for refused in [lift(2, None), lift(2, Some(Hash([1; 32]))), lift(1, first_hash)] {
        refused!(&mut view, seal_grant(&refused), TrustError::Revoked { .. } | TrustError::Equivocation { .. });
    }
    view.apply(&seal_grant(&lift(2, first_hash))).unwrap();
    refused!(&mut view, seal_record(1, &record(1)), TrustError::OtherGrant { .. });
    let second = Revocation { number: 2, previous: first_hash, up_to_generation: 2, ..revocation(1) };
    view.apply(&seal_revocation(&second)).unwrap();
    // The issuer did not hear of the second: its renewal still names the first.
    refused!(&mut view, seal_grant(&lift(3, first_hash)), TrustError::Revoked { up_to_generation: 2, .. });
    view.apply(&seal_grant(&lift(3, Some(seal_revocation(&second).hash(mesh()))))).unwrap();
}

#[test]
fn grant_and_revocation_end_alike_in_either_order() {
    let renewed = seal_grant(&NodeGrant { generation: 2, ..grant(1) });
    let revoked = seal_revocation(&revocation(1));
    let mut one = with_node_1();
    one.apply(&renewed).unwrap();
    assert_eq!(one.apply(&revoked).unwrap(), Change::Revoked { node: node(1), was_member: true });
    let mut other = with_node_1();
    other.apply(&revoked).unwrap();
    refused!(&mut other, renewed, TrustError::Revoked { .. });
}

#[test]
fn whom_a_retired_revoker_revoked_stays_revoked() {
    let mut view = with_node_1();
    view.apply(&seal_revocation(&revocation(1))).unwrap();
    let policy = next_policy(&view, |p| p.revokers = vec![key(13).verify_key()]);
    view.apply(&policy).unwrap();
    let policies: Vec<Envelope> = view.policies().iter().map(|policy| policy.envelope.clone()).collect();
    let mut joined = View::pinned(mesh(), &policies).unwrap();
    for envelope in view.envelopes() {
        joined.apply(envelope).unwrap();
    }
    refused!(&mut joined, seal_grant(&grant(1)), TrustError::Revoked { .. });
    let other = Envelope::seal(mesh(), &revocation(2), &[&key(13)]);
    joined.apply(&other).unwrap();
    assert_eq!(joined.revocation_heads().len(), 2);
    let both = Revocation { number: 2, previous: None, ..revocation(2) };
    let both = Envelope::seal(mesh(), &both, &[&key(13), &revoker()]);
    refused!(&mut joined, both, TrustError::InvalidRevocation { .. });
}

#[test]
fn checkpoints_are_compared() {
    let held = checkpoint();
    let case = |change: fn(&mut Checkpoint)| {
        let mut got = checkpoint();
        change(&mut got);
        compare_checkpoints(&held, &got)
    };
    assert_eq!(case(|_| ()), CheckpointVerdict::Newer);
    assert_eq!(case(|c| c.position.revision += 1), CheckpointVerdict::Newer);
    assert_eq!(case(|c| c.position.revision -= 1), CheckpointVerdict::Stale);
    assert_eq!(case(|c| c.position = support::checkpoint().position), CheckpointVerdict::Newer);
    assert_eq!(case(|c| c.position.epoch += 1), CheckpointVerdict::Newer);
    assert_eq!(case(|c| c.policy_version = 0), CheckpointVerdict::Stale);
    assert_eq!(case(|c| c.revocations.clear()), CheckpointVerdict::Stale);
    assert_eq!(case(|c| c.state = Hash([0; 32])), CheckpointVerdict::Equivocation);
    assert_eq!(case(|c| c.revocations[0].hash = Hash([0; 32])), CheckpointVerdict::Equivocation);
}
