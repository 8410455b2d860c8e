//! nftables: what may cross the wire in clear text, and with which source.
//!
//! ```text
//! arrives   prerouting -300   to the port where nodes talk: only by the device, and only from nodes
//!                             from a pod's link: only its own addresses
//!                             to our UDP ports: marked, not tracked
//!                             source in a pool, by any other link than the device: dropped
//! leaves    output     -300   our datagrams, also those to nodes inside the tunnels: not tracked
//!           postrouting  90   to the device: source pinned if it is ours, else translated to the node's address
//!           postrouting 200   destination in a pool, by any other link than the device: dropped
//! ```
//!
//! Drops sit where the packet's link is certain and no other program's verdict comes after: a rule in `forward` would hit
//! translated traffic, and in `output` the link is stale after translation of the destination.

use std::net::IpAddr;
use std::ops::RangeInclusive;

use ipnet::IpNet;
use mesh_hostnet::nft::{Addresses, Chain, ChainKind, Family, HookPoint, IpVersion, Is, Rule, Set, Side, Table};
use mesh_protocol::peer::PORT;

use super::{FilterState, HostState, Names};
use crate::facts::Facts;

/// Before connection tracking, which is at -200.
const RAW: i32 = -300;
/// Before other programs translate the source, at 100.
const PIN: i32 = 90;
/// After every translation.
const LAST: i32 = 200;

/// What nftables should judge. `addresses` are the node's own in the mesh.
pub(super) fn filter(facts: &Facts, addresses: Vec<IpAddr>, ports: RangeInclusive<u16>) -> FilterState {
    let directory = &facts.directory;
    let mut remote: Vec<IpNet> = directory.pools.iter().map(|pool| pool.prefix.trunc()).collect();
    remote.sort_unstable();
    remote.dedup();
    let own_addresses = directory.own.addresses.iter().map(|ip| IpNet::from(*ip));
    let mut own: Vec<IpNet> = own_addresses.chain(directory.own.pod_cidrs.iter().map(IpNet::trunc)).collect();
    own.sort_unstable();
    let mut pods: Vec<(String, Vec<IpAddr>)> =
        facts.pods.iter().map(|lease| (lease.attachment.host_link(), lease.addresses.clone())).collect();
    pods.sort_unstable();
    let mut underlay = facts.host.underlay_addresses.clone();
    underlay.sort_unstable();
    let nodes = directory.pools.iter().filter(|pool| pool.cluster.is_none()).map(|pool| pool.prefix.trunc());
    let mut nodes: Vec<IpNet> = nodes.collect();
    nodes.sort_unstable();
    FilterState { ports: (*ports.start(), *ports.end()), remote, own, addresses, underlay, nodes, pods }
}

/// The table for the kernel.
pub(crate) fn nft_table(state: &HostState) -> Table {
    let (filter, names, device) = (&state.filter, &state.names, state.device.name.as_str());
    let mut table = Table::new(Family::Inet, names.nftables_table.as_str());
    let underlay = filter.underlay.iter().map(|ip| IpNet::from(*ip));
    table.sets = vec![
        Set::v4("remote4", filter.remote.iter().copied()),
        Set::v6("remote6", filter.remote.iter().copied()),
        Set::v4("own4", filter.own.iter().copied()),
        Set::v6("own6", filter.own.iter().copied()),
        Set::v4("underlay4", underlay.clone()),
        Set::v6("underlay6", underlay),
        Set::v4("nodes4", filter.nodes.iter().copied()),
    ];
    table.chains = vec![
        pod_source(filter),
        arriving(filter, names, device),
        Chain::hooked("untracked", ChainKind::Filter, HookPoint::Output, RAW)
            .rule(
                Rule::new()
                    .udp_port(Side::Source, filter.port_range())
                    .mark(Is::Equal, names.mark, names.mark_mask)
                    .no_track()
                    .comment("our datagrams"),
            )
            .rule(
                Rule::new()
                    .output_link(Is::Equal, device)
                    .udp_port(Side::Source, PORT..=PORT)
                    .no_track()
                    .comment("between nodes"),
            ),
        pinning(filter, device),
        leaving(names, device),
    ];
    table
}

/// What each pod may send from; everything else on a pod link is dropped.
fn pod_source(filter: &FilterState) -> Chain {
    let mut chain = Chain { name: "pod_source".into(), hook: None, rules: Vec::new() };
    for (link, addresses) in &filter.pods {
        for ip in addresses {
            let own = Addresses::Prefix(IpNet::from(*ip));
            chain = chain
                .rule(Rule::new().input_link(Is::Equal, link.as_str()).address(Side::Source, Is::Equal, own).return_());
        }
    }
    chain.rule(Rule::new().counter().drop().comment("forged source of a pod"))
}

fn arriving(filter: &FilterState, names: &Names, device: &str) -> Chain {
    let ours = |set: Addresses| {
        // Only what ends on this host: a packet that passes through to such a port elsewhere gets no exemption.
        Rule::new()
            .udp_port(Side::Destination, filter.port_range())
            .address(Side::Destination, Is::Equal, set)
            .set_mark(names.mark, names.mark_mask)
            .no_track()
            .accept()
            .comment("datagrams to our ports")
    };
    let forged = |set: Addresses| {
        Rule::new().address(Side::Source, Is::Equal, set).counter().drop().comment("clear text from the wire")
    };
    // Nodes talk there, and nobody else: no pod, here or elsewhere, and nobody on the underlay.
    let exchange = || Rule::new().udp_port(Side::Destination, PORT..=PORT);
    let nodes = |side| exchange().address(side, Is::Equal, Addresses::V4Set("nodes4".into()));
    Chain::hooked("arriving", ChainKind::Filter, HookPoint::Prerouting, RAW)
        .rule(Rule::new().input_link(Is::Equal, "lo").accept())
        .rule(nodes(Side::Source).input_link(Is::Equal, device).no_track().accept())
        .rule(nodes(Side::Destination).counter().drop().comment("no node speaks there"))
        .rule(Rule::new().input_link(Is::Equal, device).accept())
        .rule(Rule::new().input_group(Is::Equal, names.pod_link_group).jump("pod_source"))
        .rule(Rule::new().input_group(Is::Equal, names.pod_link_group).accept())
        .rule(ours(Addresses::V4Set("underlay4".into())))
        .rule(ours(Addresses::V6Set("underlay6".into())))
        .rule(forged(Addresses::V4Set("remote4".into())))
        .rule(forged(Addresses::V6Set("remote6".into())))
}

/// Pins our own sources against masquerading, and gives the node's address to what has a foreign one.
fn pinning(filter: &FilterState, device: &str) -> Chain {
    let to_device = || Rule::new().output_link(Is::Equal, device);
    let pin = |set: Addresses, version| to_device().address(Side::Source, Is::Equal, set).keep_source(version);
    let chain = Chain::hooked("source", ChainKind::Nat, HookPoint::Postrouting, PIN)
        .rule(pin(Addresses::V4Set("own4".into()), IpVersion::V4))
        .rule(pin(Addresses::V6Set("own6".into()), IpVersion::V6));
    filter.addresses.iter().fold(chain, |chain, ip| chain.rule(to_device().source_to(*ip)))
}

fn leaving(names: &Names, device: &str) -> Chain {
    let clear = |set: Addresses| {
        Rule::new().address(Side::Destination, Is::Equal, set).counter().drop().comment("clear text to the wire")
    };
    Chain::hooked("leaving", ChainKind::Filter, HookPoint::Postrouting, LAST)
        .rule(Rule::new().output_link(Is::Equal, "lo").accept())
        .rule(Rule::new().output_link(Is::Equal, device).accept())
        .rule(Rule::new().output_group(Is::Equal, names.pod_link_group).accept())
        .rule(Rule::new().mark(Is::Equal, names.mark, names.mark_mask).accept().comment("sockets of meshd"))
        .rule(clear(Addresses::V4Set("remote4".into())))
        .rule(clear(Addresses::V6Set("remote6".into())))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use std::sync::Arc;

    use super::super::host_state;
    use super::super::tests::{facts, lease};
    use super::*;
    use crate::config::Config;

    #[test]
    fn every_pool_is_in_the_sets_the_own_cluster_too() {
        let table = nft_table(&host_state(&facts(), &Config::default()));
        let remote = &table.sets[0];
        let expected = ["10.1.0.0/16", "10.2.0.0/16", "100.100.0.0/16"].map(|text| text.parse().unwrap());
        assert_eq!(*remote, Set::v4("remote4", expected));
        assert_eq!(table.chains.len(), 5);
    }

    #[test]
    fn the_port_between_nodes_is_closed_before_pods_are_looked_at() {
        let table = nft_table(&host_state(&facts(), &Config::default()));
        let arriving = table.chains.iter().find(|chain| chain.name == "arriving").unwrap();
        let at = |text: &str| arriving.rules.iter().position(|rule| format!("{rule:?}").contains(text)).unwrap();
        assert!(at("no node speaks there") < at("pod_source"));
        let nodes = table.sets.iter().find(|set| set.name == "nodes4").unwrap();
        assert_eq!(*nodes, Set::v4("nodes4", ["100.100.0.0/16".parse().unwrap()]));
    }

    #[test]
    fn a_pod_is_let_in_when_it_has_a_lease_before_its_link_is_there() {
        let mut facts = facts();
        let lease = lease("a", "10.1.1.9");
        let link = lease.attachment.host_link();
        let before = nft_table(&host_state(&facts, &Config::default()));
        facts.pods = Arc::new(vec![lease]);
        let after = nft_table(&host_state(&facts, &Config::default()));
        assert_eq!(after.rule_count(), before.rule_count() + 1);
        assert_ne!(after.fingerprint(), before.fingerprint());
        let rule = &after.chains[0].rules[0];
        assert!(format!("{rule:?}").contains(&link), "{rule:?}");
        assert!(before.chains[0].rules[0].terms.contains(&mesh_hostnet::nft::Term::Drop), "strangers stay out");
    }
}
