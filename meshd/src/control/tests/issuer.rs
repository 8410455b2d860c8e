//! An issuer's key is replaced while this node is away, or in frames that come one by one: peers stay.

use super::*;

/// Node 1 knows node 2, and is away from then on.
fn away(joined: &mut Joined, start: Instant) -> (Agent, usize) {
    let grant = joined.world.grant(2, 1);
    joined.world.record(2, 1, &grant);
    let mut agent = agent(joined, start);
    agent.hello();
    agent.handle_event(welcome(joined, None, START), now_at(start, 1)).unwrap();
    agent.handle_event(items(joined, 0, joined.world.history.len()), now_at(start, 1)).unwrap();
    assert_eq!(peers(&mut agent, now_at(start, 1)), ["n2"]);
    agent.session_ended();
    (agent, joined.world.history.len())
}

/// Changes of the history; with a checkpoint if they lead to its end.
fn items(joined: &Joined, from: usize, to: usize) -> SessionEvent {
    let last = to == joined.world.history.len();
    SessionEvent::Items {
        from: joined.world.position_at(from),
        to: joined.world.position_at(to),
        items: joined.world.history[from..to].to_vec(),
        checkpoint: last.then(|| joined.world.checkpoint(START + 2)),
    }
}

fn peers(agent: &mut Agent, now: Now) -> Vec<String> {
    agent.facts(now).peers.iter().map(|peer| peer.name.to_string()).collect()
}

/// The first policy that lacks the key comes with the session, what grants anew after it.
fn come_back(agent: &mut Agent, joined: &mut Joined, policies: Vec<Envelope>, now: Now) {
    agent.hello();
    agent.take_facts_due(now);
    let SessionEvent::Welcome { checkpoint, own_record, own_grant, observed, .. } = welcome(joined, None, START + 2)
    else {
        panic!("no welcome")
    };
    let welcome = SessionEvent::Welcome { checkpoint, policies, own_record, own_grant, observed };
    agent.handle_event(welcome, now).unwrap();
}

#[test]
fn peers_are_not_let_go_between_a_policy_and_the_grants_that_follow_it() {
    let (mut joined, start) = (joined(), Instant::now());
    let (mut agent, at) = away(&mut joined, start);
    // One that came and spoke under the key that is no more: history to this node.
    let third = joined.world.grant(3, 1);
    joined.world.record(3, 1, &third);
    let policy = joined.world.replace_issuer(0, 0);
    joined.grant = joined.world.grant(1, 1);
    joined.world.grant(2, 1);
    joined.world.grant(3, 1);
    let now = now_at(start, 60);
    come_back(&mut agent, &mut joined, vec![policy], now);
    assert!(!agent.take_facts_due(now), "half of the change would close tunnels");
    agent.handle_event(items(&joined, at, at + 3), now).unwrap();
    assert!(!agent.take_facts_due(now));
    agent.handle_event(items(&joined, at + 3, joined.world.history.len()), now).unwrap();
    assert!(agent.take_facts_due(now));
    assert_eq!(peers(&mut agent, now), ["n2"], "with the keys that it showed before; n3 has to speak again");
    let alarms = names_of(&agent.directory().alarms().standing());
    assert!(alarms.is_empty(), "{alarms:?}");
    assert_eq!(agent.identity().grant().generation, 1);
    assert!(agent.identity().membership().grant == joined.grant, "its own new grant is on disk");
}

#[test]
fn a_keyserver_that_sends_half_of_it_gains_two_seconds() {
    let (mut joined, start) = (joined(), Instant::now());
    let (mut agent, _) = away(&mut joined, start);
    let policy = joined.world.replace_issuer(0, 0);
    joined.grant = joined.world.grant(1, 1);
    let now = now_at(start, 60);
    come_back(&mut agent, &mut joined, vec![policy], now);
    assert!(!agent.take_facts_due(now));
    assert!(agent.poll_timeout() <= now_at(start, 62).instant);
    let later = now_at(start, 62);
    assert!(agent.take_facts_due(later));
    assert!(peers(&mut agent, later).is_empty(), "what the policy put out is out");
    assert_eq!(names_of(&agent.directory().alarms().standing()), [alarm::DROPPED]);
}

#[test]
fn what_a_former_key_signs_after_its_policy_raises_an_alarm_also_in_a_first_frame() {
    let (mut joined, start) = (joined(), Instant::now());
    let (mut agent, at) = away(&mut joined, start);
    let policy = joined.world.replace_issuer(1, 2);
    let forged = joined.world.grant_by_former(3, 1);
    joined.grant = joined.world.grant(1, 2);
    joined.world.grant(2, 2);
    let now = now_at(start, 60);
    come_back(&mut agent, &mut joined, vec![policy], now);
    agent.handle_event(items(&joined, at, joined.world.history.len()), now).unwrap();
    assert_eq!(peers(&mut agent, now), ["n2"]);
    assert!(forged.kind() == Kind::NodeGrant && agent.directory().view().members().count() == 2);
    assert_eq!(names_of(&agent.directory().alarms().standing()), [alarm::REFUSED]);
}
