//! Rotations as operators order and see them: jobs that the keyserver keeps in its store and drives in waves.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::UnixSeconds;
use crate::id::{Name, NodeId};

/// Longest wait of one request: who wants to wait longer asks again.
pub const LONGEST_WAIT: Duration = Duration::from_secs(600);

/// Whose keys rotate, when, and how many at a time. Neither nodes nor cluster named: all nodes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RotationOrder {
    /// Names or ids.
    pub nodes: Vec<String>,
    /// All nodes of this cluster.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cluster: Option<Name>,
    /// Also nodes whose key before still answers for peers that were away.
    #[serde(default)]
    pub force: bool,
    /// Begin then; at once if absent or past.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at: Option<UnixSeconds>,
    /// Begin again so many seconds after the end of the round before; at least an hour, below a day only with `force`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub every: Option<u64>,
    /// Ask so many nodes in a hundred at a time, 1 to 100; the next ones when these are through. All if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wave: Option<u8>,
    /// Change nothing and answer with the plan.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub dry_run: bool,
}

/// What becomes of a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RotationChange {
    /// No further node is asked. Those that were asked go on.
    Pause,
    /// Go on.
    Resume,
    /// No further node is asked, now or later.
    Cancel,
}

/// Where a job stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RotationState {
    /// Its time has not come.
    Scheduled,
    /// Nodes are being asked, or follow.
    Running,
    /// All are through but those that are not connected: they are asked when they come.
    Waiting,
    /// An operator holds it.
    Paused,
    /// Over.
    Done,
    /// An operator ended it.
    Cancelled,
}

/// A job. The counts are those of its newest round.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RotationJob {
    /// Its number.
    pub job: u64,
    /// Where it stands.
    pub state: RotationState,
    /// Whose keys: `all`, `cluster NAME`, or the names of nodes.
    pub whom: String,
    /// Ordered with force.
    pub force: bool,
    /// Nodes in a hundred that are asked at a time.
    pub wave_percent: u8,
    /// Wave that is under way, from 1; 0 before the first.
    pub wave: u32,
    /// How many there are.
    pub waves: u32,
    /// Seconds from the end of a round to the next one.
    pub every: Option<u64>,
    /// When the next round begins.
    pub next: Option<UnixSeconds>,
    /// When the newest round began.
    pub began: Option<UnixSeconds>,
    /// When it, or the job, ended.
    pub ended: Option<UnixSeconds>,
    /// Nodes in it.
    pub total: u32,
    /// Those that have promoted.
    pub promoted: u32,
    /// Those whose new key every connected node has in force.
    pub confirmed: u32,
    /// Those that refused, and why.
    pub failed: Vec<RotationFailure>,
    /// Those that are awaited because they are not connected.
    pub offline: u32,
}

/// A node that did not rotate.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RotationFailure {
    /// Which.
    pub node: Name,
    /// Why.
    pub error: String,
}

/// How far a node's newest key has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KeyPhase {
    /// It is in the directory, and not in force at every connected node.
    Promoted,
    /// It is in force at every connected node; the key before still answers.
    Confirmed,
    /// The key before is wiped.
    Retired,
}

/// The keys of a node, as the directory has them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeKeys {
    /// Its name.
    pub name: Name,
    /// Who.
    pub node: NodeId,
    /// Its cluster.
    pub cluster: Name,
    /// It has a session.
    pub connected: bool,
    /// Epoch of its current key; absent until it published a record.
    pub epoch: Option<u64>,
    /// How far that key is.
    pub phase: Option<KeyPhase>,
    /// Jobs that still want something of it.
    pub jobs: Vec<u64>,
}

/// How far it is that nodes know the keyserver's next key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransportRotation {
    /// Policy that names it.
    pub policy_version: u64,
    /// Connected nodes that have to confirm that policy.
    pub online: u32,
    /// Those that did.
    pub confirmed: u32,
    /// Those that did not yet.
    pub waiting: Vec<Name>,
    /// Nodes that were not connected.
    pub offline: Vec<Name>,
    /// Nothing follows.
    pub done: bool,
}

/// A node in a plan.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlannedRotation {
    /// Which.
    pub node: Name,
    /// In which wave, from 1.
    pub wave: u32,
    /// It has a session.
    pub connected: bool,
    /// Epoch of its current key.
    pub epoch: Option<u64>,
    /// The key before that still answers, so that it would refuse without force.
    pub previous: Option<u64>,
}
