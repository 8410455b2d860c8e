//! The host thread.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use mesh_dataplane::tun::linux::TunQueue;
use mesh_hostnet::Handle;
use mesh_hostnet::watch::{Event, Waker, Watch};
use tokio::sync::{mpsc, oneshot, watch};
use tracing::{debug, info, warn};

use super::device::{DevicePlan, Opened};
use super::{clear, look, saved, settings};
use crate::desired::{FilterState, HostState};
use crate::facts::HostFacts;
use crate::reconcile::apply::apply;
use crate::reconcile::diff::diff;
use crate::state_dir::{StateDir, StateError};

/// Everything is looked at this often even if nothing was announced: settings change silently.
pub(super) const LOOK_EVERY: Duration = Duration::from_secs(2);
/// Announcements within this time are answered by one look.
const GATHER: Duration = Duration::from_millis(50);
/// Rounds of look and apply before the rest is left to the next look.
const ROUNDS: usize = 3;
/// Commands that wait at most: the app waits for each of its own, and announcements beyond one are the same.
const COMMANDS: usize = 16;

/// The host cannot be brought into the state in which packets may flow.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum HostError {
    /// The kernel refused.
    #[error("{doing}: {cause}")]
    Kernel {
        /// What was tried.
        doing: &'static str,
        /// Why not.
        cause: mesh_hostnet::Error,
    },
    /// The TUN device cannot be opened.
    #[error("open TUN device {name}: {cause}{}", hint(cause))]
    Device {
        /// Its name.
        name: String,
        /// Why not.
        cause: std::io::Error,
    },
    /// Steps were refused.
    #[error("bring the host's network in line: {}", .0.join("; "))]
    Refused(Vec<String>),
    /// The state directory refused.
    #[error(transparent)]
    State(#[from] StateError),
    /// The thread has ended.
    #[error("the host thread has ended")]
    Ended,
}

fn hint(error: &std::io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc_code) if libc_code == nix::errno::Errno::EPERM as i32 => ": CAP_NET_ADMIN is needed",
        Some(libc_code) if libc_code == nix::errno::Errno::ENOENT as i32 => ": is the module tun loaded?",
        Some(libc_code) if libc_code == nix::errno::Errno::EBUSY as i32 => ": another program has it open",
        _ => "",
    }
}

/// The host's network, before its thread runs.
pub(crate) struct Host {
    handle: Handle,
    state: StateDir,
    desired: HostState,
    /// The filter put into the kernel last.
    filter: Option<FilterState>,
    /// How the device is to be.
    plan: DevicePlan,
    /// Index of the device whose queues the lanes have.
    device: Option<u32>,
    old: settings::Old,
    underlay: look::Underlay,
    refused: Vec<String>,
}

/// What the thread says of the host.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct HostReport {
    /// What the kernel or the disk refuses, as of the last look.
    pub(crate) refused: Vec<String>,
    /// How often something of ours was missing or changed without our doing.
    pub(crate) repairs: u64,
}

impl Host {
    /// Opens the calling thread's network namespace. `desired` is what was saved last or what is to be.
    ///
    /// # Errors
    /// [`HostError::Kernel`], [`HostError::State`].
    pub(crate) fn open(state: StateDir, desired: HostState) -> Result<Self, HostError> {
        let handle = Handle::open().map_err(|cause| HostError::Kernel { doing: "open netlink sockets", cause })?;
        let old = settings::load(&state)?;
        let filter = Some(desired.filter.clone());
        Ok(Self {
            handle,
            state,
            desired,
            filter,
            plan: DevicePlan::default(),
            device: None,
            old,
            underlay: look::Underlay::default(),
            refused: Vec::new(),
        })
    }

    /// What the host is like now.
    ///
    /// # Errors
    /// [`HostError::Kernel`].
    pub(crate) fn facts(&mut self) -> Result<HostFacts, HostError> {
        Ok(self.look()?.facts)
    }

    /// Puts what refuses in place: filter, twins, rules. Nothing that leads somewhere, nothing is removed.
    ///
    /// # Errors
    /// [`HostError::Refused`] after all was tried.
    pub(crate) fn close(&mut self) -> Result<(), HostError> {
        let mut look = self.look()?;
        look.actual.device = None;
        let actions = crate::reconcile::diff::closing(&self.desired, &look.actual);
        let errors = apply(&mut self.handle, &self.desired, &look.links, &actions);
        if errors.is_empty() { Ok(()) } else { Err(HostError::Refused(texts(&errors))) }
    }

    /// Opens or makes the TUN device; the same again whenever it is gone.
    ///
    /// # Errors
    /// [`HostError::Device`], [`HostError::Kernel`].
    pub(crate) fn open_device(&mut self, name: &str, plan: DevicePlan) -> Result<Opened, HostError> {
        let opened = plan.open(name).map_err(|cause| HostError::Device { name: name.to_owned(), cause })?;
        self.plan = plan;
        let found =
            self.handle.link_by_name(name).map_err(|cause| HostError::Kernel { doing: "find device", cause })?;
        self.device = found.map(|link| link.index);
        Ok(opened)
    }

    /// Brings the host to `desired`: saved first, so that the guard knows; then step by step.
    ///
    /// # Errors
    /// [`HostError::Refused`] after all was tried, [`HostError::Kernel`] if nothing could be seen.
    pub(crate) fn apply(&mut self, desired: HostState) -> Result<(), HostError> {
        let mut refused = Vec::new();
        let old = std::mem::replace(&mut self.desired, desired);
        if old != self.desired {
            refused.extend(saved::save(&self.state, &self.desired).err().map(|error| error.to_string()));
        }
        refused.extend(self.bring()?.refused);
        let new = &self.desired;
        if (&old.names, &old.device.name) != (&new.names, &new.device.name) {
            let old = (&old.names, old.device.name.as_str());
            refused.extend(clear::clear_renamed(&mut self.handle, old, (&new.names, new.device.name.as_str())));
        }
        self.refused.clone_from(&refused);
        if refused.is_empty() { Ok(()) } else { Err(HostError::Refused(refused)) }
    }

    /// Removes everything of ours from the host and forgets what was saved.
    pub(crate) fn down(&mut self) -> Vec<String> {
        let mut refused = clear::clear(&mut self.handle, &self.desired.names, &self.desired.device.name);
        refused.extend(settings::restore(&self.state));
        refused.extend(saved::remove(&self.state).err().map(|error| error.to_string()));
        refused
    }

    fn look(&mut self) -> Result<look::Look, HostError> {
        look::look(&mut self.handle, &self.desired, self.filter.as_ref(), &mut self.underlay)
            .map_err(|cause| HostError::Kernel { doing: "look at the host", cause })
    }

    /// Looks and applies until nothing is left to do.
    fn bring(&mut self) -> Result<Round, HostError> {
        let mut steps = 0;
        let mut refused = Vec::new();
        for _ in 0..ROUNDS {
            let look = self.look()?;
            let actions = diff(&self.desired, &look.actual);
            if actions.is_empty() {
                refused.extend(self.hold_settings(&look));
                return Ok(Round { facts: look.facts, steps, refused });
            }
            steps += actions.len();
            refused = texts(&apply(&mut self.handle, &self.desired, &look.links, &actions));
            self.filter = Some(self.desired.filter.clone());
        }
        let look = self.look()?;
        refused.extend(self.hold_settings(&look));
        Ok(Round { facts: look.facts, steps, refused })
    }

    fn hold_settings(&mut self, look: &look::Look) -> Vec<String> {
        let before = self.old.len();
        let links: Vec<&str> = look.links.keys().map(String::as_str).collect();
        let device = &self.desired.device.name;
        let mut refused = settings::hold(device, &look.facts.pod_links, look.facts.has_ipv6, &links, &mut self.old);
        if self.old.len() != before {
            refused.extend(settings::save(&self.state, &self.old).err().map(|error| error.to_string()));
        }
        refused
    }

    /// Starts the thread. `queues` gets the queues of a device that had to be made again.
    ///
    /// # Errors
    /// [`HostError::Kernel`], or the system refused a thread.
    pub(crate) fn start(self, facts: HostFacts, queues: mpsc::Sender<Vec<TunQueue>>) -> Result<HostHandle, HostError> {
        let watching = Watch::open().map_err(|cause| HostError::Kernel { doing: "watch the kernel", cause })?;
        let waker = watching.waker();
        let (commands, inbox) = sync_channel(COMMANDS);
        let (facts_out, facts) = watch::channel(Arc::new(facts));
        let (report_out, report) = watch::channel(HostReport::default());
        let table = (self.desired.names.table, self.desired.names.nftables_table.clone());
        let announcements = commands.clone();
        let watcher = spawn("host-watch", move || announce(watching, &announcements, table))?;
        let thread = Thread { host: self, inbox, facts: facts_out, report: report_out, queues };
        let worker = spawn("host", move || thread.run())?;
        Ok(HostHandle { commands, facts, report, waker, threads: vec![watcher, worker] })
    }
}

fn spawn(name: &'static str, work: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>, HostError> {
    let refused = |cause| HostError::Device { name: format!("(thread {name})"), cause };
    std::thread::Builder::new().name(name.into()).spawn(work).map_err(refused)
}

fn texts(errors: &[crate::reconcile::apply::ApplyError]) -> Vec<String> {
    errors.iter().map(ToString::to_string).collect()
}

/// What one round of look and apply came to.
struct Round {
    facts: HostFacts,
    steps: usize,
    refused: Vec<String>,
}

enum Command {
    Apply(Box<HostState>, oneshot::Sender<Result<(), HostError>>),
    /// Something changed; true if it was a default route.
    Changed(bool),
    Down(oneshot::Sender<Vec<String>>),
    Stop,
}

/// The running host thread. [`stop`](Self::stop) leaves everything in place.
#[derive(Debug)]
pub(crate) struct HostHandle {
    commands: SyncSender<Command>,
    /// What the host is like.
    pub(crate) facts: watch::Receiver<Arc<HostFacts>>,
    /// What is refused, what was repaired.
    pub(crate) report: watch::Receiver<HostReport>,
    waker: Waker,
    threads: Vec<JoinHandle<()>>,
}

impl HostHandle {
    /// Brings the host to `desired`.
    ///
    /// # Errors
    /// As [`Host::apply`]; [`HostError::Ended`].
    ///
    /// # Cancel safety
    /// It is brought there even if the answer is not awaited.
    pub(crate) async fn apply(&self, desired: HostState) -> Result<(), HostError> {
        let (answer, done) = oneshot::channel();
        self.send(Command::Apply(Box::new(desired), answer))?;
        done.await.map_err(|_| HostError::Ended)?
    }

    /// Removes everything of ours; says what was refused.
    ///
    /// # Errors
    /// [`HostError::Ended`].
    pub(crate) async fn down(&self) -> Result<Vec<String>, HostError> {
        let (answer, done) = oneshot::channel();
        self.send(Command::Down(answer))?;
        done.await.map_err(|_| HostError::Ended)
    }

    /// Looks at the host soon.
    pub(crate) fn look(&self) {
        // A full queue holds a look already.
        let _ = self.commands.try_send(Command::Changed(false));
    }

    /// Ends the threads; everything stays as it is.
    pub(crate) fn stop(self) {
        let _ = self.send(Command::Stop);
        self.waker.wake();
        for thread in self.threads {
            if thread.join().is_err() {
                warn!("a host thread had panicked");
            }
        }
    }

    /// The queue is full only for moments: announcements never wait in it, and the app has few commands under way.
    fn send(&self, command: Command) -> Result<(), HostError> {
        self.commands.send(command).map_err(|_| HostError::Ended)
    }
}

/// Turns what the kernel announces into looks.
fn announce(mut watching: Watch, commands: &SyncSender<Command>, (table, nftables): (u32, String)) {
    loop {
        let event = match watching.next(Duration::from_secs(3600)) {
            Ok(None) => continue,
            Ok(Some(Event::Woken)) => return,
            Ok(Some(event)) => event,
            Err(error) => {
                warn!(%error, "the kernel's announcements ended, looking every two seconds instead");
                return;
            }
        };
        let default_route = match &event {
            Event::RouteChanged(route) | Event::RouteGone(route) => {
                let leads_out = route.destination.prefix_len() == 0;
                if route.table != table && !leads_out {
                    continue;
                }
                leads_out
            }
            Event::Nftables(change) if !change.tables.is_empty() && !change.tables.contains(&nftables) => continue,
            Event::Overflow => true,
            _ => false,
        };
        if matches!(commands.try_send(Command::Changed(default_route)), Err(TrySendError::Disconnected(_))) {
            return;
        }
    }
}

struct Thread {
    host: Host,
    inbox: Receiver<Command>,
    facts: watch::Sender<Arc<HostFacts>>,
    report: watch::Sender<HostReport>,
    queues: mpsc::Sender<Vec<TunQueue>>,
}

impl Thread {
    fn run(mut self) {
        let mut looked = Instant::now();
        let mut due = looked;
        loop {
            match self.inbox.recv_timeout(due.saturating_duration_since(Instant::now())) {
                Ok(Command::Apply(desired, answer)) => {
                    let result = self.host.apply(*desired);
                    // Nobody waits any more: it is applied all the same.
                    let _ = answer.send(result);
                }
                Ok(Command::Changed(default_route)) => {
                    if default_route {
                        self.host.underlay.doubt();
                    }
                    due = due.min(looked + GATHER);
                    continue;
                }
                Ok(Command::Down(answer)) => {
                    let _ = answer.send(self.host.down());
                    return;
                }
                Ok(Command::Stop) | Err(RecvTimeoutError::Disconnected) => return,
                Err(RecvTimeoutError::Timeout) => {}
            }
            self.round();
            looked = Instant::now();
            due = looked + LOOK_EVERY;
        }
    }

    /// Looks, repairs what somebody else changed, tells what was seen.
    fn round(&mut self) {
        let brought = self.keep_device().and_then(|()| self.host.bring());
        let (steps, refused) = match brought {
            Ok(round) => {
                self.facts.send_if_modified(|known| {
                    let changed = **known != round.facts;
                    if changed {
                        *known = Arc::new(round.facts);
                    }
                    changed
                });
                (round.steps, round.refused)
            }
            Err(error) => (0, vec![error.to_string()]),
        };
        if refused != self.host.refused && !refused.is_empty() {
            warn!(error = refused.join("; "), "the host's network is not as it should be");
        }
        self.host.refused.clone_from(&refused);
        if steps > 0 {
            info!(steps, "repaired what somebody changed");
        }
        self.report.send_if_modified(|report| {
            let changed = report.refused != refused || steps > 0;
            report.refused = refused;
            report.repairs += u64::from(steps > 0);
            changed
        });
    }

    /// Makes the device again if it is gone, and hands its queues to the lanes.
    fn keep_device(&mut self) -> Result<(), HostError> {
        let name = self.host.desired.device.name.clone();
        let found = self.host.handle.link_by_name(&name);
        let found = found.map_err(|cause| HostError::Kernel { doing: "find device", cause })?;
        if self.host.device.is_some() && found.as_ref().map(|link| link.index) == self.host.device {
            return Ok(());
        }
        warn!(link = name, "TUN device is gone, making it again");
        let opened = self.host.open_device(&name, self.host.plan)?;
        debug!(mode = ?opened.mode, queues = opened.queues.len(), "TUN device made");
        self.queues.blocking_send(opened.queues).map_err(|_| HostError::Ended)
    }
}
