//! A node's session as the directory sees it: how it opens, and what it starts with.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_protocol::cbor;
use mesh_protocol::control::{ITEMS_BYTES_PER_FRAME, Refusal, RefusalCode, ServerMessage};
use mesh_protocol::envelope::Envelope;
use mesh_protocol::frame;
use mesh_protocol::id::{MeshId, Name, NodeId, Position};
use mesh_protocol::key::VerifyKey;
use tokio::sync::mpsc;
use tracing::{info, warn};

use super::{Directory, refusal, unix_now, watch};

/// An encoded message, shared by all who get it.
pub(crate) type Frame = Arc<[u8]>;

/// Frames that wait for one session: pointers, 16 KiB; the frames themselves are shared. Full: the session is closed,
/// and resumes.
const QUEUE: usize = 1_024;

/// So many sessions taken over from another address within this time are no move of one machine.
const TAKEOVERS: u32 = 3;
/// See [`TAKEOVERS`].
const TAKEOVERS_WITHIN: Duration = Duration::from_secs(600);

/// One session of one node. A later one of the same node makes it stale.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SessionKey {
    /// Which node.
    pub(crate) node: NodeId,
    /// Which session.
    pub(crate) id: u64,
}

/// What a session starts with.
#[derive(Debug)]
pub(crate) struct Opening {
    /// Its key.
    pub(crate) key: SessionKey,
    /// Sent first, in order.
    pub(crate) first: Vec<Frame>,
    /// Sent from then on, until it ends.
    pub(crate) rest: mpsc::Receiver<Frame>,
}

/// What a node said first.
#[derive(Debug)]
pub(crate) struct Hello {
    /// The key of the TLS handshake.
    pub(crate) identity: VerifyKey,
    /// The mesh it belongs to.
    pub(crate) mesh: MeshId,
    /// Where it stands.
    pub(crate) position: Option<Position>,
    /// Newest policy it holds.
    pub(crate) policy_version: u64,
}

impl Directory {
    /// Opens a session of a member.
    pub(crate) fn open_session(&mut self, node: NodeId, peer: SocketAddr, hello: &Hello) -> Result<Opening, Refusal> {
        if self.view().member(node).is_none() {
            return Err(refusal(RefusalCode::Revoked, "not a member"));
        }
        if hello.mesh != self.mesh() {
            return Err(refusal(RefusalCode::BadMessage, format!("this is not a keyserver of mesh {}", hello.mesh)));
        }
        let ahead = |position: Position| {
            position.epoch == self.position().epoch && position.revision > self.position().revision
        };
        if hello.position.is_some_and(ahead) {
            warn!(node = %node.short(), "node knows more than this keyserver: was its store restored from a copy?");
            self.alarm(format!("node {} knows more than this keyserver: was its store restored?", node.short()));
        }
        if self.broken {
            self.read_back()?;
        }
        self.renew_grant_of(node);
        self.flush();
        let first = self.first_frames(node, peer, hello)?;
        let name = self.view().member(node).map(|member| member.grant.object.name.clone());
        let name = name.ok_or_else(|| refusal(RefusalCode::Revoked, "not a member"))?;
        info!(node = %name, %peer, "session open");
        self.watch_takeover(node, &name, peer);
        let (queue, rest) = mpsc::channel(QUEUE);
        let key = self.hub.connect(node, name, (hello.identity, peer), queue);
        self.ask_again(node);
        Ok(Opening { key, first, rest })
    }

    /// Sessions of one identity that take over from each other, from two addresses in turns, are two machines.
    fn watch_takeover(&mut self, node: NodeId, name: &Name, peer: SocketAddr) {
        let Some(before) = self.hub.sessions().get(&node).map(|session| session.peer.ip()) else { return };
        let now = Instant::now();
        if before == peer.ip() {
            return;
        }
        self.takeovers.retain(|_, (_, since)| now.saturating_duration_since(*since) < TAKEOVERS_WITHIN);
        let (count, _) = self.takeovers.entry(node).or_insert((0, now));
        *count += 1;
        if *count >= TAKEOVERS {
            let (one, other) = (before.min(peer.ip()), before.max(peer.ip()));
            warn!(node = %name, %one, %other, "two machines take over each other's session");
            self.alarm(format!("node {name} is at work at {one} and at {other}: two machines with one identity"));
        }
    }

    fn first_frames(&mut self, node: NodeId, peer: SocketAddr, hello: &Hello) -> Result<Vec<Frame>, Refusal> {
        let checkpoint = self.checkpoint();
        let member = self.view().member(node).ok_or_else(|| refusal(RefusalCode::Revoked, "not a member"))?;
        let own_record = member.record.as_ref().map(|record| record.envelope.clone());
        let own_grant = member.grant.envelope.clone();
        // A record may be half a frame long: policies get what is left, the others come as items.
        let taken = [Some(&own_grant), own_record.as_ref(), Some(&checkpoint)];
        let taken: usize = taken.into_iter().flatten().map(|envelope| cbor::to_vec(envelope).len()).sum();
        let policies = self.policies_above(hello.policy_version, ITEMS_BYTES_PER_FRAME.saturating_sub(taken));
        let checkpoint_too = checkpoint.clone();
        let welcome =
            ServerMessage::Welcome { checkpoint: checkpoint_too, policies, own_record, own_grant, observed: peer };
        let welcome = frame::encode(&welcome).map_err(|error| refusal(RefusalCode::Unavailable, error.to_string()))?;
        let mut frames: Vec<Frame> = vec![welcome.into()];
        let resumed = hello.position.and_then(|from| Some((from, self.history.since(from)?)));
        frames.extend(match resumed {
            Some((from, changes)) => watch::delta(from, changes, &checkpoint),
            None => watch::full(self.position(), self.view().envelopes().cloned().collect(), &checkpoint),
        });
        frames.extend(watch::live(self.live_endpoints()));
        Ok(frames)
    }

    fn policies_above(&self, version: u64, mut room: usize) -> Vec<Envelope> {
        let newer = self.view().policies().iter().filter(|policy| policy.object.version > version);
        let fitting = newer.map(|policy| &policy.envelope).take_while(|envelope| {
            let length = cbor::to_vec(*envelope).len();
            let fits = length <= room;
            room = if fits { room - length } else { 0 };
            fits
        });
        fitting.cloned().collect()
    }

    fn live_endpoints(&self) -> Vec<Envelope> {
        let now = unix_now();
        let endpoints = self.view().members().filter_map(|(_, member)| member.endpoints_to_show());
        endpoints.filter(|endpoints| endpoints.object.expires > now).map(|held| held.envelope.clone()).collect()
    }

    /// Whether this session is its node's newest, and the node a member.
    pub(crate) fn is_current(&self, key: SessionKey) -> bool {
        self.hub.is_current(key)
    }

    /// A session ended.
    pub(crate) fn close_session(&mut self, key: SessionKey) {
        if self.hub.is_current(key) {
            info!(node = %key.node.short(), "session closed");
        }
        self.hub.disconnect(key);
    }

    /// A node has everything up to `position` in force.
    pub(crate) fn applied(&mut self, key: SessionKey, position: Position) {
        self.hub.applied(key, position);
    }
}
