//! Leases nobody will give back: the pod's link is gone and no `DEL` came. Some runtimes call neither `CHECK` nor `GC`, so
//! `meshd` looks itself.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use mesh_protocol::local::Attachment;

use super::ipam::Ipam;

/// A pod without link for so long is none: `mesh-cni` makes the link within a second of getting the lease.
const PATIENCE: Duration = Duration::from_secs(300);

/// Since when each lease has been without its link.
#[derive(Debug, Default)]
pub(super) struct Leaks {
    missing: BTreeMap<Attachment, Instant>,
}

impl Leaks {
    /// Leases whose link has been missing for five minutes. Call it again and again.
    pub(super) fn find(&mut self, ipam: &Ipam, links: &[String], now: Instant) -> Vec<Attachment> {
        let missing = without_link(ipam, links);
        self.missing.retain(|attachment, _| missing.contains(attachment));
        for attachment in missing {
            self.missing.entry(attachment).or_insert(now);
        }
        let leaked = self.missing.iter().filter(|(_, since)| now.saturating_duration_since(**since) >= PATIENCE);
        leaked.map(|(attachment, _)| attachment.clone()).collect()
    }
}

/// Leases whose link does not exist.
pub(super) fn without_link(ipam: &Ipam, links: &[String]) -> Vec<Attachment> {
    let gone = ipam.leases().filter(|entry| !links.contains(&entry.attachment.host_link()));
    gone.map(|entry| entry.attachment.clone()).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    #[test]
    fn a_link_that_stays_away_is_a_leak_and_one_that_returns_is_not() {
        let mut ipam = Ipam::default();
        let who = |name: &str| Attachment { container: name.into(), interface: "eth0".into() };
        let cidrs = ["10.1.1.0/24".parse().unwrap()];
        for name in ["a", "b", "c"] {
            ipam.attach(&who(name), None, &cidrs, 0).unwrap();
        }
        let mut leaks = Leaks::default();
        let start = Instant::now();
        let links = vec![who("a").host_link()];
        assert!(leaks.find(&ipam, &links, start).is_empty());
        let both = vec![who("a").host_link(), who("b").host_link()];
        assert!(leaks.find(&ipam, &both, start + PATIENCE / 2).is_empty());
        assert_eq!(leaks.find(&ipam, &links, start + PATIENCE), [who("c")]);
        assert_eq!(leaks.find(&ipam, &links, start + PATIENCE * 2), [who("b"), who("c")]);
    }
}
