use serde::{Deserialize, Serialize};

use crate::id::KeyId;

/// The identity key of a node: it signs what the node says of itself, and opens its control sessions.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdentityStatus {
    /// In use.
    pub key: KeyId,
    /// Will follow.
    pub next: Option<KeyId>,
    /// How far that is.
    pub phase: IdentityPhase,
    /// Why the keyserver refused, if it did.
    pub error: Option<String>,
}

/// How far it is that another identity key follows the one in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum IdentityPhase {
    /// Nothing is under way.
    Settled,
    /// The next key is on disk, and no keyserver has answered yet.
    Asking,
    /// Its grant waits for an issuer elsewhere to sign it.
    Waiting,
    /// The keyserver refused; it is asked again.
    Refused,
    /// The new key is in use, and no keyserver has taken a record signed with it yet: the one before is still on disk.
    Publishing,
}
