//! Looks at the host: what of ours it has, and what it is like.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use mesh_hostnet::address::Address;
use mesh_hostnet::link::Link;
use mesh_hostnet::route::{MAIN_TABLE, Route, RouteFilter, RouteKind};
use mesh_hostnet::rule::RuleVerdict;
use mesh_hostnet::{Handle, Result};

use crate::desired::{FilterState, HostState, RouteState, nft_table};
use crate::facts::HostFacts;
use crate::reconcile::{Actual, ActualDevice};

/// What was seen in one look.
#[derive(Debug, Clone)]
pub(crate) struct Look {
    /// What of ours is there.
    pub(crate) actual: Actual,
    /// What the host is like.
    pub(crate) facts: HostFacts,
    /// Names and indexes of all links.
    pub(crate) links: BTreeMap<String, u32>,
}

/// The underlay as it was seen last. Finding the default routes means to read the main table, which holds a million routes
/// on some hosts: it is read again when links or addresses changed, and from time to time.
#[derive(Debug, Default)]
pub(crate) struct Underlay {
    links: Vec<Link>,
    addresses: Vec<Address>,
    mtu: u16,
    read: Option<Instant>,
}

/// How long the default routes are believed to be as they were.
const BELIEVED: Duration = Duration::from_secs(30);

/// Reads everything once. `known` is the filter this program put there last.
///
/// # Errors
/// The kernel's refusal.
pub(crate) fn look(
    handle: &mut Handle,
    desired: &HostState,
    known: Option<&FilterState>,
    underlay: &mut Underlay,
) -> Result<Look> {
    let links = handle.links()?;
    let addresses = handle.addresses()?;
    let names: BTreeMap<u32, &str> = links.iter().map(|link| (link.index, link.name.as_str())).collect();
    let filter = RouteFilter { table: Some(desired.names.table), protocol: Some(desired.names.route_protocol) };
    let routes = handle.routes(filter)?;
    let rules = handle.rules()?;
    let ours = |rule: &mesh_hostnet::rule::Rule| {
        rule.protocol == desired.names.route_protocol && rule.verdict == RuleVerdict::Lookup(desired.names.table)
    };
    let pod_links: BTreeSet<String> =
        links.iter().filter(|link| is_pod_link(link, desired)).map(|link| link.name.clone()).collect();
    let actual = Actual {
        device: links.iter().find(|link| link.name == desired.device.name).map(|link| device(link, &addresses)),
        routes: routes.iter().filter_map(|route| route_state(route, &names)).collect(),
        rules: rules.into_iter().filter(ours).collect(),
        filter: present_filter(handle, desired, known)?,
        pod_links: pod_links.clone(),
    };
    let facts = HostFacts {
        underlay_mtu: underlay.mtu(handle, &links, &addresses, desired)?,
        underlay_addresses: underlay_addresses(&links, &addresses, desired),
        pod_links: pod_links.into_iter().collect(),
        has_ipv6: has_ipv6(),
    };
    let links = links.into_iter().map(|link| (link.name, link.index)).collect();
    Ok(Look { actual, facts, links })
}

/// Whether this host has IPv6 and may use it on new links.
fn has_ipv6() -> bool {
    let all = mesh_hostnet::sysctl::Key::ipv6_link("all", "disable_ipv6");
    all.and_then(|key| mesh_hostnet::sysctl::read(&key)).is_ok_and(|value| value == "0")
}

/// The filter in the kernel, if it is the one put there last.
fn present_filter(
    handle: &mut Handle,
    desired: &HostState,
    known: Option<&FilterState>,
) -> Result<Option<FilterState>> {
    let Some(known) = known else { return Ok(None) };
    let state = HostState { filter: known.clone(), ..desired.clone() };
    Ok(handle.has_table(&nft_table(&state))?.then(|| known.clone()))
}

fn is_pod_link(link: &Link, desired: &HostState) -> bool {
    link.group == desired.names.pod_link_group && link.kind.as_deref() == Some("veth")
}

fn device(link: &Link, addresses: &[Address]) -> ActualDevice {
    let own = addresses.iter().filter(|address| address.link == link.index && !address.tentative);
    let lasting = own.filter(|address| !is_link_local(address.net.addr()));
    ActualDevice {
        index: link.index,
        up: link.up,
        mtu: link.mtu,
        addresses: lasting.map(|address| address.net).collect(),
    }
}

fn is_link_local(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    }
}

/// The kernel's route in our terms; `None` for kinds that we never make.
fn route_state(route: &Route, names: &BTreeMap<u32, &str>) -> Option<RouteState> {
    let link = match route.kind {
        RouteKind::Unreachable => None,
        RouteKind::Unicast if route.gateway.is_none() => {
            Some(route.link.and_then(|index| names.get(&index)).map_or_else(|| "?".into(), |name| (*name).to_owned()))
        }
        _ => return None,
    };
    let narrow = |value: Option<u32>| value.map(|value| u16::try_from(value).unwrap_or(u16::MAX));
    Some(RouteState {
        prefix: route.destination,
        metric: route.metric,
        link,
        source: route.preferred_source,
        mtu: narrow(route.mtu),
        advmss: narrow(route.advmss),
    })
}

/// Links that may lead to the underlay: up, and neither ours nor a loopback.
fn is_underlay(link: &Link, desired: &HostState) -> bool {
    link.up && !link.loopback && link.name != desired.device.name && !is_pod_link(link, desired)
}

impl Underlay {
    fn mtu(&mut self, handle: &mut Handle, links: &[Link], addresses: &[Address], desired: &HostState) -> Result<u16> {
        let underlay: Vec<Link> = links.iter().filter(|link| is_underlay(link, desired)).cloned().collect();
        let on_it = |address: &&Address| underlay.iter().any(|link| link.index == address.link);
        let addresses: Vec<Address> = addresses.iter().filter(on_it).cloned().collect();
        let believed = self.read.is_some_and(|read| read.elapsed() < BELIEVED);
        if !believed || (&self.links, &self.addresses) != (&underlay, &addresses) {
            self.mtu = underlay_mtu(handle, &underlay, &addresses)?;
            (self.links, self.addresses, self.read) = (underlay, addresses, Some(Instant::now()));
        }
        Ok(self.mtu)
    }

    /// A default route came or went.
    pub(super) fn doubt(&mut self) {
        self.read = None;
    }
}

/// Smallest MTU of the links with a default route; of those with an address when none has one. 0 if there is neither.
fn underlay_mtu(handle: &mut Handle, links: &[Link], addresses: &[Address]) -> Result<u16> {
    let default_routes = handle.routes(RouteFilter { table: Some(MAIN_TABLE), protocol: None })?;
    let leads: BTreeSet<u32> = default_routes
        .iter()
        .filter(|route| route.destination.prefix_len() == 0 && route.kind == RouteKind::Unicast)
        .filter_map(|route| route.link)
        .collect();
    let with_address: BTreeSet<u32> =
        addresses.iter().filter(|address| !is_link_local(address.net.addr())).map(|address| address.link).collect();
    let smallest = |among: &BTreeSet<u32>| {
        let mtus = links.iter().filter(|link| among.contains(&link.index));
        mtus.map(|link| u16::try_from(link.mtu).unwrap_or(u16::MAX)).min()
    };
    Ok(smallest(&leads).or_else(|| smallest(&with_address)).unwrap_or(0))
}

/// Addresses others may reach this host by.
fn underlay_addresses(links: &[Link], addresses: &[Address], desired: &HostState) -> Vec<IpAddr> {
    let leads: BTreeSet<u32> = links.iter().filter(|link| is_underlay(link, desired)).map(|link| link.index).collect();
    let usable = |net: &IpNet| !is_link_local(net.addr()) && !net.addr().is_loopback();
    let all: BTreeSet<IpAddr> = addresses
        .iter()
        .filter(|address| leads.contains(&address.link) && usable(&address.net) && !address.tentative)
        .map(|address| address.net.addr())
        .filter(|ip| !desired.device.addresses.contains(ip))
        .collect();
    all.into_iter().collect()
}
