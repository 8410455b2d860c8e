//! A queue in memory: two ends, packets written to one come out of the other. For tests that need no device.

use std::{
    collections::VecDeque,
    io,
    os::fd::{AsFd, BorrowedFd},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use nix::sys::eventfd::{EfdFlags, EventFd};

use super::{Packets, Queue, Supers};
use crate::packet::offload::Offload;

/// Packets a direction holds before it refuses more: the queue length of a TUN device.
const CAPACITY: usize = 500;

#[derive(Debug)]
struct Pipe {
    packets: Mutex<(VecDeque<Vec<u8>>, bool)>,
    ready: EventFd,
}

impl Pipe {
    fn new() -> io::Result<Arc<Self>> {
        let ready = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?;
        Ok(Arc::new(Self { packets: Mutex::new((VecDeque::new(), false)), ready }))
    }

    fn lock(&self) -> MutexGuard<'_, (VecDeque<Vec<u8>>, bool)> {
        self.packets.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, packet: &[u8]) -> io::Result<bool> {
        let mut packets = self.lock();
        if packets.1 {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        if packets.0.len() >= CAPACITY {
            return Ok(false);
        }
        packets.0.push_back(packet.to_vec());
        self.ready.write(1)?;
        Ok(true)
    }

    fn pop(&self) -> io::Result<Option<Vec<u8>>> {
        let mut packets = self.lock();
        let packet = packets.0.pop_front();
        if packet.is_none() {
            if packets.1 {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            // Empty: the next push makes it readable again. EAGAIN means that it is not readable now.
            let _ = self.ready.read();
        }
        Ok(packet)
    }

    fn close(&self) {
        self.lock().1 = true;
        // Wakes the reader; the counter is far from overflowing.
        let _ = self.ready.write(1);
    }
}

/// One end of a queue in memory. Dropping it makes the other end report a lost queue.
#[derive(Debug)]
pub struct MemoryQueue {
    incoming: Arc<Pipe>,
    outgoing: Arc<Pipe>,
}

impl MemoryQueue {
    /// Two connected ends.
    ///
    /// # Errors
    ///
    /// If the system has no descriptor left.
    pub fn pair() -> io::Result<(Self, Self)> {
        let (a, b) = (Pipe::new()?, Pipe::new()?);
        let one = Self { incoming: a.clone(), outgoing: b.clone() };
        Ok((one, Self { incoming: b, outgoing: a }))
    }

    /// Hands one packet to the other end; false if it holds too many.
    ///
    /// # Errors
    ///
    /// If the other end is gone.
    pub fn push(&self, packet: &[u8]) -> io::Result<bool> {
        self.outgoing.push(packet)
    }

    /// The next packet from the other end.
    ///
    /// # Errors
    ///
    /// If the other end is gone and nothing is left.
    pub fn pop(&self) -> io::Result<Option<Vec<u8>>> {
        self.incoming.pop()
    }
}

impl Drop for MemoryQueue {
    fn drop(&mut self) {
        self.incoming.close();
        self.outgoing.close();
    }
}

impl AsFd for MemoryQueue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.incoming.ready.as_fd()
    }
}

impl Queue for MemoryQueue {
    fn read(&mut self, supers: &mut Supers, most: usize) -> io::Result<usize> {
        let mut count = 0;
        while count < most
            && let Some(room) = supers.room()
        {
            let Some(packet) = self.incoming.pop().or_else(|error| match count {
                0 => Err(error),
                _ => Ok(None),
            })?
            else {
                break;
            };
            room[..packet.len()].copy_from_slice(&packet);
            supers.push(packet.len(), Offload::None);
            count += 1;
        }
        Ok(count)
    }

    fn write(&mut self, packets: &mut Packets) -> io::Result<usize> {
        let mut taken = 0;
        for (_, packet) in packets.iter() {
            taken += usize::from(self.outgoing.push(packet)?);
        }
        Ok(taken)
    }
}
