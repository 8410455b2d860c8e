//! A small mesh made of fixed seeds: every byte it signs is the same in each run.
#![allow(dead_code, clippy::unwrap_used, missing_docs, unreachable_pub, reason = "tests: each file uses a part")]

pub mod messages;

use std::net::Ipv4Addr;

use mesh_protocol::address;
use mesh_protocol::envelope::{Envelope, NO_MESH};
use mesh_protocol::id::{Hash, MeshId, Name, NodeId, Position};
use mesh_protocol::key::{KEM_PUBLIC_BYTES, KemPublic, SigningKey, TunnelKey, TunnelSecret};
use mesh_protocol::record::{
    Checkpoint, ClusterScope, Endpoints, EpochKey, FormerKey, Handover, Issuer, KemKey, NodeGrant, NodeRecord,
    PostQuantum, Revocation, TrustPolicy,
};
use mesh_protocol::token::{JoinClaim, JoinToken, TokenLimits};
use mesh_protocol::trust::{TrustError, View};

pub const NOW: u64 = 1_800_000_000;

pub fn name(text: &str) -> Name {
    text.parse().unwrap()
}

pub fn key(seed: u8) -> SigningKey {
    SigningKey::from_seed([seed; 32])
}

pub fn root() -> SigningKey {
    key(1)
}
pub fn issuer() -> SigningKey {
    key(2)
}
pub fn revoker() -> SigningKey {
    key(3)
}
pub fn keyserver() -> SigningKey {
    key(4)
}
pub fn token_secret() -> SigningKey {
    key(5)
}

/// Node `n`'s identity key.
pub fn identity(n: u8) -> SigningKey {
    key(100 + n)
}

pub fn node(n: u8) -> NodeId {
    identity(n).verify_key().node_id()
}

/// WireGuard secret of node `n` in `epoch`.
pub fn tunnel_secret(n: u8, epoch: u64) -> TunnelSecret {
    let mut secret = [n; 32];
    secret[8..16].copy_from_slice(&epoch.to_be_bytes());
    TunnelSecret::from_bytes(secret)
}

/// WireGuard key of node `n` in `epoch`.
pub fn tunnel_key(n: u8, epoch: u64) -> TunnelKey {
    tunnel_secret(n, epoch).public()
}

pub fn policy_1() -> TrustPolicy {
    TrustPolicy {
        version: 1,
        previous: None,
        name: name("prod"),
        roots: vec![root().verify_key()],
        threshold: 1,
        issuers: vec![Issuer {
            key: issuer().verify_key(),
            clusters: vec![cluster("east", "10.1.0.0/16"), cluster("west", "10.2.0.0/16")],
            tags: vec![name("db"), name("web")],
            longest_grant: 90 * 86_400,
            former: vec![],
        }],
        revokers: vec![revoker().verify_key()],
        keyservers: vec![keyserver().verify_key()],
        exposure: 7 * 86_400,
        pq: PostQuantum::Off,
        mesh_pool: "100.100.0.0/16".parse().unwrap(),
        issued: NOW,
    }
}

/// The policy after it: another key has the issuer's place.
pub fn policy_2() -> TrustPolicy {
    let mut policy = TrustPolicy { version: 2, previous: Some(view().policy_hash()), ..policy_1() };
    policy.issuers[0].former = vec![FormerKey { key: issuer().verify_key(), generation: 3, serial: 41 }];
    policy.issuers[0].key = key(20).verify_key();
    policy
}

pub fn cluster(cluster: &str, pool: &str) -> ClusterScope {
    ClusterScope { cluster: name(cluster), pools: vec![pool.parse().unwrap()], node_prefix_v4: 24, node_prefix_v6: 80 }
}

pub fn sealed_policy_1() -> Envelope {
    Envelope::seal(NO_MESH, &policy_1(), &[&root()])
}

pub fn mesh() -> MeshId {
    MeshId(sealed_policy_1().hash(NO_MESH).0)
}

pub fn view() -> View {
    View::pinned(mesh(), &[sealed_policy_1()]).unwrap()
}

/// Refused, and nothing changed.
#[track_caller]
pub fn refuse(view: &mut View, envelope: &Envelope) -> TrustError {
    let before = format!("{view:?}");
    let error = view.apply(envelope).unwrap_err();
    assert_eq!(format!("{view:?}"), before, "a refusal changed something: {error}");
    error
}

/// A view of one member.
pub fn with_node_1() -> View {
    let mut view = view();
    view.apply(&seal_grant(&grant(1))).unwrap();
    view.apply(&seal_record(1, &record(1))).unwrap();
    view
}

/// The policy after `view`'s newest, changed.
pub fn next_policy(view: &View, change: impl FnOnce(&mut TrustPolicy)) -> Envelope {
    let mut policy = view.policy().clone();
    policy.version += 1;
    policy.previous = Some(view.policy_hash());
    change(&mut policy);
    Envelope::seal(mesh(), &policy, &[&root()])
}

/// Grant of node `n`, which gets 10.1.n.0/24 and serial n.
pub fn grant(n: u8) -> NodeGrant {
    NodeGrant {
        node: node(n),
        identity: identity(n).verify_key(),
        generation: 1,
        name: name(&format!("n{n}")),
        cluster: name("east"),
        route_group: None,
        mesh_v4: Ipv4Addr::new(100, 100, 0, n),
        mesh_v6: address::mesh_v6(mesh(), node(n)),
        pod_cidrs: vec![format!("10.1.{n}.0/24").parse().unwrap()],
        tags: vec![name("db")],
        pq: PostQuantum::Off,
        serial: u64::from(n),
        issued: NOW,
        expires: NOW + 30 * 86_400,
        lifts: None,
        external: false,
        succession: vec![],
    }
}

pub fn seal_grant(grant: &NodeGrant) -> Envelope {
    Envelope::seal(mesh(), grant, &[&issuer()])
}

/// First record of node `n` under its first grant.
pub fn record(n: u8) -> NodeRecord {
    NodeRecord {
        node: node(n),
        seq: 1,
        grant: seal_grant(&grant(n)).hash(mesh()),
        current: epoch_key(n, 1),
        previous: None,
        spare: epoch_key(n, 2),
        kem: KemKey { epoch: 1, key: KemPublic::from_bytes(&[n; KEM_PUBLIC_BYTES]).unwrap() },
        lanes: 1,
        departed: false,
        before: None,
    }
}

pub fn epoch_key(n: u8, epoch: u64) -> EpochKey {
    EpochKey { epoch, key: tunnel_key(n, epoch) }
}

pub fn seal_record(n: u8, record: &NodeRecord) -> Envelope {
    Envelope::seal(mesh(), record, &[&identity(n)])
}

pub fn endpoints(n: u8) -> Endpoints {
    let candidates = vec!["192.0.2.1:7100".parse().unwrap(), "[2001:db8::1]:7100".parse().unwrap()];
    Endpoints { node: node(n), seq: NOW * 1000, candidates, expires: NOW + 300 }
}

pub fn revocation(n: u8) -> Revocation {
    let reason = "stolen".to_owned();
    Revocation { number: 1, previous: None, node: node(n), up_to_generation: 1, reason, time: NOW }
}

pub fn seal_revocation(revocation: &Revocation) -> Envelope {
    Envelope::seal(mesh(), revocation, &[&revoker()])
}

pub fn checkpoint() -> Checkpoint {
    let mut view = view();
    view.apply(&seal_revocation(&revocation(9))).unwrap();
    Checkpoint {
        position: Position { epoch: 7, revision: 42 },
        state: Hash([0x5a; 32]),
        policy_version: 1,
        revocations: view.revocation_heads(),
        time: NOW,
    }
}

pub fn limits() -> TokenLimits {
    TokenLimits {
        key: token_secret().verify_key(),
        uses: 3,
        expires: NOW + 3600,
        cluster: name("east"),
        cidrs: vec!["10.1.0.0/20".parse().unwrap()],
        tags: vec![name("db")],
        issued: Some(NOW),
    }
}

pub fn token() -> JoinToken {
    JoinToken {
        mesh: mesh(),
        policy_version: 1,
        policy: view().policy_hash(),
        keyservers: vec!["keys.example.net:7443".to_owned()],
        checkpoint: Envelope::seal(mesh(), &checkpoint(), &[&keyserver()]),
        limits: Envelope::seal(mesh(), &limits(), &[&issuer()]),
        secret: token_secret(),
    }
}

pub fn claim() -> JoinClaim {
    JoinClaim {
        mesh: mesh(),
        token: token().id(),
        identity: identity(1).verify_key(),
        name: name("n1"),
        pod_cidrs: vec!["10.1.1.0/24".parse().unwrap()],
    }
}

/// Node `n`'s identity key after `step` handovers.
pub fn later_identity(n: u8, step: u8) -> SigningKey {
    let mut seed = [n; 32];
    seed[31] = step;
    if step == 0 { identity(n) } else { SigningKey::from_seed(seed) }
}

pub fn handover(n: u8, from: &SigningKey, to: &SigningKey) -> Handover {
    Handover::sign(mesh(), node(n), from, to)
}

/// The grant of node `n` after its identity key went these steps, each from the one before.
pub fn succeeded(n: u8, steps: &[u8]) -> NodeGrant {
    let mut grant = NodeGrant { generation: 1 + steps.len() as u64, ..grant(n) };
    let mut from = identity(n);
    for step in steps {
        let to = later_identity(n, *step);
        grant.succession.push(handover(n, &from, &to));
        (grant.identity, from) = (to.verify_key(), to);
    }
    grant
}
