//! How long to wait before the next attempt: longer each time, and never in step with other nodes.

use std::time::Duration;

/// First wait, at most.
const FIRST: Duration = Duration::from_millis(500);
/// Longest wait.
const LONGEST: Duration = Duration::from_secs(30);

/// Exponential backoff with full jitter: each wait lies between half and all of a span that doubles.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Backoff {
    failures: u32,
}

impl Backoff {
    /// An attempt failed: how long to wait. `random` is any number, drawn anew.
    pub(super) fn next(&mut self, random: u32) -> Duration {
        let span = FIRST.saturating_mul(1 << self.failures.min(6)).min(LONGEST);
        self.failures = self.failures.saturating_add(1);
        span / 2 + (span / 2).mul_f64(f64::from(random) / f64::from(u32::MAX))
    }

    /// A session came up.
    pub(super) fn reset(&mut self) {
        self.failures = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_to_half_a_minute_and_start_over() {
        let mut backoff = Backoff::default();
        let waits: Vec<Duration> = (0..10).map(|_| backoff.next(u32::MAX)).collect();
        assert_eq!(waits[0], FIRST);
        assert!(waits.windows(2).all(|pair| pair[0] <= pair[1]));
        assert_eq!(waits[9], LONGEST);
        assert_eq!(backoff.next(0), LONGEST / 2);
        backoff.reset();
        assert_eq!(backoff.next(0), FIRST / 2);
    }
}
