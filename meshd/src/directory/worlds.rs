//! What peers pass on: checkpoints and objects; and whether all see one history.
//!
//! A keyserver that shows two worlds has to sign a checkpoint for each. Every node remembers the states it saw, one for
//! each revision, so that a peer's checkpoint of any of them that names another state gives it away.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use mesh_protocol::UnixSeconds;
use mesh_protocol::envelope::Envelope;
use mesh_protocol::id::{Hash, Position};
use mesh_protocol::record::Checkpoint;
use mesh_protocol::trust::{Change, CheckpointVerdict, TrustError, compare_checkpoints};

use super::{Directory, alarm};

/// States remembered: 2,048 of 48 bytes, 96 KiB. A peer that is further behind than that is not compared.
const MOST_STATES: usize = 2_048;
/// How long a keyserver may take to show what it has shown to a peer.
const SHOW_WITHIN: Duration = Duration::from_secs(15);

/// States of the history at positions that were seen, oldest first.
#[derive(Debug, Default)]
pub(super) struct States(VecDeque<(Position, Hash)>);

impl States {
    /// Remembers one. A position that is known keeps its state.
    pub(super) fn note(&mut self, position: Position, state: Hash) {
        if self.at(position).is_some() {
            return;
        }
        if self.0.len() >= MOST_STATES {
            self.0.pop_front();
        }
        self.0.push_back((position, state));
    }

    /// The state at a position, if it was seen.
    pub(super) fn at(&self, position: Position) -> Option<Hash> {
        self.0.iter().rev().find(|(seen, _)| *seen == position).map(|(_, state)| *state)
    }
}

/// A checkpoint that a peer passed on.
#[derive(Debug)]
pub(super) struct Heard {
    checkpoint: Checkpoint,
    envelope: Envelope,
    since: Instant,
    /// The latest time of any that was passed on.
    latest: UnixSeconds,
}

fn is_further(one: &Checkpoint, other: &Checkpoint) -> bool {
    if one.position.epoch == other.position.epoch {
        (one.position.revision, one.time) > (other.position.revision, other.time)
    } else {
        one.time > other.time
    }
}

/// What became of an object that a peer passed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Taken {
    /// It changed something.
    News,
    /// It was known, or is of no use.
    Nothing,
    /// It breaks a rule.
    Refused,
}

impl Directory {
    /// The state of the history at `position`, if this node saw it.
    pub(crate) fn state_at(&self, position: Position) -> Option<Hash> {
        self.states.at(position)
    }

    /// The checkpoint that is furthest in the history, from a keyserver or passed on by a peer; of histories that do not
    /// compare, the later one.
    pub(crate) fn newest_checkpoint(&self) -> Option<(&Checkpoint, &Envelope)> {
        let own = self.checkpoint.as_ref().map(|(checkpoint, envelope)| (checkpoint, envelope));
        let heard = self.heard.as_ref().map(|heard| (&heard.checkpoint, &heard.envelope));
        match (own, heard) {
            (Some(own), Some(heard)) => Some(if is_further(heard.0, own.0) { heard } else { own }),
            (own, heard) => own.or(heard),
        }
    }

    /// The checkpoint that proved two worlds last: shown to peers, so that all of them see it.
    pub(crate) fn proof(&self) -> Option<(&Checkpoint, &Envelope)> {
        self.proof.as_ref().map(|(checkpoint, envelope)| (checkpoint, envelope))
    }

    /// The latest time that any keyserver signed.
    pub(crate) fn checkpoint_time(&self) -> Option<UnixSeconds> {
        let heard = self.heard.as_ref().map(|heard| heard.latest);
        self.checkpoint().map(|checkpoint| checkpoint.time).max(heard)
    }

    /// Takes a checkpoint that `peer` passed on. Tells whether it is fresher than any before: exposure starts over then.
    pub(crate) fn hear_checkpoint(&mut self, envelope: &Envelope, peer: &str, now: Instant) -> Taken {
        let Ok(got) = self.view.checkpoint(envelope) else {
            // Signed under a policy that this node does not have yet, or had.
            self.refused += 1;
            return Taken::Refused;
        };
        if !self.is_one_world(&got) {
            self.two_worlds(&got, envelope, &format!("to node {peer}"), now);
            return Taken::Refused;
        }
        let fresh = self.checkpoint_time().is_none_or(|latest| got.time > latest);
        self.states.note(got.position, got.state);
        let latest = self.heard.as_ref().map_or(got.time, |heard| heard.latest.max(got.time));
        match &mut self.heard {
            Some(heard) if !is_further(&got, &heard.checkpoint) => heard.latest = latest,
            heard => *heard = Some(Heard { checkpoint: got, envelope: envelope.clone(), since: now, latest }),
        }
        if fresh { Taken::News } else { Taken::Nothing }
    }

    /// Whether a verified checkpoint fits everything that was seen.
    pub(super) fn is_one_world(&self, got: &Checkpoint) -> bool {
        let contradicts = |held: &Checkpoint| compare_checkpoints(held, got) == CheckpointVerdict::Equivocation;
        let held = self.checkpoint().is_some_and(contradicts);
        let heard = self.heard.as_ref().is_some_and(|heard| contradicts(&heard.checkpoint));
        !held && !heard && self.states.at(got.position).is_none_or(|state| state == got.state)
    }

    /// A keyserver signed two states of one revision: keeps both, says so; what was there stays.
    pub(super) fn two_worlds(&mut self, got: &Checkpoint, envelope: &Envelope, shown: &str, now: Instant) {
        if self.proof.as_ref().is_some_and(|(_, proof)| proof == envelope) {
            return;
        }
        self.proof = Some((got.clone(), envelope.clone()));
        let message = format!(
            "a keyserver shows two worlds: the state of revision {} that it signed {shown} is not the one this node has; \
             tunnels stay up, the evidence is in 'meshctl audit'",
            got.position.revision
        );
        self.split = true;
        self.equivocations += 1;
        self.alarms.raise(alarm::EQUIVOCATION, "checkpoint", message, now);
        let held = self.checkpoint.as_ref().map(|(_, envelope)| envelope.clone());
        let heard = self.heard.as_ref().map(|heard| heard.envelope.clone());
        for proof in held.into_iter().chain(heard).chain([envelope.clone()]) {
            self.keep_evidence(&proof);
        }
    }

    /// Whether a keyserver's own word lags behind what it told peers, for longer than a message takes.
    pub(super) fn is_withheld(&self, got: &Checkpoint, now: Instant) -> bool {
        let behind = |heard: &Checkpoint| {
            heard.position.epoch == got.position.epoch && heard.position.revision > got.position.revision
        };
        self.heard
            .as_ref()
            .is_some_and(|heard| behind(&heard.checkpoint) && now.saturating_duration_since(heard.since) >= SHOW_WITHIN)
    }

    /// Takes a policy, grant, record, endpoints or revocation that a peer passed on: by the same rules as from a
    /// keyserver, but that a peer is behind is no fault of it.
    pub(crate) fn take_from_peer(&mut self, envelope: &Envelope, now: Instant) -> Taken {
        let before = self.held_grant(envelope);
        match self.view.apply(envelope) {
            Ok(Change::Nothing) => Taken::Nothing,
            Ok(change) => {
                // Endpoints are hints: not worth a write.
                if let Change::Grant { node, .. } | Change::Record { node } = &change {
                    self.ahead.insert(*node);
                }
                let unsaved = self.unsaved;
                self.note(&change, before, now);
                if matches!(change, Change::Endpoints { .. }) {
                    self.unsaved = unsaved;
                }
                Taken::News
            }
            Err(error @ TrustError::Equivocation { .. }) => {
                self.refuse(envelope, &error, now);
                Taken::Refused
            }
            Err(error) => {
                self.refused += 1;
                tracing::debug!(kind = ?envelope.kind(), %error, "object passed on by a peer refused");
                Taken::Refused
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    #[test]
    fn states_are_bounded_and_the_first_word_counts() {
        let mut states = States::default();
        let at = |revision| Position { epoch: 1, revision };
        for revision in 0..MOST_STATES as u64 + 10 {
            states.note(at(revision), Hash([revision as u8; 32]));
        }
        states.note(at(2_000), Hash([0xee; 32]));
        assert_eq!(states.at(at(2_000)), Some(Hash([2_000_u64 as u8; 32])));
        assert_eq!(states.at(at(5)), None);
        assert_eq!(states.0.len(), MOST_STATES);
    }
}
