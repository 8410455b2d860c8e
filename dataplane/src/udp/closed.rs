//! The socket of a device that is down: nothing arrives, nothing leaves.

use std::{
    io,
    net::{Ipv6Addr, SocketAddr},
    os::fd::{AsFd, BorrowedFd},
};

use nix::sys::eventfd::{EfdFlags, EventFd};

use super::{Arrivals, Datagrams, Socket};

/// Takes the place of a socket while there is to be none.
#[derive(Debug)]
pub struct ClosedSocket(EventFd);

impl ClosedSocket {
    /// Such a socket.
    ///
    /// # Errors
    ///
    /// If the process has no descriptor left.
    pub fn new() -> io::Result<Self> {
        Ok(Self(EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?))
    }
}

impl AsFd for ClosedSocket {
    /// Never becomes readable.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Socket for ClosedSocket {
    fn receive(&mut self, arrivals: &mut Arrivals, _most: usize) -> io::Result<usize> {
        arrivals.clear();
        Ok(0)
    }

    fn send(&mut self, _datagrams: &Datagrams) -> usize {
        0
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        Ok((Ipv6Addr::UNSPECIFIED, 0).into())
    }
}
