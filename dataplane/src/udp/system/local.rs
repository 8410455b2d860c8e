//! Which of our addresses a datagram reached, and is to leave from: `IP_PKTINFO` and `IPV6_PKTINFO`.
//!
//! No interface is named with the address: routes decide as for anything else, and a way out that fails over is followed.

use std::{
    mem,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

#[derive(Clone, Copy)]
#[repr(C)]
struct Message<T> {
    header: libc::cmsghdr,
    data: T,
}

/// Room for one control message of either family. The data begins right behind the header, as `CMSG_DATA` has it.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) union Control {
    v4: Message<libc::in_pktinfo>,
    v6: Message<libc::in6_pktinfo>,
}

/// Bytes of it.
pub(super) const CONTROL_LEN: usize = mem::size_of::<Control>();

// SAFETY: all zeros are a control message of no kind.
pub(super) const EMPTY_CONTROL: Control = unsafe { mem::zeroed() };

const V4: (i32, i32) = (libc::IPPROTO_IP, libc::IP_PKTINFO);
const V6: (i32, i32) = (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO);

/// Makes a message that names the source, the way the socket's family wants it: one for IPv6 takes mapped addresses.
/// Returns its length; 0 for an address that this socket cannot send from.
pub(super) fn encode(local: IpAddr, v6: bool, control: &mut Control) -> usize {
    match (local, v6) {
        (IpAddr::V4(v4), false) => {
            let spec = libc::in_addr { s_addr: v4.to_bits().to_be() };
            let data = libc::in_pktinfo { ipi_ifindex: 0, ipi_spec_dst: spec, ipi_addr: libc::in_addr { s_addr: 0 } };
            control.v4 = Message { header: header::<libc::in_pktinfo>(V4), data };
            mem::size_of::<Message<libc::in_pktinfo>>()
        }
        (IpAddr::V4(v4), true) => encode(v4.to_ipv6_mapped().into(), true, control),
        (IpAddr::V6(address), true) => {
            let address = libc::in6_addr { s6_addr: address.octets() };
            let data = libc::in6_pktinfo { ipi6_addr: address, ipi6_ifindex: 0 };
            control.v6 = Message { header: header::<libc::in6_pktinfo>(V6), data };
            mem::size_of::<Message<libc::in6_pktinfo>>()
        }
        (IpAddr::V6(_), false) => 0,
    }
}

/// Reads the message, of which the kernel wrote `len` bytes. Mapped addresses come out as IPv4; those that nothing can
/// be sent from are none.
pub(super) fn decode(control: &Control, len: usize) -> Option<IpAddr> {
    // SAFETY: every bit pattern is a valid control message, and all of the union was initialised.
    let v6 = unsafe { control.v6 };
    let kind = (v6.header.cmsg_level, v6.header.cmsg_type);
    let address: IpAddr = if kind == V6 && len >= needed::<libc::in6_pktinfo>() {
        let address = Ipv6Addr::from(v6.data.ipi6_addr.s6_addr);
        address.to_ipv4_mapped().map_or(address.into(), IpAddr::from)
    } else if kind == V4 && len >= needed::<libc::in_pktinfo>() {
        // SAFETY: as above; the kind says which variant it is.
        let v4 = unsafe { control.v4 };
        Ipv4Addr::from_bits(u32::from_be(v4.data.ipi_spec_dst.s_addr)).into()
    } else {
        return None;
    };
    let is_broadcast = address == IpAddr::V4(Ipv4Addr::BROADCAST);
    (!address.is_unspecified() && !address.is_multicast() && !is_broadcast).then_some(address)
}

fn header<T>((level, kind): (i32, i32)) -> libc::cmsghdr {
    let mut header = libc::cmsghdr { cmsg_len: 0, cmsg_level: level, cmsg_type: kind };
    header.cmsg_len = needed::<T>() as _;
    header
}

/// Length of a header and its data without the padding behind.
const fn needed<T>() -> usize {
    mem::offset_of!(Message<T>, data) + mem::size_of::<T>()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_can_be_read() {
        for (text, v6) in [("192.0.2.7", false), ("192.0.2.7", true), ("2001:db8::7", true), ("127.0.0.1", true)] {
            let local: IpAddr = text.parse().unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED));
            let mut control = EMPTY_CONTROL;
            let len = encode(local, v6, &mut control);
            assert!(len > 0 && len <= CONTROL_LEN);
            assert_eq!(decode(&control, len), Some(local));
            assert_eq!(decode(&control, 20), None, "cut off");
        }
        let mut control = EMPTY_CONTROL;
        assert_eq!(encode(Ipv6Addr::LOCALHOST.into(), false, &mut control), 0);
        assert_eq!(decode(&EMPTY_CONTROL, CONTROL_LEN), None);
        for none in ["0.0.0.0", "255.255.255.255", "224.0.0.1"] {
            let len = encode(none.parse().unwrap_or(IpAddr::V6(Ipv6Addr::LOCALHOST)), false, &mut control);
            assert_eq!(decode(&control, len), None, "{none}");
        }
    }
}
