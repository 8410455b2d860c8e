//! Time as the data plane counts it: since boot, suspended time included.
//!
//! Everything below [`engine`](crate::engine) is given the time; only the engine's loop reads the clock. It is
//! `CLOCK_BOOTTIME`, the clock that boringtun reads for itself: after a suspended hour both agree that sessions are
//! over.

use std::{
    ops::{Add, Sub},
    time::Duration,
};

use nix::time::{ClockId, clock_gettime};

/// A point in time: what passed since an arbitrary start, normally boot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Instant(Duration);

impl Instant {
    /// The point `since_start` after the clock's start; for virtual clocks.
    pub const fn from_start(since_start: Duration) -> Self {
        Self(since_start)
    }

    /// Reads `CLOCK_BOOTTIME`.
    #[expect(clippy::disallowed_methods, reason = "for the engine, which reads the clock")]
    pub(crate) fn now() -> Self {
        // The call fails for unknown clock ids only; time zero keeps a lane going all the same.
        clock_gettime(ClockId::CLOCK_BOOTTIME).map(|time| Self(Duration::from(time))).unwrap_or_default()
    }

    /// Time passed since the clock's start.
    pub const fn since_start(self) -> Duration {
        self.0
    }

    /// Time passed since `earlier`; zero if that is later than this.
    pub fn since(self, earlier: Instant) -> Duration {
        self.0.saturating_sub(earlier.0)
    }
}

impl Add<Duration> for Instant {
    type Output = Instant;
    fn add(self, rhs: Duration) -> Instant {
        Instant(self.0.saturating_add(rhs))
    }
}

impl Sub<Instant> for Instant {
    type Output = Duration;
    fn sub(self, rhs: Instant) -> Duration {
        self.since(rhs)
    }
}
