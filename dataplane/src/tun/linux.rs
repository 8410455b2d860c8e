//! TUN devices of Linux through a few ioctls.
//!
//! The fast device has several queues and a virtio header in front of each packet: one read brings a super-packet of up to
//! 64 KiB that stands for many, one write takes one. Where the kernel refuses it, or the caller wants no super-packets at
//! all, the plain device of the `tun-tap` crate takes its place: one queue, no header. Both are persistent: the device, its
//! addresses and its routes outlive the process, and the next one attaches to it again.

mod ioctl;
mod queue;

use std::{
    error::Error as _,
    fs::{File, OpenOptions},
    io,
    os::fd::{AsFd, AsRawFd},
    os::unix::fs::OpenOptionsExt,
};

use nix::{
    fcntl::{FcntlArg, OFlag, fcntl},
    poll::poll,
};
use tracing::{info, warn};

use super::{
    steering::{Steering, SteeringError},
    vnet::HEADER,
};
use crate::packet::{flow::FlowHash, offload::Offloads};
use ioctl::{IFF_MULTI_QUEUE, IFF_NO_PI, IFF_TUN, IFF_VNET_HDR, is_refusal};
use queue::{Handle, plain_fd};

pub use ioctl::{name_of, namespace_of};
pub use queue::TunQueue;

/// Queues one device may have; the kernel's own bound is 256, lanes are at most 8.
const MAX_QUEUES: usize = 64;
/// How often, and how many milliseconds apart, a device that was removed is looked for.
const LOOKS: usize = 50;
const PAUSE: u16 = 20;
/// What the kernel is told of a fast device, and of a plain one.
const FAST: i32 = IFF_TUN | IFF_NO_PI | IFF_MULTI_QUEUE | IFF_VNET_HDR;
const PLAIN: i32 = IFF_TUN | IFF_NO_PI;

/// Which kind of device it became.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Several queues, virtio header.
    Fast,
    /// One queue, no header: the kernel refused the fast one, or nobody wanted it.
    Plain,
}

/// Which kind of device it is to become.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Wanted {
    /// The fast one; the plain one where the kernel refuses that, or where a plain device of that name exists.
    #[default]
    Any,
    /// The fast one or none. A plain device of that name is removed, with its addresses and routes.
    Fast,
    /// The plain one. A fast device of that name is removed, with its addresses and routes.
    Plain,
}

/// How to open a device.
#[derive(Debug, Clone, Copy)]
pub struct DeviceOptions {
    /// Queues of a fast device, 1 to 64.
    pub queues: usize,
    /// Which kind.
    pub wanted: Wanted,
    /// Super-packets that a fast device may give and take. What the kernel does not know is left out.
    pub offloads: Offloads,
}

impl Default for DeviceOptions {
    /// Any device, with one queue and all super-packets.
    fn default() -> Self {
        Self { queues: 1, wanted: Wanted::Any, offloads: Offloads::ALL }
    }
}

/// An open, persistent TUN device.
#[derive(Debug)]
pub struct Device {
    name: String,
    mode: Mode,
    queues: Vec<TunQueue>,
}

impl Device {
    /// Creates the device `name`, or attaches to it if it exists, with `queues` queues; of any kind, see
    /// [`open_with`](Self::open_with).
    ///
    /// # Errors
    ///
    /// As `open_with`.
    pub fn open(name: &str, queues: usize) -> io::Result<Self> {
        Self::open_with(name, &DeviceOptions { queues, ..DeviceOptions::default() })
    }

    /// Creates the device `name`, or attaches to it if it exists.
    ///
    /// It is neither up nor has it addresses: that is for the caller to do. In [`Mode::Plain`] it has one queue.
    ///
    /// # Errors
    ///
    /// `InvalidInput` for an impossible name or number of queues; what the kernel says otherwise: `EPERM` without
    /// `CAP_NET_ADMIN`, `ENOENT` without `/dev/net/tun`, `EBUSY` while another process has the device.
    pub fn open_with(name: &str, options: &DeviceOptions) -> io::Result<Self> {
        check_name(name)?;
        if !(1..=MAX_QUEUES).contains(&options.queues) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "1 to 64 queues"));
        }
        let fast = || open_fast(name, options.queues, options.offloads);
        match options.wanted {
            Wanted::Any => fast().or_else(|error| match is_refusal(&error) {
                true => {
                    warn!(link = name, %error, "fast TUN device refused, using the plain one");
                    open_plain(name)
                }
                false => Err(error),
            }),
            Wanted::Fast => instead_of(name, PLAIN, fast),
            Wanted::Plain => instead_of(name, FAST, || open_plain(name)),
        }
    }

    /// Like [`open_with`](Self::open_with), and packets of a flow come out of the queue of its lane: `flow` modulo the number
    /// of queues. Where the kernel refuses the program for that, the device has one queue, and the reason is given too.
    ///
    /// # Errors
    ///
    /// As `open_with`.
    pub fn open_steered(
        name: &str,
        options: &DeviceOptions,
        flow: &FlowHash,
    ) -> io::Result<(Self, Option<SteeringError>)> {
        let device = Self::open_with(name, options)?;
        let (Some(first), lanes @ 2..) = (device.queues.first(), device.queues.len()) else {
            return Ok((device, None));
        };
        let steered = Steering::load(flow, lanes as u32).and_then(|program| program.attach(first));
        let Err(error) = steered else { return Ok((device, None)) };
        warn!(link = name, error = %error, cause = error.source(), "no flow keeps its queue here, using one");
        drop(device);
        Ok((Self::open_with(name, &DeviceOptions { queues: 1, ..*options })?, Some(error)))
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
        self.queues.iter().try_for_each(|queue| ioctl::set_persistent(queue.as_fd().as_raw_fd(), persistent))
    }

    /// The queues, one for each lane.
    pub fn into_queues(self) -> Vec<TunQueue> {
        self.queues
    }
}

fn check_name(name: &str) -> io::Result<()> {
    let fine = |byte: u8| byte.is_ascii_graphic() && !matches!(byte, b'/' | b':' | b'%');
    if name.is_empty() || name.len() > 15 || name.starts_with('.') || !name.bytes().all(fine) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a link name"));
    }
    Ok(())
}

/// Opens a device; one of the other kind that is in the way is removed first.
fn instead_of(name: &str, other: i32, open: impl Fn() -> io::Result<Device>) -> io::Result<Device> {
    let error = match open() {
        Err(error) if is_refusal(&error) => error,
        opened => return opened,
    };
    // Nothing of that kind and name is in the way: then the kernel refuses the kind itself.
    let Ok(file) = open_file() else { return Err(error) };
    if ioctl::attach(file.as_raw_fd(), name, other).is_err() {
        return Err(error);
    }
    warn!(link = name, "a TUN device of another kind is in the way, removing it");
    ioctl::set_persistent(file.as_raw_fd(), false)?;
    drop(file);
    // It is gone with the last descriptor, which a program that is just being started may have for a moment.
    for _ in 0..LOOKS {
        match open() {
            Err(error) if is_refusal(&error) => poll(&mut [], PAUSE)?,
            opened => return opened,
        };
    }
    open()
}

fn open_file() -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC).open("/dev/net/tun")
}

fn open_fast(name: &str, queues: usize, wanted: Offloads) -> io::Result<Device> {
    let mut opened = Vec::with_capacity(queues);
    let mut full_name = String::new();
    let mut offloads = Offloads::NONE;
    for _ in 0..queues {
        let file = open_file()?;
        full_name = ioctl::attach(file.as_raw_fd(), name, FAST)?;
        ioctl::set_header_len(file.as_raw_fd(), HEADER as i32)?;
        offloads = ioctl::set_offloads(file.as_raw_fd(), wanted)?;
        ioctl::set_persistent(file.as_raw_fd(), true)?;
        opened.push(TunQueue::new(Handle::Fast(file), offloads));
    }
    info!(link = %full_name, queues, ?offloads, "TUN device open");
    Ok(Device { name: full_name, mode: Mode::Fast, queues: opened })
}

fn open_plain(name: &str) -> io::Result<Device> {
    let plain = tun_tap::Iface::without_packet_info(name, tun_tap::Mode::Tun)?;
    fcntl(plain_fd(&plain), FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    // A fast device of before may have been told to hand over super-packets.
    ioctl::set_offloads(plain.as_raw_fd(), Offloads::NONE)?;
    ioctl::set_persistent(plain.as_raw_fd(), true)?;
    info!(link = plain.name(), queues = 1, "TUN device open, plain");
    let name = plain.name().to_owned();
    Ok(Device { name, mode: Mode::Plain, queues: vec![TunQueue::new(Handle::Plain(plain), Offloads::NONE)] })
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
