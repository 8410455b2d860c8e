use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use minicbor::{Decode, Encode};

use super::handover::Handover;
use super::policy::PostQuantum;
use crate::cbor;
use crate::envelope::{Kind, Signed};
use crate::id::{Hash, Name, NodeId};
use crate::key::VerifyKey;

/// Most pod CIDRs of one node.
pub const MAX_POD_CIDRS: usize = 16;

/// The issuer's word that a node belongs to the mesh, under which name and with which addresses. CIDRs live here only.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct NodeGrant {
    /// Hash of its first identity key; stays when that is replaced.
    #[n(0)]
    pub node: NodeId,
    /// The key the node signs its records with and shows on the control channel.
    #[n(1)]
    pub identity: VerifyKey,
    /// Rises with each grant for this node; the highest seen holds.
    #[n(2)]
    pub generation: u64,
    /// Unique in the mesh.
    #[n(3)]
    pub name: Name,
    /// The cluster it belongs to.
    #[n(4)]
    pub cluster: Name,
    /// Nodes of one group stand for each other; absent for a node on its own.
    #[n(5)]
    pub route_group: Option<Name>,
    /// The node's own IPv4 address in the mesh, 4 bytes.
    #[cbor(n(6), with = "ipv4")]
    pub mesh_v4: Ipv4Addr,
    /// The node's own IPv6 address in the mesh, derived: [`mesh_v6`](crate::address::mesh_v6), 16 bytes.
    #[cbor(n(7), with = "ipv6")]
    pub mesh_v6: Ipv6Addr,
    /// Addresses of its pods: sent to it, and accepted from it.
    #[cbor(n(8), with = "cbor::nets")]
    pub pod_cidrs: Vec<IpNet>,
    /// What policy may refer to.
    #[n(9)]
    pub tags: Vec<Name>,
    /// Whether its tunnels need a post-quantum preshared key.
    #[n(10)]
    pub pq: PostQuantum,
    /// A number that no other node was given, rising with each node let in; the lower wins where two collide. A renewal
    /// keeps it, so that a node never loses its place by it; a grant with another name or other prefixes takes a new one.
    #[n(11)]
    pub serial: u64,
    /// Seconds since 1970.
    #[n(12)]
    pub issued: u64,
    /// Seconds since 1970 after which it is void.
    #[n(13)]
    pub expires: u64,
    /// Hash of the revocation that this grant lifts.
    #[n(14)]
    pub lifts: Option<Hash>,
    /// A plain WireGuard peer without meshd, which holds a static preshared key.
    #[n(15)]
    pub external: bool,
    /// The handovers from the first identity key to `identity`, oldest first; none while it is the first. At most
    /// [`MAX_HANDOVERS`](super::MAX_HANDOVERS).
    #[cbor(n(16), skip_if = "Vec::is_empty")]
    pub succession: Vec<Handover>,
}

impl Signed for NodeGrant {
    const KIND: Kind = Kind::NodeGrant;
}

impl NodeGrant {
    /// Every prefix that belongs to this node: its mesh addresses, then its pod CIDRs.
    pub fn prefixes(&self) -> impl Iterator<Item = IpNet> + '_ {
        [IpNet::from(std::net::IpAddr::V4(self.mesh_v4)), IpNet::from(std::net::IpAddr::V6(self.mesh_v6))]
            .into_iter()
            .chain(self.pod_cidrs.iter().copied())
    }

    /// Every identity key that the node ever had, the first one first, the one it has last.
    pub fn identities(&self) -> impl Iterator<Item = &VerifyKey> {
        self.succession.iter().map(|handover| &handover.from).chain([&self.identity])
    }
}

macro_rules! address_codec {
    ($module:ident, $address:ident) => {
        mod $module {
            use std::net::{IpAddr, $address};

            use minicbor::decode::Error as DecodeError;
            use minicbor::encode::{Error as EncodeError, Write};
            use minicbor::{Decoder, Encoder};

            pub(super) fn encode<C, W: Write>(
                address: &$address,
                e: &mut Encoder<W>,
                ctx: &mut C,
            ) -> Result<(), EncodeError<W::Error>> {
                crate::cbor::ip::encode(&IpAddr::from(*address), e, ctx)
            }

            pub(super) fn decode<C>(d: &mut Decoder<'_>, ctx: &mut C) -> Result<$address, DecodeError> {
                let octets = match crate::cbor::ip::decode(d, ctx)? {
                    IpAddr::V4(address) => address.octets().to_vec(),
                    IpAddr::V6(address) => address.octets().to_vec(),
                };
                <[u8; $address::BITS as usize / 8]>::try_from(octets)
                    .map($address::from)
                    .map_err(|_| DecodeError::message("address of the other family"))
            }
        }
    };
}

address_codec!(ipv4, Ipv4Addr);
address_codec!(ipv6, Ipv6Addr);
