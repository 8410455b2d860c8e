//! The control session: how this node hears of its peers, and says what its own keys are.
//!
//! ```text
//! connect ─ frames ─ driver ─┬─ session   what is said in which order (plain struct)
//!                            └─ agent     what follows from it: directory, own record, rotation (plain struct)
//! exchange ─ datagrams of peers ─> agent
//! agent ─ facts, keys, report ─> the rest of meshd         the rest ─ ControlHandle ─> agent
//! ```
//!
//! Everything that the node needs to carry packets is on disk: facts and keys are there before any keyserver is.

mod agent;
mod backoff;
pub(crate) mod connect;
mod driver;
pub(crate) mod enrol;
pub(crate) mod frames;
mod link;
mod session;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use mesh_protocol::id::{KeyId, NodeId, Position};
use mesh_protocol::local::{Alarm, ControlStatus, IdentityStatus};
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot, watch};

use crate::directory::Directory;
use crate::exchange::{Counters, socket::Datagrams};
use crate::facts::{DirectoryFacts, HostFacts, OwnKeys};
use crate::identity::{Identity, KeysConfig};

pub(crate) use agent::Rotations;
pub(crate) use driver::now;

/// Rotations that wait: each is answered within milliseconds. When full, the next one waits for room.
const ROTATIONS: usize = 8;

/// Where keyservers are, and how this node is reached: section `[control]` of `meshd.toml`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct ControlConfig {
    /// Addresses of keyservers, `host:port`, tried before those that the join token named.
    pub(crate) keyservers: Vec<String>,
    /// Addresses under which peers reach lane 0 of this node, tried by them before those found on its links. For
    /// forwarded ports and addresses of a NAT in front.
    pub(crate) advertise: Vec<SocketAddr>,
}

/// What the rest of `meshd` decides for the control session.
#[derive(Debug, Clone)]
pub(crate) struct ControlSetup {
    /// The operator's part.
    pub(crate) config: ControlConfig,
    /// SO_MARK of every socket, so that it bypasses the mesh rule; 0 sets none.
    pub(crate) mark: u32,
    /// UDP port of lane 0.
    pub(crate) port: u16,
    /// Lanes of this node, 1 to 8.
    pub(crate) lanes: u8,
    /// When the own keys rotate.
    pub(crate) keys: KeysConfig,
}

/// Starts the control task. Facts and keys are those on disk, with a keyserver or without.
///
/// Must be called inside a tokio runtime.
pub(crate) fn start(
    setup: ControlSetup,
    identity: Identity,
    directory: Directory,
    host: HostFacts,
    datagrams: Option<Datagrams>,
) -> ControlHandle {
    let mut keyservers = setup.config.keyservers.clone();
    keyservers.extend(identity.membership().keyservers.iter().cloned());
    let mut seen = std::collections::BTreeSet::new();
    keyservers.retain(|keyserver| seen.insert(keyserver.clone()));
    let (mark, told_host) = (setup.mark, host.clone());
    let active = directory.runtime().active.clone();
    let mut agent = agent::Agent::new(setup, identity, directory, host, now());
    let (facts, facts_receiver) = watch::channel(Arc::new(agent.facts(now())));
    let (keys, keys_receiver) = watch::channel(agent.keys());
    let (report, report_receiver) = watch::channel(Arc::new(ControlReport::default()));
    let (told, told_receiver) = watch::channel(Told { host: told_host, ..Told::default() });
    let (rotations, rotation_receiver) = mpsc::channel(ROTATIONS);
    let recently_active = agent.directory().numbers_of(&active);
    let outlets = driver::Outlets { facts, keys, report };
    let inlets = driver::Inlets { told: told_receiver, rotations: rotation_receiver, datagrams };
    let task = tokio::spawn(driver::Driver::new(agent, keyservers, mark).run(outlets, inlets));
    ControlHandle {
        facts: facts_receiver,
        keys: keys_receiver,
        report: report_receiver,
        recently_active,
        rotations,
        told,
        task,
    }
}

/// A change of the own keys was refused; everything is as it was.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum RotateError {
    /// The key before still answers for peers that were away.
    #[error(
        "the previous key (epoch {epoch}) still answers for peers that were away, for {} more: wait, or use --force",
        humantime::format_duration(*.left)
    )]
    PreviousInUse {
        /// Its epoch.
        epoch: u64,
        /// How long it will.
        left: std::time::Duration,
    },
    /// The promotion before is not in the directory yet: peers would know neither key.
    #[error("the keyserver has not taken the record of the rotation before: peers could not follow, try again")]
    Unpublished,
    /// The keyserver has asked for more rotations than an operator needs.
    #[error(
        "the keyserver has asked for too many rotations: the next one in {}, or on the node itself by meshctl keys rotate --local",
        humantime::format_duration(std::time::Duration::from_secs(.left.as_secs()))
    )]
    TooOften {
        /// Until it may ask again.
        left: std::time::Duration,
    },
    /// The identity key before is not settled.
    #[error(
        "no keyserver has taken what the newest identity key signed: another one follows once it has; see meshctl status"
    )]
    IdentityUnsettled,
    /// There can be no further one.
    #[error(
        "this node has replaced its identity key {} times, which is as often as it may: revoke it, and let the machine \
         join anew",
        mesh_protocol::record::MAX_HANDOVERS
    )]
    IdentityUsedUp,
    /// The new keys could not be stored.
    #[error("cannot store the new keys, so nothing changed: {0}")]
    Storage(String),
    /// The control task has ended.
    #[error("meshd is stopping")]
    Stopping,
}

/// State of the control session, for `meshctl status`, readiness and metrics.
#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct ControlReport {
    /// The keyserver's address, when connected; else the one tried last.
    pub(crate) keyserver: Option<String>,
    /// Connected now, and by what.
    pub(crate) transport: Option<&'static str>,
    /// Why the last attempt failed, when not connected.
    pub(crate) error: Option<String>,
    /// Where the directory stands.
    pub(crate) position: Option<Position>,
    /// The identity key.
    pub(crate) identity: Option<IdentityStatus>,
    /// `seq` of the own record.
    pub(crate) seq: u64,
    /// The keyserver has the newest own record.
    pub(crate) published: bool,
    /// The keyserver shows an older state than this node has seen.
    pub(crate) stale: bool,
    /// Directory objects that were refused since start.
    pub(crate) refused: u64,
    /// Times that somebody was caught signing two truths, since start.
    pub(crate) equivocations: u64,
    /// The highest `seq` of the own record that each peer said to have in force.
    pub(crate) acknowledged: Arc<BTreeMap<NodeId, u64>>,
    /// What was exchanged with peers.
    pub(crate) exchange: Counters,
    /// Control sessions that were opened since start.
    pub(crate) sessions: u64,
    /// Rotations of the own keys since start.
    pub(crate) rotations: Rotations,
    /// Running time without a fresh checkpoint, as of `read`.
    pub(crate) unconfirmed: std::time::Duration,
    /// How long that may last.
    pub(crate) exposure: std::time::Duration,
    /// When `unconfirmed` was read.
    pub(crate) read: Option<Instant>,
    /// What somebody has to look at.
    pub(crate) alarms: Vec<RaisedAlarm>,
}

/// An alarm and when it was raised first.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct RaisedAlarm {
    /// Kebab-case name, as in the metric.
    pub(crate) name: &'static str,
    /// What happened, to whom.
    pub(crate) message: String,
    /// Since when.
    pub(crate) since: Instant,
}

impl ControlReport {
    /// As the local API tells it.
    pub(crate) fn status(&self, now: Instant) -> ControlStatus {
        let passed = self.read.map_or_else(Default::default, |read| now.saturating_duration_since(read));
        let age = self.unconfirmed + passed;
        ControlStatus {
            connected: self.transport.is_some(),
            keyserver: self.keyserver.clone(),
            transport: self.transport.map(str::to_owned),
            position: self.position,
            checkpoint_age: Some(age.as_secs()),
            exposure: self.exposure.as_secs(),
            exposure_left: self.exposure.saturating_sub(age).as_secs(),
            stale: self.stale,
            error: self.error.clone(),
        }
    }

    /// The alarms as the local API tells them.
    pub(crate) fn alarms(&self, now: Instant) -> Vec<Alarm> {
        let tell = |alarm: &RaisedAlarm| Alarm {
            name: alarm.name.to_owned(),
            message: alarm.message.clone(),
            age: now.saturating_duration_since(alarm.since).as_secs(),
        };
        self.alarms.iter().map(tell).collect()
    }
}

/// How the rest of `meshd` talks with the control task. Dropping it stops the task.
#[derive(Debug)]
pub(crate) struct ControlHandle {
    /// What the directory says; the first value came from disk.
    pub(crate) facts: watch::Receiver<Arc<DirectoryFacts>>,
    /// Own tunnel keys; they are on disk before they are here.
    pub(crate) keys: watch::Receiver<Arc<OwnKeys>>,
    /// State of the session.
    pub(crate) report: watch::Receiver<Arc<ControlReport>>,
    recently_active: Vec<u32>,
    rotations: mpsc::Sender<Rotation>,
    told: watch::Sender<Told>,
    task: tokio::task::JoinHandle<()>,
}

/// What the rest of `meshd` told last; a newer word replaces the older one, so nothing queues up.
#[derive(Debug, Clone, Default)]
pub(crate) struct Told {
    applied: Option<Position>,
    host: HostFacts,
    active: Vec<u32>,
    stop: bool,
}

/// A request to replace keys.
#[derive(Debug)]
pub(crate) enum Rotation {
    /// Promote the spare key.
    Promote {
        /// Also while the one before answers.
        force: bool,
        /// The epoch that is current then.
        answer: oneshot::Sender<Result<u64, RotateError>>,
    },
    /// Replace the identity key.
    Succeed {
        /// The one in use, and the one that follows.
        answer: oneshot::Sender<Result<(KeyId, KeyId), RotateError>>,
    },
}

impl ControlHandle {
    /// Promotes the spare key and gives back the epoch that is current then. On disk when it returns.
    ///
    /// # Errors
    /// Any [`RotateError`].
    ///
    /// # Cancel safety
    /// The rotation happens even if the answer is not awaited.
    pub(crate) async fn rotate(&self, force: bool) -> Result<u64, RotateError> {
        let (answer, done) = oneshot::channel();
        self.rotations.send(Rotation::Promote { force, answer }).await.map_err(|_| RotateError::Stopping)?;
        done.await.map_err(|_| RotateError::Stopping)?
    }

    /// Makes the next identity key, or finds the one that is under way; gives the key in use and the one that follows. On
    /// disk when it returns; all else happens by itself.
    ///
    /// # Errors
    /// Any [`RotateError`].
    ///
    /// # Cancel safety
    /// It happens even if the answer is not awaited.
    pub(crate) async fn succeed(&self) -> Result<(KeyId, KeyId), RotateError> {
        let (answer, done) = oneshot::channel();
        self.rotations.send(Rotation::Succeed { answer }).await.map_err(|_| RotateError::Stopping)?;
        done.await.map_err(|_| RotateError::Stopping)?
    }

    /// Says that everything up to `position` is in force on this node: tunnels of revoked peers are gone. Told to the
    /// keyserver.
    pub(crate) fn applied(&self, position: Position) {
        self.told.send_modify(|told| told.applied = Some(position));
    }

    /// Says what the host looks like now: where this node may be reached follows from it.
    pub(crate) fn host_changed(&self, host: HostFacts) {
        self.told.send_if_modified(|told| {
            told.host != host && {
                told.host = host;
                true
            }
        });
    }

    /// Says which peers have a live session, by number; kept on disk for the next start.
    pub(crate) fn peer_active(&self, mut numbers: Vec<u32>) {
        numbers.sort_unstable();
        self.told.send_if_modified(|told| {
            told.active != numbers && {
                told.active = numbers;
                true
            }
        });
    }

    /// Peers that had a live session before this start, by number: to shake hands with at once.
    pub(crate) fn recently_active(&self) -> &[u32] {
        &self.recently_active
    }

    /// Ends the session and stores what is known. A panic of the task comes out as an error.
    ///
    /// # Errors
    /// [`tokio::task::JoinError`] if the task panicked.
    pub(crate) async fn stop(self) -> Result<(), tokio::task::JoinError> {
        self.told.send_modify(|told| told.stop = true);
        self.task.await
    }
}

#[cfg(test)]
mod tests;
