#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

use std::fs;

use proptest::prelude::*;

use super::*;
use crate::directory::tests::{START, World};
use crate::identity::ring::RETIRE_PREVIOUS;

pub(crate) struct Joined {
    _temp: tempfile::TempDir,
    pub(crate) state: StateDir,
    pub(crate) world: World,
    pub(crate) grant: Envelope,
}

/// Node 1 of a world, with its files.
pub(crate) fn joined() -> Joined {
    let temp = tempfile::tempdir().unwrap();
    let state = StateDir::open(&temp.path().join("state")).unwrap();
    let mut world = World::new();
    let grant = world.grant(1, 1);
    disk::write_identity(&state, &World::identity_key(1)).unwrap();
    let membership = Membership { mesh: world.mesh, grant: grant.clone(), keyservers: vec![] };
    Newcomer::open(&state, START).unwrap().admit(membership, 2).unwrap();
    Joined { _temp: temp, state, world, grant }
}

fn decoded(envelope: &Envelope) -> NodeRecord {
    envelope.unverified().unwrap()
}

#[test]
fn the_record_is_made_once_and_stored_before_it_is_given_out() {
    let joined = joined();
    let first = Identity::open(&joined.state, 2).unwrap().record().unwrap();
    let mut again = Identity::open(&joined.state, 2).unwrap();
    assert_eq!(again.record().unwrap(), first);
    assert_eq!(decoded(&first).seq, 1);
    let other_lanes = Identity::open(&joined.state, 4).unwrap().record().unwrap();
    assert_eq!((decoded(&other_lanes).seq, decoded(&other_lanes).lanes), (2, 4));
    assert_eq!(decoded(&other_lanes).before, Some(first.hash(joined.world.mesh)));
}

#[test]
fn the_trust_rules_take_every_step_of_the_succession() {
    let joined = joined();
    let mut identity = Identity::open(&joined.state, 2).unwrap();
    let mut view = mesh_protocol::trust::View::pinned(joined.world.mesh, &joined.world.history[..1]).unwrap();
    view.apply(&joined.grant).unwrap();
    view.apply(&identity.record().unwrap()).unwrap();
    assert_eq!(identity.promote(START, false), Ok(2));
    view.apply(&identity.record().unwrap()).unwrap();
    assert!(matches!(identity.promote(START + 10, false), Err(RotateError::PreviousInUse { epoch: 1, .. })));
    assert_eq!(identity.promote(START + 10, true), Ok(3));
    view.apply(&identity.record().unwrap()).unwrap();
    let over = START + 10 + RETIRE_PREVIOUS.as_secs();
    assert!(!identity.retire(over - 1).unwrap());
    assert!(identity.retire(over).unwrap());
    let record = decoded(&identity.record().unwrap());
    assert_eq!((record.previous, record.current.epoch, record.spare.epoch), (None, 3, 4));
    view.apply(&identity.record().unwrap()).unwrap();
    assert_eq!(identity.promote(over + 1, false), Ok(4));
}

#[test]
fn a_rotation_that_cannot_be_stored_changes_nothing() {
    let joined = joined();
    let mut identity = Identity::open(&joined.state, 2).unwrap();
    let before = identity.record().unwrap();
    // A directory in the way of the file beside: removing and writing it both fail.
    fs::create_dir_all(joined.state.path_of("keys.new/full")).unwrap();
    assert!(matches!(identity.promote(START, false), Err(RotateError::Storage(_))));
    assert_eq!(identity.ring().current().epoch, 1);
    assert_eq!(identity.record().unwrap(), before);
    fs::remove_dir_all(joined.state.path_of("keys.new")).unwrap();
    assert_eq!(identity.promote(START, false), Ok(2));
}

#[test]
fn promoted_keys_are_those_of_the_record_and_survive() {
    let joined = joined();
    let mut identity = Identity::open(&joined.state, 2).unwrap();
    let before = decoded(&identity.record().unwrap());
    identity.promote(START, false).unwrap();
    let keys = Identity::open(&joined.state, 2).unwrap().own_keys();
    assert_eq!((keys.current.0, keys.current.1.public()), (before.spare.epoch, before.spare.key));
    let previous = keys.previous.unwrap();
    assert_eq!((previous.0, previous.1.public()), (before.current.epoch, before.current.key));
}

#[test]
fn a_restored_backup_passes_what_others_hold() {
    let joined = joined();
    let backup = fs::read(joined.state.path_of("keys")).unwrap();
    let mut identity = Identity::open(&joined.state, 2).unwrap();
    identity.promote(START, true).unwrap();
    identity.promote(START, true).unwrap();
    let theirs = identity.record().unwrap();
    assert_eq!(identity.meet_own_record(&theirs, START).unwrap(), Met::Known);
    fs::write(joined.state.path_of("keys"), backup).unwrap();
    let mut restored = Identity::open(&joined.state, 2).unwrap();
    assert_eq!(restored.meet_own_record(&theirs, START).unwrap(), Met::Ahead);
    let (old, new) = (decoded(&theirs), decoded(&restored.record().unwrap()));
    assert_eq!((new.seq, new.before), (old.seq + 1, Some(theirs.hash(joined.world.mesh))));
    assert!(new.current.epoch > old.spare.epoch && new.kem.epoch > old.kem.epoch);
    let mut view = mesh_protocol::trust::View::pinned(joined.world.mesh, &joined.world.history[..1]).unwrap();
    view.apply(&joined.grant).unwrap();
    view.apply(&theirs).unwrap();
    view.apply(&restored.record().unwrap()).unwrap();
}

#[test]
fn a_record_by_somebody_else_is_not_met() {
    let joined = joined();
    let mut identity = Identity::open(&joined.state, 2).unwrap();
    let foreign = joined.world.sealed_record(2, 99, &joined.grant, 1);
    assert_eq!(identity.meet_own_record(&foreign, START).unwrap(), Met::NotOurs);
    assert_eq!(identity.ring().seq(), 0);
}

#[test]
fn a_lost_part_is_never_made_anew() {
    for part in [disk::IDENTITY, disk::KEYS] {
        let joined = joined();
        fs::remove_file(joined.state.path_of(part)).unwrap();
        assert!(matches!(Identity::open(&joined.state, 2), Err(IdentityError::Lost { .. })));
        assert!(matches!(Newcomer::open(&joined.state, START), Err(IdentityError::Lost { .. })));
        assert!(!joined.state.has(part));
    }
    let joined = joined();
    fs::remove_file(joined.state.path_of(disk::MEMBERSHIP)).unwrap();
    assert!(matches!(Identity::open(&joined.state, 2), Err(IdentityError::NotJoined { .. })));
}

#[test]
fn a_join_that_was_cut_off_goes_on_with_the_same_keys() {
    let temp = tempfile::tempdir().unwrap();
    let state = StateDir::open(temp.path().join("state").as_path()).unwrap();
    let first = Newcomer::open(&state, START).unwrap();
    let second = Newcomer::open(&state, START).unwrap();
    assert_eq!(first.key().verify_key(), second.key().verify_key());
    assert_eq!(first.ring.current.secret.public(), second.ring.current.secret.public());
}

#[test]
fn secrets_do_not_print() {
    let joined = joined();
    let identity = Identity::open(&joined.state, 2).unwrap();
    let printed = format!("{identity:?}");
    assert!(printed.contains("[redacted]"));
    assert!(!printed.contains(&format!("{:?}", identity.ring.current.secret.bytes())));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn decoding_keys_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..400), at: prop::sample::Index, flip: u8) {
        let ring = KeyRing::new(
            [TunnelSecret::from_bytes([1; 32]), TunnelSecret::from_bytes([2; 32])],
            kem::generate().unwrap(),
            START,
        );
        let mut whole = disk::encode_keys(&ring);
        prop_assert!(disk::decode_keys(&whole).is_ok());
        let index = at.index(whole.len());
        let _ = disk::decode_keys(&whole[..index]);
        whole[index] ^= flip;
        let _ = disk::decode_keys(&whole);
        let _ = disk::decode_keys(&bytes);
    }
}
