//! Follows the facts: whenever one changes, the data plane gets a new table and the host a new state.
//!
//! Two tasks, because a revocation must be in force within milliseconds however long the kernel takes over routes: the
//! table is the first's alone, the host the second's.

use std::sync::Arc;

use mesh_dataplane::Table;
use mesh_protocol::local::Lease;
use tokio::sync::watch;
use tracing::{debug, info, warn};

use super::Node;
use crate::desired;
use crate::facts::Facts;
use crate::ready::Guard;

/// Hands the engine a new table after each change of the directory, of own keys, or of what the host is like.
///
/// # Errors
/// Control has ended.
pub(super) async fn table(node: Arc<Node>) -> anyhow::Result<()> {
    let mut directory = node.control.facts.clone();
    let mut keys = node.control.keys.clone();
    let mut host = node.host.facts.clone();
    loop {
        // Marked as seen before they are read: a change in between comes round again.
        let seen = Facts {
            directory: directory.borrow_and_update().clone(),
            keys: keys.borrow_and_update().clone(),
            pods: Arc::new(Vec::new()),
            host: host.borrow_and_update().clone(),
        };
        let position = seen.directory.position;
        // Ahead of the table, whose lanes may want keys at once.
        node.psk.changed();
        if apply_table(&node, seen).await {
            node.control.applied(position);
        }
        tokio::select! {
            changed = directory.changed() => changed?,
            changed = keys.changed() => changed?,
            changed = host.changed() => changed?,
        }
    }
}

/// True once every lane works with the new table.
async fn apply_table(node: &Node, facts: Facts) -> bool {
    let mtu = desired::device_mtu(&facts, &node.config);
    let spec = desired::table_spec(&facts, mtu);
    let engine = Arc::clone(&node.engine);
    let work = tokio::task::spawn_blocking(move || {
        let (table, refused): (Arc<Table>, Vec<desired::Refused>) = desired::checked_table(spec)?;
        let peers = table.peers().len();
        engine.set_table(table);
        // A lane answers after it has taken the table, which never waits behind other commands.
        let answered = engine.snapshot().lanes.len();
        Ok::<_, mesh_dataplane::TableError>((refused, peers, answered == engine.lanes()))
    });
    match work.await {
        Ok(Ok((refused, peers, answered))) => {
            let name = |number: u32| {
                let peer = facts.directory.peers.iter().find(|peer| peer.number == number);
                peer.map_or_else(|| number.to_string(), |peer| peer.name.to_string())
            };
            node.alarms.set("peer-refused", refused.iter().map(|(peer, error)| format!("{}: {error}", name(peer.0))));
            debug!(peers, position = ?facts.directory.position, "table in force");
            answered
        }
        Ok(Err(error)) => {
            node.alarms.set("table-refused", Some(format!("the old peer table stays in use: {error}")));
            false
        }
        Err(panic) => {
            warn!(error = %panic, "building the peer table panicked");
            false
        }
    }
}

/// Brings the host in line after each change, and says when all of it stood for the first time.
///
/// # Errors
/// Control, pods or the host thread have ended.
pub(super) async fn host(
    node: Arc<Node>,
    applied: watch::Sender<Arc<Vec<Lease>>>,
    routes: Guard,
    device: Guard,
) -> anyhow::Result<()> {
    let mut directory = node.control.facts.clone();
    let mut leases = node.pods.leases.clone();
    let mut seen = node.host.facts.clone();
    let mut report = node.host.report.clone();
    let mut pending = Some((routes, device));
    let mut last = None;
    loop {
        let facts = Facts {
            directory: directory.borrow_and_update().clone(),
            keys: node.control.keys.borrow().clone(),
            pods: leases.borrow_and_update().clone(),
            host: seen.borrow_and_update().clone(),
        };
        tell(&node, &facts);
        let state = desired::host_state(&facts, &node.config);
        if last.as_ref() != Some(&state) {
            let result = node.host.apply(state.clone()).await;
            if let Err(error) = &result {
                warn!(%error, "host not in line yet, trying again");
            }
            // Half of it is better than none, and the host thread goes on trying: the alarm says what is missing.
            last = Some(state);
        }
        applied.send_replace(Arc::clone(&facts.pods));
        let refused = report.borrow_and_update().refused.clone();
        if refused.is_empty() && pending.take().is_some() {
            info!(
                prefixes = facts.directory.pools.len(),
                peers = facts.directory.peers.len(),
                "device and routes stand"
            );
        }
        node.alarms.set("host-network", refused);
        tokio::select! {
            changed = directory.changed() => changed?,
            changed = leases.changed() => changed?,
            changed = seen.changed() => changed?,
            changed = report.changed() => changed?,
        }
    }
}

/// Tells the other parts what the facts mean for them.
fn tell(node: &Node, facts: &Facts) {
    node.control.host_changed((*facts.host).clone());
    node.pods.set_links(facts.host.pod_links.clone());
    node.pods.set_cidrs(facts.directory.own.pod_cidrs.clone());
    node.pods.set_mtu(desired::device_mtu(facts, &node.config));
    let conflicts = desired::conflicts(facts);
    let text = |(pool, ip): &(ipnet::IpNet, std::net::IpAddr)| {
        format!(
            "{ip} of this host lies in {pool} of the mesh: neighbours in that network are cut off, give one of them \
             other addresses"
        )
    };
    node.alarms.set("prefix-conflict", conflicts.iter().map(text));
}
