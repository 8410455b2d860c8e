//! What outlives a membership: generations and sequence numbers reached, and whose every key was.
//!
//! None of it can be read off the accepted objects once a node is out or a key is retired, so it is kept beside them.

use minicbor::{Decode, Encode};

use super::View;
use crate::id::{Hash, KeyId, NodeId};

/// Most keys that one node may ever show, retired ones included: 65,536, an hourly rotation for three years. Bounds what
/// a hostile node can make everybody remember (about 5 MiB).
pub(super) const MAX_KEYS_PER_NODE: usize = 1 << 16;

/// How far a node ever got, member or not.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Seen {
    /// Who.
    #[n(0)]
    pub node: NodeId,
    /// Highest generation of a grant accepted for it.
    #[n(1)]
    pub generation: u64,
    /// Hash of that grant.
    #[n(2)]
    pub grant: Hash,
    /// Its newest record since it last became a member with a new grant; absent until it spoke.
    #[n(3)]
    pub record: Option<SeenRecord>,
    /// The identity key in that grant: every later one follows from it.
    #[n(4)]
    pub identity: Option<KeyId>,
}

/// A record's number and hash.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct SeenRecord {
    /// Its `seq`.
    #[n(0)]
    pub seq: u64,
    /// Its hash.
    #[n(1)]
    pub hash: Hash,
}

impl View {
    /// How far each node ever granted got, in the order of their ids: to be kept with [`Self::envelopes`] and
    /// [`Self::key_holders`], because nodes that are out are in neither.
    pub fn seen(&self) -> impl Iterator<Item = &Seen> {
        self.seen.values()
    }

    /// Gives back what [`Self::seen`] told before a restart, after all of [`Self::envelopes`] were applied. Keeps what is
    /// newer.
    pub fn restore_seen(&mut self, seen: impl IntoIterator<Item = Seen>) {
        for told in seen {
            let held = self.seen.entry(told.node).or_insert_with(|| told.clone());
            let order = |seen: &Seen| (seen.generation, seen.record.map(|record| record.seq));
            if order(&told) > order(held) {
                *held = told;
            }
        }
    }

    /// Hashes of keys that were ever shown, and their holders: to be kept with the accepted objects, because retired
    /// keys are in none of those.
    pub fn key_holders(&self) -> impl Iterator<Item = (Hash, NodeId)> + '_ {
        self.key_holders.iter().map(|(key, node)| (*key, *node))
    }

    /// Gives back what [`Self::key_holders`] told before a restart.
    pub fn restore_key_holders(&mut self, holders: impl IntoIterator<Item = (Hash, NodeId)>) {
        for (key, node) in holders {
            self.hold_key(key, node);
        }
    }

    pub(super) fn hold_key(&mut self, key: Hash, node: NodeId) {
        if let std::collections::btree_map::Entry::Vacant(free) = self.key_holders.entry(key) {
            free.insert(node);
            *self.keys_shown.entry(node).or_default() += 1;
        }
    }
}
