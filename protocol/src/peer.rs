//! What nodes say to each other inside their tunnels, so that news needs no keyserver.
//!
//! ```text
//! one node: Heads          how far I am             every 20 s to some peers, and at once when something is new
//! the one that lacks: Get  one piece of one object
//! the other: Part          that piece, or nothing: I do not have it
//! ```
//!
//! Datagrams of UDP between the mesh addresses of nodes, port [`PORT`] at both ends, at most [`MAX_DATAGRAM_BYTES`]. A
//! datagram is one message `[number, fields]`, in the dialect of [`cbor`].
//!
//! Nothing in `Heads` is believed: it only says what may be worth asking for. What was asked for arrives as the envelope
//! that was signed, and is judged by [`trust`](crate::trust) as if a keyserver had sent it. Nobody can push an object,
//! and who answers keeps no state.

use minicbor::{Decode, Encode};

use crate::cbor::{self, CborError};
use crate::frame::{self, Message};
use crate::id::{Hash, KeyId, NodeId, Position};
use crate::record::RevocationHead;

/// UDP port on mesh addresses. The nodes' packet filters keep pods and the underlay away from it.
pub const PORT: u16 = 7190;
/// Longest datagram: it fits the smallest inner MTU, 1280 bytes, with an IPv6 header.
pub const MAX_DATAGRAM_BYTES: usize = 1232;
/// Bytes of an object in one [`PeerMessage::Part`].
pub const PART_BYTES: usize = 1024;
/// Longest object that travels in parts: an envelope of the largest payload with all signatures.
pub const MAX_OBJECT_BYTES: usize = 36 * 1024;
/// Most revocation heads in one message. A policy names at most 16 revokers; older ones' chains take turns.
pub const MAX_HEADS: usize = 8;
/// Most members in one page of a listing.
pub const MAX_MEMBERS: usize = 20;

/// How far somebody's own word goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct RecordHead {
    /// `seq` of the record.
    #[n(0)]
    pub seq: u64,
    /// Its hash.
    #[n(1)]
    pub hash: Hash,
}

/// The newest checkpoint that the sender holds, unsigned: a reason to ask for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct CheckpointHead {
    /// Where in which history.
    #[n(0)]
    pub position: Position,
    /// Hash of the history so far.
    #[n(1)]
    pub state: Hash,
    /// Seconds since 1970, to the keyserver's clock.
    #[n(2)]
    pub time: u64,
}

/// How far the sender is.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Heads {
    /// Newest policy.
    #[n(0)]
    pub policy_version: u64,
    /// Hash of it.
    #[n(1)]
    pub policy: Hash,
    /// Ends of revokers' chains, at most [`MAX_HEADS`].
    #[n(2)]
    pub revocations: Vec<RevocationHead>,
    /// Newest checkpoint; absent before the first.
    #[n(3)]
    pub checkpoint: Option<CheckpointHead>,
    /// Where its directory stands; absent without one.
    #[n(4)]
    pub position: Option<Position>,
    /// Generation of its own grant.
    #[n(5)]
    pub generation: u64,
    /// Its own record.
    #[n(6)]
    pub own: RecordHead,
    /// The newest record of the receiver that the sender has in force: acknowledges a rotation.
    #[n(7)]
    pub yours: Option<RecordHead>,
    /// It has no session with a keyserver: whoever has one may tell it more.
    #[n(8)]
    pub cut_off: bool,
    /// An answer is wanted: the sender has not heard the receiver for a while.
    #[n(9)]
    pub ask: bool,
}

/// One object that a node may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Encode, Decode)]
pub enum Want {
    /// A [`TrustPolicy`](crate::record::TrustPolicy).
    #[n(0)]
    #[cbor(map)]
    Policy {
        /// Which.
        #[n(0)]
        version: u64,
    },
    /// A [`Revocation`](crate::record::Revocation).
    #[n(1)]
    #[cbor(map)]
    Revocation {
        /// Of whose chain.
        #[n(0)]
        revoker: KeyId,
        /// Place in it.
        #[n(1)]
        number: u64,
    },
    /// The newest [`Checkpoint`](crate::record::Checkpoint).
    #[n(2)]
    #[cbor(map)]
    Checkpoint {
        /// Seconds since 1970 that it names: another one is of no interest.
        #[n(0)]
        time: u64,
    },
    /// A member's newest [`NodeGrant`](crate::record::NodeGrant).
    #[n(3)]
    #[cbor(map)]
    Grant {
        /// Whose.
        #[n(0)]
        node: NodeId,
    },
    /// A member's newest [`NodeRecord`](crate::record::NodeRecord).
    #[n(4)]
    #[cbor(map)]
    Record {
        /// Whose.
        #[n(0)]
        node: NodeId,
    },
    /// A member's newest [`Endpoints`](crate::record::Endpoints).
    #[n(5)]
    #[cbor(map)]
    Endpoints {
        /// Whose.
        #[n(0)]
        node: NodeId,
    },
    /// A page of the list of members, in the order of their ids: [`MembersPage`].
    #[n(6)]
    #[cbor(map)]
    Members {
        /// Those after this one; absent for the first page.
        #[n(0)]
        after: Option<NodeId>,
    },
}

/// A member and how far its grant and record are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct MemberHead {
    /// Who.
    #[n(0)]
    pub node: NodeId,
    /// Generation of its grant.
    #[n(1)]
    pub generation: u64,
    /// `seq` of its record; 0 until it spoke.
    #[n(2)]
    pub seq: u64,
}

/// Answer to [`Want::Members`]: at most [`MAX_MEMBERS`]. A page with fewer is the last.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct MembersPage {
    /// In the order of their ids.
    #[n(0)]
    pub members: Vec<MemberHead>,
}

/// A piece of an object.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Piece {
    /// First bytes of the object's SHA-256: pieces with another tag are of another object.
    #[n(0)]
    pub tag: u64,
    /// Length of the whole object, at most [`MAX_OBJECT_BYTES`].
    #[n(1)]
    pub total: u32,
    /// At most [`PART_BYTES`].
    #[cbor(n(2), with = "minicbor::bytes")]
    pub bytes: Vec<u8>,
}

/// One datagram.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum PeerMessage {
    /// How far I am.
    #[n(0)]
    #[cbor(map)]
    Heads {
        /// That far.
        #[n(0)]
        heads: Heads,
    },
    /// Send me this.
    #[n(1)]
    #[cbor(map)]
    Get {
        /// What.
        #[n(0)]
        want: Want,
        /// From this byte on.
        #[n(1)]
        offset: u32,
    },
    /// Here it is.
    #[n(2)]
    #[cbor(map)]
    Part {
        /// What was asked for.
        #[n(0)]
        want: Want,
        /// From which byte on.
        #[n(1)]
        offset: u32,
        /// Absent: it is not there.
        #[n(2)]
        piece: Option<Piece>,
    },
}

impl Message for PeerMessage {
    const KNOWN: i64 = 3;
}

impl PeerMessage {
    /// Reads a datagram. Its lists are no longer than this version makes them.
    ///
    /// # Errors
    /// Any [`CborError`]: drop it, count it. [`CborError::UnknownMessage`] is one of a later version.
    pub fn from_datagram(bytes: &[u8]) -> Result<Self, CborError> {
        let too_long = |what: &str| Err(CborError::Meaning(format!("{what} is too long")));
        if bytes.len() > MAX_DATAGRAM_BYTES {
            return too_long("datagram");
        }
        let message: Self = frame::decode(bytes)?;
        match &message {
            Self::Heads { heads } if heads.revocations.len() > MAX_HEADS => too_long("list of revocation heads"),
            Self::Part { piece: Some(piece), .. }
                if piece.bytes.len() > PART_BYTES || piece.total as usize > MAX_OBJECT_BYTES =>
            {
                too_long("piece")
            }
            _ => Ok(message),
        }
    }

    /// The datagram.
    #[must_use]
    pub fn to_datagram(&self) -> Vec<u8> {
        cbor::to_vec(self)
    }
}

impl Piece {
    /// The piece of `object` from `offset` on; `None` beyond its end, and of objects that are too long to travel.
    #[must_use]
    pub fn of(object: &[u8], offset: u32) -> Option<Self> {
        let from = usize::try_from(offset).ok().filter(|from| *from < object.len())?;
        let total = u32::try_from(object.len()).ok().filter(|_| object.len() <= MAX_OBJECT_BYTES)?;
        let until = object.len().min(from + PART_BYTES);
        Some(Self { tag: tag(object), total, bytes: object[from..until].to_vec() })
    }
}

/// The number by which pieces of one object are told from those of another.
#[must_use]
pub fn tag(object: &[u8]) -> u64 {
    let [a, b, c, d, e, f, g, h, ..] = crate::id::sha256(&[object]);
    u64::from_be_bytes([a, b, c, d, e, f, g, h])
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    fn heads() -> Heads {
        let hash = Hash([0xff; 32]);
        let most = u64::MAX;
        let record = RecordHead { seq: most, hash };
        let position = Position { epoch: most, revision: most };
        Heads {
            policy_version: most,
            policy: hash,
            revocations: vec![RevocationHead { revoker: KeyId([0xff; 32]), number: most, hash }; MAX_HEADS],
            checkpoint: Some(CheckpointHead { position, state: hash, time: most }),
            position: Some(position),
            generation: most,
            own: record,
            yours: Some(record),
            cut_off: true,
            ask: true,
        }
    }

    #[test]
    fn the_longest_messages_fit_a_datagram() {
        let want = Want::Revocation { revoker: KeyId([0xff; 32]), number: u64::MAX };
        let piece = Piece { tag: u64::MAX, total: MAX_OBJECT_BYTES as u32, bytes: vec![0xff; PART_BYTES] };
        let part = PeerMessage::Part { want, offset: MAX_OBJECT_BYTES as u32, piece: Some(piece) };
        for message in [PeerMessage::Heads { heads: heads() }, part] {
            let datagram = message.to_datagram();
            assert!(datagram.len() <= MAX_DATAGRAM_BYTES, "{} bytes", datagram.len());
            assert_eq!(PeerMessage::from_datagram(&datagram).unwrap(), message);
        }
        let member = MemberHead { node: NodeId([0xff; 32]), generation: u64::MAX, seq: u64::MAX };
        let page = cbor::to_vec(&MembersPage { members: vec![member; MAX_MEMBERS] });
        assert!(page.len() <= 2 * PART_BYTES, "{} bytes", page.len());
    }

    #[test]
    fn longer_lists_than_we_make_are_refused() {
        let mut long = heads();
        (long.yours, long.checkpoint) = (None, None);
        long.revocations.push(long.revocations[0]);
        assert!(PeerMessage::from_datagram(&PeerMessage::Heads { heads: long }.to_datagram()).is_err());
        let want = Want::Checkpoint { time: 1 };
        for (length, total) in [(PART_BYTES + 1, PART_BYTES + 1), (1, MAX_OBJECT_BYTES + 1)] {
            let piece = Piece { tag: 0, total: total as u32, bytes: vec![0; length] };
            let part = PeerMessage::Part { want, offset: 0, piece: Some(piece) };
            assert!(PeerMessage::from_datagram(&part.to_datagram()).is_err());
        }
        assert!(PeerMessage::from_datagram(&[0; MAX_DATAGRAM_BYTES + 1]).is_err());
    }

    #[test]
    fn pieces_make_up_the_object() {
        let object: Vec<u8> = (0..3000_u32).map(|n| n as u8).collect();
        let pieces = [0, 1024, 2048].map(|offset| Piece::of(&object, offset).unwrap());
        assert_eq!(pieces.iter().flat_map(|piece| piece.bytes.clone()).collect::<Vec<u8>>(), object);
        assert!(pieces.iter().all(|piece| piece.total == 3000 && piece.tag == tag(&object)));
        assert_eq!(Piece::of(&object, 3000), None);
        assert_eq!(Piece::of(&[], 0), None);
        assert_eq!(Piece::of(&vec![0; MAX_OBJECT_BYTES + 1], 0), None);
    }
}
