//! An issuer's key and those it had before: whose word a grant is, and how one key's grants follow the other's.
//!
//! ```text
//! generations   1 .. floor          of former keys that stand, until their nodes are granted anew
//!               floor+1 ..          of the present key: any of them is newer than any of a former key
//! ```
//!
//! What stands of a former key is bounded by numbers in the policy, so that every node judges a grant alike, whatever
//! it saw before.

use super::{Accepted, Member, TrustError, View};
use crate::envelope::Envelope;
use crate::id::{KeyId, Name, NodeId};
use crate::record::{FormerKey, Issuer, NodeGrant, TrustPolicy};

/// Highest generation: one jump cannot use up the numbers that are left.
pub(super) const MAX_GENERATION: u64 = (1 << 63) - 1;

impl View {
    /// Verifies a grant against the newest policy: signature, scope, and that it is consistent in itself.
    pub(super) fn check_grant_signature(&self, envelope: &Envelope) -> Result<NodeGrant, TrustError> {
        let grant: NodeGrant = envelope.unverified()?;
        let out = |reason: String| TrustError::OutOfScope { name: grant.name.clone(), reason };
        let issuers = &self.policy().issuers;
        let former = issuers.iter().flat_map(|issuer| &issuer.former).filter(|former| former.stands());
        let keys: Vec<_> = issuers.iter().map(|issuer| issuer.key).chain(former.map(|former| former.key)).collect();
        if let Err(error) = envelope.verify(self.mesh, &keys, 1) {
            return Err(self.gone_issuer(envelope).map_or_else(|| error.into(), out));
        }
        let issuer = issuers
            .iter()
            .filter(|issuer| envelope.signers().any(|id| is_standing(issuer, id)))
            .find(|issuer| issuer.clusters.iter().any(|scope| scope.cluster == grant.cluster))
            .ok_or_else(|| out(format!("cluster {} is not the issuer's", grant.cluster)))?;
        self.check_key(&grant, issuer, envelope).map_err(out)?;
        self.check_scope(&grant, issuer).map_err(out)?;
        Ok(grant)
    }

    /// Whether the key that signed may sign a grant of this generation and serial.
    fn check_key(&self, grant: &NodeGrant, issuer: &Issuer, envelope: &Envelope) -> Result<(), String> {
        if envelope.signers().any(|id| id == issuer.key.id()) {
            return check_present(grant, issuer);
        }
        let mut former = envelope.signers().filter_map(|id| issuer.former_key(id)).filter(|former| former.stands());
        let within = |former: &FormerKey| grant.generation <= former.generation && grant.serial <= former.serial;
        match former.next() {
            Some(former) if within(former) && grant.generation > 0 => Ok(()),
            Some(FormerKey { key, generation, serial }) => Err(format!(
                "its issuer {} was replaced by trust policy {}, and stands up to generation {generation} and serial {serial}",
                key.id().short(),
                self.replaced_by(key.id())
            )),
            None => Err("no key of its issuer signed it".to_owned()),
        }
    }

    /// Words for a grant whose signer was an issuer once: what an operator has to know.
    fn gone_issuer(&self, envelope: &Envelope) -> Option<String> {
        let is_key = |id: KeyId| self.policy().issuers.iter().any(|issuer| issuer.key.id() == id);
        let mut signers = envelope.signers().filter(|id| !is_key(*id));
        signers.find_map(|id| {
            let fallen = self.policy().issuers.iter().filter_map(|issuer| issuer.former_key(id)).next();
            if fallen.is_some() {
                let policy = self.replaced_by(id);
                return Some(format!("its issuer {} was replaced by trust policy {policy}, as stolen", id.short()));
            }
            let names = |policy: &TrustPolicy| policy.issuers.iter().flat_map(Issuer::keys).any(|key| key.id() == id);
            let last = self.policies.iter().rev().find(|policy| names(&policy.object))?.object.version;
            Some(format!("its issuer {} was removed by trust policy {}", id.short(), last + 1))
        })
    }

    /// The first policy in which a key was no issuer's present one any more.
    fn replaced_by(&self, id: KeyId) -> u64 {
        let names = |policy: &TrustPolicy| policy.issuers.iter().any(|issuer| issuer.key.id() == id);
        let last = self.policies.iter().rev().find(|policy| names(&policy.object));
        last.map_or(1, |policy| policy.object.version + 1)
    }

    /// Whether a grant is of a key that its issuer had before: it is to be granted anew.
    #[must_use]
    pub fn is_former(&self, grant: &NodeGrant) -> bool {
        self.policy().cluster(&grant.cluster).is_some_and(|(issuer, _)| grant.generation <= issuer.floor())
    }

    /// The generation of the next grant of `node`, in `cluster`.
    #[must_use]
    pub fn next_generation(&self, node: NodeId, cluster: &Name) -> u64 {
        let seen = self.seen.get(&node).map_or(0, |seen| seen.generation);
        let floor = self.policy().cluster(cluster).map_or(0, |(issuer, _)| issuer.floor());
        seen.max(floor).saturating_add(1)
    }

    /// Highest generation of any grant so far, member or not: what of an issuer's key stands when another takes its place.
    #[must_use]
    pub fn highest_generation(&self) -> u64 {
        let floors = self.policy().issuers.iter().map(Issuer::floor);
        self.seen.values().map(|seen| seen.generation).chain(floors).max().unwrap_or(0)
    }

    /// Nodes that are out because their issuer's key was stolen, until its present key has granted to them anew.
    pub fn fallen(&self) -> impl Iterator<Item = (&NodeId, &Member)> {
        self.out.iter().filter(|(_, member)| self.is_of_fallen_key(&member.grant))
    }

    pub(super) fn is_of_fallen_key(&self, grant: &Accepted<NodeGrant>) -> bool {
        let issuer = self.policy().cluster(&grant.object.cluster).map(|(issuer, _)| issuer);
        issuer.is_some_and(|issuer| fallen_signer(issuer, &grant.envelope).is_some())
    }

    /// Whether a grant that was accepted once still has a signer who may: its place is not looked at.
    pub(super) fn has_standing_signer(&self, grant: &Accepted<NodeGrant>) -> bool {
        let issuers = &self.policy().issuers;
        grant.envelope.signers().any(|id| issuers.iter().any(|issuer| is_standing(issuer, id)))
    }

    /// Verifies a grant that fell with its issuer's key: not whether it stands, but that this key signed it.
    pub(super) fn fallen_grant(&self, envelope: &Envelope, issuer: &Issuer) -> Option<NodeGrant> {
        let former = fallen_signer(issuer, envelope)?;
        envelope.verified(self.mesh, &[former.key], 1).ok()
    }
}

/// Whether a grant by this key of the issuer may stand.
fn is_standing(issuer: &Issuer, id: KeyId) -> bool {
    issuer.key.id() == id || issuer.former_key(id).is_some_and(FormerKey::stands)
}

/// Whether the present key may sign this.
pub(super) fn check_present(grant: &NodeGrant, issuer: &Issuer) -> Result<(), String> {
    let (generation, floor) = (grant.generation, issuer.floor());
    if generation == 0 || generation > MAX_GENERATION {
        return Err(format!("generation {generation} is out of range"));
    }
    if generation <= floor {
        return Err(format!(
            "generation {generation} is left to a key its issuer had before: it takes one above {floor}"
        ));
    }
    Ok(())
}

fn fallen_signer<'a>(issuer: &'a Issuer, envelope: &Envelope) -> Option<&'a FormerKey> {
    envelope.signers().filter_map(|id| issuer.former_key(id)).find(|former| !former.stands())
}
