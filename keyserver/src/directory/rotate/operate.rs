//! What operators order, hold, and see of rotations.

use mesh_protocol::admin::{
    KeyPhase, NodeKeys, PlannedRotation, RotationChange, RotationFailure, RotationJob, RotationOrder, RotationState,
};
use mesh_protocol::control::{Refusal, RefusalCode};
use mesh_protocol::id::{Name, NodeId};

use super::job::{Job, Step};
use super::{RotationProgress, forced};
use crate::directory::{Directory, layout, refusal, unix_now};
use crate::store::{Operation, Txn};

/// Jobs that may be open at once.
const MAX_OPEN: usize = 16;
/// Jobs kept: about 100 bytes for each node in them.
const MAX_KEPT: usize = 64;
/// Shortest time between rounds, in seconds: nodes have no more keys to show than for an hourly rotation of some years.
const SHORTEST_EVERY: u64 = 3600;
/// Below this, the key before still answers when the next round begins.
const DAY: u64 = 86_400;

impl Directory {
    /// Makes a job of an order and begins it if it is time. Gives its number.
    pub(crate) fn order_rotation(&mut self, order: &RotationOrder) -> Result<u64, Refusal> {
        let mut job = self.job_of(order)?;
        if self.rotations.open().count() >= MAX_OPEN {
            let message =
                format!("{MAX_OPEN} rotations are open: see 'meshctl keys status', end one by 'meshctl keys cancel'");
            return Err(refusal(RefusalCode::Busy, message));
        }
        self.writable()?;
        job.id = self.rotations.jobs.last_key_value().map_or(1, |(last, _)| last + 1);
        let mut then = vec![Operation::Put(layout::rotation(job.id), mesh_protocol::cbor::to_vec(&job))];
        let forgotten = self.forgotten();
        then.extend(forgotten.iter().map(|id| Operation::Delete(layout::rotation(*id))));
        let wave = if job.wave < 100 { format!(", {} % at a time", job.wave) } else { String::new() };
        let every = job.every.map(|every| format!(", every {every} s")).unwrap_or_default();
        let detail = format!("job {}{}{wave}{every}", job.id, forced(&job));
        let deed = self.deed("rotate-request", self.whom(&job), detail, None);
        self.commit_with(&Txn { then, ..Txn::default() }, vec![deed])?;
        for id in forgotten {
            self.rotations.jobs.remove(&id);
        }
        let id = job.id;
        self.rotations.jobs.insert(id, job);
        self.rotations.seen = None;
        self.rotations.next_look = std::time::Instant::now();
        self.drive_rotations();
        Ok(id)
    }

    fn job_of(&self, order: &RotationOrder) -> Result<Job, Refusal> {
        let bad = |message: &str| refusal(RefusalCode::BadMessage, message);
        if order.cluster.is_some() && !order.nodes.is_empty() {
            return Err(bad("either nodes or a cluster"));
        }
        if let Some(cluster) = order.cluster.as_ref().filter(|cluster| self.view().policy().cluster(cluster).is_none())
        {
            return Err(refusal(RefusalCode::Token, format!("no cluster {cluster}: see 'meshctl cluster list'")));
        }
        let wave = order.wave.unwrap_or(100);
        if !(1..=100).contains(&wave) {
            return Err(bad("a wave is 1 to 100 in a hundred"));
        }
        match order.every {
            Some(every) if every < SHORTEST_EVERY => return Err(bad("rounds are an hour apart at least")),
            Some(every) if every < DAY && !order.force => {
                return Err(bad(
                    "below a day the key before still answers for peers that were away: that needs --force",
                ));
            }
            _ => {}
        }
        let mut nodes = order.nodes.iter().map(|node| self.find_node(node)).collect::<Result<Vec<NodeId>, _>>()?;
        nodes.sort_unstable();
        nodes.dedup();
        Ok(Job {
            id: 0,
            nodes,
            cluster: order.cluster.clone(),
            force: order.force,
            wave,
            every: order.every,
            next: Some(order.at.unwrap_or(0)),
            paused: false,
            round: None,
            ended: None,
            cancelled: false,
        })
    }

    /// The oldest jobs that are over, so that there is room for one more.
    fn forgotten(&self) -> Vec<u64> {
        let surplus = (self.rotations.jobs.len() + 1).saturating_sub(MAX_KEPT);
        let over = self.rotations.jobs.values().filter(|job| job.is_over());
        over.map(|job| job.id).take(surplus).collect()
    }

    /// What an order would do.
    pub(crate) fn plan_rotation(&self, order: &RotationOrder) -> Result<Vec<PlannedRotation>, Refusal> {
        let job = self.job_of(order)?;
        let chosen = self.chosen(&job);
        let waves = Job::plan(job.wave, chosen.len());
        let planned = chosen.iter().zip(waves).filter_map(|((node, epoch), wave)| {
            let member = self.view().member(*node)?;
            let previous = member.record.as_ref().and_then(|record| record.object.previous.as_ref());
            Some(PlannedRotation {
                node: member.grant.object.name.clone(),
                wave,
                connected: self.hub.sessions().contains_key(node),
                epoch: *epoch,
                previous: previous.map(|previous| previous.epoch),
            })
        });
        Ok(planned.collect())
    }

    /// Holds jobs, lets them go on, or ends them. Gives those that changed.
    pub(crate) fn change_rotation(
        &mut self,
        job: Option<u64>,
        change: RotationChange,
    ) -> Result<Vec<RotationJob>, Refusal> {
        let ids = match job {
            None => self.rotations.open_ids(),
            Some(id) => match self.rotations.jobs.get(&id) {
                Some(job) if !job.is_over() => vec![id],
                Some(_) => return Err(refusal(RefusalCode::Taken, format!("rotation {id} is over"))),
                None => {
                    let message = format!("no rotation {id}: see 'meshctl keys status'");
                    return Err(refusal(RefusalCode::Token, message));
                }
            },
        };
        self.writable()?;
        let mut changed = Vec::new();
        for id in ids {
            let Some(held) = self.rotations.jobs.get(&id) else { continue };
            let mut job = held.clone();
            let action = match change {
                RotationChange::Pause => {
                    job.paused = true;
                    "rotate-pause"
                }
                RotationChange::Resume => {
                    job.paused = false;
                    "rotate-resume"
                }
                RotationChange::Cancel => {
                    (job.cancelled, job.ended, job.next) = (true, Some(unix_now()), None);
                    "rotate-cancel"
                }
            };
            if job == *held {
                continue;
            }
            let deed = self.deed(action, self.whom(&job), format!("job {id}"), None);
            let put = Operation::Put(layout::rotation(id), mesh_protocol::cbor::to_vec(&job));
            self.commit_with(&Txn { then: vec![put], ..Txn::default() }, vec![deed])?;
            self.rotations.jobs.insert(id, job);
            if change == RotationChange::Resume {
                self.ask_all_again(id);
            }
            changed.push(id);
        }
        self.rotations.seen = None;
        self.hub.progressed();
        self.drive_rotations();
        Ok(changed.iter().filter_map(|id| Some(self.job_status(self.rotations.jobs.get(id)?))).collect())
    }

    /// All jobs, newest first, and the keys of all nodes.
    pub(crate) fn list_rotations(&mut self) -> (Vec<RotationJob>, Vec<NodeKeys>) {
        self.look_at_keys();
        let jobs = self.rotations.jobs.values().rev().map(|job| self.job_status(job)).collect();
        let mut nodes: Vec<NodeKeys> = self.view().members().filter_map(|(node, _)| self.keys_of(*node)).collect();
        nodes.sort_by(|one, other| one.name.cmp(&other.name));
        (jobs, nodes)
    }

    fn keys_of(&self, node: NodeId) -> Option<NodeKeys> {
        let member = self.view().member(node)?;
        let record = member.record.as_ref().map(|record| &record.object);
        let phase = record.map(|record| match self.rotations.keys.get(&node) {
            Some(known) if known.confirmed && record.previous.is_none() => KeyPhase::Retired,
            Some(known) if known.confirmed => KeyPhase::Confirmed,
            _ => KeyPhase::Promoted,
        });
        let wanted = |job: &&Job| {
            let step = job.under_way().and_then(|_| self.step_of(job, node));
            matches!(step, Some(Step::Unasked | Step::Asked | Step::Offline))
        };
        Some(NodeKeys {
            name: member.grant.object.name.clone(),
            node,
            cluster: member.grant.object.cluster.clone(),
            connected: self.hub.sessions().contains_key(&node),
            epoch: record.map(|record| record.current.epoch),
            phase,
            jobs: self.rotations.open().filter(wanted).map(|job| job.id).collect(),
        })
    }

    fn job_status(&self, job: &Job) -> RotationJob {
        let steps = self.steps(job);
        let count = |wanted: &[Step]| {
            u32::try_from(steps.iter().filter(|step| wanted.contains(step)).count()).unwrap_or(u32::MAX)
        };
        let (wave, waves) = job.waves();
        RotationJob {
            job: job.id,
            state: job.state(&steps),
            whom: self.whom(job),
            force: job.force,
            wave_percent: job.wave,
            wave,
            waves,
            every: job.every,
            next: job.next.filter(|next| *next > 0),
            began: job.round.as_ref().map(|round| round.began),
            ended: job.ended.or_else(|| job.round.as_ref()?.ended),
            total: u32::try_from(steps.len()).unwrap_or(u32::MAX),
            promoted: count(&[Step::Promoted, Step::Confirmed]),
            confirmed: count(&[Step::Confirmed]),
            failed: self.failures(job, &steps),
            offline: count(&[Step::Offline]),
        }
    }

    fn whom(&self, job: &Job) -> String {
        match &job.cluster {
            Some(cluster) => format!("cluster {cluster}"),
            None if job.nodes.is_empty() => "all".to_owned(),
            None => job.nodes.iter().map(|node| self.node_name(*node)).collect::<Vec<_>>().join(" "),
        }
    }

    fn node_name(&self, node: NodeId) -> String {
        self.view().member(node).map_or_else(|| node.short(), |member| member.grant.object.name.to_string())
    }

    fn failures(&self, job: &Job, steps: &[Step]) -> Vec<RotationFailure> {
        let turns = job.round.iter().flat_map(|round| &round.turns).zip(steps);
        let failed = turns.filter(|(_, step)| **step == Step::Failed);
        let failure = |(turn, _): (&super::job::Turn, &Step)| {
            let member = self.view().member(turn.node)?;
            let error = turn.failed.clone().unwrap_or_else(|| "is no member any more".to_owned());
            Some(RotationFailure { node: member.grant.object.name.clone(), error })
        };
        failed.filter_map(failure).collect()
    }

    /// How far a job is.
    pub(crate) fn rotation_progress(&mut self, id: u64) -> Result<RotationProgress, Refusal> {
        self.drive_rotations();
        self.look_at_keys();
        let job = self.rotations.jobs.get(&id);
        let job =
            job.ok_or_else(|| refusal(RefusalCode::Token, format!("no rotation {id}: see 'meshctl keys status'")))?;
        let steps = self.steps(job);
        let state = job.state(&steps);
        let (wave, waves) = job.waves();
        let named = |wanted: &[Step]| -> Vec<Name> {
            let turns = job.round.iter().flat_map(|round| &round.turns).zip(&steps);
            let turns = turns.filter(|(_, step)| wanted.contains(step));
            let members = turns.filter_map(|(turn, _)| self.view().member(turn.node));
            members.map(|member| member.grant.object.name.clone()).collect()
        };
        Ok(RotationProgress {
            job: id,
            wave,
            waves,
            total: u32::try_from(steps.len()).unwrap_or(u32::MAX),
            promoted: named(&[Step::Promoted, Step::Confirmed]),
            confirmed: named(&[Step::Confirmed]),
            failed: self.failures(job, &steps),
            offline: named(&[Step::Offline]),
            done: state != RotationState::Running,
        })
    }
}
