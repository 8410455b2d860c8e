//! Where inner packets come from and go to: one queue of a TUN device, or a stand-in in memory.

use std::{io, os::fd::AsFd};

use crate::{
    buffer::Batch,
    packet::offload::{Offload, Offloads},
};

pub mod linux;
pub mod memory;
pub mod steering;
mod vnet;

pub use linux::{Device, DeviceOptions, Mode, TunQueue, Wanted, name_of, namespace_of};

/// Inner packets to be written: whole, each one IPv4 or IPv6.
pub type Packets = Batch<()>;

/// What was read: packets, and super-packets that stand for many.
pub type Supers = Batch<Offload>;

/// One queue of inner packets. Its descriptor becomes readable when a packet waits; calls never block.
pub trait Queue: AsFd + Send {
    /// Appends what waits to `supers` until it is full, `most` were read or none waits; says how many came.
    ///
    /// # Errors
    ///
    /// Only if nothing was read. [`is_lost`] tells a queue that is gone from a passing failure.
    fn read(&mut self, supers: &mut Supers, most: usize) -> io::Result<usize>;

    /// Writes all packets, those of a flow together if it can; says how many the other side took. Those refused are gone.
    /// Their headers may change.
    ///
    /// # Errors
    ///
    /// If the queue is gone.
    fn write(&mut self, packets: &mut Packets) -> io::Result<usize>;

    /// Which super-packets it gives and takes.
    fn offloads(&self) -> Offloads {
        Offloads::NONE
    }

    /// How many super-packets the kernel refused although it had said that it takes them. The packets were written one by
    /// one, and [`offloads`](Self::offloads) lacks their kind since.
    fn refused_runs(&self) -> u64 {
        0
    }
}

/// True if the error means that the queue will never work again: its device was deleted.
pub fn is_lost(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EBADFD | libc::EBADF | libc::ENODEV | libc::ENXIO | libc::ENOENT))
        || error.kind() == io::ErrorKind::BrokenPipe
}
