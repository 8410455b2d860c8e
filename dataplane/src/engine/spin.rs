//! How long a lane looks for more before it sleeps.
//!
//! Sleeping and being woken costs some 25 us; a lane that has just been busy often has its next packet sooner. It looks for
//! it longer while that pays and ever shorter while it does not, until it sleeps at once: an idle lane costs nothing.

use std::time::Duration;

/// Parts of the longest time: what looking begins with, and below which it ends.
const FIRST: u32 = 8;
const LAST: u32 = 64;

/// See the module.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Spin {
    most: Duration,
    window: Duration,
}

impl Spin {
    /// Looks for up to `most`; never if that is zero.
    pub(super) fn new(most: Duration) -> Self {
        Self { most, window: Duration::ZERO }
    }

    /// True if it never looks.
    pub(super) fn is_off(&self) -> bool {
        self.most.is_zero()
    }

    /// How long to look now.
    pub(super) fn window(&self) -> Duration {
        self.window
    }

    /// Something came `after` the last round: it was looked for, or slept for.
    pub(super) fn came(&mut self, after: Duration) {
        if after <= self.most {
            self.window = (self.window * 2).max(self.most / FIRST).min(self.most);
        }
    }

    /// Nothing came while it looked.
    pub(super) fn missed(&mut self) {
        self.window /= 2;
        if self.window < self.most / LAST {
            self.window = Duration::ZERO;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOST: Duration = Duration::from_micros(64);

    #[test]
    fn it_looks_longer_while_that_pays_and_not_at_all_when_idle() {
        let mut spin = Spin::new(MOST);
        assert_eq!(spin.window(), Duration::ZERO);
        let windows: Vec<_> = (0..5)
            .map(|_| {
                spin.came(Duration::from_micros(10));
                spin.window().as_micros()
            })
            .collect();
        assert_eq!(windows, [8, 16, 32, 64, 64]);
        spin.came(Duration::from_secs(1));
        assert_eq!(spin.window(), MOST, "a pause says nothing");
        let mut misses = 0;
        while !spin.window().is_zero() {
            spin.missed();
            misses += 1;
        }
        assert_eq!(misses, 7);
    }

    #[test]
    fn switched_off_it_never_looks() {
        let mut spin = Spin::new(Duration::ZERO);
        spin.came(Duration::ZERO);
        assert!(spin.is_off() && spin.window().is_zero());
    }
}
