//! What a node and a keyserver say to each other.
//!
//! ```text
//! joining (ALPN mesh-join/2)   node: Show   keyserver: Offer..   node: Enrol   keyserver: Granted | Pending | Refused
//! session (ALPN mesh-node/1)   node: Hello                 keyserver: Welcome, then Items.., Live
//!                              then, in any order
//!                              node: Publish, Applied, Rotated, Succeed, Pong
//!                              keyserver: Items, Live, Presence, Published, Checkpoint, Rotate, Succession, Ping, Error
//! ```
//!
//! A message is `[number, fields]`, fields are a map with integer keys: unknown fields are ignored.
//!
//! Over TCP the TLS stream carries the frames. A QUIC connection carries them on exactly one bidirectional stream, opened
//! by the node, which speaks first: with `Hello`, or with the proof that it holds a token. Who shows none hears nothing of
//! the mesh. The keyserver closes a connection that opens another stream. The exporter of a joining connection is that of the TLS session, of either
//! transport, with an empty context. A refused session ends with one `Error`; a node whose identity key is unknown or
//! revoked gets neither message nor reason: both are closed alike.

use std::net::SocketAddr;

use minicbor::{Decode, Encode};

use crate::cbor;
use crate::envelope::Envelope;
use crate::frame::Message;
use crate::id::{KeyId, MeshId, NodeId, Position, TokenId};
use crate::key::VerifyKey;
use crate::record::Handover;
use crate::token::JoinClaim;

/// ALPN of a connection that admits an unknown identity key for one request.
pub const ALPN_JOIN: &[u8] = b"mesh-join/2";
/// ALPN of a control session.
pub const ALPN_NODE: &[u8] = b"mesh-node/1";

/// Envelopes a keyserver puts into one frame, so that it stays below the frame's limit, whatever they are.
pub const ITEMS_BYTES_PER_FRAME: usize = 48 * 1024;

/// Cuts a list of envelopes into runs that fit one frame each ([`ITEMS_BYTES_PER_FRAME`]); none is empty.
#[must_use]
pub fn runs(envelopes: Vec<Envelope>) -> Vec<Vec<Envelope>> {
    let (mut runs, mut room) = (Vec::<Vec<Envelope>>::new(), 0);
    for envelope in envelopes {
        let length = cbor::to_vec(&envelope).len();
        match runs.last_mut() {
            Some(run) if length <= room => run.push(envelope),
            _ => {
                runs.push(vec![envelope]);
                room = ITEMS_BYTES_PER_FRAME;
            }
        }
        room = room.saturating_sub(length);
    }
    runs
}

/// Why something was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Encode, Decode)]
#[cbor(index_only)]
pub enum RefusalCode {
    /// The message cannot be read, or does not belong here.
    #[n(0)]
    BadMessage,
    /// Token unknown, used up, expired, revoked, or the request is not signed by it.
    #[n(1)]
    Token,
    /// Somebody else holds the name or the prefix.
    #[n(2)]
    Taken,
    /// Outside of what the token or the issuer may give.
    #[n(3)]
    OutOfScope,
    /// No free block or address is left.
    #[n(4)]
    Exhausted,
    /// This identity is revoked.
    #[n(5)]
    Revoked,
    /// A record that the trust rules refuse.
    #[n(6)]
    Record,
    /// Too often; try again later.
    #[n(7)]
    Busy,
    /// The keyserver cannot write: disk full, or not allowed to grant at the moment.
    #[n(8)]
    Unavailable,
}

/// A refusal with words for people.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode, thiserror::Error)]
#[error("{message}")]
#[cbor(map)]
pub struct Refusal {
    /// For programs.
    #[n(0)]
    pub code: RefusalCode,
    /// For people: what, and which other node or prefix is in the way.
    #[n(1)]
    pub message: String,
}

/// Keyserver to a joining node.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum JoinReply {
    /// Answer to [`JoinRequest::Show`]: every trust policy, oldest first, in as many messages as it takes ([`runs`]): a mesh of fifty clusters has more than one frame of them. The node verifies the chain from the mesh
    /// id, and goes on once it holds the policy that its token pins and the newest names the key this connection was
    /// made with.
    #[n(0)]
    #[cbor(map)]
    Offer {
        /// The chain of [`TrustPolicy`](crate::record::TrustPolicy).
        #[n(0)]
        policies: Vec<Envelope>,
    },
    /// The node is in.
    #[n(1)]
    #[cbor(map)]
    Granted {
        /// Its [`NodeGrant`](crate::record::NodeGrant).
        #[n(0)]
        grant: Envelope,
        /// The newest [`Checkpoint`](crate::record::Checkpoint).
        #[n(1)]
        checkpoint: Envelope,
    },
    /// It is not.
    #[n(2)]
    #[cbor(map)]
    Refused {
        /// Why.
        #[n(0)]
        refusal: Refusal,
    },
    /// It will be once its issuer, which is not on the keyserver's machine, has signed: name, addresses and the token's
    /// use are reserved for it. It asks again, with the same token, until then.
    #[n(3)]
    #[cbor(map)]
    Pending {
        /// Seconds since 1970 after which the reservation is void.
        #[n(0)]
        until: u64,
    },
}

impl Message for JoinReply {
    const KNOWN: i64 = 4;
}

/// A joining node's messages: [`JoinRequest::Show`], then [`JoinRequest::Enrol`].
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum JoinRequest {
    /// Enrol me.
    #[n(0)]
    #[cbor(map)]
    Enrol {
        /// What it asks for.
        #[n(0)]
        claim: JoinClaim,
        /// [`JoinClaim::sign`] over it and this connection's exporter.
        #[cbor(n(1), with = "minicbor::bytes")]
        signature: [u8; 64],
    },
    /// I hold this token. It is all that a node says before it has verified the policies.
    #[n(1)]
    #[cbor(map)]
    Show {
        /// Its id.
        #[n(0)]
        token: TokenId,
        /// [`JoinToken::show`](crate::token::JoinToken::show) for this connection's exporter.
        #[cbor(n(1), with = "minicbor::bytes")]
        signature: [u8; 64],
        /// The signed [`TokenLimits`](crate::token::TokenLimits), for a keyserver that did not make the token itself; only
        /// if it answers with the key that signed the token's checkpoint.
        #[n(2)]
        limits: Option<Envelope>,
    },
}

impl Message for JoinRequest {
    const KNOWN: i64 = 2;
}

/// Node to keyserver, in a session.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum NodeMessage {
    /// First message.
    #[n(0)]
    #[cbor(map)]
    Hello {
        /// The mesh it belongs to.
        #[n(0)]
        mesh: MeshId,
        /// Where it stands; absent to get everything.
        #[n(1)]
        position: Option<Position>,
        /// Newest policy it holds.
        #[n(2)]
        policy_version: u64,
        /// Its program's version, for people.
        #[n(3)]
        version: String,
        /// Its own grant, if it has replaced its identity key: a keyserver whose store is older than that learns of the key
        /// it is spoken to with. Absent otherwise.
        #[n(4)]
        grant: Option<Envelope>,
    },
    /// Its own [`NodeRecord`](crate::record::NodeRecord) or [`Endpoints`](crate::record::Endpoints).
    #[n(1)]
    #[cbor(map)]
    Publish {
        /// The object.
        #[n(0)]
        envelope: Envelope,
    },
    /// Everything up to here is in force on this node: tunnels of revoked peers are gone.
    #[n(2)]
    #[cbor(map)]
    Applied {
        /// Up to here.
        #[n(0)]
        position: Position,
    },
    /// Answer to [`ServerMessage::Rotate`].
    #[n(3)]
    #[cbor(map)]
    Rotated {
        /// Which request.
        #[n(0)]
        request: u64,
        /// Epoch of the key that is current now, or why nothing changed.
        #[n(1)]
        epoch: Option<u64>,
        /// Words for people when `epoch` is absent.
        #[n(2)]
        error: Option<String>,
    },
    /// Answer to [`ServerMessage::Ping`].
    #[n(4)]
    #[cbor(map)]
    Pong {
        /// The same number.
        #[n(0)]
        nonce: u64,
    },
    /// What was received is not understood.
    #[n(5)]
    #[cbor(map)]
    Error {
        /// Why.
        #[n(0)]
        refusal: Refusal,
    },
    /// The node wants another identity key: a grant with this one in place of the one it has. May be repeated. Answer:
    /// [`ServerMessage::Succession`].
    #[n(6)]
    #[cbor(map)]
    Succeed {
        /// The key that comes.
        #[n(0)]
        identity: VerifyKey,
        /// Signed by the key it has, and by that one.
        #[n(1)]
        handover: Handover,
    },
}

impl Message for NodeMessage {
    const KNOWN: i64 = 7;
}

/// Keyserver to node, in a session.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum ServerMessage {
    /// First message.
    #[n(0)]
    #[cbor(map)]
    Welcome {
        /// Newest checkpoint.
        #[n(0)]
        checkpoint: Envelope,
        /// Policies above the version the node named, oldest first, as far as they fit: the others come in `Items`.
        #[n(1)]
        policies: Vec<Envelope>,
        /// The node's own newest record here: it adopts a `seq` higher than its own.
        #[n(2)]
        own_record: Option<Envelope>,
        /// The node's own newest grant here.
        #[n(3)]
        own_grant: Envelope,
        /// The address the keyserver sees it at.
        #[cbor(n(4), with = "cbor::socket")]
        observed: SocketAddr,
    },
    /// Changes of the directory, in order. `from` is where they attach: 0 starts over with a full map.
    #[n(1)]
    #[cbor(map)]
    Items {
        /// The position the node has to stand at; revision 0 of an epoch for a full map.
        #[n(0)]
        from: Position,
        /// The position after them. Equal to `from` while more of the same full map follows.
        #[n(1)]
        to: Position,
        /// Policies, grants, records, revocations.
        #[n(2)]
        items: Vec<Envelope>,
        /// Newest checkpoint, with the last frame of a batch.
        #[n(3)]
        checkpoint: Option<Envelope>,
    },
    /// [`Endpoints`](crate::record::Endpoints) of nodes, as they come.
    #[n(2)]
    #[cbor(map)]
    Live {
        /// One for each node that changed.
        #[n(0)]
        items: Vec<Envelope>,
    },
    /// A published object is stored and on its way to everybody.
    #[n(3)]
    #[cbor(map)]
    Published {
        /// Its `seq`.
        #[n(0)]
        seq: u64,
        /// It was an [`Endpoints`](crate::record::Endpoints), not a record.
        #[n(1)]
        endpoints: bool,
    },
    /// Nothing changed for a minute.
    #[n(4)]
    #[cbor(map)]
    Checkpoint {
        /// Newest.
        #[n(0)]
        checkpoint: Envelope,
    },
    /// An operator asks this node to promote its spare key.
    #[n(5)]
    #[cbor(map)]
    Rotate {
        /// Number to answer with.
        #[n(0)]
        request: u64,
        /// Also when the previous key still answers for peers that were away.
        #[n(1)]
        force: bool,
        /// Epoch of the node's current key as the keyserver has it: a node that is beyond it has rotated already, and
        /// answers so. The request may thus be repeated after a session broke.
        #[n(2)]
        after: Option<u64>,
    },
    /// Are you there?
    #[n(6)]
    #[cbor(map)]
    Ping {
        /// To be sent back.
        #[n(0)]
        nonce: u64,
    },
    /// What was received is refused; the session lives unless the stream ends.
    #[n(7)]
    #[cbor(map)]
    Error {
        /// Why.
        #[n(0)]
        refusal: Refusal,
    },
    /// Another session with the same identity took over; this one ends.
    #[n(8)]
    #[cbor(map)]
    Replaced {
        /// Which node, for the log.
        #[n(0)]
        node: NodeId,
    },
    /// Answer to [`NodeMessage::Succeed`].
    #[n(9)]
    #[cbor(map)]
    Succession {
        /// The key asked for.
        #[n(0)]
        identity: KeyId,
        /// The grant that names it is in the directory, and comes with the other changes; else its issuer, which is
        /// elsewhere, has to sign it first.
        #[n(1)]
        granted: bool,
        /// Neither, and why.
        #[n(2)]
        refusal: Option<Refusal>,
    },
}

impl Message for ServerMessage {
    const KNOWN: i64 = 10;
}
