//! Receiving: one `recvmmsg`, each slot a datagram or a train.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr},
    os::fd::AsRawFd,
    ptr,
};

use super::{
    BATCH, EMPTY_MESSAGE, EMPTY_PART, SystemSocket,
    control::{self, CONTROL_LEN, EMPTY_CONTROL},
    name::{EMPTY_NAME, NAME_LEN, decode_address},
};
use crate::udp::{Arrival, Arrivals};

/// Replaces what is in `arrivals` by what waits, in at most `most` slots.
pub(super) fn receive(socket: &mut SystemSocket, arrivals: &mut Arrivals, most: usize) -> io::Result<usize> {
    // One message needs no room made for sixteen.
    match most {
        1 => receive_some::<1>(socket, arrivals, 1),
        most => receive_some::<BATCH>(socket, arrivals, most),
    }
}

/// One `recvmmsg` with room for `N` messages.
fn receive_some<const N: usize>(socket: &mut SystemSocket, arrivals: &mut Arrivals, most: usize) -> io::Result<usize> {
    arrivals.clear();
    let mut names = [EMPTY_NAME; N];
    let mut parts = [EMPTY_PART; N];
    let mut messages = [EMPTY_MESSAGE; N];
    let mut controls = [EMPTY_CONTROL; N];
    let mut slots = 0;
    for (n, buffer) in arrivals.buffers().take(most.min(N)).enumerate() {
        parts[n] = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
        slots = n + 1;
    }
    for n in 0..slots {
        messages[n].msg_hdr.msg_name = (&raw mut names[n]).cast();
        messages[n].msg_hdr.msg_namelen = NAME_LEN;
        messages[n].msg_hdr.msg_control = (&raw mut controls[n]).cast();
        messages[n].msg_hdr.msg_controllen = CONTROL_LEN as _;
        messages[n].msg_hdr.msg_iov = &raw mut parts[n];
        messages[n].msg_hdr.msg_iovlen = 1;
    }
    let (fd, first) = (socket.socket.as_raw_fd(), messages.as_mut_ptr());
    // SAFETY: `slots` messages point to names, controls and buffers that live on this stack and in `arrivals`.
    let count = unsafe { libc::recvmmsg(fd, first, slots as u32, libc::MSG_DONTWAIT, ptr::null_mut()) };
    if count < 0 {
        let error = io::Error::last_os_error();
        return match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(0),
            _ => Err(error),
        };
    }
    for ((message, name), control) in messages.iter().zip(&names).zip(&controls).take(count as usize) {
        // A source that is no IP address does not occur on such a socket; it would count as truncated.
        let (remote, known) = match decode_address(name) {
            Some(remote) => (remote, true),
            None => (SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), 0), false),
        };
        let said = control.decode(message.msg_hdr.msg_controllen as _);
        socket.refusals.heard_at(said.local);
        let truncated = !known || message.msg_hdr.msg_flags & (libc::MSG_TRUNC | libc::MSG_CTRUNC) != 0;
        let len = message.msg_len as usize;
        let from = control::outer(remote, &said);
        arrivals.filled.push(Arrival { from, len, stride: said.stride.unwrap_or(len), truncated });
    }
    Ok(arrivals.len())
}
