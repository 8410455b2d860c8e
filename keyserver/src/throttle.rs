//! How often somebody may fail to enrol: by source, and by token id.
//!
//! A token cannot be guessed; this keeps those who try from costing more than a look. Only failures count, so that a node
//! that waits for its grant may ask as often as it likes. Whoever guesses at one token from many sources gets one try
//! from each: sources without a failure are let through, or else anybody could lock a token that he knows the id of.

use std::collections::{BTreeMap, VecDeque};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use mesh_protocol::id::TokenId;

/// Sources and tokens remembered: about 100 bytes each. The oldest is forgotten first, and has a full allowance again.
const MAX_KEYS: usize = 4_096;
/// Failures that a source may have at once.
const SOURCE_BURST: f64 = 10.0;
/// And one more after each of these.
const SOURCE_PAUSE: Duration = Duration::from_secs(6);
/// Failures that a token may see at once.
const TOKEN_BURST: f64 = 100.0;
/// And one more after each of these.
const TOKEN_PAUSE: Duration = Duration::from_secs(1);

/// What a failure is counted under.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Key {
    Source(IpAddr),
    Token(TokenId),
}

#[derive(Debug)]
struct Bucket {
    left: f64,
    at: Instant,
}

/// Remembers failures.
#[derive(Debug, Default)]
pub(crate) struct Throttle {
    buckets: BTreeMap<Key, Bucket>,
    /// Keys of `buckets`, the first failure longest ago first.
    order: VecDeque<Key>,
}

impl Throttle {
    /// Whether `source` may try `token` at `now`.
    pub(crate) fn allows(&self, source: IpAddr, token: TokenId, now: Instant) -> bool {
        let source = self.left(Key::Source(source), now);
        let token = self.left(Key::Token(token), now);
        source.is_none_or(|left| left >= 1.0) && (source.is_none() || token.is_none_or(|left| left >= 1.0))
    }

    /// Counts a failure.
    pub(crate) fn failed(&mut self, source: IpAddr, token: TokenId, now: Instant) {
        for key in [Key::Source(source), Key::Token(token)] {
            let left = (self.left(key, now).unwrap_or_else(|| key.burst()) - 1.0).max(0.0);
            if self.buckets.insert(key, Bucket { left, at: now }).is_none() {
                self.order.push_back(key);
            }
        }
        while self.order.len() > MAX_KEYS {
            if let Some(oldest) = self.order.pop_front() {
                self.buckets.remove(&oldest);
            }
        }
    }

    fn left(&self, key: Key, now: Instant) -> Option<f64> {
        let bucket = self.buckets.get(&key)?;
        let gained = now.saturating_duration_since(bucket.at).as_secs_f64() / key.pause().as_secs_f64();
        Some((bucket.left + gained).min(key.burst()))
    }
}

impl Key {
    fn burst(self) -> f64 {
        match self {
            Self::Source(_) => SOURCE_BURST,
            Self::Token(_) => TOKEN_BURST,
        }
    }

    fn pause(self) -> Duration {
        match self {
            Self::Source(_) => SOURCE_PAUSE,
            Self::Token(_) => TOKEN_PAUSE,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    fn source(number: u32) -> IpAddr {
        Ipv4Addr::from_bits(number).into()
    }

    #[test]
    fn a_source_that_fails_waits_and_others_do_not() {
        let (mut throttle, now, token) = (Throttle::default(), Instant::now(), TokenId([1; 32]));
        for _ in 0..10 {
            assert!(throttle.allows(source(1), token, now));
            throttle.failed(source(1), token, now);
        }
        assert!(!throttle.allows(source(1), token, now));
        assert!(throttle.allows(source(2), token, now));
        assert!(throttle.allows(source(1), token, now + SOURCE_PAUSE));
        assert!(!throttle.allows(source(1), TokenId([2; 32]), now), "another token helps nobody");
    }

    #[test]
    fn one_token_is_not_tried_from_many_sources_more_than_once_each() {
        let (mut throttle, now, token) = (Throttle::default(), Instant::now(), TokenId([1; 32]));
        for number in 0..100 {
            throttle.failed(source(number), token, now);
        }
        assert!(!throttle.allows(source(5), token, now), "one failure was enough");
        assert!(throttle.allows(source(1_000), token, now), "the holder of the token gets in");
        assert!(throttle.allows(source(5), TokenId([2; 32]), now));
    }

    #[test]
    fn memory_is_bounded() {
        let (mut throttle, now) = (Throttle::default(), Instant::now());
        for number in 0..20_000_u32 {
            let mut id = [0; 32];
            id[..4].copy_from_slice(&number.to_be_bytes());
            throttle.failed(source(number), TokenId(id), now);
        }
        assert_eq!((throttle.buckets.len(), throttle.order.len()), (MAX_KEYS, MAX_KEYS));
    }
}
