//! Which node owns which prefix. Prefixes of different nodes are disjoint, so an ordered map finds overlaps at once.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr};

use ipnet::IpNet;

use crate::id::NodeId;

/// Sorted by family, then by first address. Disjoint, because [`super::View`] asks [`Self::overlapping`] first.
#[derive(Debug, Clone, Default)]
pub(super) struct PrefixOwners(BTreeMap<(bool, u128), (IpNet, NodeId)>);

impl PrefixOwners {
    pub(super) fn insert(&mut self, node: NodeId, prefixes: impl Iterator<Item = IpNet>) {
        self.0.extend(prefixes.map(|prefix| (start(prefix), (prefix, node))));
    }

    pub(super) fn remove(&mut self, node: NodeId, prefixes: impl Iterator<Item = IpNet>) {
        for prefix in prefixes {
            if self.0.get(&start(prefix)).is_some_and(|(_, owner)| *owner == node) {
                self.0.remove(&start(prefix));
            }
        }
    }

    /// Prefixes that share an address with `prefix`, and their owners.
    pub(super) fn overlapping(&self, prefix: IpNet) -> impl Iterator<Item = (IpNet, NodeId)> + '_ {
        let (family, first) = start(prefix);
        let last = (family, number(prefix.broadcast()));
        let around = self.0.range(..(family, first)).next_back();
        let inside = self.0.range((family, first)..=last);
        let overlaps = move |(held, _): &&(IpNet, NodeId)| super::grant::overlap(*held, prefix);
        around.map(|(_, held)| held).into_iter().chain(inside.map(|(_, held)| held)).filter(overlaps).copied()
    }
}

fn start(prefix: IpNet) -> (bool, u128) {
    (matches!(prefix, IpNet::V6(_)), number(prefix.network()))
}

fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => u128::from(address.to_bits()),
        IpAddr::V6(address) => Ipv6Addr::to_bits(address),
    }
}
