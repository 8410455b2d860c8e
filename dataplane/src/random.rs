//! A keyed generator for what must be hard to guess but is not a key: indices, jitter, spread.
//!
//! SipHash of a counter under a seed that the engine draws from the system; the simulator chooses the seed and so gets
//! the same run again.

use std::{
    hash::{BuildHasher, Hasher},
    time::Duration,
};

use siphasher::sip::SipHasher13;

/// See the module.
#[derive(Debug, Clone)]
pub(crate) struct Random {
    key: [u8; 16],
    counter: u64,
}

impl Random {
    pub(crate) fn new(seed: &[u8; 32]) -> Self {
        let mut key = [0; 16];
        for (n, byte) in seed.iter().enumerate() {
            key[n % 16] ^= byte.rotate_left(n as u32 / 16);
        }
        Self { key, counter: 0 }
    }

    pub(crate) fn next_u64(&mut self) -> u64 {
        self.counter += 1;
        let mut hasher = SipHasher13::new_with_key(&self.key);
        hasher.write_u64(self.counter);
        hasher.finish()
    }

    /// A duration below `limit`, evenly spread.
    pub(crate) fn below(&mut self, limit: Duration) -> Duration {
        let nanos = u64::try_from(limit.as_nanos()).unwrap_or(u64::MAX);
        Duration::from_nanos(((u128::from(self.next_u64()) * u128::from(nanos)) >> 64) as u64)
    }

    /// A keyed hash, not to be inverted or made to collide by those who do not know the seed.
    pub(crate) fn hash(&self, bytes: &[u8]) -> u64 {
        let mut hasher = SipHasher13::new_with_key(&self.key);
        // Apart from what `next_u64` hashes.
        hasher.write_u8(1);
        hasher.write(bytes);
        hasher.finish()
    }
}

/// Hashes receiver indices, which are random numbers of our own: a multiplication spreads them well enough.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct IndexHash(u64);

impl BuildHasher for IndexHash {
    type Hasher = Self;
    fn build_hasher(&self) -> Self {
        Self(0)
    }
}

impl Hasher for IndexHash {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u32(u32::from(*byte));
        }
    }
    fn write_u32(&mut self, number: u32) {
        self.0 = (self.0 ^ u64::from(number)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
}
