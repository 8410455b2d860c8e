//! TUN devices of Linux through a few ioctls.
//!
//! The fast device has several queues and a virtio header in front of each packet: one read brings a super-packet of up to
//! 64 KiB that stands for many, one write takes one. Where the kernel refuses it, the plain device of the
//! `tun-tap` crate takes its place: one queue, no header. Both are persistent: the device, its addresses and its routes
//! outlive the process, and the next one attaches to it again.
#![allow(unsafe_code, reason = "ioctls; each block is one call")]

use std::{
    ffi::CStr,
    fs::{File, OpenOptions},
    io::{self, IoSlice, Read, Write},
    mem,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
    os::unix::fs::OpenOptionsExt,
};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use tracing::{info, warn};

use super::{
    Packets, Queue, Supers,
    vnet::{self, HEADER},
};
use crate::packet::{
    coalesce::{Coalescer, MAX_PACKETS, Run},
    offload::{Offload, Offloads, Transport},
};

/// Queues one device may have; the kernel's own bound is 256, lanes are at most 8.
const MAX_QUEUES: usize = 64;

const IFF_TUN: i32 = 0x0001;
const IFF_NO_PI: i32 = 0x1000;
const IFF_MULTI_QUEUE: i32 = 0x0100;
const IFF_VNET_HDR: i32 = 0x4000;
const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const TUNSETPERSIST: libc::c_ulong = 0x4004_54cb;
const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
const TUNGETIFF: libc::c_ulong = 0x8004_54d2;
const TUNGETDEVNETNS: libc::c_ulong = 0x54e3;
const TUNSETVNETHDRSZ: libc::c_ulong = 0x4004_54d8;
/// Checksums; TCP over IPv4 and IPv6, also with congestion marks; UDP over both, which kernels have since 6.2.
const OFFLOAD_TCP: libc::c_ulong = 0x01 | 0x02 | 0x04 | 0x08;
const OFFLOAD_UDP: libc::c_ulong = 0x20 | 0x40;

/// Which kind of device it became.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Several queues, virtio header.
    Fast,
    /// One queue, no header: the kernel refused the fast one.
    Plain,
}

/// An open, persistent TUN device.
#[derive(Debug)]
pub struct Device {
    name: String,
    mode: Mode,
    queues: Vec<TunQueue>,
}

impl Device {
    /// Creates the device `name`, or attaches to it if it exists, with `queues` queues.
    ///
    /// It is neither up nor has it addresses: that is for the caller to do. In [`Mode::Plain`] it has one queue.
    ///
    /// # Errors
    ///
    /// `InvalidInput` for an impossible name or number of queues; what the kernel says otherwise: `EPERM` without
    /// `CAP_NET_ADMIN`, `ENOENT` without `/dev/net/tun`, `EBUSY` while another process has the device.
    pub fn open(name: &str, queues: usize) -> io::Result<Self> {
        check_name(name)?;
        if !(1..=MAX_QUEUES).contains(&queues) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "1 to 64 queues"));
        }
        match open_fast(name, queues) {
            Ok(device) => Ok(device),
            Err(error) if is_refusal(&error) => {
                warn!(link = name, %error, "fast TUN device refused, using the plain one");
                open_plain(name)
            }
            Err(error) => Err(error),
        }
    }

    /// Name of the link.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Which kind of device it became.
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// Chooses whether the device outlives the process, as it does unless told otherwise.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn set_persistent(&self, persistent: bool) -> io::Result<()> {
        self.queues.iter().try_for_each(|queue| set_value(queue.as_fd().as_raw_fd(), TUNSETPERSIST, persistent.into()))
    }

    /// The queues, one for each lane.
    pub fn into_queues(self) -> Vec<TunQueue> {
        self.queues
    }
}

/// One queue of a TUN device.
#[derive(Debug)]
pub struct TunQueue {
    file: Handle,
    offloads: Offloads,
    coalescer: Coalescer,
}

#[derive(Debug)]
enum Handle {
    /// Packets have a virtio header.
    Fast(File),
    /// Packets are bare.
    Plain(tun_tap::Iface),
}

impl AsFd for TunQueue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.file {
            Handle::Fast(file) => file.as_fd(),
            // SAFETY: the interface owns the descriptor and is borrowed as long as the result lives.
            Handle::Plain(plain) => unsafe { BorrowedFd::borrow_raw(plain.as_raw_fd()) },
        }
    }
}

impl Queue for TunQueue {
    fn read(&mut self, supers: &mut Supers, most: usize) -> io::Result<usize> {
        let before = supers.len();
        // Reads that bring nothing of use count too: the budget holds whatever the kernel hands over.
        for _ in 0..most {
            let Some(room) = supers.room() else { break };
            match self.read_one(room) {
                Ok(Some((offset, len, offload))) => supers.push_at(offset, len, offload),
                Ok(None) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if supers.len() == before => return Err(error),
                Err(_) => break,
            }
        }
        Ok(supers.len() - before)
    }

    fn write(&mut self, packets: &mut Packets) -> io::Result<usize> {
        let mut taken = 0;
        let mut coalescer = mem::take(&mut self.coalescer);
        coalescer.plan(packets, self.offloads);
        for run in coalescer.runs() {
            let written = match self.write_run(packets, &coalescer, run) {
                // Some kernels refuse what they said they take: never again, and this one packet by packet.
                Err(error) if run.count > 1 && error.raw_os_error() == Some(libc::EINVAL) => {
                    self.turn_off(run, &error);
                    coalescer.part(packets, run);
                    self.write_parted(packets, &coalescer, run)
                }
                written => written.map(|()| run.count),
            };
            match written {
                Ok(count) => taken += count,
                Err(error) if super::is_lost(&error) => return Err(error),
                // The device is down or its queue full: these packets are gone, as on any link.
                Err(_) => {}
            }
        }
        self.coalescer = coalescer;
        Ok(taken)
    }

    fn offloads(&self) -> Offloads {
        self.offloads
    }
}

impl TunQueue {
    fn new(file: Handle, offloads: Offloads) -> Self {
        Self { file, offloads, coalescer: Coalescer::default() }
    }

    /// Reads once: where in `room` the packet begins, how long it is, what is left to do; `None` for what is no use.
    fn read_one(&mut self, room: &mut [u8]) -> io::Result<Option<(usize, usize, Offload)>> {
        match &mut self.file {
            Handle::Plain(plain) => Ok(Some((0, plain.recv(room)?, Offload::None))),
            Handle::Fast(file) => {
                let len = file.read(room)?;
                let Some((header, packet)) = room[..len].split_first_chunk_mut::<HEADER>() else {
                    return Ok(None);
                };
                let offload = vnet::decode(header, packet);
                Ok(Some((HEADER, len - HEADER, offload)))
            }
        }
    }

    /// Writes the packets of a run at once.
    fn write_run(&mut self, packets: &Packets, coalescer: &Coalescer, run: &Run) -> io::Result<()> {
        let Some((_, first)) = packets.get(run.first) else { return Ok(()) };
        let file = match &mut self.file {
            Handle::Plain(plain) => return plain.send(first).map(drop),
            Handle::Fast(file) => file,
        };
        let header = vnet::encode(run);
        if run.count == 1 {
            return file.write_vectored(&[IoSlice::new(&header), IoSlice::new(first)]).map(drop);
        }
        let mut parts = [IoSlice::new(&[]); MAX_PACKETS + 1];
        (parts[0], parts[1]) = (IoSlice::new(&header), IoSlice::new(first));
        for (part, n) in parts[2..].iter_mut().zip(coalescer.followers(run)) {
            let payload = packets.get(n).and_then(|(_, packet)| packet.get(run.headers.1..));
            *part = IoSlice::new(payload.unwrap_or_default());
        }
        file.write_vectored(&parts[..=run.count]).map(drop)
    }

    /// Writes the packets of a run one by one; how many were taken.
    fn write_parted(&mut self, packets: &Packets, coalescer: &Coalescer, run: &Run) -> io::Result<usize> {
        let mut taken = 0;
        for n in [run.first].into_iter().chain(coalescer.followers(run)) {
            match self.write_run(packets, coalescer, &Run::single(n)) {
                Ok(()) => taken += 1,
                Err(error) if super::is_lost(&error) => return Err(error),
                Err(_) => {}
            }
        }
        Ok(taken)
    }

    /// Joins no more packets of this kind.
    fn turn_off(&mut self, run: &Run, error: &io::Error) {
        let Some(cut) = run.cut else { return };
        warn!(%error, transport = ?cut.transport, "super-packet refused, writing packets one by one");
        match cut.transport {
            Transport::Tcp => self.offloads.tcp = false,
            Transport::Udp => self.offloads.udp = false,
        }
    }
}

/// Name of the device whose queue this is: it may have been changed.
///
/// # Errors
///
/// `EBADFD` if the device is gone.
pub fn name_of(queue: BorrowedFd<'_>) -> io::Result<String> {
    // SAFETY: all zeros are a valid ifreq.
    let mut request: libc::ifreq = unsafe { mem::zeroed() };
    // SAFETY: the descriptor is open and the kernel writes one ifreq, which outlives the call.
    if unsafe { libc::ioctl(queue.as_raw_fd(), TUNGETIFF, &raw mut request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    name_in(&request)
}

/// The network namespace that the device is in, whose queue this is: it may have been moved.
///
/// # Errors
///
/// `EBADFD` if the device is gone, `ENOTTY` before Linux 5.2.
pub fn namespace_of(queue: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    // SAFETY: this request reads no memory; the descriptor is open.
    let fd = unsafe { libc::ioctl(queue.as_raw_fd(), TUNGETDEVNETNS, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn name_in(request: &libc::ifreq) -> io::Result<String> {
    let name = request.ifr_name.map(|byte| byte as u8);
    let name = CStr::from_bytes_until_nul(&name).map_err(|_| io::ErrorKind::InvalidData)?;
    Ok(name.to_string_lossy().into_owned())
}

fn check_name(name: &str) -> io::Result<()> {
    let fine = |byte: u8| byte.is_ascii_graphic() && !matches!(byte, b'/' | b':' | b'%');
    if name.is_empty() || name.len() > 15 || name.starts_with('.') || !name.bytes().all(fine) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a link name"));
    }
    Ok(())
}

/// True if the kernel knows TUN devices but not this kind.
fn is_refusal(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP | libc::ENOTTY))
}

fn open_fast(name: &str, queues: usize) -> io::Result<Device> {
    let mut opened = Vec::with_capacity(queues);
    let mut full_name = String::new();
    let mut offloads = Offloads::NONE;
    for _ in 0..queues {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open("/dev/net/tun")?;
        let flags = IFF_TUN | IFF_NO_PI | IFF_MULTI_QUEUE | IFF_VNET_HDR;
        full_name = attach(file.as_raw_fd(), name, flags)?;
        // A persistent device keeps what an earlier process set.
        set_int(file.as_raw_fd(), TUNSETVNETHDRSZ, HEADER as i32)?;
        offloads = set_offloads(file.as_raw_fd())?;
        set_value(file.as_raw_fd(), TUNSETPERSIST, 1)?;
        opened.push(TunQueue::new(Handle::Fast(file), offloads));
    }
    info!(link = %full_name, queues, tcp = offloads.tcp, udp = offloads.udp, "TUN device open");
    Ok(Device { name: full_name, mode: Mode::Fast, queues: opened })
}

fn open_plain(name: &str) -> io::Result<Device> {
    let plain = tun_tap::Iface::without_packet_info(name, tun_tap::Mode::Tun)?;
    // SAFETY: the interface owns the descriptor and lives longer than this borrow.
    let fd = unsafe { BorrowedFd::borrow_raw(plain.as_raw_fd()) };
    fcntl(fd, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    set_value(plain.as_raw_fd(), TUNSETPERSIST, 1)?;
    info!(link = plain.name(), queues = 1, "TUN device open, plain");
    let name = plain.name().to_owned();
    Ok(Device { name, mode: Mode::Plain, queues: vec![TunQueue::new(Handle::Plain(plain), Offloads::NONE)] })
}

/// Switches on what the kernel knows; says which that is.
fn set_offloads(fd: RawFd) -> io::Result<Offloads> {
    let choices = [(OFFLOAD_TCP | OFFLOAD_UDP, Offloads::ALL), (OFFLOAD_TCP, Offloads { tcp: true, udp: false })];
    for (flags, offloads) in choices {
        match set_value(fd, TUNSETOFFLOAD, flags) {
            Ok(()) => return Ok(offloads),
            Err(error) if is_refusal(&error) => {}
            Err(error) => return Err(error),
        }
    }
    set_value(fd, TUNSETOFFLOAD, 0)?;
    Ok(Offloads::NONE)
}

/// TUNSETIFF: makes the descriptor a queue of the device; returns its name.
fn attach(fd: RawFd, name: &str, flags: i32) -> io::Result<String> {
    // SAFETY: all zeros are a valid ifreq.
    let mut request: libc::ifreq = unsafe { mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: the descriptor is open and the kernel reads and writes one ifreq, which outlives the call.
    let result = unsafe { libc::ioctl(fd, TUNSETIFF, &raw mut request) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    name_in(&request)
}

/// An ioctl that takes its value in place of a pointer.
fn set_value(fd: RawFd, request: libc::c_ulong, value: libc::c_ulong) -> io::Result<()> {
    // SAFETY: this request reads no memory; the descriptor is open.
    if unsafe { libc::ioctl(fd, request, value) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// An ioctl that takes a pointer to an int.
fn set_int(fd: RawFd, request: libc::c_ulong, value: i32) -> io::Result<()> {
    // SAFETY: the kernel reads one int, which outlives the call; the descriptor is open.
    if unsafe { libc::ioctl(fd, request, &raw const value) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn impossible_names_are_refused() {
        for name in ["", ".", "a/b", "sixteen-letters-", "tun%d", "a b", "a:b"] {
            let error = Device::open(name, 1).map(drop).map_err(|error| error.kind());
            assert_eq!(error, Err(io::ErrorKind::InvalidInput), "{name}");
        }
    }
}
