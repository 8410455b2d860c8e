//! The direct way: a connected socket to the other end that most datagrams go to.
//!
//! The kernel then looks up no route and carries no addresses, which is a good part of what a small packet costs. It has
//! the port of the socket for all and one address each; the kernel gives it what comes from there to here, and the socket
//! for all the rest. What cannot go this way takes the other one, so that nothing depends on it.
//!
//! Closing a socket drops what waits in it, so only one that was quiet for a while is closed.

use std::{
    io, mem,
    net::{IpAddr, SocketAddr},
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    time::Duration,
};

use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::MsgFlags,
};
use tracing::debug;

use super::{SystemSocket, make, receive};
use crate::{
    clock::Instant,
    udp::{Arrivals, Ends, Socket},
};

/// Time that is looked back at.
const PERIOD: Duration = Duration::from_secs(1);
/// Time without a datagram after which it is closed.
const QUIET: Duration = Duration::from_secs(10);
/// Messages of a period that make another socket worth it.
const ENOUGH: u32 = 16;
/// Time after which what was refused is tried again.
const AGAIN: Duration = Duration::from_secs(60);
/// Refusals in a row after which the way is not taken any more.
const MAX_REFUSALS: u32 = 8;

/// The direct way, and who may get one.
#[derive(Debug, Default)]
pub(super) struct Ways {
    direct: Option<Direct>,
    votes: Votes,
    /// When to look again.
    next: Instant,
}

impl Ways {
    pub(super) fn direct(&self) -> Option<&Direct> {
        self.direct.as_ref()
    }

    /// The direct way, if it goes between these ends and works.
    pub(super) fn direct_to(&mut self, ends: Ends) -> Option<&mut Direct> {
        self.direct.as_mut().filter(|direct| direct.ends == ends && direct.refusals < MAX_REFUSALS)
    }

    /// A message went by the way for all.
    pub(super) fn vote(&mut self, ends: Ends) {
        if self.direct.is_none() {
            self.votes.count(ends);
        }
    }
}

/// Whose messages are more than those of all others together; without such, one of the many.
#[derive(Debug, Default)]
struct Votes {
    ends: Option<Ends>,
    /// Messages in a row that nobody else's stand against.
    lead: u32,
}

impl Votes {
    fn count(&mut self, ends: Ends) {
        match self.ends {
            Some(leader) if leader == ends => self.lead += 1,
            Some(_) if self.lead > 0 => self.lead -= 1,
            _ => *self = Self { ends: Some(ends), lead: 1 },
        }
    }
}

/// A connected socket.
#[derive(Debug)]
pub(super) struct Direct {
    socket: socket2::Socket,
    /// What is sent between these goes this way.
    pub(super) ends: Ends,
    /// Something passed since it was last looked at.
    used: bool,
    /// When that was seen to be so.
    since: Instant,
    /// Refusals in a row.
    refusals: u32,
}

impl AsFd for Direct {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl AsRawFd for Direct {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.socket.as_raw_fd()
    }
}

impl Direct {
    /// Opens one beside `all`.
    fn open(all: &SystemSocket, ends: Ends, now: Instant) -> io::Result<Self> {
        let bound = all.local_addr()?;
        let address = match ends.local {
            Some(local) => local,
            None if !bound.ip().is_unspecified() => bound.ip(),
            None => return Err(io::Error::new(io::ErrorKind::InvalidInput, "not known which address of ours is used")),
        };
        if is_scoped(address) || is_scoped(ends.remote.ip()) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "link-local address"));
        }
        let (socket, _) = make(ends.remote.is_ipv6(), &all.config)?;
        if netns_cookie(&socket)? != netns_cookie(&all.socket)? {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the thread left the socket's network namespace"));
        }
        // Two sockets may have one port while both say so, which nobody else is to join.
        all.socket.set_reuse_address(true)?;
        let opened = socket
            .set_reuse_address(true)
            .and_then(|()| socket.bind(&SocketAddr::new(address, bound.port()).into()))
            .and_then(|()| socket.connect(&ends.remote.into()));
        all.socket.set_reuse_address(false)?;
        opened?;
        socket.set_reuse_address(false)?;
        Ok(Self { socket, ends, used: false, since: now, refusals: 0 })
    }

    /// What came of sending this way.
    pub(super) fn sent<T>(&mut self, result: &io::Result<T>) {
        match result {
            Ok(_) => (self.used, self.refusals) = (true, 0),
            // Full, which the other way is too, or something that an earlier datagram met.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => {
                debug!(%error, remote = %self.ends.remote, "datagram refused on the direct way");
                self.refusals += 1;
            }
        }
    }

    /// Sends one datagram without anything beside it.
    pub(super) fn send(&mut self, datagram: &[u8]) -> io::Result<usize> {
        let fd = self.socket.as_raw_fd();
        Ok(nix::sys::socket::send(fd, datagram, MsgFlags::MSG_DONTWAIT)?)
    }

    /// True if a datagram waits.
    fn has_more(&self) -> bool {
        let mut fds = [PollFd::new(self.as_fd(), PollFlags::POLLIN)];
        matches!(poll(&mut fds, PollTimeout::ZERO), Ok(1..))
    }
}

/// Replaces what is in `arrivals` by what waits at the direct way.
pub(super) fn receive(ways: &mut Ways, arrivals: &mut Arrivals, most: usize) -> io::Result<usize> {
    arrivals.clear();
    let Some(direct) = &mut ways.direct else { return Ok(0) };
    receive::receive(&direct.socket, arrivals, most)?;
    direct.used |= !arrivals.is_empty();
    for arrival in &mut arrivals.filled {
        // Between binding and connecting, anybody's may have come.
        arrival.from.ends.local = direct.ends.local;
    }
    Ok(arrivals.len())
}

/// Opens or closes the direct way; true if it did.
pub(super) fn settle(socket: &mut SystemSocket, now: Instant) -> bool {
    if now < socket.ways.next {
        return false;
    }
    socket.ways.next = now + PERIOD;
    if let Some(direct) = &mut socket.ways.direct {
        if mem::take(&mut direct.used) || direct.has_more() {
            direct.since = now;
        }
        if now.since(direct.since) < QUIET {
            return false;
        }
        debug!(remote = %direct.ends.remote, "direct way closed");
        socket.ways.direct = None;
        return true;
    }
    let votes = mem::take(&mut socket.ways.votes);
    let Some(ends) = votes.ends.filter(|_| votes.lead >= ENOUGH) else { return false };
    match Direct::open(socket, ends, now) {
        Ok(direct) => {
            debug!(remote = %ends.remote, "direct way opened");
            socket.ways.direct = Some(direct);
            true
        }
        Err(error) => {
            debug!(%error, remote = %ends.remote, "no direct way");
            socket.ways.next = now + AGAIN;
            false
        }
    }
}

/// True if the address means something on one link only.
fn is_scoped(address: IpAddr) -> bool {
    matches!(address, IpAddr::V6(v6) if v6.is_unicast_link_local())
}

/// Which network namespace the socket is in; Linux 5.14 and later say.
fn netns_cookie(socket: &socket2::Socket) -> io::Result<u64> {
    let mut cookie = 0_u64;
    let mut len = mem::size_of::<u64>() as libc::socklen_t;
    let (fd, value) = (socket.as_raw_fd(), (&raw mut cookie).cast());
    // SAFETY: the kernel writes at most `len` bytes, which `cookie` has; both outlive the call.
    if unsafe { libc::getsockopt(fd, libc::SOL_SOCKET, libc::SO_NETNS_COOKIE, value, &raw mut len) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(cookie)
}
