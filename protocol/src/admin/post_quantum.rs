//! How far a mesh is with tunnels that are post-quantum.

use serde::{Deserialize, Serialize};

use crate::record::PostQuantum;

/// What the policy says of post-quantum tunnels, and the grants of some clusters.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PostQuantumState {
    /// Newest policy.
    pub policy_version: u64,
    /// What it says: if it requires them, of every node, whatever its grant says.
    pub policy: PostQuantum,
    /// Nodes of the clusters that were asked for; of all.
    pub total: u32,
    /// Those whose grants require them.
    pub required: u32,
    /// Grants that the keyserver has still to sign: the same request goes on with them.
    pub left: u32,
    /// Grants that an issuer elsewhere has to sign.
    pub pending: u32,
    /// Text of [`GrantRequests`](crate::offline::GrantRequests) for it, if any: as many as one file takes.
    pub file: Option<String>,
}
