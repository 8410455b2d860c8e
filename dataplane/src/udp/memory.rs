//! A network in memory: sockets with made-up addresses that reach each other. For tests that need no kernel.

use std::{
    collections::{HashMap, VecDeque},
    io,
    net::SocketAddr,
    os::fd::{AsFd, BorrowedFd},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use nix::sys::eventfd::{EfdFlags, EventFd};

use super::{Arrivals, Datagrams, Socket};

/// Datagrams a socket holds before more are lost, as in a full receive buffer.
const CAPACITY: usize = 1_024;

type Waiting = VecDeque<(SocketAddr, Vec<u8>)>;
/// What arrived at one socket, and what tells it so.
type Inbox = Arc<(Mutex<Waiting>, EventFd)>;

#[derive(Debug, Clone, Default)]
struct Sockets(Arc<Mutex<HashMap<SocketAddr, Inbox>>>);

/// A network in memory. Clones are the same network.
#[derive(Debug, Clone, Default)]
pub struct MemoryNetwork(Sockets);

impl MemoryNetwork {
    /// A socket with this address.
    ///
    /// # Errors
    ///
    /// If the address is in use or the system has no descriptor left.
    pub fn bind(&self, address: SocketAddr) -> io::Result<MemorySocket> {
        let ready = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?;
        let inbox = Arc::new((Mutex::default(), ready));
        let mut sockets = lock(&self.0.0);
        if sockets.contains_key(&address) {
            return Err(io::ErrorKind::AddrInUse.into());
        }
        sockets.insert(address, Arc::clone(&inbox));
        Ok(MemorySocket { address, inbox, network: self.0.clone() })
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A socket on a [`MemoryNetwork`]. Datagrams to addresses nobody has are lost.
#[derive(Debug)]
pub struct MemorySocket {
    address: SocketAddr,
    inbox: Inbox,
    network: Sockets,
}

impl MemorySocket {
    /// Sends one datagram; false if it is lost.
    pub fn send_to(&self, to: SocketAddr, datagram: &[u8]) -> bool {
        let Some(inbox) = lock(&self.network.0).get(&to).cloned() else {
            return false;
        };
        let mut waiting = lock(&inbox.0);
        if waiting.len() >= CAPACITY {
            return false;
        }
        waiting.push_back((self.address, datagram.to_vec()));
        inbox.1.write(1).is_ok()
    }

    /// The next datagram and its source.
    pub fn try_receive(&self) -> Option<(SocketAddr, Vec<u8>)> {
        let mut waiting = lock(&self.inbox.0);
        let next = waiting.pop_front();
        if next.is_none() {
            // Empty: the next datagram makes it readable again. EAGAIN means that it is not readable now.
            let _ = self.inbox.1.read();
        }
        next
    }
}

impl Drop for MemorySocket {
    fn drop(&mut self) {
        lock(&self.network.0).remove(&self.address);
    }
}

impl AsFd for MemorySocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inbox.1.as_fd()
    }
}

impl Socket for MemorySocket {
    fn receive(&mut self, arrivals: &mut Arrivals, most: usize) -> io::Result<usize> {
        arrivals.clear();
        while arrivals.len() < arrivals.slots().min(most) {
            let Some((from, datagram)) = self.try_receive() else { break };
            arrivals.push(from, &datagram);
        }
        Ok(arrivals.len())
    }

    fn send(&mut self, datagrams: &Datagrams) -> usize {
        datagrams.iter().filter(|(to, bytes)| self.send_to(to.ends.remote, bytes)).count()
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        Ok(self.address)
    }
}
