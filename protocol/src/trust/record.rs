//! Records and endpoints: the node's own word.

use std::net::{IpAddr, SocketAddr};

use super::seen::{MAX_KEYS_PER_NODE, SeenRecord};
use super::{Accepted, Change, Member, TrustError, View};
use crate::envelope::{Envelope, Kind};
use crate::id::{Hash, Name, NodeId, sha256};
use crate::record::{Endpoints, EpochKey, MAX_CANDIDATES, NodeRecord};

/// Most lanes of a node.
const MAX_LANES: u8 = 8;
/// Highest `seq`: one jump cannot use up the numbers that are left.
const MAX_SEQ: u64 = (1 << 63) - 1;

impl View {
    pub(super) fn apply_record(&mut self, envelope: &Envelope) -> Result<Change, TrustError> {
        let record: NodeRecord = envelope.unverified()?;
        let member = self.members.get(&record.node).ok_or(TrustError::NoGrant(record.node))?;
        let name = &member.grant.object.name;
        let hash = envelope.hash(self.mesh);
        let seen = self.seen.get(&record.node).and_then(|seen| seen.record).map(|seen| (seen.seq, seen.hash));
        let verified = match member.identity_under(record.grant) {
            Some(identity) => envelope.verify(self.mesh, &[identity], 1).map_err(TrustError::from),
            None => Err(TrustError::OtherGrant { name: name.clone() }),
        };
        if let Err(error) = verified {
            // What an identity key said that has been replaced since is old, not forged.
            let (kind, name, got) = (Kind::NodeRecord, name.clone(), record.seq);
            let held = seen.map(|(held, _)| held).filter(|held| *held > got);
            return Err(held.map_or(error, |held| TrustError::OldSeq { kind, name, held, got }));
        }
        // A node that was out and is back under the same grant is given the record it had.
        if is_same(Kind::NodeRecord, name, record.seq, hash, seen)? && member.record.is_some() {
            return Ok(Change::Nothing);
        }
        validate(name, &record, member.record.as_ref())?;
        let keys = key_hashes(&record);
        let taken = |key: &Hash| self.key_holders.get(key).filter(|holder| **holder != record.node);
        if let Some(holder) = keys.iter().find_map(taken) {
            return Err(TrustError::KeyTaken { name: name.clone(), holder: *holder });
        }
        let node = record.node;
        let new = keys.iter().filter(|key| !self.key_holders.contains_key(key)).count();
        if self.keys_shown.get(&node).copied().unwrap_or_default() + new > MAX_KEYS_PER_NODE {
            return Err(TrustError::InvalidRecord { name: name.clone(), reason: "it has shown too many keys" });
        }
        for key in keys {
            self.hold_key(key, node);
        }
        let accepted = self.accept(record, envelope);
        let now_seen = SeenRecord { seq: accepted.object.seq, hash };
        self.seen.entry(node).and_modify(|seen| seen.record = Some(now_seen));
        self.with_member(node, |member| {
            if accepted.object.grant == member.grant.hash {
                member.earlier_grant = None;
            }
            member.record = Some(accepted);
        });
        Ok(Change::Record { node })
    }

    pub(super) fn apply_endpoints(&mut self, envelope: &Envelope) -> Result<Change, TrustError> {
        let endpoints: Endpoints = envelope.unverified()?;
        let node = endpoints.node;
        let member = self.members.get(&node).ok_or(TrustError::NoGrant(node))?;
        envelope.verify(self.mesh, &member.identities(), 1)?;
        let name = &member.grant.object.name;
        let held = member.endpoints.as_ref().map(|held| (held.object.seq, held.hash));
        if is_same(Kind::Endpoints, name, endpoints.seq, envelope.hash(self.mesh), held)? {
            return Ok(Change::Nothing);
        }
        validate_endpoints(&endpoints).map_err(|reason| TrustError::InvalidRecord { name: name.clone(), reason })?;
        let accepted = self.accept(endpoints, envelope);
        self.with_member(node, |member| member.endpoints = Some(accepted));
        Ok(Change::Endpoints { node })
    }

    fn with_member(&mut self, node: NodeId, change: impl FnOnce(&mut Member)) {
        self.members.entry(node).and_modify(change);
    }
}

/// Whether the very object is held; an error if it is older, or another one with the same number.
fn is_same(kind: Kind, name: &Name, seq: u64, hash: Hash, held: Option<(u64, Hash)>) -> Result<bool, TrustError> {
    match held {
        Some((_, held_hash)) if held_hash == hash => Ok(true),
        Some((held_seq, _)) if held_seq == seq => {
            Err(TrustError::Equivocation { kind, signer: name.to_string(), number: seq })
        }
        Some((held, _)) if held > seq => Err(TrustError::OldSeq { kind, name: name.clone(), held, got: seq }),
        _ => Ok(false),
    }
}

fn validate_endpoints(endpoints: &Endpoints) -> Result<(), &'static str> {
    if endpoints.seq > MAX_SEQ {
        return Err("its seq is out of range");
    }
    if endpoints.candidates.len() > MAX_CANDIDATES {
        return Err("too many candidates");
    }
    let unusable = |candidate: &SocketAddr| match candidate.ip() {
        IpAddr::V4(ip) => ip.is_unspecified() || ip.is_multicast() || ip.is_broadcast(),
        // An IPv4 address has one spelling here, so that filters on it cannot be passed by.
        IpAddr::V6(ip) => ip.is_unspecified() || ip.is_multicast() || ip.to_ipv4_mapped().is_some(),
    };
    if endpoints.candidates.iter().any(unusable) {
        return Err("a candidate is no address to send to");
    }
    Ok(())
}

fn validate(name: &Name, record: &NodeRecord, held: Option<&Accepted<NodeRecord>>) -> Result<(), TrustError> {
    let invalid = |reason| Err(TrustError::InvalidRecord { name: name.clone(), reason });
    if record.seq > MAX_SEQ {
        return invalid("its seq is out of range");
    }
    if !(1..=MAX_LANES).contains(&record.lanes) {
        return invalid("lanes are 1 to 8");
    }
    let previous_epoch = record.previous.map(|previous| previous.epoch);
    if previous_epoch.is_some_and(|previous| previous >= record.current.epoch) {
        return invalid("the previous key is not of an earlier epoch");
    }
    if record.spare.epoch <= record.current.epoch {
        return invalid("the spare key is not of a later epoch");
    }
    let keys: Vec<_> = record.tunnel_keys().map(|key| key.key).collect();
    if keys.iter().enumerate().any(|(at, key)| keys[..at].contains(key)) {
        return invalid("one key serves two epochs");
    }
    let Some(held) = held else { return Ok(()) };
    if held.object.seq + 1 == record.seq && record.before.is_some_and(|before| before != held.hash) {
        return invalid("it does not follow the record before it");
    }
    if held.object.current.epoch > record.current.epoch || held.object.kem.epoch > record.kem.epoch {
        return invalid("its keys are older than those held");
    }
    let other_key =
        |key: EpochKey| held.object.tunnel_keys().any(|held| held.epoch == key.epoch && held.key != key.key);
    let other_kem = held.object.kem.epoch == record.kem.epoch && held.object.kem != record.kem;
    if record.tunnel_keys().any(other_key) || other_kem {
        return invalid("an epoch has another key than it had");
    }
    Ok(())
}

fn key_hashes(record: &NodeRecord) -> Vec<Hash> {
    let tunnel = record.tunnel_keys().map(|key| Hash(sha256(&[b"tunnel\0", key.key.as_bytes()])));
    tunnel.chain([Hash(sha256(&[b"kem\0", record.kem.key.as_bytes()]))]).collect()
}
