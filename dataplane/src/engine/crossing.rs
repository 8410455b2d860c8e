//! Packets on their way from other lanes to lane 0: the only thing lanes hand each other.

use std::{
    mem,
    sync::{Mutex, MutexGuard, PoisonError},
};

use crate::tun::Packets;

/// What waits at most; the newest are dropped beyond. Lane 0 takes all at once, so this is what it is behind.
const MOST_PACKETS: usize = 1_024;
const MOST_BYTES: usize = 2 << 20;

/// Packets one behind another.
#[derive(Debug, Default)]
pub(super) struct Crossed {
    bytes: Vec<u8>,
    lens: Vec<usize>,
}

impl Crossed {
    /// All packets in order, each with the free bytes behind it up to the next multiple of 16, and its length.
    pub(super) fn drain(&mut self) -> impl Iterator<Item = (&mut [u8], usize)> {
        let mut rest = self.bytes.as_mut_slice();
        self.lens.drain(..).map_while(move |len| {
            let (packet, behind) = mem::take(&mut rest).split_at_mut_checked(len.next_multiple_of(16))?;
            rest = behind;
            Some((packet, len))
        })
    }
}

/// Shared by all lanes; locked once for a batch.
#[derive(Debug, Default)]
pub(super) struct Crossing(Mutex<Crossed>);

impl Crossing {
    /// Appends packets; how many found no room, and whether lane 0 has to be woken: it knows of what waits already.
    pub(super) fn append(&self, packets: &Packets) -> (usize, bool) {
        let mut waiting = self.lock();
        let was_empty = waiting.lens.is_empty();
        let mut taken = 0;
        for (_, packet) in packets.iter() {
            let padded = packet.len().next_multiple_of(16);
            if waiting.lens.len() >= MOST_PACKETS || waiting.bytes.len() + padded > MOST_BYTES {
                break;
            }
            waiting.bytes.extend_from_slice(packet);
            let end = waiting.bytes.len() + padded - packet.len();
            waiting.bytes.resize(end, 0);
            waiting.lens.push(packet.len());
            taken += 1;
        }
        (packets.len() - taken, was_empty && taken > 0)
    }

    /// Takes all that waits in place of what `crossed` holds; the memory goes round.
    pub(super) fn take(&self, crossed: &mut Crossed) {
        crossed.bytes.clear();
        crossed.lens.clear();
        mem::swap(&mut *self.lock(), crossed);
    }

    fn lock(&self) -> MutexGuard<'_, Crossed> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    fn batch(range: std::ops::Range<u32>) -> Packets {
        let mut packets = Packets::new(64 << 10, 2_000);
        for n in range {
            packets.room().unwrap()[..4].copy_from_slice(&n.to_le_bytes());
            packets.push(4, ());
        }
        packets
    }

    fn numbers(crossed: &mut Crossed) -> Vec<u32> {
        let number = |(packet, len): (&mut [u8], usize)| {
            assert_eq!((packet.len(), len), (16, 4));
            u32::from_le_bytes(packet[..4].try_into().unwrap())
        };
        crossed.drain().map(number).collect()
    }

    #[test]
    fn order_is_kept_and_one_wake_up_is_enough_for_what_waits() {
        let (crossing, mut crossed) = (Crossing::default(), Crossed::default());
        assert_eq!(crossing.append(&batch(0..3)), (0, true));
        assert_eq!(crossing.append(&batch(3..5)), (0, false));
        crossing.take(&mut crossed);
        assert_eq!(numbers(&mut crossed), [0, 1, 2, 3, 4]);
        assert_eq!(crossing.append(&batch(5..6)), (0, true));
        crossing.take(&mut crossed);
        assert_eq!(numbers(&mut crossed), [5]);
        assert_eq!(crossing.append(&batch(0..0)), (0, false));
    }

    #[test]
    fn it_is_bounded() {
        let (crossing, mut crossed) = (Crossing::default(), Crossed::default());
        assert_eq!(crossing.append(&batch(0..1_100)), (76, true));
        assert_eq!(crossing.append(&batch(0..7)), (7, false));
        crossing.take(&mut crossed);
        assert_eq!(numbers(&mut crossed).len(), MOST_PACKETS);
    }
}
