//! What the tests of this crate share: two namespaces joined by a veth pair.
#![allow(dead_code, missing_docs, unreachable_pub, clippy::unwrap_used, reason = "tests")]

use std::time::{Duration, Instant};

use mesh_hostnet::{
    Handle,
    address::Address,
    link::{LinkChange, VethEnd},
    netns::Netns,
};

/// Fails clearly without root: these tests are never skipped.
pub fn netns() -> Netns {
    assert!(nix::unistd::geteuid().is_root(), "these tests make network namespaces: run them as root");
    Netns::create().unwrap()
}

/// Two namespaces: `left` with 10.9.0.1 and fd09::1 on link `l`, `right` with 10.9.0.2 and fd09::2 on link `r`.
pub struct Pair {
    pub left: Netns,
    pub right: Netns,
    pub near: Handle,
    pub far: Handle,
    pub l: u32,
    pub r: u32,
}

pub fn pair() -> Pair {
    let (left, right) = (netns(), netns());
    let (mut near, mut far) = (Handle::open_in(&left).unwrap(), Handle::open_in(&right).unwrap());
    let l = near.add_veth(&VethEnd::new("l"), &VethEnd::new("r"), Some(&right)).unwrap();
    let r = far.link_by_name("r").unwrap().unwrap().index;
    for (handle, link, host) in [(&mut near, l, 1), (&mut far, r, 2)] {
        let lo = handle.link_by_name("lo").unwrap().unwrap().index;
        handle.change_link(lo, &LinkChange::new().up()).unwrap();
        handle.change_link(link, &LinkChange::new().no_ipv6_link_local().up()).unwrap();
        for net in [format!("10.9.0.{host}/24"), format!("fd09::{host}/64")] {
            let address = Address { no_prefix_route: false, ..Address::plain(link, net.parse().unwrap()) };
            handle.replace_address(&address).unwrap();
        }
    }
    // The kernel starts a link's queue a moment after its carrier: until then it drops what is sent.
    let deadline = Instant::now() + Duration::from_secs(20);
    while !near.link_by_index(l).unwrap().unwrap().running || !far.link_by_index(r).unwrap().unwrap().running {
        assert!(Instant::now() < deadline, "the links do not come up");
        std::thread::sleep(Duration::from_millis(1));
    }
    Pair { left, right, near, far, l, r }
}
