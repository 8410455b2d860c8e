//! The Internet checksum (RFC 1071) and its incremental change (RFC 1624).

/// Adds 16-bit words, not yet folded. An odd last byte counts as the high half of a word.
pub fn sum(bytes: &[u8]) -> u64 {
    let mut words = bytes.chunks_exact(2);
    let mut total: u64 = words.by_ref().map(|w| u64::from(u16::from_be_bytes([w[0], w[1]]))).sum();
    if let [last] = words.remainder() {
        total += u64::from(*last) << 8;
    }
    total
}

/// Folds a sum to 16 bits and inverts it: what goes into a checksum field.
pub fn finish(mut total: u64) -> u16 {
    while total > 0xffff {
        total = (total & 0xffff) + (total >> 16);
    }
    !(total as u16)
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

    #[test]
    fn completing_stays_inside_the_packet() {
        let mut packet = [1, 2, 3, 4, 5, 6];
        assert!(!complete(&mut packet, 7, 0));
        assert!(!complete(&mut packet, 4, 1));
        assert!(complete(&mut packet, 2, 2));
    }
}
