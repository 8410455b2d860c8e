//! In which order the packets of a batch are sent.
//!
//! A train carries datagrams of one length. Fragments come in turns of long and short ones, of which each pair would be a train
//! of its own; fragments that come one behind another are therefore taken by length, the longest first. Those of one length
//! keep their order, so that the datagrams are complete in the order in which they were sent, and no whole packet is
//! overtaken nor overtakes.

use super::offload::Offload;
use crate::{buffer::Batch, tun::Supers};

/// Finds the order of one batch after another; its memory is kept.
#[derive(Debug, Default)]
pub(crate) struct Turns {
    order: Vec<usize>,
}

impl Turns {
    /// Numbers of the packets of a batch, in the order in which they are to be taken.
    pub(crate) fn of(&mut self, packets: &Supers) -> &[usize] {
        self.order.clear();
        self.order.extend(0..packets.len());
        let mut begin = 0;
        for end in 0..=packets.len() {
            if end == packets.len() || !is_fragment(packets, end) {
                if end - begin > 2 {
                    // Stable: those of one length keep their order.
                    self.order[begin..end].sort_by_key(|&n| std::cmp::Reverse(len(packets, n)));
                }
                begin = end + 1;
            }
        }
        &self.order
    }
}

fn len(packets: &Supers, n: usize) -> usize {
    packets.get(n).map_or(0, |(_, packet)| packet.len())
}

/// True for a part of a datagram; a glance at two headers, which is enough for the order.
fn is_fragment(packets: &Batch<Offload>, n: usize) -> bool {
    let Some((Offload::None, packet)) = packets.get(n) else { return false };
    match packet.first_chunk::<20>() {
        Some(header) if header[0] >> 4 == 4 => u16::from_be_bytes([header[6], header[7]]) & 0x3fff != 0,
        Some(header) => header[0] >> 4 == 6 && header[6] == 44,
        None => false,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    const MORE: [u8; 2] = [0x20, 0];

    fn order(packets: &[(usize, [u8; 2])]) -> Vec<usize> {
        let mut batch = Supers::new(100_000, packets.len());
        for (len, word) in packets {
            let room = &mut batch.room().unwrap()[..*len];
            room.fill(0);
            (room[0], room[6], room[7]) = (0x45, word[0], word[1]);
            batch.push(*len, Offload::None);
        }
        let mut turns = Turns::default();
        turns.of(&batch).to_vec()
    }

    #[test]
    fn fragments_of_one_length_come_together() {
        let pair = [(1_420, MORE), (28, [0, 175])];
        assert_eq!(order(&pair.repeat(3)), [0, 2, 4, 1, 3, 5]);
        let three = [(1_420, MORE), (1_420, [0x20, 175]), (28, [1, 94])];
        assert_eq!(order(&three.repeat(2)), [0, 1, 3, 4, 2, 5]);
    }

    #[test]
    fn whole_packets_are_not_overtaken() {
        let (first, last, whole) = ((1_420, MORE), (28, [0, 175]), (1_000, [0x40, 0]));
        let packets = [first, last, first, last, whole, first, last, whole, whole];
        assert_eq!(order(&packets), [0, 2, 1, 3, 4, 5, 6, 7, 8]);
        assert_eq!(order(&[whole]), [0]);
        assert!(order(&[]).is_empty());
    }

    #[test]
    fn of_ipv6_too() {
        let mut batch = Supers::new(100_000, 4);
        for len in [1_420, 80, 1_420, 80] {
            let room = &mut batch.room().unwrap()[..len];
            room.fill(0);
            (room[0], room[6]) = (0x60, 44);
            batch.push(len, Offload::None);
        }
        assert_eq!(Turns::default().of(&batch), [0, 2, 1, 3]);
    }
}
