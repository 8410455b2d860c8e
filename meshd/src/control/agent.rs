//! What follows from what the keyserver says and from what the rest of `meshd` asks: directory, own record, rotation,
//! exposure. A plain struct: events, clock readings in; messages, facts out. Only its files are written here, because
//! an own record must be on disk before anybody hears of it.

mod own;
mod peers;
mod rotation;
mod succession;

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_protocol::UnixSeconds;
use mesh_protocol::control::{NodeMessage, Refusal, RefusalCode};
use mesh_protocol::envelope::Envelope;
use mesh_protocol::id::{NodeId, Position};
use mesh_protocol::peer::RecordHead;

pub(crate) use rotation::Rotations;

use super::ControlSetup;
use super::session::SessionEvent;
use crate::directory::{Alarms, Batch, Directory, Exposure, UNCONFIRMED_ALARM, Viewpoint, alarm};
use crate::exchange::Exchange;
use crate::facts::{DirectoryFacts, HostFacts, OwnKeys};
use crate::identity::Identity;

/// How often timers are looked at: a minute is what checkpoints, grants and exposure are counted in.
const TICK: Duration = Duration::from_secs(60);
/// A clock that stepped back by less than this is a clock being disciplined.
const CLOCK_TOLERANCE: UnixSeconds = 2;
/// From here on an expiring grant is somebody's business.
const EXPIRY_WARNING: UnixSeconds = 30 * 24 * 60 * 60;

/// Two readings of time: for spans, and for what is signed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Now {
    /// Running time.
    pub(crate) instant: Instant,
    /// Seconds since 1970.
    pub(crate) wall: UnixSeconds,
}

/// The changes received leave a hole: the session has to start over, with everything.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the keyserver's changes leave a gap, asking for everything")]
pub(super) struct StartOver;

/// Everything that a control session works on.
#[derive(Debug)]
pub(super) struct Agent {
    setup: ControlSetup,
    identity: Identity,
    directory: Directory,
    exposure: Exposure,
    exchange: Exchange,
    /// The own record in short, as hashed last.
    own_head: Option<RecordHead>,
    host: HostFacts,
    observed: Option<SocketAddr>,
    applied: Option<Position>,
    /// The session is open, so what is queued has somebody to hear it.
    open: bool,
    /// Ask for everything with the next session.
    want_all: bool,
    published: Option<u64>,
    /// `seq` of the newest promotion, until the keyserver has it.
    promoted: Option<u64>,
    /// What the keyserver may still ask for.
    asked: rotation::AskedAllowance,
    rotations: Rotations,
    /// What the keyserver said to the next identity key.
    answer: succession::Answer,
    /// The identity key is another one than the session was opened with.
    reconnect: bool,
    endpoints: Option<(Vec<SocketAddr>, Instant)>,
    next_tick: Instant,
    /// Facts may differ from those given out last.
    facts_due: bool,
    /// Own objects and answers: bounded by what one event causes, drained after each.
    out: VecDeque<NodeMessage>,
}

impl Agent {
    /// Takes over what is on disk. A wall clock behind the stored mark promotes the spare key: peers refuse handshake
    /// timestamps that go back.
    pub(super) fn new(
        setup: ControlSetup,
        identity: Identity,
        directory: Directory,
        host: HostFacts,
        now: Now,
    ) -> Self {
        // Peers are chosen by it, nothing secret: the node's own id does if there are no random bytes.
        let [a, b, c, d, e, f, g, h, ..] = *identity.node().as_bytes();
        let seed = getrandom::u64().unwrap_or(u64::from_be_bytes([a, b, c, d, e, f, g, h]));
        let exposure = Exposure::resumed(directory.runtime().unconfirmed, now.instant);
        let mut agent = Self {
            setup,
            identity,
            directory,
            exposure,
            exchange: Exchange::new(now.instant, seed),
            own_head: None,
            host,
            observed: None,
            applied: None,
            open: false,
            want_all: false,
            published: None,
            promoted: None,
            asked: rotation::AskedAllowance::new(now.instant),
            rotations: Rotations::default(),
            answer: succession::Answer::default(),
            reconnect: false,
            endpoints: None,
            next_tick: now.instant,
            facts_due: true,
            out: VecDeque::new(),
        };
        agent.check_clock(now);
        agent
    }

    fn check_clock(&mut self, now: Now) {
        let mark = self.directory.clock_mark();
        if now.wall.saturating_add(CLOCK_TOLERANCE) >= mark {
            return;
        }
        let behind = mark - now.wall;
        let message = format!("the wall clock stepped back by {behind} s: keys are rotated, so that peers listen");
        self.alarms().raise(alarm::CLOCK, "", message, now.instant);
        match self.promote(true, now) {
            Ok(_) => {
                self.rotations.clock += 1;
                self.directory.set_runtime(self.exposure.unconfirmed(now.instant), now.wall, None);
            }
            Err(error) => self.storage_failed(&error.to_string(), now),
        }
    }

    /// The first message of a session.
    pub(super) fn hello(&mut self) -> NodeMessage {
        self.directory.begin_stream();
        let position = if self.want_all { None } else { self.directory.position() };
        let replaced = !self.identity.grant().succession.is_empty();
        NodeMessage::Hello {
            mesh: self.identity.mesh(),
            position,
            policy_version: self.directory.view().policy().version,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            grant: replaced.then(|| self.identity.membership().grant.clone()),
        }
    }

    /// Takes what a session brings.
    ///
    /// # Errors
    /// [`StartOver`]: close the session and open another.
    pub(super) fn handle_event(&mut self, event: SessionEvent, now: Now) -> Result<(), StartOver> {
        self.facts_due = true;
        match event {
            SessionEvent::Welcome { checkpoint, policies, own_record, own_grant, observed } => {
                self.handle_welcome(&checkpoint, &policies, own_record.as_ref(), &own_grant, observed, now);
            }
            SessionEvent::Items { from, to, items, checkpoint } => {
                let batch = Batch { from, to, items: &items, checkpoint: checkpoint.as_ref() };
                return self.handle_batch(&batch, now);
            }
            SessionEvent::Live(items) => self.directory.apply_live(&items, now.instant),
            SessionEvent::Published { seq, endpoints: false } => {
                self.published = self.published.max(Some(seq));
                self.promoted.take_if(|promoted| *promoted <= seq);
                self.alarms().clear(alarm::PUBLISH);
                self.settle_identity(now);
            }
            SessionEvent::Published { .. } => {}
            SessionEvent::Checkpoint(checkpoint) => self.handle_checkpoint(&checkpoint, now),
            SessionEvent::Rotate { request, force, after } => self.handle_rotate(request, force, after, now),
            SessionEvent::Succession { identity, granted, refusal } => {
                self.handle_succession(identity, granted, refusal.as_ref());
            }
            SessionEvent::Refused(refusal) => self.handle_refusal(&refusal, now),
        }
        Ok(())
    }

    fn handle_welcome(
        &mut self,
        checkpoint: &Envelope,
        policies: &[Envelope],
        own_record: Option<&Envelope>,
        own_grant: &Envelope,
        observed: SocketAddr,
        now: Now,
    ) {
        self.open = true;
        self.observed = Some(observed);
        let (whole, version) = (self.directory.is_whole(), self.directory.view().policy().version);
        for policy in policies {
            self.directory.apply(policy, now.instant);
        }
        if self.directory.view().policy().version > version {
            self.directory.catch_up();
        }
        self.directory.apply(own_grant, now.instant);
        // What grants members anew follows.
        self.directory.wait_for_whole(whole, false, now.instant);
        self.handle_checkpoint(checkpoint, now);
        self.take_own_grant(now);
        if let Some(record) = own_record {
            self.meet_own_record(record, now);
        }
        self.publish_record(now);
        self.endpoints = None;
        self.publish_endpoints(now);
        if let Some(position) = self.applied {
            self.out.push_back(NodeMessage::Applied { position });
        }
        self.ask_succession();
    }

    fn handle_batch(&mut self, batch: &Batch<'_>, now: Now) -> Result<(), StartOver> {
        let (before, whole) = (self.checkpoint_time(), self.directory.is_whole());
        self.directory.apply_batch(batch, now.instant).map_err(|gap| {
            tracing::warn!(error = %gap, "directory changes do not attach");
            self.want_all = true;
            StartOver
        })?;
        self.directory.wait_for_whole(whole, batch.checkpoint.is_some(), now.instant);
        self.want_all = false;
        self.confirm_if_newer(before, now);
        self.take_own_grant(now);
        self.check_own_membership(now);
        Ok(())
    }

    fn handle_checkpoint(&mut self, checkpoint: &Envelope, now: Now) {
        if self.directory.apply_checkpoint(checkpoint, now.instant) {
            self.confirm(now);
        }
    }

    fn confirm_if_newer(&mut self, before: Option<UnixSeconds>, now: Now) {
        if self.checkpoint_time() > before {
            self.confirm(now);
        }
    }

    fn confirm(&mut self, now: Now) {
        self.exposure.confirm(now.instant);
        self.alarms().clear(alarm::UNCONFIRMED);
    }

    fn checkpoint_time(&self) -> Option<UnixSeconds> {
        self.directory.checkpoint_time()
    }

    fn handle_refusal(&mut self, refusal: &Refusal, now: Now) {
        tracing::warn!(code = ?refusal.code, error = %refusal, "keyserver refused a message");
        self.note_refusal(refusal);
        if matches!(refusal.code, RefusalCode::Record | RefusalCode::Revoked) {
            self.alarms().raise(alarm::PUBLISH, "", format!("the keyserver refused: {refusal}"), now.instant);
        }
    }

    /// Everything up to `position` is in force on this node.
    pub(super) fn set_applied(&mut self, position: Position) {
        if self.applied.replace(position) != Some(position) && self.open {
            self.out.push_back(NodeMessage::Applied { position });
        }
    }

    /// The host changed.
    pub(super) fn set_host(&mut self, host: HostFacts, now: Now) {
        self.facts_due = true;
        self.host = host;
        self.publish_endpoints(now);
    }

    /// The session is over, or did not begin. What it left half done a peer may bring to its end.
    pub(super) fn session_ended(&mut self) {
        self.open = false;
        self.published = None;
        self.answer = succession::Answer::default();
        self.out.clear();
    }

    /// The next message to send, until `None`.
    pub(super) fn poll_transmit(&mut self) -> Option<NodeMessage> {
        self.out.pop_front()
    }

    /// When to call [`Self::handle_timeout`].
    pub(super) fn poll_timeout(&self) -> Instant {
        self.directory.waits_until().map_or(self.next_tick, |until| until.min(self.next_tick))
    }

    /// Runs what is due. Tells whether it is time to store the runtime file.
    pub(super) fn handle_timeout(&mut self, now: Now) -> bool {
        if now.instant < self.next_tick {
            return false;
        }
        self.next_tick = now.instant + TICK;
        self.facts_due = true;
        self.check_clock(now);
        match self.identity.retire(now.wall) {
            Ok(true) => tracing::info!("previous key wiped"),
            Ok(false) => {}
            Err(error) => self.storage_failed(&error.to_string(), now),
        }
        self.rotate_if_due(now);
        if self.open {
            // Unless it is there: it may have been refused for a reason that has passed.
            self.publish_record(now);
            self.ask_succession();
        }
        self.settle_identity(now);
        self.publish_endpoints(now);
        self.raise_timed_alarms(now);
        self.check_own_membership(now);
        true
    }

    fn raise_timed_alarms(&mut self, now: Now) {
        let unconfirmed = self.exposure.unconfirmed(now.instant);
        if unconfirmed >= UNCONFIRMED_ALARM {
            let hours = unconfirmed.as_secs() / 3600;
            let message = format!("no fresh checkpoint for {hours} h of running time: is a keyserver reachable?");
            self.alarms().raise(alarm::UNCONFIRMED, "", message, now.instant);
        }
        let (expires, clock) = (self.identity.grant().expires, self.directory.expiry_clock(now.wall));
        if expires.saturating_sub(clock) < EXPIRY_WARNING {
            let days = expires.saturating_sub(clock) / 86_400;
            self.alarms().raise(
                alarm::EXPIRY,
                "",
                format!("the grant of this node expires in {days} days"),
                now.instant,
            );
        } else {
            self.alarms().clear(alarm::EXPIRY);
        }
    }

    fn check_own_membership(&mut self, now: Now) {
        if self.directory.is_own_revoked(self.identity.grant().generation) {
            let message = "this node is revoked: its tunnels are closed, and no peer answers it";
            self.alarms().raise(alarm::REVOKED, "", message.to_owned(), now.instant);
        } else {
            self.alarms().clear(alarm::REVOKED);
        }
    }

    /// A file could not be written: service goes on, somebody should know.
    pub(super) fn storage_failed(&mut self, error: &str, now: Now) {
        self.alarms().raise(alarm::STORAGE, "", error.to_owned(), now.instant);
    }

    /// Files can be written.
    pub(super) fn storage_works(&mut self) {
        self.alarms().clear(alarm::STORAGE);
    }

    /// The directory as the rest of `meshd` needs it.
    pub(super) fn facts(&mut self, now: Now) -> DirectoryFacts {
        let exposed = self.exposure.unconfirmed(now.instant) >= self.exposure_limit();
        let own = self.identity.grant().clone();
        let underlay = &self.host.underlay_addresses;
        self.directory.facts(&Viewpoint { own: &own, underlay, wall: now.wall, exposed })
    }

    /// Takes the flag that facts may have changed, and may be given out.
    pub(super) fn take_facts_due(&mut self, now: Now) -> bool {
        if self.directory.is_waiting(now.instant) {
            return false;
        }
        self.directory.end_wait();
        std::mem::take(&mut self.facts_due)
    }

    /// The own keys as the data plane needs them.
    pub(super) fn keys(&self) -> Arc<OwnKeys> {
        Arc::new(self.identity.own_keys())
    }

    /// Notes what changes all the time, to be stored with the runtime file.
    pub(super) fn note_runtime(&mut self, active: Option<&[u32]>, now: Now) {
        let active: Option<Vec<NodeId>> = active.map(|numbers| self.directory.nodes_numbered(numbers));
        let wall = now.wall.max(self.directory.clock_mark());
        self.directory.set_runtime(self.exposure.unconfirmed(now.instant), wall, active);
    }

    /// Running time without a fresh checkpoint.
    pub(super) fn exposure(&self) -> Exposure {
        self.exposure
    }

    /// How long that may last.
    pub(super) fn exposure_limit(&self) -> Duration {
        Duration::from_secs(self.directory.view().policy().exposure)
    }

    /// Whether the keyserver has the newest own record.
    pub(super) fn is_published(&self) -> bool {
        self.published == Some(self.identity.ring().seq())
    }

    /// How often the own keys were rotated.
    pub(super) fn rotations(&self) -> Rotations {
        self.rotations
    }

    /// Who this node is.
    pub(super) fn identity(&self) -> &Identity {
        &self.identity
    }

    /// What it believes.
    pub(super) fn directory(&mut self) -> &mut Directory {
        &mut self.directory
    }

    fn alarms(&mut self) -> &mut Alarms {
        self.directory.alarms()
    }
}
