//! Grants: issuer's scope, generations, collisions.

use std::net::IpAddr;

use ipnet::IpNet;

use super::{Change, Member, TrustError, View};
use crate::address;
use crate::envelope::Envelope;
use crate::id::NodeId;
use crate::record::{Issuer, MAX_POD_CIDRS, NodeGrant};

/// Whether two prefixes share an address.
pub(super) fn overlap(one: IpNet, other: IpNet) -> bool {
    one.contains(&other) || other.contains(&one)
}

impl View {
    pub(super) fn apply_grant(&mut self, envelope: &Envelope) -> Result<Change, TrustError> {
        let grant = self.check_grant_signature(envelope)?;
        let hash = envelope.hash(self.mesh);
        if let Some(member) = self.members.get(&grant.node) {
            let held = &member.grant;
            if held.hash == hash {
                return Ok(Change::Nothing);
            }
            if grant.generation == held.object.generation {
                let (signer, number) = (grant.name.to_string(), grant.generation);
                return Err(TrustError::Equivocation { kind: envelope.kind(), signer, number });
            }
            if grant.generation < held.object.generation {
                let (held, got) = (held.object.generation, grant.generation);
                return Err(TrustError::OldGeneration { name: grant.name, held, got });
            }
        }
        self.check_not_revoked(&grant)?;
        let displaced = self.colliding(&grant)?;
        for node in &displaced {
            self.remove_member(*node);
        }
        let node = grant.node;
        let before = self.remove_member(node);
        self.names.insert(grant.name.clone(), node);
        self.prefixes.insert(node, grant.prefixes());
        let member = Member {
            previous_grant: before.as_ref().map(|before| before.grant.hash),
            record: before.as_ref().and_then(|before| before.record.clone()),
            endpoints: before.and_then(|before| before.endpoints),
            grant: self.accept(grant, envelope),
        };
        self.members.insert(node, member);
        Ok(Change::Grant { node, displaced })
    }

    /// Verifies a grant against the newest policy: signature, scope, and that it is consistent in itself.
    pub(super) fn check_grant_signature(&self, envelope: &Envelope) -> Result<NodeGrant, TrustError> {
        let grant: NodeGrant = envelope.unverified()?;
        let issuers = &self.policy().issuers;
        let keys: Vec<_> = issuers.iter().map(|issuer| issuer.key).collect();
        envelope.verify(self.mesh, &keys, 1)?;
        let out = |reason: String| TrustError::OutOfScope { name: grant.name.clone(), reason };
        let signer = issuers
            .iter()
            .filter(|issuer| envelope.signers().any(|signer| signer == issuer.key.id()))
            .find(|issuer| issuer.clusters.iter().any(|scope| scope.cluster == grant.cluster))
            .ok_or_else(|| out(format!("cluster {} is not the issuer's", grant.cluster)))?;
        self.check_scope(&grant, signer).map_err(out)?;
        Ok(grant)
    }

    fn check_scope(&self, grant: &NodeGrant, issuer: &Issuer) -> Result<(), String> {
        if grant.identity.node_id() != grant.node {
            return Err("node id is not the hash of the identity key".to_owned());
        }
        if grant.mesh_v6 != address::mesh_v6(self.mesh, grant.node) {
            return Err(format!("{} is not the node's IPv6 address", grant.mesh_v6));
        }
        let pool = self.policy().mesh_pool;
        if !pool.contains(&grant.mesh_v4) {
            return Err(format!("{} is not in the mesh pool {pool}", grant.mesh_v4));
        }
        if grant.expires <= grant.issued || grant.expires - grant.issued > issuer.longest_grant {
            return Err(format!("it lasts longer than {} s", issuer.longest_grant));
        }
        if let Some(tag) = grant.tags.iter().find(|tag| !issuer.tags.contains(tag)) {
            return Err(format!("tag {tag} is not the issuer's to give"));
        }
        self.check_pod_cidrs(grant, issuer)
    }

    fn check_pod_cidrs(&self, grant: &NodeGrant, issuer: &Issuer) -> Result<(), String> {
        if grant.pod_cidrs.len() > MAX_POD_CIDRS {
            return Err(format!("{} pod CIDRs, at most {MAX_POD_CIDRS}", grant.pod_cidrs.len()));
        }
        let pools =
            issuer.clusters.iter().filter(|scope| scope.cluster == grant.cluster).flat_map(|scope| &scope.pools);
        let pools: Vec<&IpNet> = pools.collect();
        let own = [IpAddr::V4(grant.mesh_v4), IpAddr::V6(grant.mesh_v6)].map(IpNet::from);
        for (at, cidr) in grant.pod_cidrs.iter().enumerate() {
            if !pools.iter().any(|pool| pool.contains(cidr)) {
                return Err(format!("{cidr} is not in a pool of cluster {}", grant.cluster));
            }
            let earlier = grant.pod_cidrs[..at].iter().chain(&own);
            if let Some(other) = earlier.into_iter().find(|other| overlap(**other, *cidr)) {
                return Err(format!("{cidr} and {other} of one node overlap"));
            }
        }
        Ok(())
    }

    fn check_not_revoked(&self, grant: &NodeGrant) -> Result<(), TrustError> {
        let Some(revoked) = self.revoked.get(&grant.node) else {
            return Ok(());
        };
        let lifted = grant.lifts.is_some_and(|lifts| revoked.by.contains(&lifts));
        if lifted && grant.generation > revoked.generation {
            return Ok(());
        }
        Err(TrustError::Revoked { node: grant.node, up_to_generation: revoked.generation })
    }

    /// Other members in the way of `grant`. Where two collide the lower serial wins, everywhere the same.
    fn colliding(&self, grant: &NodeGrant) -> Result<Vec<NodeId>, TrustError> {
        let mut displaced = Vec::new();
        let name_holder = self.names.get(&grant.name).filter(|holder| **holder != grant.node);
        if let Some(holder) = name_holder {
            if self.serial(*holder) <= grant.serial {
                let (name, node, holder) = (grant.name.clone(), grant.node, *holder);
                return Err(TrustError::NameTaken { name, node, holder });
            }
            displaced.push(*holder);
        }
        for prefix in grant.prefixes() {
            for (held, holder) in self.prefixes.overlapping(prefix).filter(|(_, holder)| *holder != grant.node) {
                if self.serial(holder) <= grant.serial {
                    let (name, holder) = (grant.name.clone(), self.name(holder, grant));
                    return Err(TrustError::PrefixTaken { prefix, name, held, holder });
                }
                displaced.push(holder);
            }
        }
        displaced.sort_unstable();
        displaced.dedup();
        Ok(displaced)
    }

    fn serial(&self, node: NodeId) -> u64 {
        self.members.get(&node).map_or(u64::MAX, |member| member.grant.object.serial)
    }

    fn name(&self, node: NodeId, fallback: &NodeGrant) -> crate::id::Name {
        self.members.get(&node).map_or_else(|| fallback.name.clone(), |member| member.grant.object.name.clone())
    }
}
