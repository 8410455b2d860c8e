//! An issuer's key is replaced while this node is away, or in frames that come one by one: peers stay.

use std::net::Ipv4Addr;

use mesh_protocol::peer::RecordHead;
use mesh_protocol::trust::View;

use super::*;
use crate::directory::Batch;
use crate::exchange::{Exchange, OwnWord};

/// Node 1 knows node 2, and is away from then on.
fn away(joined: &mut Joined, start: Instant) -> (Agent, usize) {
    let grant = joined.world.grant(2, 1);
    joined.world.record(2, 1, &grant);
    let mut agent = agent(joined, start);
    agent.hello();
    agent.handle_event(welcome(joined, None, START), now_at(start, 1)).unwrap();
    agent.handle_event(items(joined, 0, joined.world.history.len()), now_at(start, 1)).unwrap();
    assert!(peers(&mut agent, now_at(start, 1)).contains(&"n2".to_owned()));
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

/// Node 2, whose word comes inside the tunnel.
struct Neighbour {
    directory: Directory,
    exchange: Exchange,
    own: OwnWord,
    said: Vec<Vec<u8>>,
}

impl Neighbour {
    const ADDRESS: Ipv4Addr = Ipv4Addr::new(100, 64, 0, 2);

    /// It has heard all of the history from its keyserver.
    fn new(world: &World, record: &Envelope, now: Now) -> Self {
        let view = View::pinned(world.mesh, &world.history[..1]).unwrap();
        let mut directory = Directory::new(view, World::node(2), None);
        let (from, to) = (world.position_at(0), world.position());
        directory.begin_stream();
        directory.apply_batch(&Batch { from, to, items: &world.history, checkpoint: None }, now.instant).unwrap();
        let seq = record.unverified::<NodeRecord>().unwrap().seq;
        let record = RecordHead { seq, hash: record.hash(world.mesh) };
        let own = OwnWord { node: World::node(2), generation: 1, record, cut_off: false };
        Self { directory, exchange: Exchange::new(now.instant, 2), own, said: vec![] }
    }

    /// Talks with the agent until nobody has a word left. Gives the names of the peers each time that facts are given out.
    fn talk(&mut self, agent: &mut Agent, now: Now) -> Vec<Vec<String>> {
        let mut told = Vec::new();
        loop {
            let asked: Vec<_> = std::iter::from_fn(|| agent.poll_datagram(now)).collect();
            for (_, bytes) in asked.iter().filter(|(to, _)| *to == Self::ADDRESS) {
                self.exchange.handle_datagram(World::node(1), bytes, &mut self.directory, &self.own, now.instant);
            }
            let said: Vec<_> = std::iter::from_fn(|| self.exchange.poll_transmit()).map(|(_, bytes)| bytes).collect();
            for bytes in &said {
                agent.handle_datagram(Self::ADDRESS, bytes, 0, now);
                if agent.take_facts_due(now) {
                    told.push(peers(agent, now));
                }
            }
            if asked.is_empty() && said.is_empty() {
                return told;
            }
            assert!(self.said.len() < 1_000, "they talk for ever");
            self.said.extend(said);
        }
    }
}

/// The tunnel to node 2 comes up: it is greeted.
fn greet(agent: &mut Agent, now: Now) {
    let facts = agent.facts(now);
    let number = facts.peers.iter().find(|peer| peer.node == World::node(2)).unwrap().number;
    agent.set_live(&[number], now);
    agent.take_facts_due(now);
}

#[test]
fn a_peer_brings_what_grants_anew_before_anybody_is_let_go() {
    let (mut joined, start) = (joined(), Instant::now());
    // On more than one page, each with more than a peer may be asked for in vain.
    for number in 3..=30 {
        let grant = joined.world.grant(number, 1);
        joined.world.record(number, 1, &grant);
    }
    let (mut agent, _) = away(&mut joined, start);
    let now = now_at(start, 60);
    greet(&mut agent, now);
    joined.world.replace_issuer(0, 0);
    let grants: Vec<Envelope> = (1..=30).map(|number| joined.world.grant(number, 1)).collect();
    let record = joined.world.record(2, 2, &grants[1]);
    let told = Neighbour::new(&joined.world, &record, now).talk(&mut agent, now);
    assert_eq!(told.last().map(Vec::len), Some(29), "{told:?}");
    assert!(told.iter().all(|peers| peers.len() == 29), "somebody was let go: {told:?}");
    let view = agent.directory().view();
    assert!((view.policy().version, view.fallen().count()) == (2, 0));
    assert_eq!(view.member(World::node(2)).unwrap().record.as_ref().unwrap().envelope, record);
    assert!(agent.identity().membership().grant == grants[0], "its own new grant is on disk");
    let alarms = names_of(&agent.directory().alarms().standing());
    assert!(alarms.is_empty(), "{alarms:?}");
}

#[test]
fn a_peer_that_brings_half_of_it_gains_two_seconds_whatever_it_repeats() {
    let (mut joined, start) = (joined(), Instant::now());
    let (mut agent, _) = away(&mut joined, start);
    let now = now_at(start, 60);
    greet(&mut agent, now);
    let record = joined.world.history.last().unwrap().clone();
    joined.world.replace_issuer(0, 0);
    joined.world.grant_by_former(2, 2);
    let mut neighbour = Neighbour::new(&joined.world, &record, now);
    assert!(neighbour.talk(&mut agent, now).is_empty());
    assert_eq!(agent.directory().view().fallen().count(), 2);
    for second in [61, 62, 63] {
        // No keyserver answers, and the peer says all of it again.
        agent.session_ended();
        let (now, ignored) = (now_at(start, second), agent.exchange().counters().dropped);
        for bytes in neighbour.said.clone() {
            agent.handle_datagram(Neighbour::ADDRESS, &bytes, 0, now);
        }
        if second == 61 {
            assert!(!agent.take_facts_due(now));
            assert!(agent.poll_timeout() <= now_at(start, 62).instant);
            continue;
        }
        assert!(agent.exchange().counters().dropped == ignored + neighbour.said.len() as u64, "it is a stranger");
        assert!(agent.directory().address_of(World::node(2), now.instant).is_none());
        assert!(second == 63 || agent.take_facts_due(now));
        assert!(peers(&mut agent, now).is_empty(), "what the policy put out is out");
    }
    assert_eq!(names_of(&agent.directory().alarms().standing()), [alarm::DROPPED]);
}
