//! Grants: issuer's scope, generations, collisions.

use std::net::IpAddr;

use ipnet::IpNet;

use super::{Accepted, Change, Member, Seen, TrustError, View};
use crate::address;
use crate::envelope::{Envelope, Kind};
use crate::id::{Hash, NodeId};
use crate::record::{Issuer, MAX_POD_CIDRS, NodeGrant, PostQuantum};

/// Whether two prefixes share an address.
pub(super) fn overlap(one: IpNet, other: IpNet) -> bool {
    one.contains(&other) || other.contains(&one)
}

impl View {
    pub(super) fn apply_grant(&mut self, envelope: &Envelope) -> Result<Change, TrustError> {
        let grant = self.check_grant_signature(envelope)?;
        let hash = envelope.hash(self.mesh);
        let is_held =
            |member: &Member| member.grant.hash == hash || member.grant_of_record().is_some_and(|e| e.hash == hash);
        if self.members.get(&grant.node).is_some_and(is_held) {
            return Ok(Change::Nothing);
        }
        let displaced = self.judge(&grant, hash)?;
        for node in &displaced {
            self.remove_member(*node);
        }
        let node = grant.node;
        self.insert_member(self.accept(grant, envelope));
        Ok(Change::Grant { node, displaced })
    }

    /// Whether a grant would be accepted, by itself, displacing nobody.
    ///
    /// # Errors
    /// As [`Self::apply`]; [`TrustError::NameTaken`] also where it would put another member out.
    pub fn check_grant(&self, envelope: &Envelope) -> Result<NodeGrant, TrustError> {
        let grant = self.check_grant_signature(envelope)?;
        match self.judge(&grant, envelope.hash(self.mesh))?.first() {
            Some(holder) => {
                let (name, node, holder) = (grant.name.clone(), grant.node, *holder);
                Err(TrustError::NameTaken { name, node, holder })
            }
            None => Ok(grant),
        }
    }

    /// Everything but the issuer's signature; gives the members that are out when it is accepted.
    pub(super) fn judge(&self, grant: &NodeGrant, hash: Hash) -> Result<Vec<NodeId>, TrustError> {
        self.check_generation(grant, hash)?;
        self.check_identity(grant)?;
        self.check_not_revoked(grant)?;
        self.colliding(grant)
    }

    /// Whether two nodes have no tunnel without a post-quantum preshared key: the policy says so, or the grant of either. A grant
    /// that says nothing of it stands under a policy that does, and takes nothing away from it.
    #[must_use]
    pub fn requires_post_quantum(&self, one: &NodeGrant, other: &NodeGrant) -> bool {
        [self.policy().pq, one.pq, other.pq].contains(&PostQuantum::Required)
    }

    fn insert_member(&mut self, grant: Accepted<NodeGrant>) {
        let node = grant.object.node;
        self.hold_identities(&grant.object);
        let before = self.remove_member(node).or_else(|| self.out.remove(&node));
        let spoke = self.seen.get(&node).filter(|seen| before.is_some() || seen.grant == grant.hash);
        let record = spoke.and_then(|seen| seen.record);
        let (generation, identity) = (grant.object.generation, Some(grant.object.identity.id()));
        self.seen.insert(node, Seen { node, generation, grant: grant.hash, record, identity });
        self.names.insert(grant.object.name.clone(), node);
        self.prefixes.insert(node, grant.object.prefixes());
        let member = match before {
            Some(Member { grant: held, record, endpoints, earlier_grant }) => {
                let speaks_under = |hash| record.as_ref().is_none_or(|record| record.object.grant == hash);
                let replaced = held.hash != grant.hash && speaks_under(held.hash);
                let earlier_grant = if replaced { Some(Box::new(held)) } else { earlier_grant };
                Member { grant, record, endpoints, earlier_grant }
            }
            None => Member { grant, record: None, endpoints: None, earlier_grant: None },
        };
        self.members.insert(node, member);
    }

    /// The highest generation ever seen holds, also of a node that is out at the moment.
    pub(super) fn check_generation(&self, grant: &NodeGrant, hash: Hash) -> Result<(), TrustError> {
        let Some(seen) = self.seen.get(&grant.node) else { return Ok(()) };
        let (held, got) = (seen.generation, grant.generation);
        if got < held {
            return Err(TrustError::OldGeneration { name: grant.name.clone(), held, got });
        }
        if got == held && hash != seen.grant {
            let (kind, signer) = (Kind::NodeGrant, grant.name.to_string());
            return Err(TrustError::Equivocation { kind, signer, number: got });
        }
        Ok(())
    }

    pub(super) fn check_scope(&self, grant: &NodeGrant, issuer: &Issuer) -> Result<(), String> {
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

    pub(super) fn check_not_revoked(&self, grant: &NodeGrant) -> Result<(), TrustError> {
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
    pub(super) fn colliding(&self, grant: &NodeGrant) -> Result<Vec<NodeId>, TrustError> {
        let mut displaced = Vec::new();
        let name_holder = self.names.get(&grant.name).filter(|holder| **holder != grant.node);
        if let Some(holder) = name_holder {
            if self.precedence(*holder) <= self.precedence_of(grant) {
                let (name, node, holder) = (grant.name.clone(), grant.node, *holder);
                return Err(TrustError::NameTaken { name, node, holder });
            }
            displaced.push(*holder);
        }
        for prefix in grant.prefixes() {
            for (held, holder) in self.prefixes.overlapping(prefix).filter(|(_, holder)| *holder != grant.node) {
                if self.precedence(holder) <= self.precedence_of(grant) {
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

    /// Where two grants collide, the lower one holds; what the issuer's present key granted, ahead of what a former one
    /// did. An honest issuer gives each serial to one node; the id decides where another did not, so that no order of arrival
    /// matters.
    fn precedence_of(&self, grant: &NodeGrant) -> (bool, u64, NodeId) {
        (self.is_former(grant), grant.serial, grant.node)
    }

    fn precedence(&self, node: NodeId) -> (bool, u64, NodeId) {
        let member = self.members.get(&node);
        member.map_or((true, u64::MAX, node), |member| self.precedence_of(&member.grant.object))
    }

    fn name(&self, node: NodeId, fallback: &NodeGrant) -> crate::id::Name {
        self.members.get(&node).map_or_else(|| fallback.name.clone(), |member| member.grant.object.name.clone())
    }
}
