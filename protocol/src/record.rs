//! The signed objects. What each may say is checked in [`trust`](crate::trust); how it is signed, in
//! [`envelope`](crate::envelope).

mod checkpoint;
mod endpoints;
mod grant;
mod handover;
mod node;
mod policy;
mod revocation;

pub use checkpoint::{Checkpoint, RevocationHead};
pub use endpoints::{Endpoints, MAX_CANDIDATES};
pub use grant::{MAX_POD_CIDRS, NodeGrant};
pub use handover::{Handover, MAX_HANDOVERS};
pub use node::{EpochKey, KemKey, NodeRecord};
pub use policy::{ClusterScope, FormerKey, Issuer, MAX_FORMER_KEYS, PostQuantum, TrustPolicy};
pub use revocation::Revocation;
