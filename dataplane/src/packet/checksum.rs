//! The Internet checksum (RFC 1071) and its incremental change (RFC 1624).

use std::net::IpAddr;

use super::header::{Fragment, Header};

/// Adds 16-bit words, folded to 16 bits. An odd last byte counts as the high half of a word.
///
/// The sum does not depend on the order of bytes within words (RFC 1071, section 2B): it is taken over larger words as
/// the processor has them, and swapped in the end.
pub fn sum(bytes: &[u8]) -> u64 {
    let (wide, rest) = bytes.as_chunks::<32>();
    // Sums that do not wait for each other; none overflows before 16 GiB.
    let mut sums = [0u64; 8];
    for chunk in wide {
        let (words, _) = chunk.as_chunks::<4>();
        for (sum, word) in sums.iter_mut().zip(words) {
            *sum += u64::from(u32::from_ne_bytes(*word));
        }
    }
    let (words, last) = rest.as_chunks::<2>();
    let mut total: u64 = sums.into_iter().sum();
    for word in words {
        total += u64::from(u16::from_ne_bytes(*word));
    }
    if let [last] = last {
        total += u64::from(u16::from_ne_bytes([*last, 0]));
    }
    u64::from(u16::from_be(fold(total)))
}

/// Folds a sum to 16 bits.
pub fn fold(mut total: u64) -> u16 {
    while total > 0xffff {
        total = (total & 0xffff) + (total >> 16);
    }
    total as u16
}

/// Folds a sum to 16 bits and inverts it: what goes into a checksum field.
pub fn finish(total: u64) -> u16 {
    !fold(total)
}

/// The checksum after a word under it changed from `old` to `new` (RFC 1624, equation 3).
pub fn adjust(checksum: u16, old: u16, new: u16) -> u16 {
    finish(u64::from(!checksum) + u64::from(!old) + u64::from(new))
}

/// Completes a checksum that was left open: the field, `offset` behind `start`, holds the pseudo-header's sum.
///
/// False if the field lies outside the packet.
#[must_use]
pub fn complete(packet: &mut [u8], start: usize, offset: usize) -> bool {
    let Some(covered) = packet.get_mut(start..) else { return false };
    let checksum = finish(sum(covered));
    let Some(field) = covered.get_mut(offset..offset + 2) else { return false };
    // A UDP checksum of zero would mean that there is none (RFC 768).
    let checksum = if checksum == 0 { 0xffff } else { checksum };
    field.copy_from_slice(&checksum.to_be_bytes());
    true
}

/// True if the checksums of a whole TCP packet hold: nothing that is computed anew hides what broke it on its way.
pub fn holds(packet: &[u8], header: &Header) -> bool {
    let Some((ip, transport)) = packet.get(..header.len).and_then(|packet| packet.split_at_checked(header.payload))
    else {
        return false;
    };
    let (addresses, ip_holds) = match (header.source, ip.len()) {
        (IpAddr::V4(_), 20..) => (&ip[12..20], fold(sum(ip)) == 0xffff),
        (IpAddr::V6(_), 40..) => (&ip[8..40], true),
        _ => return false,
    };
    let pseudo = sum(addresses) + transport.len() as u64 + u64::from(header.protocol);
    ip_holds && header.fragment == Fragment::Whole && fold(pseudo + sum(transport)) == 0xffff
}

/// Sum of an IPv4 pseudo-header (RFC 9293, section 3.1).
pub fn pseudo_v4(source: &[u8; 4], destination: &[u8; 4], len: usize, protocol: u8) -> u64 {
    sum(source) + sum(destination) + len as u64 + u64::from(protocol)
}

/// Sum of an IPv6 pseudo-header (RFC 8200, section 8.1).
pub fn pseudo_v6(source: &[u8; 16], destination: &[u8; 16], len: usize, next_header: u8) -> u64 {
    sum(source) + sum(destination) + len as u64 + u64::from(next_header)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn published_header_checks() {
        // The IPv4 header that most textbooks compute: checksum 0xb861.
        let header = [
            0x45, 0x00, 0x00, 0x73, 0x00, 0x00, 0x40, 0x00, 0x40, 0x11, 0xb8, 0x61, 0xc0, 0xa8, 0x00, 0x01, 0xc0, 0xa8,
            0x00, 0xc7,
        ];
        assert_eq!(finish(sum(&header)), 0);
        let mut changed = header;
        changed[2..4].copy_from_slice(&0x1234u16.to_be_bytes());
        let adjusted = adjust(0xb861, 0x0073, 0x1234);
        changed[10..12].copy_from_slice(&adjusted.to_be_bytes());
        assert_eq!(finish(sum(&changed)), 0);
    }

    proptest::proptest! {
        #[test]
        fn wide_words_give_the_same_sum(bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..200)) {
            let slow: u64 = bytes.chunks(2).map(|w| u64::from(w[0]) << 8 | u64::from(*w.get(1).unwrap_or(&0))).sum();
            proptest::prop_assert_eq!(finish(sum(&bytes)), finish(slow));
        }
    }

    #[test]
    fn completing_stays_inside_the_packet() {
        let mut packet = [1, 2, 3, 4, 5, 6];
        assert!(!complete(&mut packet, 7, 0));
        assert!(!complete(&mut packet, 4, 1));
        assert!(complete(&mut packet, 2, 2));
    }
}
