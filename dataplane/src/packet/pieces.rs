//! Packets that a path does not carry and nobody may cut: sent in pieces through the tunnel, put together at its other end.
//!
//! A link has to carry 1280 bytes, and one that cannot has to cut and join below IP (RFC 8200, section 5). This is that: the
//! packet is not changed, and no outer datagram is fragmented, which many networks drop.

use super::{
    ecn,
    own::{Kind, LEN, Own},
};

/// Longest packet that goes in pieces.
pub const MAX_PACKET: usize = 2_048;
/// Packets of one peer that may be incomplete at a time, the oldest of which gives way: 16 KiB.
const MAX_OPEN: usize = 8;

/// The pieces of one packet; [`write`](Self::write) them one by one.
#[derive(Debug)]
pub struct Pieces<'a> {
    packet: &'a [u8],
    number: u32,
    at: usize,
    most: usize,
}

impl<'a> Pieces<'a> {
    /// Cuts `packet` into pieces that are `most` bytes at most, headers included. `None` if it is too long for that.
    pub fn new(packet: &'a [u8], number: u32, most: u16) -> Option<Self> {
        let most = usize::from(most).checked_sub(LEN)? & !7;
        (most > 0 && packet.len() <= MAX_PACKET).then_some(Self { packet, number, at: 0, most })
    }

    /// Writes the next piece into `out`, for which the bytes given to [`new`](Self::new) suffice; its length, or `None` after
    /// the last.
    pub fn write(&mut self, out: &mut [u8]) -> Option<usize> {
        let left = self.packet.get(self.at..).filter(|left| !left.is_empty())?;
        let data = &left[..left.len().min(self.most)];
        let len = LEN + data.len();
        let out = out.get_mut(..len)?;
        let kind = Kind::Piece { offset: self.at as u16 };
        Own { kind, size: self.packet.len() as u16, number: self.number }.write(len as u16, out);
        out[LEN..].copy_from_slice(data);
        self.at += data.len();
        Some(len)
    }
}

/// Packets of one peer of which not all pieces arrived yet.
#[derive(Debug, Default)]
pub struct Assembly {
    open: Vec<Open>,
}

#[derive(Debug)]
struct Open {
    number: u32,
    bytes: Vec<u8>,
    /// Bytes that arrived.
    count: usize,
    /// Traffic class byte of the outer header: marks of congestion on any piece count for the packet.
    class: u8,
}

impl Assembly {
    /// Takes a piece: `packet` as it came out of the tunnel, whose headers say `own`, under an outer header with the traffic
    /// class byte `class`. The whole packet and its class if it was the last that was missing; it may be anything.
    pub fn take(&mut self, own: Own, packet: &[u8], class: u8) -> Option<(Vec<u8>, u8)> {
        let Kind::Piece { offset } = own.kind else { return None };
        let (size, data) = (usize::from(own.size), packet.get(LEN..)?);
        let (start, end) = (usize::from(offset), usize::from(offset) + data.len());
        if data.is_empty() || size > MAX_PACKET || end > size {
            return None;
        }
        let known = self.open.iter().position(|open| open.number == own.number && open.bytes.len() == size);
        let at = known.unwrap_or_else(|| {
            if self.open.len() >= MAX_OPEN {
                self.open.remove(0);
            }
            self.open.push(Open { number: own.number, bytes: vec![0; size], count: 0, class });
            self.open.len() - 1
        });
        let open = &mut self.open[at];
        open.bytes[start..end].copy_from_slice(data);
        open.count += data.len();
        if class & ecn::MASK == ecn::MASK {
            open.class = class;
        }
        if open.count < size {
            return None;
        }
        let open = self.open.remove(at);
        if self.open.is_empty() {
            self.open = Vec::new();
        }
        Some((open.bytes, open.class))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use proptest::prelude::*;

    use super::*;

    fn cut(packet: &[u8], number: u32, most: u16) -> Vec<Vec<u8>> {
        let mut pieces = Pieces::new(packet, number, most).unwrap();
        let mut buffer = vec![0; most.into()];
        std::iter::from_fn(|| pieces.write(&mut buffer).map(|len| buffer[..len].to_vec())).collect()
    }

    fn take(assembly: &mut Assembly, piece: &[u8], class: u8) -> Option<(Vec<u8>, u8)> {
        assembly.take(Own::parse(piece).unwrap(), piece, class)
    }

    #[test]
    fn congestion_on_any_piece_is_congestion_of_the_packet() {
        let packet = vec![7; 1_280];
        let pieces = cut(&packet, 1, 600);
        assert_eq!(pieces.len(), 3);
        let mut assembly = Assembly::default();
        for (piece, class) in pieces.iter().zip([2, 3]) {
            assert_eq!(take(&mut assembly, piece, class), None);
        }
        assert_eq!(take(&mut assembly, &pieces[2], 2), Some((packet, 3)));
        assert!(assembly.open.is_empty());
    }

    #[test]
    fn what_stays_incomplete_gives_way() {
        let mut assembly = Assembly::default();
        let packets: Vec<_> = (0..20).map(|n| cut(&[n; 1_280], n.into(), 1_200)).collect();
        for pieces in &packets {
            assert_eq!(take(&mut assembly, &pieces[0], 0), None);
            assert!(assembly.open.len() <= MAX_OPEN);
        }
        assert_eq!(take(&mut assembly, &packets[0][1], 0), None, "its first piece is forgotten");
        assert_eq!(take(&mut assembly, &packets[19][1], 0), Some((vec![19; 1_280], 0)));
    }

    #[test]
    fn what_is_too_long_or_too_narrow_does_not_go_in_pieces() {
        assert!(Pieces::new(&[0; MAX_PACKET], 1, 600).is_some());
        assert!(Pieces::new(&[0; MAX_PACKET + 1], 1, 600).is_none());
        assert!(Pieces::new(&[0; 100], 1, LEN as u16 + 7).is_none());
    }

    proptest! {
        #[test]
        fn pieces_in_any_order_make_the_packet_again(
            packets in proptest::collection::vec((1..=MAX_PACKET, 36..1_500u16), 1..MAX_OPEN), seed in any::<u64>(),
        ) {
            let mut pieces = Vec::new();
            let mut expected = std::collections::BTreeSet::new();
            for (n, (len, most)) in packets.into_iter().enumerate() {
                let packet: Vec<u8> = (0..len).map(|at| (at * 31 + n) as u8).collect();
                let cut = cut(&packet, n as u32, most);
                prop_assert!(cut.iter().all(|piece| piece.len() <= usize::from(most)));
                pieces.extend(cut);
                expected.insert(packet);
            }
            let mut state = seed;
            for n in (1..pieces.len()).rev() {
                state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
                pieces.swap(n, (state >> 33) as usize % (n + 1));
            }
            let mut assembly = Assembly::default();
            let got: Vec<_> = pieces.iter().filter_map(|piece| take(&mut assembly, piece, 0)).collect();
            prop_assert_eq!(got.len(), expected.len());
            prop_assert!(got.iter().all(|(packet, _)| expected.contains(packet)));
        }

        #[test]
        fn hostile_pieces_do_no_harm(
            pieces in proptest::collection::vec((0..256u16, any::<u16>(), 0..4u32, 1..2_100u16), 0..60),
        ) {
            let mut assembly = Assembly::default();
            for (place, size, number, len) in pieces {
                let mut piece = vec![5; LEN + usize::from(len)];
                let own = Own { kind: Kind::Piece { offset: place * 8 }, size, number };
                own.write(piece.len() as u16, &mut piece);
                if let Some((packet, _)) = take(&mut assembly, &piece, 0) {
                    prop_assert_eq!(packet.len(), usize::from(size));
                }
                prop_assert!(assembly.open.len() <= MAX_OPEN);
                prop_assert!(assembly.open.iter().all(|open| open.bytes.len() <= MAX_PACKET));
            }
        }
    }
}
