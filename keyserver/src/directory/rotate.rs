//! Rotation on an operator's word: a job in the store, driven in waves. Nodes are asked, their new records show that they
//! did, confirmations that all know. A node decides for itself: it promotes its own spare key, and refuses what comes too
//! often.
//!
//! ```text
//! order ──> job (store) ── due ──> round ── wave by wave ──> Rotate to its nodes
//!                                    └── steps <── records, confirmations, refusals
//! ```
//!
//! What a job has decided is stored before anybody is asked, and a node may be asked twice: after an end of this process,
//! of a node or of a session, it goes on from the store and the directory.

mod job;
mod operate;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use mesh_protocol::UnixSeconds;
use mesh_protocol::admin::RotationFailure;
use mesh_protocol::cbor;
use mesh_protocol::control::{Refusal, ServerMessage};
use mesh_protocol::id::{Name, NodeId};
use tracing::{info, warn};

use super::{Directory, SessionKey, layout, unix_now};
use crate::store::{Operation, Range, Store, StoreError, Txn};

use job::{AWAITED, Job, Step};

/// Least time between two looks at jobs.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// After a refused write.
const LOOK_AFTER_FAILURE: Duration = Duration::from_secs(10);

/// All jobs, and what the directory does not say of nodes' keys.
#[derive(Debug)]
pub(super) struct Jobs {
    jobs: BTreeMap<u64, Job>,
    /// Of each node, its newest key.
    keys: BTreeMap<NodeId, Known>,
    /// When they may be looked at again, and how often something had happened when they were last.
    next_look: Instant,
    seen: Option<u64>,
}

/// What is known of a node's newest key.
#[derive(Debug, Clone, Copy)]
struct Known {
    epoch: u64,
    /// Revision of the directory that has it.
    revision: u64,
    /// Every connected node has had it in force.
    confirmed: bool,
}

/// How far a rotation is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct RotationProgress {
    pub(crate) job: u64,
    pub(crate) wave: u32,
    pub(crate) waves: u32,
    pub(crate) total: u32,
    pub(crate) promoted: Vec<Name>,
    pub(crate) confirmed: Vec<Name>,
    pub(crate) failed: Vec<RotationFailure>,
    pub(crate) offline: Vec<Name>,
    /// Nothing more will happen for now.
    pub(crate) done: bool,
}

impl Jobs {
    /// Reads them from the store. What does not decode was written by no version of this program.
    pub(super) fn load(store: &dyn Store) -> Result<Self, StoreError> {
        let entries = store.range(&Range::prefix(layout::ROTATIONS), None, usize::MAX)?;
        let jobs = entries.iter().filter_map(|entry| cbor::from_slice::<Job>(&entry.value).ok());
        let jobs = jobs.map(|job| (job.id, job)).collect();
        Ok(Self { jobs, keys: BTreeMap::new(), next_look: Instant::now(), seen: None })
    }

    /// Keeps what only this process knows of `before`.
    pub(super) fn keep(&mut self, before: Self) {
        (self.keys, self.next_look) = (before.keys, Instant::now() + LOOK_AFTER_FAILURE);
    }

    /// As if the clock had been set forward by `seconds` for one job.
    #[cfg(test)]
    pub(super) fn backdate(&mut self, id: u64, seconds: u64) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        job.next = job.next.map(|next| next.saturating_sub(seconds));
        if let Some(round) = &mut job.round {
            round.began = round.began.saturating_sub(seconds);
        }
    }

    fn open(&self) -> impl Iterator<Item = &Job> {
        self.jobs.values().filter(|job| !job.is_over())
    }

    fn open_ids(&self) -> Vec<u64> {
        self.open().map(|job| job.id).collect()
    }
}

impl Directory {
    /// When [`Self::drive_rotations`] wants to be called: something happened, or a job's time comes.
    pub(super) fn rotations_due(&self) -> Option<Instant> {
        self.rotations.open().next()?;
        if self.rotations.seen != Some(self.hub.happened()) {
            return Some(self.rotations.next_look);
        }
        let now = unix_now();
        let next = self.rotations.open().filter(|job| !job.paused).filter_map(|job| job.next).min()?;
        // Wall clocks are set: it is looked at again after an hour at the latest.
        let wait = Duration::from_secs(next.saturating_sub(now).min(3600));
        Some((Instant::now() + wait).max(self.rotations.next_look))
    }

    /// Takes every job as far as it goes now.
    pub(super) fn drive_rotations(&mut self) {
        if self.rotations_due().is_none_or(|due| due > Instant::now()) {
            return;
        }
        self.rotations.next_look = Instant::now() + LOOK_EVERY;
        self.rotations.seen = Some(self.hub.happened());
        self.look_at_keys();
        for id in self.rotations.open_ids() {
            if self.drive(id).is_err() {
                // Refused: logged there, and the alarm stands.
                self.rotations.next_look = Instant::now() + LOOK_AFTER_FAILURE;
                self.rotations.seen = None;
                return;
            }
        }
    }

    /// As if its time had come.
    #[cfg(test)]
    pub(super) fn drive_rotations_now(&mut self) {
        (self.rotations.next_look, self.rotations.seen) = (Instant::now(), None);
        self.drive_rotations();
    }

    /// Notes which keys are new and which are in force everywhere.
    fn look_at_keys(&mut self) {
        let (least, revision) = (self.least_applied(), self.position().revision);
        let members = self.history.view.members();
        let mut keys = BTreeMap::new();
        for (node, member) in members {
            let Some(record) = &member.record else { continue };
            let epoch = record.object.current.epoch;
            let held = self.rotations.keys.get(node).copied().filter(|held| held.epoch == epoch);
            let mut known = held.unwrap_or(Known { epoch, revision, confirmed: false });
            known.confirmed |= least.is_none_or(|least| least >= known.revision);
            keys.insert(*node, known);
        }
        self.rotations.keys = keys;
    }

    /// Revision that every connected node has in force; none: nobody is connected.
    fn least_applied(&self) -> Option<u64> {
        let epoch = self.position().epoch;
        let sessions = self.hub.sessions().values();
        let applied = sessions.map(|session| session.applied.filter(|applied| applied.epoch == epoch));
        applied.map(|applied| applied.map_or(0, |applied| applied.revision)).min()
    }

    fn drive(&mut self, id: u64) -> Result<(), Refusal> {
        let now = unix_now();
        loop {
            let Some(held) = self.rotations.jobs.get(&id) else { return Ok(()) };
            let mut job = held.clone();
            if job.is_due(now) {
                job.begin(self.chosen(&job), now);
            }
            self.give_up_absent(&mut job, now);
            let asked = job.advance(&self.steps(&job), now);
            if job == *held {
                return Ok(());
            }
            self.store_job(job, now)?;
            self.ask(id, asked);
        }
    }

    /// Nodes of a round that begins, with the epochs of their keys, in the order of their ids, which is no order of theirs:
    /// a wave is a sample of all clusters.
    fn chosen(&self, job: &Job) -> Vec<(NodeId, Option<u64>)> {
        let members = self.view().members().filter(|(_, member)| !member.has_departed());
        let members = members.filter(|(node, member)| match &job.cluster {
            Some(cluster) => member.grant.object.cluster == *cluster,
            None => job.nodes.is_empty() || job.nodes.contains(node),
        });
        members.map(|(node, member)| (*node, member.record.as_ref().map(|held| held.object.current.epoch))).collect()
    }

    /// A node that does not come for a day is left to its own schedule.
    fn give_up_absent(&self, job: &mut Job, now: UnixSeconds) {
        let Some(round) = job.under_way().filter(|round| now >= round.began.saturating_add(AWAITED)) else { return };
        let steps = self.steps(job);
        let absent = round.turns.iter().zip(steps).filter(|(_, step)| *step == Step::Offline);
        let absent: Vec<NodeId> = absent.map(|(turn, _)| turn.node).collect();
        for node in absent {
            job.fail(node, "was not connected for a day");
        }
    }

    /// Writes a job, and in the audit log that its round began or ended.
    fn store_job(&mut self, job: Job, now: UnixSeconds) -> Result<(), Refusal> {
        let before = self.rotations.jobs.get(&job.id).and_then(|held| held.round.as_ref()).map(|round| round.number);
        let round = job.round.as_ref().filter(|round| Some(round.number) != before);
        let begun = round.map(|round| {
            let detail = format!("round {} of {} nodes{}", round.number, round.turns.len(), forced(&job));
            self.deed("rotate-round", format!("job {}", job.id), detail, None)
        });
        self.writable()?;
        let put = Operation::Put(layout::rotation(job.id), cbor::to_vec(&job));
        self.commit_with(&Txn { then: vec![put], ..Txn::default() }, begun.into_iter().collect())?;
        if job.ended == Some(now) {
            info!(job = job.id, "rotation over");
        }
        self.rotations.jobs.insert(job.id, job);
        Ok(())
    }

    fn ask(&mut self, id: u64, turns: std::ops::Range<usize>) {
        // What was published before goes out first, in this order.
        self.flush();
        let Some(job) = self.rotations.jobs.get(&id) else { return };
        let Some(round) = &job.round else { return };
        let request = job.request();
        for turn in round.turns.get(turns).unwrap_or_default() {
            let message = ServerMessage::Rotate { request, force: job.force, after: turn.before };
            self.hub.send(turn.node, &message);
        }
    }

    /// A node has a new session: what it was asked in the one before may not have reached it.
    pub(super) fn ask_again(&mut self, node: NodeId) {
        for id in self.rotations.open_ids() {
            let Some(job) = self.rotations.jobs.get(&id).filter(|job| !job.paused) else { continue };
            let Some(round) = job.under_way() else { continue };
            let opened = round.turns.iter().take(round.opened as usize);
            let Some(at) = opened.into_iter().position(|turn| turn.node == node) else { continue };
            if matches!(self.step(&round.turns[at], true), Step::Asked | Step::Offline) {
                self.ask(id, at..at + 1);
            }
        }
    }

    /// Asks those again who were asked and did not answer: the job was held.
    fn ask_all_again(&mut self, id: u64) {
        let nodes = self
            .rotations
            .jobs
            .get(&id)
            .and_then(Job::under_way)
            .map(|round| round.turns.iter().take(round.opened as usize).map(|turn| turn.node).collect::<Vec<_>>());
        let nodes = nodes.unwrap_or_default();
        nodes.into_iter().for_each(|node| self.ask_again(node));
    }

    /// A node answered.
    pub(crate) fn rotated(&mut self, key: SessionKey, request: u64, epoch: Option<u64>, error: Option<String>) {
        let id = Job::of_request(request);
        let job = self.rotations.jobs.get(&id).filter(|job| job.request() == request && !job.is_over());
        // Its record tells better that it did.
        if let (Some(mut job), None) = (job.cloned(), epoch) {
            let words = error.unwrap_or_else(|| "it did not say why".to_owned());
            let asked = self.step_of(&job, key.node) == Some(Step::Asked);
            if asked && job.fail(key.node, &words) {
                warn!(job = id, node = %key.node.short(), error = %words, "node did not rotate");
                // Refused: it is asked again with its next session.
                let _ = self.store_job(job, unix_now());
            }
        }
        self.hub.progressed();
    }

    /// How far each node of the newest round is.
    fn steps(&self, job: &Job) -> Vec<Step> {
        let Some(round) = &job.round else { return Vec::new() };
        let opened = round.opened as usize;
        round.turns.iter().enumerate().map(|(at, turn)| self.step(turn, at < opened)).collect()
    }

    fn step_of(&self, job: &Job, node: NodeId) -> Option<Step> {
        let round = job.round.as_ref()?;
        let at = round.turns.iter().position(|turn| turn.node == node)?;
        Some(self.step(&round.turns[at], at < round.opened as usize))
    }

    fn step(&self, turn: &job::Turn, opened: bool) -> Step {
        if turn.confirmed {
            return Step::Confirmed;
        }
        let Some(member) = self.view().member(turn.node) else { return Step::Failed };
        let epoch = member.record.as_ref().map(|record| record.object.current.epoch);
        if epoch > turn.before {
            let known = self.rotations.keys.get(&turn.node);
            let confirmed = known.is_some_and(|known| known.confirmed && Some(known.epoch) == epoch);
            return if confirmed { Step::Confirmed } else { Step::Promoted };
        }
        match (&turn.failed, opened) {
            (Some(_), _) => Step::Failed,
            (None, false) => Step::Unasked,
            (None, true) if self.hub.sessions().contains_key(&turn.node) => Step::Asked,
            (None, true) => Step::Offline,
        }
    }
}

fn forced(job: &Job) -> &'static str {
    if job.force { ", forced" } else { "" }
}
