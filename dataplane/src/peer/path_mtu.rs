//! How large a packet the path to a peer carries: a search by padded probes. No clock, no socket: the lane drives it.
//!
//! Sizes are those of inner packets, padding included. Each probe goes out as a pair: one of the size in question and a small
//! one. A size fails when three of its probes stayed unanswered whose small companions were answered; if these stay
//! unanswered too, the path is down or the peer knows no probes, and nothing is concluded.
//!
//! ```text
//! start: the largest that control allows ── answered ──> proved, asked again twice a second while large packets go out
//!      │ fails                                             │ fails: a black hole
//!      v                                                   v
//! the least that any path carries ── halving what is left between passed and failed ──> proved
//!                                                          └─ after 30 s, later up to 8 min: the largest again
//! ```
//!
//! A path that nobody uses is not probed.

use std::{net::SocketAddr, time::Duration};

use crate::{
    clock::Instant,
    command::{PathSnapshot, PathState},
    packet::own::{Kind, LEN, Own},
};

/// WireGuard's header and tag, and the UDP header.
const OVERHEAD: u16 = 32 + 8;
/// IP headers outside.
const HEADER_V4: u16 = 20;
const HEADER_V6: u16 = 40;
/// What IPv6 promises of every path (RFC 8200, section 5), less the headers: 1200 bytes.
const BASE: u16 = 1_280 - HEADER_V6 - OVERHEAD;
/// What every IPv4 host takes (RFC 791, section 3.1), less the headers: 516 bytes.
const LEAST_V4: u16 = 576 - HEADER_V4 - OVERHEAD;
/// Size of the small probe of a pair.
const SMALL: u16 = LEN.next_multiple_of(16) as u16;
/// The search ends when what passes and what does not are so near.
const GRAIN: u16 = 8;
/// Probes of a size that fail before it counts as failed: one may be lost by chance.
const TRIES: u32 = 3;
/// Pairs after which nothing is concluded, and those if not one of them was answered.
const MAX_TRIES: usize = 6;
const MAX_UNHEARD: usize = 3;
/// How often the present size is asked for while large packets go out. A stalled TCP stream sends 0.2, 0.6 and 1.4 s after it
/// stalled, or somewhat later; with this, the last of these finds the smaller size in use.
const VERIFY: Duration = Duration::from_millis(500);
/// How much later than its small companion, which was sent behind it, the large probe of a pair may be answered.
const REORDERING: Duration = Duration::from_millis(100);
/// How long an answer is waited for: at least, at most, and while no round trip is known.
const PATIENCE: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(2));
const FIRST_PATIENCE: Duration = Duration::from_millis(300);
/// How soon after a trial without any answer another one may begin. With a peer that never answered it doubles each time, to
/// about a minute.
const PAUSE: Duration = Duration::from_secs(1);
const PAUSE_DOUBLINGS: u32 = 6;
/// When a larger size is tried again: first, and at last.
const CLIMB: (Duration, Duration) = (Duration::from_secs(30), Duration::from_secs(480));

/// What packets to a peer may be: bytes of inner packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Limits {
    /// To this size is cut whatever may be cut.
    pub(crate) cut: u16,
    /// This much passes in one datagram.
    pub(crate) fits: u16,
}

impl Limits {
    /// Both are the same.
    pub(crate) fn flat(size: u16) -> Self {
        Self { cut: size, fits: size }
    }

    /// What senders are told: never below what IPv6 promises of a link. Packets of this size go in pieces where the path carries
    /// less.
    pub(crate) fn mtu(self) -> u16 {
        self.fits.max(1_280)
    }
}

/// One size, asked for until it passed or failed.
#[derive(Debug, Clone, Copy)]
struct Trial {
    size: u16,
    /// Number of its first pair.
    first: u32,
    /// Pairs sent, and when.
    count: usize,
    sent: [Instant; MAX_TRIES],
    /// Bit `n`: the small probe of pair `n` was answered.
    heard: u8,
    /// When that of the last pair was.
    heard_at: Option<Instant>,
}

/// See the module.
#[derive(Debug, Clone)]
pub(crate) struct PathMtu {
    /// Whose path it is: where datagrams go, and the largest packet that control allows. `None`: none yet, or none that is to
    /// be probed.
    path: Option<(SocketAddr, u16)>,
    /// Passes, as far as is known; the least that any such path carries at the end.
    fits: u16,
    /// The smallest that failed; more than the largest if none did.
    fails: u16,
    /// Larger packets than this are of interest.
    watch: u16,
    /// True once a probe on this path was answered.
    answered: bool,
    searching: bool,
    /// True if the last trial ended without any answer: only if packets go out there is another one.
    stalled: bool,
    trial: Option<Trial>,
    /// Trials in a row that nobody answered, of a peer that never did.
    silent: u32,
    /// Not before this a trial begins.
    next: Instant,
    climb_at: Instant,
    climb_pause: Duration,
    /// Smoothed, rather too long than too short.
    round_trip: Option<Duration>,
    number: u32,
    /// True if a packet went out since the last trial began that a smaller path would not have carried.
    large: bool,
    /// Packets that had been sent when the last trial began.
    packets: u64,
    last_probe: Option<Instant>,
    /// Probes to be sent: the pair of one try.
    due: [Option<Own>; 2],
    black_holes: u64,
}

impl PathMtu {
    /// Of a path that is not known yet.
    pub(crate) fn new(now: Instant) -> Self {
        Self {
            path: None,
            fits: 0,
            fails: u16::MAX,
            watch: u16::MAX,
            answered: false,
            searching: false,
            stalled: false,
            trial: None,
            silent: 0,
            next: now,
            climb_at: now,
            climb_pause: CLIMB.0,
            round_trip: None,
            number: 0,
            large: false,
            packets: 0,
            last_probe: None,
            due: [None; 2],
            black_holes: 0,
        }
    }

    /// Says which path it is and the largest packet that control allows. What was found of another one is forgotten.
    pub(crate) fn follow(&mut self, endpoint: SocketAddr, most: u16, now: Instant) {
        if self.path == Some((endpoint, most)) {
            return;
        }
        let (number, packets, black_holes) = (self.number, self.packets, self.black_holes);
        *self = Self { number, packets, black_holes, ..Self::new(now) };
        self.path = Some((endpoint, most));
        self.set_bounds(most, most.saturating_add(1));
    }

    /// The path is not to be probed.
    pub(crate) fn forget(&mut self, now: Instant) {
        if self.path.is_some() {
            *self = Self { black_holes: self.black_holes, ..Self::new(now) };
        }
    }

    /// What packets may be at the moment; `most` is the largest that control allows.
    pub(crate) fn limits(&self, most: u16) -> Limits {
        if self.path.is_none() {
            return Limits::flat(most);
        }
        Limits { cut: self.cut().min(most), fits: self.fits.min(most) }
    }

    /// Notes that a packet of this length goes out.
    pub(crate) fn note_packet(&mut self, len: usize) {
        self.large |= len > usize::from(self.watch);
    }

    /// Goes on. `packets` counts what was sent to the peer: a path that nobody uses is left alone.
    pub(crate) fn handle_timeout(&mut self, packets: u64, now: Instant) {
        if self.path.is_none() {
            return;
        }
        if let Some(trial) = self.trial {
            if now < self.deadline(&trial) {
                return;
            }
            self.end_try(trial, now);
        }
        if self.trial.is_none()
            && let Some(size) = self.next_size(packets != self.packets, now)
        {
            self.packets = packets;
            (self.large, self.stalled) = (false, false);
            let trial = Trial { size, first: self.number, count: 0, sent: [now; MAX_TRIES], heard: 0, heard_at: None };
            self.send_pair(trial, now);
        }
    }

    /// Takes the answer to a probe: `size` bytes arrived.
    pub(crate) fn handle_answer(&mut self, number: u32, size: u16, now: Instant) {
        let Some(trial) = &mut self.trial else { return };
        let pair = number.wrapping_sub(trial.first) as usize;
        // Of an earlier trial: it says nothing about the path as it is now.
        if pair >= trial.count {
            return;
        }
        self.answered = true;
        let sample = now.since(trial.sent[pair]);
        let smoothed = self.round_trip.map_or(sample, |known| (known * 7 + sample) / 8);
        self.round_trip = Some(smoothed.max(sample));
        if size >= trial.size {
            let trial = *trial;
            self.pass(trial, now);
        } else {
            trial.heard |= 1 << pair;
            if pair + 1 == trial.count {
                trial.heard_at = Some(now);
            }
        }
    }

    /// The next probe to be sent, until `None`.
    pub(crate) fn poll_transmit(&mut self) -> Option<Own> {
        self.due.iter_mut().find_map(Option::take)
    }

    /// When to call [`handle_timeout`](Self::handle_timeout) next. `None`: whenever it suits, at least once a second while
    /// packets go out.
    pub(crate) fn poll_timeout(&self) -> Option<Instant> {
        match &self.trial {
            Some(trial) => Some(self.deadline(trial)),
            None if self.searching && !self.stalled || self.large && self.can_fail() => Some(self.next),
            None => None,
        }
    }

    /// Black holes found so far.
    pub(crate) fn black_holes(&self) -> u64 {
        self.black_holes
    }

    /// What it knows, for people.
    pub(crate) fn snapshot(&self, lane: usize, remote_lane: usize, now: Instant) -> Option<PathSnapshot> {
        let (endpoint, most) = self.path?;
        let outer = OVERHEAD + if endpoint.is_ipv4() { HEADER_V4 } else { HEADER_V6 };
        Some(PathSnapshot {
            lane,
            remote_lane,
            endpoint,
            path_mtu: self.fits.saturating_add(outer),
            inner_mtu: self.limits(most).mtu(),
            state: match self.answered {
                false => PathState::Unanswered,
                true if self.searching => PathState::Searching,
                true if self.fits < most => PathState::BlackHole,
                true => PathState::Confirmed,
            },
            last_probe: self.last_probe.map(|at| now.since(at)),
            black_holes: self.black_holes,
        })
    }

    fn most(&self) -> u16 {
        self.path.map_or(u16::MAX, |(_, most)| most)
    }

    /// What any path of this family carries.
    fn least(&self) -> u16 {
        match self.path {
            Some((SocketAddr::V4(_), most)) => LEAST_V4.min(most),
            Some((SocketAddr::V6(_), most)) => BASE.min(most),
            None => u16::MAX,
        }
    }

    /// True while there is something below the present size.
    fn can_fail(&self) -> bool {
        self.fits > self.least()
    }

    /// To which size is cut: while the present one is in doubt, to one that nearly all paths carry.
    fn cut(&self) -> u16 {
        let in_doubt = self.trial.as_ref().is_some_and(|trial| trial.heard != 0 && trial.size <= self.fits);
        match in_doubt {
            true if self.fits > BASE => BASE,
            true => self.least(),
            false => self.fits,
        }
    }

    fn set_bounds(&mut self, fits: u16, fails: u16) {
        (self.fits, self.fails) = (fits, fails);
        self.watch = if fits > BASE { BASE } else { self.least() };
    }

    fn patience(&self, trial: &Trial) -> Duration {
        let known = self.round_trip.map(|time| (time * 2 + PATIENCE.0 / 2).clamp(PATIENCE.0, PATIENCE.1));
        let patience = known.unwrap_or(FIRST_PATIENCE);
        // Nothing at all came back: it may just be further away than it was.
        if trial.heard == 0 { patience * 2u32.pow(trial.count as u32 - 1) } else { patience }
    }

    fn deadline(&self, trial: &Trial) -> Instant {
        let patient = trial.sent[trial.count - 1] + self.patience(trial);
        trial.heard_at.map_or(patient, |at| patient.min(at + REORDERING))
    }

    fn send_pair(&mut self, mut trial: Trial, now: Instant) {
        let number = self.number;
        self.number = number.wrapping_add(1);
        (trial.sent[trial.count], trial.heard_at) = (now, None);
        trial.count += 1;
        self.last_probe = Some(now);
        self.due = [trial.size, SMALL].map(|size| Some(Own { kind: Kind::Probe, size, number }));
        self.trial = Some(trial);
    }

    /// The probes of a try were waited for long enough.
    fn end_try(&mut self, trial: Trial, now: Instant) {
        if trial.heard.count_ones() >= TRIES {
            return self.fail(trial, now);
        }
        let enough = if trial.heard == 0 { MAX_UNHEARD } else { MAX_TRIES };
        if trial.count < enough {
            return self.send_pair(trial, now);
        }
        (self.trial, self.stalled) = (None, true);
        self.silent = if self.answered { 0 } else { (self.silent + 1).min(PAUSE_DOUBLINGS) };
        self.next = now + PAUSE * 2u32.pow(self.silent);
    }

    /// A size arrived.
    fn pass(&mut self, trial: Trial, now: Instant) {
        (self.trial, self.due) = (None, [None; 2]);
        self.next = trial.sent[0] + VERIFY;
        if trial.size > self.fits {
            self.climb_pause = CLIMB.0;
            self.set_bounds(trial.size, self.fails);
        }
        self.go_on(now);
    }

    /// A size did not arrive, while small packets do.
    fn fail(&mut self, trial: Trial, now: Instant) {
        (self.trial, self.due) = (None, [None; 2]);
        if trial.size <= self.fits {
            self.black_holes += 1;
            self.climb_pause = CLIMB.0;
            self.searching = true;
            self.set_bounds(self.least(), trial.size);
        } else {
            self.set_bounds(self.fits, trial.size);
        }
        self.go_on(now);
    }

    /// Ends a search that has nothing left to find.
    fn go_on(&mut self, now: Instant) {
        if !self.searching {
            return;
        }
        if self.fails.saturating_sub(self.fits) > GRAIN && self.fits < self.most() {
            self.next = now;
            return;
        }
        self.searching = false;
        self.next = now + VERIFY;
        self.climb_at = now + self.climb_pause;
        self.climb_pause = (self.climb_pause * 2).min(CLIMB.1);
    }

    /// The size of the next trial, if one is due.
    fn next_size(&mut self, used: bool, now: Instant) -> Option<u16> {
        if now < self.next {
            return None;
        }
        if self.searching {
            return (used || !self.stalled).then(|| self.halfway());
        }
        if used && self.answered && self.fits < self.most() && now >= self.climb_at {
            self.searching = true;
            self.set_bounds(self.fits, self.most().saturating_add(1));
            return Some(self.halfway());
        }
        let in_question = if self.answered { self.large && self.can_fail() } else { used };
        in_question.then_some(self.fits)
    }

    /// The largest if it may pass by all that is known, then what nearly all paths carry, then the middle.
    fn halfway(&self) -> u16 {
        if self.fails > self.most() {
            self.most()
        } else if self.fits < BASE && BASE < self.fails {
            BASE
        } else {
            self.fits + (self.fails - self.fits) / 2
        }
    }
}

#[cfg(test)]
mod tests;
