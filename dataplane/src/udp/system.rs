//! UDP sockets of the system: many datagrams a call.
//!
//! Datagrams leave and arrive by `sendmmsg` and `recvmmsg`. What is to be sent lies contiguous in its batch, so runs of
//! one size to one destination can become `UDP_SEGMENT` trains here without a change elsewhere.
#![allow(unsafe_code, reason = "sendmmsg, recvmmsg, socket options; each block is one call")]

use std::{
    io, mem,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6},
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    ptr,
};

use socket2::{Domain, Protocol, Type};
use tracing::{debug, info};

use super::{Arrival, Arrivals, Datagrams, Socket};

/// Datagrams a system call takes at most.
const BATCH: usize = 64;
/// `IP_PMTUDISC_OMIT` and its twin: do not set "do not fragment", fragment what the link cannot carry, and believe no
/// ICMP about the path, which anybody can forge.
const PMTUDISC_OMIT: libc::c_int = 5;

/// How a socket is to be.
#[derive(Debug, Clone)]
pub struct SystemConfig {
    /// UDP port; 0 lets the system choose.
    pub port: u16,
    /// Bind this address instead of all of IPv6 and IPv4.
    pub address: Option<IpAddr>,
    /// Firewall mark of all that it sends (`SO_MARK`).
    pub mark: Option<u32>,
    /// Bytes asked for each of the two kernel buffers.
    pub buffer_bytes: usize,
}

impl Default for SystemConfig {
    /// Any port, all addresses, no mark, buffers of 4 MiB: a tenth of a second at 320 Mbit/s.
    fn default() -> Self {
        Self { port: 0, address: None, mark: None, buffer_bytes: 4 << 20 }
    }
}

/// A bound UDP socket.
#[derive(Debug)]
pub struct SystemSocket {
    socket: socket2::Socket,
    /// True if it is an IPv6 socket: IPv4 addresses are then written as mapped ones.
    v6: bool,
    receive_buffer: usize,
    send_buffer: usize,
}

impl SystemSocket {
    /// Binds a socket: one for IPv6 and IPv4 together, or IPv4 alone where the system has no IPv6.
    ///
    /// # Errors
    ///
    /// What the system says: `EADDRINUSE`, `EPERM` for a mark without `CAP_NET_ADMIN`.
    pub fn bind(config: &SystemConfig) -> io::Result<Self> {
        let bound = match config.address {
            Some(address) => Self::bind_to(SocketAddr::new(address, config.port), config)?,
            None => {
                let all = SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), config.port);
                match Self::bind_to(all, config) {
                    Ok(bound) => bound,
                    Err(error) if is_without_v6(&error) => {
                        debug!(%error, "no IPv6 here, using IPv4 alone");
                        let all = SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), config.port);
                        Self::bind_to(all, config)?
                    }
                    Err(error) => return Err(error),
                }
            }
        };
        info!(
            address = %bound.local_addr()?,
            receive_buffer = bound.receive_buffer,
            send_buffer = bound.send_buffer,
            "socket bound"
        );
        Ok(bound)
    }

    fn bind_to(address: SocketAddr, config: &SystemConfig) -> io::Result<Self> {
        let v6 = address.is_ipv6();
        let domain = if v6 { Domain::IPV6 } else { Domain::IPV4 };
        let socket = socket2::Socket::new(domain, Type::DGRAM.nonblocking().cloexec(), Some(Protocol::UDP))?;
        if v6 {
            socket.set_only_v6(false)?;
            set_option(&socket, libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, PMTUDISC_OMIT)?;
        }
        set_option(&socket, libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, PMTUDISC_OMIT)?;
        if let Some(mark) = config.mark {
            socket.set_mark(mark)?;
        }
        let bytes = libc::c_int::try_from(config.buffer_bytes).unwrap_or(libc::c_int::MAX);
        // Beyond the system's limit with CAP_NET_ADMIN, up to it without.
        if set_option(&socket, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, bytes).is_err() {
            socket.set_recv_buffer_size(config.buffer_bytes)?;
        }
        if set_option(&socket, libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, bytes).is_err() {
            socket.set_send_buffer_size(config.buffer_bytes)?;
        }
        socket.bind(&address.into())?;
        let (receive_buffer, send_buffer) = (socket.recv_buffer_size()?, socket.send_buffer_size()?);
        Ok(Self { socket, v6, receive_buffer, send_buffer })
    }

    /// Sizes of the kernel's receive and send buffers as the system reports them: twice what it took.
    pub fn buffer_sizes(&self) -> (usize, usize) {
        (self.receive_buffer, self.send_buffer)
    }
}

fn is_without_v6(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL | libc::EPROTONOSUPPORT))
}

fn set_option(socket: &socket2::Socket, level: i32, name: i32, value: libc::c_int) -> io::Result<()> {
    let len = mem::size_of::<libc::c_int>() as libc::socklen_t;
    let value = &raw const value;
    // SAFETY: the kernel reads one int, which outlives the call; the descriptor is open.
    if unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, value.cast(), len) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

impl AsFd for SystemSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Socket for SystemSocket {
    fn receive(&mut self, arrivals: &mut Arrivals) -> io::Result<usize> {
        arrivals.clear();
        let mut names = [EMPTY_NAME; BATCH];
        let mut parts = [libc::iovec { iov_base: ptr::null_mut(), iov_len: 0 }; BATCH];
        let mut messages = [EMPTY_MESSAGE; BATCH];
        let mut slots = 0;
        for (n, buffer) in arrivals.buffers().take(BATCH).enumerate() {
            parts[n] = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
            slots = n + 1;
        }
        for n in 0..slots {
            messages[n].msg_hdr.msg_name = (&raw mut names[n]).cast();
            messages[n].msg_hdr.msg_namelen = NAME_LEN;
            messages[n].msg_hdr.msg_iov = &raw mut parts[n];
            messages[n].msg_hdr.msg_iovlen = 1;
        }
        let (fd, first) = (self.socket.as_raw_fd(), messages.as_mut_ptr());
        // SAFETY: `slots` messages point to names and buffers that live on this stack and in `arrivals`.
        let count = unsafe { libc::recvmmsg(fd, first, slots as u32, libc::MSG_DONTWAIT, ptr::null_mut()) };
        if count < 0 {
            let error = io::Error::last_os_error();
            return match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(0),
                _ => Err(error),
            };
        }
        for (message, name) in messages.iter().zip(&names).take(count as usize) {
            // A source that is no IP address does not occur on such a socket; it would count as truncated.
            let (from, known) = match decode_address(name) {
                Some(from) => (from, true),
                None => (SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), 0), false),
            };
            let truncated = !known || message.msg_hdr.msg_flags & libc::MSG_TRUNC != 0;
            arrivals.filled.push(Arrival { from, len: message.msg_len as usize, truncated });
        }
        Ok(arrivals.len())
    }

    fn send(&mut self, datagrams: &Datagrams) -> usize {
        let (mut at, mut taken) = (0, 0);
        while at < datagrams.len() {
            match self.send_some(datagrams, at) {
                // Does not occur; were it to, trying again would never end.
                Ok(0) => break,
                Ok(count) => {
                    at += count;
                    taken += count;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // Full buffer or no buffer: all that is left would meet the same.
                Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::ENOBUFS)) => break,
                // This destination cannot be reached; the next may be another one.
                Err(error) => {
                    debug!(%error, "datagram refused");
                    at += 1;
                }
            }
        }
        taken
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        let address = self.socket.local_addr()?;
        address.as_socket().ok_or_else(|| io::ErrorKind::InvalidData.into())
    }
}

impl SystemSocket {
    /// One `sendmmsg` of datagrams from number `first` on; says how many went.
    fn send_some(&self, datagrams: &Datagrams, first: usize) -> io::Result<usize> {
        let mut names = [EMPTY_NAME; BATCH];
        let mut parts = [libc::iovec { iov_base: ptr::null_mut(), iov_len: 0 }; BATCH];
        let mut messages = [EMPTY_MESSAGE; BATCH];
        let mut count = 0;
        while count < BATCH
            && let Some((to, bytes)) = datagrams.get(first + count)
        {
            let len = encode_address(to, self.v6, &mut names[count]);
            // The kernel only reads what a message to be sent points to.
            parts[count] = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
            messages[count].msg_hdr.msg_namelen = len;
            count += 1;
        }
        for n in 0..count {
            messages[n].msg_hdr.msg_name = (&raw mut names[n]).cast();
            messages[n].msg_hdr.msg_iov = &raw mut parts[n];
            messages[n].msg_hdr.msg_iovlen = 1;
        }
        let (fd, first) = (self.socket.as_raw_fd(), messages.as_mut_ptr());
        // SAFETY: `count` messages point to names on this stack and to bytes that `datagrams` keeps.
        let sent = unsafe { libc::sendmmsg(fd, first, count as u32, libc::MSG_DONTWAIT) };
        if sent < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(sent as usize)
    }
}

/// Room for either kind of address.
#[derive(Clone, Copy)]
#[repr(C)]
union Name {
    v4: libc::sockaddr_in,
    v6: libc::sockaddr_in6,
}

const NAME_LEN: libc::socklen_t = mem::size_of::<Name>() as libc::socklen_t;

const EMPTY_NAME: Name = Name {
    v6: libc::sockaddr_in6 {
        sin6_family: 0,
        sin6_port: 0,
        sin6_flowinfo: 0,
        sin6_addr: libc::in6_addr { s6_addr: [0; 16] },
        sin6_scope_id: 0,
    },
};

// SAFETY: all zeros are a message without address, parts or control data.
const EMPTY_MESSAGE: libc::mmsghdr = unsafe { mem::zeroed() };

/// Writes an address the way the socket's family wants it; returns its length.
fn encode_address(address: SocketAddr, v6: bool, name: &mut Name) -> libc::socklen_t {
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
fn decode_address(name: &Name) -> Option<SocketAddr> {
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::disallowed_methods, reason = "tests")]

    use std::time::{Duration, Instant};

    use super::*;

    fn loopback(address: &str) -> SystemSocket {
        let address = Some(address.parse().unwrap());
        SystemSocket::bind(&SystemConfig { address, ..Default::default() }).unwrap()
    }

    fn receive(socket: &mut SystemSocket, want: usize) -> Vec<(SocketAddr, Vec<u8>)> {
        let mut arrivals = Arrivals::new(64);
        let mut all = Vec::new();
        let deadline = Instant::now() + Duration::from_secs(5);
        while all.len() < want && Instant::now() < deadline {
            socket.receive(&mut arrivals).unwrap();
            for n in 0..arrivals.len() {
                let (from, bytes) = arrivals.get(n).unwrap().unwrap();
                all.push((from, bytes.to_vec()));
            }
        }
        all
    }

    #[test]
    fn batches_pass_whole_and_in_order() {
        let (mut a, mut b) = (loopback("127.0.0.1"), loopback("127.0.0.1"));
        let to = b.local_addr().unwrap();
        let mut datagrams = Datagrams::new(300_000, 256);
        for n in 0..200u8 {
            let len = usize::from(n) + 1;
            datagrams.room().unwrap()[..len].fill(n);
            datagrams.push_tight(len, to);
        }
        datagrams.room().unwrap()[..65_000].fill(9);
        datagrams.push_tight(65_000, to);
        assert_eq!(a.send(&datagrams), 201);
        let got = receive(&mut b, 201);
        assert_eq!(got.len(), 201);
        for ((from, bytes), (_, sent)) in got.iter().zip(datagrams.iter()) {
            assert_eq!(*from, a.local_addr().unwrap());
            assert_eq!(bytes, sent);
        }
    }

    #[test]
    fn one_socket_serves_both_families() {
        let mut both = SystemSocket::bind(&SystemConfig::default()).unwrap();
        let port = both.local_addr().unwrap().port();
        let mut v4 = loopback("127.0.0.1");
        let mut datagrams = Datagrams::new(1_000, 4);
        datagrams.room().unwrap()[0] = 5;
        datagrams.push(1, SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port));
        assert_eq!(v4.send(&datagrams), 1);
        let got = receive(&mut both, 1);
        assert_eq!(got[0].0, v4.local_addr().unwrap(), "not as a mapped address");
        datagrams.clear();
        datagrams.push(1, got[0].0);
        assert_eq!(both.send(&datagrams), 1, "and back");
        assert_eq!(receive(&mut v4, 1).len(), 1);
    }

    #[test]
    fn unreachable_destinations_do_not_stop_the_others() {
        let (mut a, mut b) = (loopback("127.0.0.1"), loopback("127.0.0.1"));
        let mut datagrams = Datagrams::new(1_000, 4);
        for to in ["[fd00::1]:9".parse().unwrap(), b.local_addr().unwrap()] {
            datagrams.room().unwrap()[0] = 1;
            datagrams.push(1, to);
        }
        assert_eq!(a.send(&datagrams), 1);
        assert_eq!(receive(&mut b, 1).len(), 1);
    }
}
