//! Prefixes as the kernel's interval sets want them: disjoint ranges, each a first address and the one behind the last.

use super::Prefixes;

/// A range of addresses in network byte order: first, and the first one after it unless it ends the address space.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Interval {
    pub(super) first: Vec<u8>,
    pub(super) after: Option<Vec<u8>>,
}

/// Disjoint, ascending, neither overlapping nor touching ranges.
pub(super) fn intervals(prefixes: &Prefixes) -> Vec<Interval> {
    match prefixes {
        Prefixes::V4(nets) => {
            let ranges = nets.iter().map(|net| (u32::from(net.network()).into(), u32::from(net.broadcast()).into()));
            let bytes = |number: u128| (number as u32).to_be_bytes().to_vec();
            merged(ranges.collect()).into_iter().map(|range| interval(range, u32::MAX.into(), bytes)).collect()
        }
        Prefixes::V6(nets) => {
            let ranges = nets.iter().map(|net| (u128::from(net.network()), u128::from(net.broadcast())));
            let bytes = |number: u128| number.to_be_bytes().to_vec();
            merged(ranges.collect()).into_iter().map(|range| interval(range, u128::MAX, bytes)).collect()
        }
    }
}

fn interval((first, last): (u128, u128), max: u128, bytes: impl Fn(u128) -> Vec<u8>) -> Interval {
    Interval { first: bytes(first), after: (last < max).then(|| bytes(last + 1)) }
}

fn merged(mut ranges: Vec<(u128, u128)>) -> Vec<(u128, u128)> {
    ranges.sort_unstable();
    let mut all: Vec<(u128, u128)> = Vec::with_capacity(ranges.len());
    for (first, last) in ranges {
        match all.last_mut() {
            Some(previous) if first <= previous.1.saturating_add(1) => previous.1 = previous.1.max(last),
            _ => all.push((first, last)),
        }
    }
    all
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;
    use ipnet::Ipv4Net;
    use proptest::prelude::*;
    use std::{collections::BTreeSet, net::Ipv4Addr};

    fn v4(nets: &[&str]) -> Prefixes {
        Prefixes::V4(nets.iter().map(|net| net.parse().unwrap()).collect())
    }

    #[test]
    fn touching_and_nested_prefixes_become_one_range() {
        let ranges = intervals(&v4(&["10.1.0.0/24", "10.1.1.0/24", "10.1.0.128/25", "10.3.0.0/16"]));
        assert_eq!(ranges.len(), 2);
        assert_eq!(ranges[0].first, [10, 1, 0, 0]);
        assert_eq!(ranges[0].after, Some(vec![10, 1, 2, 0]));
    }

    #[test]
    fn a_range_to_the_last_address_has_no_end() {
        assert_eq!(intervals(&v4(&["255.0.0.0/8"]))[0].after, None);
        let all = Prefixes::V6(["::/0".parse().unwrap()].into());
        assert_eq!(intervals(&all), [Interval { first: vec![0; 16], after: None }]);
    }

    proptest! {
        #[test]
        fn ranges_hold_the_same_addresses_as_the_prefixes(
            nets in proptest::collection::btree_set((any::<u32>(), 0_u8..=32), 0..20),
            probes in proptest::collection::vec(any::<u32>(), 20),
        ) {
            let nets: BTreeSet<_> = nets.into_iter().map(|(ip, len)| Ipv4Net::new(ip.into(), len).unwrap()).collect();
            let ranges = intervals(&Prefixes::V4(nets.clone()));
            for probe in probes.into_iter().chain(nets.iter().map(|net| net.broadcast().into())) {
                let bytes = probe.to_be_bytes();
                let inside = ranges.iter().any(|range| {
                    range.first.as_slice() <= &bytes[..] && range.after.as_ref().is_none_or(|after| &bytes[..] < after.as_slice())
                });
                prop_assert_eq!(inside, nets.iter().any(|net| net.contains(&Ipv4Addr::from(probe))));
            }
        }
    }
}
