//! Longest-prefix match over all allowed IPs.
//!
//! Prefixes nest, so the address space falls into intervals that each have one owner. They are computed once; a
//! look-up is a binary search for the interval an address lies in: 15 steps for 30,000 prefixes, no pointers chased.

use std::net::IpAddr;

use ipnet::IpNet;

use super::{Owner, TableError};

/// An immutable map from address to owner.
#[derive(Debug)]
pub struct PrefixMap {
    v4: Intervals<u32>,
    v6: Intervals<u128>,
}

impl PrefixMap {
    /// Builds the map. Prefixes must have no host bits set.
    ///
    /// # Errors
    ///
    /// [`TableError::PrefixTwice`] if two holders have exactly one prefix. A holder may list one twice.
    pub fn new(prefixes: impl IntoIterator<Item = (IpNet, Owner)>) -> Result<Self, TableError> {
        let mut all: Vec<(IpNet, Owner)> = prefixes.into_iter().collect();
        // By first address, and an outer prefix before those inside it.
        all.sort_by_key(|(prefix, _)| (prefix.network(), prefix.prefix_len()));
        for pair in all.windows(2) {
            let [(prefix, first), (other, second)] = [pair[0], pair[1]];
            if prefix == other && first != second {
                return Err(TableError::PrefixTwice { prefix, first, second });
            }
        }
        let mut v4 = Builder::default();
        let mut v6 = Builder::default();
        for (prefix, owner) in all {
            match prefix {
                IpNet::V4(net) => v4.push(net.network().to_bits(), net.broadcast().to_bits(), owner),
                IpNet::V6(net) => v6.push(net.network().to_bits(), net.broadcast().to_bits(), owner),
            }
        }
        Ok(Self { v4: v4.finish(), v6: v6.finish() })
    }

    /// The owner of the longest prefix that holds `address`. IPv4-mapped IPv6 addresses are IPv6 here.
    pub fn lookup(&self, address: IpAddr) -> Option<Owner> {
        match address {
            IpAddr::V4(address) => self.v4.lookup(address.to_bits()),
            IpAddr::V6(address) => self.v6.lookup(address.to_bits()),
        }
    }
}

/// An address as a number.
trait Address: Copy + Ord {
    const ZERO: Self;
    /// The next one, `None` after the last.
    fn next(self) -> Option<Self>;
}

impl Address for u32 {
    const ZERO: Self = 0;
    fn next(self) -> Option<Self> {
        self.checked_add(1)
    }
}

impl Address for u128 {
    const ZERO: Self = 0;
    fn next(self) -> Option<Self> {
        self.checked_add(1)
    }
}

/// First addresses of the intervals, ascending, beginning with zero, and who owns each.
#[derive(Debug)]
struct Intervals<A> {
    starts: Vec<A>,
    owners: Vec<Option<Owner>>,
}

impl<A: Address> Intervals<A> {
    fn lookup(&self, address: A) -> Option<Owner> {
        let after = self.starts.partition_point(|start| *start <= address);
        self.owners[after.checked_sub(1)?]
    }
}

/// Sweeps over sorted prefixes with a stack of those that are open.
#[derive(Debug)]
struct Builder<A> {
    starts: Vec<A>,
    owners: Vec<Option<Owner>>,
    /// Last address and owner of each prefix the sweep is inside of, outermost first.
    open: Vec<(A, Owner)>,
}

impl<A: Address> Default for Builder<A> {
    fn default() -> Self {
        Self { starts: vec![A::ZERO], owners: vec![None], open: Vec::new() }
    }
}

impl<A: Address> Builder<A> {
    fn push(&mut self, first: A, last: A, owner: Owner) {
        self.close_before(Some(first));
        self.begin(first, Some(owner));
        self.open.push((last, owner));
    }

    /// Ends all open prefixes whose last address lies before `limit`; all of them without one.
    fn close_before(&mut self, limit: Option<A>) {
        while let Some(&(last, _)) = self.open.last() {
            if limit.is_some_and(|limit| last >= limit) {
                return;
            }
            self.open.pop();
            if let Some(next) = last.next() {
                self.begin(next, self.open.last().map(|(_, owner)| *owner));
            }
        }
    }

    fn begin(&mut self, start: A, owner: Option<Owner>) {
        if self.starts.last() == Some(&start) {
            self.owners.pop();
            self.starts.pop();
        }
        if self.owners.last() != Some(&owner) {
            self.starts.push(start);
            self.owners.push(owner);
        }
    }

    fn finish(mut self) -> Intervals<A> {
        self.close_before(None);
        Intervals { starts: self.starts, owners: self.owners }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use proptest::prelude::*;

    use super::*;
    use crate::table::PeerId;

    fn scan(prefixes: &[(IpNet, Owner)], address: IpAddr) -> Option<Owner> {
        prefixes
            .iter()
            .filter(|(prefix, _)| prefix.contains(&address))
            .max_by_key(|(prefix, _)| prefix.prefix_len())
            .map(|(_, owner)| *owner)
    }

    /// Few distinct addresses, so that prefixes nest and touch.
    fn address() -> impl Strategy<Value = IpAddr> {
        let edges = || prop_oneof![Just(0u8), Just(1), Just(127), Just(128), Just(255), any::<u8>()];
        prop_oneof![
            [edges(), edges(), edges(), edges()].prop_map(IpAddr::from),
            ([edges(), edges(), edges(), edges()], [edges(), edges(), edges()]).prop_map(|(a, b)| {
                let mut bytes = [0; 16];
                bytes[..4].copy_from_slice(&a);
                bytes[13..].copy_from_slice(&b);
                IpAddr::from(bytes)
            }),
        ]
    }

    fn prefix() -> impl Strategy<Value = IpNet> {
        (address(), any::<u8>()).prop_map(|(address, len)| {
            let most = if address.is_ipv4() { 32 } else { 128 };
            IpNet::new(address, len % (most + 1)).unwrap().trunc()
        })
    }

    proptest! {
        #[test]
        fn agrees_with_a_linear_scan(
            prefixes in proptest::collection::hash_set(prefix(), 0..60),
            addresses in proptest::collection::vec(address(), 60),
        ) {
            let owned: Vec<_> = prefixes
                .iter()
                .enumerate()
                .map(|(n, prefix)| (*prefix, Owner::Peer(PeerId(n as u32 % 7))))
                .collect();
            let map = PrefixMap::new(owned.clone()).unwrap();
            let edges = owned.iter().flat_map(|(p, _)| [p.network(), p.broadcast()]);
            for address in addresses.into_iter().chain(edges) {
                prop_assert_eq!(map.lookup(address), scan(&owned, address), "{}", address);
            }
        }
    }

    #[test]
    fn same_prefix_of_two_holders_is_refused() {
        let net: IpNet = "10.0.0.0/8".parse().unwrap();
        let [a, b] = [Owner::Own, Owner::Peer(PeerId(3))];
        let error = PrefixMap::new([(net, a), (net, b)]).unwrap_err();
        assert_eq!(error.to_string(), "10.0.0.0/8 of peer 3 is already held by ourselves");
        assert!(PrefixMap::new([(net, a), (net, a)]).is_ok());
    }

    #[test]
    fn tens_of_thousands_of_prefixes() {
        let prefixes = (0..40_000u32).map(|n| {
            let net = format!("10.{}.{}.0/24", n >> 8, n & 255).parse().unwrap();
            (net, Owner::Peer(PeerId(n)))
        });
        let prefixes: Vec<_> = prefixes.collect();
        let map = PrefixMap::new(prefixes).unwrap();
        let address = "10.100.7.9".parse().unwrap();
        assert_eq!(map.lookup(address), Some(Owner::Peer(PeerId(100 * 256 + 7))));
        assert_eq!(map.lookup("9.255.255.255".parse().unwrap()), None);
    }
}
