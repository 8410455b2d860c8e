//! Revocations: a chain for each revoker; what is revoked is the union.

use std::collections::BTreeSet;

use super::{Change, RevokedUpTo, TrustError, View};
use crate::envelope::{Envelope, EnvelopeError};
use crate::id::{Hash, KeyId};
use crate::record::Revocation;

impl View {
    pub(super) fn apply_revocation(&mut self, envelope: &Envelope) -> Result<Change, TrustError> {
        let revokers = &self.policy().revokers;
        let revocation: Revocation = envelope.verified(self.mesh, revokers, 1)?;
        let may = |signer: &KeyId| revokers.iter().any(|revoker| revoker.id() == *signer);
        let [revoker] = envelope.signers().filter(may).collect::<Vec<_>>()[..] else {
            return Err(EnvelopeError::TooFewSignatures { got: 0, needed: 1 }.into());
        };
        let hash = envelope.hash(self.mesh);
        if self.follows(revoker, &revocation, hash)? {
            return Ok(Change::Nothing);
        }
        let (node, generation) = (revocation.node, revocation.up_to_generation);
        let accepted = self.accept(revocation, envelope);
        self.chains.entry(revoker).or_default().push(accepted);
        let revoked = self.revoked.entry(node).or_insert(RevokedUpTo { generation, by: BTreeSet::new() });
        revoked.generation = revoked.generation.max(generation);
        revoked.by.insert(hash);
        let hit = self.members.get(&node).is_some_and(|member| member.grant.object.generation <= generation);
        if hit {
            self.remove_member(node);
        }
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
