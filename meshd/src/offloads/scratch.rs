//! A network namespace for the self-check, gone when it is over.

use std::path::Path;

use anyhow::Context as _;
use mesh_dataplane::selfcheck::{Findings, SelfCheck};
use mesh_hostnet::Handle;
use mesh_hostnet::address::Address;
use mesh_hostnet::link::LinkChange;
use mesh_hostnet::netns::Netns;
use mesh_hostnet::route::Route;
use mesh_hostnet::sysctl::{self, Key};
use tracing::subscriber::NoSubscriber;

use super::{Tried, boot, kernel};

/// Tries all offloads of this kernel.
///
/// # Errors
/// It refused a namespace, a device or what belongs to them.
pub(super) fn try_all() -> anyhow::Result<Tried> {
    let namespace = Netns::create().context("make a network namespace to try offloads in")?;
    let run = || -> anyhow::Result<Findings> {
        let check = SelfCheck::open().context("open scratch devices to try offloads on")?;
        let has_v6 = set_up().context("set up the scratch devices")?;
        Ok(check.run(has_v6))
    };
    // What scratch devices and sockets say of themselves is nobody's concern.
    let findings = namespace.run(|| tracing::subscriber::with_default(NoSubscriber::default(), run))??;
    let faults = findings.faults().map(|(class, fault)| (class.as_str().to_owned(), fault.to_string())).collect();
    Ok(Tried { boot: boot().unwrap_or_default(), kernel: kernel(), faults })
}

/// Brings the links of the calling thread's namespace up; says whether there is IPv6.
fn set_up() -> anyhow::Result<bool> {
    let has_v6 = Path::new("/proc/sys/net/ipv6").exists();
    sysctl::write(&Key::ipv4_forwarding(), "1")?;
    if has_v6 {
        sysctl::write(&Key::net("ipv6/conf/all/disable_ipv6")?, "0")?;
        sysctl::write(&Key::ipv6_forwarding(), "1")?;
    }
    let mut handle = Handle::open()?;
    let find = |handle: &mut Handle, name: &str| -> anyhow::Result<u32> {
        Ok(handle.link_by_name(name)?.with_context(|| format!("no link {name}"))?.index)
    };
    let loopback = find(&mut handle, "lo")?;
    handle.change_link(loopback, &LinkChange::new().up())?;
    for link in SelfCheck::links() {
        let index = find(&mut handle, link.name)?;
        handle.change_link(index, &LinkChange::new().mtu(1500).up())?;
        let known = |net: &&ipnet::IpNet| has_v6 || net.addr().is_ipv4();
        for net in link.addresses.iter().filter(known) {
            handle.replace_address(&Address::plain(index, *net))?;
        }
        for net in link.routes.iter().filter(known) {
            handle.replace_route(&Route::through(*net, index))?;
        }
    }
    Ok(has_v6)
}
