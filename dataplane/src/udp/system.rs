//! UDP sockets of the system: many datagrams a call.
//!
//! A socket for all addresses tells which of them a datagram reached and answers from there, see [`Ends`].
//!
//! Datagrams leave and arrive by `sendmmsg` and `recvmmsg`. What is to be sent lies contiguous in its batch, so runs of
//! one size to one destination can become `UDP_SEGMENT` trains here without a change elsewhere.
#![allow(unsafe_code, reason = "sendmmsg, recvmmsg, socket options; each block is one call")]

mod local;
mod name;

use std::{
    io, mem,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    ptr,
};

use socket2::{Domain, Protocol, Type};
use tracing::{debug, info};

use super::{Arrival, Arrivals, Datagrams, Ends, Socket};
use local::{CONTROL_LEN, EMPTY_CONTROL};
use name::{EMPTY_NAME, NAME_LEN, decode_address, encode_address};

/// Datagrams a system call takes at most.
const BATCH: usize = 64;
/// `IP_PMTUDISC_OMIT` and its twin: do not set "do not fragment", fragment what the link cannot carry, and believe no
/// ICMP about the path, which anybody can forge.
const PMTUDISC_OMIT: libc::c_int = 5;
/// Addresses of ours remembered as not to be sent from; more at once are not worth it, they are tried again.
const MAX_REFUSED: usize = 8;

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
    /// Sources that the system refused: removed from this machine, most likely. Good again once something arrives there.
    refused: Vec<IpAddr>,
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
        if address.ip().is_unspecified() {
            let (level, name) = match v6 {
                true => (libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO),
                false => (libc::IPPROTO_IP, libc::IP_PKTINFO),
            };
            set_option(&socket, level, name, 1)?;
        }
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
        Ok(Self { socket, v6, refused: Vec::new(), receive_buffer, send_buffer })
    }

    /// Sizes of the kernel's receive and send buffers as the system reports them: twice what it took.
    pub fn buffer_sizes(&self) -> (usize, usize) {
        (self.receive_buffer, self.send_buffer)
    }
}

fn is_without_v6(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL | libc::EPROTONOSUPPORT))
}

/// What the system says when an address to send from is not one of its own, or no route begins there. IPv4 says the same
/// of destinations that cannot be reached.
fn is_bad_source(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EADDRNOTAVAIL | libc::ENETUNREACH))
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
        let mut controls = [EMPTY_CONTROL; BATCH];
        let mut slots = 0;
        for (n, buffer) in arrivals.buffers().take(BATCH).enumerate() {
            parts[n] = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
            slots = n + 1;
        }
        for n in 0..slots {
            messages[n].msg_hdr.msg_name = (&raw mut names[n]).cast();
            messages[n].msg_hdr.msg_namelen = NAME_LEN;
            messages[n].msg_hdr.msg_control = (&raw mut controls[n]).cast();
            messages[n].msg_hdr.msg_controllen = CONTROL_LEN as _;
            messages[n].msg_hdr.msg_iov = &raw mut parts[n];
            messages[n].msg_hdr.msg_iovlen = 1;
        }
        let (fd, first) = (self.socket.as_raw_fd(), messages.as_mut_ptr());
        // SAFETY: `slots` messages point to names, controls and buffers that live on this stack and in `arrivals`.
        let count = unsafe { libc::recvmmsg(fd, first, slots as u32, libc::MSG_DONTWAIT, ptr::null_mut()) };
        if count < 0 {
            let error = io::Error::last_os_error();
            return match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(0),
                _ => Err(error),
            };
        }
        for ((message, name), control) in messages.iter().zip(&names).zip(&controls).take(count as usize) {
            // A source that is no IP address does not occur on such a socket; it would count as truncated.
            let (remote, known) = match decode_address(name) {
                Some(remote) => (remote, true),
                None => (SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), 0), false),
            };
            let from = Ends { remote, local: local::decode(control, message.msg_hdr.msg_controllen as _) };
            self.refused.retain(|refused| Some(*refused) != from.local);
            let truncated = !known || message.msg_hdr.msg_flags & libc::MSG_TRUNC != 0;
            arrivals.filled.push(Arrival { from, len: message.msg_len as usize, truncated });
        }
        Ok(arrivals.len())
    }

    fn send(&mut self, datagrams: &Datagrams) -> usize {
        let (mut at, mut taken) = (0, 0);
        // The datagram that is tried again without its source.
        let mut on_trial = None;
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
                // The address of ours to send from is gone: from another, then.
                Err(error) if is_bad_source(&error) && self.refuse_source(datagrams, at) => on_trial = Some(at),
                // This destination cannot be reached; the next may be another one.
                Err(error) => {
                    debug!(%error, "datagram refused");
                    if on_trial == Some(at) {
                        // From nowhere at all: it was not the source.
                        self.refused.pop();
                    }
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
    /// Does without the source of datagram `n` from now on; false if it had none to do without.
    fn refuse_source(&mut self, datagrams: &Datagrams, n: usize) -> bool {
        let Some(local) = datagrams.get(n).and_then(|(to, _)| to.local) else { return false };
        if self.refused.contains(&local) {
            return false;
        }
        debug!(%local, "source address refused, the system chooses");
        if self.refused.len() >= MAX_REFUSED {
            self.refused.clear();
        }
        self.refused.push(local);
        true
    }

    /// One `sendmmsg` of datagrams from number `first` on; says how many went.
    fn send_some(&self, datagrams: &Datagrams, first: usize) -> io::Result<usize> {
        let mut names = [EMPTY_NAME; BATCH];
        let mut parts = [libc::iovec { iov_base: ptr::null_mut(), iov_len: 0 }; BATCH];
        let mut messages = [EMPTY_MESSAGE; BATCH];
        let mut controls = [EMPTY_CONTROL; BATCH];
        let mut count = 0;
        while count < BATCH
            && let Some((to, bytes)) = datagrams.get(first + count)
        {
            let len = encode_address(to.remote, self.v6, &mut names[count]);
            let local = to.local.filter(|local| !self.refused.contains(local));
            let control_len = local.map_or(0, |local| local::encode(local, self.v6, &mut controls[count]));
            messages[count].msg_hdr.msg_controllen = control_len as _;
            // The kernel only reads what a message to be sent points to.
            parts[count] = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
            messages[count].msg_hdr.msg_namelen = len;
            count += 1;
        }
        for n in 0..count {
            messages[n].msg_hdr.msg_name = (&raw mut names[n]).cast();
            if messages[n].msg_hdr.msg_controllen > 0 {
                messages[n].msg_hdr.msg_control = (&raw mut controls[n]).cast();
            }
            messages[n].msg_hdr.msg_iov = &raw mut parts[n];
            messages[n].msg_hdr.msg_iovlen = 1;
        }
        let (fd, first) = (self.socket.as_raw_fd(), messages.as_mut_ptr());
        // SAFETY: `count` messages point to names and controls on this stack and to bytes that `datagrams` keeps.
        let sent = unsafe { libc::sendmmsg(fd, first, count as u32, libc::MSG_DONTWAIT) };
        if sent < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(sent as usize)
    }
}

// SAFETY: all zeros are a message without address, parts or control data.
const EMPTY_MESSAGE: libc::mmsghdr = unsafe { mem::zeroed() };

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::disallowed_methods, reason = "tests")]

    use std::time::{Duration, Instant};

    use super::*;

    fn loopback(address: &str) -> SystemSocket {
        let address = Some(address.parse().unwrap());
        SystemSocket::bind(&SystemConfig { address, ..Default::default() }).unwrap()
    }

    fn receive(socket: &mut SystemSocket, want: usize) -> Vec<(Ends, Vec<u8>)> {
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
            datagrams.push_tight(len, to.into());
        }
        datagrams.room().unwrap()[..65_000].fill(9);
        datagrams.push_tight(65_000, to.into());
        assert_eq!(a.send(&datagrams), 201);
        let got = receive(&mut b, 201);
        assert_eq!(got.len(), 201);
        for ((from, bytes), (_, sent)) in got.iter().zip(datagrams.iter()) {
            assert_eq!(*from, a.local_addr().unwrap().into(), "bound to one address, there is nothing to choose");
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
        datagrams.push(1, SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port).into());
        assert_eq!(v4.send(&datagrams), 1);
        let got = receive(&mut both, 1);
        let ends = Ends { remote: v4.local_addr().unwrap(), local: Some(Ipv4Addr::LOCALHOST.into()) };
        assert_eq!(got[0].0, ends, "not as mapped addresses");
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
            datagrams.push(1, SocketAddr::into(to));
        }
        assert_eq!(a.send(&datagrams), 1);
        assert_eq!(receive(&mut b, 1).len(), 1);
    }

    #[test]
    fn answers_leave_from_the_address_that_was_reached() {
        // All of 127.0.0.0/8 is ours; left to itself, the system answers from 127.0.0.1.
        let mut server = SystemSocket::bind(&SystemConfig::default()).unwrap();
        let port = server.local_addr().unwrap().port();
        let mut client = loopback("127.0.0.1");
        for host in [2, 3, 1] {
            let asked = SocketAddr::from(([127, 0, 0, host], port));
            let mut datagrams = Datagrams::new(1_000, 4);
            datagrams.push(1, asked.into());
            assert_eq!(client.send(&datagrams), 1);
            let ends = receive(&mut server, 1)[0].0;
            assert_eq!(ends.local, Some(asked.ip()));
            datagrams.clear();
            datagrams.push(1, ends);
            assert_eq!(server.send(&datagrams), 1);
            assert_eq!(receive(&mut client, 1)[0].0.remote, asked);
        }
    }

    #[test]
    fn a_source_that_is_gone_is_done_without_until_it_is_heard_of_again() {
        let (mut server, mut client) = (SystemSocket::bind(&SystemConfig::default()).unwrap(), loopback("127.0.0.1"));
        let gone = Some("192.0.2.99".parse().unwrap());
        let mut datagrams = Datagrams::new(1_000, 16);
        for _ in 0..5 {
            datagrams.push(1, Ends { remote: client.local_addr().unwrap(), local: gone });
        }
        assert_eq!(server.send(&datagrams), 5, "from another one");
        assert_eq!(receive(&mut client, 5).len(), 5);
        assert_eq!(server.refused.len(), 1);
        for host in 1..100 {
            datagrams.clear();
            let local = Some([198, 51, 100, host].into());
            datagrams.push(1, Ends { remote: client.local_addr().unwrap(), local });
            assert_eq!(server.send(&datagrams), 1);
        }
        assert!(server.refused.len() <= MAX_REFUSED);
        server.refused = vec!["127.0.0.1".parse().unwrap()];
        let port = server.local_addr().unwrap().port();
        datagrams.clear();
        datagrams.push(1, SocketAddr::from(([127, 0, 0, 1], port)).into());
        client.send(&datagrams);
        assert_eq!(receive(&mut server, 1).len(), 1);
        assert!(server.refused.is_empty());
    }
}
