//! What the keyserver knows and writes: the [`View`] of everything accepted, the history it came in, and the store below.
//!
//! ```text
//! enrol, publish, revoke, cluster ──> judge (View) ──> store (one transaction) ──> history ──> watch ──> sessions
//! ```
//!
//! One thread owns it ([`writer`](crate::writer)), so that no two changes are ever judged against the same past. A change
//! is judged first, stored second and shown third: what nodes see survives a power cut.

mod audit;
mod cluster;
mod draft;
mod enrol;
mod grant;
mod history;
mod issuer;
mod pending;
mod policy;
mod post_quantum;
mod publish;
mod reserve;
mod restore;
mod revoke;
mod rotate;
mod session;
mod status;
mod succeed;
#[cfg(test)]
mod tests;
mod token;
mod transport;
mod watch;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use mesh_protocol::UnixSeconds;
use mesh_protocol::control::{Refusal, RefusalCode};
use mesh_protocol::envelope::Envelope;
use mesh_protocol::id::{Hash, MeshId, NodeId, Position};
use mesh_protocol::record::Checkpoint;
use mesh_protocol::trust::{Change, TrustError, View};
use tracing::{error, warn};

use crate::keys::Keys;
use crate::metrics::Metrics;
use crate::store::{Compare, Operation, Store, StoreError, Txn};
use crate::watermark::{Watermark, WatermarkFile};

pub(crate) use cluster::ClusterRequest;
pub(crate) use enrol::{Enrolment, JoinAttempt, ShowError, Shown};
pub(crate) use history::{History, layout};
use reserve::Reservations;
pub(crate) use restore::Restored;
pub(crate) use revoke::RevocationTicket;
pub(crate) use rotate::RotationProgress;
pub(crate) use session::{Frame, Hello, Opening, SessionKey};
pub(crate) use token::TokenRequest;
use watch::Hub;

/// A checkpoint is signed anew after this long, though nothing changed.
const CHECKPOINT_AGE: Duration = Duration::from_secs(60);
/// Revisions of the store that can still be asked for.
const KEPT_REVISIONS: u64 = 10_000;
/// Alarms kept for `status`; the oldest goes first.
const MAX_ALARMS: usize = 32;

/// Part of the alarm about nodes that a change put out.
const NODES_OUT: &str = "nodes are out after a change";

/// What a directory is told once.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    /// Addresses put into join tokens.
    pub(crate) addresses: Vec<String>,
    /// How long a grant lasts.
    pub(crate) grant_life: Duration,
}

/// Everything the keyserver knows.
pub(crate) struct Directory {
    store: Box<dyn Store>,
    keys: Keys,
    settings: Settings,
    history: History,
    watermark: WatermarkFile,
    /// Why nothing may be written: the store is older than this keyserver.
    behind: Option<String>,
    /// A write failed and the view could not be read back from the store yet.
    broken: bool,
    checkpoint: Option<(Checkpoint, Envelope, Instant)>,
    /// When a refused enrolment was logged last.
    refusal_logged: Option<Instant>,
    /// What joining nodes are shown, of the policy with this hash.
    offer: Option<(Hash, Arc<[Frame]>)>,
    /// Revision of the store up to which it forgot what was overwritten.
    compacted: u64,
    hub: Hub,
    rotations: rotate::Jobs,
    /// Where the issuer's next key is.
    keys_dir: Option<PathBuf>,
    /// When nodes are granted anew that hold a grant of a key which their issuer had before; `None`: there are none.
    anew_due: Option<Instant>,
    /// What is kept for nodes that wait for an issuer elsewhere; the store has the same.
    reservations: Reservations,
    /// Identity keys that members wait for; the store has the same.
    successors: succeed::Successors,
    publishers: BTreeMap<NodeId, publish::Allowance>,
    alarms: Vec<String>,
    audit: audit::AuditLog,
    /// Sessions taken over from another address, and since when that is counted; forgotten after ten minutes.
    takeovers: BTreeMap<NodeId, (u32, Instant)>,
    metrics: Arc<Metrics>,
}

impl Directory {
    /// Reads everything from the store and verifies it.
    pub(crate) fn load(
        store: Box<dyn Store>,
        keys: Keys,
        settings: Settings,
        watermark: WatermarkFile,
        metrics: Arc<Metrics>,
    ) -> Result<Self, history::LoadError> {
        let history = History::load(store.as_ref())?;
        let audit = audit::AuditLog::load(store.as_ref())?;
        let reservations = Reservations::load(store.as_ref())?;
        let successors = succeed::Successors::load(store.as_ref())?;
        let rotations = rotate::Jobs::load(store.as_ref())?;
        let mut directory = Self {
            hub: Hub::new(history.position),
            store,
            keys,
            settings,
            history,
            watermark,
            behind: None,
            broken: false,
            checkpoint: None,
            refusal_logged: None,
            offer: None,
            compacted: 0,
            rotations,
            keys_dir: None,
            anew_due: Some(Instant::now()),
            reservations,
            successors,
            publishers: BTreeMap::new(),
            alarms: Vec::new(),
            audit,
            takeovers: BTreeMap::new(),
            metrics,
        };
        directory.compare_with_watermark();
        Ok(directory)
    }

    fn compare_with_watermark(&mut self) {
        let held = Watermark { serial: self.history.serial, position: self.history.position };
        let problem = match self.watermark.read() {
            Ok(None) => return,
            Ok(Some(mark)) if mark.position.epoch != held.position.epoch => {
                "the store is another one than the one this keyserver wrote last".to_owned()
            }
            Ok(Some(mark)) if mark.serial > held.serial || mark.position.revision > held.position.revision => format!(
                "the store is older than this keyserver: revision {} and serial {}, it had reached {} and {}",
                held.position.revision, held.serial, mark.position.revision, mark.serial
            ),
            Ok(Some(_)) => return,
            Err(error) => format!("the watermark beside the store cannot be read: {error}"),
        };
        let problem = format!("{problem}; nothing is written until 'keyserver resume'");
        self.alarm(problem.clone());
        self.behind = Some(problem);
    }

    /// The mesh.
    pub(crate) fn mesh(&self) -> MeshId {
        self.view().mesh()
    }

    /// What was accepted.
    pub(crate) fn view(&self) -> &View {
        &self.history.view
    }

    /// Where the history stands.
    pub(crate) fn position(&self) -> Position {
        self.history.position
    }

    /// Refuses unless something may be written. Comes before a change is judged.
    fn writable(&mut self) -> Result<(), Refusal> {
        if let Some(problem) = &self.behind {
            return Err(refusal(RefusalCode::Unavailable, problem.clone()));
        }
        if self.broken {
            self.read_back()?;
        }
        Ok(())
    }

    /// Judges a change, stores it together with `operations` and shows it. Nothing happens on an error.
    fn change(
        &mut self,
        envelope: &Envelope,
        compare: Vec<Compare>,
        operations: Vec<Operation>,
    ) -> Result<Change, ChangeError> {
        let change = self.change_keeping_sessions(envelope, compare, operations)?;
        self.close_sessions_after(&change);
        Ok(change)
    }

    /// As [`Self::change`]; of nodes that it puts out the caller closes the sessions.
    fn change_keeping_sessions(
        &mut self,
        envelope: &Envelope,
        compare: Vec<Compare>,
        operations: Vec<Operation>,
    ) -> Result<Change, ChangeError> {
        self.writable()?;
        let deeds = self.deeds_of_change(envelope, &operations);
        let change = self.history.view.apply(envelope).map_err(ChangeError::Judged)?;
        if change == Change::Nothing && operations.is_empty() {
            return Ok(change);
        }
        let revision = self.history.position.revision + 1;
        let key = layout::history(revision);
        let mut txn = Txn { compare, then: operations, otherwise: Vec::new() };
        txn.compare.push(Compare::ModRevision(key.clone(), 0));
        txn.then.push(Operation::Put(key, mesh_protocol::cbor::to_vec(envelope)));
        self.commit_with(&txn, if change == Change::Nothing { Vec::new() } else { deeds })?;
        self.history.push(envelope.clone());
        self.hub.changed(envelope.clone());
        self.keep_watermark();
        if let Change::Policy { .. } = change {
            self.anew_due = Some(Instant::now());
        }
        Ok(change)
    }

    /// Nodes that a change made strangers hear of it, then their sessions end.
    fn close_sessions_after(&mut self, change: &Change) {
        let (Change::Policy { dropped: out, .. } | Change::Grant { displaced: out, .. }) = change else { return };
        if out.is_empty() {
            return;
        }
        self.alarm(format!("{} {NODES_OUT} of policy or grants", out.len()));
        self.flush();
        for node in out {
            self.hub.remove(*node);
        }
    }

    /// Runs one transaction that is no change of the history, with its lines of the audit log.
    fn commit(&mut self, txn: &Txn) -> Result<(), Refusal> {
        let deeds = self.deeds_of(txn);
        self.commit_with(txn, deeds)
    }

    /// Runs one transaction; on failure reads everything back, so that memory says what the disk says.
    fn commit_txn(&mut self, txn: &Txn) -> Result<(), Refusal> {
        let started = Instant::now();
        let outcome = self.store.txn(txn);
        self.metrics.commit_seconds.observe(started.elapsed().as_secs_f64());
        match outcome {
            Ok(outcome) if outcome.succeeded => Ok(()),
            Ok(_) => {
                self.read_back()?;
                Err(refusal(RefusalCode::Busy, "something else changed at the same moment: try again"))
            }
            Err(failure) => {
                self.metrics.store_errors.inc();
                error!(error = %failure, "store refused a write");
                self.alarm(format!("the store refused a write: {failure}"));
                let _ = self.read_back();
                Err(unavailable(&failure))
            }
        }
    }

    /// Makes view and history what the store says. Endpoints, which are not in it, are kept.
    fn read_back(&mut self) -> Result<(), Refusal> {
        self.broken = true;
        self.store.recover().map_err(|error| unavailable(&error))?;
        let fresh = History::load(self.store.as_ref());
        let mut fresh = fresh.map_err(|error| refusal(RefusalCode::Unavailable, error.to_string()))?;
        for (_, member) in self.history.view.members() {
            if let Some(endpoints) = &member.endpoints {
                // Refused only where the node is no member any more.
                let _ = fresh.view.apply(&endpoints.envelope);
            }
        }
        // What the failed transaction wrote after all is news.
        for envelope in fresh.since(self.history.position).unwrap_or_default() {
            self.hub.changed(envelope);
        }
        self.reservations = Reservations::load(self.store.as_ref()).map_err(|error| unavailable(&error))?;
        self.successors = succeed::Successors::load(self.store.as_ref()).map_err(|error| unavailable(&error))?;
        let rotations = rotate::Jobs::load(self.store.as_ref()).map_err(|error| unavailable(&error))?;
        let before = std::mem::replace(&mut self.rotations, rotations);
        self.rotations.keep(before);
        self.history = fresh;
        let audit = audit::AuditLog::load(self.store.as_ref()).map_err(|error| unavailable(&error))?;
        self.audit = audit.reloaded(std::mem::take(&mut self.audit));
        self.broken = false;
        Ok(())
    }

    fn keep_watermark(&mut self) {
        let mark = Watermark { serial: self.history.serial, position: self.history.position };
        if let Err(error) = self.watermark.write(mark) {
            warn!(%error, "watermark not written");
            self.alarm(format!("the watermark beside the store cannot be written: {error}"));
        }
    }

    /// The newest checkpoint; signs one if the newest is not of this position, or old.
    fn checkpoint(&mut self) -> Envelope {
        let position = self.history.position;
        if let Some((held, envelope, signed)) = &self.checkpoint
            && held.position == position
            && signed.elapsed() < CHECKPOINT_AGE
        {
            return envelope.clone();
        }
        let checkpoint = Checkpoint {
            position,
            state: self.history.state,
            policy_version: self.view().policy().version,
            revocations: self.view().revocation_heads(),
            time: unix_now(),
        };
        let envelope = Envelope::seal(self.mesh(), &checkpoint, &[&self.keys.transport]);
        self.checkpoint = Some((checkpoint, envelope.clone(), Instant::now()));
        envelope
    }

    fn alarm(&mut self, text: String) {
        if !self.alarms.contains(&text) {
            self.alarms.push(text);
            if self.alarms.len() > MAX_ALARMS {
                self.alarms.remove(0);
            }
        }
        self.metrics.alarms.set(i64::try_from(self.alarms.len()).unwrap_or(i64::MAX));
    }

    /// What alarms with this in their text told of is over.
    fn forget_alarm(&mut self, part: &str) {
        self.alarms.retain(|alarm| !alarm.contains(part));
        self.metrics.alarms.set(i64::try_from(self.alarms.len()).unwrap_or(i64::MAX));
    }

    /// When [`Self::tick`] wants to be called next.
    pub(crate) fn next_tick(&self) -> Instant {
        [self.rotations_due(), self.anew_due].into_iter().flatten().fold(self.hub.due(), Instant::min)
    }

    /// Shows what is due: changes gathered for 50 ms, and a checkpoint each minute.
    pub(crate) fn tick(&mut self) {
        if self.hub.changes_due() {
            self.flush();
        }
        self.drive_rotations();
        if self.anew_due.is_some_and(|due| due <= Instant::now()) {
            self.grant_anew();
        }
        if self.hub.minute_due() {
            self.renew_grants();
            self.release_reservations();
            self.forget_successors();
            self.forget_tokens();
            self.rotate_audit();
            self.compact_store();
            self.flush();
            let checkpoint = self.checkpoint();
            self.hub.send_checkpoint(&checkpoint);
        }
    }

    /// Lets the store forget overwritten values: nobody asks for revisions that old.
    fn compact_store(&mut self) {
        let Ok(revision) = self.store.revision() else { return };
        if self.broken || revision < self.compacted + 2 * KEPT_REVISIONS {
            return;
        }
        match self.store.compact(revision - KEPT_REVISIONS) {
            Ok(()) => self.compacted = revision - KEPT_REVISIONS,
            Err(failure) => {
                warn!(error = %failure, "store not compacted");
                let _ = self.read_back();
            }
        }
    }

    /// Shows everything stored at once.
    fn flush(&mut self) {
        if self.hub.has_changes() {
            let checkpoint = self.checkpoint();
            let position = self.history.position;
            self.hub.flush(position, &checkpoint);
        }
        self.metrics.revision.set(i64::try_from(self.history.position.revision).unwrap_or(i64::MAX));
        self.metrics.sessions.set(i64::try_from(self.hub.sessions().len()).unwrap_or(i64::MAX));
    }
}

/// Why a change did not happen.
#[derive(Debug)]
enum ChangeError {
    /// The trust rules say no.
    Judged(TrustError),
    /// The store does.
    Refused(Refusal),
}

impl From<Refusal> for ChangeError {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

impl ChangeError {
    /// As a node is told, with `code` for what the trust rules refuse.
    fn into_refusal(self, code: RefusalCode) -> Refusal {
        match self {
            Self::Refused(refusal) => refusal,
            Self::Judged(error @ (TrustError::NameTaken { .. } | TrustError::PrefixTaken { .. })) => {
                refusal(RefusalCode::Taken, error.to_string())
            }
            Self::Judged(error @ TrustError::OutOfScope { .. }) => refusal(RefusalCode::OutOfScope, error.to_string()),
            Self::Judged(error @ TrustError::Revoked { .. }) => refusal(RefusalCode::Revoked, error.to_string()),
            Self::Judged(error) => refusal(code, error.to_string()),
        }
    }
}

/// Words for people with a code for programs.
pub(crate) fn refusal(code: RefusalCode, message: impl Into<String>) -> Refusal {
    Refusal { code, message: message.into() }
}

fn unavailable(error: &StoreError) -> Refusal {
    refusal(RefusalCode::Unavailable, format!("the keyserver cannot write: {error}"))
}

/// Seconds since 1970, to this machine's clock.
pub(crate) fn unix_now() -> UnixSeconds {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
