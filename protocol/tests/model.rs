//! A [`View`] beside a slow model: random sequences of good and bad grants, records, revocations and policies.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

mod support;

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;
use mesh_protocol::envelope::Envelope;
use mesh_protocol::id::{Hash, NodeId};
use mesh_protocol::record::{EpochKey, NodeGrant, NodeRecord, Revocation};
use mesh_protocol::trust::{TrustError, View};
use proptest::prelude::*;
use support::*;

#[derive(Debug, Clone)]
enum Step {
    Grant { node: u8, generation: u64, name: u8, block: u8, prefix: u8, serial: u64, lifts: bool, forged: bool },
    Record { node: u8, seq: u64, key_of: u8, epoch: u64, forged: bool },
    Revoke { node: u8, up_to: u64, forged: bool },
    Policy { east: bool },
}

fn step() -> impl Strategy<Value = Step> {
    let (node, rare) = (0u8..4, || prop::bool::weighted(0.1));
    prop_oneof![
        5 => (node.clone(), 1u64..6, 0u8..4, 0u8..4, 22u8..26, 0u64..9, any::<bool>(), rare()).prop_map(
            |(node, generation, name, block, prefix, serial, lifts, forged)| {
                Step::Grant { node, generation, name, block, prefix, serial, lifts, forged }
            }
        ),
        4 => (node.clone(), 0u64..6, 0u8..4, 1u64..4, rare())
            .prop_map(|(node, seq, key_of, epoch, forged)| Step::Record { node, seq, key_of, epoch, forged }),
        1 => (node, 1u64..5, rare()).prop_map(|(node, up_to, forged)| Step::Revoke { node, up_to, forged }),
        1 => any::<bool>().prop_map(|east| Step::Policy { east }),
    ]
}

/// What has to hold, written down the slow way from what the view accepted.
#[derive(Default)]
struct Model {
    /// Each revocation accepted: node, generation, hash.
    revoked: Vec<(NodeId, u64, Hash)>,
    generations: BTreeMap<NodeId, u64>,
    keys: BTreeMap<[u8; 32], NodeId>,
    chain: Option<(u64, Hash)>,
}

impl Model {
    fn may_be_member(&self, grant: &NodeGrant) -> bool {
        let mine: Vec<_> = self.revoked.iter().filter(|(node, ..)| *node == grant.node).collect();
        let Some(up_to) = mine.iter().map(|(_, up_to, _)| *up_to).max() else { return true };
        let in_force = mine.iter().filter(|(_, reach, _)| *reach == up_to);
        grant.generation > up_to && in_force.into_iter().any(|(.., hash)| grant.lifts == Some(*hash))
    }

    fn check(&self, view: &View) {
        let (mut names, mut prefixes, mut shown) = (BTreeSet::new(), Vec::<(IpNet, NodeId)>::new(), BTreeMap::new());
        for (node, member) in view.members() {
            let grant = &member.grant.object;
            assert!(self.may_be_member(grant), "a revoked node is a member");
            assert_eq!(grant.generation, self.generations[node], "an older generation holds");
            assert!(names.insert(grant.name.clone()), "two nodes of one name");
            for prefix in grant.prefixes() {
                let meets = |(other, _): &&(IpNet, NodeId)| other.contains(&prefix) || prefix.contains(other);
                assert_eq!(prefixes.iter().find(meets), None, "{prefix} is held twice");
                prefixes.push((prefix, *node));
                assert_eq!(view.holder_of(prefix), Some((prefix, *node)));
            }
            assert!(view.policy().cluster(&grant.cluster).is_some(), "a member the policy does not cover");
            assert_eq!(view.member_named(&grant.name).map(|(node, _)| node), Some(*node));
            for key in member.record.iter().flat_map(|record| record.object.tunnel_keys()) {
                assert_eq!(shown.insert(*key.key.as_bytes(), *node), None, "a key is held twice");
                assert_eq!(self.keys.get(key.key.as_bytes()), Some(node), "a key changed hands");
            }
        }
    }
}

fn envelope(step: &Step, view: &View, model: &Model) -> Envelope {
    match *step {
        Step::Grant { node: n, generation, name: named, block, prefix, serial, lifts, forged } => {
            let cidr: ipnet::Ipv4Net = format!("10.1.{}.0/{prefix}", 2 * block).parse().unwrap();
            let lifted = model.revoked.iter().rev().find(|(who, ..)| *who == node(n));
            let grant = NodeGrant {
                generation,
                name: name(&format!("n{named}")),
                pod_cidrs: vec![cidr.trunc().into()],
                serial,
                lifts: lifted.filter(|_| lifts).map(|(.., hash)| *hash),
                ..grant(n)
            };
            Envelope::seal(mesh(), &grant, &[&if forged { root() } else { issuer() }])
        }
        Step::Record { node: n, seq, key_of, epoch, forged } => {
            let held = view.member(node(n)).map_or(Hash([0; 32]), |member| member.grant.hash);
            let current = EpochKey { epoch, key: tunnel_key(key_of, epoch) };
            let record = NodeRecord { seq, grant: held, current, spare: epoch_key(n, epoch + 1), ..record(n) };
            Envelope::seal(mesh(), &record, &[&if forged { issuer() } else { identity(n) }])
        }
        Step::Revoke { node: n, up_to, forged } => {
            let (number, previous) = model.chain.map_or((1, None), |(number, hash)| (number + 1, Some(hash)));
            let revocation = Revocation { number, previous, up_to_generation: up_to, ..revocation(n) };
            Envelope::seal(mesh(), &revocation, &[&if forged { issuer() } else { revoker() }])
        }
        Step::Policy { east } => next_policy(view, |policy| {
            policy.issuers[0].clusters.retain(|scope| scope.cluster != name("east"));
            if east {
                policy.issuers[0].clusters.push(cluster("east", "10.1.0.0/16"));
            }
        }),
    }
}

fn run(steps: &[Step]) {
    let (mut view, mut model) = (view(), Model::default());
    for step in steps {
        let envelope = envelope(step, &view, &model);
        let before = format!("{view:?}");
        let Ok(_) = view.apply(&envelope) else {
            assert_eq!(format!("{view:?}"), before, "a refusal changed something: {step:?}");
            continue;
        };
        match step {
            Step::Grant { node: n, generation, forged, .. } => {
                assert!(!forged);
                let highest = model.generations.entry(node(*n)).or_default();
                assert!(*generation >= *highest, "a generation went back");
                *highest = *generation;
            }
            Step::Record { node: n, forged, .. } => {
                assert!(!forged);
                let record: NodeRecord = envelope.unverified().unwrap();
                for key in record.tunnel_keys() {
                    assert_eq!(*model.keys.entry(*key.key.as_bytes()).or_insert(node(*n)), node(*n));
                }
            }
            Step::Revoke { node: n, up_to, forged } => {
                assert!(!forged);
                let hash = envelope.hash(mesh());
                model.revoked.push((node(*n), *up_to, hash));
                model.chain = Some((model.chain.map_or(1, |(number, _)| number + 1), hash));
            }
            Step::Policy { .. } => {}
        }
        model.check(&view);
    }
    rebuild(&view, &model);
}

/// From its envelopes a view comes back, with the same members and the same refusals.
fn rebuild(view: &View, model: &Model) {
    let policies: Vec<Envelope> = view.policies().iter().map(|policy| policy.envelope.clone()).collect();
    let mut rebuilt = View::pinned(mesh(), &policies).unwrap();
    for envelope in view.envelopes() {
        // A grant that moved the node to other prefixes silences, in a new view, the record from before.
        match rebuilt.apply(envelope) {
            Ok(_) | Err(TrustError::OtherGrant { .. }) => {}
            Err(error) => panic!("{error}"),
        }
    }
    rebuilt.restore_key_holders(view.key_holders());
    rebuilt.restore_seen(view.seen().cloned());
    model.check(&rebuilt);
    let members = |view: &View| -> Vec<(NodeId, Hash)> {
        view.members().map(|(node, member)| (*node, member.grant.hash)).collect()
    };
    assert_eq!(members(&rebuilt), members(view));
    assert_eq!(rebuilt.revocation_heads(), view.revocation_heads());
    assert!(rebuilt.seen().eq(view.seen()) && rebuilt.key_holders().eq(view.key_holders()));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_sequence_breaks_the_rules(steps in prop::collection::vec(step(), 1..60)) {
        run(&steps);
    }
}
