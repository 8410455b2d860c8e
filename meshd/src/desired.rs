//! Pure: from facts to what the data plane and the host should look like. Same facts, same answer.
//!
//! ```text
//! Facts ─┬─ table    keys, peers, allowed IPs      ─> data plane
//!        └─ host ─┬─ routes   pools, twins, pods   ─> routing table
//!                 ├─ filter   what may cross the wire ─> nftables
//!                 └─ settings                      ─> sysctl
//! ```

mod filter;
mod mtu;
mod routes;
mod settings;
mod table;

use std::net::IpAddr;
use std::ops::RangeInclusive;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

pub(crate) use filter::nft_table;
pub(crate) use mtu::inner_mtu;
pub(crate) use settings::{Setting, legacy_ipv6, settings};
pub(crate) use table::{Refused, checked_table, lanes, table_spec};

use crate::config::Config;
use crate::facts::Facts;

/// What the host's network should look like: plain, by names instead of kernel numbers, kept on disk for the guard.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct HostState {
    /// The TUN device.
    pub(crate) device: DeviceState,
    /// Numbers and names that are ours.
    pub(crate) names: Names,
    /// Whether the host has IPv6.
    pub(crate) has_ipv6: bool,
    /// Routes of our table, sorted.
    pub(crate) routes: Vec<RouteState>,
    /// What may cross the wire.
    pub(crate) filter: FilterState,
}

/// The TUN device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct DeviceState {
    /// Its name.
    pub(crate) name: String,
    /// Its MTU in bytes, the largest inner packet.
    pub(crate) mtu: u16,
    /// The node's addresses in the mesh.
    pub(crate) addresses: Vec<IpAddr>,
}

/// Numbers and names by which our objects are told from others'.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Names {
    /// Routing table.
    pub(crate) table: u32,
    /// Preference of the ip rules.
    pub(crate) rule_preference: u32,
    /// Protocol of routes and rules.
    pub(crate) route_protocol: u8,
    /// Firewall mark that the rule passes over.
    pub(crate) mark: u32,
    /// Its mask.
    pub(crate) mark_mask: u32,
    /// Group of pod links.
    pub(crate) pod_link_group: u32,
    /// nftables table.
    pub(crate) nftables_table: String,
}

/// One route of our table.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub(crate) struct RouteState {
    /// Where to.
    pub(crate) prefix: IpNet,
    /// Smaller is better.
    pub(crate) metric: u32,
    /// The link it goes out of; `None` answers "unreachable".
    pub(crate) link: Option<String>,
    /// Source address for packets of this host.
    pub(crate) source: Option<IpAddr>,
    /// Path MTU in bytes.
    pub(crate) mtu: Option<u16>,
    /// TCP segment size announced, in bytes.
    pub(crate) advmss: Option<u16>,
}

/// What nftables should judge, as values.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct FilterState {
    /// UDP ports of our lanes.
    pub(crate) ports: (u16, u16),
    /// What must never cross the wire in clear text: all pools.
    pub(crate) remote: Vec<IpNet>,
    /// Our own: mesh addresses and pod CIDRs.
    pub(crate) own: Vec<IpNet>,
    /// Our addresses in the mesh, for packets with a foreign source.
    pub(crate) addresses: Vec<IpAddr>,
    /// Our addresses on the underlay, where datagrams arrive.
    pub(crate) underlay: Vec<IpAddr>,
    /// Addresses of nodes in the mesh: who may talk to this node itself inside a tunnel.
    #[serde(default)]
    pub(crate) nodes: Vec<IpNet>,
    /// Pod links and the addresses each may send from.
    pub(crate) pods: Vec<(String, Vec<IpAddr>)>,
}

impl Names {
    /// As configured.
    pub(crate) fn of(config: &Config) -> Self {
        let host = &config.host;
        Self {
            table: host.table,
            rule_preference: host.rule_preference,
            route_protocol: host.route_protocol,
            mark: host.mark,
            mark_mask: host.mark_mask,
            pod_link_group: host.pod_link_group,
            nftables_table: host.nftables_table.clone(),
        }
    }
}

/// What the host should look like.
pub(crate) fn host_state(facts: &Facts, config: &Config) -> HostState {
    let mtu = device_mtu(facts, config);
    let has_ipv6 = facts.host.has_ipv6;
    let usable = |ip: &IpAddr| has_ipv6 || ip.is_ipv4();
    let mut addresses: Vec<IpAddr> = facts.directory.own.addresses.iter().copied().filter(usable).collect();
    addresses.sort_unstable();
    HostState {
        device: DeviceState { name: config.device.name.clone(), mtu, addresses: addresses.clone() },
        names: Names::of(config),
        has_ipv6,
        routes: routes::routes(facts, config, mtu),
        filter: filter::filter(facts, addresses, config.ports()),
    }
}

/// A host without anything of ours but the names it would have.
pub(crate) fn bare(config: &Config) -> HostState {
    let ports = config.ports();
    HostState {
        device: DeviceState { name: config.device.name.clone(), mtu: inner_mtu(0), addresses: Vec::new() },
        names: Names::of(config),
        has_ipv6: false,
        routes: Vec::new(),
        filter: FilterState {
            ports: (*ports.start(), *ports.end()),
            remote: Vec::new(),
            own: Vec::new(),
            addresses: Vec::new(),
            underlay: Vec::new(),
            nodes: Vec::new(),
            pods: Vec::new(),
        },
    }
}

/// Inner MTU: as configured, else what the underlay leaves.
pub(crate) fn device_mtu(facts: &Facts, config: &Config) -> u16 {
    config.device.mtu.unwrap_or_else(|| inner_mtu(facts.host.underlay_mtu))
}

/// Pools that hold an address this host has on the underlay: `(pool, address)`. They stay closed to clear text, so the
/// host's neighbours there are cut off: somebody has to renumber.
pub(crate) fn conflicts(facts: &Facts) -> Vec<(IpNet, IpAddr)> {
    let pools = facts.directory.pools.iter().map(|pool| pool.prefix);
    pools
        .flat_map(|pool| facts.host.underlay_addresses.iter().map(move |ip| (pool, *ip)))
        .filter(|(pool, ip)| pool.contains(ip))
        .collect()
}

impl FilterState {
    /// UDP ports of our lanes.
    pub(crate) fn port_range(&self) -> RangeInclusive<u16> {
        self.ports.0..=self.ports.1
    }
}

#[cfg(test)]
pub(crate) mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use std::sync::Arc;

    use mesh_protocol::id::{MeshId, NodeId, Position};
    use mesh_protocol::key::{KemPublic, TunnelSecret};
    use mesh_protocol::local::{Attachment, Lease};

    use super::*;
    use crate::facts::{DirectoryFacts, HostFacts, OwnGrant, OwnKeys, PeerFacts, Pool};

    /// A node of east with one peer in west.
    pub(crate) fn facts() -> Facts {
        let pools = [
            (Some("east"), "10.1.0.0/16"),
            (Some("west"), "10.2.0.0/16"),
            (None, "100.100.0.0/16"),
            (None, "fd00:1::/80"),
        ];
        let directory = DirectoryFacts {
            mesh: MeshId([1; 32]),
            mesh_name: "prod".parse().unwrap(),
            policy_version: 1,
            position: Position { epoch: 1, revision: 1 },
            own: OwnGrant {
                node: NodeId([2; 32]),
                name: "n1".parse().unwrap(),
                cluster: "east".parse().unwrap(),
                addresses: vec!["100.100.0.1".parse().unwrap(), "fd00:1::1".parse().unwrap()],
                pod_cidrs: vec!["10.1.1.0/24".parse().unwrap()],
            },
            pools: pools
                .map(|(cluster, prefix)| Pool {
                    cluster: cluster.map(|name| name.parse().unwrap()),
                    prefix: prefix.parse().unwrap(),
                })
                .to_vec(),
            peers: vec![peer(7)],
            exposed: false,
        };
        let keys = OwnKeys {
            seq: 2,
            current: (2, TunnelSecret::from_bytes([2; 32])),
            previous: Some((1, TunnelSecret::from_bytes([1; 32]))),
            spare_epoch: 3,
            promoted: 0,
            kem: Vec::new(),
        };
        let host = HostFacts {
            underlay_mtu: 1500,
            underlay_addresses: vec!["192.0.2.1".parse().unwrap()],
            pod_links: Vec::new(),
            has_ipv6: true,
        };
        Facts { directory: Arc::new(directory), keys: Arc::new(keys), pods: Arc::new(Vec::new()), host: Arc::new(host) }
    }

    /// A peer of west, different in everything for each number.
    pub(crate) fn peer(number: u8) -> PeerFacts {
        let key = |n: u8| TunnelSecret::from_bytes([n; 32]).public();
        PeerFacts {
            node: NodeId([number; 32]),
            number: number.into(),
            name: format!("w{number}").parse().unwrap(),
            cluster: "west".parse().unwrap(),
            addresses: vec![
                format!("100.100.1.{number}").parse().unwrap(),
                format!("fd00:1::1:{number}").parse().unwrap(),
            ],
            pod_cidrs: vec![format!("10.2.{number}.0/24").parse().unwrap()],
            seq: 1,
            current: (4, key(number)),
            previous: Some((3, key(number + 60))),
            spare: (5, key(number + 120)),
            candidates: vec![format!("192.0.2.{number}:7100").parse().unwrap()],
            lanes: 1,
            kem: (1, KemPublic::from_bytes(&[number; 1184]).unwrap()),
            post_quantum: false,
        }
    }

    /// A pod with an address.
    pub(crate) fn lease(container: &str, ip: &str) -> Lease {
        Lease {
            attachment: Attachment { container: container.into(), interface: "eth0".into() },
            pod: None,
            addresses: vec![ip.parse().unwrap()],
            mtu: 1420,
            link_group: 7100,
            table: 7100,
            route_protocol: 71,
        }
    }

    #[test]
    fn same_facts_same_answer_and_it_survives_the_disk() {
        let mut facts = facts();
        facts.pods = Arc::new(vec![lease("a", "10.1.1.9")]);
        let state = host_state(&facts, &Config::default());
        assert_eq!(state, host_state(&facts, &Config::default()));
        let json = serde_json::to_vec(&state).unwrap();
        assert_eq!(serde_json::from_slice::<HostState>(&json).unwrap(), state);
        assert_eq!(state.device.mtu, 1420);
    }

    #[test]
    fn underlay_address_in_a_pool_is_a_conflict() {
        let mut facts = facts();
        assert!(conflicts(&facts).is_empty());
        Arc::make_mut(&mut facts.host).underlay_addresses.push("10.2.9.9".parse().unwrap());
        assert_eq!(conflicts(&facts), [("10.2.0.0/16".parse().unwrap(), "10.2.9.9".parse().unwrap())]);
    }
}
