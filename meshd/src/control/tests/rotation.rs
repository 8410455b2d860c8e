//! Rotation in virtual time: the schedule, what a keyserver may ask for, and an end of this process at each step.

use super::*;
use crate::identity::KeysConfig;

const HOUR: u64 = 3600;
const DAY: u64 = 24 * HOUR;

/// Tells the agent that the keyserver has its newest record.
fn publish(agent: &mut Agent, now: Now) {
    let seq = agent.identity().ring().seq();
    agent.handle_event(SessionEvent::Published { seq, endpoints: false }, now).unwrap();
}

fn due(agent: &Agent) -> u64 {
    let ring = agent.identity().ring();
    KeysConfig::default().due(agent.identity().node(), ring.current().epoch, ring.promoted()).unwrap() - START
}

fn connect(agent: &mut Agent, joined: &Joined, now: Now) -> Vec<NodeMessage> {
    agent.hello();
    agent.handle_event(welcome(joined, None, now.wall), now).unwrap();
    drain(agent)
}

#[test]
fn the_schedule_rotates_once_when_it_is_due_and_over_restarts() {
    let (mut joined, start) = (joined(), Instant::now());
    let mut agent = agent(&mut joined, start);
    connect(&mut agent, &joined, now_at(start, 1));
    publish(&mut agent, now_at(start, 1));
    let first = due(&agent);
    assert!((DAY..DAY + DAY / 10).contains(&first), "{first}");
    agent.handle_timeout(now_at(start, first - 1));
    assert_eq!(agent.keys().current.0, 1, "not yet");
    drop(agent);
    // Another process goes on where this one was, to the second.
    let mut agent = reopened(&joined, now_at(start, first - 1));
    assert_eq!(due(&agent), first);
    connect(&mut agent, &joined, now_at(start, first - 1));
    publish(&mut agent, now_at(start, first - 1));
    agent.handle_timeout(now_at(start, first));
    let said = drain(&mut agent);
    assert_eq!(published_records(&said)[0].current.epoch, 2, "{said:?}");
    publish(&mut agent, now_at(start, first));
    agent.handle_timeout(now_at(start, first + DAY - 60));
    assert_eq!((agent.keys().current.0, agent.rotations().schedule), (2, 1));
    // Switched off for ten days: one rotation, not ten.
    drop(agent);
    let mut agent = reopened(&joined, now_at(start, first + 10 * DAY));
    connect(&mut agent, &joined, now_at(start, first + 10 * DAY));
    publish(&mut agent, now_at(start, first + 10 * DAY));
    for minute in 0..10 {
        agent.handle_timeout(now_at(start, first + 10 * DAY + minute * 60));
        publish(&mut agent, now_at(start, first + 10 * DAY + minute * 60));
    }
    assert_eq!(agent.keys().current.0, 3);
}

#[test]
fn clock_steps_neither_hold_up_the_schedule_nor_run_away_with_it() {
    let (mut joined, start) = (joined(), Instant::now());
    let mut agent = agent(&mut joined, start);
    connect(&mut agent, &joined, now_at(start, 1));
    publish(&mut agent, now_at(start, 1));
    // A year ahead for some minutes: one rotation.
    for minute in 1..5 {
        let now = Now { instant: start + Duration::from_secs(minute * 60), wall: START + 365 * DAY + minute * 60 };
        agent.handle_timeout(now);
        agent.note_runtime(None, now);
        publish(&mut agent, now);
    }
    assert_eq!(agent.keys().current.0, 2);
    // And back: peers would refuse its handshakes, so it rotates again, and counts from the clock that holds now.
    for minute in 5..10 {
        let now = now_at(start, minute * 60);
        agent.handle_timeout(now);
        agent.note_runtime(None, now);
        publish(&mut agent, now);
    }
    assert_eq!((agent.keys().current.0, agent.rotations().clock), (3, 1));
    assert!((DAY..DAY + HOUR * 3).contains(&due(&agent)), "{}", due(&agent));
}

#[test]
fn without_a_keyserver_one_rotation_happens_and_the_next_waits_for_it_to_be_known() {
    let (mut joined, start) = (joined(), Instant::now());
    let mut agent = agent(&mut joined, start);
    for day in 1..9 {
        agent.handle_timeout(now_at(start, day * DAY + HOUR * 3));
    }
    assert_eq!(agent.keys().current.0, 2, "peers know one spare key only");
    let back = now_at(start, 9 * DAY + HOUR);
    let said = connect(&mut agent, &joined, back);
    assert_eq!(published_records(&said)[0].current.epoch, 2);
    publish(&mut agent, back);
    agent.handle_timeout(now_at(start, 9 * DAY + HOUR + 60));
    assert_eq!(agent.keys().current.0, 3);
}

#[test]
fn short_intervals_let_the_previous_key_give_way_and_off_means_off() {
    for (every, expected) in [(Some(Duration::from_secs(HOUR)), 5), (None, 1)] {
        let (joined, start) = (joined(), Instant::now());
        let (mut directory, _) = directory_of(&joined);
        directory.save(&joined.state).unwrap();
        let identity = Identity::open(&joined.state, 2).unwrap();
        let keys = KeysConfig { rotate_every: every };
        let setup = ControlSetup { keys, ..setup("192.0.2.9:7443") };
        let mut agent = Agent::new(setup, identity, directory, HostFacts::default(), now_at(start, 0));
        connect(&mut agent, &joined, now_at(start, 1));
        publish(&mut agent, now_at(start, 1));
        for minute in 1..5 * 60 {
            agent.handle_timeout(now_at(start, minute * 60));
            publish(&mut agent, now_at(start, minute * 60));
        }
        assert_eq!(agent.keys().current.0, expected, "{every:?}");
    }
}

#[test]
fn a_keyserver_cannot_use_up_the_keys_of_a_node_by_asking() {
    let (mut joined, start) = (joined(), Instant::now());
    let mut agent = agent(&mut joined, start);
    connect(&mut agent, &joined, now_at(start, 1));
    publish(&mut agent, now_at(start, 1));
    let ask = |agent: &mut Agent, second: u64| {
        let after = agent.keys().current.0;
        let event = SessionEvent::Rotate { request: 9, force: true, after: Some(after) };
        agent.handle_event(event, now_at(start, second)).unwrap();
        let said = drain(agent);
        publish(agent, now_at(start, second));
        let answer = said.into_iter().find_map(|message| match message {
            NodeMessage::Rotated { epoch, error, .. } => Some((epoch, error)),
            _ => None,
        });
        answer.unwrap()
    };
    let granted = (0..3_000).filter(|second| ask(&mut agent, 2 + second).0.is_some()).count();
    assert!((32..=37).contains(&granted), "{granted} in 50 minutes");
    let (_, error) = ask(&mut agent, 3_003);
    assert!(error.unwrap().contains("--local"), "and is told where it still goes");
    assert!(agent.rotate(true, now_at(start, 3_004)).is_ok(), "an operator of the node is not held up");
    publish(&mut agent, now_at(start, 3_004));
    assert!(ask(&mut agent, 4_000).0.is_some(), "one more after a while");
    // An answer that was lost costs nothing.
    let event = SessionEvent::Rotate { request: 9, force: true, after: Some(1) };
    for second in 0..100 {
        agent.handle_event(event.clone(), now_at(start, 4_001 + second)).unwrap();
    }
    let current = agent.keys().current.0;
    assert!(drain(&mut agent).contains(&NodeMessage::Rotated { request: 9, epoch: Some(current), error: None }));
}

#[test]
fn an_end_between_any_two_steps_of_a_rotation_promotes_exactly_once() {
    // Ended before the request was taken; after it is on disk; after the record was sent; after it was acknowledged.
    for ended_after in 0..4 {
        let (mut joined, start) = (joined(), Instant::now());
        let mut first = agent(&mut joined, start);
        connect(&mut first, &joined, now_at(start, 1));
        publish(&mut first, now_at(start, 1));
        let request = SessionEvent::Rotate { request: 5, force: false, after: Some(1) };
        if ended_after >= 1 {
            first.handle_event(request.clone(), now_at(start, 2)).unwrap();
        }
        let sent = if ended_after >= 2 { drain(&mut first) } else { Vec::new() };
        if ended_after >= 3 {
            publish(&mut first, now_at(start, 3));
        }
        drop(first);
        let mut second = reopened(&joined, now_at(start, 4));
        let stored = sent.iter().find_map(|message| match message {
            NodeMessage::Publish { envelope } if envelope.kind() == Kind::NodeRecord => Some(envelope.clone()),
            _ => None,
        });
        second.hello();
        second.handle_event(welcome(&joined, stored, START + 4), now_at(start, 4)).unwrap();
        // The keyserver asks again with each new session until the record is there.
        second.handle_event(request, now_at(start, 5)).unwrap();
        let said = drain(&mut second);
        assert!(
            said.contains(&NodeMessage::Rotated { request: 5, epoch: Some(2), error: None }),
            "{ended_after}: {said:?}"
        );
        let record = published_records(&said).pop().unwrap();
        assert_eq!((record.seq, record.current.epoch), (2, 2), "{ended_after}: {said:?}");
        assert_eq!(second.keys().current.0, 2, "{ended_after}");
    }
}
