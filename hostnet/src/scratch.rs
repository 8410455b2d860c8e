//! Links of a network namespace in which something is tried out, and nothing else lives.

use std::path::Path;

use ipnet::IpNet;

use crate::address::Address;
use crate::link::LinkChange;
use crate::route::Route;
use crate::sysctl::{self, Key};
use crate::{Error, Handle, Result};

/// What a link gets that is there already, beside 1,500 bytes of MTU.
#[derive(Debug, Clone, Copy)]
pub struct ScratchLink<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its addresses; those of IPv6 are usable at once.
    pub addresses: &'a [IpNet],
    /// Prefixes routed through it.
    pub routes: &'a [IpNet],
}

/// Brings the loopback link and `links` of the calling thread's namespace up, and lets it forward. Says whether there is
/// IPv6; what belongs to it is left out if not.
///
/// # Errors
/// [`Error::NotFound`] for a link that is not there; what else the kernel says.
pub fn set_up<'a>(links: impl IntoIterator<Item = ScratchLink<'a>>) -> Result<bool> {
    let has_v6 = Path::new("/proc/sys/net/ipv6").exists();
    sysctl::write(&Key::ipv4_forwarding(), "1")?;
    if has_v6 {
        sysctl::write(&Key::net("ipv6/conf/all/disable_ipv6")?, "0")?;
        sysctl::write(&Key::ipv6_forwarding(), "1")?;
    }
    let mut handle = Handle::open()?;
    let find = |handle: &mut Handle, name: &str| {
        let object = format!("link {name}");
        handle.link_by_name(name)?.map(|link| link.index).ok_or(Error::NotFound { object })
    };
    let loopback = find(&mut handle, "lo")?;
    handle.change_link(loopback, &LinkChange::new().up())?;
    for link in links {
        let index = find(&mut handle, link.name)?;
        handle.change_link(index, &LinkChange::new().mtu(1500).up())?;
        let known = |net: &&IpNet| has_v6 || net.addr().is_ipv4();
        for net in link.addresses.iter().filter(known) {
            handle.replace_address(&Address::plain(index, *net))?;
        }
        for net in link.routes.iter().filter(known) {
            handle.replace_route(&Route::through(*net, index))?;
        }
    }
    Ok(has_v6)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;
    use crate::netns::Netns;

    #[test]
    fn links_are_up_with_what_they_get_and_one_that_is_missing_is_named() {
        let netns = Netns::create().unwrap();
        let (addresses, routes) = (["10.3.0.1/32".parse().unwrap()], ["10.2.0.0/16".parse().unwrap()]);
        let link = |name| ScratchLink { name, addresses: &addresses, routes: &routes };
        netns.run(|| set_up([link("lo")])).unwrap().unwrap();
        let mut inside = Handle::open_in(&netns).unwrap();
        let lo = inside.link_by_name("lo").unwrap().unwrap();
        assert!(lo.up && lo.mtu == 1500);
        assert_eq!(sysctl_in(&netns), "1");
        let missing = netns.run(|| set_up([link("nowhere")])).unwrap().unwrap_err();
        assert_eq!(missing.to_string(), "link nowhere does not exist");
    }

    fn sysctl_in(netns: &Netns) -> String {
        netns.run(|| sysctl::read(&Key::ipv4_forwarding()).unwrap()).unwrap().trim().to_owned()
    }
}
