//! Fan-out: who is connected, and what goes to all of them. Each frame is encoded once and shared.
//!
//! Changes within 50 ms travel together; a revocation takes along what waits, at once. A session that does not keep up
//! loses its queue: it is closed, and resumes where it stands.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use mesh_protocol::control::{ServerMessage, runs};
use mesh_protocol::envelope::{Envelope, Kind};
use mesh_protocol::frame;
use mesh_protocol::id::{Name, NodeId, Position};
use mesh_protocol::key::VerifyKey;
use mesh_protocol::trust::beginning;
use tokio::sync::{mpsc, watch};
use tracing::{error, warn};

use super::session::{Frame, SessionKey};

/// How long changes wait for company.
const GATHER: Duration = Duration::from_millis(50);
/// A checkpoint this often.
const MINUTE: Duration = Duration::from_secs(60);
/// Changes that wait at most before they are shown.
const MAX_GATHERED: usize = 1_024;

/// One connected node.
#[derive(Debug)]
pub(super) struct Connected {
    pub(super) id: u64,
    pub(super) name: Name,
    /// The key it showed.
    pub(super) identity: VerifyKey,
    pub(super) peer: SocketAddr,
    /// What is in force there.
    pub(super) applied: Option<Position>,
    queue: mpsc::Sender<Frame>,
}

/// All connected nodes.
pub(super) struct Hub {
    sessions: BTreeMap<NodeId, Connected>,
    next_id: u64,
    shown: Position,
    changes: Vec<Envelope>,
    live: BTreeMap<NodeId, Envelope>,
    gather_until: Option<Instant>,
    at_once: bool,
    minute: Instant,
    progress: watch::Sender<u64>,
}

impl Hub {
    pub(super) fn new(shown: Position) -> Self {
        Self {
            sessions: BTreeMap::new(),
            next_id: 1,
            shown,
            changes: Vec::new(),
            live: BTreeMap::new(),
            gather_until: None,
            at_once: false,
            minute: Instant::now() + MINUTE,
            progress: watch::channel(0).0,
        }
    }

    pub(super) fn sessions(&self) -> &BTreeMap<NodeId, Connected> {
        &self.sessions
    }

    /// Rises whenever a node confirmed, came, went or spoke.
    pub(super) fn progress(&self) -> watch::Receiver<u64> {
        self.progress.subscribe()
    }

    /// How often [`Self::progressed`] was called.
    pub(super) fn happened(&self) -> u64 {
        *self.progress.borrow()
    }

    pub(super) fn progressed(&self) {
        self.progress.send_modify(|count| *count += 1);
    }

    pub(super) fn has_changes(&self) -> bool {
        !self.changes.is_empty() || !self.live.is_empty()
    }

    pub(super) fn changes_due(&self) -> bool {
        self.at_once
            || self.changes.len() >= MAX_GATHERED
            || self.gather_until.is_some_and(|until| until <= Instant::now())
    }

    pub(super) fn minute_due(&mut self) -> bool {
        let due = self.minute <= Instant::now();
        if due {
            self.minute = Instant::now() + MINUTE;
        }
        due
    }

    pub(super) fn due(&self) -> Instant {
        self.gather_until.map_or(self.minute, |until| until.min(self.minute))
    }

    /// A change of the history.
    pub(super) fn changed(&mut self, envelope: Envelope) {
        self.at_once |= envelope.kind() == Kind::Revocation;
        self.changes.push(envelope);
        self.gather_until.get_or_insert_with(|| Instant::now() + GATHER);
    }

    /// New endpoints of a node.
    pub(super) fn moved(&mut self, node: NodeId, envelope: Envelope) {
        self.live.insert(node, envelope);
        self.gather_until.get_or_insert_with(|| Instant::now() + GATHER);
    }

    /// Sends everything that waits.
    pub(super) fn flush(&mut self, position: Position, checkpoint: &Envelope) {
        self.gather_until = None;
        self.at_once = false;
        let changes = std::mem::take(&mut self.changes);
        let mut frames = delta(self.shown, changes, checkpoint);
        self.shown = position;
        frames.extend(live(std::mem::take(&mut self.live).into_values().collect()));
        for frame in frames {
            self.broadcast(&frame);
        }
    }

    pub(super) fn send_checkpoint(&mut self, checkpoint: &Envelope) {
        if let Some(frame) = encode(&ServerMessage::Checkpoint { checkpoint: checkpoint.clone() }) {
            self.broadcast(&frame);
        }
    }

    fn broadcast(&mut self, frame: &Frame) {
        self.sessions.retain(|_, session| {
            let kept = session.queue.try_send(frame.clone()).is_ok();
            if !kept {
                warn!(node = %session.name, "session does not keep up, it is closed");
            }
            kept
        });
    }

    /// Sends one node a message; whether it is connected.
    pub(super) fn send(&mut self, node: NodeId, message: &ServerMessage) -> bool {
        let Some(frame) = encode(message) else { return false };
        let sent = self.sessions.get(&node).is_some_and(|session| session.queue.try_send(frame).is_ok());
        if !sent {
            self.sessions.remove(&node);
        }
        sent
    }

    /// Adds a session; one that the node had before is told and closed.
    pub(super) fn connect(
        &mut self,
        node: NodeId,
        name: Name,
        (identity, peer): (VerifyKey, SocketAddr),
        queue: mpsc::Sender<Frame>,
    ) -> SessionKey {
        self.send(node, &ServerMessage::Replaced { node });
        let id = self.next_id;
        self.next_id += 1;
        self.sessions.insert(node, Connected { id, name, identity, peer, applied: None, queue });
        self.progressed();
        SessionKey { node, id }
    }

    pub(super) fn is_current(&self, key: SessionKey) -> bool {
        self.sessions.get(&key.node).is_some_and(|session| session.id == key.id)
    }

    pub(super) fn disconnect(&mut self, key: SessionKey) {
        if self.is_current(key) {
            self.remove(key.node);
        }
    }

    /// Closes a node's session once its queue is sent.
    pub(super) fn remove(&mut self, node: NodeId) {
        self.sessions.remove(&node);
        self.progressed();
    }

    pub(super) fn applied(&mut self, key: SessionKey, position: Position) {
        if let Some(session) = self.sessions.get_mut(&key.node).filter(|session| session.id == key.id) {
            session.applied = Some(position);
        }
        self.progressed();
    }
}

pub(super) fn encode<T: frame::Message>(message: &T) -> Option<Frame> {
    match frame::encode(message) {
        Ok(bytes) => Some(bytes.into()),
        Err(error) => {
            error!(%error, "a message does not fit a frame");
            None
        }
    }
}

/// Frames with `changes`, each of which is one revision, for who stands at `from`.
pub(super) fn delta(from: Position, changes: Vec<Envelope>, checkpoint: &Envelope) -> Vec<Frame> {
    let mut at = from;
    let runs = runs(changes);
    let last = runs.len().saturating_sub(1);
    let message = |(number, items): (usize, Vec<Envelope>)| {
        let from = at;
        at.revision += items.len() as u64;
        let checkpoint = (number == last).then(|| checkpoint.clone());
        encode(&ServerMessage::Items { from, to: at, items, checkpoint })
    };
    runs.into_iter().enumerate().filter_map(message).collect()
}

/// Frames with everything, for who stands anywhere.
pub(super) fn full(to: Position, items: Vec<Envelope>, checkpoint: &Envelope) -> Vec<Frame> {
    let from = beginning(to.epoch);
    let runs = runs(items);
    let last = runs.len().saturating_sub(1);
    let message = |(number, items): (usize, Vec<Envelope>)| {
        let (to, checkpoint) = if number == last { (to, Some(checkpoint.clone())) } else { (from, None) };
        encode(&ServerMessage::Items { from, to, items, checkpoint })
    };
    runs.into_iter().enumerate().filter_map(message).collect()
}

/// Frames with endpoints.
pub(super) fn live(items: Vec<Envelope>) -> Vec<Frame> {
    runs(items).into_iter().filter_map(|items| encode(&ServerMessage::Live { items })).collect()
}
