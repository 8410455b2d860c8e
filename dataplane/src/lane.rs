//! One lane: everything between a TUN queue and a UDP socket, without either of them.
//!
//! A plain struct: packets, datagrams, commands and the time go in; what is to be sent, written and reported comes out.
//! The thread around it is [`engine`](crate::engine)'s; a simulator drives the same code with a clock of its own.
//!
//! ```text
//! handle_packet   ─> outbound ─> seal ─┐                    ┌─> Output::datagrams ─> socket
//! handle_datagram ─> inbound  ─> open ─┼─> Output ──────────┤
//! handle_timeout  ─> timers   ─────────┘                    └─> Output::packets ───> queue
//! set_table ─> tables                  └─> poll_event
//! ```

mod agreeing;
mod crossing;
mod handshakes;
mod inbound;
mod outbound;
mod pairs;
mod probing;
mod tables;
mod timers;
mod turning;
mod wheel;

use std::{
    collections::{HashSet, VecDeque},
    net::SocketAddr,
    sync::Arc,
    time::Duration,
};

use crate::{
    buffer::ROOM,
    clock::Instant,
    command::{Event, LaneSnapshot, Mark, PeerSnapshot},
    drop_reason::{DropCounters, DropReason},
    packet::{dscp::Dscp, flow::FlowHash},
    peer::{Peer, PeerSlot, handshake::Gate, index::Indices},
    random::Random,
    table::Table,
    tun::Packets,
    udp::Datagrams,
};
use pairs::Pairs;
use wheel::Wheel;

/// Lanes a node may have: three bits of the receiver index name the lane.
pub const MAX_LANES: usize = 8;
/// Events kept between two drains; each is small but for datagrams of up to 1,500 bytes: 400 KiB.
const MAX_EVENTS: usize = 256;
/// Bytes of packets that wait for handshakes with all peers together; the newest are dropped beyond.
const MAX_WAITING_BYTES: usize = 8 << 20;
/// What an output holds: several super-packets' worth, and still within the processor's caches.
const ROOM_BYTES: usize = 384 << 10;
const ROOM_ITEMS: usize = 392;
/// Of these, what one call may fill: the fragments of the largest packet on the narrowest path, 133, or a few messages beside
/// the one it is about.
const MARGIN: usize = 136;
/// Longest datagram passed to or taken from control.
const MAX_CONTROL_DATAGRAM: usize = 1_500;

/// What a lane is made of.
#[derive(Debug, Clone)]
pub struct LaneConfig {
    /// Its number.
    pub lane: usize,
    /// How many lanes there are, a power of two up to [`MAX_LANES`].
    pub lanes: usize,
    /// Key of the flow hash.
    pub flow_key: [u8; 16],
    /// Handshake messages answered in a second before everybody has to show a cookie.
    pub handshakes_per_second: u32,
    /// Class of service of outer headers.
    pub dscp: Dscp,
    /// Seed of what must be hard to guess but is no key. Secret, different for each lane.
    pub seed: [u8; 32],
}

/// What a lane wants sent and written. The caller takes it out after each call, or at the latest when
/// [`is_nearly_full`](Self::is_nearly_full).
#[derive(Debug)]
pub struct Output {
    /// To be sent from the lane's socket.
    pub datagrams: Datagrams,
    /// To be written to the lane's queue.
    pub packets: Packets,
    /// To be handed to [`Lane::handle_crossed`] of lane 0, in this order.
    pub crossing: Packets,
}

impl Default for Output {
    fn default() -> Self {
        Self::new()
    }
}

impl Output {
    /// Room for 392 datagrams, 392 packets, or 384 KiB of either.
    pub fn new() -> Self {
        Self {
            datagrams: Datagrams::new(ROOM_BYTES, ROOM_ITEMS),
            packets: Packets::new(ROOM_BYTES, ROOM_ITEMS),
            crossing: Packets::new(ROOM_BYTES, ROOM_ITEMS),
        }
    }

    /// True if a call might find no room for what it makes, and drop it.
    pub fn is_nearly_full(&self) -> bool {
        let is_short = self.datagrams.len() >= ROOM_ITEMS - MARGIN || self.datagrams.left() < 3 * ROOM;
        let is_full = |packets: &Packets| packets.len() >= ROOM_ITEMS - MARGIN || packets.is_full();
        is_short || is_full(&self.packets) || is_full(&self.crossing)
    }

    /// Forgets all that is in it.
    pub fn clear(&mut self) {
        self.datagrams.clear();
        self.packets.clear();
        self.crossing.clear();
    }
}

/// See the module.
pub struct Lane {
    config: LaneConfig,
    table: Arc<Table>,
    flow: FlowHash,
    pairs: Pairs,
    random: Random,
    gate: Gate,
    indices: Indices,
    wheel: Wheel,
    /// By peer number and slot; only peers that were talked to since they came into the table.
    peers: Vec<Option<Box<Peer>>>,
    events: VecDeque<Event>,
    /// Bytes that wait for handshakes.
    waiting_bytes: usize,
    stats: LaneSnapshot,
    /// Tunnels made so far: tells their age apart.
    generation: u64,
    /// Where fragments and pieces are made.
    piece: Vec<u8>,
    /// Packets sent in pieces so far: tells them apart.
    pieces: u32,
    /// "Unreachable" that may be said now.
    unreachable: Allowance,
    /// "Packet too big" that may be said now: apart, lest a scan of unknown addresses takes path MTU discovery from all.
    too_big: Allowance,
    /// Datagrams that may be passed to control now.
    control: Allowance,
    /// The same of those that control expects.
    expected: Allowance,
    marks: Arc<HashSet<Mark>>,
    /// Handshakes that may begin now because a peer sends on a session that is not here.
    lost: Allowance,
}

impl std::fmt::Debug for Lane {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Lane").field("lane", &self.config.lane).finish_non_exhaustive()
    }
}

impl Lane {
    /// A lane without tunnels.
    pub fn new(config: LaneConfig, table: Arc<Table>, now: Instant) -> Self {
        let mut lane = Self {
            flow: FlowHash::new(config.flow_key),
            pairs: Pairs::new(config.lane, config.lanes),
            random: Random::new(&config.seed),
            gate: Gate::new(config.handshakes_per_second, config.lanes, &table),
            indices: Indices::new(config.lane),
            wheel: Wheel::new(now),
            peers: Vec::new(),
            events: VecDeque::new(),
            waiting_bytes: 0,
            stats: LaneSnapshot { lane: config.lane, queue_attached: true, ..Default::default() },
            generation: 0,
            piece: Vec::new(),
            pieces: 0,
            unreachable: Allowance::new(100, now),
            too_big: Allowance::new(100, now),
            control: Allowance::new(1_000, now),
            expected: Allowance::new(1_000, now),
            marks: Arc::default(),
            lost: Allowance::new(100, now),
            table: Arc::clone(&table),
            config,
        };
        lane.set_table(table, now);
        lane
    }

    /// Its number.
    pub fn number(&self) -> usize {
        self.config.lane
    }

    /// The next thing that happened.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// When to call [`handle_timeout`](Self::handle_timeout) next; `None`: not before something else happens.
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.wheel.next()
    }

    /// Takes the marks of datagrams that control expects: see [`Command::Expect`](crate::Command::Expect).
    pub fn expect(&mut self, marks: Arc<HashSet<Mark>>) {
        self.marks = marks;
    }

    /// Puts a datagram of control's on its way. Too long ones are dropped and counted.
    pub fn send_datagram(&mut self, to: SocketAddr, bytes: &[u8], out: &mut Output) {
        match out.datagrams.room() {
            Some(room) if bytes.len() <= MAX_CONTROL_DATAGRAM => {
                room[..bytes.len()].copy_from_slice(bytes);
                out.datagrams.push_tight(bytes.len(), to.into());
            }
            _ => self.count_drop(DropReason::SendFailed, 1),
        }
    }

    /// Counts what the caller had to drop.
    pub fn count_drop(&mut self, reason: DropReason, many: u64) {
        self.stats.drops.add_many(reason, many);
    }

    /// Counts an event that the caller could not pass on.
    pub fn count_lost_event(&mut self, event: &Event) {
        self.stats.events_lost += 1;
        if matches!(event, Event::Datagram { .. }) {
            self.count_drop(DropReason::EventQueueFull, 1);
        }
    }

    /// Counters of the lane, and what it knows of each peer.
    pub fn snapshot(&self, now: Instant) -> (LaneSnapshot, Vec<PeerSnapshot>) {
        let lane = LaneSnapshot { tunnels: self.indices.len(), ..self.stats.clone() };
        let peers = self.peers.iter().flatten().map(|peer| peer.snapshot(self.config.lane, now));
        (lane, peers.collect())
    }

    /// How often each reason to drop occurred.
    pub fn drops(&self) -> &DropCounters {
        &self.stats.drops
    }

    /// Drops the packets that wait for a session with this peer.
    fn forget_waiting(&mut self, peer: &mut Peer, reason: DropReason) {
        let (packets, bytes) = peer.forget_waiting();
        self.waiting_bytes -= bytes;
        self.count_drop(reason, packets as u64);
    }

    fn drop(&mut self, reason: DropReason) {
        self.stats.drops.add(reason);
    }

    fn report(&mut self, event: Event) {
        if self.events.len() >= MAX_EVENTS {
            self.count_lost_event(&event);
            return;
        }
        self.events.push_back(event);
    }

    /// Takes a peer out to work on it; it must be [`put`](Self::put) back. Makes it if the table knows it.
    fn take_peer(&mut self, at: PeerSlot, now: Instant) -> Option<Box<Peer>> {
        let position = self.pairs.position(at);
        if self.peers.get(position).is_none_or(Option::is_none) {
            let peer = self.make_peer(at, now)?;
            if self.peers.len() <= position {
                self.peers.resize_with(position + 1, || None);
            }
            return Some(peer);
        }
        self.peers[position].take()
    }

    fn put(&mut self, peer: Box<Peer>) {
        let position = self.pairs.position(peer.at());
        self.peers[position] = Some(peer);
    }
}

/// So many a second, as many at once.
#[derive(Debug, Clone, Copy)]
struct Allowance {
    per_second: u32,
    left: u32,
    since: Instant,
}

impl Allowance {
    fn new(per_second: u32, now: Instant) -> Self {
        Self { per_second, left: per_second, since: now }
    }

    fn take(&mut self, now: Instant) -> bool {
        if now.since(self.since) >= Duration::from_secs(1) {
            self.since = now;
            self.left = self.per_second;
        }
        let some = self.left > 0;
        self.left = self.left.saturating_sub(1);
        some
    }
}
