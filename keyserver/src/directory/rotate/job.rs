//! A rotation job as it lies in the store: who is in it, who was asked, who refused. What a node has done since is in the
//! directory, so that a job is right again after any end of this process.
//!
//! ```text
//! scheduled ── its time ──> round: wave 1 ── through ──> wave 2 ─ .. ─> over ── every ──> scheduled
//! ```

use std::ops::Range;

use mesh_protocol::UnixSeconds;
use mesh_protocol::admin::RotationState;
use mesh_protocol::id::{Name, NodeId};
use minicbor::{Decode, Encode};

/// How long a node that is not connected is awaited.
pub(super) const AWAITED: UnixSeconds = 24 * 60 * 60;
/// Longest text of a node's refusal, in characters.
const LONGEST_ERROR: usize = 256;
/// Bits of a request number that say which round it is of.
const ROUND_BITS: u32 = 24;

/// A job.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub(super) struct Job {
    #[n(0)]
    pub(super) id: u64,
    /// Chosen nodes; empty: all, or all of the cluster, as they are when a round begins.
    #[n(1)]
    pub(super) nodes: Vec<NodeId>,
    #[n(2)]
    pub(super) cluster: Option<Name>,
    #[n(3)]
    pub(super) force: bool,
    /// Nodes in a hundred that are asked at a time, 1 to 100.
    #[n(4)]
    pub(super) wave: u8,
    /// Seconds from the end of a round to the next one.
    #[n(5)]
    pub(super) every: Option<u64>,
    /// When the next round begins.
    #[n(6)]
    pub(super) next: Option<UnixSeconds>,
    #[n(7)]
    pub(super) paused: bool,
    /// The newest round.
    #[n(8)]
    pub(super) round: Option<Round>,
    /// No round will follow.
    #[n(9)]
    pub(super) ended: Option<UnixSeconds>,
    #[n(10)]
    pub(super) cancelled: bool,
}

/// One pass over the nodes.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub(super) struct Round {
    /// Counted from 1.
    #[n(0)]
    pub(super) number: u64,
    #[n(1)]
    pub(super) began: UnixSeconds,
    #[n(2)]
    pub(super) ended: Option<UnixSeconds>,
    /// In the order in which they are asked.
    #[n(3)]
    pub(super) turns: Vec<Turn>,
    /// So many of them were asked, or are when they connect.
    #[n(4)]
    pub(super) opened: u32,
}

/// One node in a round.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub(super) struct Turn {
    #[n(0)]
    pub(super) node: NodeId,
    /// Epoch of its current key when the round began: above it, it has rotated.
    #[n(1)]
    pub(super) before: Option<u64>,
    /// Why it did not.
    #[n(2)]
    pub(super) failed: Option<String>,
    /// It did, and all knew, when a wave began after it or the round ended.
    #[n(3)]
    pub(super) confirmed: bool,
}

/// How far a node is in a round.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// Its wave has not begun.
    Unasked,
    /// Asked, and not answered.
    Asked,
    /// To be asked, and not connected.
    Offline,
    /// Its new record is in the directory.
    Promoted,
    /// And in force at every connected node.
    Confirmed,
    /// It will not.
    Failed,
}

impl Step {
    /// Whether the next wave need not wait for it.
    fn is_settled(self) -> bool {
        matches!(self, Self::Confirmed | Self::Failed | Self::Offline)
    }
}

impl Job {
    /// Whether a round should begin.
    pub(super) fn is_due(&self, now: UnixSeconds) -> bool {
        !self.is_over() && !self.paused && !self.is_under_way() && self.next.is_some_and(|next| next <= now)
    }

    /// Whether nothing will follow.
    pub(super) fn is_over(&self) -> bool {
        self.ended.is_some()
    }

    /// The round that is under way.
    pub(super) fn under_way(&self) -> Option<&Round> {
        self.round.as_ref().filter(|round| round.ended.is_none() && !self.is_over())
    }

    fn is_under_way(&self) -> bool {
        self.under_way().is_some()
    }

    /// Begins a round with these nodes and the epochs of their current keys.
    pub(super) fn begin(&mut self, nodes: Vec<(NodeId, Option<u64>)>, now: UnixSeconds) {
        let number = self.round.as_ref().map_or(1, |round| round.number + 1);
        let turns =
            nodes.into_iter().map(|(node, before)| Turn { node, before, failed: None, confirmed: false }).collect();
        self.round = Some(Round { number, began: now, ended: None, turns, opened: 0 });
        self.next = None;
    }

    /// Goes on as far as the `steps` of its nodes allow; gives the turns to ask now. An ended round is noted as such.
    pub(super) fn advance(&mut self, steps: &[Step], now: UnixSeconds) -> Range<usize> {
        let (paused, size) = (self.paused, self.wave_size());
        let Some(round) = self.round.as_mut().filter(|round| round.ended.is_none()) else { return 0..0 };
        let mut opened = round.opened as usize;
        let first = opened;
        let mut steps = steps.to_vec();
        while !paused && opened < round.turns.len() && steps[..opened].iter().all(|step| step.is_settled()) {
            let until = (opened + size).min(round.turns.len());
            // What was not asked yet cannot be more than asked by it.
            steps[opened..until].iter_mut().filter(|step| **step == Step::Unasked).for_each(|step| *step = Step::Asked);
            opened = until;
        }
        round.opened = u32::try_from(opened).unwrap_or(u32::MAX);
        let through = |step: &Step| matches!(step, Step::Confirmed | Step::Failed);
        if steps.iter().all(through) {
            round.ended = Some(now);
            match self.every {
                Some(every) => self.next = Some(now.saturating_add(every)),
                None => self.ended = Some(now),
            }
        }
        if opened > first || round.ended.is_some() {
            let confirmed = round.turns.iter_mut().zip(&steps).filter(|(_, step)| **step == Step::Confirmed);
            confirmed.for_each(|(turn, _)| turn.confirmed = true);
        }
        first..opened
    }

    /// Notes that a node will not, unless it has. Tells whether that is news.
    pub(super) fn fail(&mut self, node: NodeId, error: &str) -> bool {
        let turns = self.round.iter_mut().flat_map(|round| &mut round.turns);
        let Some(turn) = turns.into_iter().find(|turn| turn.node == node && turn.failed.is_none()) else {
            return false;
        };
        turn.failed = Some(error.chars().take(LONGEST_ERROR).collect());
        true
    }

    /// Number that a request of the newest round carries.
    pub(super) fn request(&self) -> u64 {
        let round = self.round.as_ref().map_or(0, |round| round.number);
        self.id << ROUND_BITS | round & ((1 << ROUND_BITS) - 1)
    }

    /// Number of the job that a request is of.
    pub(super) fn of_request(request: u64) -> u64 {
        request >> ROUND_BITS
    }

    fn wave_size(&self) -> usize {
        let total = self.round.as_ref().map_or(0, |round| round.turns.len());
        (total * usize::from(self.wave)).div_ceil(100).max(1)
    }

    /// Wave that is under way, from 1, and how many there are.
    pub(super) fn waves(&self) -> (u32, u32) {
        let Some(round) = &self.round else { return (0, 0) };
        let waves = |turns: usize| u32::try_from(turns.div_ceil(self.wave_size())).unwrap_or(u32::MAX);
        (waves(round.opened as usize), waves(round.turns.len()))
    }

    /// In which wave each of `total` nodes would be, from 1.
    pub(super) fn plan(wave: u8, total: usize) -> impl Iterator<Item = u32> {
        let size = (total * usize::from(wave)).div_ceil(100).max(1);
        (0..total).map(move |at| u32::try_from(at / size + 1).unwrap_or(u32::MAX))
    }

    /// Where it stands.
    pub(super) fn state(&self, steps: &[Step]) -> RotationState {
        if self.cancelled {
            RotationState::Cancelled
        } else if self.is_over() {
            RotationState::Done
        } else if self.paused {
            RotationState::Paused
        } else if !self.is_under_way() {
            RotationState::Scheduled
        } else if steps.iter().all(|step| step.is_settled()) {
            RotationState::Waiting
        } else {
            RotationState::Running
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(count: u8, wave: u8) -> Job {
        let (nodes, cluster, every) = (Vec::new(), None, None);
        let mut job = Job {
            id: 7,
            nodes,
            cluster,
            force: false,
            wave,
            every,
            next: Some(100),
            paused: false,
            round: None,
            ended: None,
            cancelled: false,
        };
        assert!(!job.is_due(99) && job.is_due(100));
        job.begin((0..count).map(|number| (NodeId([number; 32]), Some(1))).collect(), 100);
        job
    }

    #[test]
    fn waves_follow_each_other_when_their_nodes_are_through() {
        let mut job = job(10, 25);
        let mut steps = vec![Step::Unasked; 10];
        assert_eq!(job.advance(&steps, 101), 0..3);
        assert_eq!(job.waves(), (1, 4));
        steps[..3].copy_from_slice(&[Step::Confirmed, Step::Promoted, Step::Failed]);
        assert_eq!(job.advance(&steps, 102), 3..3, "one is not confirmed");
        assert_eq!(job.state(&steps), RotationState::Running);
        steps[1] = Step::Offline;
        assert_eq!(job.advance(&steps, 103), 3..6, "one that is away holds up nobody");
        job.paused = true;
        steps[3..6].fill(Step::Confirmed);
        assert_eq!(job.advance(&steps, 104), 6..6);
        assert_eq!(job.state(&steps), RotationState::Paused);
        job.paused = false;
        // Some rotated before they were asked.
        steps[6..9].fill(Step::Confirmed);
        assert_eq!(job.advance(&steps, 105), 6..10);
        steps[9] = Step::Confirmed;
        job.advance(&steps, 106);
        assert_eq!((job.state(&steps), job.is_over()), (RotationState::Waiting, false), "one is still away");
        steps[1] = Step::Confirmed;
        job.advance(&steps, 107);
        assert_eq!((job.state(&steps), job.ended), (RotationState::Done, Some(107)));
    }

    #[test]
    fn a_recurring_job_begins_again_after_the_end_of_its_round() {
        let mut job = job(2, 100);
        job.every = Some(3600);
        assert_eq!(job.advance(&[Step::Unasked; 2], 100), 0..2);
        let first = job.request();
        job.advance(&[Step::Confirmed; 2], 500);
        assert!(!job.is_over() && !job.is_due(4_099) && job.is_due(4_100));
        job.begin(vec![(NodeId([1; 32]), Some(2))], 4_100);
        assert_ne!(job.request(), first, "a late answer to the first round is none to the second");
        assert_eq!((Job::of_request(first), Job::of_request(job.request())), (7, 7));
    }

    #[test]
    fn a_job_of_nobody_is_over_at_once() {
        let mut job = job(0, 10);
        assert_eq!(job.advance(&[], 100), 0..0);
        assert!(job.is_over());
    }

    #[test]
    fn every_node_is_in_exactly_one_wave_whatever_the_size() {
        for count in 0..=120_u8 {
            for wave in [1, 3, 10, 33, 50, 99, 100] {
                let mut job = job(count, wave);
                let (mut steps, mut asked) = (vec![Step::Unasked; count.into()], Vec::new());
                while !job.is_over() {
                    let opened = job.advance(&steps, 1);
                    steps[opened.clone()].fill(Step::Confirmed);
                    asked.extend(opened);
                }
                assert_eq!(asked, (0..usize::from(count)).collect::<Vec<_>>());
                let planned = Job::plan(wave, count.into()).last().unwrap_or(0);
                assert_eq!(job.waves(), (planned, planned), "{count} nodes by {wave} %");
            }
        }
    }
}
