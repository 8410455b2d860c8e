//! Sending: `sendmmsg` of trains and single datagrams, and what to do where the system refuses one.

use std::{
    io,
    net::IpAddr,
    os::fd::{AsFd, AsRawFd, RawFd},
    time::{Duration, Instant},
};

use nix::{
    poll::{PollFd, PollFlags, ppoll},
    sys::time::TimeSpec,
};
use tracing::debug;

use super::{
    BATCH, EMPTY_MESSAGE, EMPTY_PART, SystemSocket,
    control::EMPTY_CONTROL,
    name::{EMPTY_NAME, encode_address},
};
use crate::udp::{Datagrams, Ends, Outer};

/// Datagrams in a train: all kernels that know trains take so many.
const MAX_TRAIN: usize = 64;
/// Bytes in a train: the longest payload of one IPv4 datagram.
const MAX_TRAIN_BYTES: usize = 65_507;
/// Addresses of ours remembered as not to be sent from; more at once are not worth it, they are tried again.
pub(super) const MAX_SOURCES: usize = 8;
/// Destinations remembered as not to be sent trains to; beyond, the first is forgotten and tried again.
const MAX_DESTINATIONS: usize = 64;
/// Datagrams after which a destination may show that it takes trains by now: its route may be another one.
pub(super) const RETRY_TRAINS: u32 = 1 << 17;
/// How long a full send buffer is waited for in one call: it empties at the speed of the link, and dropping what a
/// stream sent costs it more than waiting.
const PATIENCE: Duration = Duration::from_millis(10);

/// What the system refused, to be done without.
#[derive(Debug, Default)]
pub(super) struct Refusals {
    /// Sources: removed from this machine, most likely. Good again once something arrives there.
    sources: Vec<IpAddr>,
    /// Destinations whose link takes no trains, each with how many datagrams are sent singly from now on.
    destinations: Vec<(IpAddr, u32)>,
    /// Trains refused so far.
    trains: u64,
}

impl Refusals {
    /// Trains refused so far.
    pub(super) fn count(&self) -> u64 {
        self.trains
    }

    /// Something arrived at this address of ours, so it is good.
    pub(super) fn heard_at(&mut self, local: Option<IpAddr>) {
        if !self.sources.is_empty() {
            self.sources.retain(|source| Some(*source) != local);
        }
    }

    /// The way to use for `ends`.
    fn allowed(&self, ends: Ends) -> Ends {
        Ends { local: ends.local.filter(|local| !self.sources.contains(local)), ..ends }
    }

    /// Does without this source from now on; false if there is none to do without.
    pub(super) fn refuse_source(&mut self, ends: Ends) -> bool {
        let Some(local) = self.allowed(ends).local else { return false };
        debug!(%local, "source address refused, the system chooses");
        if self.sources.len() >= MAX_SOURCES {
            self.sources.clear();
        }
        self.sources.push(local);
        true
    }

    /// Sends no more trains there for a while.
    pub(super) fn refuse_trains(&mut self, to: IpAddr, error: &io::Error) {
        debug!(%to, %error, "train refused, sending single datagrams there");
        if self.destinations.len() >= MAX_DESTINATIONS {
            self.destinations.remove(0);
        }
        self.destinations.push((to, RETRY_TRAINS));
        self.trains += 1;
    }

    fn has_refused(&self, to: IpAddr) -> bool {
        self.destinations.iter().any(|(destination, _)| *destination == to)
    }

    #[cfg(test)]
    pub(super) fn sources(&self) -> &[IpAddr] {
        &self.sources
    }

    #[cfg(test)]
    pub(super) fn destinations(&self) -> &[(IpAddr, u32)] {
        &self.destinations
    }

    /// `count` single datagrams went there.
    fn count_single(&mut self, to: IpAddr, count: usize) {
        self.destinations.retain_mut(|(destination, left)| {
            if *destination == to {
                *left = left.saturating_sub(count as u32);
            }
            *left > 0
        });
    }
}

/// What the system says when an address to send from is not one of its own, or no route begins there. IPv4 says the same
/// of destinations that cannot be reached.
fn is_bad_source(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EADDRNOTAVAIL | libc::ENETUNREACH))
}

/// What it says of a train: no checksums by the link, too long for it, no such option.
fn is_bad_train(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EIO | libc::EMSGSIZE | libc::EINVAL | libc::EOPNOTSUPP))
}

/// What is tried in another way; if that does not help, it was not the reason.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Trial {
    Train(usize),
    Source(usize),
}

/// Sends all datagrams; how many the system took.
pub(super) fn send(socket: &mut SystemSocket, datagrams: &Datagrams) -> usize {
    let (mut at, mut taken) = (0, 0);
    let mut trial = None;
    let mut deadline = None;
    while let Some((outer, _)) = datagrams.get(at) {
        let (ends, to) = (outer.ends, outer.ends.remote.ip());
        if let Some(count) = send_direct(socket, datagrams, at) {
            (at, taken) = (at + count, taken + count);
            continue;
        }
        socket.ways.vote(ends);
        let all = Way { fd: socket.socket.as_raw_fd(), v6: socket.v6, to: None };
        let sent = socket.set_dont_fragment(outer.dont_fragment).and_then(|()| send_some(socket, all, datagrams, at));
        let error = match sent {
            // Does not occur; were it to, trying again would never end.
            Ok(0) => break,
            Ok(count) => {
                (at, taken) = (at + count, taken + count);
                continue;
            }
            Err(error) => error,
        };
        match error.raw_os_error() {
            Some(libc::EINTR) => continue,
            Some(libc::EAGAIN) if has_room_by(socket, &mut deadline) => continue,
            // All that is left would meet the same.
            Some(libc::EAGAIN | libc::ENOBUFS) => break,
            _ => {}
        }
        let train = datagrams.train(at, longest_train(socket, &outer), MAX_TRAIN_BYTES);
        if train > 1 && is_bad_train(&error) {
            socket.refusals.refuse_trains(to, &error);
            trial = Some(Trial::Train(at));
            continue;
        }
        if trial == Some(Trial::Train(at)) {
            socket.refusals.destinations.pop();
            socket.refusals.trains -= 1;
        }
        if is_bad_source(&error) && socket.refusals.refuse_source(ends) {
            trial = Some(Trial::Source(at));
            continue;
        }
        // This destination cannot be reached; the next may be another one.
        debug!(%error, "datagram refused");
        if trial == Some(Trial::Source(at)) {
            socket.refusals.sources.pop();
        }
        at += train;
    }
    taken
}

/// Sends what can go the direct way from number `first` on; how many went. `None` if the other way has to be taken, also
/// because the system refused: then it says there why.
fn send_direct(socket: &mut SystemSocket, datagrams: &Datagrams, first: usize) -> Option<usize> {
    let (outer, datagram) = datagrams.get(first).filter(|(outer, _)| !outer.dont_fragment)?;
    let direct = socket.ways.direct_to(outer.ends)?;
    let sent = if outer.class == 0 && datagrams.len() == first + 1 {
        direct.send(datagram).map(|_| 1)
    } else {
        let way = Way { fd: direct.as_raw_fd(), v6: outer.ends.remote.is_ipv6(), to: Some(outer.ends) };
        send_some(socket, way, datagrams, first)
    };
    socket.ways.direct_to(outer.ends)?.sent(&sent);
    sent.ok().filter(|count| *count > 0)
}

/// Datagrams that may go there in one train. Those that may be too large for the way go one by one.
fn longest_train(socket: &SystemSocket, outer: &Outer) -> usize {
    let may = socket.trains.send && !outer.dont_fragment && !socket.refusals.has_refused(outer.ends.remote.ip());
    if may { MAX_TRAIN } else { 1 }
}

/// Waits until the send buffer has room; false if that takes too long.
#[allow(clippy::disallowed_methods, reason = "how long a call of the system may take is no matter of the lane's clock")]
fn has_room_by(socket: &SystemSocket, deadline: &mut Option<Instant>) -> bool {
    let now = Instant::now();
    let deadline = *deadline.get_or_insert(now + PATIENCE);
    let left = deadline.saturating_duration_since(now);
    let mut fds = [PollFd::new(socket.as_fd(), PollFlags::POLLOUT)];
    !left.is_zero() && matches!(ppoll(&mut fds, Some(TimeSpec::from(left)), None), Ok(1..))
}

/// Which socket to send from.
#[derive(Clone, Copy)]
struct Way {
    fd: RawFd,
    /// It is an IPv6 socket.
    v6: bool,
    /// It is connected: only what goes between these can go this way, and needs to be told no address.
    to: Option<Ends>,
}

/// One `sendmmsg` of datagrams from number `first` on; how many datagrams went.
fn send_some(socket: &mut SystemSocket, way: Way, datagrams: &Datagrams, first: usize) -> io::Result<usize> {
    // One message needs no room made for sixteen, which is why they have frames of their own.
    match datagrams.len() - first {
        1 => send_up_to::<1>(socket, way, datagrams, first),
        _ => send_up_to::<BATCH>(socket, way, datagrams, first),
    }
}

/// One `sendmmsg` of at most `N` messages.
#[inline(never)]
fn send_up_to<const N: usize>(
    socket: &mut SystemSocket,
    way: Way,
    datagrams: &Datagrams,
    first: usize,
) -> io::Result<usize> {
    let mut names = [EMPTY_NAME; N];
    let mut parts = [EMPTY_PART; N];
    let mut messages = [EMPTY_MESSAGE; N];
    let mut controls = [EMPTY_CONTROL; N];
    let mut trains = [0; N];
    let (mut count, mut at) = (0, first);
    let dont_fragment = datagrams.get(first).is_some_and(|(outer, _)| outer.dont_fragment);
    let is_fitting =
        |outer: &Outer| outer.dont_fragment == dont_fragment && way.to.is_none_or(|ends| outer.ends == ends);
    while count < N
        && let Some((mut outer, head)) = datagrams.get(at).filter(|(outer, _)| is_fitting(outer))
    {
        let longest = longest_train(socket, &outer);
        let train = datagrams.train(at, longest, MAX_TRAIN_BYTES);
        let bytes = datagrams.span(at, train);
        outer.ends = match way.to {
            Some(ends) => Ends::from(ends.remote),
            None => socket.refusals.allowed(outer.ends),
        };
        let stride = (train > 1).then_some(head.len());
        messages[count].msg_hdr.msg_controllen = controls[count].encode(&outer, way.v6, stride) as _;
        if way.to.is_none() {
            messages[count].msg_hdr.msg_namelen = encode_address(outer.ends.remote, way.v6, &mut names[count]);
        }
        // The kernel only reads what a message to be sent points to.
        parts[count] = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
        trains[count] = train;
        (count, at) = (count + 1, at + train);
    }
    for n in 0..count {
        if messages[n].msg_hdr.msg_namelen > 0 {
            messages[n].msg_hdr.msg_name = (&raw mut names[n]).cast();
        }
        if messages[n].msg_hdr.msg_controllen > 0 {
            messages[n].msg_hdr.msg_control = (&raw mut controls[n]).cast();
        }
        messages[n].msg_hdr.msg_iov = &raw mut parts[n];
        messages[n].msg_hdr.msg_iovlen = 1;
    }
    let pointer = messages.as_mut_ptr();
    // SAFETY: `count` messages point to names and controls on this stack and to bytes that `datagrams` keeps; the socket
    // that the descriptor belongs to is open, as nothing closes one while something is sent.
    let sent = unsafe { libc::sendmmsg(way.fd, pointer, count as u32, libc::MSG_DONTWAIT) };
    if sent < 0 {
        return Err(io::Error::last_os_error());
    }
    let went = &trains[..sent as usize];
    if !socket.refusals.destinations.is_empty() {
        let mut at = first;
        for train in went {
            // Each message for itself: one call may go to many destinations.
            if let Some((outer, _)) = datagrams.get(at) {
                socket.refusals.count_single(outer.ends.remote.ip(), *train);
            }
            at += train;
        }
    }
    Ok(went.iter().sum())
}
