//! Control messages beside a datagram: which of our addresses it reached or leaves from, its traffic class, how long the
//! datagrams of a train are.
//!
//! No interface is named with an address: routes decide as for anything else, and a way out that fails over is followed.
//!
//! Layout of each (cmsg(3)): length of header and data, level, type, data, padding to the size of a pointer.

use std::{
    mem,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use super::super::{Ends, Outer};

/// Bytes of all that one datagram has: 40 for an IPv6 address, 24 for each of the two others.
pub(super) const CONTROL_LEN: usize = 96;

/// Room for the control messages of one datagram.
#[derive(Clone, Copy)]
#[repr(C, align(8))]
pub(super) struct Control(pub(super) [u8; CONTROL_LEN]);

pub(super) const EMPTY_CONTROL: Control = Control([0; CONTROL_LEN]);

const HEADER: usize = mem::size_of::<libc::cmsghdr>();
const ALIGN: usize = mem::size_of::<usize>();

const V4: (i32, i32) = (libc::IPPROTO_IP, libc::IP_PKTINFO);
const V6: (i32, i32) = (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO);
const CLASS_V4: (i32, i32) = (libc::IPPROTO_IP, libc::IP_TOS);
const CLASS_V6: (i32, i32) = (libc::IPPROTO_IPV6, libc::IPV6_TCLASS);
const SEGMENT: (i32, i32) = (libc::SOL_UDP, libc::UDP_SEGMENT);
const GRO: (i32, i32) = (libc::SOL_UDP, libc::UDP_GRO);

/// What the control messages of a datagram that arrived say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Said {
    /// The address of ours that it reached, if anything can be sent from there.
    pub(super) local: Option<IpAddr>,
    pub(super) class: u8,
    /// Length of each datagram of a train.
    pub(super) stride: Option<usize>,
}

impl Control {
    /// Writes what `outer` wants, the way the socket's family has it (one for IPv6 takes mapped addresses), and the
    /// length of the datagrams of a train. Returns the length of it all.
    pub(super) fn encode(&mut self, outer: &Outer, v6: bool, train: Option<usize>) -> usize {
        let mut at = 0;
        match (outer.ends.local, v6) {
            // Interface, address to send from, address in the header, which is for receiving.
            (Some(IpAddr::V4(v4)), false) => {
                let mut data = [0; 12];
                data[4..8].copy_from_slice(&v4.octets());
                self.push(&mut at, V4, &data);
            }
            (Some(address), true) => {
                let address = match address {
                    IpAddr::V4(v4) => v4.to_ipv6_mapped(),
                    IpAddr::V6(v6) => v6,
                };
                let mut data = [0; 20];
                data[..16].copy_from_slice(&address.octets());
                self.push(&mut at, V6, &data);
            }
            // An address that this socket cannot send from.
            (Some(IpAddr::V6(_)), false) | (None, _) => {}
        }
        if outer.class != 0 {
            let kind = if outer.ends.remote.is_ipv4() { CLASS_V4 } else { CLASS_V6 };
            self.push(&mut at, kind, &i32::from(outer.class).to_ne_bytes());
        }
        if let Some(len) = train {
            self.push(&mut at, SEGMENT, &(len as u16).to_ne_bytes());
        }
        at
    }

    fn push(&mut self, at: &mut usize, (level, kind): (i32, i32), data: &[u8]) {
        let message = &mut self.0[*at..];
        message[..ALIGN].copy_from_slice(&(HEADER + data.len()).to_ne_bytes());
        message[ALIGN..ALIGN + 4].copy_from_slice(&level.to_ne_bytes());
        message[ALIGN + 4..HEADER].copy_from_slice(&kind.to_ne_bytes());
        message[HEADER..HEADER + data.len()].copy_from_slice(data);
        *at += (HEADER + data.len()).next_multiple_of(ALIGN);
    }

    /// Reads the first `len` bytes, which the kernel wrote. What is not known is skipped.
    pub(super) fn decode(&self, len: usize) -> Said {
        let mut said = Said::default();
        let mut rest = &self.0[..len.min(CONTROL_LEN)];
        while let Some((header, _)) = rest.split_at_checked(HEADER) {
            let number = |at: usize| i32::from_ne_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
            let length: [u8; ALIGN] = header[..ALIGN].try_into().unwrap_or_default();
            let Some(data) = rest.get(HEADER..usize::from_ne_bytes(length)) else { break };
            match ((number(ALIGN), number(ALIGN + 4)), data) {
                (V4, &[_, _, _, _, a, b, c, d, ..]) => said.local = usable(Ipv4Addr::new(a, b, c, d).into()),
                (V6, data) => {
                    let address = data.first_chunk::<16>().map(|octets| Ipv6Addr::from(*octets));
                    let plain = |address: Ipv6Addr| address.to_ipv4_mapped().map_or(address.into(), IpAddr::from);
                    said.local = address.map(plain).and_then(usable);
                }
                (CLASS_V4, &[class, ..]) => said.class = class,
                (CLASS_V6, &[a, b, c, d, ..]) => said.class = i32::from_ne_bytes([a, b, c, d]) as u8,
                (GRO, &[a, b, c, d, ..]) => said.stride = usize::try_from(i32::from_ne_bytes([a, b, c, d])).ok(),
                _ => {}
            }
            rest = rest.get((HEADER + data.len()).next_multiple_of(ALIGN)..).unwrap_or_default();
        }
        said.stride = said.stride.filter(|stride| *stride > 0);
        said
    }
}

/// The address, unless nothing can be sent from it.
fn usable(address: IpAddr) -> Option<IpAddr> {
    let is_broadcast = address == IpAddr::V4(Ipv4Addr::BROADCAST);
    (!address.is_unspecified() && !address.is_multicast() && !is_broadcast).then_some(address)
}

/// The outer header of what arrived from `remote`.
pub(super) fn outer(remote: std::net::SocketAddr, said: &Said) -> Outer {
    Outer { class: said.class, ..Ends { remote, local: said.local }.into() }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_is_written_can_be_read() {
        for (text, v6) in [("192.0.2.7", false), ("192.0.2.7", true), ("2001:db8::7", true), ("127.0.0.1", true)] {
            for (class, train) in [(0, None), (3, None), (0x2e << 2, Some(1_452)), (0, Some(80))] {
                let local: IpAddr = text.parse().unwrap();
                let remote = std::net::SocketAddr::new(local, 9);
                let outer = Outer { class, ..Ends { remote, local: Some(local) }.into() };
                let mut control = EMPTY_CONTROL;
                let len = control.encode(&outer, v6, train);
                assert!(len > 0 && len <= CONTROL_LEN);
                let said = control.decode(len);
                assert_eq!((said.local, said.class), (Some(local), class));
                assert_eq!(control.decode(20).local, None, "cut off");
            }
        }
        let mut control = EMPTY_CONTROL;
        let from =
            |local: &str| Outer::from(Ends { remote: ([127, 0, 0, 1], 9).into(), local: Some(local.parse().unwrap()) });
        assert_eq!(control.encode(&from("::1"), false, None), 0);
        assert_eq!(EMPTY_CONTROL.decode(CONTROL_LEN), Said::default());
        for none in ["0.0.0.0", "255.255.255.255", "224.0.0.1"] {
            let len = control.encode(&from(none), false, None);
            assert_eq!(control.decode(len).local, None, "{none}");
        }
    }

    proptest! {
        #[test]
        fn anything_can_be_read(bytes in any::<[u8; 32]>(), len in 0..200usize, first in 0..64usize) {
            let mut control = EMPTY_CONTROL;
            control.0[..32].copy_from_slice(&bytes);
            control.0[..ALIGN].copy_from_slice(&first.to_ne_bytes());
            control.decode(len);
        }
    }
}
