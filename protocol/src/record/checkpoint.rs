use minicbor::{Decode, Encode};

use crate::envelope::{Kind, Signed};
use crate::id::{Hash, KeyId, Position};

/// The keyserver's statement of what it shows, at each change and each minute.
///
/// Two that name different `state`s at one position prove that the keyserver shows two worlds.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Checkpoint {
    /// Where in which history.
    #[n(0)]
    pub position: Position,
    /// Hash of the history so far: `state(r) = SHA-256(state(r-1) ‖ envelope hash of change r)`, from 32 zero bytes.
    #[n(1)]
    pub state: Hash,
    /// Newest policy.
    #[n(2)]
    pub policy_version: u64,
    /// The end of each revoker's chain, sorted by key id.
    #[n(3)]
    pub revocations: Vec<RevocationHead>,
    /// Seconds since 1970, to the keyserver's clock.
    #[n(4)]
    pub time: u64,
}

impl Signed for Checkpoint {
    const KIND: Kind = Kind::Checkpoint;
}

/// The end of one revoker's chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Encode, Decode)]
#[cbor(map)]
pub struct RevocationHead {
    /// Whose chain.
    #[n(0)]
    pub revoker: KeyId,
    /// Number of its last revocation.
    #[n(1)]
    pub number: u64,
    /// Hash of it.
    #[n(2)]
    pub hash: Hash,
}
