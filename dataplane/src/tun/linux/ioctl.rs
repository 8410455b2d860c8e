//! The ioctls of a TUN device, and what their numbers are.
#![allow(unsafe_code, reason = "ioctls; each block is one call")]

use std::{
    ffi::CStr,
    io, mem,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
};

use crate::packet::offload::Offloads;

pub(super) const IFF_TUN: i32 = 0x0001;
pub(super) const IFF_NO_PI: i32 = 0x1000;
pub(super) const IFF_MULTI_QUEUE: i32 = 0x0100;
pub(super) const IFF_VNET_HDR: i32 = 0x4000;
const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const TUNSETPERSIST: libc::c_ulong = 0x4004_54cb;
const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
const TUNGETIFF: libc::c_ulong = 0x8004_54d2;
const TUNGETDEVNETNS: libc::c_ulong = 0x54e3;
const TUNSETVNETHDRSZ: libc::c_ulong = 0x4004_54d8;
/// Checksums left open, without which there is nothing else.
const CHECKSUMS: libc::c_ulong = 0x01;
const TSO4: libc::c_ulong = 0x02;
const TSO6: libc::c_ulong = 0x04;
/// TCP with congestion marks.
const TSO_ECN: libc::c_ulong = 0x08;
/// UDP over IPv4 and IPv6, since Linux 6.2; one without the other is refused.
const USO: libc::c_ulong = 0x20 | 0x40;

/// True if the kernel knows TUN devices but not this kind.
pub(super) fn is_refusal(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP | libc::ENOTTY))
}

/// Switches on what is wanted as far as the kernel knows it, and everything else off; says what it came to.
pub(super) fn set_offloads(fd: RawFd, wanted: Offloads) -> io::Result<Offloads> {
    // A kernel that gives no super-packets of a kind takes none either.
    let without_udp = Offloads { uso: false, udp_coalesce: false, ..wanted };
    for offloads in [wanted, without_udp] {
        match set_value(fd, TUNSETOFFLOAD, flags(offloads)) {
            Ok(()) => return Ok(offloads),
            Err(error) if is_refusal(&error) => {}
            Err(error) => return Err(error),
        }
    }
    set_value(fd, TUNSETOFFLOAD, 0)?;
    Ok(Offloads::NONE)
}

fn flags(offloads: Offloads) -> libc::c_ulong {
    let Offloads { tso4, tso6, uso, .. } = offloads;
    let choices = [(tso4 || tso6 || uso, CHECKSUMS), (tso4, TSO4), (tso6, TSO6), (tso4 || tso6, TSO_ECN), (uso, USO)];
    choices.into_iter().filter(|(wanted, _)| *wanted).fold(0, |all, (_, flag)| all | flag)
}

/// Bytes of the virtio header in front of each packet. A persistent device keeps what an earlier process set.
pub(super) fn set_header_len(fd: RawFd, len: i32) -> io::Result<()> {
    set_int(fd, TUNSETVNETHDRSZ, len)
}

/// Whether the device outlives the processes that have it open.
pub(super) fn set_persistent(fd: RawFd, persistent: bool) -> io::Result<()> {
    set_value(fd, TUNSETPERSIST, persistent.into())
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

/// TUNSETIFF: makes the descriptor a queue of the device; returns its name.
pub(super) fn attach(fd: RawFd, name: &str, flags: i32) -> io::Result<String> {
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
