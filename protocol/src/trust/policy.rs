//! Trust policies: when one can hold, and how one follows another.

use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::grant::overlap;
use super::issuer::MAX_GENERATION;
use super::{Accepted, Change, TrustError, View};
use crate::address;
use crate::envelope::{Envelope, NO_MESH};
use crate::id::{MeshId, NodeId};
use crate::key::VerifyKey;
use crate::record::{ClusterScope, Issuer, MAX_FORMER_KEYS, TrustPolicy};

/// Shortest exposure a policy may ask for, in seconds: below it, one lost minute would close tunnels.
const LEAST_EXPOSURE: u64 = 600;
/// Most keys of one role: what an object is verified against stays small, and all roots together can sign.
const MAX_KEYS_PER_ROLE: usize = crate::envelope::MAX_SIGNATURES;

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
    validate(&policy, mesh)?;
    Ok(Accepted { object: policy, envelope: envelope.clone(), hash })
}

/// Checks what no signature can make good, of a policy that is still to be signed.
///
/// # Errors
/// [`TrustError::InvalidPolicy`].
pub fn check_policy(policy: &TrustPolicy) -> Result<(), TrustError> {
    let mesh = match policy.version {
        1 => MeshId(Envelope::unsigned(policy).hash(NO_MESH).0),
        // Only pools that overlap the mesh's own IPv6 prefix need the real id: the view checks that again.
        _ => NO_MESH,
    };
    validate(policy, mesh)
}

/// Checks what no signature can make good.
fn validate(policy: &TrustPolicy, mesh: MeshId) -> Result<(), TrustError> {
    let invalid = |reason: String| Err(TrustError::InvalidPolicy { version: policy.version, reason });
    if policy.threshold == 0 || usize::from(policy.threshold) > policy.roots.len() {
        return invalid(format!("threshold {} of {} roots", policy.threshold, policy.roots.len()));
    }
    let issuers: Vec<VerifyKey> = policy.issuers.iter().map(|issuer| issuer.key).collect();
    let lists = [
        ("root", &policy.roots),
        ("issuer", &issuers),
        ("revoker", &policy.revokers),
        ("keyserver", &policy.keyservers),
    ];
    for (role, keys) in lists {
        if keys.len() > MAX_KEYS_PER_ROLE {
            return invalid(format!("{} {role} keys, at most {MAX_KEYS_PER_ROLE}", keys.len()));
        }
        if keys.iter().enumerate().any(|(at, key)| keys[..at].contains(key)) {
            return invalid(format!("a {role} key is named twice"));
        }
    }
    validate_former(policy).or_else(invalid)?;
    if policy.keyservers.is_empty() {
        return invalid("it names no keyserver key".to_owned());
    }
    if policy.exposure < LEAST_EXPOSURE {
        return invalid(format!("exposure of {} s is below {LEAST_EXPOSURE} s", policy.exposure));
    }
    validate_clusters(policy, mesh).or_else(invalid)
}

/// A key has one place among all that grant or granted: whose word a grant is must never be in doubt.
fn validate_former(policy: &TrustPolicy) -> Result<(), String> {
    let mut seen: Vec<VerifyKey> = Vec::new();
    for issuer in &policy.issuers {
        if issuer.former.len() > MAX_FORMER_KEYS {
            return Err(format!("issuer {} has more than {MAX_FORMER_KEYS} former keys", issuer.key.id().short()));
        }
        if issuer.floor() > MAX_GENERATION {
            return Err(format!("a former key of issuer {} leaves it no generations", issuer.key.id().short()));
        }
        for key in issuer.keys() {
            if seen.contains(&key) {
                return Err(format!("issuer key {} is named twice", key.id().short()));
            }
            seen.push(key);
        }
    }
    let has_former = policy.issuers.iter().any(|issuer| !issuer.former.is_empty());
    if policy.version == 1 && has_former { Err("the first policy has former issuers".to_owned()) } else { Ok(()) }
}

/// A former key granted before: nobody gets grants accepted by being named so.
fn check_former(policy: &TrustPolicy, held: &TrustPolicy) -> Result<(), TrustError> {
    let before: Vec<VerifyKey> = held.issuers.iter().flat_map(Issuer::keys).collect();
    let strange = policy.issuers.iter().flat_map(|issuer| &issuer.former).find(|former| !before.contains(&former.key));
    strange.map_or(Ok(()), |former| {
        let reason = format!("former key {} is no issuer's of policy {}", former.key.id().short(), held.version);
        Err(TrustError::InvalidPolicy { version: policy.version, reason })
    })
}

fn validate_clusters(policy: &TrustPolicy, mesh: MeshId) -> Result<(), String> {
    let own = [IpNet::V4(policy.mesh_pool), IpNet::V6(address::node_pool_v6(mesh))];
    if policy.mesh_pool.prefix_len() == 0 || policy.mesh_pool.prefix_len() > 30 || is_special(own[0]) {
        return Err(format!("{} cannot be the mesh pool", policy.mesh_pool));
    }
    let scopes: Vec<&ClusterScope> = policy.clusters().collect();
    for (at, scope) in scopes.iter().enumerate() {
        validate_scope(scope)?;
        for pool in &scope.pools {
            if let Some(own) = own.iter().find(|own| overlap(**own, *pool)) {
                return Err(format!("{pool} of {} overlaps the mesh pool {own}", scope.cluster));
            }
        }
        for other in &scopes[..at] {
            if other.cluster == scope.cluster {
                return Err(format!("cluster {} is named twice", scope.cluster));
            }
            for (pool, held) in scope.pools.iter().flat_map(|pool| other.pools.iter().map(move |held| (pool, held))) {
                if overlap(*pool, *held) {
                    return Err(format!("{pool} of {} overlaps {held} of {}", scope.cluster, other.cluster));
                }
            }
        }
    }
    Ok(())
}

/// Whether a pool touches loopback, link-local, multicast, reserved or IPv4-mapped addresses (RFC 6890).
fn is_special(pool: IpNet) -> bool {
    SPECIAL.iter().any(|special| overlap(*special, pool))
}

const fn v4(a: u8, b: u8, prefix: u8) -> IpNet {
    IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::new(a, b, 0, 0), prefix))
}

const fn v6(first: u16, prefix: u8) -> IpNet {
    IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::new(first, 0, 0, 0, 0, 0, 0, 0), prefix))
}

/// `::/8` covers the loopback, the unspecified, the IPv4-mapped and the NAT64 addresses.
const SPECIAL: [IpNet; 8] = [
    v4(0, 0, 8),
    v4(127, 0, 8),
    v4(169, 254, 16),
    v4(224, 0, 4),
    v4(240, 0, 4),
    v6(0, 8),
    v6(0xfe80, 10),
    v6(0xff00, 8),
];

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
        if is_special(*pool) {
            return Err(format!("{pool} of {cluster} holds addresses that no pod can have"));
        }
    }
    Ok(())
}

/// The first derived IPv6 pool ([`address::cluster_pool_v6`]) that no cluster of `policy` overlaps.
#[must_use]
pub fn free_pool_v6(policy: &TrustPolicy, mesh: MeshId) -> Option<Ipv6Net> {
    let taken: Vec<IpNet> = policy.clusters().flat_map(|scope| scope.pools.clone()).collect();
    let mut pools = (1..=u16::MAX).map(|ordinal| address::cluster_pool_v6(mesh, ordinal));
    pools.find(|pool| !taken.iter().any(|held| overlap(*held, IpNet::V6(*pool))))
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
        validate(&policy, self.mesh)?;
        check_former(&policy, &held.object)?;
        let version = policy.version;
        self.revokers.extend(policy.revokers.iter().map(|key| (key.id(), *key)));
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

    /// Removes the members whose grant the newest policy does not cover. What they said is kept: it is good again once
    /// they are granted anew.
    fn drop_uncovered(&mut self) -> Vec<NodeId> {
        let covered = |member: &super::Member| self.check_grant_signature(&member.grant.envelope).is_ok();
        let out: Vec<NodeId> =
            self.members.iter().filter(|(_, member)| !covered(member)).map(|(node, _)| *node).collect();
        for node in &out {
            let Some(member) = self.remove_member(*node) else { continue };
            if self.is_of_fallen_key(&member.grant) {
                // Whoever stole the key may have used up the generations.
                self.seen.entry(*node).and_modify(|seen| seen.generation = 0);
            }
            self.out.insert(*node, member);
        }
        out
    }
}
