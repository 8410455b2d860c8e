use minicbor::{Decode, Encode};

use crate::id::{MeshId, NodeId};
use crate::key::{KeyError, SigningKey, VerifyKey};

const LABEL: &[u8] = b"mesh identity handover\0";
/// Most times that a node may replace its identity key: about 11 KiB in its grant. Once a month, that is five years.
pub const MAX_HANDOVERS: usize = 64;

/// A node's identity key gives its place to the next one. Which one that is, the next handover of a
/// [`NodeGrant`](super::NodeGrant) says by its `from`, and after the last one the grant's `identity`.
///
/// ```text
/// signed, by both keys = "mesh identity handover\0" ‖ mesh id ‖ node id ‖ from ‖ to
/// ```
///
/// The key that goes has to sign, or somebody else could take the node over; the one that comes, or a node could claim a key
/// that is another's.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Handover {
    /// The key that gives up its place.
    #[n(0)]
    pub from: VerifyKey,
    /// Its signature, 64 bytes.
    #[cbor(n(1), with = "minicbor::bytes")]
    pub given: [u8; 64],
    /// The signature of the key that takes the place, 64 bytes.
    #[cbor(n(2), with = "minicbor::bytes")]
    pub taken: [u8; 64],
}

impl Handover {
    /// Hands the place of `node` from one key to another.
    #[must_use]
    pub fn sign(mesh: MeshId, node: NodeId, from: &SigningKey, to: &SigningKey) -> Self {
        let message = signed_bytes(mesh, node, &from.verify_key(), &to.verify_key());
        Self { from: from.verify_key(), given: from.sign(&message), taken: to.sign(&message) }
    }

    /// Verifies both signatures.
    ///
    /// # Errors
    /// [`KeyError::BadSignature`].
    pub fn verify(&self, mesh: MeshId, node: NodeId, to: &VerifyKey) -> Result<(), KeyError> {
        let message = signed_bytes(mesh, node, &self.from, to);
        self.from.verify(&message, &self.given)?;
        to.verify(&message, &self.taken)
    }
}

fn signed_bytes(mesh: MeshId, node: NodeId, from: &VerifyKey, to: &VerifyKey) -> Vec<u8> {
    [LABEL, mesh.as_bytes(), node.as_bytes(), from.as_bytes(), to.as_bytes()].concat()
}
