//! What a node would be granted: its name, its addresses, its place in the order of serials. Nothing is stored here.

use std::net::Ipv4Addr;

use ipnet::IpNet;
use mesh_protocol::address::mesh_v6;
use mesh_protocol::control::{Refusal, RefusalCode};
use mesh_protocol::id::{Name, NodeId};
use mesh_protocol::record::{ClusterScope, MAX_POD_CIDRS, NodeGrant};
use mesh_protocol::token::{JoinClaim, TokenLimits};

use super::{Directory, refusal, unix_now};

/// Blocks and addresses looked at before a pool is called exhausted.
const MAX_LOOKED_AT: usize = 1 << 20;

impl Directory {
    pub(super) fn draft(&self, claim: &JoinClaim, node: NodeId, limits: &TokenLimits) -> Result<NodeGrant, Refusal> {
        let policy = self.view().policy();
        let (issuer, scope) = policy.cluster(&limits.cluster).ok_or_else(|| {
            refusal(RefusalCode::OutOfScope, format!("cluster {} is not in the mesh any more", limits.cluster))
        })?;
        self.check_name(&claim.name, node)?;
        let held = self.view().member(node).map(|member| &member.grant.object);
        let pod_cidrs = match held {
            _ if !claim.pod_cidrs.is_empty() => self.check_cidrs(claim, node, limits, scope)?,
            Some(held) if held.cluster == limits.cluster && allows(limits, &held.pod_cidrs) => held.pod_cidrs.clone(),
            _ => self.pick_cidrs(limits, scope, node)?,
        };
        let mesh_v4 = match held {
            Some(held) if policy.mesh_pool.contains(&held.mesh_v4) => held.mesh_v4,
            _ => self.pick_mesh_v4(node)?,
        };
        // What it had it keeps its place for; anything new comes behind everybody else.
        let had = |held: &NodeGrant| {
            let held_prefixes: Vec<IpNet> = held.prefixes().collect();
            held.name == claim.name
                && pod_cidrs.iter().all(|cidr| held_prefixes.contains(cidr))
                && held.mesh_v4 == mesh_v4
        };
        let serial = held.filter(|held| had(held)).map_or(self.history.serial + 1, |held| held.serial);
        let issued = unix_now();
        let life = self.settings.grant_life.as_secs().min(issuer.longest_grant);
        Ok(NodeGrant {
            node,
            identity: claim.identity,
            generation: self.view().next_generation(node, &limits.cluster),
            name: claim.name.clone(),
            cluster: limits.cluster.clone(),
            route_group: None,
            mesh_v4,
            mesh_v6: mesh_v6(self.mesh(), node),
            pod_cidrs,
            tags: limits.tags.clone(),
            pq: policy.pq,
            serial,
            issued,
            expires: issued.saturating_add(life),
            lifts: None,
            external: false,
            succession: Vec::new(),
        })
    }

    /// Whether name and prefixes of a node that was here before are free still.
    pub(super) fn check_place(&self, held: &NodeGrant) -> Result<(), Refusal> {
        self.check_name(&held.name, held.node)?;
        held.prefixes().try_for_each(|prefix| self.check_free(prefix, held.node))
    }

    fn check_name(&self, name: &Name, node: NodeId) -> Result<(), Refusal> {
        match self.view().member_named(name) {
            Some((holder, member)) if holder != node => Err(refusal(
                RefusalCode::Taken,
                format!(
                    "name {name} is already held by node {} of cluster {}: choose another with --node-name",
                    holder.short(),
                    member.grant.object.cluster
                ),
            )),
            _ => match self.reservations.named(name, node) {
                Some(waiting) => {
                    let message =
                        format!("name {name} is kept for node {}, which waits for its grant", waiting.short());
                    Err(refusal(RefusalCode::Taken, message))
                }
                None => Ok(()),
            },
        }
    }

    fn check_cidrs(
        &self,
        claim: &JoinClaim,
        node: NodeId,
        limits: &TokenLimits,
        scope: &ClusterScope,
    ) -> Result<Vec<IpNet>, Refusal> {
        if claim.pod_cidrs.len() > MAX_POD_CIDRS {
            return Err(refusal(RefusalCode::OutOfScope, format!("more than {MAX_POD_CIDRS} pod CIDRs")));
        }
        let (allowed, whose) = if limits.cidrs.is_empty() {
            (&scope.pools, format!("the pools of cluster {}", scope.cluster))
        } else {
            (&limits.cidrs, "what the token allows".to_owned())
        };
        for cidr in &claim.pod_cidrs {
            if !allowed.iter().any(|allowed| allowed.contains(cidr)) {
                return Err(refusal(RefusalCode::OutOfScope, format!("{cidr} is not inside {whose}")));
            }
            self.check_free(*cidr, node)?;
        }
        Ok(claim.pod_cidrs.clone())
    }

    fn check_free(&self, cidr: IpNet, node: NodeId) -> Result<(), Refusal> {
        match self.view().holder_of(cidr).filter(|(_, holder)| *holder != node) {
            None => match self.reservations.overlapping(cidr, node) {
                Some((held, name)) => {
                    let message = format!("{cidr} overlaps {held}, which is kept for node {name}");
                    Err(refusal(RefusalCode::Taken, message))
                }
                None => Ok(()),
            },
            Some((held, holder)) => {
                let name = self.view().member(holder).map(|member| member.grant.object.name.to_string());
                let name = name.unwrap_or_else(|| holder.short());
                Err(refusal(RefusalCode::Taken, format!("{cidr} overlaps {held}, which node {name} already holds")))
            }
        }
    }

    /// The next free block of each pool.
    fn pick_cidrs(&self, limits: &TokenLimits, scope: &ClusterScope, node: NodeId) -> Result<Vec<IpNet>, Refusal> {
        let pick = |pool: &IpNet| {
            let prefix = match pool {
                IpNet::V4(_) => scope.node_prefix_v4,
                IpNet::V6(_) => scope.node_prefix_v6,
            };
            let inside: Vec<IpNet> = match limits.cidrs.is_empty() {
                true => vec![*pool],
                false => limits.cidrs.iter().copied().filter(|cidr| pool.contains(cidr)).collect(),
            };
            if inside.is_empty() {
                return Ok(None);
            }
            let block = inside.iter().find_map(|pool| self.free_block(*pool, prefix, node));
            block.map(Some).ok_or_else(|| {
                let message = format!("no free /{prefix} is left in {pool} of cluster {}", scope.cluster);
                refusal(RefusalCode::Exhausted, message)
            })
        };
        let picked: Result<Vec<Option<IpNet>>, Refusal> = scope.pools.iter().map(pick).collect();
        Ok(picked?.into_iter().flatten().collect())
    }

    fn free_block(&self, pool: IpNet, prefix: u8, node: NodeId) -> Option<IpNet> {
        let free = |block: &IpNet| self.is_free(*block, node);
        pool.subnets(prefix.max(pool.prefix_len())).ok()?.take(MAX_LOOKED_AT).find(free)
    }

    fn is_free(&self, prefix: IpNet, node: NodeId) -> bool {
        self.view().holder_of(prefix).is_none() && self.reservations.overlapping(prefix, node).is_none()
    }

    fn pick_mesh_v4(&self, node: NodeId) -> Result<Ipv4Addr, Refusal> {
        let pool = self.view().policy().mesh_pool;
        let free = |address: &Ipv4Addr| self.is_free(IpNet::from(std::net::IpAddr::V4(*address)), node);
        pool.hosts()
            .take(MAX_LOOKED_AT)
            .find(free)
            .ok_or_else(|| refusal(RefusalCode::Exhausted, format!("no free address is left in the mesh pool {pool}")))
    }
}

/// Whether a token lets a node have these.
fn allows(limits: &TokenLimits, pod_cidrs: &[IpNet]) -> bool {
    let inside = |cidr: &IpNet| limits.cidrs.is_empty() || limits.cidrs.iter().any(|allowed| allowed.contains(cidr));
    pod_cidrs.iter().all(inside)
}
