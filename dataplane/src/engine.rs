//! Starts lanes, takes commands for them, hands out snapshots and events.
//!
//! ```text
//! control ── set_table, command ──> bounded queue, eventfd ──> lane thread ──> bounded queue ──> Events
//!         <─ snapshot ─────────────────────────────────────────────┘
//! ```
//!
//! Control never shares a lock with packets: a lane looks at its mailbox when the eventfd says so.
#![allow(clippy::disallowed_methods, reason = "the one place that reads the clock and draws seeds")]

mod crossing;
mod mailbox;
mod placement;
mod spin;
mod waiter;
mod worker;

use std::{
    io,
    net::SocketAddr,
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{self, Receiver, RecvTimeoutError},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use crate::{
    clock,
    command::{Command, Event, Snapshot},
    lane::{Lane, LaneConfig, MAX_LANES},
    packet::dscp::Dscp,
    table::{PeerId, Table},
    tun::Queue,
    udp::Socket,
};
use mailbox::{Letter, Mailbox};
use worker::{Mailboxes, Worker};

/// Events that wait for control at most; each is under 2 KiB, most are under 100 bytes.
const EVENTS: usize = 1_024;
/// How long a snapshot waits for a lane.
const SNAPSHOT_PATIENCE: Duration = Duration::from_secs(1);

/// What all lanes of an engine have in common.
#[derive(Debug, Clone)]
pub struct EngineConfig {
    /// Key of the flow hash: the same on all nodes, so that both ends of a flow choose one lane.
    pub flow_key: [u8; 16],
    /// Handshake messages a lane answers in a second before it demands cookies of everybody. One costs about 0.2 ms.
    pub handshakes_per_second: u32,
    /// Class of service of outer headers.
    pub dscp: Dscp,
    /// Each lane stays on a core of its own, as far as there are enough that the caller may use.
    pub pin: bool,
    /// A lane that was just busy looks for more for up to so long before it sleeps; zero never. It costs processor time and
    /// saves that of a wake-up.
    pub busy_poll: Duration,
}

impl Default for EngineConfig {
    /// A zero flow key; 500 handshakes a second, a tenth of a core; best effort; lanes on any core, which sleep at once.
    fn default() -> Self {
        Self {
            flow_key: [0; 16],
            handshakes_per_second: 500,
            dscp: Dscp::default(),
            pin: false,
            busy_poll: Duration::ZERO,
        }
    }
}

/// What one lane works on.
pub struct LaneParts {
    /// Its TUN queue.
    pub queue: Box<dyn Queue>,
    /// Its socket.
    pub socket: Box<dyn Socket>,
}

/// Why an engine did not start or does not take a command.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EngineError {
    /// No lanes, or more than eight.
    #[error("{0} lanes, must be 1, 2, 4 or {MAX_LANES}")]
    LaneCount(usize),
    /// There is no such lane.
    #[error("no lane {0}")]
    NoLane(usize),
    /// The lane has 256 commands waiting.
    #[error("command queue of lane {0} is full")]
    Busy(usize),
    /// The lane's thread has ended.
    #[error("lane {0} has stopped")]
    Stopped(usize),
    /// The system refused a thread, a descriptor or random bytes.
    #[error("start lane {lane}")]
    Start {
        /// Number of the lane.
        lane: usize,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// Running lanes. Dropping it stops them.
#[derive(Debug)]
pub struct Engine {
    lanes: Vec<Running>,
    /// In a mutex only to make the engine shareable between threads: it is taken once, through `&mut`.
    events: Mutex<Option<Receiver<Event>>>,
}

#[derive(Debug)]
struct Running {
    mailbox: Arc<Mailbox>,
    thread: Option<JoinHandle<()>>,
}

/// What happened on the lanes, in order for each lane.
#[derive(Debug)]
pub struct Events(Receiver<Event>);

impl Events {
    /// The next event if one waits.
    pub fn try_next(&self) -> Option<Event> {
        self.0.try_recv().ok()
    }

    /// Waits up to `patience` for the next event. `Ok(None)` after that time.
    ///
    /// # Errors
    ///
    /// [`Closed`] once all lanes have stopped and nothing waits.
    pub fn next_within(&self, patience: Duration) -> Result<Option<Event>, Closed> {
        match self.0.recv_timeout(patience) {
            Ok(event) => Ok(Some(event)),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => Err(Closed),
        }
    }
}

/// All lanes have stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("all lanes have stopped")]
pub struct Closed;

impl Engine {
    /// Starts one thread for each lane; they work with `table` from their first packet on.
    ///
    /// # Errors
    ///
    /// [`EngineError::LaneCount`], [`EngineError::Start`]; nothing keeps running then.
    pub fn start(config: EngineConfig, table: Arc<Table>, lanes: Vec<LaneParts>) -> Result<Self, EngineError> {
        if !lanes.len().is_power_of_two() || lanes.len() > MAX_LANES {
            return Err(EngineError::LaneCount(lanes.len()));
        }
        let count = lanes.len();
        let (sender, receiver) = mpsc::sync_channel(EVENTS);
        let mut engine = Self { lanes: Vec::with_capacity(count), events: Mutex::new(Some(receiver)) };
        for (number, parts) in lanes.into_iter().enumerate() {
            let start = || -> io::Result<Running> {
                let mut seed = [0; 32];
                getrandom::fill(&mut seed).map_err(io::Error::other)?;
                let lane_config = LaneConfig {
                    lane: number,
                    lanes: count,
                    flow_key: config.flow_key,
                    handshakes_per_second: config.handshakes_per_second,
                    dscp: config.dscp,
                    seed,
                };
                let lane = Lane::new(lane_config, Arc::clone(&table), clock::Instant::now());
                let mailbox = Arc::new(Mailbox::new()?);
                let first = engine.lanes.first().map(|first| Arc::clone(&first.mailbox));
                let worker = Worker::new(lane, parts, Mailboxes { own: Arc::clone(&mailbox), first }, sender.clone())?;
                let worker = worker.with_busy_poll(config.busy_poll);
                let run = move || {
                    if config.pin {
                        placement::pin(number);
                    }
                    worker.run();
                };
                let thread = thread::Builder::new().name(format!("lane-{number}")).spawn(run)?;
                Ok(Running { mailbox, thread: Some(thread) })
            };
            let running = start().map_err(|source| EngineError::Start { lane: number, source })?;
            engine.lanes.push(running);
        }
        Ok(engine)
    }

    /// Number of lanes.
    pub fn lanes(&self) -> usize {
        self.lanes.len()
    }

    /// All lanes use `table` from their next round on. Never fails and never waits: only the newest table counts.
    pub fn set_table(&self, table: Arc<Table>) {
        for lane in &self.lanes {
            lane.mailbox.set_table(Arc::clone(&table));
        }
    }

    /// Hands a command to the lane that it concerns.
    ///
    /// # Errors
    ///
    /// [`EngineError::Busy`], [`EngineError::Stopped`], [`EngineError::NoLane`]: the command was not taken.
    pub fn command(&self, command: Command) -> Result<(), EngineError> {
        match command {
            Command::SetTable(table) => {
                self.set_table(table);
                Ok(())
            }
            // Flows of the other lanes would have no session until the peer gives the old one up.
            Command::Initiate(peer) => {
                (0..self.lanes.len()).try_for_each(|lane| self.post(lane, Letter::Initiate(peer)))
            }
            Command::Redirect(peers) => {
                let peers: Arc<[(PeerId, SocketAddr)]> = peers.into();
                (0..self.lanes.len()).try_for_each(|lane| self.post(lane, Letter::Redirect(Arc::clone(&peers))))
            }
            Command::Agree(agreement) => {
                // Every lane that has a share gets it, whatever becomes of the others.
                let concerned = |lane: &usize| agreement.pairs.iter().any(|pair| pair.lanes.local == *lane);
                let post = |lane| self.post(lane, Letter::Agree(Arc::clone(&agreement)));
                (0..self.lanes.len()).filter(concerned).map(post).fold(Ok(()), Result::and)
            }
            Command::Expect(marks) => {
                let post = |lane| self.post(lane, Letter::Expect(Arc::clone(&marks)));
                (0..self.lanes.len()).map(post).fold(Ok(()), Result::and)
            }
            Command::SendDatagram { lane, to, bytes } => self.post(lane, Letter::Send(to, bytes)),
        }
    }

    /// Begins a handshake with `peer` now; see [`Command::Initiate`].
    ///
    /// # Errors
    ///
    /// As [`command`](Self::command).
    pub fn initiate(&self, peer: PeerId) -> Result<(), EngineError> {
        self.command(Command::Initiate(peer))
    }

    /// Gives a lane a new TUN queue in place of the one it has or lost.
    ///
    /// # Errors
    ///
    /// As [`command`](Self::command).
    pub fn replace_queue(&self, lane: usize, queue: Box<dyn Queue>) -> Result<(), EngineError> {
        self.post(lane, Letter::Queue(queue))
    }

    /// Gives a lane a new socket in place of the one it has: on another port, say.
    ///
    /// # Errors
    ///
    /// As [`command`](Self::command).
    pub fn replace_socket(&self, lane: usize, socket: Box<dyn Socket>) -> Result<(), EngineError> {
        self.post(lane, Letter::Socket(socket))
    }

    /// Asks all lanes for their counters. Waits for them up to a second; one that does not answer is missing.
    pub fn snapshot(&self) -> Snapshot {
        let (sender, receiver) = mpsc::sync_channel(self.lanes.len());
        let mut asked = 0;
        for lane in 0..self.lanes.len() {
            asked += usize::from(self.post(lane, Letter::Snapshot(sender.clone())).is_ok());
        }
        drop(sender);
        let deadline = Instant::now() + SNAPSHOT_PATIENCE;
        let mut answers = Vec::with_capacity(asked);
        for _ in 0..asked {
            let patience = deadline.saturating_duration_since(Instant::now());
            let Ok(answer) = receiver.recv_timeout(patience) else { break };
            answers.push(answer);
        }
        // Lane 0 has the first word about a peer's endpoint.
        answers.sort_by_key(|(lane, _)| lane.lane);
        let mut snapshot = Snapshot::default();
        for (lane, peers) in answers {
            snapshot.merge(lane, peers);
        }
        snapshot
    }

    /// The events of all lanes; they can be taken once.
    pub fn take_events(&mut self) -> Option<Events> {
        self.events.get_mut().unwrap_or_else(PoisonError::into_inner).take().map(Events)
    }

    /// True while every lane's thread runs.
    pub fn is_running(&self) -> bool {
        let running = |lane: &Running| lane.thread.as_ref().is_some_and(|thread| !thread.is_finished());
        self.lanes.iter().all(running)
    }

    /// Stops all lanes and waits for their threads. Returns the numbers of lanes that had panicked.
    pub fn stop(mut self) -> Vec<usize> {
        self.end()
    }

    fn end(&mut self) -> Vec<usize> {
        for lane in &self.lanes {
            lane.mailbox.stop();
        }
        let mut panicked = Vec::new();
        for (number, lane) in self.lanes.iter_mut().enumerate() {
            if let Some(thread) = lane.thread.take()
                && thread.join().is_err()
            {
                panicked.push(number);
            }
        }
        panicked
    }

    fn post(&self, lane: usize, letter: Letter) -> Result<(), EngineError> {
        let running = self.lanes.get(lane).ok_or(EngineError::NoLane(lane))?;
        if running.thread.as_ref().is_none_or(JoinHandle::is_finished) {
            return Err(EngineError::Stopped(lane));
        }
        running.mailbox.post(letter).map_err(|_| EngineError::Busy(lane))
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.end();
    }
}
