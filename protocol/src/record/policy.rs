use ipnet::{IpNet, Ipv4Net};
use minicbor::{Decode, Encode};
use serde::{Deserialize, Serialize};

use crate::cbor;
use crate::envelope::{Kind, Signed};
use crate::id::{Hash, KeyId, Name};
use crate::key::VerifyKey;

/// Whether tunnels need a post-quantum preshared key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[cbor(index_only)]
pub enum PostQuantum {
    /// No tunnel without one.
    #[n(0)]
    Required,
    /// Plain WireGuard.
    #[n(1)]
    Off,
}

/// Who is trusted with what: the root of everything a node believes.
///
/// Policy 1 is signed by its own roots and its hash is the mesh id; policy n by a threshold of the roots of n-1.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct TrustPolicy {
    /// Rises by one with each policy; the first is 1.
    #[n(0)]
    pub version: u64,
    /// Hash of the policy before; absent in the first.
    #[n(1)]
    pub previous: Option<Hash>,
    /// What people call this mesh.
    #[n(2)]
    pub name: Name,
    /// Keys that sign the next policy.
    #[n(3)]
    pub roots: Vec<VerifyKey>,
    /// How many of them have to.
    #[n(4)]
    pub threshold: u8,
    /// Keys that grant, each within its scope.
    #[n(5)]
    pub issuers: Vec<Issuer>,
    /// Keys that revoke.
    #[n(6)]
    pub revokers: Vec<VerifyKey>,
    /// Keys a keyserver may answer with on the control channel and sign checkpoints with.
    #[n(7)]
    pub keyservers: Vec<VerifyKey>,
    /// Running time in seconds after which a node without a fresh checkpoint closes its tunnels.
    #[n(8)]
    pub exposure: u64,
    /// Whether tunnels need a post-quantum preshared key.
    #[n(9)]
    pub pq: PostQuantum,
    /// IPv4 addresses of the nodes themselves come from here.
    #[cbor(n(10), with = "ipv4_net")]
    pub mesh_pool: Ipv4Net,
    /// Seconds since 1970, to the signer's clock.
    #[n(11)]
    pub issued: u64,
}

impl Signed for TrustPolicy {
    const KIND: Kind = Kind::TrustPolicy;
}

impl TrustPolicy {
    /// The scope of `cluster`, and the issuer that holds it.
    #[must_use]
    pub fn cluster(&self, cluster: &Name) -> Option<(&Issuer, &ClusterScope)> {
        self.issuers.iter().find_map(|issuer| {
            let scope = issuer.clusters.iter().find(|scope| scope.cluster == *cluster)?;
            Some((issuer, scope))
        })
    }

    /// Every cluster's scope, in the order of the policy.
    pub fn clusters(&self) -> impl Iterator<Item = &ClusterScope> {
        self.issuers.iter().flat_map(|issuer| &issuer.clusters)
    }
}

/// A key that may grant, and within which bounds.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Issuer {
    /// Its public key.
    #[n(0)]
    pub key: VerifyKey,
    /// The clusters it may grant into. No two scopes of a policy share a cluster or overlap in pools.
    #[n(1)]
    pub clusters: Vec<ClusterScope>,
    /// Tags it may give.
    #[n(2)]
    pub tags: Vec<Name>,
    /// Longest life of its grants, in seconds.
    #[n(3)]
    pub longest_grant: u64,
    /// Keys that it had before, at most [`MAX_FORMER_KEYS`]: what they granted is on its way to be granted anew by `key`.
    #[cbor(n(4), default, skip_if = "Vec::is_empty")]
    pub former: Vec<FormerKey>,
}

/// Most former keys of one issuer: the one before, and one more if that one had to go in a hurry.
pub const MAX_FORMER_KEYS: usize = 2;

/// A key that an issuer had before its present one. It grants nothing new, and its join tokens are void.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct FormerKey {
    /// It.
    #[n(0)]
    pub key: VerifyKey,
    /// Its grants up to this generation stand until the present key granted anew; that one's are all above. 0: none of its
    /// grants stands, because it was stolen.
    #[n(1)]
    pub generation: u64,
    /// Of those, the ones up to this serial stand.
    #[n(2)]
    pub serial: u64,
}

impl FormerKey {
    /// Whether anything that it signed stands.
    #[must_use]
    pub fn stands(&self) -> bool {
        self.generation > 0
    }
}

impl Issuer {
    /// Generation that every grant of its present key is above: a former key's are not.
    #[must_use]
    pub fn floor(&self) -> u64 {
        self.former.iter().map(|former| former.generation).max().unwrap_or(0)
    }

    /// The former key with this id.
    #[must_use]
    pub fn former_key(&self, id: KeyId) -> Option<&FormerKey> {
        self.former.iter().find(|former| former.key.id() == id)
    }

    /// The present key and all former ones.
    pub fn keys(&self) -> impl Iterator<Item = VerifyKey> + '_ {
        [self.key].into_iter().chain(self.former.iter().map(|former| former.key))
    }
}

/// One cluster's name and addresses.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct ClusterScope {
    /// Its name.
    #[n(0)]
    pub cluster: Name,
    /// Pod CIDRs of its nodes lie inside these pools, at most one of each family.
    #[cbor(n(1), with = "cbor::nets")]
    pub pools: Vec<IpNet>,
    /// Prefix length of a node's IPv4 pod CIDR.
    #[n(2)]
    pub node_prefix_v4: u8,
    /// Prefix length of a node's IPv6 pod CIDR.
    #[n(3)]
    pub node_prefix_v6: u8,
}

mod ipv4_net {
    use ipnet::{IpNet, Ipv4Net};
    use minicbor::decode::Error as DecodeError;
    use minicbor::encode::{Error as EncodeError, Write};
    use minicbor::{Decoder, Encoder};

    pub(super) fn encode<C, W: Write>(
        net: &Ipv4Net,
        e: &mut Encoder<W>,
        ctx: &mut C,
    ) -> Result<(), EncodeError<W::Error>> {
        crate::cbor::net::encode(&IpNet::V4(*net), e, ctx)
    }

    pub(super) fn decode<C>(d: &mut Decoder<'_>, ctx: &mut C) -> Result<Ipv4Net, DecodeError> {
        match crate::cbor::net::decode(d, ctx)? {
            IpNet::V4(net) => Ok(net),
            IpNet::V6(_) => Err(DecodeError::message("not an IPv4 prefix")),
        }
    }
}
