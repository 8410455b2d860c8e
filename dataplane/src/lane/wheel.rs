//! A timer wheel: peers that want nothing are not in it and cost nothing.
//!
//! Ticks of 100 ms; what is due later than a turn of the wheel comes up early, which is harmless. Rescheduling leaves the
//! old entry behind: whoever takes an entry out compares it with the tick its peer is scheduled for.

use std::time::Duration;

use crate::{clock::Instant, peer::PeerSlot};

const TICK: Duration = Duration::from_millis(100);
const SLOTS: u64 = 512;

#[derive(Debug)]
pub(super) struct Wheel {
    slots: Vec<Vec<PeerSlot>>,
    /// The next tick to be looked at; all before it are done.
    next: u64,
    /// Entries in all slots.
    count: usize,
}

impl Wheel {
    pub(super) fn new(now: Instant) -> Self {
        Self { slots: vec![Vec::new(); SLOTS as usize], next: tick_of(now), count: 0 }
    }

    /// Puts an entry where `at` falls; returns its tick.
    pub(super) fn schedule(&mut self, peer: PeerSlot, at: Instant) -> u64 {
        let tick = tick_after(at).clamp(self.next, self.next + SLOTS - 1);
        self.slots[(tick % SLOTS) as usize].push(peer);
        self.count += 1;
        tick
    }

    /// The tick that an entry for `at` would get.
    pub(super) fn tick(&self, at: Instant) -> u64 {
        tick_after(at).clamp(self.next, self.next + SLOTS - 1)
    }

    /// An entry that is due, with its tick.
    pub(super) fn pop(&mut self, now: Instant) -> Option<(PeerSlot, u64)> {
        let today = tick_of(now);
        if self.count == 0 {
            self.next = self.next.max(today);
            return None;
        }
        while self.next <= today {
            if let Some(peer) = self.slots[(self.next % SLOTS) as usize].pop() {
                self.count -= 1;
                return Some((peer, self.next));
            }
            self.next += 1;
        }
        None
    }

    /// When the first entry is due.
    pub(super) fn next(&self) -> Option<Instant> {
        if self.count == 0 {
            return None;
        }
        (self.next..self.next + SLOTS)
            .find(|tick| !self.slots[(tick % SLOTS) as usize].is_empty())
            .map(|tick| Instant::from_start(TICK * u32::try_from(tick).unwrap_or(u32::MAX)))
    }
}

/// The tick that has begun at `at`.
fn tick_of(at: Instant) -> u64 {
    (at.since_start().as_millis() / TICK.as_millis()) as u64
}

/// The first tick that begins at `at` or later.
fn tick_after(at: Instant) -> u64 {
    at.since_start().as_nanos().div_ceil(TICK.as_nanos()) as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::PeerId;

    fn peer(id: u32) -> PeerSlot {
        PeerSlot::first(PeerId(id))
    }

    fn at(millis: u64) -> Instant {
        Instant::from_start(Duration::from_millis(millis))
    }

    #[test]
    fn entries_come_up_when_due_and_not_before() {
        let mut wheel = Wheel::new(at(1_000));
        assert_eq!(wheel.next(), None);
        wheel.schedule(peer(1), at(1_250));
        wheel.schedule(peer(2), at(500));
        assert_eq!(wheel.next(), Some(at(1_000)));
        assert_eq!(wheel.pop(at(1_000)).map(|(peer, _)| peer), Some(peer(2)));
        assert_eq!(wheel.pop(at(1_299)), None);
        assert_eq!(wheel.next(), Some(at(1_300)));
        assert_eq!(wheel.pop(at(1_300)).map(|(peer, _)| peer), Some(peer(1)));
        assert_eq!(wheel.pop(at(9_000_000)), None);
        wheel.schedule(peer(3), at(9_999_999));
        assert_eq!(wheel.next(), Some(at(9_000_000 + 51_100)), "early rather than late");
    }
}
