use minicbor::{Decode, Encode};

use crate::envelope::{Kind, Signed};
use crate::id::{Hash, NodeId};
use crate::key::{KemPublic, TunnelKey};

/// A WireGuard public key and its place in the node's succession of keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct EpochKey {
    /// Rises by one with each rotation.
    #[n(0)]
    pub epoch: u64,
    /// X25519.
    #[n(1)]
    pub key: TunnelKey,
}

/// An ML-KEM-768 public key and its epoch.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct KemKey {
    /// Rises by one with each rotation.
    #[n(0)]
    pub epoch: u64,
    /// FIPS 203 encapsulation key.
    #[n(1)]
    pub key: KemPublic,
}

/// The node's own word: its keys. Has no expiry; the one with the highest `seq` holds.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct NodeRecord {
    /// Who speaks.
    #[n(0)]
    pub node: NodeId,
    /// Rises with each record of this node.
    #[n(1)]
    pub seq: u64,
    /// Hash of the grant it speaks under.
    #[n(2)]
    pub grant: Hash,
    /// The key peers initiate to.
    #[n(3)]
    pub current: EpochKey,
    /// The key before, which still answers for peers that were away; absent once wiped.
    #[n(4)]
    pub previous: Option<EpochKey>,
    /// The key after: peers accept it before they hear that it became current.
    #[n(5)]
    pub spare: EpochKey,
    /// For post-quantum preshared keys.
    #[n(6)]
    pub kem: KemKey,
    /// Lanes it receives on, 1 to 8: lane i on the base port + i.
    #[n(7)]
    pub lanes: u8,
    /// The node left for good by itself.
    #[n(8)]
    pub departed: bool,
    /// Hash of its record with `seq` one lower; absent in the first.
    #[n(9)]
    pub before: Option<Hash>,
}

impl Signed for NodeRecord {
    const KIND: Kind = Kind::NodeRecord;
}

impl NodeRecord {
    /// Its WireGuard keys: current, previous if there, spare.
    pub fn tunnel_keys(&self) -> impl Iterator<Item = EpochKey> + '_ {
        [Some(self.current), self.previous, Some(self.spare)].into_iter().flatten()
    }
}
