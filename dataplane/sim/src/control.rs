//! What control does about preshared keys that are agreed on tunnel by tunnel: makes offers, opens them, hands keys to the
//! lanes. The key travels in the offer as it is, where the real one has a KEM's ciphertext: who can read it is not the
//! matter here, but what becomes of tunnels when offers are lost, late, reordered, repeated or cross each other.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use mesh_dataplane::{
    clock::Instant,
    command::{AgreedPair, Agreement, Event, LanePair, Origin},
    key::PresharedKey,
    table::{PeerId, Preshared, Table},
};

/// First byte of an offer: no WireGuard message.
pub const OFFER: u8 = 0xa5;
/// Kind, initiator, number, two epochs, seed of the keys; then 3 bytes for each pair of lanes.
const FIXED: usize = 2 + 8 + 8 + 8 + 8;

/// See the module.
#[derive(Debug)]
pub struct Control {
    node: usize,
    /// How long it takes for anything.
    pub delay: Duration,
    /// True while it does nothing at all.
    pub is_away: bool,
    /// Offers made.
    pub made: u32,
    /// Offers of others that brought keys.
    pub opened: u32,
    /// Offers of others that were old.
    pub refused: u32,
    number: u64,
    seen: BTreeMap<(u8, u64, u64), u64>,
    work: Vec<(Instant, Work)>,
}

#[derive(Debug, PartialEq, Eq)]
enum Work {
    Make { peer: PeerId, local_epoch: u64, remote_epoch: u64 },
    Open(Vec<u8>),
}

impl Control {
    pub(crate) fn new(node: usize) -> Self {
        let delay = Duration::from_millis(1);
        let (seen, work) = (BTreeMap::new(), Vec::new());
        Self { node, delay, is_away: false, made: 0, opened: 0, refused: 0, number: 0, seen, work }
    }

    /// Takes what is for control; gives the rest back.
    pub(crate) fn take(&mut self, event: Event, now: Instant) -> Option<Event> {
        let work = match event {
            Event::KeyWanted { peer, local_epoch, remote_epoch, .. } => Work::Make { peer, local_epoch, remote_epoch },
            Event::Datagram { bytes, .. } if bytes.first() == Some(&OFFER) => Work::Open(bytes),
            other => return Some(other),
        };
        // What several lanes ask for is made once.
        if !self.is_away && !self.work.iter().any(|(_, waiting)| *waiting == work) {
            self.work.push((now + self.delay, work));
        }
        None
    }

    /// Starts anew: numbers rise all the same, those of others are forgotten.
    pub(crate) fn forget(&mut self) {
        self.seen.clear();
        self.work.clear();
    }

    pub(crate) fn poll_timeout(&self) -> Option<Instant> {
        self.work.iter().map(|(at, _)| *at).min()
    }

    /// What is due.
    pub(crate) fn handle_timeout(&mut self, table: &Table, lanes: u8, now: Instant) -> Vec<Agreement> {
        let due: Vec<(Instant, Work)> = self.work.extract_if(.., |(at, _)| *at <= now).collect();
        due.into_iter().filter_map(|(_, work)| self.work_on(work, table, lanes)).collect()
    }

    fn work_on(&mut self, work: Work, table: &Table, own_lanes: u8) -> Option<Agreement> {
        match work {
            Work::Make { peer, local_epoch, remote_epoch } => {
                let spec = table.peer(peer)?;
                self.number += 1;
                self.made += 1;
                let seed = mixed(self.number << 8 | self.node as u64);
                let mut offer = vec![OFFER, self.node as u8];
                for number in [self.number, local_epoch, remote_epoch, seed] {
                    offer.extend(number.to_be_bytes());
                }
                let lanes = pairs(own_lanes, spec.lanes.count());
                let index = |(n, (own, _)): (usize, &(u8, u8))| {
                    u32::from(*own) << 21 | mixed(seed ^ n as u64) as u32 & 0x1f_ffff
                };
                let indices: Vec<u32> = lanes.iter().enumerate().map(index).collect();
                offer.extend(indices.iter().flat_map(|index| index.to_be_bytes()[1..].to_vec()));
                let origin = Origin::Own { offer: Arc::from(offer) };
                let pairs = agreed(&lanes, &indices, seed, |pair| pair);
                Some(Agreement { peer, local_epoch, remote_epoch, origin, pairs })
            }
            Work::Open(bytes) => {
                let number = |at: usize| Some(u64::from_be_bytes(*bytes.get(at..)?.first_chunk()?));
                let (initiator, given) = (*bytes.get(1)?, number(2)?);
                let (remote_epoch, local_epoch, seed) = (number(10)?, number(18)?, number(26)?);
                let highest = self.seen.entry((initiator, local_epoch, remote_epoch)).or_default();
                if given <= *highest {
                    self.refused += 1;
                    return None;
                }
                *highest = given;
                self.opened += 1;
                let peer = PeerId(initiator.into());
                let spec = table.peer(peer).filter(|spec| matches!(spec.preshared, Preshared::Agreed { .. }))?;
                let lanes = pairs(spec.lanes.count(), own_lanes);
                let index = |bytes: &[u8]| bytes.iter().fold(0, |index, byte| index << 8 | u32::from(*byte));
                let indices: Vec<u32> = bytes[FIXED..].chunks_exact(3).map(index).collect();
                let pairs = agreed(&lanes, &indices, seed, |(theirs, own)| (own, theirs));
                Some(Agreement { peer, local_epoch, remote_epoch, origin: Origin::Peer, pairs })
            }
        }
    }
}

fn agreed(lanes: &[(u8, u8)], indices: &[u32], seed: u64, ours: impl Fn((u8, u8)) -> (u8, u8)) -> Vec<AgreedPair> {
    let pair = |(lanes, index): (&(u8, u8), &u32)| {
        let (own, theirs) = ours(*lanes);
        let mut psk = [0; 32];
        for (n, place) in psk.chunks_exact_mut(8).enumerate() {
            let word = mixed(seed ^ (n as u64) << 16 ^ u64::from(lanes.0) << 8 ^ u64::from(lanes.1));
            place.copy_from_slice(&word.to_be_bytes());
        }
        let lanes = LanePair { local: own.into(), remote: theirs.into() };
        AgreedPair { lanes, index: *index, psk: PresharedKey::new(psk) }
    };
    lanes.iter().zip(indices).map(pair).collect()
}

/// Pairs of the initiator's and the responder's lanes.
fn pairs(initiator: u8, responder: u8) -> Vec<(u8, u8)> {
    (0..initiator.max(responder)).map(|n| (n % initiator, n % responder)).collect()
}

/// SplitMix64.
fn mixed(number: u64) -> u64 {
    let mut x = number.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}
