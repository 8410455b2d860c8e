//! Pods: who has which address, on disk before anybody hears of it.
//!
//! ```text
//! api ── attach, detach, collect ──┐
//! released/ (mesh-cni, while meshd was down) ─┼─> pods thread: ipam ─ disk ─> leases ─> reconciliation
//! links that are gone ─────────────┘
//! ```
//!
//! One thread owns the leases. Requests that wait are written together: two hundred pods started at once cost a few
//! writes, not two hundred.

mod disk;
mod ipam;
mod leaks;
mod released;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use ipnet::IpNet;
use mesh_protocol::local::{Attachment, Lease, LocalError, LocalErrorCode};
use tokio::sync::{oneshot, watch};
use tracing::{info, warn};

use crate::config::Config;
use crate::state_dir::{StateDir, StateError};
use ipam::{Entry, Ipam, IpamError};
use leaks::Leaks;

/// Requests that wait at most. One is under 2 KiB; callers wait their turn when it is full.
const REQUESTS: usize = 512;
/// How often the released directory and the links are looked at.
const HOUSEKEEPING: Duration = Duration::from_secs(10);

/// What the pods thread is asked for. Each answer comes when it is on disk.
enum Request {
    Attach { attachment: Attachment, pod: Option<String>, answer: oneshot::Sender<Result<Lease, LocalError>> },
    Detach { attachment: Attachment, answer: oneshot::Sender<Result<(), LocalError>> },
    Check { attachment: Attachment, answer: oneshot::Sender<Option<Lease>> },
    Room { answer: oneshot::Sender<Result<(), LocalError>> },
    Collect { valid: BTreeSet<Attachment>, answer: oneshot::Sender<Result<u32, LocalError>> },
    Cidrs(Vec<IpNet>),
    Links(Vec<String>),
    Mtu(u16),
    Stop,
}

/// The running pods thread.
#[derive(Debug)]
pub(crate) struct Pods {
    requests: SyncSender<Request>,
    /// Leases that are on disk.
    pub(crate) leases: watch::Receiver<Arc<Vec<Lease>>>,
    thread: Option<JoinHandle<()>>,
}

/// What every lease says besides its addresses.
#[derive(Debug, Clone)]
struct Terms {
    mtu: u16,
    link_group: u32,
    table: u32,
    route_protocol: u8,
}

impl Pods {
    /// Reads the leases and starts the thread. `links` are the host ends of pod links that exist.
    ///
    /// # Errors
    /// [`StateError`].
    pub(crate) fn start(
        state: StateDir,
        config: &Config,
        cidrs: Vec<IpNet>,
        links: Vec<String>,
        mtu: u16,
    ) -> Result<Self, StateError> {
        let host = &config.host;
        let terms =
            Terms { mtu, link_group: host.pod_link_group, table: host.table, route_protocol: host.route_protocol };
        let (mut ipam, rebooted) = disk::load(&state)?;
        if rebooted {
            let gone = leaks::without_link(&ipam, &links);
            info!(count = gone.len(), "leases of before the restart of the machine given back");
            for attachment in gone {
                ipam.detach(&attachment);
            }
        }
        let (requests, inbox) = sync_channel(REQUESTS);
        let (publish, leases) = watch::channel(Arc::new(Vec::new()));
        let keeper = Keeper { state, ipam, cidrs, links, terms, leaks: Leaks::default(), publish };
        keeper.publish();
        let work = std::thread::Builder::new().name("pods".into()).spawn(move || keeper.run(&inbox));
        let thread =
            work.map_err(|cause| StateError::Io { doing: "start the thread for", path: "pods".into(), cause })?;
        Ok(Self { requests, leases, thread: Some(thread) })
    }

    /// A lease for the attachment, the one it has if it has one.
    ///
    /// # Errors
    /// [`LocalErrorCode::PoolExhausted`], [`LocalErrorCode::Internal`].
    ///
    /// # Cancel safety
    /// The lease may be made even if the answer is not awaited; it is found again or given back as a leak.
    pub(crate) async fn attach(&self, attachment: Attachment, pod: Option<String>) -> Result<Lease, LocalError> {
        self.ask(|answer| Request::Attach { attachment, pod, answer }).await?
    }

    /// Gives the addresses back; fine if it had none.
    ///
    /// # Errors
    /// [`LocalErrorCode::Internal`].
    pub(crate) async fn detach(&self, attachment: Attachment) -> Result<(), LocalError> {
        self.ask(|answer| Request::Detach { attachment, answer }).await?
    }

    /// The lease of an attachment.
    ///
    /// # Errors
    /// [`LocalErrorCode::Internal`].
    pub(crate) async fn check(&self, attachment: Attachment) -> Result<Option<Lease>, LocalError> {
        self.ask(|answer| Request::Check { attachment, answer }).await
    }

    /// Whether a pod could get an address now.
    ///
    /// # Errors
    /// [`LocalErrorCode::PoolExhausted`].
    pub(crate) async fn room(&self) -> Result<(), LocalError> {
        self.ask(|answer| Request::Room { answer }).await?
    }

    /// Gives back all leases but the `valid` ones; says how many.
    ///
    /// # Errors
    /// [`LocalErrorCode::Internal`].
    pub(crate) async fn collect(&self, valid: BTreeSet<Attachment>) -> Result<u32, LocalError> {
        self.ask(|answer| Request::Collect { valid, answer }).await?
    }

    /// Hands out addresses of these from now on.
    pub(crate) fn set_cidrs(&self, cidrs: Vec<IpNet>) {
        self.tell(Request::Cidrs(cidrs));
    }

    /// These host ends of pod links exist now.
    pub(crate) fn set_links(&self, links: Vec<String>) {
        self.tell(Request::Links(links));
    }

    /// The MTU that new leases name.
    pub(crate) fn set_mtu(&self, mtu: u16) {
        self.tell(Request::Mtu(mtu));
    }

    /// Ends the thread once what it has is on disk.
    pub(crate) fn stop(&mut self) {
        let _ = self.requests.send(Request::Stop);
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            warn!("the pods thread had panicked");
        }
    }

    fn tell(&self, request: Request) {
        // Facts come again with the next look if the queue is full of requests.
        let _ = self.requests.try_send(request);
    }

    async fn ask<T>(&self, request: impl FnOnce(oneshot::Sender<T>) -> Request) -> Result<T, LocalError> {
        let (answer, done) = oneshot::channel();
        match self.requests.try_send(request(answer)) {
            Ok(()) => {}
            Err(std::sync::mpsc::TrySendError::Full(_)) => {
                return Err(error(LocalErrorCode::NotReady, "too many pods are attached at once: try again".into()));
            }
            Err(std::sync::mpsc::TrySendError::Disconnected(_)) => return Err(stopping()),
        }
        done.await.map_err(|_| stopping())
    }
}

fn stopping() -> LocalError {
    error(LocalErrorCode::NotReady, "meshd is stopping: try again".into())
}

fn error(code: LocalErrorCode, message: String) -> LocalError {
    LocalError { code, message }
}

fn internal(source: &StateError) -> LocalError {
    error(LocalErrorCode::Internal, format!("the lease cannot be stored, so nothing changed: {source}"))
}

/// Runs on the pods thread.
struct Keeper {
    state: StateDir,
    ipam: Ipam,
    cidrs: Vec<IpNet>,
    links: Vec<String>,
    terms: Terms,
    leaks: Leaks,
    publish: watch::Sender<Arc<Vec<Lease>>>,
}

/// An answer that waits for the disk.
type Answer = Box<dyn FnOnce(Result<(), &StateError>)>;

impl Keeper {
    fn run(mut self, inbox: &Receiver<Request>) {
        self.housekeeping();
        let mut due = Instant::now() + HOUSEKEEPING;
        loop {
            let first = match inbox.recv_timeout(due.saturating_duration_since(Instant::now())) {
                Ok(request) => request,
                Err(RecvTimeoutError::Timeout) => {
                    self.housekeeping();
                    due = Instant::now() + HOUSEKEEPING;
                    continue;
                }
                Err(RecvTimeoutError::Disconnected) => return,
            };
            let before = self.ipam.clone();
            let mut answers = Vec::new();
            let mut stop = false;
            for request in std::iter::once(first).chain(inbox.try_iter()) {
                if matches!(request, Request::Stop) {
                    stop = true;
                    break;
                }
                answers.extend(self.handle(request));
            }
            self.commit(before, answers);
            if stop {
                return;
            }
        }
    }

    /// Does it in memory; what depends on the disk is answered later.
    fn handle(&mut self, request: Request) -> Option<Answer> {
        match request {
            Request::Attach { attachment, pod, answer } => {
                let made = self.attach(&attachment, pod.as_deref());
                return Some(Box::new(move |stored| {
                    let result = made.and_then(|lease| stored.map(|()| lease).map_err(internal));
                    let _ = answer.send(result);
                }));
            }
            Request::Detach { attachment, answer } => {
                self.ipam.detach(&attachment);
                return Some(Box::new(move |stored| {
                    let _ = answer.send(stored.map_err(internal));
                }));
            }
            Request::Collect { valid, answer } => {
                let gone: Vec<Attachment> = self.ipam.leases().map(|entry| entry.attachment.clone()).collect();
                let count = gone.iter().filter(|who| !valid.contains(who) && self.ipam.detach(who)).count();
                return Some(Box::new(move |stored| {
                    let count = u32::try_from(count).unwrap_or(u32::MAX);
                    let _ = answer.send(stored.map(|()| count).map_err(internal));
                }));
            }
            Request::Check { attachment, answer } => {
                let _ = answer.send(self.ipam.lease(&attachment).map(|entry| self.lease(entry)));
            }
            Request::Room { answer } => {
                let _ = answer.send(self.ipam.check_room(&self.cidrs).map_err(|error| refused(&error)));
            }
            Request::Cidrs(cidrs) => self.cidrs = cidrs,
            Request::Links(links) => self.links = links,
            Request::Mtu(mtu) => self.terms.mtu = mtu,
            Request::Stop => {}
        }
        None
    }

    fn attach(&mut self, attachment: &Attachment, pod: Option<&str>) -> Result<Lease, LocalError> {
        let now = unix_now();
        if self.ipam.lease(attachment).is_none() && self.ipam.check_room(&self.cidrs).is_err() {
            // What was queued while meshd was down may make room.
            self.take_released();
        }
        let made = self.ipam.attach(attachment, pod, &self.cidrs, now).cloned();
        made.map(|entry| self.lease(&entry)).map_err(|error| refused(&error))
    }

    /// Stores what changed, tells everybody, answers. A disk that refuses leaves everything as it was.
    fn commit(&mut self, before: Ipam, answers: Vec<Answer>) {
        let stored = if self.ipam == before { Ok(()) } else { disk::save(&self.state, &self.ipam) };
        if let Err(error) = &stored {
            warn!(%error, "leases cannot be stored");
            self.ipam = before;
        } else {
            self.publish();
        }
        for answer in answers {
            answer(stored.as_ref().copied());
        }
    }

    fn publish(&self) {
        let leases: Vec<Lease> = self.ipam.leases().map(|entry| self.lease(entry)).collect();
        self.publish.send_if_modified(|known| {
            let changed = **known != leases;
            if changed {
                *known = Arc::new(leases);
            }
            changed
        });
    }

    fn lease(&self, entry: &Entry) -> Lease {
        Lease {
            attachment: entry.attachment.clone(),
            pod: entry.pod.clone(),
            addresses: entry.addresses.clone(),
            mtu: self.terms.mtu,
            link_group: self.terms.link_group,
            table: self.terms.table,
            route_protocol: self.terms.route_protocol,
        }
    }

    /// Takes back what was released while `meshd` was down, and what nobody gave back.
    fn housekeeping(&mut self) {
        let before = self.ipam.clone();
        let files = self.take_released();
        for attachment in self.leaks.find(&self.ipam, &self.links, Instant::now()) {
            warn!(container = attachment.container, "lease without a link given back");
            self.ipam.detach(&attachment);
        }
        let stored = if self.ipam == before { Ok(()) } else { disk::save(&self.state, &self.ipam) };
        match stored {
            Ok(()) => {
                released::remove(&files);
                self.publish();
            }
            Err(error) => {
                warn!(%error, "leases cannot be stored");
                self.ipam = before;
            }
        }
    }

    fn take_released(&mut self) -> Vec<std::path::PathBuf> {
        let found = released::read(&self.state);
        for release in &found {
            let Some(attachment) = &release.attachment else { continue };
            // A release older than the lease was of an earlier pod of that name.
            let newer = self.ipam.lease(attachment).is_some_and(|entry| entry.since > release.queued);
            if !newer && self.ipam.detach(attachment) {
                info!(container = attachment.container, "lease released while meshd was down given back");
            }
        }
        found.into_iter().map(|release| release.path).collect()
    }
}

fn refused(error: &IpamError) -> LocalError {
    let code = LocalErrorCode::PoolExhausted;
    LocalError { code, message: error.to_string() }
}

/// Seconds since 1970; 0 before that.
fn unix_now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests;
