//! Identity keys that nodes replace.

use mesh_protocol::control::RefusalCode;
use mesh_protocol::id::NodeId;
use mesh_protocol::offline::{GrantReason, GrantRequests, InFile as _, SignedGrants};
use mesh_protocol::record::Handover;

use super::*;
use crate::directory::succeed::Successor;

/// A directory whose member has spoken, and its next key.
struct Scene {
    fixture: Fixture,
    node: NodeId,
    next: SigningKey,
}

fn scene() -> Scene {
    let mut fixture = directory(0);
    let node = fixture.node.verify_key().node_id();
    let said = record(&fixture, 1);
    fixture.directory.publish(node, &said).unwrap();
    Scene { fixture, node, next: crate::keys::generate().unwrap() }
}

impl Scene {
    fn handover(&self, to: &SigningKey) -> Handover {
        Handover::sign(self.fixture.directory.mesh(), self.node, &self.fixture.node, to)
    }

    fn ask(&mut self, to: &SigningKey) -> Result<bool, Refusal> {
        let handover = self.handover(to);
        self.fixture.directory.succeed(self.node, to.verify_key(), handover)
    }

    fn grant(&self) -> NodeGrant {
        self.fixture.directory.view().member(self.node).unwrap().grant.object.clone()
    }

    fn admits(&mut self, key: &SigningKey) -> bool {
        self.fixture.directory.admit(&key.verify_key(), None) == Some(self.node)
    }

    fn speak(&mut self, seq: u64, key: &SigningKey) {
        let held: NodeRecord = record(&self.fixture, 1).unverified().unwrap();
        let record = Envelope::seal(self.fixture.directory.mesh(), &NodeRecord { seq, ..held }, &[key]);
        self.fixture.directory.publish(self.node, &record).unwrap();
    }

    fn open(&mut self, key: &SigningKey) -> crate::directory::Opening {
        let hello = Hello { identity: key.verify_key(), ..hello(&self.fixture.directory) };
        self.fixture.directory.open_session(self.node, peer(), &hello).unwrap()
    }

    fn audit(&self) -> String {
        self.fixture.directory.audit_page(1, u64::MAX - 1).unwrap().join("\n")
    }
}

#[test]
fn both_keys_are_admitted_until_the_node_speaks_with_the_new_one() {
    let mut scene = scene();
    let (old, next) = (scene.fixture.node.clone(), scene.next.clone());
    let before = scene.grant();
    assert!(scene.admits(&old) && !scene.admits(&next));
    assert!(scene.ask(&next).unwrap());
    assert!(scene.ask(&next).unwrap(), "asked again after a lost answer");
    let after = scene.grant();
    assert_eq!((after.node, after.identity), (before.node, next.verify_key()));
    assert_eq!((after.mesh_v6, after.serial, after.generation), (before.mesh_v6, before.serial, before.generation + 1));
    assert!(scene.admits(&old) && scene.admits(&next));

    let session = scene.open(&old);
    scene.speak(2, &next);
    assert!(!scene.fixture.directory.is_current(session.key), "a session with the key before goes on");
    assert!(!scene.admits(&old) && scene.admits(&next));
    scene.fixture.directory.read_back().unwrap();
    assert!(!scene.admits(&old) && scene.admits(&next), "after a restart, too");
    let log = scene.audit();
    let line = log.lines().find(|line| line.contains("\"rotate-identity\"")).unwrap();
    let keys = format!("identity key {} after {}", next.verify_key().id().short(), old.verify_key().id().short());
    assert!(line.contains("\"actor\":\"node n1\"") && line.contains(&keys), "{line}");
}

#[test]
fn a_session_with_the_new_key_is_not_taken_over_with_the_one_before() {
    let mut scene = scene();
    let (old, next) = (scene.fixture.node.clone(), scene.next.clone());
    scene.ask(&next).unwrap();
    let session = scene.open(&next);
    assert!(!scene.admits(&old) && scene.admits(&next));
    scene.fixture.directory.close_session(session.key);
    assert!(scene.admits(&old), "it has not spoken yet");
}

#[test]
fn what_is_not_the_nodes_own_wish_is_refused() {
    let mut scene = scene();
    let (next, other) = (scene.next.clone(), crate::keys::generate().unwrap());
    let mesh = scene.fixture.directory.mesh();
    let forged = Handover::sign(mesh, scene.node, &other, &next);
    let refused = scene.fixture.directory.succeed(scene.node, next.verify_key(), forged).unwrap_err();
    assert_eq!(refused.code, RefusalCode::OutOfScope, "{refused}");
    let for_another = scene.handover(&other);
    assert!(scene.fixture.directory.succeed(scene.node, next.verify_key(), for_another).is_err());
    assert!(scene.ask(&next).unwrap());
    // It has not spoken with it yet: were it to take a third one now, no key that it has on disk might be left.
    let third = Handover::sign(mesh, scene.node, &next, &other);
    let early = scene.fixture.directory.succeed(scene.node, other.verify_key(), third.clone()).unwrap_err();
    assert_eq!(early.code, RefusalCode::Record, "{early}");
    scene.speak(2, &next);
    assert!(scene.fixture.directory.succeed(scene.node, other.verify_key(), third).unwrap());
    // Nobody enrols with any of them.
    for key in [&scene.fixture.node, &next, &other] {
        let key = key.verify_key();
        let unused = scene.fixture.directory.check_unused(&key, key.node_id());
        assert!(unused.is_err_and(|refusal| refusal.code == RefusalCode::Revoked));
    }
    let stranger = crate::keys::generate().unwrap().verify_key();
    scene.fixture.directory.check_unused(&stranger, stranger.node_id()).unwrap();
}

#[test]
fn a_revoked_node_has_no_key_that_is_admitted() {
    let mut scene = scene();
    let (old, next) = (scene.fixture.node.clone(), scene.next.clone());
    scene.ask(&next).unwrap();
    scene.fixture.directory.revoke("n1", "stolen", false, None).unwrap();
    let shown = scene.fixture.directory.history.since(beginning_of(&scene)).unwrap();
    let granted = shown.iter().rev().find(|envelope| envelope.kind() == Kind::NodeGrant).unwrap().clone();
    for key in [&old, &next] {
        assert!(!scene.admits(key));
        assert_eq!(scene.fixture.directory.admit(&key.verify_key(), Some(&granted)), None);
        let key = key.verify_key();
        let refused = scene.fixture.directory.check_unused(&key, key.node_id());
        assert!(key.node_id() == scene.node || refused.is_err_and(|refusal| refusal.message.contains("revoked")));
    }
    scene.fixture.directory.restore("n1").unwrap();
    assert!(!scene.admits(&old) && scene.admits(&next));
}

fn beginning_of(scene: &Scene) -> Position {
    Position { revision: 1, ..scene.fixture.directory.position() }
}

#[test]
fn a_store_from_before_learns_of_the_key_from_the_node() {
    let mut scene = scene();
    let next = scene.next.clone();
    let successor = Successor { identity: next.verify_key(), handover: scene.handover(&next) };
    let grant = scene.fixture.directory.succeeded(&scene.grant(), &successor);
    let granted = scene.fixture.directory.seal_grant(&grant).unwrap();
    let forged = Envelope::seal(scene.fixture.directory.mesh(), &grant, &[&next]);
    let key = next.verify_key();
    assert_eq!(scene.fixture.directory.admit(&key, Some(&forged)), None, "no issuer signed it");
    assert_eq!(scene.fixture.directory.admit(&scene.fixture.node.verify_key(), Some(&granted)), Some(scene.node));
    assert_eq!(scene.grant().generation, 1, "who has the key before needs no grant");

    // What may not be written yet is believed all the same, for this session.
    scene.fixture.directory.behind = Some("an old copy".to_owned());
    assert_eq!(scene.fixture.directory.admit(&key, Some(&granted)), Some(scene.node));
    assert_eq!(scene.fixture.directory.admit(&key, None), None);
    let session = scene.open(&next);
    assert!(scene.fixture.directory.is_current(session.key));
    scene.fixture.directory.behind = None;
    assert_eq!(scene.fixture.directory.admit(&key, Some(&granted)), Some(scene.node));
    assert_eq!(scene.fixture.directory.admit(&key, None), Some(scene.node), "now it is stored");
}

#[test]
fn a_key_waits_for_an_issuer_elsewhere_and_survives_a_restart() {
    let mut scene = scene();
    let next = scene.next.clone();
    let issuer = scene.fixture.directory.keys.issuer.take().unwrap();
    let listed = |scene: &mut Scene| {
        let (pending, file) = scene.fixture.directory.pending_grants().unwrap();
        (pending, GrantRequests::from_text(&file).unwrap())
    };
    let first = crate::keys::generate().unwrap();
    assert!(!scene.ask(&first).unwrap());
    assert!(!scene.ask(&next).unwrap(), "the newest wish counts");
    assert!(scene.fixture.directory.alarms.iter().any(|alarm| alarm.contains("another new identity key")));
    assert!(!scene.ask(&next).unwrap());
    assert_eq!(scene.fixture.directory.status().pending, 1);
    scene.fixture.directory.read_back().unwrap();
    let (pending, file) = listed(&mut scene);
    assert_eq!(pending.len(), 1);
    assert_eq!((pending[0].identity, pending[0].renewal), (Some(next.verify_key().id()), false));
    assert!(matches!(file.requests[0].reason, GrantReason::Succession { .. }));
    assert!(scene.audit().contains("rotate-identity-request"));

    let view = file.mesh.view().unwrap();
    assert_eq!(view.check_request(&file.requests[0], unix_now()).unwrap().key, issuer.verify_key());
    let grants = vec![Envelope::seal(view.mesh(), &file.requests[0].grant, &[&issuer])];
    let signed = SignedGrants { mesh: view.mesh(), grants }.to_text();
    for _ in 0..2 {
        let imported = scene.fixture.directory.import_grants(&signed).unwrap();
        assert!(imported[0].error.is_none(), "{imported:?}");
    }
    assert_eq!(scene.grant().identity, next.verify_key());
    assert!(listed(&mut scene).0.is_empty());
    scene.fixture.directory.read_back().unwrap();
    assert!(listed(&mut scene).0.is_empty(), "the store has forgotten it, too");
}

#[test]
fn nobody_waits_for_a_node_that_is_out() {
    let mut scene = scene();
    let next = scene.next.clone();
    let issuer = scene.fixture.directory.keys.issuer.take().unwrap();
    assert!(!scene.ask(&next).unwrap());
    scene.fixture.directory.revoke("n1", "stolen", false, None).unwrap();
    assert!(scene.fixture.directory.pending_grants().unwrap().0.is_empty());
    scene.fixture.directory.forget_successors();
    scene.fixture.directory.keys.issuer = Some(issuer);
    scene.fixture.directory.restore("n1").unwrap();
    assert!(scene.fixture.directory.pending_grants().unwrap().0.is_empty(), "it would have to ask again");
}
