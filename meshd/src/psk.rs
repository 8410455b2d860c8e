//! Post-quantum preshared keys: this node makes key offers where its lanes want keys, and opens those of its peers.
//!
//! ```text
//! lanes ─ KeyWanted, Datagram ─> events thread ─> queue ─> psk thread: book ─ Agreement ─> lanes
//! control ─ facts, keys ────────────────────────────────────┘
//! ```
//!
//! A thread of its own, because a KEM operation takes as long as a hundred packets: no lane waits for it. The
//! [`Book`] is pure but for random numbers; what the two ends say is `protocol/offer`.

mod book;
#[cfg(test)]
mod recorder;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use mesh_dataplane::{Command, Engine, PeerId};
use tokio::sync::watch;
use tracing::{debug, warn};

use crate::facts::{DirectoryFacts, OwnKeys};
pub(crate) use book::Counters;
use book::{Book, Now, Refusal};

/// What waits for the thread at most; each is up to 1,200 bytes, so 300 KiB. What finds it full is dropped and counted: lanes
/// ask again, offers are repeated.
const WAITING: usize = 256;
/// Pairs of keys whose secret is computed between two looks into the queue: 3 ms.
const BATCH: usize = 64;
/// How often the day is looked at if nothing happens.
const IDLE: Duration = Duration::from_secs(60);

enum Input {
    /// A lane wants a key for a tunnel to this peer, on these epochs of ours and of the peer's.
    Wanted(PeerId, u64, u64),
    /// A datagram that may be an offer.
    Offer(Vec<u8>),
    /// Facts or keys are others now.
    Changed,
    Stop,
}

/// The running thread.
#[derive(Debug)]
pub(crate) struct Psk {
    queue: SyncSender<Input>,
    counters: Arc<Mutex<Counters>>,
    dropped: AtomicU64,
    thread: JoinHandle<()>,
}

impl std::fmt::Debug for Input {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Input")
    }
}

/// Where the thread reads what is and says what follows.
pub(crate) struct Ends {
    /// The directory.
    pub(crate) facts: watch::Receiver<Arc<DirectoryFacts>>,
    /// Own keys.
    pub(crate) keys: watch::Receiver<Arc<OwnKeys>>,
    /// The lanes.
    pub(crate) engine: Arc<Engine>,
    /// How many of them the own record names.
    pub(crate) published_lanes: u8,
}

/// Starts the thread.
///
/// # Errors
/// The system refused a thread.
pub(crate) fn start(ends: Ends) -> std::io::Result<Psk> {
    let (queue, inbox) = sync_channel(WAITING);
    let counters = Arc::new(Mutex::new(Counters::default()));
    let lanes = u8::try_from(ends.engine.lanes()).unwrap_or(1);
    let book = Book::new(lanes, ends.published_lanes);
    let thread = Thread { ends, book, counters: Arc::clone(&counters) };
    let thread = std::thread::Builder::new().name("psk".into()).spawn(move || thread.run(&inbox))?;
    Ok(Psk { queue, counters, dropped: AtomicU64::new(0), thread })
}

impl Psk {
    /// A lane wants a key.
    pub(crate) fn wanted(&self, peer: PeerId, local_epoch: u64, remote_epoch: u64) {
        self.put(Input::Wanted(peer, local_epoch, remote_epoch));
    }

    /// A datagram that may be an offer arrived.
    pub(crate) fn offered(&self, datagram: Vec<u8>) {
        self.put(Input::Offer(datagram));
    }

    /// Facts or keys changed.
    pub(crate) fn changed(&self) {
        // A full queue wakes the thread as well.
        let _ = self.queue.try_send(Input::Changed);
    }

    /// What happened since the start.
    pub(crate) fn counters(&self) -> Counters {
        let counters = *self.counters.lock().unwrap_or_else(PoisonError::into_inner);
        Counters { dropped: self.dropped.load(Ordering::Relaxed), ..counters }
    }

    /// Ends the thread.
    pub(crate) fn stop(self) {
        let _ = self.queue.send(Input::Stop);
        if self.thread.join().is_err() {
            warn!("the psk thread had panicked");
        }
    }

    fn put(&self, input: Input) {
        if let Err(TrySendError::Full(_)) = self.queue.try_send(input) {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }
}

struct Thread {
    ends: Ends,
    book: Book,
    counters: Arc<Mutex<Counters>>,
}

impl Thread {
    fn run(mut self, inbox: &Receiver<Input>) {
        self.look(true);
        loop {
            // With secrets left to compute, only what waits already comes first.
            let patience = if self.book.is_complete() { IDLE } else { Duration::ZERO };
            let input = match inbox.recv_timeout(patience) {
                Ok(Input::Stop) | Err(RecvTimeoutError::Disconnected) => return,
                Ok(input) => Some(input),
                Err(RecvTimeoutError::Timeout) => None,
            };
            self.look(false);
            match input {
                Some(input) => self.handle(input),
                None => self.book.compute(BATCH),
            }
            self.tell_hints();
            *self.counters.lock().unwrap_or_else(PoisonError::into_inner) = self.book.counters;
        }
    }

    /// Takes what changed.
    fn look(&mut self, first: bool) {
        let changed = |is: Result<bool, _>| is.unwrap_or(false);
        if first || changed(self.ends.facts.has_changed()) || changed(self.ends.keys.has_changed()) {
            let facts = self.ends.facts.borrow_and_update().clone();
            let keys = self.ends.keys.borrow_and_update().clone();
            self.book.update(&facts, keys);
        }
        self.book.set_day(now().micros);
    }

    /// Tells the lanes which offers to expect: theirs is a share that strangers cannot take.
    fn tell_hints(&mut self) {
        if let Some(hints) = self.book.take_hints()
            && let Err(error) = self.ends.engine.command(Command::Expect(Arc::new(hints)))
        {
            debug!(%error, "a lane does not know whose offers to expect");
        }
    }

    fn handle(&mut self, input: Input) {
        let made = match input {
            Input::Wanted(peer, local_epoch, remote_epoch) => self.book.make(peer, (local_epoch, remote_epoch), now()),
            Input::Offer(datagram) => self.book.open(&datagram, now()),
            Input::Changed | Input::Stop => return,
        };
        match made {
            Ok(agreement) => {
                if let Err(error) = self.ends.engine.command(Command::Agree(Arc::new(agreement))) {
                    // The lane asks again, or the peer offers again.
                    debug!(%error, "a lane did not take its keys");
                }
            }
            Err(Refusal::Kem { peer }) => warn!(%peer, "ML-KEM-768 key of the peer, or ours, is unusable"),
            Err(refusal) => debug!(?refusal, "no preshared key"),
        }
    }
}

fn now() -> Now {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Now { instant: Instant::now(), micros: u64::try_from(since.as_micros()).unwrap_or(u64::MAX) }
}
