//! An issuer that has another key: how far its nodes are with it.

use serde::{Deserialize, Serialize};

use crate::id::Name;
use crate::key::VerifyKey;

/// How far the nodes of one issuer are with its present key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IssuerProgress {
    /// Newest policy.
    pub policy_version: u64,
    /// The issuer's present key.
    pub issuer: VerifyKey,
    /// The keys that it had before and that the policy names still. None: nothing is under way.
    pub former: Vec<FormerIssuer>,
    /// Nodes of its clusters.
    pub total: u32,
    /// Those that hold a grant of the present key, by their own word.
    pub holding: u32,
    /// Connected nodes that have not said so yet.
    pub waiting: Vec<Name>,
    /// Nodes that are not connected: they are told when they come, and need not join again.
    pub absent: Vec<Name>,
    /// Nodes that the present key has still to grant anew: by the keyserver itself, or where the key is.
    pub ungranted: Vec<Name>,
    /// Join tokens voided by this request: their issuer's key is a former one.
    pub voided_tokens: u32,
    /// Nothing follows.
    pub done: bool,
}

/// A key that an issuer had before.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FormerIssuer {
    /// It.
    pub key: VerifyKey,
    /// Its grants up to this generation stand; 0: none, it was stolen.
    pub generation: u64,
    /// Of those, the ones up to this serial.
    pub serial: u64,
}

impl IssuerProgress {
    /// Whether every node that can be reached is through.
    #[must_use]
    pub fn is_through(&self) -> bool {
        self.waiting.is_empty() && self.ungranted.is_empty()
    }
}
