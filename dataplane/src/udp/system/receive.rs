//! Receiving: one `recvmsg` or `recvmmsg`, each slot a datagram or a train.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr},
    os::fd::AsRawFd,
    ptr,
};

use super::{
    BATCH, EMPTY_MESSAGE, EMPTY_PART,
    control::{self, CONTROL_LEN, Control, EMPTY_CONTROL},
    name::{EMPTY_NAME, NAME_LEN, Name, decode_address},
};
use crate::udp::{Arrival, Arrivals};

/// Replaces what is in `arrivals` by what waits, in at most `most` slots.
pub(super) fn receive(socket: &socket2::Socket, arrivals: &mut Arrivals, most: usize) -> io::Result<()> {
    arrivals.clear();
    // One message needs no room made for sixteen, which is why they have frames of their own.
    let received = match most {
        1 => receive_one(socket, arrivals),
        most => receive_some(socket, arrivals, most),
    };
    match received {
        Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => Ok(()),
        received => received,
    }
}

/// One `recvmsg`.
#[inline(never)]
fn receive_one(socket: &socket2::Socket, arrivals: &mut Arrivals) -> io::Result<()> {
    let (mut name, mut control) = (EMPTY_NAME, EMPTY_CONTROL);
    let Some(buffer) = arrivals.buffers().next() else { return Ok(()) };
    let mut part = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    let mut header = EMPTY_MESSAGE.msg_hdr;
    prepare(&mut header, &mut name, &mut control, &mut part);
    // SAFETY: the header points to a name, control data and a part on this stack, which points to a buffer of `arrivals`.
    let len = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut header, libc::MSG_DONTWAIT) };
    if len < 0 {
        return Err(io::Error::last_os_error());
    }
    arrivals.filled.push(arrival(&header, &name, &control, len as usize));
    Ok(())
}

/// One `recvmmsg`.
#[inline(never)]
fn receive_some(socket: &socket2::Socket, arrivals: &mut Arrivals, most: usize) -> io::Result<()> {
    let mut names = [EMPTY_NAME; BATCH];
    let mut parts = [EMPTY_PART; BATCH];
    let mut messages = [EMPTY_MESSAGE; BATCH];
    let mut controls = [EMPTY_CONTROL; BATCH];
    let mut slots = 0;
    for (n, buffer) in arrivals.buffers().take(most.min(BATCH)).enumerate() {
        parts[n] = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
        prepare(&mut messages[n].msg_hdr, &mut names[n], &mut controls[n], &mut parts[n]);
        slots = n + 1;
    }
    let (fd, first) = (socket.as_raw_fd(), messages.as_mut_ptr());
    // SAFETY: `slots` messages point to names, controls and buffers that live on this stack and in `arrivals`.
    let count = unsafe { libc::recvmmsg(fd, first, slots as u32, libc::MSG_DONTWAIT, ptr::null_mut()) };
    if count < 0 {
        return Err(io::Error::last_os_error());
    }
    for ((message, name), control) in messages.iter().zip(&names).zip(&controls).take(count as usize) {
        arrivals.filled.push(arrival(&message.msg_hdr, name, control, message.msg_len as usize));
    }
    Ok(())
}

/// Points a header to where the kernel is to write.
fn prepare(header: &mut libc::msghdr, name: &mut Name, control: &mut Control, part: &mut libc::iovec) {
    header.msg_name = (&raw mut *name).cast();
    header.msg_namelen = NAME_LEN;
    header.msg_control = (&raw mut *control).cast();
    header.msg_controllen = CONTROL_LEN as _;
    header.msg_iov = &raw mut *part;
    header.msg_iovlen = 1;
}

/// What the kernel wrote.
fn arrival(header: &libc::msghdr, name: &Name, control: &Control, len: usize) -> Arrival {
    // A source that is no IP address does not occur on such a socket; it would count as truncated.
    let (remote, known) = match decode_address(name) {
        Some(remote) => (remote, true),
        None => (SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), 0), false),
    };
    let said = control.decode(header.msg_controllen as _);
    let truncated = !known || header.msg_flags & (libc::MSG_TRUNC | libc::MSG_CTRUNC) != 0;
    Arrival { from: control::outer(remote, &said), len, stride: said.stride.unwrap_or(len), truncated }
}
