//! All pairs of static keys with what offers on them need: by which hint they are known, which numbers were used.
//!
//! A stranger's datagram costs one look at its shape and one lookup of its hint. The MAC proves that one of the two ends
//! made an offer, the number that it is new: only then the KEM is used.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_dataplane::command::LanePair;
use mesh_dataplane::{AgreedPair, Agreement, Origin, PeerId, PresharedKey};
use mesh_protocol::id::{MeshId, NodeId};
use mesh_protocol::key::{KemPublic, TunnelKey, TunnelSecret};
use mesh_protocol::offer::{self, Direction, HINT_BYTES, Offer, OfferKeys, PresharedSecret, Sealed, SharedSecret};

use crate::desired::lanes;
use crate::facts::{DirectoryFacts, OwnKeys};
use crate::identity::kem;

const MICROS_PER_DAY: u64 = 24 * 60 * 60 * 1_000_000;
/// Several lanes that want a key at once share one offer: another for the same keys is made after this time.
const MAKE_PAUSE: Duration = Duration::from_millis(200);
/// Offers that a peer may have opened at once, and how long each takes to be allowed again: a hostile one costs two KEM operations
/// a second, a tenth of a thousandth of a core.
const OPEN_BURST: u32 = 16;
const OPEN_EVERY: Duration = Duration::from_millis(500);
/// Bits of a receiver index below the lane.
const INDEX_BITS: u32 = 21;

/// Both clocks.
#[derive(Debug, Clone, Copy)]
pub(super) struct Now {
    pub(super) instant: Instant,
    /// Microseconds since 1970.
    pub(super) micros: u64,
}

/// What happened since the start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Counters {
    /// Offers made.
    pub(crate) made: u64,
    /// Offers of peers that brought keys.
    pub(crate) accepted: u64,
    /// Datagrams of strangers: no offers, or with a hint or MAC that no peer makes.
    pub(crate) strange: u64,
    /// Offers that came before, or are older than one that came.
    pub(crate) repeated: u64,
    /// Offers of peers that cannot be used: for keys that are gone, for other lanes, or too many.
    pub(crate) refused: u64,
    /// Offers and wishes of lanes that found the queue full.
    pub(crate) dropped: u64,
    /// ML-KEM-768 operations.
    pub(crate) kem: u64,
}

/// Why there is no agreement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refusal {
    /// Not a peer, not its keys, or no preshared key is wanted with it.
    NoSuchTunnel,
    /// One was just made.
    JustMade,
    /// Nobody known.
    Stranger,
    /// The number is not above the highest seen.
    Repeated,
    /// For an ML-KEM-768 key that is gone or not there yet.
    OtherKem,
    /// For another number of lanes than the two ends have.
    OtherLanes,
    /// The peer makes more than anybody needs.
    TooMany,
    /// The library refused a key.
    Kem { peer: PeerId },
}

/// A peer as far as offers go.
#[derive(Debug, Clone, PartialEq)]
struct Known {
    node: NodeId,
    lanes: u8,
    kem: (u64, KemPublic),
    /// Current and spare: what it may begin tunnels with.
    keys: [(u64, TunnelKey); 2],
}

/// A key of ours and one of a peer's, by their epochs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct PairId {
    peer: PeerId,
    local_epoch: u64,
    remote_epoch: u64,
}

#[derive(Debug)]
struct Pair {
    node: NodeId,
    own: TunnelKey,
    theirs: TunnelKey,
    /// Keys of offers to the peer and of those from it, once computed.
    keys: Option<(OfferKeys, OfferKeys)>,
    highest: u64,
    made: Option<Instant>,
}

/// What a peer may still have opened.
#[derive(Debug, Clone, Copy)]
struct Allowance {
    left: u32,
    since: Instant,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Book {
    /// Lanes that run: offers of ours are for them.
    own_lanes: u8,
    /// Lanes as the own record says: offers of peers are for them. On a plain device fewer run.
    published_lanes: u8,
    mesh: MeshId,
    own: NodeId,
    keys: Option<Arc<OwnKeys>>,
    peers: BTreeMap<PeerId, Known>,
    pairs: BTreeMap<PairId, Pair>,
    /// Pairs whose secret is not computed yet.
    todo: VecDeque<PairId>,
    hints: HashMap<[u8; HINT_BYTES], PairId>,
    day: u64,
    /// Highest number that this node used.
    number: u64,
    allowances: BTreeMap<PeerId, Allowance>,
    pub(super) counters: Counters,
    /// Hints are others than were last given out.
    hints_changed: bool,
}

impl Book {
    pub(super) fn new(own_lanes: u8, published_lanes: u8) -> Self {
        Self {
            own_lanes,
            published_lanes: lanes(published_lanes),
            mesh: MeshId([0; 32]),
            own: NodeId([0; 32]),
            keys: None,
            peers: BTreeMap::new(),
            pairs: BTreeMap::new(),
            todo: VecDeque::new(),
            hints: HashMap::new(),
            day: 0,
            number: 0,
            allowances: BTreeMap::new(),
            counters: Counters::default(),
            hints_changed: false,
        }
    }

    /// Takes what the directory and the own keys are now. Pairs that stay keep their secrets and numbers; those that are gone
    /// are wiped.
    pub(super) fn update(&mut self, facts: &DirectoryFacts, keys: Arc<OwnKeys>) {
        (self.mesh, self.own) = (facts.mesh, facts.own.node);
        let members = facts.peers.iter().filter(|peer| peer.post_quantum && !facts.exposed);
        let known = |peer: &crate::facts::PeerFacts| Known {
            node: peer.node,
            lanes: lanes(peer.lanes),
            kem: peer.kem.clone(),
            keys: [peer.current, peer.spare],
        };
        self.peers = members.map(|peer| (PeerId(peer.number), known(peer))).collect();
        let own: Vec<(u64, TunnelKey)> = own_secrets(&keys).map(|(epoch, secret)| (*epoch, secret.public())).collect();
        let mut wanted = BTreeSet::new();
        for (peer, known) in &self.peers {
            for (local_epoch, own) in &own {
                for (remote_epoch, theirs) in &known.keys {
                    let id = PairId { peer: *peer, local_epoch: *local_epoch, remote_epoch: *remote_epoch };
                    wanted.insert(id);
                    let held = self.pairs.get(&id);
                    if held.is_some_and(|pair| (pair.node, pair.own, pair.theirs) == (known.node, *own, *theirs)) {
                        continue;
                    }
                    let pair =
                        Pair { node: known.node, own: *own, theirs: *theirs, keys: None, highest: 0, made: None };
                    self.pairs.insert(id, pair);
                    self.todo.push_back(id);
                }
            }
        }
        self.keys = Some(keys);
        self.pairs.retain(|id, _| wanted.contains(id));
        self.allowances.retain(|peer, _| self.peers.contains_key(peer));
        let pairs = &self.pairs;
        self.todo.retain(|id| pairs.get(id).is_some_and(|pair| pair.keys.is_none()));
        let before = self.hints.len();
        self.hints.retain(|_, id| pairs.get(id).is_some_and(|pair| pair.keys.is_some()));
        self.hints_changed |= self.hints.len() != before;
    }

    /// Takes the date: hints change with it.
    pub(super) fn set_day(&mut self, micros: u64) {
        let day = micros / MICROS_PER_DAY;
        if day == self.day {
            return;
        }
        self.day = day;
        self.hints_changed = true;
        self.hints.clear();
        for (id, pair) in &self.pairs {
            if let Some((_, from)) = &pair.keys {
                self.hints.extend(hints(from, day).map(|hint| (hint, *id)));
            }
        }
    }

    /// All hints that offers may have, once all are known and if they are others than at the last call.
    pub(super) fn take_hints(&mut self) -> Option<HashSet<[u8; HINT_BYTES]>> {
        let changed = self.is_complete() && std::mem::take(&mut self.hints_changed);
        changed.then(|| self.hints.keys().copied().collect())
    }

    /// True once all secrets are computed.
    pub(super) fn is_complete(&self) -> bool {
        self.todo.is_empty()
    }

    /// Computes secrets of up to `count` pairs, 50 us each.
    pub(super) fn compute(&mut self, count: usize) {
        for _ in 0..count {
            let Some(id) = self.todo.pop_front() else { return };
            self.compute_one(id);
        }
    }

    fn compute_one(&mut self, id: PairId) {
        let (Some(pair), Some(keys)) = (self.pairs.get_mut(&id), &self.keys) else { return };
        let Some((_, secret)) = own_secrets(keys).find(|(epoch, _)| *epoch == id.local_epoch) else { return };
        if pair.keys.is_some() {
            return;
        }
        let shared = SharedSecret::agree(secret, &pair.theirs);
        let to = direction(self.mesh, self.own, pair, true);
        let from = direction(self.mesh, self.own, pair, false);
        let keys = (OfferKeys::new(&shared, &to), OfferKeys::new(&shared, &from));
        self.hints.extend(hints(&keys.1, self.day).map(|hint| (hint, id)));
        self.hints_changed = true;
        pair.keys = Some(keys);
    }

    /// Makes an offer for all tunnels to a peer on these epochs (ours, the peer's).
    ///
    /// # Errors
    /// [`Refusal::NoSuchTunnel`], [`Refusal::JustMade`], [`Refusal::Kem`].
    pub(super) fn make(
        &mut self,
        peer: PeerId,
        (local_epoch, remote_epoch): (u64, u64),
        now: Now,
    ) -> Result<Agreement, Refusal> {
        let id = PairId { peer, local_epoch, remote_epoch };
        self.compute_one(id);
        let known = self.peers.get(&peer).ok_or(Refusal::NoSuchTunnel)?;
        let pair = self.pairs.get_mut(&id).ok_or(Refusal::NoSuchTunnel)?;
        let (to, _) = pair.keys.as_ref().ok_or(Refusal::NoSuchTunnel)?;
        if pair.made.is_some_and(|made| now.instant.saturating_duration_since(made) < MAKE_PAUSE) {
            return Err(Refusal::JustMade);
        }
        self.counters.kem += 1;
        let (secret, ciphertext) = kem::encapsulate(&known.kem.1).ok_or(Refusal::Kem { peer })?;
        let lanes: Vec<(u8, u8)> = offer::lane_pairs(self.own_lanes, known.lanes).collect();
        let indices = random_indices(&lanes).ok_or(Refusal::Kem { peer })?;
        self.number = now.micros.max(self.number + 1);
        let made = Offer {
            number: self.number,
            initiator_epoch: local_epoch,
            responder_epoch: remote_epoch,
            kem_epoch: known.kem.0,
            indices,
            ciphertext,
        };
        let datagram = made.seal(to, now.micros / MICROS_PER_DAY);
        pair.made = Some(now.instant);
        self.counters.made += 1;
        let agreement = offer::Agreement {
            direction: direction(self.mesh, self.own, pair, true),
            kem: &known.kem.1,
            ciphertext: &made.ciphertext,
        };
        let pairs = agreed(&agreement, &secret, &lanes, &made.indices, |pair| pair);
        let origin = Origin::Own { offer: Arc::from(datagram.as_slice()) };
        Ok(Agreement { peer, local_epoch, remote_epoch, origin, pairs })
    }

    /// Opens a datagram that may be an offer.
    ///
    /// # Errors
    /// Any [`Refusal`] but [`Refusal::JustMade`]. Nothing was computed with the ciphertext then, except for
    /// [`Refusal::Kem`].
    pub(super) fn open(&mut self, datagram: &[u8], now: Now) -> Result<Agreement, Refusal> {
        let opened = self.try_open(datagram, now);
        let count = match opened {
            Ok(_) => &mut self.counters.accepted,
            Err(Refusal::Stranger) => &mut self.counters.strange,
            Err(Refusal::Repeated) => &mut self.counters.repeated,
            Err(_) => &mut self.counters.refused,
        };
        *count += 1;
        opened
    }

    fn try_open(&mut self, datagram: &[u8], now: Now) -> Result<Agreement, Refusal> {
        let sealed = Sealed::parse(datagram).map_err(|_| Refusal::Stranger)?;
        let id = *self.hints.get(&sealed.hint()).ok_or(Refusal::Stranger)?;
        let pair = self.pairs.get_mut(&id).ok_or(Refusal::Stranger)?;
        let (_, from) = pair.keys.as_ref().ok_or(Refusal::Stranger)?;
        let offer = sealed.open(from).map_err(|_| Refusal::Stranger)?;
        if offer.number <= pair.highest {
            return Err(Refusal::Repeated);
        }
        if (offer.responder_epoch, offer.initiator_epoch) != (id.local_epoch, id.remote_epoch) {
            return Err(Refusal::NoSuchTunnel);
        }
        let keys = self.keys.as_ref().ok_or(Refusal::NoSuchTunnel)?;
        let kem = keys.kem.iter().find(|(epoch, _)| *epoch == offer.kem_epoch).ok_or(Refusal::OtherKem)?;
        // As many as the peer's indices name, whatever its record says.
        let theirs = offer.indices.iter().map(|index| index >> INDEX_BITS).max().unwrap_or(0) as u8 + 1;
        let lanes: Vec<(u8, u8)> = offer::lane_pairs(theirs, self.published_lanes).collect();
        let named = |(index, (theirs, _)): (&u32, &(u8, u8))| *index >> INDEX_BITS == u32::from(*theirs);
        if lanes.len() != offer.indices.len() || !offer.indices.iter().zip(&lanes).all(named) {
            return Err(Refusal::OtherLanes);
        }
        if !take(&mut self.allowances, id.peer, now.instant) {
            return Err(Refusal::TooMany);
        }
        pair.highest = offer.number;
        self.counters.kem += 1;
        let secret = kem.1.decapsulate(&offer.ciphertext).ok_or(Refusal::Kem { peer: id.peer })?;
        let agreement = offer::Agreement {
            direction: direction(self.mesh, self.own, pair, false),
            kem: kem.1.public(),
            ciphertext: &offer.ciphertext,
        };
        let pairs = agreed(&agreement, &secret, &lanes, &offer.indices, |(theirs, own)| (own, theirs));
        let PairId { peer, local_epoch, remote_epoch } = id;
        Ok(Agreement { peer, local_epoch, remote_epoch, origin: Origin::Peer, pairs })
    }
}

fn own_secrets(keys: &OwnKeys) -> impl Iterator<Item = &(u64, TunnelSecret)> {
    std::iter::once(&keys.current).chain(&keys.previous)
}

/// From us to the peer, or from the peer to us.
fn direction(mesh: MeshId, own: NodeId, pair: &Pair, to_peer: bool) -> Direction {
    let (us, them) = ((own, pair.own), (pair.node, pair.theirs));
    let (initiator, responder) = if to_peer { (us, them) } else { (them, us) };
    Direction { mesh, initiator, responder }
}

/// What offers may have today, by a clock that is up to a day off.
fn hints(keys: &OfferKeys, day: u64) -> impl Iterator<Item = [u8; HINT_BYTES]> {
    [day.saturating_sub(1), day, day.saturating_add(1)].map(|day| keys.hint(day)).into_iter()
}

/// An index for each pair of lanes: the initiator's lane above random bits.
fn random_indices(lanes: &[(u8, u8)]) -> Option<Vec<u32>> {
    let mut random = [0; 4 * offer::MAX_PAIRS];
    getrandom::fill(&mut random).ok()?;
    let numbers = random.as_chunks::<4>().0.iter().map(|bytes| u32::from_le_bytes(*bytes) % (1 << INDEX_BITS));
    Some(lanes.iter().zip(numbers).map(|((own, _), low)| u32::from(*own) << INDEX_BITS | low).collect())
}

/// The key of each pair of lanes; `ours` turns (initiator's, responder's) into (our own, the peer's).
fn agreed(
    agreement: &offer::Agreement<'_>,
    secret: &PresharedSecret,
    lanes: &[(u8, u8)],
    indices: &[u32],
    ours: impl Fn((u8, u8)) -> (u8, u8),
) -> Vec<AgreedPair> {
    let pair = |(lanes, index): (&(u8, u8), &u32)| {
        let (own, theirs) = ours(*lanes);
        let lane_pair = LanePair { local: own.into(), remote: theirs.into() };
        let psk = PresharedKey::new(*agreement.preshared_key(secret, *lanes));
        AgreedPair { lanes: lane_pair, index: *index, psk }
    };
    lanes.iter().zip(indices).map(pair).collect()
}

fn take(allowances: &mut BTreeMap<PeerId, Allowance>, peer: PeerId, now: Instant) -> bool {
    let allowance = allowances.entry(peer).or_insert(Allowance { left: OPEN_BURST, since: now });
    let passed = now.saturating_duration_since(allowance.since).as_millis() / OPEN_EVERY.as_millis();
    let more = u32::try_from(passed).unwrap_or(u32::MAX);
    if more > 0 {
        allowance.left = allowance.left.saturating_add(more).min(OPEN_BURST);
        allowance.since += OPEN_EVERY * more;
    }
    let some = allowance.left > 0;
    allowance.left = allowance.left.saturating_sub(1);
    some
}

#[cfg(test)]
pub(super) mod tests;
