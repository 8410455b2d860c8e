//! Checkpoints against each other: newer, older, or proof of two worlds.

use std::collections::BTreeMap;

use crate::record::Checkpoint;

/// What a verified checkpoint says beside the newest one held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CheckpointVerdict {
    /// It is as new or newer: hold it from now on.
    Newer,
    /// It lacks a policy, a revision or a revocation that was seen: the keyserver was rolled back, say `STALE`.
    Stale,
    /// It names another state at the same position, or another revocation at the same number: keep both, alarm.
    Equivocation,
}

/// Compares a verified checkpoint with the newest one held. Both have to be of one mesh.
#[must_use]
pub fn compare_checkpoints(held: &Checkpoint, got: &Checkpoint) -> CheckpointVerdict {
    if held.position == got.position && held.state != got.state {
        return CheckpointVerdict::Equivocation;
    }
    let heads: BTreeMap<_, _> = got.revocations.iter().map(|head| (head.revoker, head)).collect();
    for head in &held.revocations {
        match heads.get(&head.revoker) {
            Some(other) if other.number == head.number && other.hash != head.hash => {
                return CheckpointVerdict::Equivocation;
            }
            Some(other) if other.number >= head.number => {}
            _ => return CheckpointVerdict::Stale,
        }
    }
    let behind = held.position.epoch == got.position.epoch && got.position.revision < held.position.revision;
    if behind || got.policy_version < held.policy_version { CheckpointVerdict::Stale } else { CheckpointVerdict::Newer }
}
