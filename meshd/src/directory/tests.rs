#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

mod ahead;

use std::net::Ipv4Addr;
use std::time::Instant;

use mesh_protocol::address::mesh_v6;
use mesh_protocol::envelope::NO_MESH;
use mesh_protocol::id::{MeshId, Name};
use mesh_protocol::key::{KemPublic, SigningKey, TunnelSecret, VerifyKey};
use mesh_protocol::record::{
    ClusterScope, Endpoints, EpochKey, FormerKey, Handover, Issuer, KemKey, NodeRecord, PostQuantum, Revocation,
    TrustPolicy,
};
use mesh_protocol::trust::next_state;
use proptest::prelude::*;

use super::*;

pub(crate) const START: UnixSeconds = 1_800_000_000;

/// All keys of a mesh, and the history its keyserver would show.
pub(crate) struct World {
    pub(crate) mesh: MeshId,
    key: SigningKey,
    issuer: SigningKey,
    pub(crate) history: Vec<Envelope>,
    states: Vec<Hash>,
    serial: u64,
    pub(crate) epoch: u64,
    revocations: Vec<Hash>,
}

fn name(text: &str) -> Name {
    text.parse().unwrap()
}

impl World {
    /// The one key that does everything but being a node.
    pub(crate) fn key() -> SigningKey {
        SigningKey::from_seed([99; 32])
    }

    pub(crate) fn new() -> Self {
        let key = Self::key();
        let scope = ClusterScope {
            cluster: name("east"),
            pools: vec!["10.1.0.0/16".parse().unwrap()],
            node_prefix_v4: 24,
            node_prefix_v6: 80,
        };
        let policy = TrustPolicy {
            version: 1,
            previous: None,
            name: name("prod"),
            roots: vec![key.verify_key()],
            threshold: 1,
            issuers: vec![Issuer {
                key: key.verify_key(),
                clusters: vec![scope],
                tags: vec![],
                longest_grant: 366 * 86_400,
                former: vec![],
            }],
            revokers: vec![key.verify_key()],
            keyservers: vec![key.verify_key()],
            exposure: 7 * 86_400,
            pq: PostQuantum::Off,
            mesh_pool: "100.64.0.0/16".parse().unwrap(),
            issued: START,
        };
        let envelope = Envelope::seal(NO_MESH, &policy, &[&key]);
        let hash = envelope.hash(NO_MESH);
        let states = vec![next_state(Hash([0; 32]), hash)];
        let mesh = MeshId(hash.0);
        Self {
            mesh,
            issuer: key.clone(),
            key,
            history: vec![envelope],
            states,
            serial: 0,
            epoch: 7,
            revocations: vec![],
        }
    }

    fn push(&mut self, envelope: Envelope) -> Envelope {
        let state = next_state(*self.states.last().unwrap(), envelope.hash(self.mesh));
        self.states.push(state);
        self.history.push(envelope.clone());
        envelope
    }

    pub(crate) fn identity_key(number: u8) -> SigningKey {
        SigningKey::from_seed([number; 32])
    }

    pub(crate) fn node(number: u8) -> NodeId {
        Self::identity_key(number).verify_key().node_id()
    }

    pub(crate) fn grant(&mut self, number: u8, generation: u64) -> Envelope {
        let identity = Self::identity_key(number).verify_key();
        self.serial += 1;
        let grant = NodeGrant {
            node: identity.node_id(),
            identity,
            generation,
            name: name(&format!("n{number}")),
            cluster: name("east"),
            route_group: None,
            mesh_v4: Ipv4Addr::new(100, 64, 0, number),
            mesh_v6: mesh_v6(self.mesh, identity.node_id()),
            pod_cidrs: vec![format!("10.1.{number}.0/24").parse().unwrap()],
            tags: vec![],
            pq: PostQuantum::Off,
            serial: self.serial,
            issued: START,
            expires: START + 365 * 86_400,
            lifts: None,
            external: false,
            succession: vec![],
        };
        let envelope = Envelope::seal(self.mesh, &grant, &[&self.issuer]);
        self.push(envelope)
    }

    /// As [`Self::grant`], by the key that had the issuer's place first.
    pub(crate) fn grant_by_former(&mut self, number: u8, generation: u64) -> Envelope {
        let present = std::mem::replace(&mut self.issuer, self.key.clone());
        let envelope = self.grant(number, generation);
        self.issuer = present;
        envelope
    }

    /// The policy that gives the issuer another key; its former one stands up to these numbers.
    pub(crate) fn replace_issuer(&mut self, generation: u64, serial: u64) -> Envelope {
        let mut policy: TrustPolicy = self.history[0].unverified().unwrap();
        (policy.version, policy.previous) = (2, Some(self.history[0].hash(NO_MESH)));
        self.issuer = SigningKey::from_seed([98; 32]);
        let issuer = &mut policy.issuers[0];
        issuer.former = vec![FormerKey { key: issuer.key, generation, serial }];
        issuer.key = self.issuer.verify_key();
        let envelope = Envelope::seal(self.mesh, &policy, &[&self.key]);
        self.push(envelope)
    }

    /// The grant after `held`, with another identity key.
    pub(crate) fn succeeded(&mut self, held: &Envelope, identity: VerifyKey, handover: Handover) -> Envelope {
        let held: NodeGrant = held.unverified().unwrap();
        let succession = [held.succession.clone(), vec![handover]].concat();
        let grant = NodeGrant { generation: held.generation + 1, identity, succession, ..held };
        let envelope = Envelope::seal(self.mesh, &grant, &[&self.key]);
        self.push(envelope)
    }

    pub(crate) fn sealed_record(&self, number: u8, seq: u64, grant: &Envelope, lanes: u8) -> Envelope {
        let key = |epoch: u8| EpochKey {
            epoch: u64::from(epoch),
            key: TunnelSecret::from_bytes(std::array::from_fn(|at| if at % 2 == 0 { epoch } else { number })).public(),
        };
        let record = NodeRecord {
            node: Self::node(number),
            seq,
            grant: grant.hash(self.mesh),
            current: key(1),
            previous: None,
            spare: key(2),
            kem: KemKey { epoch: 1, key: KemPublic::from_bytes(&[number; 1184]).unwrap() },
            lanes,
            departed: false,
            before: None,
        };
        Envelope::seal(self.mesh, &record, &[&Self::identity_key(number)])
    }

    pub(crate) fn record(&mut self, number: u8, seq: u64, grant: &Envelope) -> Envelope {
        let envelope = self.sealed_record(number, seq, grant, 1);
        self.push(envelope)
    }

    pub(crate) fn revoke(&mut self, number: u8) -> Envelope {
        let revocation = Revocation {
            number: self.revocations.len() as u64 + 1,
            previous: self.revocations.last().copied(),
            node: Self::node(number),
            up_to_generation: 1,
            reason: "test".to_owned(),
            time: START,
        };
        let envelope = Envelope::seal(self.mesh, &revocation, &[&self.key]);
        self.revocations.push(envelope.hash(self.mesh));
        self.push(envelope)
    }

    pub(crate) fn endpoints(&self, number: u8, seq: u64, candidate: &str) -> Envelope {
        let endpoints = Endpoints {
            node: Self::node(number),
            seq,
            candidates: vec![candidate.parse().unwrap()],
            expires: START + 3600,
        };
        Envelope::seal(self.mesh, &endpoints, &[&Self::identity_key(number)])
    }

    pub(crate) fn position(&self) -> Position {
        self.position_at(self.history.len())
    }

    pub(crate) fn position_at(&self, revision: usize) -> Position {
        Position { epoch: self.epoch, revision: revision as u64 }
    }

    pub(crate) fn checkpoint(&self, time: UnixSeconds) -> Envelope {
        self.checkpoint_with(self.position(), *self.states.last().unwrap(), time)
    }

    pub(crate) fn checkpoint_with(&self, position: Position, state: Hash, time: UnixSeconds) -> Envelope {
        let mut view = View::pinned(self.mesh, &self.history[..1]).unwrap();
        for envelope in &self.history[1..] {
            let _ = view.apply(envelope);
        }
        let checkpoint = Checkpoint { position, state, policy_version: 1, revocations: view.revocation_heads(), time };
        Envelope::seal(self.mesh, &checkpoint, &[&self.key])
    }

    /// A directory of node 1, just admitted.
    pub(crate) fn joined(&mut self) -> (Directory, Envelope) {
        let grant = self.grant(1, 1);
        let mut view = View::pinned(self.mesh, &self.history[..1]).unwrap();
        view.apply(&grant).unwrap();
        (Directory::new(view, Self::node(1), None), grant)
    }

    pub(crate) fn feed_all(&self, directory: &mut Directory) {
        directory.begin_stream();
        let checkpoint = self.checkpoint(START);
        let batch = Batch {
            from: self.position_at(0),
            to: self.position(),
            items: &self.history,
            checkpoint: Some(&checkpoint),
        };
        directory.apply_batch(&batch, Instant::now()).unwrap();
    }

    pub(crate) fn feed(&self, directory: &mut Directory, from: usize) -> Result<(), Gap> {
        let checkpoint = self.checkpoint(START + 1);
        let (from_position, items) = (self.position_at(from), &self.history[from..]);
        let batch = Batch { from: from_position, to: self.position(), items, checkpoint: Some(&checkpoint) };
        directory.apply_batch(&batch, Instant::now())
    }
}

pub(crate) fn facts(directory: &mut Directory, grant: &Envelope, wall: UnixSeconds) -> crate::facts::DirectoryFacts {
    let own: NodeGrant = grant.unverified().unwrap();
    directory.facts(&Viewpoint { own: &own, underlay: &[], wall, exposed: false })
}

fn names(directory: &mut Directory, grant: &Envelope) -> Vec<String> {
    let mut names: Vec<String> =
        facts(directory, grant, START).peers.iter().map(|peer| peer.name.to_string()).collect();
    names.sort();
    names
}

fn alarms(directory: &mut Directory) -> Vec<&'static str> {
    directory.alarms().standing().iter().map(|alarm| alarm.name).collect()
}

#[test]
fn a_map_and_deltas_make_peers_and_a_revocation_takes_one_out() {
    let mut world = World::new();
    let (mut directory, own) = world.joined();
    for number in [2, 3] {
        let grant = world.grant(number, 1);
        world.record(number, 1, &grant);
    }
    world.feed_all(&mut directory);
    let before = facts(&mut directory, &own, START);
    assert_eq!(before.position, world.position());
    assert_eq!(before.peers.len(), 2);
    let at = world.history.len();
    world.revoke(2);
    world.feed(&mut directory, at).unwrap();
    let after = facts(&mut directory, &own, START);
    assert_eq!(names(&mut directory, &own), ["n3"]);
    let number = |facts: &crate::facts::DirectoryFacts| {
        facts.peers.iter().find(|peer| peer.name.to_string() == "n3").unwrap().number
    };
    assert_eq!(number(&before), number(&after));
    assert_eq!(alarms(&mut directory), [""; 0]);
}

#[test]
fn gaps_and_other_histories_are_never_applied() {
    let mut world = World::new();
    let (mut directory, own) = world.joined();
    world.feed_all(&mut directory);
    let at = world.history.len();
    let grant = world.grant(2, 1);
    world.record(2, 1, &grant);
    assert!(world.feed(&mut directory, at + 1).is_err());
    assert!(world.feed(&mut directory, at - 1).is_err());
    let epoch = std::mem::replace(&mut world.epoch, 8);
    assert!(world.feed(&mut directory, at).is_err());
    world.epoch = epoch;
    assert_eq!(names(&mut directory, &own), [""; 0]);
    world.feed(&mut directory, at).unwrap();
    assert_eq!(names(&mut directory, &own), ["n2"]);
}

#[test]
fn a_map_in_pieces_moves_the_position_at_its_end_only() {
    let mut world = World::new();
    let (mut directory, _) = world.joined();
    let grant = world.grant(2, 1);
    world.record(2, 1, &grant);
    directory.begin_stream();
    let (start, now) = (world.position_at(0), Instant::now());
    let piece = Batch { from: start, to: start, items: &world.history[..2], checkpoint: None };
    directory.apply_batch(&piece, now).unwrap();
    assert_eq!(directory.position(), None);
    let stray = Batch { from: world.position_at(2), to: world.position(), items: &[], checkpoint: None };
    assert!(directory.apply_batch(&stray, now).is_err());
    let end = Batch { from: start, to: world.position(), items: &world.history[2..], checkpoint: None };
    directory.apply_batch(&end, now).unwrap();
    assert_eq!(directory.position(), Some(world.position()));
}

#[test]
fn a_map_without_members_removes_nobody() {
    let mut world = World::new();
    let (mut directory, own) = world.joined();
    let grant = world.grant(2, 1);
    world.record(2, 1, &grant);
    world.feed_all(&mut directory);
    let empty = Batch { from: world.position_at(0), to: world.position(), items: &[], checkpoint: None };
    directory.apply_batch(&empty, Instant::now()).unwrap();
    assert_eq!(names(&mut directory, &own), ["n2"]);
}

#[test]
fn what_is_refused_is_alarmed_and_stops_nothing() {
    let mut world = World::new();
    let (mut directory, own) = world.joined();
    let grant = world.grant(2, 1);
    let forged = Envelope::seal(world.mesh, &grant.unverified::<NodeGrant>().unwrap(), &[&World::identity_key(66)]);
    world.history.insert(1, forged);
    world.record(2, 1, &grant);
    directory.begin_stream();
    let (from, to) = (world.position_at(0), world.position());
    directory.apply_batch(&Batch { from, to, items: &world.history, checkpoint: None }, Instant::now()).unwrap();
    assert_eq!(names(&mut directory, &own), ["n2"]);
    assert_eq!((directory.refused(), alarms(&mut directory)), (1, vec![alarm::REFUSED]));
}

#[test]
fn two_records_of_one_seq_raise_an_alarm_and_leave_evidence() {
    let temp = tempfile::tempdir().unwrap();
    let state = StateDir::open(&temp.path().join("state")).unwrap();
    let mut world = World::new();
    let (mut directory, own) = world.joined();
    let grant = world.grant(2, 1);
    world.record(2, 1, &grant);
    world.feed_all(&mut directory);
    let at = world.history.len();
    let other = world.sealed_record(2, 1, &grant, 4);
    world.push(other);
    world.feed(&mut directory, at).unwrap();
    assert_eq!(alarms(&mut directory), [alarm::EQUIVOCATION]);
    assert_eq!(facts(&mut directory, &own, START).peers[0].lanes, 1);
    directory.save(&state).unwrap();
    assert_eq!(state.names("evidence-").unwrap().len(), 2);
}

#[test]
fn a_history_other_than_the_signed_one_is_noticed() {
    let mut world = World::new();
    let (mut directory, _) = world.joined();
    world.feed_all(&mut directory);
    let at = world.history.len();
    world.grant(2, 1);
    // Shown another grant than the one in the signed history: both are validly signed.
    let shown = world.grant(2, 2);
    let checkpoint = world.checkpoint_with(world.position_at(at + 1), world.states[at], START + 1);
    let (from, to) = (world.position_at(at), world.position_at(at + 1));
    let batch = Batch { from, to, items: &[shown], checkpoint: Some(&checkpoint) };
    directory.apply_batch(&batch, Instant::now()).unwrap();
    assert_eq!(alarms(&mut directory), [alarm::EQUIVOCATION]);
}

#[test]
fn a_keyserver_that_went_back_is_stale_until_it_catches_up() {
    let mut world = World::new();
    let (mut directory, own) = world.joined();
    let grant = world.grant(2, 1);
    world.record(2, 1, &grant);
    let old = world.checkpoint_with(world.position_at(2), world.states[1], START + 5);
    world.feed_all(&mut directory);
    let held = directory.position();
    assert!(!directory.apply_checkpoint(&old, Instant::now()));
    assert!(directory.is_stale());
    let map = Batch {
        from: world.position_at(0),
        to: world.position_at(2),
        items: &world.history[..2],
        checkpoint: Some(&old),
    };
    directory.apply_batch(&map, Instant::now()).unwrap();
    assert_eq!((directory.position(), names(&mut directory, &own)), (held, vec!["n2".to_owned()]));
    assert_eq!(alarms(&mut directory), [alarm::STALE]);
    assert!(directory.apply_checkpoint(&world.checkpoint(START + 9), Instant::now()));
    assert_eq!(alarms(&mut directory), [""; 0]);
}

#[test]
fn grants_expire_only_when_both_clocks_agree() {
    let mut world = World::new();
    let (mut directory, own) = world.joined();
    let grant = world.grant(2, 1);
    world.record(2, 1, &grant);
    world.feed_all(&mut directory);
    let later = START + 400 * 86_400;
    assert_eq!(facts(&mut directory, &own, later).peers.len(), 1);
    directory.apply_checkpoint(&world.checkpoint(later), Instant::now());
    assert_eq!(facts(&mut directory, &own, START).peers.len(), 1);
    assert_eq!(facts(&mut directory, &own, later).peers.len(), 0);
}

#[test]
fn what_was_stored_is_there_after_a_restart() {
    let mut world = World::new();
    let (mut directory, own) = world.joined();
    for number in 2..6 {
        let grant = world.grant(number, 1);
        world.record(number, 1, &grant);
    }
    world.revoke(5);
    // A new grant whose node has not spoken since: its record names the one before.
    world.grant(4, 2);
    world.feed_all(&mut directory);
    directory.apply_live(&[world.endpoints(2, 1, "192.0.2.2:7100")], Instant::now());
    let active = directory.nodes_numbered(&[1, 2]);
    directory.set_runtime(std::time::Duration::from_secs(90), START, Some(active.clone()));
    let before = facts(&mut directory, &own, START);
    let mut again = disk::decode(&directory.encode(), world.mesh, World::node(1)).unwrap();
    disk::decode_runtime(&mut again, &directory.encode_runtime()).unwrap();
    assert_eq!(facts(&mut again, &own, START), before);
    assert_eq!(before.peers.len(), 3);
    assert_eq!(again.runtime(), directory.runtime());
    assert_eq!(again.numbers_of(&active).len(), active.len());
    assert_eq!(again.encode(), directory.encode());
    // The chain goes on where it was.
    again.begin_stream();
    let at = world.history.len();
    world.revoke(3);
    world.feed(&mut again, at).unwrap();
    assert_eq!(alarms(&mut again), [""; 0]);
    assert_eq!(names(&mut again, &own), ["n2", "n4"].map(str::to_owned));
}

#[test]
fn another_mesh_is_refused() {
    let mut world = World::new();
    let (directory, _) = world.joined();
    let error = disk::decode(&directory.encode(), MeshId([1; 32]), World::node(1)).unwrap_err();
    assert!(error.contains("mesh"), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn decoders_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..400), at in any::<prop::sample::Index>(), flip: u8) {
        let mut world = World::new();
        let (mut directory, _) = world.joined();
        let mut whole = directory.encode();
        let index = at.index(whole.len());
        whole[index] ^= flip;
        let _ = disk::decode(&whole, world.mesh, World::node(1));
        let _ = disk::decode(&whole[..index], world.mesh, World::node(1));
        let _ = disk::decode(&bytes, world.mesh, World::node(1));
        let _ = disk::decode_runtime(&mut directory, &bytes);
    }
}
