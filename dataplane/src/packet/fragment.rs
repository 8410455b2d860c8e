//! IPv4 packets cut into fragments (RFC 791, section 3.2): those that are larger than the tunnel carries and may be cut.

use super::{checksum, header::Header};

/// "More fragments" in the word with the offset, and the offset in it.
const MORE: u16 = 0x2000;
const OFFSET: u16 = 0x1fff;
/// An option with this bit stands in every fragment, others in the first alone.
const COPIED: u8 = 0x80;

/// The fragments of one packet; [`write`](Self::write) them one by one.
#[derive(Debug)]
pub struct Fragments<'a> {
    packet: &'a [u8],
    /// Length of the packet's header.
    first_header: usize,
    /// Header of all fragments but the first, and its length.
    later_header: ([u8; 60], usize),
    /// Where the payload of the next one begins; the packet's end when all are out.
    at: usize,
    mtu: usize,
}

impl<'a> Fragments<'a> {
    /// Cuts `packet` into pieces of at most `mtu` bytes, which must leave eight bytes beside the header.
    ///
    /// `None` for IPv6, for "do not fragment", and for a fragment that reaches beyond the largest packet there is.
    pub fn new(packet: &'a [u8], header: &Header, mtu: u16) -> Option<Self> {
        let packet = packet.get(..header.len)?;
        let (first_header, mtu) = (header.payload, usize::from(mtu));
        let reaches = usize::from(offset_word(packet) & OFFSET) * 8 + header.len;
        if !header.source.is_ipv4() || header.dont_fragment || first_header + 8 > mtu || reaches > 65_535 {
            return None;
        }
        let later_header = later_header(packet.get(..first_header)?)?;
        Some(Self { packet, first_header, later_header, at: first_header, mtu })
    }

    /// Writes the next fragment into `out`, for which `mtu` bytes suffice; its length, or `None` after the last.
    pub fn write(&mut self, out: &mut [u8]) -> Option<usize> {
        let left = self.packet.len().checked_sub(self.at).filter(|left| *left > 0)?;
        let is_first = self.at == self.first_header;
        let header = match is_first {
            true => &self.packet[..self.first_header],
            false => &self.later_header.0[..self.later_header.1],
        };
        let room = self.mtu - header.len();
        // All but the last carry a multiple of eight bytes: offsets count in those.
        let len = if left <= room { left } else { room & !7 };
        let out = out.get_mut(..header.len() + len)?;
        let (out_header, out_payload) = out.split_at_mut(header.len());
        out_header.copy_from_slice(header);
        out_payload.copy_from_slice(&self.packet[self.at..self.at + len]);
        let total = (header.len() + len) as u16;
        let was = offset_word(self.packet);
        let offset = (was & OFFSET) + ((self.at - self.first_header) / 8) as u16;
        self.at += len;
        let more = if self.at < self.packet.len() { MORE } else { was & MORE };
        out[2..4].copy_from_slice(&total.to_be_bytes());
        out[6..8].copy_from_slice(&(more | offset).to_be_bytes());
        out[10..12].fill(0);
        let sum = checksum::finish(checksum::sum(&out[..header.len()]));
        out[10..12].copy_from_slice(&sum.to_be_bytes());
        Some(out.len())
    }
}

/// Flags and offset.
fn offset_word(packet: &[u8]) -> u16 {
    u16::from_be_bytes([packet[6], packet[7]])
}

/// The header of fragments after the first: without the options that only the first carries.
fn later_header(first: &[u8]) -> Option<([u8; 60], usize)> {
    let mut header = [0; 60];
    let (fixed, mut options) = first.split_at_checked(20)?;
    header[..20].copy_from_slice(fixed);
    let mut len = 20;
    while let Some(&kind) = options.first() {
        let size = match (kind, options.get(1)) {
            (0, _) => break,
            (1, _) => 1,
            (_, Some(&size)) if size >= 2 => usize::from(size),
            // Broken: whoever reads the first fragment will say so.
            _ => break,
        };
        let Some((option, rest)) = options.split_at_checked(size) else { break };
        if kind & COPIED != 0 {
            header[len..len + size].copy_from_slice(option);
            len += size;
        }
        options = rest;
    }
    // What is missing to whole words stays zero: end of options.
    len = len.next_multiple_of(4);
    header[0] = 0x40 | (len / 4) as u8;
    Some((header, len))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use proptest::prelude::*;

    use super::*;
    use crate::packet::header::Fragment;

    fn packet(len: usize, options: &[u8], flags: u16) -> Vec<u8> {
        let mut packet: Vec<u8> = (0..len).map(|n| (n * 7) as u8).collect();
        let header = 20 + options.len();
        packet[..20].copy_from_slice(&[0; 20]);
        packet[0] = 0x40 | (header / 4) as u8;
        packet[2..4].copy_from_slice(&(len as u16).to_be_bytes());
        packet[4..8].copy_from_slice(&[0xab, 0xcd, (flags >> 8) as u8, flags as u8]);
        packet[8..10].copy_from_slice(&[64, 17]);
        packet[12..20].copy_from_slice(&[10, 1, 0, 1, 10, 2, 0, 1]);
        packet[20..header].copy_from_slice(options);
        packet
    }

    fn cut(packet: &[u8], mtu: u16) -> Vec<Vec<u8>> {
        let header = Header::parse(packet).unwrap();
        let mut fragments = Fragments::new(packet, &header, mtu).unwrap();
        let mut buffer = vec![0; usize::from(mtu)];
        std::iter::from_fn(|| fragments.write(&mut buffer).map(|len| buffer[..len].to_vec())).collect()
    }

    /// Puts the payloads where their offsets say; the last must be marked so.
    fn join(pieces: &[Vec<u8>]) -> Vec<u8> {
        let mut payload = Vec::new();
        for (n, piece) in pieces.iter().enumerate() {
            let header = Header::parse(piece).unwrap();
            assert_eq!(checksum::finish(checksum::sum(&piece[..header.payload])), 0);
            assert_eq!(piece[4..6], [0xab, 0xcd]);
            assert_eq!(usize::from(offset_word(piece) & OFFSET) * 8, payload.len());
            assert_eq!(offset_word(piece) & MORE != 0, n + 1 < pieces.len());
            payload.extend(&piece[header.payload..header.len]);
        }
        payload
    }

    #[test]
    fn pieces_fit_and_make_the_whole_again() {
        for (len, mtu) in [(1_421, 1_420), (9_000, 1_420), (65_535, 1_280), (1_436, 1_300)] {
            let whole = packet(len, &[], 0);
            let pieces = cut(&whole, mtu);
            assert!(pieces.len() >= 2 && pieces.iter().all(|piece| piece.len() <= usize::from(mtu)));
            assert_eq!(join(&pieces), whole[20..], "{len}");
        }
    }

    #[test]
    fn fragments_are_cut_further() {
        // The middle of a datagram: offset 8 * 100, more to come.
        let pieces = cut(&packet(3_000, &[], 0x2000 | 100), 1_400);
        let words: Vec<_> = pieces.iter().map(|piece| offset_word(piece)).collect();
        assert_eq!(words, [0x2000 | 100, 0x2000 | (100 + 172), 0x2000 | (100 + 344)]);
        let last = cut(&packet(3_000, &[], 100), 1_400);
        assert_eq!(offset_word(last.last().unwrap()) & MORE, 0);
    }

    #[test]
    fn only_copied_options_go_into_later_pieces() {
        // Record route (first only), router alert (copied), no-operation.
        let options = [7, 7, 4, 0, 0, 0, 0, 148, 4, 0, 0, 1];
        let pieces = cut(&packet(3_000, &options, 0), 1_400);
        assert_eq!(pieces[0][..1], [0x48]);
        assert_eq!(pieces[1][..1], [0x46]);
        assert_eq!(pieces[1][20..24], [148, 4, 0, 0]);
        assert_eq!(join(&pieces), packet(3_000, &options, 0)[32..]);
    }

    #[test]
    fn what_must_not_be_cut_is_not() {
        for flags in [0x4000, 0x1fff, 0x1f00] {
            let packet = packet(3_000, &[], flags);
            let header = Header::parse(&packet).unwrap();
            assert!(Fragments::new(&packet, &header, 1_400).is_none(), "{flags:x}");
        }
        let header = Header { fragment: Fragment::Whole, ..Header::parse(&packet(100, &[], 0)).unwrap() };
        assert!(Fragments::new(&packet(100, &[], 0), &header, 27).is_none());
    }

    proptest! {
        #[test]
        fn never_panics_and_never_exceeds(
            len in 60usize..4_000, flags in any::<u16>(), words in 0usize..11, mtu in 20u16..2_000,
            options in proptest::collection::vec(any::<u8>(), 40),
        ) {
            let packet = packet(len, &options[..(words * 4).min(40)], flags);
            let header = Header::parse(&packet).unwrap();
            let mut buffer = vec![0; usize::from(mtu)];
            if let Some(mut fragments) = Fragments::new(&packet, &header, mtu) {
                while let Some(len) = fragments.write(&mut buffer) {
                    prop_assert!(Header::parse(&buffer[..len]).is_some());
                }
                prop_assert_eq!(fragments.at, packet.len());
            }
        }
    }
}
