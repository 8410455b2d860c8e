//! Enrolment: the token, the name, the addresses, and all of it in one transaction with the grant.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use mesh_protocol::address::mesh_v6;
use mesh_protocol::cbor;
use mesh_protocol::control::{JoinReply, Refusal, RefusalCode, runs};
use mesh_protocol::envelope::Envelope;
use mesh_protocol::id::{Name, NodeId};
use mesh_protocol::key::VerifyKey;
use mesh_protocol::record::{ClusterScope, MAX_POD_CIDRS, NodeGrant};
use mesh_protocol::token::{JoinClaim, TokenLimits};
use tracing::{debug, info};

use super::token::StoredToken;
use super::{Directory, Frame, layout, refusal, unix_now, watch};
use crate::store::{Compare, Operation, Range};

/// Blocks and addresses looked at before a pool is called exhausted.
const MAX_LOOKED_AT: usize = 1 << 20;

/// Refused enrolments are logged at most this often; the metric counts all.
const REFUSAL_LOG_PAUSE: Duration = Duration::from_secs(1);

/// What a joining connection brought.
#[derive(Debug)]
pub(crate) struct JoinAttempt {
    /// From where.
    pub(crate) peer: SocketAddr,
    /// The key of its TLS handshake.
    pub(crate) identity: VerifyKey,
    /// Its exporter.
    pub(crate) exporter: [u8; 32],
    /// What the node asks for.
    pub(crate) claim: JoinClaim,
    /// Signed with the token's seed.
    pub(crate) signature: [u8; 64],
}

/// A node is in.
#[derive(Debug)]
pub(crate) struct Enrolled {
    /// Its grant.
    pub(crate) grant: Envelope,
    /// The newest checkpoint, after it.
    pub(crate) checkpoint: Envelope,
}

fn token_refused(reason: &str) -> Refusal {
    refusal(RefusalCode::Token, format!("join token refused: {reason}; make a new one with 'meshctl token create'"))
}

impl Directory {
    /// Every policy, oldest first: what a joining node is offered. Encoded once and shared: strangers ask for it.
    pub(crate) fn offer(&mut self) -> Arc<[Frame]> {
        let newest = self.view().policy_hash();
        if let Some((_, frames)) = self.offer.as_ref().filter(|(held, _)| *held == newest) {
            return frames.clone();
        }
        let policies = self.view().policies().iter().map(|policy| policy.envelope.clone()).collect();
        let frames = runs(policies).into_iter().filter_map(|policies| watch::encode(&JoinReply::Offer { policies }));
        let frames: Arc<[Frame]> = frames.collect();
        self.offer = Some((newest, frames.clone()));
        frames
    }

    /// Lets a node in, or says why not.
    pub(crate) fn enrol(&mut self, attempt: &JoinAttempt) -> Result<Enrolled, Refusal> {
        let result = self.try_enrol(attempt);
        match &result {
            Ok(_) => {
                self.metrics.joins.inc();
            }
            Err(refusal) => {
                self.metrics.refused_joins.inc();
                self.log_refused(attempt.peer, refusal);
            }
        }
        result
    }

    /// Anybody can be refused, as often as they like: the log does not grow with it.
    fn log_refused(&mut self, peer: SocketAddr, refused: &Refusal) {
        if self.refusal_logged.is_some_and(|logged| logged.elapsed() < REFUSAL_LOG_PAUSE) {
            debug!(%peer, code = ?refused.code, reason = %refused, "enrolment refused");
            return;
        }
        self.refusal_logged = Some(Instant::now());
        info!(%peer, code = ?refused.code, reason = %refused, "enrolment refused");
    }

    fn try_enrol(&mut self, attempt: &JoinAttempt) -> Result<Enrolled, Refusal> {
        self.writable()?;
        let claim = &attempt.claim;
        let node = claim.node();
        let (mut token, revision) = self.check_token(attempt)?;
        let limits = self.token_limits(&token)?;
        let used_before = self.get(&layout::token_use(claim.token, node))?.is_some();
        check_limits(&token, &limits, used_before)?;
        if let Some(up_to) = self.view().revoked_up_to(node) {
            return Err(refusal(
                RefusalCode::Revoked,
                format!("node {} is revoked up to generation {up_to}: join with a new identity", node.short()),
            ));
        }
        let grant = self.draft(claim, node, &limits)?;
        let name = grant.name.clone();
        let envelope = self.seal_grant(&grant)?;
        let key = layout::token(claim.token);
        let compare = vec![Compare::ModRevision(key.clone(), revision)];
        let mut operations = Vec::new();
        if !used_before {
            token.used += 1;
            operations.push(Operation::Put(key, cbor::to_vec(&token)));
            operations.push(Operation::Put(layout::token_use(claim.token, node), Vec::new()));
        }
        self.change(&envelope, compare, operations).map_err(|error| error.into_refusal(RefusalCode::OutOfScope))?;
        info!(node = %name, id = %node.short(), cluster = %grant.cluster, serial = grant.serial, "node enrolled");
        Ok(Enrolled { grant: envelope, checkpoint: self.checkpoint() })
    }

    fn check_token(&mut self, attempt: &JoinAttempt) -> Result<(StoredToken, u64), Refusal> {
        let claim = &attempt.claim;
        if claim.mesh != self.mesh() {
            return Err(token_refused("it is of another mesh"));
        }
        if claim.identity != attempt.identity {
            return Err(token_refused("the request was made by another identity than the connection's"));
        }
        let entry = self.get(&layout::token(claim.token))?.ok_or_else(|| token_refused("it is not known here"))?;
        let token: StoredToken =
            cbor::from_slice(&entry.value).map_err(|error| refusal(RefusalCode::Unavailable, error.to_string()))?;
        let limits = self.token_limits(&token)?;
        claim
            .verify(&limits.key, &attempt.exporter, &attempt.signature)
            .map_err(|_| token_refused("the request is not signed with it, for this connection"))?;
        Ok((token, entry.mod_revision))
    }

    /// What the token allows, signed by an issuer of the newest policy.
    fn token_limits(&self, token: &StoredToken) -> Result<TokenLimits, Refusal> {
        let issuers: Vec<VerifyKey> = self.view().policy().issuers.iter().map(|issuer| issuer.key).collect();
        token
            .limits
            .verified(self.mesh(), &issuers, 1)
            .map_err(|error| token_refused(&format!("no issuer of today stands for it ({error})")))
    }

    fn draft(&self, claim: &JoinClaim, node: NodeId, limits: &TokenLimits) -> Result<NodeGrant, Refusal> {
        let policy = self.view().policy();
        let (issuer, scope) = policy.cluster(&limits.cluster).ok_or_else(|| {
            refusal(RefusalCode::OutOfScope, format!("cluster {} is not in the mesh any more", limits.cluster))
        })?;
        self.check_name(&claim.name, node)?;
        let held = self.view().member(node).map(|member| &member.grant.object);
        let pod_cidrs = match held {
            _ if !claim.pod_cidrs.is_empty() => self.check_cidrs(claim, node, limits, scope)?,
            Some(held) if held.cluster == limits.cluster => held.pod_cidrs.clone(),
            _ => self.pick_cidrs(limits, scope)?,
        };
        let mesh_v4 = match held {
            Some(held) if policy.mesh_pool.contains(&held.mesh_v4) => held.mesh_v4,
            _ => self.pick_mesh_v4()?,
        };
        let issued = unix_now();
        let life = self.settings.grant_life.as_secs().min(issuer.longest_grant);
        Ok(NodeGrant {
            node,
            identity: claim.identity,
            generation: self.next_generation(node),
            name: claim.name.clone(),
            cluster: limits.cluster.clone(),
            route_group: None,
            mesh_v4,
            mesh_v6: mesh_v6(self.mesh(), node),
            pod_cidrs,
            tags: limits.tags.clone(),
            pq: policy.pq,
            serial: self.history.serial + 1,
            issued,
            expires: issued.saturating_add(life),
            lifts: None,
            external: false,
        })
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
            _ => Ok(()),
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
            None => Ok(()),
            Some((held, holder)) => {
                let name = self.view().member(holder).map(|member| member.grant.object.name.to_string());
                let name = name.unwrap_or_else(|| holder.short());
                Err(refusal(RefusalCode::Taken, format!("{cidr} overlaps {held}, which node {name} already holds")))
            }
        }
    }

    /// The next free block of each pool.
    fn pick_cidrs(&self, limits: &TokenLimits, scope: &ClusterScope) -> Result<Vec<IpNet>, Refusal> {
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
            let block = inside.iter().find_map(|pool| self.free_block(*pool, prefix));
            block.map(Some).ok_or_else(|| {
                let message = format!("no free /{prefix} is left in {pool} of cluster {}", scope.cluster);
                refusal(RefusalCode::Exhausted, message)
            })
        };
        let picked: Result<Vec<Option<IpNet>>, Refusal> = scope.pools.iter().map(pick).collect();
        Ok(picked?.into_iter().flatten().collect())
    }

    fn free_block(&self, pool: IpNet, prefix: u8) -> Option<IpNet> {
        let free = |block: &IpNet| self.view().holder_of(*block).is_none();
        pool.subnets(prefix.max(pool.prefix_len())).ok()?.take(MAX_LOOKED_AT).find(free)
    }

    fn pick_mesh_v4(&self) -> Result<Ipv4Addr, Refusal> {
        let pool = self.view().policy().mesh_pool;
        let free = |address: &Ipv4Addr| self.view().holder_of(IpNet::from(std::net::IpAddr::V4(*address))).is_none();
        pool.hosts()
            .take(MAX_LOOKED_AT)
            .find(free)
            .ok_or_else(|| refusal(RefusalCode::Exhausted, format!("no free address is left in the mesh pool {pool}")))
    }

    fn next_generation(&self, node: NodeId) -> u64 {
        self.view().seen().find(|seen| seen.node == node).map_or(1, |seen| seen.generation + 1)
    }

    pub(super) fn get(&self, key: &[u8]) -> Result<Option<crate::store::Entry>, Refusal> {
        let found = self.store.range(&Range::key(key), None, 1).map_err(|error| super::unavailable(&error))?;
        Ok(found.into_iter().next())
    }
}

fn check_limits(token: &StoredToken, limits: &TokenLimits, used_before: bool) -> Result<(), Refusal> {
    if token.revoked {
        return Err(token_refused("it is revoked"));
    }
    if unix_now() >= limits.expires {
        return Err(token_refused("it is expired"));
    }
    if token.used >= limits.uses && !used_before {
        return Err(token_refused(&format!("it is used up ({} of {})", token.used, limits.uses)));
    }
    Ok(())
}
