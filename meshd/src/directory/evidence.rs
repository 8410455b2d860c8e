//! Evidence in the state directory, for people.

use std::time::UNIX_EPOCH;

use mesh_protocol::cbor;
use mesh_protocol::envelope::{Envelope, Kind};
use mesh_protocol::local::EvidenceStatus;
use mesh_protocol::record::{Checkpoint, Endpoints, NodeGrant, NodeRecord, Revocation, TrustPolicy};

use super::disk::{EVIDENCE_LABEL, EVIDENCE_PREFIX};
use crate::state_dir::{StateDir, StateError};

/// Longest file of evidence: one envelope.
const LIMIT: u64 = 64 * 1024;

/// All that is kept, oldest first. A file that cannot be read is told so, not passed over.
///
/// # Errors
/// [`StateError`] if the directory cannot be listed.
pub(crate) fn kept(state: &StateDir) -> Result<Vec<EvidenceStatus>, StateError> {
    let mut kept: Vec<EvidenceStatus> =
        state.names(EVIDENCE_PREFIX)?.into_iter().map(|file| describe(state, file)).collect();
    kept.sort_by(|one, other| (one.stored, &one.file).cmp(&(other.stored, &other.file)));
    Ok(kept)
}

fn describe(state: &StateDir, file: String) -> EvidenceStatus {
    let modified = std::fs::metadata(state.path_of(&file)).and_then(|meta| meta.modified()).ok();
    let stored = modified.and_then(|at| at.duration_since(UNIX_EPOCH).ok()).map_or(0, |since| since.as_secs());
    let bytes = state.read(&file, EVIDENCE_LABEL, LIMIT, "move it away, it is a copy");
    let envelope = bytes.ok().flatten().and_then(|bytes| cbor::from_slice::<Envelope>(&bytes).ok());
    let Some(envelope) = envelope else {
        let says = "it cannot be read".to_owned();
        return EvidenceStatus { file, kind: "unknown".into(), says, signers: Vec::new(), stored };
    };
    let (kind, says) = says(&envelope);
    EvidenceStatus { file, kind: kind.into(), says, signers: envelope.signers().collect(), stored }
}

fn says(envelope: &Envelope) -> (&'static str, String) {
    let unread = || "a format this version does not read".to_owned();
    match envelope.kind() {
        Kind::Checkpoint => {
            let says = envelope.unverified::<Checkpoint>().map(|it| {
                format!("revision {} of history {:x} is in state {}", it.position.revision, it.position.epoch, it.state)
            });
            ("checkpoint", says.unwrap_or_else(|_| unread()))
        }
        Kind::NodeRecord => {
            let says = envelope.unverified::<NodeRecord>();
            let says = says.map(|it| format!("node {} at seq {}, key epoch {}", it.node, it.seq, it.current.epoch));
            ("node-record", says.unwrap_or_else(|_| unread()))
        }
        Kind::NodeGrant => {
            let says = envelope.unverified::<NodeGrant>();
            let says = says.map(|it| format!("node {} is {} at generation {}", it.node, it.name, it.generation));
            ("node-grant", says.unwrap_or_else(|_| unread()))
        }
        Kind::Endpoints => {
            let says = envelope.unverified::<Endpoints>();
            ("endpoints", says.map_or_else(|_| unread(), |it| format!("node {} at seq {}", it.node, it.seq)))
        }
        Kind::Revocation => {
            let says = envelope.unverified::<Revocation>();
            let says = says.map(|it| format!("number {} revokes node {}: {}", it.number, it.node, it.reason));
            ("revocation", says.unwrap_or_else(|_| unread()))
        }
        Kind::TrustPolicy => {
            let says = envelope.unverified::<TrustPolicy>();
            ("trust-policy", says.map_or_else(|_| unread(), |it| format!("version {}", it.version)))
        }
        Kind::TokenLimits => ("token-limits", unread()),
    }
}
