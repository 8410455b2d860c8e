//! Grants: signing them, and renewing them after two thirds of their life.

use mesh_protocol::control::{Refusal, RefusalCode};
use mesh_protocol::envelope::Envelope;
use mesh_protocol::id::{Name, NodeId};
use mesh_protocol::key::SigningKey;
use mesh_protocol::record::{NodeGrant, PostQuantum};
use tracing::{info, warn};

use super::{Directory, refusal, unix_now};

/// Grants renewed in one go: each is a transaction, and nobody else is served meanwhile.
const RENEWED_AT_ONCE: usize = 64;

impl Directory {
    /// The key that signs for this cluster, if it lies here.
    pub(super) fn issuer_for(&self, cluster: &Name) -> Result<&SigningKey, Refusal> {
        if !self.signs_for(cluster) && self.keys.issuer.is_some() {
            let message = format!("the key of the issuer of cluster {cluster} is not on this machine");
            return Err(refusal(RefusalCode::Unavailable, message));
        }
        self.issuer()
    }

    pub(super) fn issuer(&self) -> Result<&SigningKey, Refusal> {
        self.keys.issuer.as_ref().ok_or_else(|| {
            let message = "the issuer's key is not on this machine: sign where it is, with 'meshctl token create --mesh', \
                           'meshctl grant sign'";
            refusal(RefusalCode::Unavailable, message)
        })
    }

    pub(super) fn seal_grant(&self, grant: &NodeGrant) -> Result<Envelope, Refusal> {
        Ok(Envelope::seal(self.mesh(), grant, &[self.issuer()?]))
    }

    /// Renews a node's grant if it is due; failing that the old one goes on.
    pub(super) fn renew_grant_of(&mut self, node: NodeId) {
        let now = unix_now();
        let Some(held) = self.view().member(node).map(|member| member.grant.object.clone()) else { return };
        if !self.signs_for(&held.cluster) || self.behind.is_some() || !self.is_due(&held, now) {
            return;
        }
        // Refused: it is in the log, and the old one goes on.
        let _ = self.grant_after(&held);
    }

    /// Signs and stores the grant after `held`; whether that worked.
    pub(super) fn grant_after(&mut self, held: &NodeGrant) -> Result<(), Refusal> {
        self.store_grant(&self.renewed(held, unix_now()))
    }

    /// Signs and stores the next grant of a node; whether that worked.
    pub(super) fn store_grant(&mut self, renewed: &NodeGrant) -> Result<(), Refusal> {
        let name = renewed.name.clone();
        let changed = self.seal_grant(renewed).and_then(|envelope| {
            let changed = self.change(&envelope, Vec::new(), Vec::new());
            changed.map_err(|error| error.into_refusal(RefusalCode::OutOfScope))
        });
        match &changed {
            Ok(_) => info!(node = %name, "grant renewed"),
            Err(error) => warn!(node = %name, %error, "grant not renewed, the old one goes on"),
        }
        changed.map(|_| ())
    }

    /// The grant after `held`: more time, everything else as it was, its place in the order of serials too.
    pub(super) fn renewed(&self, held: &NodeGrant, now: u64) -> NodeGrant {
        let life = self.settings.grant_life.as_secs().min(self.longest_grant(held));
        // After a stolen key generations begin anew: within one second of the first grant it would be that one's twin.
        let now = now.saturating_add(u64::from(now == held.issued));
        let required = self.view().policy().pq == PostQuantum::Required;
        NodeGrant {
            generation: self.view().next_generation(held.node, &held.cluster),
            issued: now,
            expires: now.saturating_add(life),
            pq: if required { PostQuantum::Required } else { held.pq },
            ..held.clone()
        }
    }

    pub(super) fn renew_grants(&mut self) {
        let now = unix_now();
        let due = self.view().members().filter(|(_, member)| self.is_due(&member.grant.object, now));
        let due = due.filter(|(_, member)| self.signs_for(&member.grant.object.cluster));
        let due: Vec<NodeId> = due.map(|(node, _)| *node).take(RENEWED_AT_ONCE).collect();
        for node in due {
            self.renew_grant_of(node);
        }
    }

    fn longest_grant(&self, grant: &NodeGrant) -> u64 {
        self.view().policy().cluster(&grant.cluster).map_or(0, |(issuer, _)| issuer.longest_grant)
    }

    /// Two thirds of its life are over, or its issuer has another key since.
    pub(super) fn is_due(&self, grant: &NodeGrant, now: u64) -> bool {
        let life = grant.expires.saturating_sub(grant.issued);
        now >= grant.issued.saturating_add(life / 3 * 2) || self.view().is_former(grant)
    }
}
