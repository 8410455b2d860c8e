//! Clusters: an amendment of the trust policy, signed by the root that lies here in easy mode.

use ipnet::IpNet;
use mesh_protocol::address::DERIVED_NODE_PREFIX;
use mesh_protocol::admin::ClusterStatus;
use mesh_protocol::control::{Refusal, RefusalCode};
use mesh_protocol::id::Name;
use mesh_protocol::record::ClusterScope;
use mesh_protocol::trust::free_pool_v6;
use tracing::info;

use super::{Directory, refusal};

/// Prefix length of a node's IPv4 pod CIDR unless told otherwise.
const DEFAULT_NODE_PREFIX: u8 = 24;

/// What an operator asks for.
#[derive(Debug)]
pub(crate) struct ClusterRequest {
    pub(crate) cluster: Name,
    pub(crate) pod_cidrs: Vec<IpNet>,
    pub(crate) node_prefix: Option<u8>,
    pub(crate) node_prefix6: Option<u8>,
}

impl Directory {
    /// Adds a cluster to the trust policy.
    pub(crate) fn add_cluster(&mut self, request: ClusterRequest) -> Result<ClusterStatus, Refusal> {
        let ClusterRequest { cluster, pod_cidrs, node_prefix, node_prefix6 } = request;
        if self.view().policy().cluster(&cluster).is_some() {
            return Err(refusal(RefusalCode::Taken, format!("cluster {cluster} exists already")));
        }
        let mut pools: Vec<IpNet> = pod_cidrs.iter().map(IpNet::trunc).collect();
        if !pools.iter().any(|pool| matches!(pool, IpNet::V6(_))) {
            pools.push(IpNet::V6(self.free_pool_v6()?));
        }
        if let Some((pool, held, other)) = self.overlapping_pool(&pools) {
            return Err(refusal(RefusalCode::Taken, format!("{pool} overlaps {held} of {other}")));
        }
        let scope = ClusterScope {
            cluster: cluster.clone(),
            pools,
            node_prefix_v4: node_prefix.unwrap_or(DEFAULT_NODE_PREFIX),
            node_prefix_v6: node_prefix6.unwrap_or(DERIVED_NODE_PREFIX),
        };
        let issuer = self.issuer()?.verify_key();
        self.amend_policy(|policy| {
            if let Some(issuer) = policy.issuers.iter_mut().find(|held| held.key == issuer) {
                issuer.clusters.push(scope);
            }
        })?;
        info!(%cluster, "cluster added");
        let added = self.list_clusters().into_iter().find(|status| status.cluster == cluster);
        added.ok_or_else(|| refusal(RefusalCode::OutOfScope, "the issuer's key here is not in the policy"))
    }

    fn overlapping_pool(&self, pools: &[IpNet]) -> Option<(IpNet, IpNet, String)> {
        let policy = self.view().policy();
        let own = (IpNet::V4(policy.mesh_pool), "the mesh's own addresses".to_owned());
        let others = policy
            .clusters()
            .flat_map(|scope| scope.pools.iter().map(|pool| (*pool, format!("cluster {}", scope.cluster))));
        let held: Vec<(IpNet, String)> = others.chain([own]).collect();
        pools.iter().find_map(|pool| {
            let (other, whose) = held.iter().find(|(other, _)| other.contains(pool) || pool.contains(other))?;
            Some((*pool, *other, whose.clone()))
        })
    }

    fn free_pool_v6(&self) -> Result<ipnet::Ipv6Net, Refusal> {
        free_pool_v6(self.view().policy(), self.mesh())
            .ok_or_else(|| refusal(RefusalCode::Exhausted, "no IPv6 pool is left"))
    }

    /// Every cluster, by name.
    pub(crate) fn list_clusters(&self) -> Vec<ClusterStatus> {
        let mut clusters: Vec<ClusterStatus> =
            self.view().policy().clusters().map(|scope| self.status_of(scope)).collect();
        clusters.sort_by(|one, other| one.cluster.cmp(&other.cluster));
        clusters
    }

    fn status_of(&self, scope: &ClusterScope) -> ClusterStatus {
        let nodes = self.view().members().filter(|(_, member)| member.grant.object.cluster == scope.cluster).count();
        ClusterStatus {
            cluster: scope.cluster.clone(),
            pod_cidrs: scope.pools.clone(),
            node_prefix: scope.node_prefix_v4,
            node_prefix6: scope.node_prefix_v6,
            nodes: u32::try_from(nodes).unwrap_or(u32::MAX),
        }
    }

    pub(super) fn no_such_cluster(&self, cluster: &Name) -> Refusal {
        let known: Vec<String> = self.view().policy().clusters().map(|scope| scope.cluster.to_string()).collect();
        let known =
            if known.is_empty() { "there is none yet".to_owned() } else { format!("there are {}", known.join(", ")) };
        refusal(RefusalCode::Token, format!("no cluster {cluster}: {known}; add it with 'meshctl cluster add'"))
    }
}
