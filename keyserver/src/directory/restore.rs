//! A revoked node comes back: by a new grant that names the revocation it lifts. The revocation itself stays for ever.

use mesh_protocol::admin::NodeStatus;
use mesh_protocol::control::{Refusal, RefusalCode};
use mesh_protocol::id::NodeId;
use mesh_protocol::record::NodeGrant;
use tracing::warn;

use super::{Directory, refusal, unix_now};

impl Directory {
    /// Grants a revoked node anew what it had. Its name and prefixes have to be free still.
    pub(crate) fn restore(&mut self, node: &str) -> Result<NodeStatus, Refusal> {
        self.writable()?;
        let held = self.find_revoked(node)?;
        let lifts = self.view().to_lift(held.node);
        let longest = self.view().policy().cluster(&held.cluster).map(|(issuer, _)| issuer.longest_grant);
        let longest = longest.ok_or_else(|| self.no_such_cluster(&held.cluster))?;
        let issued = unix_now();
        let generation = self.view().next_generation(held.node, &held.cluster);
        let grant = NodeGrant {
            generation,
            serial: self.history.serial + 1,
            issued,
            expires: issued.saturating_add(self.settings.grant_life.as_secs().min(longest)),
            lifts,
            pq: self.view().policy().pq,
            ..held
        };
        let (name, id) = (grant.name.clone(), grant.node);
        let envelope = self.seal_grant(&grant)?;
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
