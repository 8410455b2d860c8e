//! One queue: packets in and out, super-packets among them.

use std::{
    fs::File,
    io::{self, IoSlice, Read, Write},
    mem,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
};

use tracing::warn;

use super::{
    super::{
        Packets, Queue, Supers, is_lost,
        vnet::{self, HEADER},
    },
    ioctl,
};
use crate::packet::{
    coalesce::{Coalescer, MAX_PACKETS, Run},
    offload::{Offload, Offloads, Transport},
    reassembly::Reassembly,
};

/// One queue of a TUN device.
#[derive(Debug)]
pub struct TunQueue {
    file: Handle,
    offloads: Offloads,
    refused_runs: u64,
    reassembly: Reassembly,
    coalescer: Coalescer,
}

#[derive(Debug)]
pub(super) enum Handle {
    /// Packets have a virtio header.
    Fast(File),
    /// Packets are bare.
    Plain(tun_tap::Iface),
}

impl AsFd for TunQueue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.file {
            Handle::Fast(file) => file.as_fd(),
            Handle::Plain(plain) => plain_fd(plain),
        }
    }
}

impl Queue for TunQueue {
    fn read(&mut self, supers: &mut Supers, most: usize) -> io::Result<usize> {
        let before = supers.len();
        // Reads that bring nothing of use count too: the budget holds whatever the kernel hands over.
        for _ in 0..most {
            let Some(room) = supers.room() else { break };
            match self.read_one(room) {
                Ok(Some((offset, len, offload))) => supers.push_at(offset, len, offload),
                Ok(None) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if supers.len() == before => return Err(error),
                Err(_) => break,
            }
        }
        Ok(supers.len() - before)
    }

    fn write(&mut self, packets: &mut Packets) -> io::Result<usize> {
        let count = packets.len();
        if self.offloads.udp_coalesce {
            self.reassembly.join(packets);
        }
        // Fragments that are part of another packet now.
        let mut taken = count - packets.len();
        let mut coalescer = mem::take(&mut self.coalescer);
        coalescer.plan(packets, self.offloads);
        for run in coalescer.runs() {
            let written = match self.write_run(packets, &coalescer, run) {
                // Some kernels refuse what they said they take: never again, and this one packet by packet.
                Err(error) if run.count > 1 && error.raw_os_error() == Some(libc::EINVAL) => {
                    self.turn_off(run, &error);
                    coalescer.part(packets, run);
                    self.write_parted(packets, &coalescer, run)
                }
                written => written.map(|()| run.count),
            };
            match written {
                Ok(count) => taken += count,
                Err(error) if is_lost(&error) => return Err(error),
                // The device is down or its queue full: these packets are gone, as on any link.
                Err(_) => {}
            }
        }
        self.coalescer = coalescer;
        Ok(taken)
    }

    fn offloads(&self) -> Offloads {
        self.offloads
    }

    fn refused_runs(&self) -> u64 {
        self.refused_runs
    }
}

impl TunQueue {
    pub(super) fn new(file: Handle, offloads: Offloads) -> Self {
        let (reassembly, coalescer) = (Reassembly::default(), Coalescer::default());
        Self { file, offloads, refused_runs: 0, reassembly, coalescer }
    }

    /// Gives and takes these super-packets from now on, as far as the kernel knows them. For all queues of a device at once,
    /// and without any effect on a plain one.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn set_offloads(&mut self, wanted: Offloads) -> io::Result<Offloads> {
        if let Handle::Fast(file) = &self.file {
            self.offloads = ioctl::set_offloads(file.as_raw_fd(), wanted)?;
        }
        Ok(self.offloads)
    }

    /// Reads once: where in `room` the packet begins, how long it is, what is left to do; `None` for what is no use.
    fn read_one(&mut self, room: &mut [u8]) -> io::Result<Option<(usize, usize, Offload)>> {
        match &mut self.file {
            Handle::Plain(plain) => Ok(Some((0, plain.recv(room)?, Offload::None))),
            Handle::Fast(file) => {
                let len = file.read(room)?;
                let Some((header, packet)) = room[..len].split_first_chunk_mut::<HEADER>() else {
                    return Ok(None);
                };
                let offload = vnet::decode(header, packet);
                Ok(Some((HEADER, len - HEADER, offload)))
            }
        }
    }

    /// Writes the packets of a run at once.
    fn write_run(&mut self, packets: &Packets, coalescer: &Coalescer, run: &Run) -> io::Result<()> {
        let Some((_, first)) = packets.get(run.first) else { return Ok(()) };
        let file = match &mut self.file {
            Handle::Plain(plain) => return plain.send(first).map(drop),
            Handle::Fast(file) => file,
        };
        let header = vnet::encode(run);
        if run.count == 1 {
            return file.write_vectored(&[IoSlice::new(&header), IoSlice::new(first)]).map(drop);
        }
        let mut parts = [IoSlice::new(&[]); MAX_PACKETS + 1];
        (parts[0], parts[1]) = (IoSlice::new(&header), IoSlice::new(first));
        for (part, n) in parts[2..].iter_mut().zip(coalescer.followers(run)) {
            let payload = packets.get(n).and_then(|(_, packet)| packet.get(run.headers.1..));
            *part = IoSlice::new(payload.unwrap_or_default());
        }
        file.write_vectored(&parts[..=run.count]).map(drop)
    }

    /// Writes the packets of a run one by one; how many were taken.
    fn write_parted(&mut self, packets: &Packets, coalescer: &Coalescer, run: &Run) -> io::Result<usize> {
        let mut taken = 0;
        for n in [run.first].into_iter().chain(coalescer.followers(run)) {
            match self.write_run(packets, coalescer, &Run::single(n)) {
                Ok(()) => taken += 1,
                Err(error) if is_lost(&error) => return Err(error),
                Err(_) => {}
            }
        }
        Ok(taken)
    }

    /// Joins no more packets of this kind.
    fn turn_off(&mut self, run: &Run, error: &io::Error) {
        self.refused_runs += 1;
        let Some(cut) = run.cut else { return };
        warn!(%error, transport = ?cut.transport, "super-packet refused, writing packets one by one");
        match cut.transport {
            Transport::Tcp => self.offloads.tcp_coalesce = false,
            Transport::Udp => self.offloads.udp_coalesce = false,
        }
    }
}

/// The descriptor of a plain device.
#[allow(unsafe_code, reason = "the crate gives a number")]
pub(super) fn plain_fd(plain: &tun_tap::Iface) -> BorrowedFd<'_> {
    // SAFETY: the interface owns the descriptor and is borrowed as long as the result lives.
    unsafe { BorrowedFd::borrow_raw(plain.as_raw_fd()) }
}
