//! From receiver index to peer: which tunnel a datagram is for.
//!
//! A receiver index has 32 bits. boringtun counts sessions in the low eight; of the upper 24, which are ours, the top
//! three name the lane and the others are random, so that indices cannot be predicted and are not soon used again.

use std::collections::HashMap;

use crate::{
    peer::PeerSlot,
    random::{IndexHash, Random},
};

/// Bits below the lane number.
const RANDOM_BITS: u32 = 21;
/// Tunnels a lane may have: a quarter of what 21 bits can tell apart keeps the search for a free one short.
const MAX_TUNNELS: usize = 1 << 19;

/// All indices of one lane.
#[derive(Debug)]
pub(crate) struct Indices {
    lane: u32,
    taken: HashMap<u32, PeerSlot, IndexHash>,
}

impl Indices {
    pub(crate) fn new(lane: usize) -> Self {
        Self { lane: lane as u32, taken: HashMap::default() }
    }

    /// A free index, of 24 bits, now taken by `peer`; `None` if the lane has too many tunnels.
    pub(crate) fn take(&mut self, peer: PeerSlot, random: &mut Random) -> Option<u32> {
        if self.taken.len() >= MAX_TUNNELS {
            return None;
        }
        loop {
            let low = random.next_u64() as u32 & ((1 << RANDOM_BITS) - 1);
            let index = self.lane << RANDOM_BITS | low;
            if let std::collections::hash_map::Entry::Vacant(free) = self.taken.entry(index) {
                free.insert(peer);
                return Some(index);
            }
        }
    }

    /// Takes an index that control chose; false if another tunnel has it, or the lane has too many.
    pub(crate) fn reserve(&mut self, index: u32, peer: PeerSlot) -> bool {
        if self.taken.len() >= MAX_TUNNELS || self.taken.contains_key(&index) {
            return false;
        }
        self.taken.insert(index, peer);
        true
    }

    /// Whose tunnel has this index of 24 bits.
    pub(crate) fn peer(&self, index: u32) -> Option<PeerSlot> {
        self.taken.get(&index).copied()
    }

    /// The lane of a node that an index of 24 bits names.
    pub(crate) fn lane(index: u32) -> u32 {
        index >> RANDOM_BITS
    }

    pub(crate) fn give_back(&mut self, index: u32) {
        self.taken.remove(&index);
    }

    pub(crate) fn len(&self) -> usize {
        self.taken.len()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;
    use crate::table::PeerId;

    #[test]
    fn indices_are_distinct_and_name_their_lane() {
        let mut random = Random::new(&[3; 32]);
        let mut indices = Indices::new(5);
        for n in 0..10_000 {
            let index = indices.take(PeerSlot::first(PeerId(n)), &mut random).unwrap();
            assert_eq!(Indices::lane(index), 5);
            assert_eq!(indices.peer(index), Some(PeerSlot::first(PeerId(n))));
        }
        assert_eq!(indices.len(), 10_000);
    }
}
