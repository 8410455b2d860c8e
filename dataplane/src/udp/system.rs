//! UDP sockets of the system: many datagrams a call, and many of those in one train.
//!
//! A socket for all addresses tells which of them a datagram reached and answers from there, see [`Ends`](super::Ends).
//!
//! What is to be sent lies contiguous in its batch: datagrams of one size to one destination are one message of
//! `sendmmsg`, which the kernel or the NIC cuts (`UDP_SEGMENT`). What arrives comes in trains too (`UDP_GRO`). A
//! destination whose link refuses trains gets single datagrams, others are not touched by that.
//!
//! The other end that most datagrams go to gets a direct way beside: a connected socket, which costs the kernel less.
#![allow(unsafe_code, reason = "sendmmsg, recvmmsg, socket options; each block is one call")]

mod control;
mod direct;
mod name;
mod receive;
mod send;

use std::{
    io, mem,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::{AsFd, AsRawFd, BorrowedFd},
};

use socket2::{Domain, Protocol, Type};
use tracing::{debug, info};

use super::{Arrivals, Datagrams, Socket, SocketState, Trains};
use crate::clock::Instant;
use direct::Ways;
use send::Refusals;

/// Messages a system call takes at most, each a datagram or a train.
const BATCH: usize = 16;
/// `IP_PMTUDISC_OMIT` and its twin: do not set "do not fragment", fragment what the link cannot carry, and believe no
/// ICMP about the path, which anybody can forge.
const PMTUDISC_OMIT: libc::c_int = 5;
/// `IP_PMTUDISC_PROBE` and its twin: set "do not fragment", refuse what the link cannot carry, believe no ICMP either.
const PMTUDISC_PROBE: libc::c_int = 3;

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
    /// Traffic class byte of what is sent without one.
    pub class: u8,
    /// Which trains may be used.
    pub trains: Trains,
}

impl Default for SystemConfig {
    /// Any port, all addresses, no mark, buffers of 4 MiB: a tenth of a second at 320 Mbit/s; trains both ways.
    fn default() -> Self {
        Self { port: 0, address: None, mark: None, buffer_bytes: 4 << 20, class: 0, trains: Trains::ALL }
    }
}

/// A bound UDP socket.
#[derive(Debug)]
pub struct SystemSocket {
    socket: socket2::Socket,
    /// True if it is an IPv6 socket: IPv4 addresses are then written as mapped ones.
    v6: bool,
    refusals: Refusals,
    /// Whether trains are sent, and whether the kernel joins what arrives to trains.
    trains: Trains,
    /// What it was asked to be.
    config: SystemConfig,
    ways: Ways,
    receive_buffer: usize,
    send_buffer: usize,
    /// What the socket is set to.
    dont_fragment: bool,
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
            trains = ?bound.trains,
            "socket bound"
        );
        Ok(bound)
    }

    fn bind_to(address: SocketAddr, config: &SystemConfig) -> io::Result<Self> {
        let v6 = address.is_ipv6();
        let (socket, receive) = make(v6, config)?;
        if address.ip().is_unspecified() {
            let (level, name) = match v6 {
                true => (libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO),
                false => (libc::IPPROTO_IP, libc::IP_PKTINFO),
            };
            set_option(&socket, level, name, 1)?;
        }
        socket.bind(&address.into())?;
        let (receive_buffer, send_buffer) = (socket.recv_buffer_size()?, socket.send_buffer_size()?);
        let trains = Trains { receive, ..config.trains };
        let (refusals, dont_fragment, config, ways) = (Refusals::default(), false, config.clone(), Ways::default());
        Ok(Self { socket, v6, refusals, trains, config, ways, receive_buffer, send_buffer, dont_fragment })
    }

    /// Makes what is sent from now on be fragmented where it is too large, or not. The latter is rare: the option stays until the
    /// other is wanted.
    fn set_dont_fragment(&mut self, wanted: bool) -> io::Result<()> {
        if wanted == self.dont_fragment {
            return Ok(());
        }
        let discover = if wanted { PMTUDISC_PROBE } else { PMTUDISC_OMIT };
        set_option(&self.socket, libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, discover)?;
        if self.v6 {
            set_option(&self.socket, libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, discover)?;
        }
        self.dont_fragment = wanted;
        Ok(())
    }
}

/// A socket of the family, not bound yet; true if it joins what arrives to trains.
fn make(v6: bool, config: &SystemConfig) -> io::Result<(socket2::Socket, bool)> {
    let domain = if v6 { Domain::IPV6 } else { Domain::IPV4 };
    let socket = socket2::Socket::new(domain, Type::DGRAM.nonblocking().cloexec(), Some(Protocol::UDP))?;
    if v6 {
        socket.set_only_v6(false)?;
        set_option(&socket, libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, PMTUDISC_OMIT)?;
        set_option(&socket, libc::IPPROTO_IPV6, libc::IPV6_RECVTCLASS, 1)?;
    }
    set_option(&socket, libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, PMTUDISC_OMIT)?;
    set_option(&socket, libc::IPPROTO_IP, libc::IP_RECVTOS, 1)?;
    // Kernels before 5.0 know no trains.
    let receive = config.trains.receive && set_option(&socket, libc::SOL_UDP, libc::UDP_GRO, 1).is_ok();
    if config.class != 0 {
        set_option(&socket, libc::IPPROTO_IP, libc::IP_TOS, config.class.into())?;
        if v6 {
            set_option(&socket, libc::IPPROTO_IPV6, libc::IPV6_TCLASS, config.class.into())?;
        }
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
    Ok((socket, receive))
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
    fn receive(&mut self, arrivals: &mut Arrivals, most: usize) -> io::Result<usize> {
        receive::receive(&self.socket, arrivals, most)?;
        for arrival in &arrivals.filled {
            self.refusals.heard_at(arrival.from.ends.local);
        }
        Ok(arrivals.len())
    }

    fn direct(&self) -> Option<BorrowedFd<'_>> {
        self.ways.direct().map(AsFd::as_fd)
    }

    fn receive_direct(&mut self, arrivals: &mut Arrivals, most: usize) -> io::Result<usize> {
        direct::receive(&mut self.ways, arrivals, most)
    }

    fn settle(&mut self, now: Instant) -> bool {
        direct::settle(self, now)
    }

    fn send(&mut self, datagrams: &Datagrams) -> usize {
        send::send(self, datagrams)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        let address = self.socket.local_addr()?;
        address.as_socket().ok_or_else(|| io::ErrorKind::InvalidData.into())
    }

    fn state(&self) -> SocketState {
        SocketState {
            asked_buffer: self.config.buffer_bytes,
            // The system reports twice what it took: the rest is for its own bookkeeping (socket(7)).
            receive_buffer: self.receive_buffer / 2,
            send_buffer: self.send_buffer / 2,
            trains: self.trains,
            refused_trains: self.refusals.count(),
        }
    }
}

// SAFETY: all zeros are a message without address, parts or control data.
const EMPTY_MESSAGE: libc::mmsghdr = unsafe { mem::zeroed() };
const EMPTY_PART: libc::iovec = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };

#[cfg(test)]
mod tests;
