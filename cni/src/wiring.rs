//! From a pair of links that are down to a pod that reaches its host: settings, addresses, neighbours, routes.
//!
//! The pod's only neighbour is its gateway, a link-local address that nobody has to answer for, because both ends know
//! each other's hardware address for good: no ARP, no neighbour discovery, nothing to spoof, nothing to wait for.
//!
//! ```text
//! pod   10.1.0.5/32, fd00::5/128    default via 169.254.1.1, fe80::1 (permanent: the host end)
//! host  10.1.0.5, fd00::5 through the link, in the mesh table (permanent: the pod's end)
//! ```

use std::net::IpAddr;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use mesh_hostnet::address::Address;
use mesh_hostnet::link::{Link, LinkChange, Mac};
use mesh_hostnet::netns::Netns;
use mesh_hostnet::route::Route;
use mesh_hostnet::sysctl::{self, Key};
use mesh_hostnet::{Handle, Result};
use mesh_protocol::local::Lease;

use crate::attach::gateway;
use crate::reply::default_prefix;

/// Hardware address of every pod link's host end: locally administered, the same everywhere, as each is alone with its
/// pod. One that was set explicitly is left alone by udev, which would otherwise replace it under our neighbour entries.
pub(crate) const HOST_MAC: Mac = Mac([0x02, b'm', b'e', b's', b'h', 0x01]);
/// Who made the pod's own routes: `RTPROT_STATIC`.
const POD_ROUTE_PROTOCOL: u8 = 4;

/// How long the kernel may take until both ends carry packets; it is under a millisecond unless many links come up at once.
const CARRIER_PATIENCE: Duration = Duration::from_secs(2);

/// Settings of both ends, before they come up.
pub(crate) fn settings(host_link: &str, pod_link: &str, netns: &Netns, addresses: &[IpAddr]) -> Result<()> {
    let has_v6 = addresses.iter().any(IpAddr::is_ipv6);
    let v4 = [("proxy_arp", "0"), ("accept_redirects", "0"), ("send_redirects", "0"), ("forwarding", "1")];
    for (name, value) in v4 {
        sysctl::ensure(&Key::ipv4_link(host_link, name)?, value)?;
    }
    // Without accept_ra = 0 first, a pod could announce itself as the host's router until forwarding is on.
    let v6 = [("accept_ra", "0"), ("accept_redirects", "0"), ("proxy_ndp", "0")];
    set_v6(host_link, &v6, has_v6)?;
    // Since Linux 6.17 one link can forward IPv6 alone; before, meshd has all of them forward.
    set_v6(host_link, &[("force_forwarding", "1")], false)?;
    netns.run(|| {
        // Some runtimes switch IPv6 off in new namespaces, without which there is no address to give.
        if has_v6 {
            set_v6(pod_link, &[("disable_ipv6", "0")], true)?;
        }
        // Nobody else is on the link: detecting duplicates of the link-local address would only cost two seconds.
        set_v6(pod_link, &[("accept_dad", "0"), ("accept_ra", "0")], has_v6)
    })?
}

/// IPv6 settings of a link; that the kernel has none of them matters only if they are `needed`.
fn set_v6(link: &str, settings: &[(&str, &str)], needed: bool) -> Result<()> {
    for (name, value) in settings {
        match sysctl::ensure(&Key::ipv6_link(link, name)?, value) {
            Err(error) if error.is_not_found() && !needed => return Ok(()),
            outcome => outcome?,
        };
    }
    Ok(())
}

/// The pod's end.
pub(crate) fn inside(pod: &mut Handle, link: u32, addresses: &[IpAddr]) -> Result<()> {
    if let Some(loopback) = pod.links()?.into_iter().find(|link| link.loopback && !link.up) {
        pod.change_link(loopback.index, &LinkChange::new().up())?;
    }
    pod.change_link(link, &LinkChange::new().up())?;
    for ip in addresses {
        pod.replace_address(&Address::plain(link, IpNet::from(*ip)))?;
        pod.replace_neighbour(link, gateway(*ip), HOST_MAC)?;
        pod.replace_route(&Route {
            link: Some(link),
            onlink: true,
            protocol: POD_ROUTE_PROTOCOL,
            ..Route::via(default_prefix(*ip), gateway(*ip))
        })?;
    }
    Ok(())
}

/// Brings the host's end up, and waits until both ends carry packets.
///
/// An end that was up before its other end sends nothing until the kernel has worked off its carrier event, which it does
/// later, on its own (`linkwatch`): the pod's first packets would be lost.
pub(crate) fn carrier(host: &mut Handle, host_link: u32, pod: &mut Handle, pod_link: u32) -> Result<()> {
    // The kernel's own link-local address would be tentative for seconds, and nobody asks for it.
    host.change_link(host_link, &LinkChange::new().no_ipv6_link_local())?;
    host.change_link(host_link, &LinkChange::new().up())?;
    let deadline = Instant::now() + CARRIER_PATIENCE;
    while Instant::now() < deadline {
        let runs = |link: Option<Link>| link.is_none_or(|link| link.running);
        if runs(host.link_by_index(host_link)?) && runs(pod.link_by_index(pod_link)?) {
            break;
        }
        std::thread::sleep(Duration::from_micros(200));
    }
    Ok(())
}

/// The host's way to the pod. The routes come last: with them packets begin to flow.
pub(crate) fn outside(host: &mut Handle, link: u32, pod_mac: Mac, lease: &Lease) -> Result<()> {
    for ip in &lease.addresses {
        host.replace_neighbour(link, *ip, pod_mac)?;
    }
    for ip in &lease.addresses {
        host.replace_route(&pod_route(*ip, link, lease))?;
    }
    Ok(())
}

/// The host's route to one address of a pod.
pub(crate) fn pod_route(ip: IpAddr, link: u32, lease: &Lease) -> Route {
    Route { table: lease.table, protocol: lease.route_protocol, ..Route::through(IpNet::from(ip), link) }
}
