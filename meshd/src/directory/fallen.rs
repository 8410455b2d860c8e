//! Members that a policy put out, while what grants them anew is waited for. Facts are not given out meanwhile, so that
//! tunnels stay, and those that fell with a stolen issuer's key are talked to: one of them may have the new grants.
//!
//! A wait begins only with a policy that puts somebody out while nobody was, so only the roots can cause another: what a
//! peer repeats does not lengthen it.

use std::net::{IpAddr, Ipv4Addr};
use std::time::{Duration, Instant};

use ipnet::IpNet;
use mesh_protocol::id::NodeId;
use mesh_protocol::trust::Member;

use super::Directory;

/// How long facts wait for the end of a change that puts members out and grants them anew: it comes within milliseconds, and
/// whoever does not send it gains no more than this.
const WHOLE_WITHIN: Duration = Duration::from_secs(2);

impl Directory {
    /// Between two frames of one change members may be out that the next one grants anew. Facts wait for the last, which
    /// brings a checkpoint.
    pub(crate) fn wait_for_whole(&mut self, was_whole: bool, last: bool, now: Instant) {
        if last || self.is_whole() {
            self.waits_until = None;
        } else if was_whole {
            self.waits_until = Some(now + WHOLE_WITHIN);
        }
    }

    /// The same after news of a peer: for those that fell with a stolen key. Others whom a policy does not cover are granted
    /// nothing that follows it.
    pub(crate) fn wait_for_fallen(&mut self, was_whole: bool, now: Instant) {
        if self.is_whole() || self.view.fallen().next().is_some() {
            self.wait_for_whole(was_whole, false, now);
        }
    }

    /// When the wait ends at the latest, if there is one.
    pub(crate) fn waits_until(&self) -> Option<Instant> {
        self.waits_until
    }

    /// Whether facts have to wait still.
    pub(crate) fn is_waiting(&self, now: Instant) -> bool {
        self.waits_until.is_some_and(|until| now < until)
    }

    /// Ends a wait that lasted long enough, or not at all.
    pub(crate) fn end_wait(&mut self) {
        self.waits_until = None;
    }

    /// What is kept of a member that fell: its own again with its new grant, and good for nothing before.
    pub(crate) fn fallen(&self, node: NodeId) -> Option<&Member> {
        self.view.fallen().find(|(fallen, _)| **fallen == node).map(|(_, member)| member)
    }

    /// Whether it is talked to: a member, or one that fell and is waited for.
    pub(crate) fn is_talked_to(&self, node: NodeId, now: Instant) -> bool {
        self.address_of(node, now).is_some()
    }

    /// Who is talked to at this address in the mesh.
    pub(crate) fn node_at(&self, address: Ipv4Addr, now: Instant) -> Option<NodeId> {
        let is_its = |member: &Member| member.grant.object.mesh_v4 == address;
        match self.view.holder_of(IpNet::from(IpAddr::V4(address))) {
            Some((_, node)) => self.view.member(node).is_some_and(is_its).then_some(node),
            None if self.is_waiting(now) => {
                self.view.fallen().find(|(_, member)| is_its(member)).map(|(node, _)| *node)
            }
            None => None,
        }
    }

    /// The own address in the mesh of one that is talked to.
    pub(crate) fn address_of(&self, node: NodeId, now: Instant) -> Option<Ipv4Addr> {
        let fallen = || self.is_waiting(now).then(|| self.fallen(node)).flatten();
        self.view.member(node).or_else(fallen).map(|member| member.grant.object.mesh_v4)
    }
}
