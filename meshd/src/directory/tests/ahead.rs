//! What comes late, or out of turn, of a node whose grants follow each other fast.

use mesh_protocol::record::Handover;

use super::*;

/// The grant after `held` for another identity key of node 2.
fn succeed(world: &mut World, held: &Envelope, from: &SigningKey, to: u8) -> (Envelope, SigningKey) {
    let to = SigningKey::from_seed([to; 32]);
    let handover = Handover::sign(world.mesh, World::node(2), from, &to);
    (world.succeeded(held, to.verify_key(), handover), to)
}

fn record_by(world: &World, seq: u64, grant: &Envelope, key: &SigningKey) -> Envelope {
    let said: NodeRecord = world.sealed_record(2, seq, grant, 1).unverified().unwrap();
    Envelope::seal(world.mesh, &said, &[key])
}

#[test]
fn two_grants_since_a_node_spoke_cost_nobody_its_record() {
    let mut world = World::new();
    let (mut directory, own) = world.joined();
    let first = world.grant(2, 1);
    world.record(2, 1, &first);
    let (second, key) = succeed(&mut world, &first, &World::identity_key(2), 150);
    let (third, _) = succeed(&mut world, &second, &key, 151);
    world.feed_all(&mut directory);
    assert_eq!(names(&mut directory, &own), ["n2"]);
    let mut again = disk::decode(&directory.encode(), world.mesh, World::node(1)).unwrap();
    assert_eq!(names(&mut again, &own), ["n2"], "its record names the first of three grants");
    assert!(again.position().is_some(), "and everything was accepted");
    assert_eq!(again.view().member(World::node(2)).unwrap().grant.envelope, third);
}

#[test]
fn a_keyserver_that_tells_later_than_peers_raises_no_alarm() {
    let mut world = World::new();
    let (mut directory, _) = world.joined();
    let first = world.grant(2, 1);
    world.record(2, 1, &first);
    world.feed_all(&mut directory);
    let at = world.history.len();
    let (second, key) = succeed(&mut world, &first, &World::identity_key(2), 150);
    let said = record_by(&world, 2, &second, &key);
    world.push(said.clone());
    let (third, key) = succeed(&mut world, &second, &key, 151);
    let newest = record_by(&world, 3, &third, &key);
    world.push(newest.clone());
    // A peer is faster, and knows only the newest of each.
    assert_eq!(directory.take_from_peer(&third, Instant::now()), Taken::News);
    assert_eq!(directory.take_from_peer(&said, Instant::now()), Taken::Refused);
    world.feed(&mut directory, at).unwrap();
    assert_eq!(directory.view().member(World::node(2)).unwrap().record.as_ref().unwrap().envelope, newest);
    assert_eq!(alarms(&mut directory), [""; 0]);
    // From then on what is old is nobody's to show.
    directory.apply(&second, Instant::now());
    assert_eq!(alarms(&mut directory), [alarm::REFUSED]);
}

#[test]
fn endpoints_that_a_replaced_key_signed_are_shown_to_nobody() {
    let mut world = World::new();
    let (mut directory, _) = world.joined();
    let first = world.grant(2, 1);
    world.record(2, 1, &first);
    world.feed_all(&mut directory);
    let candidates = vec!["192.0.2.2:7100".parse().unwrap()];
    let endpoints = Endpoints { node: World::node(2), seq: 1, candidates, expires: START + 3600 };
    let told = Envelope::seal(world.mesh, &endpoints, &[&World::identity_key(2)]);
    directory.apply_live(&[told], Instant::now());
    let shown = |directory: &Directory| directory.view().member(World::node(2)).unwrap().endpoints_to_show().is_some();
    assert!(shown(&directory));
    let (second, key) = succeed(&mut world, &first, &World::identity_key(2), 150);
    directory.apply(&second, Instant::now());
    assert!(shown(&directory), "the node has not spoken with the new one yet");
    directory.apply(&record_by(&world, 2, &second, &key), Instant::now());
    assert!(!shown(&directory));
    assert!(directory.view().member(World::node(2)).unwrap().endpoints.is_some(), "to this node they are a hint still");
    assert_eq!(alarms(&mut directory), [""; 0]);
}
