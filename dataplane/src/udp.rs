//! Where datagrams come from and go to: a UDP socket of the system, or a stand-in in memory.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    os::fd::{AsFd, BorrowedFd},
};

use crate::{
    buffer::{Batch, ROOM},
    clock::Instant,
};

pub mod closed;
pub mod memory;
pub mod system;

/// The two ends of a datagram's way. A machine with several addresses has to answer from the one that was asked: the
/// other end, and what translates addresses between, knows no other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ends {
    /// The other machine's address: where a datagram came from or goes to.
    pub remote: SocketAddr,
    /// Ours: what a datagram was sent to, or is to leave from; `None` leaves it to the system.
    pub local: Option<IpAddr>,
}

impl From<SocketAddr> for Ends {
    /// To or from there, by whichever address of ours.
    fn from(remote: SocketAddr) -> Self {
        Self { remote, local: None }
    }
}

/// The outer header of a datagram, as far as it matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Outer {
    /// Its way.
    pub ends: Ends,
    /// Traffic class byte: six bits of DSCP, two of ECN.
    pub class: u8,
    /// It is dropped where it is too large, instead of being cut to fragments: what arrives came in one piece. Always false for
    /// what arrived.
    pub dont_fragment: bool,
}

impl From<Ends> for Outer {
    /// That way, best effort.
    fn from(ends: Ends) -> Self {
        Self { ends, class: 0, dont_fragment: false }
    }
}

impl From<SocketAddr> for Outer {
    /// To or from there, by whichever address of ours, best effort.
    fn from(remote: SocketAddr) -> Self {
        Ends::from(remote).into()
    }
}

/// Datagrams to send, each with its outer header.
pub type Datagrams = Batch<Outer>;

/// A socket for datagrams. Its descriptor becomes readable when one waits; calls never block.
pub trait Socket: AsFd + Send {
    /// Replaces what is in `arrivals` by waiting datagrams, in at most `most` slots; says how many they fill.
    ///
    /// # Errors
    ///
    /// If the system refuses; the caller counts it and tries again.
    fn receive(&mut self, arrivals: &mut Arrivals, most: usize) -> io::Result<usize>;

    /// Descriptor of a way of its own to one other end, if there is one now: readable when a datagram waits there.
    fn direct(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// Like [`receive`](Self::receive), of what waits at [`direct`](Self::direct).
    ///
    /// # Errors
    ///
    /// As there.
    fn receive_direct(&mut self, arrivals: &mut Arrivals, _most: usize) -> io::Result<usize> {
        arrivals.clear();
        Ok(0)
    }

    /// To be called now and then while there is traffic: opens or closes the direct way. True if there is another one now,
    /// or none any more.
    fn settle(&mut self, _now: Instant) -> bool {
        false
    }

    /// Sends all datagrams as far as the system takes them; says how many it took. The others are gone: datagrams are
    /// never kept for later.
    fn send(&mut self, datagrams: &Datagrams) -> usize;

    /// The address it is bound to.
    ///
    /// # Errors
    ///
    /// If the system refuses.
    fn local_addr(&self) -> io::Result<SocketAddr>;

    /// What it has of the system.
    fn state(&self) -> SocketState {
        SocketState::default()
    }
}

/// What a socket has of the system, and what that refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SocketState {
    /// Bytes asked for each of the two buffers of the kernel.
    pub asked_buffer: usize,
    /// Bytes that the receive buffer has.
    pub receive_buffer: usize,
    /// Bytes that the send buffer has.
    pub send_buffer: usize,
    /// Which trains are used.
    pub trains: Trains,
    /// Trains that were refused and went as single datagrams; none are sent to that destination for a while then.
    pub refused_trains: u64,
}

/// Trains: many datagrams in one message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Trains {
    /// The kernel or the NIC cuts what is sent (`UDP_SEGMENT`).
    pub send: bool,
    /// The kernel joins what arrives (`UDP_GRO`).
    pub receive: bool,
}

impl Trains {
    /// Both ways.
    pub const ALL: Self = Self { send: true, receive: true };
}

/// What arrived: a fixed number of slots, each with room for the largest datagram or a train of smaller ones.
#[derive(Debug)]
pub struct Arrivals {
    bytes: Box<[u8]>,
    pub(crate) filled: Vec<Arrival>,
}

/// What one slot holds: datagrams of one length one behind another, the last of which may be shorter.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Arrival {
    pub(crate) from: Outer,
    pub(crate) len: usize,
    /// Length of each datagram.
    pub(crate) stride: usize,
    pub(crate) truncated: bool,
}

impl Arrivals {
    /// Room for `slots` datagrams or trains of up to 64 KiB. Pages that no datagram reaches cost nothing.
    pub fn new(slots: usize) -> Self {
        Self { bytes: vec![0; slots.max(1) * ROOM].into_boxed_slice(), filled: Vec::with_capacity(slots.max(1)) }
    }

    /// Without any slot, to stand in for a moment.
    pub(crate) fn none() -> Self {
        Self { bytes: Box::default(), filled: Vec::new() }
    }

    /// How many fit.
    pub fn slots(&self) -> usize {
        self.bytes.len() / ROOM
    }

    /// How many slots are filled.
    pub fn len(&self) -> usize {
        self.filled.len()
    }

    /// True without any.
    pub fn is_empty(&self) -> bool {
        self.filled.is_empty()
    }

    /// Forgets all; the memory stays.
    pub fn clear(&mut self) {
        self.filled.clear();
    }

    /// Takes a datagram by copying it; false if it does not fit.
    pub fn push(&mut self, from: impl Into<Outer>, datagram: &[u8]) -> bool {
        let n = self.filled.len();
        if n >= self.slots() || datagram.len() > ROOM {
            return false;
        }
        self.bytes[n * ROOM..][..datagram.len()].copy_from_slice(datagram);
        let len = datagram.len();
        self.filled.push(Arrival { from: from.into(), len, stride: len, truncated: false });
        true
    }

    /// Slot `n`: the outer header and the datagrams in it. Those that were cut off, because they were longer than the
    /// slot, come as an error.
    pub fn get(&self, n: usize) -> Option<Result<(Outer, impl Iterator<Item = &[u8]>), Outer>> {
        let arrival = self.filled.get(n)?;
        if arrival.truncated {
            return Some(Err(arrival.from));
        }
        let bytes = &self.bytes[n * ROOM..][..arrival.len];
        // A datagram without payload is one datagram.
        let empty = bytes.is_empty().then_some(bytes);
        Some(Ok((arrival.from, empty.into_iter().chain(bytes.chunks(arrival.stride.max(1))))))
    }

    /// The slots as separate buffers, for the system to fill.
    pub(crate) fn buffers(&mut self) -> impl Iterator<Item = &mut [u8]> {
        self.bytes.chunks_exact_mut(ROOM)
    }
}
