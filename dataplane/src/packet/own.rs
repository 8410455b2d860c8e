//! Packets of the data plane itself inside a tunnel: probes of a path's MTU, answers to them, pieces of packets.
//!
//! Each is an IPv4 packet from 127.0.0.1 to 127.0.0.1 of protocol 253 (experiments, RFC 3692). No user's packet looks so: what
//! is sent from or to the loopback network is refused on the way into a tunnel, and must not be taken from a network by
//! anybody (RFC 1122, section 3.2.1.3). A peer that does not know them drops them as it drops any such packet.
//!
//! ```text
//! 0     IPv4 header without options, "don't fragment", time to live 1
//! 20    kind: 1 probe, 2 answer, 3 piece
//! 21    piece: its place in the packet, in units of 8 bytes; else zero
//! 22    size (big endian). Probe: bytes inside the datagram, padding included. Answer: those that arrived. Piece: of the
//!       whole packet
//! 24    number (big endian): an answer has that of its probe, the pieces of one packet have one
//! 28    piece: the bytes of the packet. What is behind the packet is padding, which makes a probe as large as it is to be
//! ```

use super::checksum;

/// Length of the headers: all there is of a probe or answer without its padding.
pub const LEN: usize = 28;
/// Protocol number for experiments.
const EXPERIMENT: u8 = 253;
/// Source and destination: the loopback address twice.
const ADDRESSES: [u8; 8] = [127, 0, 0, 1, 127, 0, 0, 1];

/// What the headers of such a packet say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Own {
    /// What it is.
    pub kind: Kind,
    /// Bytes: see the module.
    pub size: u16,
    /// Tells it apart from others of its kind.
    pub number: u32,
}

/// What such a packet is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// "Does this size arrive?"
    Probe,
    /// "It does."
    Answer,
    /// A part of a packet that would not fit the path.
    Piece {
        /// Where it begins, in bytes: a multiple of 8 below 2048.
        offset: u16,
    },
}

impl Own {
    /// Reads what came out of a tunnel; `None` for all other packets, after one comparison.
    pub fn parse(packet: &[u8]) -> Option<Self> {
        if packet.get(12..20) != Some(&ADDRESSES[..]) {
            return None;
        }
        let &[0x45, _, high, low, _, _, _, _, _, EXPERIMENT, ..] = packet else { return None };
        let len = usize::from(u16::from_be_bytes([high, low]));
        let &[kind, place, size_high, size_low, a, b, c, d] = packet.get(20..LEN)? else { return None };
        let kind = match (kind, place) {
            (1, 0) if len == LEN => Kind::Probe,
            (2, 0) if len == LEN => Kind::Answer,
            (3, place) if len > LEN && packet.len() >= len => Kind::Piece { offset: u16::from(place) * 8 },
            _ => return None,
        };
        let size = u16::from_be_bytes([size_high, size_low]);
        Some(Self { kind, size, number: u32::from_be_bytes([a, b, c, d]) })
    }

    /// Writes the headers of a packet of `len` bytes, [`LEN`] and what is to follow, into the beginning of `out`.
    ///
    /// # Panics
    ///
    /// If `out` is shorter than [`LEN`].
    pub fn write(&self, len: u16, out: &mut [u8]) {
        let (kind, place) = match self.kind {
            Kind::Probe => (1, 0),
            Kind::Answer => (2, 0),
            Kind::Piece { offset } => (3, (offset / 8) as u8),
        };
        let [high, low] = len.to_be_bytes();
        out[..12].copy_from_slice(&[0x45, 0, high, low, 0, 0, 0x40, 0, 1, EXPERIMENT, 0, 0]);
        out[12..20].copy_from_slice(&ADDRESSES);
        let sum = checksum::finish(checksum::sum(&out[..20]));
        out[10..12].copy_from_slice(&sum.to_be_bytes());
        out[20..22].copy_from_slice(&[kind, place]);
        out[22..24].copy_from_slice(&self.size.to_be_bytes());
        out[24..LEN].copy_from_slice(&self.number.to_be_bytes());
    }
}

/// Gives such a packet a traffic class byte: a piece goes out as its packet would.
pub fn set_class(packet: &mut [u8], class: u8) {
    let Some(header) = packet.first_chunk_mut::<20>() else { return };
    header[1] = class;
    header[10..12].fill(0);
    let sum = checksum::finish(checksum::sum(header));
    header[10..12].copy_from_slice(&sum.to_be_bytes());
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use proptest::prelude::*;

    use super::*;
    use crate::packet::header::{Header, is_martian_source, is_unroutable_destination};

    #[test]
    fn no_packet_of_a_user_looks_like_one() {
        let mut bytes = [0; 48];
        Own { kind: Kind::Probe, size: 1_420, number: 7 }.write(LEN as u16, &mut bytes);
        let header = Header::parse(&bytes).unwrap();
        assert!(is_unroutable_destination(header.destination) && is_martian_source(header.source));
        assert_eq!((header.len, checksum::finish(checksum::sum(&bytes[..20]))), (LEN, 0), "a whole IPv4 packet");
    }

    fn kinds() -> impl Strategy<Value = (Kind, u16)> {
        prop_oneof![
            Just((Kind::Probe, LEN as u16)),
            Just((Kind::Answer, LEN as u16)),
            (0..256u16, LEN as u16 + 1..60).prop_map(|(place, len)| (Kind::Piece { offset: place * 8 }, len)),
        ]
    }

    proptest! {
        #[test]
        fn what_is_written_can_be_read((kind, len) in kinds(), size in any::<u16>(), number in any::<u32>()) {
            let own = Own { kind, size, number };
            let mut bytes = [1; 60];
            own.write(len, &mut bytes);
            set_class(&mut bytes, number as u8);
            prop_assert_eq!(checksum::finish(checksum::sum(&bytes[..20])), 0);
            prop_assert_eq!(Own::parse(&bytes[..len.into()]), Some(own));
            prop_assert_eq!(Own::parse(&bytes[..usize::from(len) - 1]), None);
        }

        #[test]
        fn anything_can_be_read(
            (kind, len) in kinds(), at in 0..LEN, value in any::<u8>(), bytes in proptest::collection::vec(any::<u8>(), 0..60),
        ) {
            Own::parse(&bytes);
            let mut altered = [0; 60];
            Own { kind, size: 1, number: 2 }.write(len, &mut altered);
            altered[at] = value;
            if let Some(Own { kind: Kind::Piece { offset }, .. }) = Own::parse(&altered) {
                prop_assert!(offset < 2_048 && offset % 8 == 0);
            }
        }
    }
}
