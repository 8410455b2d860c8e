//! Routes of our own table: pools through the device, a twin of each that refuses, own pods.
//!
//! | destination | metric | goes to |
//! | --- | --- | --- |
//! | address of an attached pod | 0 | its link |
//! | pool of a cluster or of nodes | 100 | the TUN device |
//! | the same, and own pod CIDRs | 4,000,000 | nowhere: "unreachable" |
//!
//! The own pod CIDR is longer than its cluster's pool, so a packet to a pod that is gone is refused and never enters the
//! TUN device. When the device is gone the kernel drops its routes, and the twins remain.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;

use super::RouteState;
use crate::config::Config;
use crate::facts::Facts;

/// Metric of routes through the device.
const POOL_METRIC: u32 = 100;
/// Metric of what refuses: worse than anything a person would write.
pub(crate) const TWIN_METRIC: u32 = 4_000_000;
/// IPv4 and TCP header, without options.
const HEADERS_V4: u16 = 40;
/// IPv6 and TCP header, without options.
const HEADERS_V6: u16 = 60;

/// All routes of our table, sorted.
pub(super) fn routes(facts: &Facts, config: &Config, mtu: u16) -> Vec<RouteState> {
    let own = &facts.directory.own;
    let usable = |prefix: &IpNet| facts.host.has_ipv6 || prefix.addr().is_ipv4();
    let source = |prefix: &IpNet| own.addresses.iter().copied().find(|ip| ip.is_ipv4() == prefix.addr().is_ipv4());
    let through = |prefix: IpNet, link: &str, metric: u32| RouteState {
        prefix,
        metric,
        link: Some(link.to_owned()),
        source: source(&prefix),
        mtu: Some(mtu),
        advmss: Some(mtu - if prefix.addr().is_ipv4() { HEADERS_V4 } else { HEADERS_V6 }),
    };
    let mut routes = BTreeSet::new();
    let pools: Vec<IpNet> = facts.directory.pools.iter().map(|pool| pool.prefix.trunc()).filter(usable).collect();
    for pool in &pools {
        routes.insert(through(*pool, &config.device.name, POOL_METRIC));
        routes.insert(twin(*pool));
    }
    for cidr in own.pod_cidrs.iter().map(IpNet::trunc).filter(usable) {
        routes.insert(twin(cidr));
    }
    for lease in facts.pods.iter() {
        let link = lease.attachment.host_link();
        if facts.host.pod_links.contains(&link) {
            let addresses = lease.addresses.iter().map(|ip| IpNet::from(*ip)).filter(usable);
            routes.extend(addresses.map(|address| RouteState {
                mtu: None,
                advmss: None,
                ..through(address, &link, pod_metric(address.addr()))
            }));
        }
    }
    routes.into_iter().collect()
}

/// What refuses packets to a prefix when nothing better is there.
fn twin(prefix: IpNet) -> RouteState {
    RouteState { prefix, metric: TWIN_METRIC, link: None, source: None, mtu: None, advmss: None }
}

/// Metric of a pod's route, as `mesh-cni` leaves it: none, which IPv6 turns into 1024.
fn pod_metric(ip: IpAddr) -> u32 {
    if ip.is_ipv4() { 0 } else { 1024 }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use std::sync::Arc;

    use super::super::tests::{facts, lease};
    use super::*;

    fn lines(facts: &Facts) -> Vec<String> {
        let config = Config::default();
        let line = |route: &RouteState| {
            let link = route.link.as_deref().unwrap_or("unreachable");
            let source = route.source.map(|ip| format!(" src {ip}")).unwrap_or_default();
            let mtu = route.mtu.map(|mtu| format!(" mtu {mtu} advmss {}", route.advmss.unwrap())).unwrap_or_default();
            format!("{} {link} metric {}{source}{mtu}", route.prefix, route.metric)
        };
        routes(facts, &config, 1420).iter().map(line).collect()
    }

    #[test]
    fn every_pool_has_a_route_and_a_twin_and_own_pods_a_floor() {
        let lines = lines(&facts());
        for expected in [
            "10.1.0.0/16 mesh0 metric 100 src 100.100.0.1 mtu 1420 advmss 1380",
            "10.1.0.0/16 unreachable metric 4000000",
            "10.1.1.0/24 unreachable metric 4000000",
            "10.2.0.0/16 mesh0 metric 100 src 100.100.0.1 mtu 1420 advmss 1380",
            "10.2.0.0/16 unreachable metric 4000000",
            "100.100.0.0/16 mesh0 metric 100 src 100.100.0.1 mtu 1420 advmss 1380",
            "fd00:1::/80 mesh0 metric 100 src fd00:1::1 mtu 1420 advmss 1360",
            "fd00:1::/80 unreachable metric 4000000",
        ] {
            assert!(lines.iter().any(|line| line == expected), "{expected} missing in {lines:#?}");
        }
        assert_eq!(lines.len(), 9);
    }

    #[test]
    fn pods_are_routed_once_their_link_is_there() {
        let mut facts = facts();
        let lease = lease("a", "10.1.1.9");
        let link = lease.attachment.host_link();
        facts.pods = Arc::new(vec![lease]);
        assert!(!lines(&facts).iter().any(|line| line.contains("10.1.1.9")));
        Arc::make_mut(&mut facts.host).pod_links.push(link.clone());
        let expected = format!("10.1.1.9/32 {link} metric 0 src 100.100.0.1");
        assert!(lines(&facts).contains(&expected), "{:#?}", lines(&facts));
    }

    #[test]
    fn without_ipv6_there_is_none_of_it() {
        let mut facts = facts();
        Arc::make_mut(&mut facts.host).has_ipv6 = false;
        assert!(!lines(&facts).iter().any(|line| line.contains("::")));
    }
}
