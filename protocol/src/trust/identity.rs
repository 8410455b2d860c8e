//! Identity keys: each follows from the one before, back to the one that made the node id.
//!
//! ```text
//! node id = hash of key 1 ── handover ──> key 2 ── handover ──> .. ──> identity
//! ```
//!
//! A grant carries the whole succession, so nobody has to have seen the steps between: a node that was away, and one that
//! joins, find out the same. No issuer and no keyserver can give a node's place to a key that the node did not choose.

use super::{Accepted, Member, TrustError, View};
use crate::id::{Hash, MeshId, NodeId, sha256};
use crate::key::VerifyKey;
use crate::record::{Endpoints, MAX_HANDOVERS, NodeGrant};

/// Checks the succession in a grant by itself. What it has in common with `held`, a grant of the node that was verified
/// before, is not verified again.
fn check_succession(mesh: MeshId, grant: &NodeGrant, held: Option<&NodeGrant>) -> Result<(), &'static str> {
    if grant.succession.len() > MAX_HANDOVERS {
        return Err("it has too many handovers");
    }
    let keys: Vec<&VerifyKey> = grant.identities().collect();
    if keys.first().is_none_or(|first| first.node_id() != grant.node) {
        return Err("the node id is not the hash of its first identity key");
    }
    if keys.iter().enumerate().any(|(at, key)| keys[..at].contains(key)) {
        return Err("a key comes twice");
    }
    // A handover says to which key only together with what comes after it.
    let goes_on = |held: &&NodeGrant| {
        grant.succession.starts_with(&held.succession) && *keys[held.succession.len()] == held.identity
    };
    let verified = held.filter(goes_on).map_or(0, |held| held.succession.len());
    let mut handovers = grant.succession.iter().zip(keys.into_iter().skip(1)).skip(verified);
    let good = handovers.all(|(handover, to)| handover.verify(mesh, grant.node, to).is_ok());
    if good { Ok(()) } else { Err("a handover is not signed by the key before and the key after") }
}

/// Under this a shown identity key is kept with its holder.
fn hash_of(key: &VerifyKey) -> Hash {
    Hash(sha256(&[b"identity\0", key.as_bytes()]))
}

impl View {
    /// Whether the grant's identity key is the node's to have: it follows from the first one, it goes on from the newest
    /// one that was ever accepted, and none on the way is another node's.
    pub(super) fn check_identity(&self, grant: &NodeGrant) -> Result<(), TrustError> {
        let broken = |reason| TrustError::Succession { name: grant.name.clone(), reason };
        let held = self.members.get(&grant.node).map(|member| &member.grant.object);
        check_succession(self.mesh, grant, held).map_err(broken)?;
        let newest = self.seen.get(&grant.node).and_then(|seen| seen.identity);
        if newest.is_some_and(|newest| grant.identities().all(|key| key.id() != newest)) {
            return Err(broken("it does not go on from the identity key that the node has"));
        }
        let others = |key| self.identity_holder(key).filter(|holder| *holder != grant.node);
        match grant.identities().find_map(others) {
            Some(holder) => Err(TrustError::KeyTaken { name: grant.name.clone(), holder }),
            None => Ok(()),
        }
    }

    /// Keeps every key of a succession for its node, for ever.
    pub(super) fn hold_identities(&mut self, grant: &NodeGrant) {
        // A first key is known by the node id.
        if !grant.succession.is_empty() {
            for key in grant.identities() {
                self.hold_key(hash_of(key), grant.node);
            }
        }
    }

    /// The node that has or had this identity key: nobody else may ever have it.
    #[must_use]
    pub fn identity_holder(&self, key: &VerifyKey) -> Option<NodeId> {
        let first = key.node_id();
        let shown = self.key_holders.get(&hash_of(key)).copied();
        shown.or_else(|| self.seen.contains_key(&first).then_some(first))
    }

    /// The member that this identity key speaks for now.
    #[must_use]
    pub fn member_with(&self, key: &VerifyKey) -> Option<(NodeId, &Member)> {
        let node = self.identity_holder(key)?;
        self.members.get(&node).filter(|member| member.admits(key)).map(|member| (node, member))
    }
}

impl Member {
    /// Whether this key speaks for the node: the one in its grant, and the one before until the node has spoken with that.
    #[must_use]
    pub fn admits(&self, key: &VerifyKey) -> bool {
        self.identities().contains(key)
    }

    /// The keys that speak for the node, the one in its grant first.
    pub(super) fn identities(&self) -> Vec<VerifyKey> {
        let earlier = self.earlier_grant.as_ref().map(|grant| grant.object.identity);
        [self.grant.object.identity].into_iter().chain(earlier).collect()
    }

    /// The key that signed its record.
    #[must_use]
    pub fn speaks_with(&self) -> Option<VerifyKey> {
        self.identity_under(self.record.as_ref()?.object.grant)
    }

    /// The key that signs what is said under this grant, if it is the newest or the one that its record names.
    pub(super) fn identity_under(&self, grant: Hash) -> Option<VerifyKey> {
        let grants = [Some(&self.grant), self.earlier_grant.as_deref()];
        grants.into_iter().flatten().find(|held| held.hash == grant).map(|held| held.object.identity)
    }

    /// Its endpoints, if a key signed them that still speaks for it: others would not take them.
    #[must_use]
    pub fn endpoints_to_show(&self) -> Option<&Accepted<Endpoints>> {
        let speak: Vec<_> = self.identities().iter().map(VerifyKey::id).collect();
        self.endpoints.as_ref().filter(|endpoints| endpoints.envelope.signers().any(|signer| speak.contains(&signer)))
    }
}
