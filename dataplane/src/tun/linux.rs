//! TUN devices of Linux through a few ioctls.
//!
//! The fast device has several queues and a virtio header in front of each packet, as offloads need it (they are off
//! here: the header is read and written, and says nothing). Where the kernel refuses it, the plain device of the
//! `tun-tap` crate takes its place: one queue, no header. Both are persistent: the device, its addresses and its routes
//! outlive the process, and the next one attaches to it again.
#![allow(unsafe_code, reason = "ioctls; each block is one call")]

use std::{
    ffi::CStr,
    fs::{File, OpenOptions},
    io::{self, IoSlice, Read, Write},
    os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd},
    os::unix::fs::OpenOptionsExt,
};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use tracing::{info, warn};

use super::{Packets, Queue};
use crate::packet::checksum;

/// Length of the virtio header: flags, type, three lengths, two offsets; no buffer count.
const HEADER: usize = 10;
/// Flag in the virtio header: the checksum is left to whoever takes the packet.
const NEEDS_CSUM: u8 = 1;
/// Queues one device may have; the kernel's own bound is 256, lanes are at most 8.
const MAX_QUEUES: usize = 64;

const IFF_TUN: i32 = 0x0001;
const IFF_NO_PI: i32 = 0x1000;
const IFF_MULTI_QUEUE: i32 = 0x0100;
const IFF_VNET_HDR: i32 = 0x4000;
const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const TUNSETPERSIST: libc::c_ulong = 0x4004_54cb;
const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
const TUNSETVNETHDRSZ: libc::c_ulong = 0x4004_54d8;

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

    /// The queues, one for each lane.
    pub fn into_queues(self) -> Vec<TunQueue> {
        self.queues
    }
}

/// One queue of a TUN device.
#[derive(Debug)]
pub struct TunQueue {
    file: Handle,
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
    fn read(&mut self, packets: &mut Packets, most: usize) -> io::Result<usize> {
        let before = packets.len();
        // Reads that bring nothing of use count too: the budget holds whatever the kernel hands over.
        for _ in 0..most {
            let Some(room) = packets.room() else { break };
            match self.read_one(room) {
                Ok(Some((offset, len))) => packets.push_at(offset, len, ()),
                Ok(None) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if packets.len() == before => return Err(error),
                Err(_) => break,
            }
        }
        Ok(packets.len() - before)
    }

    fn write(&mut self, packets: &Packets) -> io::Result<usize> {
        let mut taken = 0;
        for (_, packet) in packets.iter() {
            match self.write_one(packet) {
                Ok(()) => taken += 1,
                Err(error) if super::is_lost(&error) => return Err(error),
                // The device is down or its queue full: this packet is gone, as on any link.
                Err(_) => {}
            }
        }
        Ok(taken)
    }
}

impl TunQueue {
    /// Reads one packet: where in `room` it begins and how long it is, or `None` for one that is no use.
    fn read_one(&mut self, room: &mut [u8]) -> io::Result<Option<(usize, usize)>> {
        match &mut self.file {
            Handle::Plain(plain) => Ok(Some((0, plain.recv(room)?))),
            Handle::Fast(file) => {
                let len = file.read(room)?;
                let Some((header, packet)) = room[..len].split_at_mut_checked(HEADER) else {
                    return Ok(None);
                };
                // Offloads are off, so the kernel has done this; a header that asks for it is honoured.
                if header[0] & NEEDS_CSUM != 0 {
                    let field = |at: usize| usize::from(u16::from_ne_bytes([header[at], header[at + 1]]));
                    if !checksum::complete(packet, field(6), field(8)) {
                        return Ok(None);
                    }
                }
                Ok(Some((HEADER, packet.len())))
            }
        }
    }

    fn write_one(&mut self, packet: &[u8]) -> io::Result<()> {
        match &mut self.file {
            Handle::Plain(plain) => plain.send(packet).map(drop),
            Handle::Fast(file) => {
                let parts = [IoSlice::new(&[0; HEADER]), IoSlice::new(packet)];
                file.write_vectored(&parts).map(drop)
            }
        }
    }
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
        set_value(file.as_raw_fd(), TUNSETOFFLOAD, 0)?;
        set_value(file.as_raw_fd(), TUNSETPERSIST, 1)?;
        opened.push(TunQueue { file: Handle::Fast(file) });
    }
    info!(link = %full_name, queues, "TUN device open, virtio header on, offloads off");
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
    Ok(Device { name, mode: Mode::Plain, queues: vec![TunQueue { file: Handle::Plain(plain) }] })
}

/// TUNSETIFF: makes the descriptor a queue of the device; returns its name.
fn attach(fd: RawFd, name: &str, flags: i32) -> io::Result<String> {
    // SAFETY: all zeros are a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: the descriptor is open and the kernel reads and writes one ifreq, which outlives the call.
    let result = unsafe { libc::ioctl(fd, TUNSETIFF, &raw mut request) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    let name = request.ifr_name.map(|byte| byte as u8);
    let name = CStr::from_bytes_until_nul(&name).map_err(|_| io::ErrorKind::InvalidData)?;
    Ok(name.to_string_lossy().into_owned())
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
