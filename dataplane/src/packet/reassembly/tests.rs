#![allow(clippy::unwrap_used, reason = "tests")]

use proptest::prelude::*;

use super::{
    super::{fragment::Fragments, header::Header, model::Model},
    *,
};

/// A datagram that may be fragmented, and its fragments.
fn datagram(id: u16, len: usize, mtu: u16) -> (Vec<u8>, Vec<Vec<u8>>) {
    let payload = (0..len).map(|n| (n * 31 + usize::from(id)) as u8).collect();
    let whole = Model { id, dont_fragment: false, ..Model::udp(payload) }.bytes();
    let header = Header::parse(&whole).unwrap();
    let mut fragments = Fragments::new(&whole, &header, mtu).unwrap();
    let mut buffer = vec![0; usize::from(mtu)];
    let pieces = std::iter::from_fn(|| fragments.write(&mut buffer).map(|len| buffer[..len].to_vec())).collect();
    (whole, pieces)
}

fn joined(packets: &[Vec<u8>], bytes: usize) -> Vec<Vec<u8>> {
    let mut batch = Batch::new(bytes, packets.len().max(1));
    for packet in packets {
        batch.room().unwrap()[..packet.len()].copy_from_slice(packet);
        batch.push(packet.len(), ());
    }
    let mut reassembly = Reassembly::default();
    // What an earlier batch left behind must not matter.
    reassembly.join(&mut batch_of_a_beginning());
    reassembly.join(&mut batch);
    batch.iter().map(|(_, packet)| packet.to_vec()).collect()
}

fn batch_of_a_beginning() -> Batch<()> {
    let first = &datagram(7, 3_000, 1_420).1[0];
    let mut batch = Batch::new(0, 1);
    batch.room().unwrap()[..first.len()].copy_from_slice(first);
    batch.push(first.len(), ());
    batch
}

fn with_word(packet: &[u8], at: usize, change: impl Fn(u8) -> u8) -> Vec<u8> {
    let mut packet = packet.to_vec();
    packet[at] = change(packet[at]);
    packet[10..12].fill(0);
    let sum = checksum::finish(checksum::sum(&packet[..20]));
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    packet
}

#[test]
fn fragments_in_order_make_the_datagram_again() {
    for (len, mtu) in [(1_400, 1_420), (8_000, 1_420), (3_000, 1_280), (1_000, 576)] {
        let (whole, pieces) = datagram(9, len, mtu);
        assert!(pieces.len() > 1);
        assert_eq!(joined(&pieces, 100_000), [whole], "{len} in {mtu}");
    }
}

#[test]
fn many_datagrams_are_complete_in_the_order_of_their_last_fragments() {
    let (whole, pieces): (Vec<_>, Vec<_>) = (0..40).map(|id| datagram(id, 1_400, 1_420)).unzip();
    let long_ones = pieces.iter().map(|pieces| pieces[0].clone());
    let short_ones = pieces.iter().map(|pieces| pieces[1].clone());
    let sent: Vec<_> = long_ones.chain(short_ones).collect();
    assert_eq!(joined(&sent, 400_000), whole);
}

#[test]
fn whole_packets_keep_their_place() {
    let (whole, pieces) = datagram(9, 2_000, 1_420);
    let other = Model::tcp(vec![1; 50]).bytes();
    let sent = [other.clone(), pieces[0].clone(), other.clone(), pieces[1].clone(), other.clone()];
    assert_eq!(joined(&sent, 100_000), [other.clone(), other.clone(), whole, other]);
}

#[test]
fn what_does_not_fit_together_passes_as_it_is() {
    let (_, pieces) = datagram(9, 4_000, 1_420);
    let [a, b, c] = <[_; 3]>::try_from(pieces).unwrap();
    let other_id = datagram(10, 4_000, 1_420).1.remove(1);
    let without_sum = |packet: &Vec<u8>| {
        let mut packet = packet.clone();
        packet[10] ^= 1;
        packet
    };
    let sets: [(&str, Vec<Vec<u8>>); 12] = [
        ("no end", vec![a.clone(), b.clone()]),
        ("no beginning", vec![b.clone(), c.clone()]),
        ("a gap", vec![a.clone(), c.clone()]),
        ("out of order", vec![a.clone(), c.clone(), b.clone()]),
        ("twice", vec![a.clone(), a.clone(), b.clone(), c.clone()]),
        ("a part of another", vec![a.clone(), other_id, c.clone()]),
        ("marked on its way", vec![a.clone(), with_word(&b, 1, |class| class | 3), c.clone()]),
        ("another time to live", vec![a.clone(), b.clone(), with_word(&c, 8, |ttl| ttl - 1)]),
        ("another protocol", vec![a.clone(), with_word(&b, 9, |_| 6), c.clone()]),
        ("not to be fragmented", vec![a.clone(), with_word(&b, 6, |word| word | 0x40), c.clone()]),
        ("an overlap", vec![a.clone(), with_word(&b, 7, |offset| offset - 1), c.clone()]),
        ("a broken header", vec![a.clone(), without_sum(&b), c.clone()]),
    ];
    for (name, packets) in sets {
        assert_eq!(joined(&packets, 100_000), packets, "{name}");
    }
}

#[test]
fn without_room_fragments_stay_as_they_are() {
    let (whole, first) = datagram(8, 40_000, 1_420);
    let second = datagram(9, 40_000, 1_420).1;
    let sent = [first, second.clone()].concat();
    assert_eq!(joined(&sent, 84_000), [vec![whole], second].concat());
}

#[test]
fn no_datagram_is_larger_than_an_ip_packet() {
    let (_, mut pieces) = datagram(9, 60_000, 1_420);
    let last = pieces.pop().unwrap();
    pieces.push(with_word(&with_word(&last, 6, |_| 0x1f), 7, |_| 0xff));
    assert_eq!(joined(&pieces, 200_000), pieces);
}

proptest! {
    /// Whatever comes: each datagram is whole or in all its fragments, and nothing is made up.
    #[test]
    fn nothing_is_lost_nor_made_up(
        lens in proptest::collection::vec(1_393usize..6_000, 1..8),
        order in proptest::collection::vec(any::<prop::sample::Index>(), 0..12),
        lost in proptest::collection::vec(any::<prop::sample::Index>(), 0..3),
    ) {
        let mut whole = Vec::new();
        let mut sent = Vec::new();
        for (id, len) in lens.iter().enumerate() {
            let (datagram, pieces) = datagram(id as u16, *len, 1_420);
            whole.push((datagram, pieces.clone()));
            sent.extend(pieces);
        }
        for at in order {
            let moved = sent.remove(at.index(sent.len()));
            sent.push(moved);
        }
        for at in lost {
            sent.remove(at.index(sent.len()));
            if sent.is_empty() {
                break;
            }
        }
        let mut left = sent.clone();
        for packet in joined(&sent, 400_000) {
            let parts = match whole.iter().find(|(datagram, _)| *datagram == packet) {
                Some((_, parts)) => parts.clone(),
                None => vec![packet],
            };
            for part in parts {
                let at = left.iter().position(|sent| *sent == part);
                prop_assert!(at.is_some(), "made up");
                left.remove(at.unwrap());
            }
        }
        prop_assert!(left.is_empty(), "lost");
    }

    #[test]
    fn hostile_bytes_do_no_harm(
        packets in proptest::collection::vec((proptest::collection::vec(any::<u8>(), 0..64), 0u8..4, 0u8..3), 0..20),
    ) {
        let packets: Vec<_> = packets
            .into_iter()
            .map(|(mut packet, offset, more)| {
                if packet.len() < 20 {
                    return packet;
                }
                let len = packet.len() as u16;
                packet[..10].copy_from_slice(&[0x45, 0, (len >> 8) as u8, len as u8, 0, 1, more << 5, offset, 64, 17]);
                packet[12..20].fill(1);
                with_word(&packet, 0, |byte| byte)
            })
            .collect();
        let total = |packets: &[Vec<u8>]| -> usize { packets.iter().map(Vec::len).sum() };
        prop_assert!(total(&joined(&packets, 10_000)) <= total(&packets));
    }
}
