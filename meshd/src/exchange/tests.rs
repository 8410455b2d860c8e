//! Nodes that talk to each other without sockets: every datagram one sends is handed to the other.

#![allow(clippy::unwrap_used, reason = "tests")]

use mesh_protocol::id::Hash;
use mesh_protocol::peer::{MAX_DATAGRAM_BYTES, MAX_OBJECT_BYTES, Piece};
use mesh_protocol::record::Checkpoint;
use mesh_protocol::trust::View;
use proptest::prelude::*;

use super::*;
use crate::directory::alarm;
use crate::directory::tests::{START, World};

/// One node: its directory and its exchange.
struct Party {
    number: u8,
    directory: Directory,
    exchange: Exchange,
    own: OwnWord,
    fresh: u32,
    own_records: Vec<Envelope>,
}

impl Party {
    /// A node that has seen the history up to `seen` items.
    fn new(world: &World, number: u8, seen: usize, now: Instant) -> Self {
        let mut view = View::pinned(world.mesh, &world.history[..1]).unwrap();
        for envelope in &world.history[1..seen] {
            view.apply(envelope).unwrap();
        }
        let record = view.member(World::node(number)).and_then(serve::record_head).unwrap();
        let own = OwnWord { node: World::node(number), generation: 1, record, cut_off: true };
        let directory = Directory::new(view, own.node, None);
        Self { number, directory, exchange: Exchange::new(now, number.into()), own, fresh: 0, own_records: Vec::new() }
    }

    fn hears(&mut self, from: NodeId, bytes: &[u8], now: Instant) {
        let news = self.exchange.handle_datagram(from, bytes, &mut self.directory, &self.own, now);
        self.fresh += u32::from(news.fresh_checkpoint);
        self.own_records.extend(news.own_record);
    }

    fn alarms(&mut self) -> Vec<&'static str> {
        self.directory.alarms().standing().iter().map(|alarm| alarm.name).collect()
    }
}

/// Hands datagrams to and fro until nobody has one, and runs timers each second. Gives how many crossed.
fn talk(parties: &mut [Party], start: Instant, seconds: u64) -> usize {
    let mut crossed = 0;
    for second in 0..seconds {
        let now = start + Duration::from_secs(second);
        for party in parties.iter_mut() {
            party.exchange.handle_timeout(&party.directory, &party.own, now);
        }
        loop {
            let mut sent = Vec::new();
            for party in parties.iter_mut() {
                sent.extend(
                    std::iter::from_fn(|| party.exchange.poll_transmit())
                        .map(|(to, bytes)| (party.own.node, to, bytes)),
                );
            }
            if sent.is_empty() {
                break;
            }
            crossed += sent.len();
            assert!(crossed < 10_000, "they talk for ever");
            for (from, to, bytes) in sent {
                assert!(bytes.len() <= MAX_DATAGRAM_BYTES);
                if let Some(party) = parties.iter_mut().find(|party| party.own.node == to) {
                    party.hears(from, &bytes, now);
                }
            }
        }
    }
    crossed
}

/// Nodes 1, 2 and 3 with records; how much of the history that is.
fn world() -> (World, usize) {
    let mut world = World::new();
    for number in 1..=3 {
        let grant = world.grant(number, 1);
        world.record(number, 1, &grant);
    }
    let seen = world.history.len();
    (world, seen)
}

#[test]
fn a_revocation_spreads_without_a_keyserver() {
    let ((mut world, seen), now) = (world(), Instant::now());
    world.revoke(3);
    let mut parties = [Party::new(&world, 1, seen + 1, now), Party::new(&world, 2, seen, now)];
    assert!(parties[1].directory.view().member(World::node(3)).is_some());
    talk(&mut parties, now, 2);
    assert!(parties[1].directory.view().member(World::node(3)).is_none());
    assert!(parties[1].alarms().is_empty());
    // Nothing new: a round now and then, and no more.
    let crossed = talk(&mut parties, now + Duration::from_secs(2), 120);
    assert!(crossed < 60, "{crossed} datagrams in two idle minutes");
}

#[test]
fn news_that_comes_later_is_told_at_once() {
    let ((mut world, seen), now) = (world(), Instant::now());
    let mut parties = [Party::new(&world, 1, seen, now), Party::new(&world, 2, seen, now)];
    talk(&mut parties, now, 3);
    let revocation = world.revoke(3);
    let first = &mut parties[0];
    first.directory.apply(&revocation, now);
    first.exchange.notice_news(&first.directory, &first.own, now + Duration::from_secs(3));
    talk(&mut parties, now + Duration::from_secs(4), 1);
    assert!(parties[1].directory.view().member(World::node(3)).is_none());
}

#[test]
fn a_node_nobody_told_of_is_learned_with_policy_grant_and_record() {
    let ((mut world, seen), now) = (world(), Instant::now());
    let grant = world.grant(4, 1);
    world.record(4, 1, &grant);
    let all = world.history.len();
    let mut parties = [Party::new(&world, 1, all, now), Party::new(&world, 2, seen, now)];
    // Positions are what tells a node that there is something to list.
    let items = &world.history;
    let batch = crate::directory::Batch { from: world.position_at(0), to: world.position(), items, checkpoint: None };
    parties[0].directory.begin_stream();
    parties[0].directory.apply_batch(&batch, now).unwrap();
    talk(&mut parties, now, 2);
    let learned = parties[1].directory.view().member(World::node(4));
    assert!(learned.is_some_and(|member| member.record.is_some()));
    // With a keyserver at hand nobody lists.
    let mut connected = Party::new(&world, 3, seen, now);
    connected.own.cut_off = false;
    let [first, _] = parties;
    let mut parties = [first, connected];
    talk(&mut parties, now + Duration::from_secs(5), 2);
    assert!(parties[1].directory.view().member(World::node(4)).is_none());
}

#[test]
fn a_checkpoint_passed_on_ends_exposure_once() {
    let ((world, seen), now) = (world(), Instant::now());
    let mut parties = [Party::new(&world, 1, seen, now), Party::new(&world, 2, seen, now)];
    assert!(parties[0].directory.apply_checkpoint(&world.checkpoint(START + 60), now));
    talk(&mut parties, now, 60);
    assert_eq!(parties[1].fresh, 1);
    assert_eq!(parties[1].directory.newest_checkpoint().unwrap().0.time, START + 60);
    // It is no word of a keyserver to this node: where to resume is untouched.
    assert!(parties[1].directory.checkpoint().is_none());
}

#[test]
fn a_keyserver_that_shows_two_worlds_is_named_by_both() {
    let ((world, seen), now) = (world(), Instant::now());
    let mut parties = [Party::new(&world, 1, seen, now), Party::new(&world, 2, seen, now)];
    let other = |checkpoint: Checkpoint| Checkpoint { state: Hash([9; 32]), ..checkpoint };
    parties[0].directory.apply_checkpoint(&world.checkpoint(START), now);
    let honest: Checkpoint = world.checkpoint(START + 1).unverified().unwrap();
    let split = Envelope::seal(world.mesh, &other(honest), &[&World::key()]);
    parties[1].directory.apply_checkpoint(&split, now);
    talk(&mut parties, now, 60);
    for party in &mut parties {
        assert_eq!(party.alarms(), [alarm::EQUIVOCATION], "node {}", party.number);
        assert!(party.directory.is_stale());
        assert!(party.directory.equivocations() > 0);
        assert_eq!(party.directory.view().members().count(), 3, "tunnels go on");
    }
}

#[test]
fn a_node_that_caught_it_shows_the_proof_to_others() {
    let ((world, seen), now) = (world(), Instant::now());
    let mut parties = [Party::new(&world, 1, seen, now), Party::new(&world, 2, seen, now)];
    parties[0].directory.apply_checkpoint(&world.checkpoint(START), now);
    talk(&mut parties, now, 30);
    // Node 2 heard of the one world from node 1 before its keyserver shows it the other.
    let honest: Checkpoint = world.checkpoint(START + 1).unverified().unwrap();
    let split = Checkpoint { state: Hash([9; 32]), ..honest };
    let split = Envelope::seal(world.mesh, &split, &[&World::key()]);
    assert!(!parties[1].directory.apply_checkpoint(&split, now));
    assert_eq!(parties[1].alarms(), [alarm::EQUIVOCATION]);
    talk(&mut parties, now + Duration::from_secs(30), 60);
    assert_eq!(parties[0].alarms(), [alarm::EQUIVOCATION]);
    let counted = parties[0].directory.equivocations();
    talk(&mut parties, now + Duration::from_secs(90), 300);
    assert_eq!(parties[0].directory.equivocations(), counted, "the same proof is counted once");
}

#[test]
fn a_world_at_another_revision_is_compared_with_what_was_seen_then() {
    let ((mut world, seen), now) = (world(), Instant::now());
    let mut parties = [Party::new(&world, 1, seen, now), Party::new(&world, 2, seen, now)];
    let honest: Checkpoint = world.checkpoint(START).unverified().unwrap();
    let split = Checkpoint { state: Hash([9; 32]), time: START + 9, ..honest };
    parties[1].directory.apply_checkpoint(&Envelope::seal(world.mesh, &split, &[&World::key()]), now);
    // Node 1 goes on from the revision of the split.
    parties[0].directory.apply_checkpoint(&world.checkpoint(START), now);
    world.revoke(3);
    parties[0].directory.apply_checkpoint(&world.checkpoint(START + 5), now);
    talk(&mut parties, now, 60);
    assert!(parties[0].alarms().contains(&alarm::EQUIVOCATION));
}

#[test]
fn another_machine_with_this_identity_is_noticed_by_itself_and_by_peers() {
    let ((mut world, seen), now) = (world(), Instant::now());
    let grant = world.history.iter().find(|e| e.kind() == Kind::NodeGrant).unwrap().clone();
    // The copy of node 1 has spoken to node 2 at the same seq, with other bytes.
    let copy = world.sealed_record(1, 2, &grant, 4);
    let original = world.record(1, 2, &grant);
    let mut parties = [Party::new(&world, 1, seen, now), Party::new(&world, 2, seen, now)];
    parties[0].directory.apply(&original, now);
    parties[0].own.record = RecordHead { seq: 2, hash: original.hash(world.mesh) };
    parties[1].directory.apply(&copy, now);
    talk(&mut parties, now, 30);
    assert_eq!(parties[0].own_records, [copy]);
    assert_eq!(parties[1].alarms(), [alarm::EQUIVOCATION]);
    assert_eq!(parties[1].directory.view().member(World::node(1)).unwrap().record.as_ref().unwrap().object.lanes, 4);
}

#[test]
fn objects_that_nobody_asked_for_change_nothing() {
    let ((mut world, seen), now) = (world(), Instant::now());
    let mut party = Party::new(&world, 1, seen, now);
    let revocation = cbor::to_vec(&world.revoke(3));
    let revoker = World::key().verify_key().id();
    let want = Want::Revocation { revoker, number: 1 };
    let push = PeerMessage::Part { want, offset: 0, piece: Piece::of(&revocation, 0) };
    party.hears(World::node(2), &push.to_datagram(), now);
    assert!(party.directory.view().member(World::node(3)).is_some());
    assert_eq!(party.exchange.counters().dropped, 1);
}

#[test]
fn a_peer_that_promises_and_lies_is_bounded() {
    let ((world, seen), now) = (world(), Instant::now());
    let mut party = Party::new(&world, 1, seen, now);
    let liar = World::node(2);
    let mut heads = serve::heads(&party.directory, &party.own, liar, 0, false);
    heads.own =
        RecordHead { seq: 1, hash: party.directory.view().member(liar).and_then(serve::record_head).unwrap().hash };
    heads.yours = Some(party.own.record);
    heads.policy_version = u64::MAX;
    heads.position = Some(Position { epoch: 1, revision: u64::MAX });
    let (mut asked, mut held) = (0, 0);
    for second in 0..600 {
        let now = now + Duration::from_secs(second);
        party.hears(liar, &PeerMessage::Heads { heads: heads.clone() }.to_datagram(), now);
        party.exchange.handle_timeout(&party.directory, &party.own, now);
        while let Some((to, bytes)) = party.exchange.poll_transmit() {
            let Ok(PeerMessage::Get { want, offset }) = PeerMessage::from_datagram(&bytes) else { continue };
            assert_eq!(to, liar);
            asked += 1;
            // Garbage without an end.
            let total = MAX_OBJECT_BYTES as u32;
            let piece = Piece { tag: 1, total, bytes: vec![0; 1024] };
            party.hears(liar, &PeerMessage::Part { want, offset, piece: Some(piece) }.to_datagram(), now);
            held = held.max(party.exchange.out.len());
        }
    }
    // Each minute one object of 36 pieces for what was promised, of each kind.
    assert!(asked <= 11 * 36 * 2, "{asked} pieces asked for in ten minutes");
    assert!(held <= 8);
    assert!(party.alarms().is_empty());
    assert_eq!(party.directory.view().members().count(), 3);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn nothing_a_peer_sends_changes_what_is_not_signed(
        datagrams in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..1300), 1..20),
        damage in proptest::collection::vec((any::<usize>(), any::<u8>()), 1..8),
    ) {
        let ((world, seen), now) = (world(), Instant::now());
        let mut party = Party::new(&world, 1, seen, now);
        let before: Vec<Envelope> = party.directory.view().envelopes().cloned().collect();
        let mut heads = PeerMessage::Heads { heads: serve::heads(&party.directory, &party.own, World::node(2), 0, true) }.to_datagram();
        for (at, byte) in damage {
            let at = at % heads.len();
            heads[at] = byte;
        }
        for bytes in datagrams.iter().chain([&heads]) {
            party.hears(World::node(2), bytes, now);
        }
        prop_assert!(party.exchange.out.len() <= MOST_WAITING);
        let after: Vec<Envelope> = party.directory.view().envelopes().cloned().collect();
        prop_assert_eq!(before, after);
    }
}
