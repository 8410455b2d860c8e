//! What control leaves for a lane: the newest table, and a bounded row of letters.

use std::{
    collections::{HashSet, VecDeque},
    fmt, io,
    net::SocketAddr,
    os::fd::{AsFd, BorrowedFd},
    sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc::SyncSender},
};

use nix::sys::eventfd::{EfdFlags, EventFd};

use super::crossing::{Crossed, Crossing};
use crate::{
    command::{Agreement, LaneSnapshot, Mark, PeerSnapshot},
    table::{PeerId, Table},
    tun::{Packets, Queue},
    udp::Socket,
};

/// Letters that wait at most; then control is told to come back. The largest carry 1,500 bytes: 400 KiB in all.
const CAPACITY: usize = 256;

/// One thing for a lane to do.
pub(super) enum Letter {
    Initiate(PeerId),
    Send(SocketAddr, Vec<u8>),
    Redirect(Arc<[(PeerId, SocketAddr)]>),
    Agree(Arc<Agreement>),
    Expect(Arc<HashSet<Mark>>),
    Queue(Box<dyn Queue>),
    Socket(Box<dyn Socket>),
    Snapshot(SyncSender<(LaneSnapshot, Vec<PeerSnapshot>)>),
}

/// What waits.
#[derive(Default)]
pub(super) struct Post {
    pub(super) table: Option<Arc<Table>>,
    pub(super) letters: VecDeque<Letter>,
    pub(super) stop: bool,
}

/// Shared by control and one lane. The lane takes its lock only after the eventfd woke it.
pub(super) struct Mailbox {
    waiting: Mutex<Post>,
    crossing: Crossing,
    bell: EventFd,
}

impl fmt::Debug for Mailbox {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Mailbox")
    }
}

impl Mailbox {
    pub(super) fn new() -> io::Result<Self> {
        let bell = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?;
        Ok(Self { waiting: Mutex::default(), crossing: Crossing::default(), bell })
    }

    /// Leaves a table in place of one that still waits.
    pub(super) fn set_table(&self, table: Arc<Table>) {
        self.lock().table = Some(table);
        self.ring();
    }

    /// Leaves a letter; gives it back if too many wait.
    pub(super) fn post(&self, letter: Letter) -> Result<(), Letter> {
        let mut waiting = self.lock();
        if waiting.letters.len() >= CAPACITY {
            return Err(letter);
        }
        waiting.letters.push_back(letter);
        drop(waiting);
        self.ring();
        Ok(())
    }

    pub(super) fn stop(&self) {
        self.lock().stop = true;
        self.ring();
    }

    /// Takes the table and up to `most` letters; the bell is silent then unless more letters wait.
    pub(super) fn take(&self, most: usize) -> Post {
        // Silence first: what comes after this rings again.
        let _ = self.bell.read();
        let mut waiting = self.lock();
        let count = waiting.letters.len().min(most);
        let letters = waiting.letters.drain(..count).collect();
        let post = Post { table: waiting.table.take(), letters, stop: waiting.stop };
        let more = !waiting.letters.is_empty();
        drop(waiting);
        if more {
            self.ring();
        }
        post
    }

    /// Leaves packets of another lane; says how many found no room.
    pub(super) fn cross(&self, packets: &Packets) -> usize {
        let (refused, wake) = self.crossing.append(packets);
        if wake {
            self.ring();
        }
        refused
    }

    /// Takes the packets of other lanes.
    pub(super) fn take_crossed(&self, crossed: &mut Crossed) {
        self.crossing.take(crossed);
    }

    /// Becomes readable when something waits.
    pub(super) fn bell(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }

    fn ring(&self) {
        // Fails only if the counter is about to overflow: then it is readable all the same.
        let _ = self.bell.write(1);
    }

    fn lock(&self) -> MutexGuard<'_, Post> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
