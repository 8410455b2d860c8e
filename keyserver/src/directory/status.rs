//! What operators see.

use std::net::IpAddr;

use mesh_protocol::admin::{IssuerProgress, NodeStatus};
use mesh_protocol::id::{Name, Position};
use mesh_protocol::record::NodeGrant;

use super::{Directory, unix_now};

/// The part of the keyserver's status that the directory knows.
#[derive(Debug, Clone)]
pub(crate) struct DirectoryStatus {
    pub(crate) mesh: Name,
    pub(crate) mesh_id: mesh_protocol::id::MeshId,
    pub(crate) trust: &'static str,
    pub(crate) revokes: bool,
    pub(crate) pending: u32,
    pub(crate) issuers: Vec<IssuerProgress>,
    pub(crate) policy_version: u64,
    pub(crate) position: Position,
    pub(crate) nodes: u32,
    pub(crate) connected: u32,
    pub(crate) alarms: Vec<String>,
}

impl Directory {
    /// The state of it all.
    pub(crate) fn status(&self) -> DirectoryStatus {
        let now = unix_now();
        let valid = self.view().members().filter(|(_, member)| member.is_valid_at(now)).count();
        DirectoryStatus {
            mesh: self.view().policy().name.clone(),
            mesh_id: self.mesh(),
            trust: self.trust(),
            revokes: self.keys.revoker.is_some(),
            pending: u32::try_from(self.reservations.len() + self.successors.len()).unwrap_or(u32::MAX),
            issuers: self.issuers_under_way(),
            policy_version: self.view().policy().version,
            position: self.position(),
            nodes: u32::try_from(valid).unwrap_or(u32::MAX),
            connected: u32::try_from(self.hub.sessions().len()).unwrap_or(u32::MAX),
            alarms: self.alarms.clone(),
        }
    }

    /// Every node by name, those that are revoked last.
    pub(crate) fn list_nodes(&self) -> Vec<NodeStatus> {
        let members = self.view().members().map(|(node, member)| NodeStatus {
            connected: self.hub.sessions().get(node).map(|session| session.peer),
            key_epoch: member.record.as_ref().map(|record| record.object.current.epoch),
            ..status(&member.grant.object, false)
        });
        let revoked = self.history.revoked().map(|grant| status(grant, true));
        let mut nodes: Vec<NodeStatus> = members.chain(revoked).collect();
        nodes.sort_by(|one, other| (one.revoked, &one.name).cmp(&(other.revoked, &other.name)));
        nodes
    }
}

fn status(grant: &NodeGrant, revoked: bool) -> NodeStatus {
    NodeStatus {
        node: grant.node,
        name: grant.name.clone(),
        cluster: grant.cluster.clone(),
        addresses: vec![IpAddr::V4(grant.mesh_v4), IpAddr::V6(grant.mesh_v6)],
        pod_cidrs: grant.pod_cidrs.clone(),
        generation: grant.generation,
        expires: grant.expires,
        connected: None,
        key_epoch: None,
        revoked,
    }
}
