//! Trust policies: when one can hold, and how one follows another.

use ipnet::IpNet;

use super::{Accepted, Change, TrustError, View};
use crate::envelope::{Envelope, NO_MESH};
use crate::id::{MeshId, NodeId};
use crate::record::{ClusterScope, TrustPolicy};

/// Shortest exposure a policy may ask for, in seconds: below it, one lost minute would close tunnels.
const LEAST_EXPOSURE: u64 = 600;

/// Verifies the first policy of `mesh`: signed by its own roots, hashing to the mesh id.
pub(super) fn first(mesh: MeshId, envelope: &Envelope) -> Result<Accepted<TrustPolicy>, TrustError> {
    let hash = envelope.hash(NO_MESH);
    if hash.0 != mesh.0 {
        return Err(TrustError::OtherMesh { pinned: mesh, got: MeshId(hash.0) });
    }
    let policy: TrustPolicy = envelope.unverified()?;
    envelope.verify(NO_MESH, &policy.roots, usize::from(policy.threshold))?;
    if policy.version != 1 || policy.previous.is_some() {
        return Err(TrustError::PolicyOutOfOrder { held: 0, got: policy.version });
    }
    validate(&policy)?;
    Ok(Accepted { object: policy, envelope: envelope.clone(), hash })
}

/// Checks what no signature can make good.
fn validate(policy: &TrustPolicy) -> Result<(), TrustError> {
    let invalid = |reason: String| Err(TrustError::InvalidPolicy { version: policy.version, reason });
    if policy.threshold == 0 || usize::from(policy.threshold) > policy.roots.len() {
        return invalid(format!("threshold {} of {} roots", policy.threshold, policy.roots.len()));
    }
    let mut roots = policy.roots.clone();
    roots.sort_unstable();
    roots.dedup();
    if roots.len() != policy.roots.len() {
        return invalid("a root is named twice".to_owned());
    }
    if policy.keyservers.is_empty() {
        return invalid("it names no keyserver key".to_owned());
    }
    if policy.exposure < LEAST_EXPOSURE {
        return invalid(format!("exposure of {} s is below {LEAST_EXPOSURE} s", policy.exposure));
    }
    validate_clusters(policy).or_else(invalid)
}

fn validate_clusters(policy: &TrustPolicy) -> Result<(), String> {
    let scopes: Vec<&ClusterScope> = policy.clusters().collect();
    for (at, scope) in scopes.iter().enumerate() {
        validate_scope(scope)?;
        for pool in &scope.pools {
            if super::grant::overlap(*pool, IpNet::V4(policy.mesh_pool)) {
                return Err(format!("{pool} of {} overlaps the mesh pool {}", scope.cluster, policy.mesh_pool));
            }
        }
        for other in &scopes[..at] {
            if other.cluster == scope.cluster {
                return Err(format!("cluster {} is named twice", scope.cluster));
            }
            for (pool, held) in scope.pools.iter().flat_map(|pool| other.pools.iter().map(move |held| (pool, held))) {
                if super::grant::overlap(*pool, *held) {
                    return Err(format!("{pool} of {} overlaps {held} of {}", scope.cluster, other.cluster));
                }
            }
        }
    }
    Ok(())
}

fn validate_scope(scope: &ClusterScope) -> Result<(), String> {
    let ClusterScope { cluster, pools, node_prefix_v4, node_prefix_v6 } = scope;
    for v4 in [true, false] {
        if pools.iter().filter(|pool| matches!(pool, IpNet::V4(_)) == v4).count() > 1 {
            return Err(format!("cluster {cluster} has two pools of one family"));
        }
    }
    for pool in pools {
        let (node_prefix, longest) = match pool {
            IpNet::V4(_) => (*node_prefix_v4, 30),
            IpNet::V6(_) => (*node_prefix_v6, 126),
        };
        if pool.prefix_len() == 0 || node_prefix < pool.prefix_len() || node_prefix > longest {
            return Err(format!("node prefix {node_prefix} does not fit {pool} of {cluster}"));
        }
    }
    Ok(())
}

impl View {
    pub(super) fn apply_policy(&mut self, envelope: &Envelope) -> Result<Change, TrustError> {
        let policy: TrustPolicy = envelope.unverified()?;
        let held = self.newest_policy();
        if policy.version <= held.object.version {
            return self.known_policy(&policy, envelope);
        }
        if policy.version != held.object.version + 1 || policy.previous != Some(held.hash) {
            return Err(TrustError::PolicyOutOfOrder { held: held.object.version, got: policy.version });
        }
        envelope.verify(self.mesh, &held.object.roots, usize::from(held.object.threshold))?;
        validate(&policy)?;
        let version = policy.version;
        self.policies.push(self.accept(policy, envelope));
        Ok(Change::Policy { version, dropped: self.drop_uncovered() })
    }

    fn known_policy(&self, policy: &TrustPolicy, envelope: &Envelope) -> Result<Change, TrustError> {
        let mesh = if policy.version == 1 { NO_MESH } else { self.mesh };
        let held = usize::try_from(policy.version).ok().and_then(|version| self.policies.get(version.checked_sub(1)?));
        if held.is_some_and(|held| held.hash == envelope.hash(mesh)) {
            return Ok(Change::Nothing);
        }
        let newest = self.newest_policy().object.version;
        let before = usize::try_from(policy.version).ok().and_then(|v| self.policies.get(v.checked_sub(2)?));
        let signed = before.is_some_and(|before| {
            envelope.verify(mesh, &before.object.roots, usize::from(before.object.threshold)).is_ok()
        });
        if signed {
            let signer = "the roots".to_owned();
            return Err(TrustError::Equivocation { kind: envelope.kind(), signer, number: policy.version });
        }
        Err(TrustError::PolicyOutOfOrder { held: newest, got: policy.version })
    }

    /// Removes the members whose grant the newest policy does not cover.
    fn drop_uncovered(&mut self) -> Vec<NodeId> {
        let covered = |member: &super::Member| self.check_grant_signature(&member.grant.envelope).is_ok();
        let out: Vec<NodeId> =
            self.members.iter().filter(|(_, member)| !covered(member)).map(|(node, _)| *node).collect();
        for node in &out {
            self.remove_member(*node);
        }
        out
    }
}
