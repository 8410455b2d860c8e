//! Views of IPv4 and IPv6 headers that a hostile packet cannot break.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// TCP's protocol number.
pub const TCP: u8 = 6;
/// UDP's protocol number.
pub const UDP: u8 = 17;
/// ICMP's protocol number.
pub const ICMP: u8 = 1;
/// ICMPv6's protocol number.
pub const ICMPV6: u8 = 58;

/// Extension headers looked at before giving up: more have no honest use.
pub(crate) const MAX_EXTENSIONS: usize = 6;

/// What the headers of one whole packet say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Source address.
    pub source: IpAddr,
    /// Destination address.
    pub destination: IpAddr,
    /// Length of the packet as its header says, in bytes.
    pub len: usize,
    /// Protocol of the payload; for a fragment other than the first, what the first one says.
    pub protocol: u8,
    /// Where the payload begins, in bytes from the packet's start.
    pub payload: usize,
    /// Position and presence of fragments.
    pub fragment: Fragment,
    /// IPv4 only: "do not fragment" is set. Always true for IPv6.
    pub dont_fragment: bool,
}

/// Which part of a datagram a packet is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fragment {
    /// All of it.
    Whole,
    /// Its beginning.
    First,
    /// Another part: has no transport header.
    Later,
}

impl Header {
    /// Reads the headers of `packet`, which may have padding behind it.
    ///
    /// `None` unless it is an IPv4 or IPv6 packet that is wholly there.
    pub fn parse(packet: &[u8]) -> Option<Self> {
        match packet.first()? >> 4 {
            4 => parse_v4(packet),
            6 => parse_v6(packet),
            _ => None,
        }
    }

    /// Source and destination port of TCP and UDP, as far as this packet shows them; its headers are enough.
    pub fn ports(&self, packet: &[u8]) -> Option<(u16, u16)> {
        let are_there = matches!(self.protocol, TCP | UDP) && self.payload + 4 <= self.len;
        if !are_there || self.fragment != Fragment::Whole {
            return None;
        }
        let &[a, b, c, d] = packet.get(self.payload..self.payload + 4)? else { return None };
        Some((u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d])))
    }
}

fn parse_v4(packet: &[u8]) -> Option<Header> {
    let header: &[u8; 20] = packet.first_chunk()?;
    let payload = usize::from(header[0] & 15) * 4;
    let len = usize::from(u16::from_be_bytes([header[2], header[3]]));
    if payload < 20 || len < payload || packet.len() < len {
        return None;
    }
    let flags = u16::from_be_bytes([header[6], header[7]]);
    let fragment = match (flags & 0x1fff, flags & 0x2000 != 0) {
        (0, false) => Fragment::Whole,
        (0, true) => Fragment::First,
        _ => Fragment::Later,
    };
    Some(Header {
        source: Ipv4Addr::from_bits(u32::from_be_bytes([header[12], header[13], header[14], header[15]])).into(),
        destination: Ipv4Addr::from_bits(u32::from_be_bytes([header[16], header[17], header[18], header[19]])).into(),
        len,
        protocol: header[9],
        payload,
        fragment,
        dont_fragment: flags & 0x4000 != 0,
    })
}

fn parse_v6(packet: &[u8]) -> Option<Header> {
    let header: &[u8; 40] = packet.first_chunk()?;
    let len = 40 + usize::from(u16::from_be_bytes([header[4], header[5]]));
    let packet = packet.get(..len)?;
    let address = |at: usize| {
        let mut bytes = [0; 16];
        bytes.copy_from_slice(&header[at..at + 16]);
        Ipv6Addr::from(bytes)
    };
    let (protocol, payload, fragment) = skip_extensions(packet, header[6]);
    Some(Header {
        source: address(8).into(),
        destination: address(24).into(),
        len,
        protocol,
        payload,
        fragment,
        dont_fragment: true,
    })
}

/// Walks the extension headers (RFC 8200, section 4). A chain that is cut off or too long ends where it is, with the
/// number of the header that was not read as the protocol.
fn skip_extensions(packet: &[u8], first: u8) -> (u8, usize, Fragment) {
    let (mut next, mut at, mut fragment) = (first, 40, Fragment::Whole);
    for _ in 0..MAX_EXTENSIONS {
        let Some(&[following, extent, high, low]) = packet.get(at..at + 4) else { break };
        let len = match next {
            // Hop-by-hop, routing, destination options; units of eight bytes, the first not counted.
            0 | 43 | 60 => 8 + usize::from(extent) * 8,
            44 => {
                let offset = u16::from_be_bytes([high, low]);
                fragment = match (offset & 0xfff8, offset & 1) {
                    (0, 0) => Fragment::Whole,
                    (0, _) => Fragment::First,
                    _ => Fragment::Later,
                };
                8
            }
            _ => break,
        };
        if packet.len() < at + len {
            break;
        }
        next = following;
        at += len;
        if fragment == Fragment::Later {
            break;
        }
    }
    (next, at, fragment)
}

/// True for a source address that no honest packet has between two machines.
pub fn is_martian_source(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => v4.octets()[0] == 0 || v4.is_loopback() || v4.octets()[0] >= 224,
        IpAddr::V6(v6) => {
            v6.is_unspecified()
                || v6.is_loopback()
                || v6.is_multicast()
                || v6.is_unicast_link_local()
                || v6.to_ipv4_mapped().is_some()
        }
    }
}

/// True for a destination that is never routed through a tunnel.
pub fn is_unroutable_destination(address: IpAddr) -> bool {
    is_martian_source(address)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use proptest::prelude::*;

    use super::*;

    fn v4(total: u16, ihl: u8, flags: u16) -> Vec<u8> {
        let mut packet = vec![0; 28];
        packet[0] = 0x40 | ihl;
        packet[2..4].copy_from_slice(&total.to_be_bytes());
        packet[6..8].copy_from_slice(&flags.to_be_bytes());
        packet[9] = UDP;
        packet[12..20].copy_from_slice(&[10, 0, 0, 1, 10, 0, 0, 2]);
        packet[20..24].copy_from_slice(&[0, 53, 1, 0]);
        packet
    }

    #[test]
    fn malformed_lengths_are_refused() {
        for (total, ihl) in [(29, 5), (19, 5), (28, 4), (28, 0), (24, 7)] {
            assert_eq!(Header::parse(&v4(total, ihl, 0)), None, "{total} {ihl}");
        }
        for packet in [&[][..], &[0x45], &[0x00; 40], &[0x50; 40], &[0xf5; 60], &[0x60; 39]] {
            assert_eq!(Header::parse(packet), None);
        }
    }

    #[test]
    fn fragments_show_no_ports() {
        let packet = v4(28, 5, 0);
        assert_eq!(Header::parse(&packet).unwrap().ports(&packet), Some((53, 256)));
        for flags in [0x2000, 0x0001, 0x2001] {
            let packet = v4(28, 5, flags);
            assert_eq!(Header::parse(&packet).unwrap().ports(&packet), None);
        }
    }

    #[test]
    fn extension_headers_are_walked_and_bounded() {
        let mut packet = vec![0; 40 + 8 * 8 + 8];
        packet[0] = 0x60;
        let payload = (packet.len() - 40) as u16;
        packet[4..6].copy_from_slice(&payload.to_be_bytes());
        packet[6] = 60;
        for n in 0..8 {
            packet[40 + n * 8] = 60;
        }
        assert_eq!(Header::parse(&packet).unwrap().protocol, 60, "too many to follow");
        packet[40 + 3 * 8] = UDP;
        let header = Header::parse(&packet).unwrap();
        assert_eq!((header.protocol, header.payload), (UDP, 40 + 4 * 8));
    }

    #[test]
    fn martians() {
        for text in [
            "0.0.0.0",
            "127.0.0.1",
            "224.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "ff02::1",
            "::ffff:10.0.0.1",
            "fe80::1",
        ] {
            assert!(is_martian_source(text.parse().unwrap()), "{text}");
        }
        for text in ["10.0.0.1", "fd00::1", "2001:db8::1"] {
            assert!(!is_martian_source(text.parse().unwrap()), "{text}");
        }
    }

    proptest! {
        #[test]
        fn never_panics(mut packet in proptest::collection::vec(any::<u8>(), 0..120), v6 in any::<bool>()) {
            if let Some(first) = packet.first_mut() {
                *first = if v6 { 0x60 } else { 0x45 };
            }
            if let Some(header) = Header::parse(&packet) {
                prop_assert!(header.len <= packet.len());
                prop_assert!(header.payload <= header.len);
                header.ports(&packet);
            }
        }
    }
}
