//! Takes everything of ours off the host, and nothing else.

use mesh_hostnet::nft::Family;
use mesh_hostnet::route::RouteFilter;
use mesh_hostnet::rule::RuleVerdict;
use mesh_hostnet::{Handle, Result};
use tracing::info;

use crate::desired::Names;

/// Removes device, pod links, routes, rules and the nftables table; goes on after errors and says what was refused.
///
/// What leads somewhere goes first and what refuses last. Ours are: the link of that name if it is a TUN device; veth links
/// of our group named `mesh…`; routes of our table *and* protocol; rules of our protocol that lead to our table; the table
/// `inet` of our name.
pub(super) fn clear(handle: &mut Handle, names: &Names, device: &str) -> Vec<String> {
    let mut refused = Vec::new();
    let mut note = |what: &str, result: Result<()>| {
        refused.extend(result.err().map(|error| format!("{what}: {error}")));
    };
    note("remove links", remove_links(handle, names, device));
    note("remove routes", remove_routes(handle, names));
    note("remove ip rules", remove_rules(handle, names));
    note("remove nftables table", handle.delete_table(Family::Inet, &names.nftables_table));
    info!(failed = refused.len(), "host network cleared");
    refused
}

/// Removes what an earlier configuration had under other names.
pub(super) fn clear_renamed(handle: &mut Handle, old: (&Names, &str), new: (&Names, &str)) -> Vec<String> {
    let mut refused = Vec::new();
    let mut note = |result: Result<()>| refused.extend(result.err().map(|error| error.to_string()));
    let (old_names, new_names) = (old.0, new.0);
    if old.1 != new.1 {
        note(remove_device(handle, old.1));
    }
    if (old_names.table, old_names.route_protocol) != (new_names.table, new_names.route_protocol) {
        note(remove_rules(handle, old_names));
        note(remove_routes(handle, old_names));
    }
    if old_names.nftables_table != new_names.nftables_table {
        note(handle.delete_table(Family::Inet, &old_names.nftables_table));
    }
    refused
}

fn remove_device(handle: &mut Handle, device: &str) -> Result<()> {
    match handle.link_by_name(device)? {
        Some(link) if link.kind.as_deref() == Some("tun") => handle.delete_link(link.index),
        _ => Ok(()),
    }
}

fn remove_links(handle: &mut Handle, names: &Names, device: &str) -> Result<()> {
    remove_device(handle, device)?;
    for link in handle.links()? {
        let of_a_pod = link.group == names.pod_link_group
            && link.kind.as_deref() == Some("veth")
            && link.name.strip_prefix("mesh").is_some_and(|rest| rest.bytes().all(|byte| byte.is_ascii_hexdigit()));
        if of_a_pod {
            handle.delete_link(link.index)?;
        }
    }
    Ok(())
}

fn remove_routes(handle: &mut Handle, names: &Names) -> Result<()> {
    let mut routes = handle.routes(RouteFilter { table: Some(names.table), protocol: Some(names.route_protocol) })?;
    // What leads somewhere before what refuses.
    routes.sort_by_key(|route| route.link.is_none());
    routes.iter().try_for_each(|route| handle.delete_route(route))
}

fn remove_rules(handle: &mut Handle, names: &Names) -> Result<()> {
    let ours = |rule: &mesh_hostnet::rule::Rule| {
        rule.protocol == names.route_protocol && rule.verdict == RuleVerdict::Lookup(names.table)
    };
    let rules = handle.rules()?;
    rules.iter().filter(|rule| ours(rule)).try_for_each(|rule| handle.delete_rule(rule))
}
