//! The [`Handle`]: two netlink sockets of one network namespace, request and answer.

use std::{io, time::Duration};

use netlink_packet_core::{NetlinkDeserializable, NetlinkHeader, NetlinkSerializable};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::{
    Socket, SocketAddr,
    protocols::{NETLINK_NETFILTER, NETLINK_ROUTE},
};
use nix::{
    errno::Errno,
    sys::{
        socket::{setsockopt, sockopt},
        time::{TimeVal, TimeValLike},
    },
};

use std::os::fd::{AsRawFd, BorrowedFd};

use crate::{
    Error, Result,
    netns::Netns,
    wire::{self, Message},
};

pub(crate) const REQUEST: u16 = libc::NLM_F_REQUEST as u16;
pub(crate) const ACK: u16 = libc::NLM_F_ACK as u16;
pub(crate) const CREATE: u16 = libc::NLM_F_CREATE as u16;
pub(crate) const EXCLUSIVE: u16 = libc::NLM_F_EXCL as u16;
pub(crate) const REPLACE: u16 = libc::NLM_F_REPLACE as u16;
pub(crate) const APPEND: u16 = libc::NLM_F_APPEND as u16;
pub(crate) const DUMP: u16 = libc::NLM_F_DUMP as u16;
const DUMP_INTERRUPTED: u16 = 0x10;

/// The kernel writes dumps in pieces of at most 32 KiB; one object never needs more.
const RECEIVE_BUFFER: usize = 64 * 1024;
/// The kernel answers within the call; the limit only guards against waiting for ever on a broken one.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);
/// A dump that others disturb is taken again, this often.
const DUMP_ATTEMPTS: usize = 8;

/// Access to the network stack of one namespace: the one the opening thread was in.
///
/// The methods lie in the modules of their objects. A handle may move between threads; calls go one at a time.
#[derive(Debug)]
pub struct Handle {
    route: Channel,
    netfilter: Option<Channel>,
}

impl Handle {
    /// Opens a handle in the calling thread's namespace.
    ///
    /// # Errors
    /// [`Error::Io`] if the kernel has no rtnetlink or the process no descriptors left.
    pub fn open() -> Result<Self> {
        let route = Channel::open(NETLINK_ROUTE, "rtnetlink socket")?;
        // A kernel without nf_tables still serves everything else.
        let netfilter = Channel::open(NETLINK_NETFILTER, "nfnetlink socket").ok();
        Ok(Self { route, netfilter })
    }

    /// Opens a handle in `netns`, leaving the calling thread where it is.
    ///
    /// # Errors
    /// As [`open`](Self::open); [`Error::Permission`] without `CAP_SYS_ADMIN`.
    pub fn open_in(netns: &Netns) -> Result<Self> {
        netns.run(Self::open)?
    }

    /// Sends a request and waits for its acknowledgement.
    pub(crate) fn request(&mut self, object: &str, message: RouteNetlinkMessage, flags: u16) -> Result<()> {
        let sequence = self.route.next_sequence();
        let bytes = encode(&message, flags | REQUEST | ACK, sequence);
        self.route.send(&bytes, object)?;
        self.route.collect(object, sequence, |_| Ok(()))
    }

    /// Asks for one object.
    pub(crate) fn get(&mut self, object: &str, message: RouteNetlinkMessage) -> Result<Option<RouteNetlinkMessage>> {
        let sequence = self.route.next_sequence();
        let bytes = encode(&message, REQUEST | ACK, sequence);
        self.route.send(&bytes, object)?;
        let mut found = None;
        self.route.collect(object, sequence, |message| {
            found = Some(decode(message, object)?);
            Ok(())
        })?;
        Ok(found)
    }

    /// Asks for all objects of a kind; a dump disturbed by changes is taken again.
    pub(crate) fn dump(&mut self, object: &str, message: RouteNetlinkMessage) -> Result<Vec<RouteNetlinkMessage>> {
        let channel = &mut self.route;
        consistent(object, || {
            let sequence = channel.next_sequence();
            channel.send(&encode(&message, REQUEST | DUMP, sequence), object)?;
            let mut all = Vec::new();
            let mut disturbed = false;
            channel.collect(object, sequence, |message| {
                disturbed |= message.flags & DUMP_INTERRUPTED != 0;
                if message.kind != libc::NLMSG_DONE as u16 {
                    all.push(decode(message, object)?);
                }
                Ok(())
            })?;
            Ok((!disturbed).then_some(all))
        })
    }

    /// The nfnetlink socket.
    pub(crate) fn netfilter(&mut self) -> Result<&mut Channel> {
        self.netfilter.as_mut().ok_or_else(|| Error::Refused {
            object: "nftables".into(),
            errno: Errno::EPROTONOSUPPORT,
            message: Some("this kernel has no nfnetlink".into()),
        })
    }
}

/// Repeats `dump` until it was not disturbed.
pub(crate) fn consistent<T>(object: &str, mut dump: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    for _ in 0..DUMP_ATTEMPTS {
        if let Some(all) = dump()? {
            return Ok(all);
        }
    }
    Err(Error::Refused {
        object: object.into(),
        errno: Errno::EINTR,
        message: Some("the list changed during every attempt to read it".into()),
    })
}

fn encode(message: &RouteNetlinkMessage, flags: u16, sequence: u32) -> Vec<u8> {
    let mut body = vec![0; message.buffer_len()];
    message.serialize(&mut body);
    wire::Builder::new(message.message_type(), flags, sequence).raw(&body).finish()
}

/// Decodes an rtnetlink message.
pub(crate) fn decode(message: &Message<'_>, object: &str) -> Result<RouteNetlinkMessage> {
    let mut header = NetlinkHeader::default();
    header.message_type = message.kind;
    header.length = (wire::HEADER_LEN + message.payload.len()) as u32;
    RouteNetlinkMessage::deserialize(&header, message.payload)
        .map_err(|error| Error::Malformed { object: object.into(), reason: error.to_string() })
}

/// One netlink socket with its sequence numbers.
#[derive(Debug)]
pub(crate) struct Channel {
    socket: Socket,
    sequence: u32,
}

impl Channel {
    fn open(protocol: isize, object: &str) -> Result<Self> {
        let failed = |source| Error::from_io(object, source);
        let mut socket = Socket::new(protocol).map_err(failed)?;
        socket.bind_auto().map_err(failed)?;
        // Older kernels lack one or the other: they only make answers longer or texts absent.
        let _ = socket.set_ext_ack(true);
        let _ = socket.set_cap_ack(true);
        let _ = socket.set_netlink_get_strict_chk(true);
        let limit = TimeVal::milliseconds(ANSWER_LIMIT.as_millis() as i64);
        setsockopt(&as_fd(&socket), sockopt::ReceiveTimeout, &limit).map_err(|errno| failed(errno.into()))?;
        Ok(Self { socket, sequence: 0 })
    }

    pub(crate) fn next_sequence(&mut self) -> u32 {
        self.sequence = self.sequence.wrapping_add(1);
        self.sequence
    }

    /// Sends one datagram to the kernel, with room made for it.
    pub(crate) fn send(&self, bytes: &[u8], object: &str) -> Result<()> {
        if bytes.len() > 64 * 1024 {
            // One batch is one datagram: the socket must hold it whole (twice, with the kernel's bookkeeping).
            let _ = setsockopt(&as_fd(&self.socket), sockopt::SndBufForce, &(bytes.len() * 2 + 65_536));
        }
        self.socket.send_to(bytes, &SocketAddr::new(0, 0), 0).map(drop).map_err(|source| match source.raw_os_error() {
            Some(number) => Error::from_errno(object, Errno::from_raw(number), None),
            None => Error::from_io(object, source),
        })
    }

    /// Reads answers to `sequence` until its acknowledgement or the end of its dump; the others are handed to `each`.
    pub(crate) fn collect(
        &self,
        object: &str,
        sequence: u32,
        mut each: impl FnMut(&Message<'_>) -> Result<()>,
    ) -> Result<()> {
        loop {
            let datagram = receive(&self.socket, 0).map_err(|source| Error::from_io(object, source))?;
            for message in wire::messages(&datagram).filter(|message| message.sequence == sequence) {
                match i32::from(message.kind) {
                    libc::NLMSG_ERROR | libc::NLMSG_DONE => {
                        if let Some((errno, text)) = wire::error_of(&message) {
                            return Err(Error::from_errno(object, errno, text));
                        }
                        if i32::from(message.kind) == libc::NLMSG_DONE {
                            each(&message)?;
                        }
                        return Ok(());
                    }
                    _ => each(&message)?,
                }
            }
        }
    }

    /// All datagrams that have arrived by now. Bounded by the socket's receive buffer.
    pub(crate) fn drain(&self, object: &str) -> Result<Vec<Vec<u8>>> {
        let mut all = Vec::new();
        loop {
            match receive(&self.socket, libc::MSG_DONTWAIT) {
                Ok(datagram) => all.push(datagram),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(all),
                Err(error) => return Err(Error::from_io(object, error)),
            }
        }
    }
}

/// Reads one datagram of the kernel; what other processes send is skipped.
pub(crate) fn receive(socket: &Socket, flags: libc::c_int) -> io::Result<Vec<u8>> {
    let mut buffer = Vec::with_capacity(RECEIVE_BUFFER);
    loop {
        buffer.clear();
        match socket.recv_from(&mut buffer, flags) {
            Ok((_, sender)) if sender.port_number() == 0 => return Ok(buffer),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// Borrows the descriptor for nix, which wants the newer traits.
#[expect(unsafe_code, reason = "netlink-sys does not implement AsFd")]
pub(crate) fn as_fd(socket: &Socket) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is open as long as `socket` lives, and the result borrows it.
    unsafe { BorrowedFd::borrow_raw(socket.as_raw_fd()) }
}
