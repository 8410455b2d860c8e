use std::net::SocketAddr;

use minicbor::{Decode, Encode};

use crate::cbor;
use crate::envelope::{Kind, Signed};
use crate::id::NodeId;

/// Most candidates one node may name.
pub const MAX_CANDIDATES: usize = 16;

/// Where a node may be reached: short-lived, never in the durable store.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Endpoints {
    /// Who speaks.
    #[n(0)]
    pub node: NodeId,
    /// Rises with each; milliseconds since 1970 serve.
    #[n(1)]
    pub seq: u64,
    /// Underlay addresses with the port of lane 0, best first.
    #[cbor(n(2), with = "cbor::sockets")]
    pub candidates: Vec<SocketAddr>,
    /// Seconds since 1970 after which they are a hint only.
    #[n(3)]
    pub expires: u64,
}

impl Signed for Endpoints {
    const KIND: Kind = Kind::Endpoints;
}
