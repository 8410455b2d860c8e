//! Revocations: a chain for each revoker; what is revoked is the union.

use std::collections::BTreeSet;

use super::{Change, RevokedUpTo, TrustError, View};
use crate::envelope::Envelope;
use crate::id::{Hash, KeyId};
use crate::record::Revocation;

/// Longest reason, in bytes.
const MAX_REASON_BYTES: usize = 256;

impl View {
    pub(super) fn apply_revocation(&mut self, envelope: &Envelope) -> Result<Change, TrustError> {
        let revocation: Revocation = envelope.unverified()?;
        envelope.verify_by(self.mesh, |id| self.revokers.get(&id), 1)?;
        let number = revocation.number;
        let mut revokers = envelope.signers().filter(|signer| self.revokers.contains_key(signer));
        let (Some(revoker), None) = (revokers.next(), revokers.next()) else {
            return Err(TrustError::InvalidRevocation { number, reason: "it belongs to one chain, sign it once" });
        };
        if revocation.reason.len() > MAX_REASON_BYTES {
            return Err(TrustError::InvalidRevocation { number, reason: "its reason is longer than 256 bytes" });
        }
        let hash = envelope.hash(self.mesh);
        if self.follows(revoker, &revocation, hash)? {
            return Ok(Change::Nothing);
        }
        let (node, generation) = (revocation.node, revocation.up_to_generation);
        let accepted = self.accept(revocation, envelope);
        self.chains.entry(revoker).or_default().push(accepted);
        let revoked = self.revoked.entry(node).or_insert(RevokedUpTo { generation, by: BTreeSet::new() });
        if generation > revoked.generation {
            *revoked = RevokedUpTo { generation, by: BTreeSet::new() };
        }
        if generation == revoked.generation {
            revoked.by.insert(hash);
        }
        // Whatever came first, grant or revocation, the outcome is the same: a grant has to name what it lifts.
        let hit = self.members.get(&node).is_some_and(|member| self.check_not_revoked(&member.grant.object).is_err());
        if hit {
            self.remove_member(node);
        }
        self.out.remove(&node);
        Ok(Change::Revoked { node, was_member: hit })
    }

    /// Whether it is held already; an error unless it is the next of its chain.
    fn follows(&self, revoker: KeyId, revocation: &Revocation, hash: Hash) -> Result<bool, TrustError> {
        let chain = self.chains.get(&revoker).map(Vec::as_slice).unwrap_or_default();
        let at = usize::try_from(revocation.number).unwrap_or(usize::MAX);
        if let Some(held) = at.checked_sub(1).and_then(|at| chain.get(at)) {
            if held.hash == hash {
                return Ok(true);
            }
            let (signer, number) = (format!("revoker {}", revoker.short()), revocation.number);
            return Err(TrustError::Equivocation { kind: crate::envelope::Kind::Revocation, signer, number });
        }
        let gap = TrustError::RevocationGap { revoker, held: chain.len() as u64, got: revocation.number };
        if at != chain.len() + 1 || revocation.previous != chain.last().map(|last| last.hash) {
            return Err(gap);
        }
        Ok(false)
    }
}
