//! Nodes tell each other inside their tunnels how far they are, and fetch from each other what they lack: a revocation
//! spreads with every keyserver down, and a keyserver that shows two worlds is caught.
//!
//! ```text
//! socket ── datagram ──> Exchange ─┬─ talk    what one peer said, and what of it is worth asking for
//!                                  ├─ pull    one object, piece by piece
//!                                  └─ serve   what others may fetch, straight from the directory
//! Exchange ── envelope ──> Directory (the rules of protocol/trust)      Exchange ── datagrams ──> socket
//! ```
//!
//! A plain struct: datagrams and clock readings in, datagrams out. Whatever a hostile peer sends, it costs one lookup and
//! at most one answer of 1.2 KB to that peer; it holds one object of 36 KiB in the making, and objects that nobody asked
//! for are dropped. News goes to a few peers, who tell a few: a thousand nodes are reached in three steps, and nobody
//! sends a thousand datagrams.

mod pull;
mod serve;
pub(crate) mod socket;
mod talk;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use mesh_protocol::cbor;
use mesh_protocol::envelope::{Envelope, Kind};
use mesh_protocol::id::{NodeId, Position};
use mesh_protocol::peer::{Heads, MembersPage, PeerMessage, RecordHead, Want};
use mesh_protocol::record::RevocationHead;

use crate::directory::{Directory, Taken};
use pull::{Progress, Pull};
use talk::Talk;

/// How often a few peers are told.
const ROUND: Duration = Duration::from_secs(20);
/// Peers with a live session told in one round: idle ones of many thousands stay idle.
const LIVE_A_ROUND: usize = 16;
/// Any peers told in one round, with a session or not: so that groups that never talk hear of each other.
const ANY_A_ROUND: usize = 3;
/// The same while no keyserver is reached.
const ANY_CUT_OFF: usize = 8;
/// News waits up to so long, so that what travels by the keyserver too is told to few.
const NEWS_WITHIN: Duration = Duration::from_millis(200);
/// Objects in the making at one time: 32 of at most 36 KiB.
const MOST_PULLS: usize = 32;
/// Datagrams that wait to be sent: 256 of at most 1.2 KB; what comes on top is dropped, peers ask again.
const MOST_WAITING: usize = 256;

/// This node's own word, as the exchange needs it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct OwnWord {
    /// Who it is.
    pub(crate) node: NodeId,
    /// Generation of its grant.
    pub(crate) generation: u64,
    /// Its record.
    pub(crate) record: RecordHead,
    /// It has no session with a keyserver.
    pub(crate) cut_off: bool,
}

/// What came in with one datagram.
#[derive(Debug, Default)]
pub(crate) struct News {
    /// The directory changed.
    pub(crate) changed: bool,
    /// A checkpoint fresher than any before.
    pub(crate) fresh_checkpoint: bool,
    /// A record of this node itself, higher than the one it knows, or another one at its `seq`.
    pub(crate) own_record: Option<Envelope>,
}

/// Counters since start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Counters {
    /// Datagrams of peers that were read.
    pub(crate) received: u64,
    /// Datagrams that were not: malformed, of a stranger, too many, or not asked for.
    pub(crate) dropped: u64,
    /// Objects accepted from peers.
    pub(crate) objects: u64,
}

/// The exchange with all peers.
#[derive(Debug)]
pub(crate) struct Exchange {
    /// One for each member that ever spoke since start.
    talks: BTreeMap<NodeId, Talk>,
    live: BTreeSet<NodeId>,
    out: VecDeque<(NodeId, Vec<u8>)>,
    next_round: Instant,
    /// Something is new: tell a few by then.
    news_due: Option<Instant>,
    told: Option<Digest>,
    /// The furthest position whose members were listed.
    listed: Option<Position>,
    random: u64,
    counters: Counters,
}

/// What is news when it changes.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Digest {
    policy_version: u64,
    revocations: Vec<RevocationHead>,
    own: RecordHead,
    generation: u64,
    /// Somebody was caught: peers should see the proof.
    equivocations: u64,
}

impl Exchange {
    /// Begins with nobody. `seed` makes the choice of peers differ between nodes.
    pub(crate) fn new(now: Instant, seed: u64) -> Self {
        Self {
            talks: BTreeMap::new(),
            live: BTreeSet::new(),
            out: VecDeque::new(),
            next_round: now,
            news_due: None,
            told: None,
            listed: None,
            random: seed | 1,
            counters: Counters::default(),
        }
    }

    /// Counters since start.
    pub(crate) fn counters(&self) -> Counters {
        self.counters
    }

    /// A datagram was dropped before it came here.
    pub(crate) fn note_dropped(&mut self, count: u64) {
        self.counters.dropped += count;
    }

    /// The `seq` of this node's record that each peer said to have in force.
    pub(crate) fn acknowledged(&self) -> BTreeMap<NodeId, u64> {
        self.talks.iter().filter_map(|(node, talk)| Some((*node, talk.heads.as_ref()?.yours?.seq))).collect()
    }

    /// Says which peers have a live session now. One that came up is greeted.
    pub(crate) fn set_live(&mut self, live: BTreeSet<NodeId>, directory: &Directory, own: &OwnWord, now: Instant) {
        let up: Vec<NodeId> = live.difference(&self.live).copied().collect();
        self.live = live;
        for node in up.into_iter().take(LIVE_A_ROUND) {
            self.send_heads(node, directory, own, now);
        }
    }

    /// Takes a datagram of a member.
    pub(crate) fn handle_datagram(
        &mut self,
        from: NodeId,
        bytes: &[u8],
        directory: &mut Directory,
        own: &OwnWord,
        now: Instant,
    ) -> News {
        let mut news = News::default();
        let Ok(message) = PeerMessage::from_datagram(bytes) else {
            self.counters.dropped += 1;
            return news;
        };
        self.counters.received += 1;
        match message {
            PeerMessage::Heads { heads } => self.handle_heads(from, heads, directory, own, now),
            PeerMessage::Get { want, offset } => {
                let piece = serve::piece(directory, want, offset);
                self.send(from, &PeerMessage::Part { want, offset, piece });
            }
            PeerMessage::Part { want, offset, piece } => {
                let Some(pull) = self.talks.get_mut(&from).and_then(|talk| talk.pull.as_mut()) else {
                    self.counters.dropped += 1;
                    return news;
                };
                match pull.handle_part(want, offset, piece, now) {
                    Progress::Foreign => self.counters.dropped += 1,
                    Progress::More => self.ask(from),
                    Progress::Failed => {
                        self.give_up(from, now);
                        self.pull_next(from, directory, own, now);
                    }
                    Progress::Whole(object) => {
                        self.handle_object(from, want, &object, directory, own, now, &mut news);
                        self.pull_next(from, directory, own, now);
                    }
                }
            }
        }
        self.notice_news(directory, own, now);
        news
    }

    fn handle_heads(&mut self, from: NodeId, heads: Heads, directory: &Directory, own: &OwnWord, now: Instant) {
        let talk = self.talks.entry(from).or_insert_with(|| Talk::new(now));
        if !talk.may_speak(now) {
            self.counters.dropped += 1;
            return;
        }
        let answer = (heads.ask || talk::is_behind(&heads, directory, own)) && talk.may_answer(heads.ask, now);
        talk.heads = Some(heads);
        talk.heard = Some(now);
        if answer {
            self.send_heads(from, directory, own, now);
        }
        self.pull_next(from, directory, own, now);
    }

    #[expect(clippy::too_many_arguments, reason = "the two ends of one station: what arrived, and all it may touch")]
    fn handle_object(
        &mut self,
        from: NodeId,
        want: Want,
        object: &[u8],
        directory: &mut Directory,
        own: &OwnWord,
        now: Instant,
        news: &mut News,
    ) {
        let Some(talk) = self.talks.get_mut(&from) else { return };
        talk.pull = None;
        if let Want::Members { .. } = want {
            match cbor::from_slice::<MembersPage>(object) {
                Ok(page) => talk.take_page(&page, directory, own),
                Err(_) => talk.decline(want, now),
            }
            if let (Some(position), true) = (talk.listed_at(), talk.is_listing_over()) {
                self.listed = self.listed.max(Some(position));
            }
            return;
        }
        let taken = match cbor::from_slice::<Envelope>(object) {
            Ok(envelope) if is_of(&envelope, want) => match want {
                Want::Record { node } if node == own.node => {
                    // Once in a while: what is to be done about it is not done here.
                    news.own_record = Some(envelope);
                    Taken::Nothing
                }
                Want::Checkpoint { .. } => {
                    let name = directory.view().member(from).map(|member| member.grant.object.name.to_string());
                    let taken = directory.hear_checkpoint(&envelope, &name.unwrap_or_else(|| from.short()), now);
                    news.fresh_checkpoint |= taken == Taken::News;
                    taken
                }
                _ => {
                    let taken = directory.take_from_peer(&envelope, now);
                    news.changed |= taken == Taken::News;
                    taken
                }
            },
            _ => Taken::Refused,
        };
        match taken {
            Taken::News => self.counters.objects += 1,
            // Not asked for again at once: it would be no better.
            Taken::Nothing | Taken::Refused => talk.decline(want, now),
        }
    }

    /// Asks a peer for the next thing that it has and this node lacks.
    fn pull_next(&mut self, from: NodeId, directory: &Directory, own: &OwnWord, now: Instant) {
        if self.talks.values().filter(|talk| talk.pull.is_some()).count() >= MOST_PULLS {
            return;
        }
        let Some(talk) = self.talks.get_mut(&from).filter(|talk| talk.pull.is_none()) else { return };
        let Some(want) = talk.next_want(from, directory, own, self.listed, now) else { return };
        talk.pull = Some(Pull::new(want, now));
        self.ask(from);
    }

    fn ask(&mut self, from: NodeId) {
        let request = self.talks.get(&from).and_then(|talk| talk.pull.as_ref()).map(Pull::request);
        if let Some(request) = request {
            self.send(from, &request);
        }
    }

    fn give_up(&mut self, from: NodeId, now: Instant) {
        if let Some(talk) = self.talks.get_mut(&from)
            && let Some(pull) = talk.pull.take()
        {
            talk.decline(pull.want(), now);
        }
    }

    /// Notices what is worth telling: this node's own new record, a policy or a revocation, wherever it came from.
    pub(crate) fn notice_news(&mut self, directory: &Directory, own: &OwnWord, now: Instant) {
        let digest = Digest {
            policy_version: directory.view().policy().version,
            revocations: directory.view().revocation_heads(),
            own: own.record,
            generation: own.generation,
            equivocations: directory.equivocations(),
        };
        if self.told.as_ref() == Some(&digest) {
            return;
        }
        // At the first look nothing is new: the round tells it.
        let first = self.told.replace(digest).is_none();
        if !first && self.news_due.is_none() {
            let wait = NEWS_WITHIN.mul_f64(self.fraction());
            self.news_due = Some(now + if own.cut_off { wait / 10 } else { wait });
        }
    }

    /// Sends what is due.
    pub(crate) fn handle_timeout(&mut self, directory: &Directory, own: &OwnWord, now: Instant) {
        self.talks.retain(|node, _| directory.is_talked_to(*node, now));
        let late: Vec<NodeId> = self
            .talks
            .iter()
            .filter(|(_, talk)| talk.pull_due().is_some_and(|due| due <= now))
            .map(|(n, _)| *n)
            .collect();
        for node in late {
            let again =
                self.talks.get_mut(&node).and_then(|talk| talk.pull.as_mut()).is_some_and(|pull| pull.retry(now));
            if again {
                self.ask(node);
            } else {
                self.give_up(node, now);
                self.pull_next(node, directory, own, now);
            }
        }
        let round = now >= self.next_round;
        let news = self.news_due.is_some_and(|due| due <= now);
        if round {
            self.next_round = now + ROUND.mul_f64(0.75 + self.fraction() / 2.0);
        }
        if news {
            self.news_due = None;
        }
        if round || news {
            self.tell_some(directory, own, now);
        }
    }

    fn tell_some(&mut self, directory: &Directory, own: &OwnWord, now: Instant) {
        let all: Vec<NodeId> = directory.peers().filter(|node| *node != own.node).collect();
        let live: Vec<NodeId> = all.iter().copied().filter(|node| self.live.contains(node)).collect();
        let any = if own.cut_off { ANY_CUT_OFF } else { ANY_A_ROUND };
        let chosen: BTreeSet<NodeId> =
            self.sample(live, LIVE_A_ROUND).into_iter().chain(self.sample(all, any)).collect();
        for node in chosen {
            self.send_heads(node, directory, own, now);
        }
    }

    /// When to call [`Self::handle_timeout`].
    pub(crate) fn poll_timeout(&self) -> Instant {
        let pulls = self.talks.values().filter_map(Talk::pull_due);
        pulls.chain(self.news_due).chain([self.next_round]).min().unwrap_or(self.next_round)
    }

    /// The next datagram to send, until `None`.
    pub(crate) fn poll_transmit(&mut self) -> Option<(NodeId, Vec<u8>)> {
        self.out.pop_front()
    }

    fn send_heads(&mut self, to: NodeId, directory: &Directory, own: &OwnWord, now: Instant) {
        let turn = (self.fraction() * 1_000.0) as usize;
        let ask = self.talks.get(&to).and_then(|talk| talk.heard).is_none_or(|heard| now - heard >= ROUND / 2);
        let heads = serve::heads(directory, own, to, turn, ask);
        self.send(to, &PeerMessage::Heads { heads });
    }

    fn send(&mut self, to: NodeId, message: &PeerMessage) {
        if self.out.len() < MOST_WAITING {
            self.out.push_back((to, message.to_datagram()));
        }
    }

    /// At most `most` of them, by chance.
    fn sample(&mut self, mut nodes: Vec<NodeId>, most: usize) -> Vec<NodeId> {
        for at in 0..most.min(nodes.len()) {
            let left = nodes.len() - at;
            let other = at + ((self.fraction() * left as f64) as usize).min(left - 1);
            nodes.swap(at, other);
        }
        nodes.truncate(most);
        nodes
    }

    /// A number in [0, 1): for jitter and choices, nothing secret (xorshift64*, Vigna 2016).
    fn fraction(&mut self) -> f64 {
        self.random ^= self.random >> 12;
        self.random ^= self.random << 25;
        self.random ^= self.random >> 27;
        (self.random.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 11) as f64 / (1_u64 << 53) as f64
    }
}

/// Whether the envelope holds the kind of object that was asked for. Whose it is, the rules find out.
fn is_of(envelope: &Envelope, want: Want) -> bool {
    let kind = match want {
        Want::Policy { .. } => Kind::TrustPolicy,
        Want::Revocation { .. } => Kind::Revocation,
        Want::Checkpoint { .. } => Kind::Checkpoint,
        Want::Grant { .. } => Kind::NodeGrant,
        Want::Record { .. } => Kind::NodeRecord,
        Want::Endpoints { .. } => Kind::Endpoints,
        Want::Members { .. } => return false,
    };
    envelope.kind() == kind
}

#[cfg(test)]
mod tests;
