//! The directory as the rest of `meshd` needs it.

use std::net::IpAddr;

use ipnet::IpNet;
use mesh_protocol::UnixSeconds;
use mesh_protocol::address::node_pool_v6;
use mesh_protocol::id::{NodeId, Position};
use mesh_protocol::record::{NodeGrant, NodeRecord};
use mesh_protocol::trust::Member;

use super::Directory;
use crate::facts::{DirectoryFacts, OwnGrant, PeerFacts, Pool};
use crate::paths::usable;

/// From where, and when, the directory is looked at.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Viewpoint<'a> {
    /// The own grant.
    pub(crate) own: &'a NodeGrant,
    /// Own addresses on the underlay: no endpoint of anybody else.
    pub(crate) underlay: &'a [IpAddr],
    /// The wall clock.
    pub(crate) wall: UnixSeconds,
    /// No fresh checkpoint within the policy's exposure.
    pub(crate) exposed: bool,
}

impl Directory {
    /// What holds now. Gives numbers to peers that have none yet.
    pub(crate) fn facts(&mut self, from: &Viewpoint<'_>) -> DirectoryFacts {
        let pools = self.pools();
        let mesh: Vec<IpNet> = pools.iter().map(|pool| pool.prefix).collect();
        let expiry_clock = self.expiry_clock(from.wall);
        let own = self.own;
        let peers: Vec<NodeId> = self
            .view
            .members()
            .filter(|(node, member)| **node != own && is_peer(member, expiry_clock))
            .map(|(node, _)| *node)
            .collect();
        let peers = peers.into_iter().filter_map(|node| self.peer(node, from, &mesh)).collect();
        let revoked = self.is_own_revoked(from.own.generation);
        let policy = self.view.policy();
        DirectoryFacts {
            mesh: self.view.mesh(),
            mesh_name: policy.name.clone(),
            policy_version: policy.version,
            position: self.position().unwrap_or(Position { epoch: 0, revision: 0 }),
            own: own_grant(from.own),
            pools,
            peers,
            exposed: from.exposed || revoked,
        }
    }

    /// Prefixes of every cluster and of the nodes themselves.
    pub(crate) fn pools(&self) -> Vec<Pool> {
        let policy = self.view.policy();
        let clusters = policy.clusters().flat_map(|scope| {
            scope.pools.iter().map(|prefix| Pool { cluster: Some(scope.cluster.clone()), prefix: *prefix })
        });
        let nodes = [IpNet::V4(policy.mesh_pool), IpNet::V6(node_pool_v6(self.view.mesh()))];
        clusters.chain(nodes.map(|prefix| Pool { cluster: None, prefix })).collect()
    }

    /// Members with a record that have not left: who can be talked to, this node too.
    pub(crate) fn peers(&self) -> impl Iterator<Item = NodeId> + '_ {
        let there = self.view.members().filter(|(_, member)| member.record.is_some() && !member.has_departed());
        there.map(|(node, _)| *node)
    }

    /// Node ids of peers with these numbers.
    pub(crate) fn nodes_numbered(&self, numbers: &[u32]) -> Vec<NodeId> {
        let wanted = |(_, number): &(&NodeId, &u32)| numbers.binary_search(number).is_ok();
        self.numbers.iter().filter(wanted).map(|(node, _)| *node).collect()
    }

    /// Numbers of those nodes that are peers.
    pub(crate) fn numbers_of(&self, nodes: &[NodeId]) -> Vec<u32> {
        nodes.iter().filter_map(|node| self.numbers.get(node).copied()).collect()
    }

    /// A grant has expired only when wall clock and checkpoint agree on it, so that one bad clock never expires a mesh.
    pub(crate) fn expiry_clock(&self, wall: UnixSeconds) -> UnixSeconds {
        self.checkpoint_time().unwrap_or(0).min(wall)
    }

    fn peer(&mut self, node: NodeId, from: &Viewpoint<'_>, mesh: &[IpNet]) -> Option<PeerFacts> {
        let number = self.number(node);
        let member = self.view.member(node)?;
        let record: &NodeRecord = &member.record.as_ref()?.object;
        let told = member.endpoints.as_ref().map(|endpoints| endpoints.object.candidates.as_slice());
        let grant = own_grant(&member.grant.object);
        Some(PeerFacts {
            node,
            number,
            name: grant.name,
            cluster: grant.cluster,
            addresses: grant.addresses,
            pod_cidrs: grant.pod_cidrs,
            seq: record.seq,
            current: (record.current.epoch, record.current.key),
            previous: record.previous.map(|previous| (previous.epoch, previous.key)),
            spare: (record.spare.epoch, record.spare.key),
            candidates: usable(told.unwrap_or_default(), from.underlay, mesh),
            lanes: record.lanes,
            kem: (record.kem.epoch, record.kem.key.clone()),
            post_quantum: self.view.requires_post_quantum(from.own, &member.grant.object),
        })
    }

    fn number(&mut self, node: NodeId) -> u32 {
        let next = self.next_number;
        let number = *self.numbers.entry(node).or_insert(next);
        if number == next {
            self.next_number += 1;
        }
        number
    }
}

fn is_peer(member: &Member, expiry_clock: UnixSeconds) -> bool {
    member.record.is_some() && !member.has_departed() && member.is_valid_at(expiry_clock)
}

fn own_grant(grant: &NodeGrant) -> OwnGrant {
    OwnGrant {
        node: grant.node,
        name: grant.name.clone(),
        cluster: grant.cluster.clone(),
        addresses: vec![IpAddr::V4(grant.mesh_v4), IpAddr::V6(grant.mesh_v6)],
        pod_cidrs: grant.pod_cidrs.clone(),
    }
}
