//! The task around [`Agent`] and [`Session`]: connects, waits, stores, and tells the rest of `meshd` what changed.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use mesh_protocol::control::ALPN_NODE;
use mesh_protocol::key::VerifyKey;
use mesh_protocol::tls::ServerKeys;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::sleep_until;
use tracing::{info, warn};

use super::agent::{Agent, Now};
use super::backoff::Backoff;
use super::connect::{Dialer, Transport};
use super::link::{Link, LinkEvent};
use super::session::{Session, SessionEnd};
use super::{ControlReport, Rotation, Told};
use crate::directory::Files;
use crate::exchange::socket::{Datagram, Datagrams};
use crate::facts::{DirectoryFacts, OwnKeys};
use crate::state_dir::{StateDir, StateError};

/// A session that held for this long was a good one: the next wait is short again.
const GOOD_SESSION: Duration = Duration::from_secs(10);
/// After a session this long another transport may work than the one that did.
const REMEMBER_TRANSPORT: Duration = Duration::from_secs(60 * 60);
/// Least time between two writes, so that a stream of changes does not keep the disk busy.
const SAVE_EVERY: Duration = Duration::from_secs(1);
/// How long a peer that came up waits to be stored as one to shake hands with after a crash.
const GATHER_ACTIVE: Duration = Duration::from_millis(20);

/// Reads both clocks.
pub(crate) fn now() -> Now {
    let wall = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    Now { instant: Instant::now(), wall }
}

/// The sending halves of what [`ControlHandle`](super::ControlHandle) offers.
pub(super) struct Outlets {
    pub(super) facts: watch::Sender<Arc<DirectoryFacts>>,
    pub(super) keys: watch::Sender<Arc<OwnKeys>>,
    pub(super) report: watch::Sender<Arc<ControlReport>>,
}

/// The receiving halves.
pub(super) struct Inlets {
    pub(super) told: watch::Receiver<Told>,
    pub(super) rotations: mpsc::Receiver<Rotation>,
    /// What peers say inside the tunnels; `None` if the port could not be had.
    pub(super) datagrams: Option<Datagrams>,
}

/// The control task's state.
pub(super) struct Driver {
    agent: Agent,
    state: StateDir,
    keyservers: Vec<String>,
    mark: u32,
    /// Index of the keyserver tried now, and how it is reached.
    at: usize,
    preferred: Transport,
    /// Key of the keyserver connected to.
    server: Option<VerifyKey>,
    link: Option<Link>,
    session: Option<(Session, Instant)>,
    retry: Instant,
    backoff: Backoff,
    saving: Option<JoinHandle<Result<(), StateError>>>,
    next_save: Instant,
    runtime_due: bool,
    report: ControlReport,
    active: Option<Vec<u32>>,
}

impl Driver {
    /// Takes over an agent.
    pub(super) fn new(agent: Agent, keyservers: Vec<String>, mark: u32) -> Self {
        let now = Instant::now();
        let state = agent.identity().state().clone();
        Self {
            agent,
            state,
            keyservers,
            mark,
            at: 0,
            preferred: Transport::default(),
            server: None,
            link: None,
            session: None,
            retry: now,
            backoff: Backoff::default(),
            saving: None,
            next_save: now,
            runtime_due: false,
            report: ControlReport::default(),
            active: None,
        }
    }

    /// Runs until told to stop, or until nobody holds the handle.
    pub(super) async fn run(mut self, outlets: Outlets, mut inlets: Inlets) {
        loop {
            if self.agent.take_reconnect() {
                self.renew_session();
            }
            self.connect_if_due();
            self.agent.notice_news(now());
            self.flush();
            self.send_datagrams(&mut inlets.datagrams);
            self.tell(&outlets);
            self.save_if_due();
            let wake = self.wake();
            tokio::select! {
                event = next_event(&mut self.link) => self.handle_link(event),
                changed = inlets.told.changed() => {
                    let told = inlets.told.borrow_and_update().clone();
                    if changed.is_err() || told.stop {
                        break;
                    }
                    self.handle_told(told);
                }
                datagram = next_datagram(&mut inlets.datagrams) => {
                    self.agent.handle_datagram(datagram.from, &datagram.bytes, datagram.dropped, now());
                }
                Some(rotation) = inlets.rotations.recv() => self.handle_rotation(rotation, &outlets),
                result = saved(&mut self.saving) => self.handle_saved(result),
                () = sleep_until(wake.into()) => self.handle_timeout(),
            }
        }
        self.finish().await;
    }

    fn connect_if_due(&mut self) {
        if self.link.is_some() || Instant::now() < self.retry || self.keyservers.is_empty() {
            return;
        }
        let address = self.keyservers[self.at % self.keyservers.len()].clone();
        self.report.keyserver = Some(address.clone());
        let policy = self.agent.directory().view().policy();
        let dialer = Dialer {
            servers: ServerKeys::OneOf(policy.keyservers.clone()),
            key: self.agent.identity().key().clone(),
            alpn: ALPN_NODE,
            mark: self.mark,
        };
        self.link = Some(Link::start(dialer, address, self.preferred));
    }

    fn flush(&mut self) {
        let (Some(link), Some((session, _))) = (&self.link, &mut self.session) else { return };
        while let Some(message) = self.agent.poll_transmit() {
            session.send(message);
        }
        while let Some(message) = session.poll_transmit() {
            if !link.send(message) {
                return self.hang_up("the keyserver takes no messages");
            }
        }
    }

    /// Sends what is due to peers; from another address if this node's changed.
    fn send_datagrams(&mut self, datagrams: &mut Option<Datagrams>) {
        let address = self.agent.mesh_address();
        if datagrams.as_ref().is_some_and(|datagrams| datagrams.address() != address) {
            match Datagrams::bind(address) {
                Ok(moved) => *datagrams = Some(moved),
                Err(error) => warn!(%error, %address, "peers are not talked to"),
            }
        }
        while let Some((to, bytes)) = self.agent.poll_datagram(now()) {
            if let Some(datagrams) = datagrams {
                datagrams.send(to, &bytes);
            }
        }
    }

    fn handle_link(&mut self, event: LinkEvent) {
        let now = now();
        match event {
            LinkEvent::Up { transport, server } => {
                self.preferred = transport;
                self.server = Some(server);
                self.session = Some((Session::new(self.agent.hello(), now.instant), now.instant));
            }
            LinkEvent::Unknown(number) => {
                if let Some((session, _)) = &mut self.session {
                    session.handle_unknown(number);
                }
            }
            LinkEvent::Down(reason) => self.hang_up(&reason),
            LinkEvent::Message(message) => {
                let Some((session, _)) = &mut self.session else { return };
                let was_open = session.is_open();
                match session.handle_message(message, now.instant) {
                    Ok(None) => {}
                    Ok(Some(event)) => {
                        if let Err(error) = self.agent.handle_event(event, now) {
                            return self.hang_up(&error.to_string());
                        }
                    }
                    Err(end) => {
                        if end == SessionEnd::Replaced {
                            self.agent.identity_elsewhere(now);
                        }
                        return self.hang_up(&end.to_string());
                    }
                }
                if !was_open {
                    self.session_opened();
                }
                self.check_server_key();
            }
        }
    }

    fn session_opened(&mut self) {
        self.report.transport = Some(self.preferred.as_str());
        self.report.error = None;
        self.report.sessions += 1;
        let keyserver = self.report.keyserver.as_deref().unwrap_or_default();
        info!(keyserver, transport = self.preferred.as_str(), "control session open");
    }

    /// A key that was good for the policy held may not be in one just received.
    fn check_server_key(&mut self) {
        let named = &self.agent.directory().view().policy().keyservers;
        if self.server.is_some_and(|server| !named.contains(&server)) {
            self.hang_up("the newest trust policy does not name the key this keyserver answers with");
        }
    }

    fn hang_up(&mut self, reason: &str) {
        let now = Instant::now();
        let unanswered = self.session.as_ref().is_some_and(|(session, _)| !session.is_open());
        let lasted = self.session.take().filter(|(session, _)| session.is_open());
        let lasted = lasted.map_or(Duration::ZERO, |(_, since)| now.saturating_duration_since(since));
        if lasted >= REMEMBER_TRANSPORT {
            self.preferred = Transport::default();
        }
        if lasted >= GOOD_SESSION {
            self.backoff.reset();
        } else {
            // This one does not serve us: the next one's turn.
            self.at = (self.at + 1) % self.keyservers.len().max(1);
        }
        self.link = None;
        self.server = None;
        self.agent.session_ended();
        let wait = self.backoff.next(random());
        self.retry = now + wait;
        self.report.transport = None;
        // It gives unknown and revoked nodes neither message nor reason.
        let hint =
            if unanswered { " before it said a word: it may not know this node, or have revoked it" } else { "" };
        let reason = format!("{reason}{hint}");
        self.report.error = Some(reason.clone());
        warn!(error = reason, retry_ms = wait.as_millis(), "no control session");
    }

    /// Opens another session, at once: the identity key is another one.
    fn renew_session(&mut self) {
        (self.link, self.session, self.server) = (None, None, None);
        self.agent.session_ended();
        self.retry = Instant::now();
        (self.report.transport, self.report.error) = (None, None);
    }

    fn handle_told(&mut self, told: Told) {
        let now = now();
        if let Some(position) = told.applied {
            self.agent.set_applied(position);
        }
        self.agent.set_host(told.host, now);
        self.agent.set_live(&told.active, now);
        // Nobody up says nothing: right after a start it would wipe out whom to shake hands with at the next.
        if !told.active.is_empty() && self.active.as_ref() != Some(&told.active) {
            self.active = Some(told.active);
            // At once, not with the next save: the next start may be that of a crash. Of many that come up together some
            // gather in this time.
            self.runtime_due = true;
            self.next_save = self.next_save.min(now.instant + GATHER_ACTIVE);
        }
    }

    fn handle_rotation(&mut self, rotation: Rotation, outlets: &Outlets) {
        // Whoever asked may have gone; what was done holds.
        match rotation {
            Rotation::Promote { force, answer } => {
                let result = self.agent.rotate(force, now());
                self.tell(outlets);
                let _ = answer.send(result);
            }
            Rotation::Succeed { answer } => {
                let result = self.agent.succeed();
                self.tell(outlets);
                let _ = answer.send(result);
            }
        }
    }

    fn handle_timeout(&mut self) {
        let now = now();
        if let Some((session, _)) = &self.session
            && let Err(end) = session.handle_timeout(now.instant)
        {
            self.hang_up(&end.to_string());
        }
        self.runtime_due |= self.agent.handle_timeout(now);
        self.agent.handle_exchange_timeout(now);
    }

    fn wake(&mut self) -> Instant {
        let session = self.session.as_ref().map(|(session, _)| session.poll_timeout());
        let retry = (self.link.is_none() && !self.keyservers.is_empty()).then_some(self.retry);
        let save = (self.saving.is_none() && (self.runtime_due || self.agent.directory().is_unsaved()))
            .then_some(self.next_save);
        let exchange = self.agent.poll_exchange_timeout();
        let timers = [Some(self.agent.poll_timeout()), Some(exchange), session, retry, save];
        timers.into_iter().flatten().min().unwrap_or_else(|| Instant::now() + SAVE_EVERY)
    }

    fn tell(&mut self, outlets: &Outlets) {
        let now = now();
        if self.agent.take_facts_due(now) {
            let facts = self.agent.facts(now);
            outlets.facts.send_if_modified(|held| {
                **held != facts && {
                    *held = Arc::new(facts);
                    true
                }
            });
        }
        let seq = self.agent.identity().ring().seq();
        outlets.keys.send_if_modified(|held| {
            held.seq != seq && {
                *held = self.agent.keys();
                true
            }
        });
        self.refresh_report();
        outlets.report.send_if_modified(|held| {
            **held != self.report && {
                *held = Arc::new(self.report.clone());
                true
            }
        });
    }

    fn refresh_report(&mut self) {
        let report = &mut self.report;
        report.published = self.agent.is_published();
        report.identity = Some(self.agent.identity_status());
        report.seq = self.agent.identity().ring().seq();
        report.rotations = self.agent.rotations();
        report.exposure = self.agent.exposure_limit();
        (report.unconfirmed, report.read) = self.agent.exposure().reading();
        let exchange = self.agent.exchange().counters();
        if report.exchange != exchange {
            report.exchange = exchange;
            report.acknowledged = Arc::new(self.agent.exchange().acknowledged());
        }
        let directory = self.agent.directory();
        report.equivocations = directory.equivocations();
        report.position = directory.position();
        report.stale = directory.is_stale();
        report.refused = directory.refused();
        report.alarms = directory.alarms().standing();
    }

    fn save_if_due(&mut self) {
        let now = now();
        let whole = self.agent.directory().is_unsaved();
        if self.saving.is_some() || now.instant < self.next_save || !(whole || self.runtime_due) {
            return;
        }
        let files = self.files(whole, now);
        let state = self.state.clone();
        self.next_save = now.instant + SAVE_EVERY;
        self.saving = Some(tokio::task::spawn_blocking(move || files.store(&state)));
    }

    fn files(&mut self, whole: bool, now: Now) -> Files {
        self.runtime_due = false;
        self.agent.note_runtime(self.active.as_deref(), now);
        if whole {
            self.agent.directory().mark_saved();
        }
        self.agent.directory().files(whole)
    }

    fn handle_saved(&mut self, result: Result<(), String>) {
        match result {
            Ok(()) => self.agent.storage_works(),
            Err(error) => {
                // Tried again with the next tick; until then the disk holds what it held.
                self.agent.storage_failed(&error, now());
                self.agent.directory().mark_unsaved();
                self.next_save = Instant::now() + SAVE_EVERY * 10;
            }
        }
    }

    async fn finish(mut self) {
        self.link = None;
        if let Some(saving) = self.saving.take() {
            // Its result no longer matters: everything is stored once more below.
            let _ = saving.await;
        }
        let files = self.files(true, now());
        if let Err(error) = files.store(&self.state) {
            warn!(%error, "state not stored at stop");
        }
    }
}

async fn next_event(link: &mut Option<Link>) -> LinkEvent {
    match link {
        Some(link) => link.next().await,
        None => std::future::pending().await,
    }
}

async fn next_datagram(datagrams: &mut Option<Datagrams>) -> Datagram {
    match datagrams {
        Some(datagrams) => datagrams.next().await,
        None => std::future::pending().await,
    }
}

async fn saved(saving: &mut Option<JoinHandle<Result<(), StateError>>>) -> Result<(), String> {
    let Some(task) = saving else { return std::future::pending().await };
    let result = task.await;
    *saving = None;
    match result {
        Ok(result) => result.map_err(|error| error.to_string()),
        Err(error) => Err(error.to_string()),
    }
}

/// A number for jitter; without random bytes there is no jitter.
fn random() -> u32 {
    getrandom::u32().unwrap_or(u32::MAX / 2)
}
