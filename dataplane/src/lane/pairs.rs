//! Which of our lanes talks to which of a peer's.
//!
//! A flow of hash `h` is on our lane `h mod ours` and on the peer's lane `h mod theirs`. Both numbers are powers of two, so
//! a lane of the end that has fewer shares flows with several of the other: those pairs are told apart by a slot.
//!
//! ```text
//! ours 2, theirs 8    our lane 1:  slot 0 = their lane 1, slot 1 = lane 3, slot 2 = lane 5, slot 3 = lane 7
//! ours 8, theirs 2    our lane 5:  slot 0 = their lane 1
//! ```

use super::MAX_LANES;
use crate::{
    peer::{Detour, Pairing, PeerSlot},
    table::Lanes,
};

/// See the module; of one lane.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pairs {
    lane: u32,
    lanes: u32,
}

impl Pairs {
    pub(super) fn new(lane: usize, lanes: usize) -> Self {
        Self { lane: lane as u32, lanes: lanes.max(1) as u32 }
    }

    /// Where the peers of a lane keep this one.
    pub(super) fn position(&self, at: PeerSlot) -> usize {
        at.id.0 as usize * (MAX_LANES / self.lanes as usize).max(1) + usize::from(at.slot)
    }

    /// Lanes of such a peer that share flows with ours.
    fn slots(&self, theirs: Lanes) -> u8 {
        (u32::from(theirs.count()) / self.lanes).max(1) as u8
    }

    /// The slot of a flow.
    pub(super) fn slot_of_flow(&self, hash: u32, slots: u8) -> u8 {
        (hash / self.lanes % u32::from(slots)) as u8
    }

    /// The peer's lane that a slot stands for; `None` if the peer has no such lane, or knows our lane 0 only and this is
    /// another.
    fn remote_lane(&self, theirs: Lanes, slot: u8) -> Option<u8> {
        if slot >= self.slots(theirs) || self.is_apart(theirs) {
            return None;
        }
        Some(((self.lane + u32::from(slot) * self.lanes) % u32::from(theirs.count())) as u8)
    }

    /// All that a pair has to be told about itself; `None` for a slot that the peer does not have.
    pub(super) fn pairing(&self, theirs: Lanes, slot: u8) -> Option<Pairing> {
        let slots = self.slots(theirs);
        if self.is_apart(theirs) {
            return (slot == 0).then_some(Pairing { slot, slots, remote_lane: 0, detour: Detour::Plain });
        }
        let remote_lane = self.remote_lane(theirs, slot)?;
        Some(Pairing { slot, slots, remote_lane, detour: Detour::None })
    }

    /// The slot that stands for the peer's lane; `None` if it shares no flow with ours.
    pub(super) fn slot_of_lane(&self, theirs: Lanes, remote_lane: u32) -> Option<u8> {
        (0..self.slots(theirs)).find(|slot| self.remote_lane(theirs, *slot).map(u32::from) == Some(remote_lane))
    }

    /// True if such a peer never talks to this lane: its packets cross to lane 0.
    fn is_apart(&self, theirs: Lanes) -> bool {
        theirs == Lanes::Plain && self.lane != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::PeerId;

    #[test]
    fn both_ends_agree_on_the_pair_of_each_flow() {
        for ours in [1, 2, 4, 8] {
            for theirs in [1, 2, 4, 8] {
                let mut pairs_seen = std::collections::BTreeSet::new();
                for hash in 0..64u32 {
                    let (near, far) =
                        (Pairs::new(hash as usize % ours, ours), Pairs::new(hash as usize % theirs, theirs));
                    let (us, them) = (Lanes::Each(ours as u8), Lanes::Each(theirs as u8));
                    let there = near.remote_lane(them, near.slot_of_flow(hash, near.slots(them)));
                    let back = far.remote_lane(us, far.slot_of_flow(hash, far.slots(us)));
                    assert_eq!((back, there), (Some(near.lane as u8), Some(far.lane as u8)), "{ours}/{theirs}");
                    let slot = near.slot_of_lane(them, far.lane);
                    assert_eq!(slot, Some(near.slot_of_flow(hash, near.slots(them))));
                    pairs_seen.insert((near.lane, far.lane));
                }
                assert_eq!(pairs_seen.len(), ours.max(theirs));
            }
        }
    }

    #[test]
    fn lanes_that_share_no_flow_have_no_slot() {
        let pairs = Pairs::new(1, 2);
        assert_eq!(pairs.slot_of_lane(Lanes::Each(8), 7), Some(3));
        for remote in [0, 2, 6, 8, 9] {
            assert_eq!(pairs.slot_of_lane(Lanes::Each(8), remote), None);
        }
        assert_eq!(pairs.slot_of_lane(Lanes::Each(1), 0), Some(0));
        assert_eq!(pairs.slot_of_lane(Lanes::Plain, 0), None, "lane 0 only");
        assert_eq!(Pairs::new(0, 2).slot_of_lane(Lanes::Plain, 0), Some(0));
    }

    #[test]
    fn every_slot_has_a_place_of_its_own() {
        for lanes in [1, 2, 4, 8] {
            let pairs = Pairs::new(0, lanes);
            let mut next = 0;
            for id in 0..3 {
                for slot in 0..pairs.slots(Lanes::Each(8)) {
                    assert_eq!(pairs.position(PeerSlot { id: PeerId(id), slot }), next);
                    next += 1;
                }
            }
        }
    }
}
