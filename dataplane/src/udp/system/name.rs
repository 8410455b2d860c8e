//! Addresses as the kernel reads and writes them.

use std::{
    mem,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6},
};

/// Room for either kind of address.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) union Name {
    v4: libc::sockaddr_in,
    v6: libc::sockaddr_in6,
}

/// Bytes of it.
pub(super) const NAME_LEN: libc::socklen_t = mem::size_of::<Name>() as libc::socklen_t;

/// No address yet.
pub(super) const EMPTY_NAME: Name = Name {
    v6: libc::sockaddr_in6 {
        sin6_family: 0,
        sin6_port: 0,
        sin6_flowinfo: 0,
        sin6_addr: libc::in6_addr { s6_addr: [0; 16] },
        sin6_scope_id: 0,
    },
};

/// Writes an address the way the socket's family wants it; returns its length.
pub(super) fn encode_address(address: SocketAddr, v6: bool, name: &mut Name) -> libc::socklen_t {
    let (address, scope) = match (address, v6) {
        (SocketAddr::V4(v4), false) => {
            name.v4 = libc::sockaddr_in {
                sin_family: libc::AF_INET as libc::sa_family_t,
                sin_port: v4.port().to_be(),
                sin_addr: libc::in_addr { s_addr: v4.ip().to_bits().to_be() },
                sin_zero: [0; 8],
            };
            return mem::size_of::<libc::sockaddr_in>() as libc::socklen_t;
        }
        (SocketAddr::V4(v4), true) => ((v4.ip().to_ipv6_mapped(), v4.port()), 0),
        // On a socket for IPv4 alone the kernel refuses this one, which is right.
        (SocketAddr::V6(v6), _) => ((*v6.ip(), v6.port()), v6.scope_id()),
    };
    name.v6 = libc::sockaddr_in6 {
        sin6_family: libc::AF_INET6 as libc::sa_family_t,
        sin6_port: address.1.to_be(),
        sin6_flowinfo: 0,
        sin6_addr: libc::in6_addr { s6_addr: address.0.octets() },
        sin6_scope_id: scope,
    };
    mem::size_of::<libc::sockaddr_in6>() as libc::socklen_t
}

/// Reads an address the kernel wrote; mapped IPv4 addresses come out as IPv4.
pub(super) fn decode_address(name: &Name) -> Option<SocketAddr> {
    // SAFETY: every bit pattern is a valid sockaddr_in6, and all of the union was initialised.
    let v6 = unsafe { name.v6 };
    match i32::from(v6.sin6_family) {
        libc::AF_INET => {
            // SAFETY: as above; the family says which variant it is.
            let v4 = unsafe { name.v4 };
            let ip = Ipv4Addr::from_bits(u32::from_be(v4.sin_addr.s_addr));
            Some(SocketAddrV4::new(ip, u16::from_be(v4.sin_port)).into())
        }
        libc::AF_INET6 => {
            let ip = Ipv6Addr::from(v6.sin6_addr.s6_addr);
            let port = u16::from_be(v6.sin6_port);
            Some(match ip.to_ipv4_mapped() {
                Some(v4) => SocketAddrV4::new(v4, port).into(),
                None => SocketAddrV6::new(ip, port, 0, v6.sin6_scope_id).into(),
            })
        }
        _ => None,
    }
}
