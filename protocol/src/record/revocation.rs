use minicbor::{Decode, Encode};

use crate::envelope::{Kind, Signed};
use crate::id::{Hash, NodeId};

/// A node is out, up to a generation. Each revoker's revocations form a chain of their own; the union of the chains is
/// what is revoked.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Revocation {
    /// Place in this revoker's chain; the first is 1.
    #[n(0)]
    pub number: u64,
    /// Hash of the one before; absent in the first.
    #[n(1)]
    pub previous: Option<Hash>,
    /// Who is out.
    #[n(2)]
    pub node: NodeId,
    /// Grants up to this generation are void; a later one has to name this revocation.
    #[n(3)]
    pub up_to_generation: u64,
    /// Why, for people. At most 256 bytes.
    #[n(4)]
    pub reason: String,
    /// Seconds since 1970, to the revoker's clock.
    #[n(5)]
    pub time: u64,
}

impl Signed for Revocation {
    const KIND: Kind = Kind::Revocation;
}
