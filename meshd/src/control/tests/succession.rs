//! The identity key is replaced, and this process ends at each step of it.

use std::fs;

use mesh_protocol::key::VerifyKey;
use mesh_protocol::local::IdentityPhase;
use mesh_protocol::record::{Handover, NodeGrant};

use super::*;

/// Tells the agent that the keyserver has its newest record.
fn publish(agent: &mut Agent, now: Now) {
    let seq = agent.identity().ring().seq();
    agent.handle_event(SessionEvent::Published { seq, endpoints: false }, now).unwrap();
}

fn connect(agent: &mut Agent, joined: &Joined, now: Now) -> Vec<NodeMessage> {
    agent.session_ended();
    agent.hello();
    agent.handle_event(welcome(joined, None, now.wall), now).unwrap();
    drain(agent)
}

/// A connected node whose record is known.
fn connected(start: Instant) -> (Joined, Agent) {
    let mut joined = joined();
    let mut agent = agent(&mut joined, start);
    connect(&mut agent, &joined, now_at(start, 1));
    publish(&mut agent, now_at(start, 1));
    (joined, agent)
}

/// What was asked for.
fn wish(said: &[NodeMessage]) -> Option<(VerifyKey, Handover)> {
    said.iter().find_map(|message| match message {
        NodeMessage::Succeed { identity, handover } => Some((*identity, handover.clone())),
        _ => None,
    })
}

fn on_disk(joined: &Joined, name: &str) -> Option<VerifyKey> {
    let seed = fs::read(joined.state.path_of(name)).ok()?;
    Some(SigningKey::from_seed(seed.try_into().unwrap()).verify_key())
}

#[test]
fn an_end_of_the_process_at_any_step_leaves_a_node_that_goes_on() {
    for ends in 0..7 {
        let start = Instant::now();
        let (mut joined, mut agent) = connected(start);
        let first = agent.identity().key().verify_key();
        let restart = |at: usize, agent: &mut Agent, joined: &Joined| {
            if ends == at {
                *agent = reopened(joined, now_at(start, 10));
            }
        };
        let (from, to) = agent.succeed().unwrap();
        assert_eq!(from, first.id());
        restart(0, &mut agent, &joined);
        assert_eq!(agent.succeed().unwrap(), (from, to), "asked twice is once");
        let (next, handover) = wish(&connect(&mut agent, &joined, now_at(start, 11))).unwrap();
        assert_eq!((next.id(), agent.identity_status().phase), (to, IdentityPhase::Asking));
        restart(1, &mut agent, &joined);
        assert_eq!((on_disk(&joined, "identity"), on_disk(&joined, "identity-next")), (Some(first), Some(next)));

        joined.grant = joined.world.succeeded(&joined.grant, next, handover);
        let before = published_records(&connect(&mut agent, &joined, now_at(start, 12)));
        assert!(
            agent.take_reconnect() || ends == 2,
            "the session is made anew, before anything is said in it: {before:?}"
        );
        restart(2, &mut agent, &joined);
        assert_eq!(agent.identity().key().verify_key(), next);
        assert_eq!((on_disk(&joined, "identity"), on_disk(&joined, "identity-next")), (Some(first), Some(next)));
        assert_eq!(agent.identity_status().phase, IdentityPhase::Publishing);
        assert!(matches!(agent.succeed(), Err(RotateError::IdentityUnsettled)));
        let NodeMessage::Hello { grant: Some(shown), .. } = agent.hello() else { panic!("it shows no grant") };
        assert_eq!(shown, joined.grant);

        let said = connect(&mut agent, &joined, now_at(start, 13));
        assert!(wish(&said).is_none());
        let record = said.iter().find_map(|message| match message {
            NodeMessage::Publish { envelope } if envelope.kind() == Kind::NodeRecord => Some(envelope),
            _ => None,
        });
        let record: NodeRecord = record.unwrap().verified(joined.world.mesh, &[next], 1).unwrap();
        assert_eq!((record.grant, record.node), (joined.grant.hash(joined.world.mesh), World::node(1)));
        restart(3, &mut agent, &joined);
        if ends == 4 {
            // In the middle of the last step: the key is in its place, and still in the other, too.
            fs::copy(joined.state.path_of("identity-next"), joined.state.path_of("identity")).unwrap();
        }
        restart(4, &mut agent, &joined);
        connect(&mut agent, &joined, now_at(start, 14));
        publish(&mut agent, now_at(start, 14));
        restart(5, &mut agent, &joined);
        assert_eq!((on_disk(&joined, "identity"), on_disk(&joined, "identity-next")), (Some(next), None), "{ends}");
        let status = agent.identity_status();
        assert_eq!((status.key, status.next, status.phase), (to, None, IdentityPhase::Settled));
        assert_eq!(agent.identity().node(), World::node(1));
        agent.succeed().unwrap();
    }
}

#[test]
fn a_directory_that_is_older_than_the_membership_takes_nothing_back() {
    let start = Instant::now();
    let (mut joined, mut agent) = connected(start);
    agent.succeed().unwrap();
    let (next, handover) = wish(&connect(&mut agent, &joined, now_at(start, 2))).unwrap();
    let older = joined.grant.clone();
    joined.grant = joined.world.succeeded(&older, next, handover);
    connect(&mut agent, &joined, now_at(start, 3));
    // The directory's file is written now and then, the membership at once.
    let mut agent = reopened(&joined, now_at(start, 4));
    assert_eq!(agent.directory().view().member(World::node(1)).unwrap().grant.object.identity, next);
    joined.grant = older;
    connect(&mut agent, &joined, now_at(start, 5));
    assert_eq!(agent.identity().key().verify_key(), next, "a keyserver that went back does not take it away");
    assert_eq!(agent.identity().grant().generation, 2);
}

#[test]
fn a_key_that_waits_for_its_issuer_is_asked_for_once_a_session() {
    let start = Instant::now();
    let (joined, mut agent) = connected(start);
    let (_, to) = agent.succeed().unwrap();
    assert!(wish(&drain(&mut agent)).is_some());
    let answer = |granted, refusal| SessionEvent::Succession { identity: to, granted, refusal };
    agent.handle_event(answer(false, None), now_at(start, 2)).unwrap();
    assert_eq!(agent.identity_status().phase, IdentityPhase::Waiting);
    agent.handle_timeout(now_at(start, 70));
    assert!(wish(&drain(&mut agent)).is_none());
    assert!(wish(&connect(&mut agent, &joined, now_at(start, 80))).is_some(), "the keyserver may be another one");

    let refusal = Refusal { code: RefusalCode::Unavailable, message: "disk full".into() };
    agent.handle_event(answer(false, Some(refusal)), now_at(start, 81)).unwrap();
    let status = agent.identity_status();
    assert_eq!((status.phase, status.error.as_deref()), (IdentityPhase::Refused, Some("disk full")));
    agent.handle_timeout(now_at(start, 150));
    assert!(wish(&drain(&mut agent)).is_some(), "asked again");
    let unknown = Refusal { code: RefusalCode::BadMessage, message: "message 6 is not known to this keyserver".into() };
    agent.handle_event(SessionEvent::Refused(unknown), now_at(start, 151)).unwrap();
    let error = agent.identity_status().error.unwrap();
    assert!(error.contains("earlier version"), "{error}");
}

#[test]
fn a_grant_to_a_key_that_is_elsewhere_raises_an_alarm_and_changes_nothing() {
    let start = Instant::now();
    let (mut joined, mut agent) = connected(start);
    let first = agent.identity().key().verify_key();
    // Whoever copied the disk asks for a key of their own.
    let theirs = SigningKey::from_seed([77; 32]);
    let handover = Handover::sign(joined.world.mesh, World::node(1), &World::identity_key(1), &theirs);
    joined.grant = joined.world.succeeded(&joined.grant, theirs.verify_key(), handover);
    connect(&mut agent, &joined, now_at(start, 2));
    assert!(!agent.take_reconnect());
    assert_eq!((agent.identity().key().verify_key(), agent.identity().grant().generation), (first, 1));
    assert!(names_of(&agent.directory().alarms().standing()).contains(&alarm::IDENTITY));
    let agent = reopened(&joined, now_at(start, 3));
    assert_eq!(agent.identity().key().verify_key(), first);
}

#[test]
fn a_key_that_cannot_be_stored_is_not_asked_for() {
    let start = Instant::now();
    let (joined, mut agent) = connected(start);
    // A directory in the way of the file beside: removing and writing it both fail.
    fs::create_dir_all(joined.state.path_of("identity-next.new/full")).unwrap();
    assert!(matches!(agent.succeed(), Err(RotateError::Storage(_))));
    assert!(wish(&drain(&mut agent)).is_none());
    assert_eq!(agent.identity_status().phase, IdentityPhase::Settled);
    fs::remove_dir_all(joined.state.path_of("identity-next.new")).unwrap();
    agent.succeed().unwrap();
}

#[test]
fn records_signed_with_the_key_before_are_this_nodes_own() {
    let start = Instant::now();
    let (mut joined, mut agent) = connected(start);
    let said = agent.identity().ring().record().unwrap().clone();
    agent.succeed().unwrap();
    let (next, handover) = wish(&connect(&mut agent, &joined, now_at(start, 2))).unwrap();
    joined.grant = joined.world.succeeded(&joined.grant, next, handover);
    connect(&mut agent, &joined, now_at(start, 3));
    agent.session_ended();
    agent.hello();
    agent.handle_event(welcome(&joined, Some(said.clone()), START + 4), now_at(start, 4)).unwrap();
    let records = published_records(&drain(&mut agent));
    let said: NodeRecord = said.unverified().unwrap();
    assert_eq!((records[0].seq, records[0].current), (said.seq + 1, said.current), "the tunnels' keys stay");
    assert!(names_of(&agent.directory().alarms().standing()).is_empty());
    let grant: NodeGrant = joined.grant.unverified().unwrap();
    assert_eq!(grant.mesh_v6, agent.identity().grant().mesh_v6);
}
