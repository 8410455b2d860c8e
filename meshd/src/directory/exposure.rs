//! How long this node has been running without news that a keyserver vouches for.

use std::time::{Duration, Instant};

/// From here on somebody should know.
pub(crate) const ALARM_AFTER: Duration = Duration::from_secs(60 * 60);

/// Running time since the last fresh checkpoint, over restarts.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Exposure {
    before: Duration,
    since: Instant,
}

impl Exposure {
    /// Goes on from what was stored.
    pub(crate) fn resumed(stored: Duration, now: Instant) -> Self {
        Self { before: stored, since: now }
    }

    /// A fresh checkpoint arrived.
    pub(crate) fn confirm(&mut self, now: Instant) {
        *self = Self { before: Duration::ZERO, since: now };
    }

    /// Running time without one, as it was at an instant.
    pub(crate) fn reading(&self) -> (Duration, Option<Instant>) {
        (self.before, Some(self.since))
    }

    /// Running time without one.
    pub(crate) fn unconfirmed(&self, now: Instant) -> Duration {
        self.before + now.saturating_duration_since(self.since)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn restarts_do_not_start_it_over() {
        let now = Instant::now();
        let hour = Duration::from_secs(3600);
        let first = Exposure::resumed(Duration::ZERO, now);
        let mut second = Exposure::resumed(first.unconfirmed(now + hour), now + 5 * hour);
        assert_eq!(second.unconfirmed(now + 6 * hour), 2 * hour);
        second.confirm(now + 6 * hour);
        assert_eq!(second.unconfirmed(now + 6 * hour), Duration::ZERO);
    }
}
