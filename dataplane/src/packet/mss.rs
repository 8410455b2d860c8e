//! TCP's maximum segment size, cut down to what fits the tunnel.

use super::{
    checksum,
    header::{Fragment, Header, TCP},
};

/// SYN in TCP's flags.
const SYN: u8 = 0x02;

/// Lowers the MSS option of a SYN so that segments fit `inner_mtu`. The checksum is adjusted; other packets, and MSS
/// values that fit, stay as they are. True if something changed.
pub fn clamp(packet: &mut [u8], header: &Header, inner_mtu: u16) -> bool {
    if header.protocol != TCP || header.fragment != Fragment::Whole {
        return false;
    }
    let overhead: u16 = if header.source.is_ipv4() { 40 } else { 60 };
    let most = inner_mtu.saturating_sub(overhead);
    let Some(tcp) = packet.get_mut(header.payload..header.len) else { return false };
    if tcp.len() < 20 || tcp[13] & SYN == 0 {
        return false;
    }
    let Some(at) = find_option(tcp) else { return false };
    let old = u16::from_be_bytes([tcp[at], tcp[at + 1]]);
    if old <= most {
        return false;
    }
    tcp[at..at + 2].copy_from_slice(&most.to_be_bytes());
    let mut sum = u16::from_be_bytes([tcp[16], tcp[17]]);
    // Words of the sum begin at even offsets; the value straddles two of them at an odd one.
    if at % 2 == 0 {
        sum = checksum::adjust(sum, old, most);
    } else {
        sum = checksum::adjust(sum, old.swap_bytes(), most.swap_bytes());
    }
    tcp[16..18].copy_from_slice(&sum.to_be_bytes());
    true
}

/// Offset of the MSS value (RFC 9293, section 3.1: kind 2, length 4).
fn find_option(tcp: &[u8]) -> Option<usize> {
    let end = usize::from(tcp[12] >> 4) * 4;
    let options = tcp.get(20..end)?;
    let mut at = 0;
    while let Some(&kind) = options.get(at) {
        match kind {
            0 => return None,
            1 => at += 1,
            _ => {
                let len = usize::from(*options.get(at + 1)?);
                if kind == 2 && len == 4 {
                    return (at + 4 <= options.len()).then_some(20 + at + 2);
                }
                at += len.max(2);
            }
        }
    }
    None
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use proptest::prelude::*;

    use super::*;

    fn syn(options: &[u8]) -> Vec<u8> {
        let mut packet = vec![0; 40 + options.len()];
        packet[0] = 0x45;
        let len = packet.len() as u16;
        packet[2..4].copy_from_slice(&len.to_be_bytes());
        packet[9] = TCP;
        packet[12..20].copy_from_slice(&[10, 0, 0, 1, 10, 0, 0, 2]);
        packet[32] = ((20 + options.len()) as u8 / 4) << 4;
        packet[33] = SYN;
        packet[40..].copy_from_slice(options);
        let checksum = tcp_checksum(&packet);
        packet[36..38].copy_from_slice(&checksum.to_be_bytes());
        packet
    }

    fn tcp_checksum(packet: &[u8]) -> u16 {
        let len = packet.len() as u64 - 20;
        checksum::finish(checksum::sum(&packet[12..]) + len + u64::from(TCP))
    }

    fn clamped(options: &[u8], mtu: u16) -> (bool, Vec<u8>) {
        let mut packet = syn(options);
        let header = Header::parse(&packet).unwrap();
        let changed = clamp(&mut packet, &header, mtu);
        assert_eq!(tcp_checksum(&packet), 0, "the checksum holds");
        (changed, packet)
    }

    #[test]
    fn large_mss_is_lowered_wherever_it_stands() {
        for options in [&[2, 4, 5, 180][..], &[1, 2, 4, 5, 180, 0, 0, 0], &[4, 2, 1, 2, 4, 5, 180, 1]] {
            let (changed, packet) = clamped(options, 1400);
            assert!(changed);
            assert!(packet[40..].windows(2).any(|w| w == 1360u16.to_be_bytes()));
        }
    }

    #[test]
    fn small_or_broken_mss_stays() {
        for options in [&[2, 4, 2, 0][..], &[2, 3, 9, 9], &[3, 0, 2, 4], &[0, 2, 4, 9], &[8, 200, 2, 4]] {
            assert!(!clamped(options, 1400).0, "{options:?}");
        }
    }

    proptest! {
        #[test]
        fn never_panics(bytes in proptest::collection::vec(any::<u8>(), 20..60), mtu in any::<u16>()) {
            let mut packet = syn(&[]);
            let at = packet.len() - 20;
            packet.truncate(at);
            packet.extend(bytes);
            let len = packet.len() as u16;
            packet[2..4].copy_from_slice(&len.to_be_bytes());
            let header = Header::parse(&packet).unwrap();
            clamp(&mut packet, &header, mtu);
        }
    }
}
