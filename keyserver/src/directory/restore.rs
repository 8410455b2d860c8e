//! A revoked node comes back: by a new grant that names the revocation it lifts. The revocation itself stays for ever.

use mesh_protocol::admin::{NodeStatus, PendingStatus};
use mesh_protocol::control::{Refusal, RefusalCode};
use mesh_protocol::id::NodeId;
use mesh_protocol::offline::{GrantReason, GrantRequest};
use mesh_protocol::record::NodeGrant;
use tracing::warn;

use super::enrol::{TokenUse, refused};
use super::history::History;
use super::reserve::RESERVED_FOR;
use super::{Directory, refusal, unix_now};

/// What became of a revoked node.
#[derive(Debug)]
pub(crate) enum Restored {
    /// It is in again.
    Granted(NodeStatus),
    /// It is as soon as its issuer has signed.
    Pending(PendingStatus),
}

impl Directory {
    /// Grants a revoked node anew what it had, or has it wait for an issuer elsewhere. Its name and prefixes have to be free
    /// still.
    pub(crate) fn restore(&mut self, node: &str) -> Result<Restored, Refusal> {
        self.writable()?;
        let held = self.find_revoked(node)?;
        let longest = self.view().policy().cluster(&held.cluster).map(|(issuer, _)| issuer.longest_grant);
        let longest = longest.ok_or_else(|| self.no_such_cluster(&held.cluster))?;
        self.check_place(&held)?;
        let issued = unix_now();
        let grant = NodeGrant {
            generation: self.view().next_generation(held.node, &held.cluster),
            serial: self.history.serial + 1,
            issued,
            expires: issued.saturating_add(self.settings.grant_life.as_secs().min(longest)),
            lifts: self.view().to_lift(held.node),
            pq: self.view().policy().pq,
            ..held.clone()
        };
        if self.signs_for(&grant.cluster) {
            return self.restore_now(&grant).map(Restored::Granted);
        }
        let held = History::signed(&*self.store, &held)
            .map_err(|error| refusal(RefusalCode::Unavailable, format!("read the store: {error}")))?
            .ok_or_else(|| refusal(RefusalCode::Unavailable, "its last grant is not in the store"))?;
        let (reason, until) = (GrantReason::Restoration { held }, issued.saturating_add(RESERVED_FOR));
        let request = GrantRequest { grant, reason, until };
        self.view().check_request(&request, issued).map_err(refused)?;
        let status = self.pending_status(&request).ok_or_else(|| self.no_such_cluster(&request.grant.cluster))?;
        self.reserve(request, TokenUse::default())?;
        Ok(Restored::Pending(status))
    }

    fn restore_now(&mut self, grant: &NodeGrant) -> Result<NodeStatus, Refusal> {
        let (name, id, generation) = (&grant.name, grant.node, grant.generation);
        let envelope = self.seal_grant(grant)?;
        let changed = self.change(&envelope, Vec::new(), Vec::new());
        changed.map_err(|error| error.into_refusal(RefusalCode::OutOfScope))?;
        self.flush();
        warn!(node = %name, generation, "revoked node restored");
        let restored = self.list_nodes().into_iter().find(|status| status.node == id && !status.revoked);
        restored.ok_or_else(|| refusal(RefusalCode::OutOfScope, format!("node {name} is still revoked")))
    }

    /// The last grant of a revoked node by its name, its id, or the start of it. Of two of one name the last granted.
    fn find_revoked(&self, text: &str) -> Result<NodeGrant, Refusal> {
        let start = text.to_ascii_lowercase();
        let hex = start.len() >= 8 && start.bytes().all(|byte| byte.is_ascii_hexdigit());
        let named = |grant: &&NodeGrant| grant.name.as_str() == start || (hex && is_start(grant.node, &start));
        let found = self.history.revoked().filter(named).max_by_key(|grant| grant.serial).cloned();
        found.ok_or_else(|| refusal(RefusalCode::Token, format!("no revoked node {text}: see 'meshctl node list'")))
    }
}

fn is_start(node: NodeId, start: &str) -> bool {
    node.to_string().starts_with(start)
}
