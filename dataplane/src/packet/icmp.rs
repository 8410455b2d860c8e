//! ICMP errors that go back into the TUN for packets that cannot be carried.
//!
//! Their source is the destination of the packet in question: the kernel drops one with a local IPv4 source as
//! martian.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::{
    checksum,
    header::{Fragment, Header, ICMP, ICMPV6, is_martian_source},
};

/// Longest message that is made: fits every link (RFC 4443, section 2.4).
pub const MAX_LEN: usize = 1280;
/// IPv4 messages quote at most this much in all (RFC 1812, section 4.3.2.3).
const MAX_LEN_V4: usize = 576;

/// What is wrong with the packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Problem {
    /// Nobody there to carry it to.
    Unreachable,
    /// Larger than this many bytes.
    TooBig(u16),
}

/// Writes the error about `packet` into `out`; returns its length.
///
/// `None` for packets that must not be answered (RFC 1122, section 3.2.2; RFC 4443, section 2.4): ICMP errors
/// themselves, later fragments, packets from or to addresses that are nobody's.
pub fn write(problem: Problem, packet: &[u8], header: &Header, out: &mut [u8]) -> Option<usize> {
    let addressable = !is_martian_source(header.source) && !is_martian_source(header.destination);
    if !addressable || header.fragment == Fragment::Later || is_icmp_error(packet, header) {
        return None;
    }
    let packet = packet.get(..header.len)?;
    match (header.source, header.destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => write_v4(problem, packet, (destination, source), out),
        (IpAddr::V6(source), IpAddr::V6(destination)) => write_v6(problem, packet, (destination, source), out),
        _ => None,
    }
}

/// True for ICMP other than echo, as far as it can be told: only these are sure to be no errors.
fn is_icmp_error(packet: &[u8], header: &Header) -> bool {
    let kind = packet.get(header.payload).copied();
    match header.protocol {
        ICMP => !matches!(kind, Some(0 | 8)),
        ICMPV6 => !matches!(kind, Some(128..)),
        _ => false,
    }
}

fn write_v4(problem: Problem, packet: &[u8], (from, to): (Ipv4Addr, Ipv4Addr), out: &mut [u8]) -> Option<usize> {
    let quoted = &packet[..packet.len().min(MAX_LEN_V4 - 28)];
    let len = 28 + quoted.len();
    let out = out.get_mut(..len)?;
    out.fill(0);
    out[0] = 0x45;
    out[1] = 0xc0; // precedence "internetwork control"
    out[2..4].copy_from_slice(&(len as u16).to_be_bytes());
    out[8] = 64;
    out[9] = ICMP;
    out[12..16].copy_from_slice(&from.octets());
    out[16..20].copy_from_slice(&to.octets());
    let sum = checksum::finish(checksum::sum(&out[..20]));
    out[10..12].copy_from_slice(&sum.to_be_bytes());
    out[20] = 3; // destination unreachable
    match problem {
        Problem::Unreachable => out[21] = 1, // host
        Problem::TooBig(mtu) => {
            out[21] = 4; // fragmentation needed (RFC 1191)
            out[26..28].copy_from_slice(&mtu.to_be_bytes());
        }
    }
    out[28..].copy_from_slice(quoted);
    let sum = checksum::finish(checksum::sum(&out[20..]));
    out[22..24].copy_from_slice(&sum.to_be_bytes());
    Some(len)
}

fn write_v6(problem: Problem, packet: &[u8], (from, to): (Ipv6Addr, Ipv6Addr), out: &mut [u8]) -> Option<usize> {
    let quoted = &packet[..packet.len().min(MAX_LEN - 48)];
    let len = 48 + quoted.len();
    let out = out.get_mut(..len)?;
    out.fill(0);
    out[0] = 0x60;
    out[4..6].copy_from_slice(&((len - 40) as u16).to_be_bytes());
    out[6] = ICMPV6;
    out[7] = 64;
    out[8..24].copy_from_slice(&from.octets());
    out[24..40].copy_from_slice(&to.octets());
    match problem {
        Problem::Unreachable => out[40] = 1, // no route to destination
        Problem::TooBig(mtu) => {
            out[40] = 2;
            out[46..48].copy_from_slice(&mtu.to_be_bytes());
        }
    }
    out[48..].copy_from_slice(quoted);
    let pseudo = checksum::pseudo_v6(&from.octets(), &to.octets(), len - 40, ICMPV6);
    let sum = checksum::finish(pseudo + checksum::sum(&out[40..]));
    out[42..44].copy_from_slice(&sum.to_be_bytes());
    Some(len)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    fn v4() -> Vec<u8> {
        let mut packet = vec![0; 1_500];
        packet[0] = 0x45;
        packet[2..4].copy_from_slice(&1_500u16.to_be_bytes());
        packet[9] = 17;
        packet[12..20].copy_from_slice(&[10, 0, 0, 1, 10, 9, 0, 2]);
        packet
    }

    fn v6() -> Vec<u8> {
        let mut packet = vec![0; 100];
        packet[0] = 0x60;
        packet[4..6].copy_from_slice(&60u16.to_be_bytes());
        packet[6] = 17;
        packet[8] = 0xfd;
        packet[24] = 0xfd;
        packet[39] = 1;
        packet
    }

    #[test]
    fn answers_come_from_the_destination_and_check() {
        let mut out = [0; MAX_LEN];
        let packet = v4();
        let header = Header::parse(&packet).unwrap();
        let len = write(Problem::TooBig(1400), &packet, &header, &mut out).unwrap();
        let answer = Header::parse(&out[..len]).unwrap();
        assert_eq!((answer.source, answer.destination), (header.destination, header.source));
        assert_eq!(checksum::finish(checksum::sum(&out[20..len])), 0);
        assert_eq!(&out[20..22], &[3, 4]);

        let packet = v6();
        let header = Header::parse(&packet).unwrap();
        let len = write(Problem::Unreachable, &packet, &header, &mut out).unwrap();
        let answer = Header::parse(&out[..len]).unwrap();
        assert_eq!((answer.source, answer.destination), (header.destination, header.source));
        let mut addresses = [[0; 16]; 2];
        addresses[0].copy_from_slice(&out[8..24]);
        addresses[1].copy_from_slice(&out[24..40]);
        let pseudo = checksum::pseudo_v6(&addresses[0], &addresses[1], len - 40, ICMPV6);
        assert_eq!(checksum::finish(pseudo + checksum::sum(&out[40..len])), 0);
    }

    #[test]
    fn errors_and_fragments_are_not_answered() {
        let mut out = [0; MAX_LEN];
        let mut packet = v4();
        packet[9] = ICMP;
        packet[20] = 3;
        let header = Header::parse(&packet).unwrap();
        assert_eq!(write(Problem::Unreachable, &packet, &header, &mut out), None);
        packet[20] = 8;
        assert!(write(Problem::Unreachable, &packet, &header, &mut out).is_some());
        packet[7] = 9;
        let header = Header::parse(&packet).unwrap();
        assert_eq!(write(Problem::Unreachable, &packet, &header, &mut out), None);
    }
}
