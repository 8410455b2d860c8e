//! Changes as the kernel announces them.
//!
//! Announcements are hints: some changes are silent (IPv4 routes that vanish with their link) and bursts are lost
//! ([`Event::Overflow`]). Whoever relies on them reads everything anew from time to time.

use std::{
    collections::{BTreeSet, VecDeque},
    io::{self, PipeReader, PipeWriter, Read, Write},
    os::fd::AsFd,
    sync::Arc,
    time::{Duration, Instant},
};

use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::{
    Socket,
    protocols::{NETLINK_NETFILTER, NETLINK_ROUTE},
};
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{setsockopt, sockopt},
};

use crate::{
    Error, Result,
    address::{Address, address_of},
    link::{Link, link_of},
    netns::Netns,
    route::{Route, route_of},
    rule::{Rule, rule_of},
    socket::{as_fd, decode, receive},
    wire::{self, Message},
};

const NEW_GENERATION: u16 = 15;
/// Memory the kernel may use for announcements not yet read, per socket; beyond it they are lost and reported.
const RECEIVE_MEMORY: usize = 1 << 20;
/// Tables named in one nftables event; beyond it the event says that any may have changed.
const TOUCHED_LIMIT: usize = 64;

/// A change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A link is new or changed.
    LinkChanged(Link),
    /// A link is gone.
    LinkGone(Link),
    /// An address is new or changed.
    AddressChanged(Address),
    /// An address is gone.
    AddressGone(Address),
    /// A route is new or changed.
    RouteChanged(Route),
    /// A route is gone.
    RouteGone(Route),
    /// A rule is new.
    RuleAdded(Rule),
    /// A rule is gone.
    RuleGone(Rule),
    /// An nftables transaction was committed.
    Nftables(NftablesChange),
    /// Announcements were lost: read everything anew.
    Overflow,
    /// [`Waker::wake`] was called.
    Woken,
}

/// A committed nftables transaction.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NftablesChange {
    /// The ruleset's number since.
    pub generation: u32,
    /// The kernel's number of the thread that did it (`gettid`); the process's own only for its first thread.
    pub thread_id: u32,
    /// That thread's name.
    pub thread: String,
    /// The tables it touched; empty if there were too many to name.
    pub tables: BTreeSet<String>,
}

/// A subscription to the changes of one namespace: links, addresses, routes, rules, nftables.
#[derive(Debug)]
pub struct Watch {
    route: Socket,
    netfilter: Option<Socket>,
    woken: PipeReader,
    waker: Waker,
    /// Events of datagrams already read: at most those of two datagrams, which the receive buffer bounds.
    pending: VecDeque<Event>,
    touched: BTreeSet<String>,
    touched_many: bool,
}

/// Ends the waiting of a [`Watch`] from another thread.
#[derive(Clone, Debug)]
pub struct Waker(Arc<PipeWriter>);

impl Waker {
    /// Makes [`Watch::next`] return [`Event::Woken`] soon. Several calls may count as one.
    pub fn wake(&self) {
        // A full pipe means that a wake-up is under way.
        let _ = (&*self.0).write(&[1]);
    }
}

impl Watch {
    /// Subscribes in the calling thread's namespace.
    ///
    /// # Errors
    /// [`Error::Io`] if the process has no descriptors left.
    pub fn open() -> Result<Self> {
        let groups = [
            libc::RTNLGRP_LINK,
            libc::RTNLGRP_IPV4_IFADDR,
            libc::RTNLGRP_IPV6_IFADDR,
            libc::RTNLGRP_IPV4_ROUTE,
            libc::RTNLGRP_IPV6_ROUTE,
            libc::RTNLGRP_IPV4_RULE,
            libc::RTNLGRP_IPV6_RULE,
        ];
        // A kernel without nf_tables still announces everything else.
        let netfilter = subscribe(NETLINK_NETFILTER, &[libc::NFNLGRP_NFTABLES as u32]).ok();
        Self::of(subscribe(NETLINK_ROUTE, &groups)?, netfilter)
    }

    /// Subscribes to links alone, in the calling thread's namespace.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn links() -> Result<Self> {
        Self::of(subscribe(NETLINK_ROUTE, &[libc::RTNLGRP_LINK])?, None)
    }

    fn of(route: Socket, netfilter: Option<Socket>) -> Result<Self> {
        let (woken, writer) = io::pipe().map_err(failed)?;
        nonblocking(&writer).and_then(|()| nonblocking(&woken)).map_err(|errno| failed(errno.into()))?;
        Ok(Self {
            route,
            netfilter,
            woken,
            waker: Waker(Arc::new(writer)),
            pending: VecDeque::new(),
            touched: BTreeSet::new(),
            touched_many: false,
        })
    }

    /// Subscribes in `netns`, leaving the calling thread where it is.
    ///
    /// # Errors
    /// As [`open`](Self::open); [`Error::Permission`] without `CAP_SYS_ADMIN`.
    pub fn open_in(netns: &Netns) -> Result<Self> {
        netns.run(Self::open)?
    }

    /// A handle that ends the waiting from another thread.
    pub fn waker(&self) -> Waker {
        self.waker.clone()
    }

    /// Waits for the next change, at most `timeout`; `None` when that has passed.
    ///
    /// # Errors
    /// [`Error::Io`] if a socket broke.
    pub fn next(&mut self, timeout: Duration) -> Result<Option<Event>> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(event) = self.pending.pop_front() {
                return Ok(Some(event));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if !self.wait(left)? {
                return Ok(None);
            }
        }
    }

    /// Waits until something can be read and reads it; false when the time has passed.
    fn wait(&mut self, left: Duration) -> Result<bool> {
        // Rounded up, so that the rest of a millisecond is not spent spinning.
        let timeout = PollTimeout::try_from(left + Duration::from_micros(999)).unwrap_or(PollTimeout::MAX);
        let mut polled = vec![
            PollFd::new(self.woken.as_fd(), PollFlags::POLLIN),
            PollFd::new(as_fd(&self.route), PollFlags::POLLIN),
        ];
        polled.extend(self.netfilter.as_ref().map(|socket| PollFd::new(as_fd(socket), PollFlags::POLLIN)));
        match poll(&mut polled, timeout) {
            Ok(0) => return Ok(false),
            Ok(_) => {}
            Err(Errno::EINTR) => return Ok(true),
            Err(errno) => return Err(failed(errno.into())),
        }
        let ready: Vec<bool> = polled.iter().map(|fd| fd.any().unwrap_or(true)).collect();
        if ready[0] && self.woken.read(&mut [0; 64]).is_ok_and(|count| count > 0) {
            self.pending.push_back(Event::Woken);
        }
        if ready[1] {
            self.read_route()?;
        }
        if ready.get(2) == Some(&true) {
            self.read_netfilter()?;
        }
        Ok(true)
    }

    fn read_route(&mut self) -> Result<()> {
        let Some(datagram) = self.datagram(|watch| receive(&watch.route, libc::MSG_DONTWAIT))? else {
            return Ok(());
        };
        let events = wire::messages(&datagram).filter_map(|message| route_event(&message));
        self.pending.extend(events);
        Ok(())
    }

    fn read_netfilter(&mut self) -> Result<()> {
        let read = |watch: &Self| {
            watch.netfilter.as_ref().map_or_else(|| Ok(Vec::new()), |socket| receive(socket, libc::MSG_DONTWAIT))
        };
        let Some(datagram) = self.datagram(read)? else {
            return Ok(());
        };
        for message in wire::messages(&datagram) {
            self.netfilter_message(&message);
        }
        Ok(())
    }

    fn datagram(&mut self, read: impl Fn(&Self) -> io::Result<Vec<u8>>) -> Result<Option<Vec<u8>>> {
        match read(self) {
            Ok(datagram) => Ok(Some(datagram)),
            Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {
                self.pending.push_back(Event::Overflow);
                Ok(None)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(failed(error)),
        }
    }

    fn netfilter_message(&mut self, message: &Message<'_>) {
        if message.kind >> 8 != libc::NFNL_SUBSYS_NFTABLES as u16 {
            return;
        }
        let body = message.payload.get(4..).unwrap_or_default();
        let number = |kind| wire::attribute(body, kind).and_then(wire::be32).unwrap_or_default();
        if message.kind & 0xff == NEW_GENERATION {
            let mut tables = std::mem::take(&mut self.touched);
            if std::mem::take(&mut self.touched_many) {
                tables.clear();
            }
            let thread = wire::attribute(body, 3).map(wire::text).unwrap_or_default();
            let change = NftablesChange { generation: number(1), thread_id: number(2), thread, tables };
            self.pending.push_back(Event::Nftables(change));
        } else if let Some(name) = wire::attribute(body, 1).map(wire::text) {
            // Attribute 1 of every object is the table's name.
            if self.touched.len() < TOUCHED_LIMIT {
                self.touched.insert(name);
            } else {
                self.touched_many |= !self.touched.contains(&name);
            }
        }
    }
}

fn route_event(message: &Message<'_>) -> Option<Event> {
    // What cannot be read may be anything: have the caller look for itself.
    let Ok(decoded) = decode(message, "announcement") else {
        return Some(Event::Overflow);
    };
    match &decoded {
        RouteNetlinkMessage::NewLink(_) => link_of(&decoded).map(Event::LinkChanged),
        RouteNetlinkMessage::DelLink(_) => link_of(&decoded).map(Event::LinkGone),
        RouteNetlinkMessage::NewAddress(_) => address_of(&decoded).map(Event::AddressChanged),
        RouteNetlinkMessage::DelAddress(_) => address_of(&decoded).map(Event::AddressGone),
        RouteNetlinkMessage::NewRoute(_) => route_of(&decoded).map(Event::RouteChanged),
        RouteNetlinkMessage::DelRoute(_) => route_of(&decoded).map(Event::RouteGone),
        RouteNetlinkMessage::NewRule(_) => rule_of(&decoded).map(Event::RuleAdded),
        RouteNetlinkMessage::DelRule(_) => rule_of(&decoded).map(Event::RuleGone),
        _ => None,
    }
}

fn subscribe(protocol: isize, groups: &[u32]) -> Result<Socket> {
    let mut socket = Socket::new(protocol).map_err(failed)?;
    socket.bind_auto().map_err(failed)?;
    // Without the right to force it the system's default holds.
    let _ = setsockopt(&as_fd(&socket), sockopt::RcvBufForce, &RECEIVE_MEMORY);
    for group in groups {
        socket.add_membership(*group).map_err(failed)?;
    }
    Ok(socket)
}

fn nonblocking(fd: &impl AsFd) -> nix::Result<()> {
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    fcntl(fd.as_fd(), FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).map(drop)
}

fn failed(source: io::Error) -> Error {
    Error::from_io("watching for network changes", source)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4096))]
        #[test]
        fn odd_announcements_never_panic(kind in 14_u16..40, bytes in proptest::collection::vec(any::<u8>(), 0..160)) {
            let _ = route_event(&Message { kind, flags: 0, sequence: 0, payload: &bytes });
        }

        #[test]
        fn odd_attributes_never_panic(
            kind in 16_u16..36,
            header in proptest::collection::vec(any::<u8>(), 16),
            attributes in proptest::collection::vec((0_u16..64, proptest::collection::vec(any::<u8>(), 0..40)), 0..8),
        ) {
            let mut payload = header;
            for (kind, value) in &attributes {
                wire::put(&mut payload, *kind, value);
            }
            let _ = route_event(&Message { kind, flags: 0, sequence: 0, payload: &payload });
        }
    }
}
