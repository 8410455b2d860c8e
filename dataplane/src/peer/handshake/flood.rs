//! Under a flood of handshakes: whom a lane still looks at, and how often, before it computes anything.
//!
//! Sources may be made up, so counting by source alone does not help. An address where a peer is known to be is looked at
//! first; who shows a cookie has an address of his own; all others share what is left. What is beyond that is dropped at the
//! price of a hash.
//!
//! ```text
//!                       without a cookie                    with one
//! address of a peer     80 x limit a second                 always (its bucket counts it)
//! any other             40 x limit a second, 100 a source   40 x limit a second
//! ```

use std::{net::IpAddr, time::Duration};

use super::source_of;
use crate::{clock::Instant, random::Random};

/// Places for addresses that peers were heard from: 64 KiB.
const PLACES: usize = 8_192;
/// What is looked at in a second, in handshakes answered without a cookie. At 500 of those, 20,000 cookies cost a tenth
/// of a core.
const STRANGERS: u32 = 40;
const KNOWN: u32 = 80;

/// What an initiation shows of who sent it, before anything is computed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Seen {
    /// From an address where a peer is known to be.
    pub(crate) known: bool,
    /// Its second MAC is not empty.
    pub(crate) claims_cookie: bool,
}

/// See the module.
pub(crate) struct FloodLimit {
    known: Budget,
    strangers: Budget,
    claims: Budget,
    heard: Box<[u64]>,
}

impl FloodLimit {
    pub(crate) fn new(handshakes_per_second: u32) -> Self {
        let budget = |times: u32| Budget::new(handshakes_per_second.saturating_mul(times));
        Self {
            known: budget(KNOWN),
            strangers: budget(STRANGERS),
            claims: budget(STRANGERS),
            heard: vec![0; PLACES].into_boxed_slice(),
        }
    }

    /// A peer proved to be at this address.
    pub(crate) fn remember(&mut self, address: IpAddr, random: &Random) {
        let source = source_of(address);
        self.heard[place(source, random)] = source;
    }

    /// True if a peer proved to be at this address, and few others since.
    pub(crate) fn heard_from(&self, address: IpAddr, random: &Random) -> bool {
        let source = source_of(address);
        self.heard[place(source, random)] == source
    }

    /// True if an initiation is to be looked at.
    pub(crate) fn admits(&mut self, seen: Seen, now: Instant) -> bool {
        match (seen.known, seen.claims_cookie) {
            (true, true) => true,
            (true, false) => self.known.take(now),
            (false, true) => self.claims.take(now),
            (false, false) => self.strangers.take(now),
        }
    }
}

fn place(source: u64, random: &Random) -> usize {
    random.hash(&source.to_le_bytes()) as usize % PLACES
}

/// So many a second, spread over it: a tenth of a second's worth at once.
#[derive(Debug)]
struct Budget {
    per_second: u64,
    /// In millionths.
    left: u64,
    refilled: Instant,
}

impl Budget {
    const ONE: u64 = 1_000_000;

    fn new(per_second: u32) -> Self {
        let per_second = u64::from(per_second.max(10));
        Self { per_second, left: per_second * Self::ONE / 10, refilled: Instant::default() }
    }

    fn take(&mut self, now: Instant) -> bool {
        let micros = now.since(self.refilled).min(Duration::from_secs(1)).as_micros() as u64;
        if micros > 0 {
            self.left = (self.left + micros * self.per_second).min(self.per_second * Self::ONE / 10);
            self.refilled = now;
        }
        let enough = self.left >= Self::ONE;
        self.left -= if enough { Self::ONE } else { 0 };
        enough
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    #[test]
    fn strangers_do_not_use_up_what_is_for_peers_and_for_cookies() {
        let mut limit = FloodLimit::new(500);
        let (mut stranger, mut known, mut proved) = (0, 0, 0);
        let start = Instant::from_start(Duration::from_secs(50));
        for micro in 0..1_000_000u32 {
            let now = start + Duration::from_micros(1) * micro;
            let seen = |known, claims_cookie| Seen { known, claims_cookie };
            stranger += u32::from(limit.admits(seen(false, false), now));
            if micro % 1_000 == 0 {
                known += u32::from(limit.admits(seen(true, false), now));
                proved += u32::from(limit.admits(seen(false, true), now));
            }
        }
        assert!((20_000..=22_001).contains(&stranger), "{stranger}");
        assert_eq!((known, proved), (1_000, 1_000));
    }

    #[test]
    fn an_address_is_known_once_a_peer_proved_to_be_there() {
        let (mut limit, random) = (FloodLimit::new(500), Random::new(&[1; 32]));
        let [a, b] = ["192.0.2.1", "2001:db8::1"].map(|text| text.parse::<IpAddr>().unwrap());
        limit.remember(a, &random);
        assert!(limit.heard_from(a, &random) && !limit.heard_from(b, &random));
        limit.remember(b, &random);
        assert!(limit.heard_from("2001:db8::2".parse().unwrap(), &random), "one network");
    }
}
