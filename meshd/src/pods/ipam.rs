//! Which pod has which address: plain values, no disk, no clock.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use mesh_protocol::UnixSeconds;
use mesh_protocol::local::Attachment;
use serde::{Deserialize, Serialize};

/// Addresses at the start of a pod CIDR that are never handed out: the network's own (and IPv6's anycast to routers), and
/// the one people take for a gateway.
const RESERVED: u128 = 2;

/// What one pod interface has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Entry {
    /// Who.
    pub(super) attachment: Attachment,
    /// `namespace/name`, for people.
    pub(super) pod: Option<String>,
    /// One address of each family.
    pub(super) addresses: Vec<IpAddr>,
    /// When it was handed out, by the wall clock.
    pub(super) since: UnixSeconds,
}

/// All leases of this node.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Ipam {
    #[serde(with = "entries")]
    leases: BTreeMap<Attachment, Entry>,
    /// Where the search goes on in each pod CIDR, so that a freed address comes round last.
    cursors: BTreeMap<IpNet, u128>,
    #[serde(skip)]
    used: BTreeSet<IpAddr>,
}

/// No address can be handed out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum IpamError {
    /// This node was granted none.
    #[error("this node has no pod CIDR: it was not granted one")]
    NoPodCidr,
    /// All are in use.
    #[error("pool exhausted: all addresses of {0} are in use")]
    Exhausted(IpNet),
}

impl Ipam {
    /// The lease of an attachment; a new one if it has none.
    ///
    /// # Errors
    /// [`IpamError`]; nothing is handed out then.
    pub(super) fn attach(
        &mut self,
        attachment: &Attachment,
        pod: Option<&str>,
        cidrs: &[IpNet],
        now: UnixSeconds,
    ) -> Result<&Entry, IpamError> {
        if !self.leases.contains_key(attachment) {
            let addresses = self.choose(cidrs)?;
            for (cidr, ip) in &addresses {
                self.cursors.insert(*cidr, offset(*cidr, *ip));
                self.used.insert(*ip);
            }
            let addresses = addresses.into_iter().map(|(_, ip)| ip).collect();
            let entry = Entry { attachment: attachment.clone(), pod: pod.map(str::to_owned), addresses, since: now };
            self.leases.insert(attachment.clone(), entry);
        }
        Ok(&self.leases[attachment])
    }

    /// Takes the lease away; false if there was none.
    pub(super) fn detach(&mut self, attachment: &Attachment) -> bool {
        let Some(entry) = self.leases.remove(attachment) else { return false };
        for ip in entry.addresses {
            self.used.remove(&ip);
        }
        true
    }

    /// The lease of an attachment.
    pub(super) fn lease(&self, attachment: &Attachment) -> Option<&Entry> {
        self.leases.get(attachment)
    }

    /// All leases.
    pub(super) fn leases(&self) -> impl Iterator<Item = &Entry> {
        self.leases.values()
    }

    /// Finds the used addresses again after reading from disk; drops entries that claim what another one has.
    pub(super) fn index(&mut self) {
        let mut used = BTreeSet::new();
        self.leases.retain(|_, entry| {
            let free = entry.addresses.iter().all(|ip| !used.contains(ip));
            if free {
                used.extend(entry.addresses.iter().copied());
            }
            free
        });
        self.used = used;
    }

    /// Whether an address of each family could be handed out now.
    ///
    /// # Errors
    /// [`IpamError`].
    pub(super) fn check_room(&self, cidrs: &[IpNet]) -> Result<(), IpamError> {
        self.choose(cidrs).map(drop)
    }

    /// A free address of each family that `cidrs` has, from the first pod CIDR with one.
    fn choose(&self, cidrs: &[IpNet]) -> Result<Vec<(IpNet, IpAddr)>, IpamError> {
        let mut chosen = Vec::new();
        for v4 in [true, false] {
            let mut full = None;
            let of_family = cidrs.iter().filter(|cidr| cidr.addr().is_ipv4() == v4);
            let found = of_family.map(IpNet::trunc).find_map(|cidr| {
                full.get_or_insert(cidr);
                self.free_in(cidr).map(|ip| (cidr, ip))
            });
            match (found, full) {
                (Some(found), _) => chosen.push(found),
                (None, Some(cidr)) => return Err(IpamError::Exhausted(cidr)),
                (None, None) => {}
            }
        }
        if chosen.is_empty() { Err(IpamError::NoPodCidr) } else { Ok(chosen) }
    }

    /// The next free address after the one handed out last, wrapping round.
    fn free_in(&self, cidr: IpNet) -> Option<IpAddr> {
        let (first, last) = range(cidr)?;
        let start = self.cursors.get(&cidr).map_or(first, |cursor| cursor + 1);
        let start = if (first..=last).contains(&start) { start } else { first };
        let candidates = (start..=last).chain(first..start);
        // Of so many in a row one is free.
        candidates.take(self.used.len() + 1).map(|offset| address(cidr, offset)).find(|ip| !self.used.contains(ip))
    }
}

/// First and last offset that may be handed out.
fn range(cidr: IpNet) -> Option<(u128, u128)> {
    let host_bits = u32::from(cidr.max_prefix_len() - cidr.prefix_len());
    let size = 1_u128.checked_shl(host_bits).unwrap_or(u128::MAX);
    // The last IPv4 address is the broadcast address.
    let after = if cidr.addr().is_ipv4() { size.checked_sub(1)? } else { size };
    (after > RESERVED).then(|| (RESERVED, after - 1))
}

fn address(cidr: IpNet, offset: u128) -> IpAddr {
    match cidr.network() {
        IpAddr::V4(ip) => Ipv4Addr::from(u32::from(ip).wrapping_add(offset as u32)).into(),
        IpAddr::V6(ip) => Ipv6Addr::from(u128::from(ip).wrapping_add(offset)).into(),
    }
}

fn offset(cidr: IpNet, ip: IpAddr) -> u128 {
    match (cidr.network(), ip) {
        (IpAddr::V4(network), IpAddr::V4(ip)) => u32::from(ip).wrapping_sub(u32::from(network)).into(),
        (IpAddr::V6(network), IpAddr::V6(ip)) => u128::from(ip).wrapping_sub(u128::from(network)),
        _ => 0,
    }
}

/// JSON has no maps with structures as keys: a list instead.
mod entries {
    use std::collections::BTreeMap;

    use mesh_protocol::local::Attachment;
    use serde::{Deserialize, Deserializer, Serializer};

    use super::Entry;

    pub(super) fn serialize<S: Serializer>(
        leases: &BTreeMap<Attachment, Entry>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(leases.values())
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<BTreeMap<Attachment, Entry>, D::Error> {
        let entries = Vec::<Entry>::deserialize(deserializer)?;
        Ok(entries.into_iter().map(|entry| (entry.attachment.clone(), entry)).collect())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use proptest::prelude::*;

    use super::*;

    fn who(number: u16) -> Attachment {
        Attachment { container: format!("c{number}"), interface: "eth0".into() }
    }

    fn cidrs(texts: &[&str]) -> Vec<IpNet> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn first_addresses_and_the_broadcast_address_stay_free() {
        let cidrs = cidrs(&["10.1.1.0/29", "fd00::/125"]);
        let mut ipam = Ipam::default();
        let mut seen = Vec::new();
        for number in 0..5 {
            seen.push(ipam.attach(&who(number), None, &cidrs, 0).unwrap().addresses[0].to_string());
        }
        assert_eq!(seen, ["10.1.1.2", "10.1.1.3", "10.1.1.4", "10.1.1.5", "10.1.1.6"]);
        let error = ipam.attach(&who(9), None, &cidrs, 0).unwrap_err();
        assert_eq!(error, IpamError::Exhausted(cidrs[0]));
        assert!(ipam.detach(&who(2)));
        assert_eq!(ipam.attach(&who(9), None, &cidrs, 0).unwrap().addresses[0].to_string(), "10.1.1.4");
    }

    #[test]
    fn a_freed_address_comes_round_last() {
        let cidrs = cidrs(&["10.1.1.0/24"]);
        let mut ipam = Ipam::default();
        let first = ipam.attach(&who(0), None, &cidrs, 0).unwrap().addresses.clone();
        ipam.detach(&who(0));
        for number in 1..=252 {
            assert_ne!(ipam.attach(&who(number), None, &cidrs, 0).unwrap().addresses, first);
        }
        assert_eq!(ipam.attach(&who(300), None, &cidrs, 0).unwrap().addresses, first);
    }

    #[test]
    fn small_and_missing_cidrs_are_refused_and_huge_ones_work() {
        let attach = |texts: &[&str]| {
            let mut ipam = Ipam::default();
            ipam.attach(&who(0), None, &cidrs(texts), 0).map(|entry| entry.addresses.clone())
        };
        assert_eq!(attach(&[]), Err(IpamError::NoPodCidr));
        assert!(matches!(attach(&["10.0.0.0/32"]), Err(IpamError::Exhausted(_))));
        assert!(matches!(attach(&["10.0.0.0/31"]), Err(IpamError::Exhausted(_))));
        assert_eq!(attach(&["10.0.0.0/32", "10.1.0.0/24"]).unwrap()[0].to_string(), "10.1.0.2");
        assert_eq!(attach(&["0.0.0.0/0", "::/0"]).unwrap().len(), 2);
    }

    #[test]
    fn two_entries_for_one_address_on_disk_leave_one() {
        let mut ipam = Ipam::default();
        ipam.attach(&who(0), None, &cidrs(&["10.1.1.0/24"]), 0).unwrap();
        let mut text: serde_json::Value = serde_json::to_value(&ipam).unwrap();
        let mut twin = text["leases"][0].clone();
        twin["attachment"]["container"] = "other".into();
        text["leases"].as_array_mut().unwrap().push(twin);
        let mut read: Ipam = serde_json::from_value(text).unwrap();
        read.index();
        assert_eq!(read.leases().count(), 1);
    }

    proptest! {
        #[test]
        fn behaves_as_a_set_and_survives_the_disk(steps in proptest::collection::vec((any::<bool>(), 0_u16..20), 0..120)) {
            let cidrs = cidrs(&["10.1.1.0/28", "fd00::/64"]);
            let mut ipam = Ipam::default();
            let mut model: BTreeMap<u16, Vec<IpAddr>> = BTreeMap::new();
            for (attach, number) in steps {
                if attach {
                    match ipam.attach(&who(number), Some("ns/pod"), &cidrs, 7).cloned() {
                        Ok(entry) => {
                            let known = model.entry(number).or_insert_with(|| entry.addresses.clone());
                            prop_assert_eq!(&*known, &entry.addresses, "the same attachment keeps its lease");
                        }
                        Err(_) => prop_assert_eq!(model.len(), 13, "full means full"),
                    }
                } else {
                    prop_assert_eq!(ipam.detach(&who(number)), model.remove(&number).is_some());
                }
                let all: Vec<&IpAddr> = model.values().flatten().collect();
                let distinct: BTreeSet<_> = all.iter().collect();
                prop_assert_eq!(all.len(), distinct.len());
                let text = serde_json::to_string(&ipam).unwrap();
                let mut read: Ipam = serde_json::from_str(&text).unwrap();
                read.index();
                prop_assert_eq!(&read, &ipam);
            }
        }
    }
}
