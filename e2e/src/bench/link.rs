//! The link under test: two namespaces joined by a veth pair.

use std::fmt;
use std::net::Ipv4Addr;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use ipnet::{IpNet, Ipv4Net};
use mesh_hostnet::Handle;
use mesh_hostnet::address::Address;
use mesh_hostnet::link::{LinkChange, VethEnd};
use mesh_hostnet::netns::Netns;
use mesh_hostnet::sysctl;

use super::child;
use crate::lab::Lab;

/// MTU inside every tunnel, as WireGuard's tools set it.
pub const TUNNEL_MTU: u32 = 1420;
const UPLINK: &str = "uplink";
const ETHTOOL: &str = "ethtool";
/// A program that takes longer hangs: ten thousand peers take the slowest rival a few seconds.
const HANGS: Duration = Duration::from_secs(120);

/// How packets cross the link.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum LinkKind {
    /// The veth hands super-packets of up to 64 KiB over whole
    Trains,
    /// Packets cross one by one, as on a plain NIC: no segmentation offload, GRO on
    Wire,
}

impl LinkKind {
    /// Its name in results.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Trains => "trains",
            Self::Wire => "wire",
        }
    }
}

impl fmt::Display for LinkKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// One end.
#[derive(Debug)]
pub struct End {
    /// Where it is.
    pub netns: Netns,
    /// Its address on the link.
    pub underlay: Ipv4Addr,
    /// Its address in the tunnel.
    pub overlay: Ipv4Addr,
    /// What the tunnel's interface is called: unique on this machine, because sockets are named after it.
    pub interface: String,
}

/// Both ends. Load goes from the first to the second.
#[derive(Debug)]
pub struct Link {
    /// How packets cross it.
    pub kind: LinkKind,
    /// The two ends.
    pub ends: [End; 2],
    lab: Lab,
}

impl Link {
    /// Makes one; `place` tells links of a kind apart that are there at one time: at most a dozen.
    ///
    /// # Errors
    /// Without root or `ethtool`, or if the kernel refuses.
    pub fn new(kind: LinkKind, place: u8) -> Result<Self> {
        ensure!(place < 12, "at most a dozen links");
        let lab = Lab::new(kind.name())?;
        let names = [lab.empty("a")?, lab.empty("b")?];
        let letter = char::from(b'a' + 2 * place + u8::from(kind == LinkKind::Wire));
        let ends = [(0, 'a'), (1, 'b')].map(|(at, end): (usize, char)| -> Result<End> {
            Ok(End {
                netns: Netns::open_named(&names[at])?,
                underlay: Ipv4Addr::new(192, 168, 77, if at == 0 { 1 } else { 2 }),
                overlay: Ipv4Addr::new(10, 77, 0, if at == 0 { 1 } else { 2 }),
                interface: format!("{INTERFACE_PREFIX}{}{letter}{end}", std::process::id()),
            })
        });
        let [a, b] = ends;
        let link = Self { kind, ends: [a?, b?], lab };
        link.connect()?;
        Ok(link)
    }

    /// Where files of this run lie; removed with the link.
    #[must_use]
    pub fn directory(&self) -> &Path {
        self.lab.directory()
    }

    fn connect(&self) -> Result<()> {
        let [a, b] = &self.ends;
        let far = b.netns.try_clone()?;
        a.netns.run(|| Handle::open()?.add_veth(&VethEnd::new(UPLINK), &VethEnd::new(UPLINK), Some(&far)))??;
        for end in &self.ends {
            let address = Ipv4Net::new(end.underlay, 24)?;
            end.netns.run(|| -> Result<()> {
                // Nothing but the load is on the link: no router solicitations, no duplicate detection.
                sysctl::ensure(&sysctl::Key::net("ipv6/conf/all/disable_ipv6")?, "1")?;
                let mut handle = Handle::open()?;
                let lo = handle.link_by_name("lo")?.context("no lo")?;
                handle.change_link(lo.index, &LinkChange::new().up())?;
                let uplink = handle.link_by_name(UPLINK)?.context("no uplink")?;
                handle.change_link(uplink.index, &LinkChange::new().mtu(1500).up())?;
                replace_address(&mut handle, uplink.index, address)
            })??;
            if self.kind == LinkKind::Wire {
                end.packet_by_packet()?;
            }
        }
        let mut handle = Handle::open_in(&a.netns)?;
        child::poll("the link runs", Duration::from_secs(20), || {
            Ok(handle.link_by_name(UPLINK)?.filter(|link| link.running).map(|_| ()))
        })
    }
}

const INTERFACE_PREFIX: &str = "mb";

/// Whether `name` is that of an interface of a bench whose process is gone.
#[must_use]
pub fn is_left_behind(name: &str) -> bool {
    let pid = name.strip_prefix(INTERFACE_PREFIX).and_then(|rest| rest.get(..rest.len().checked_sub(2)?));
    let pid = pid.and_then(|pid| pid.parse::<u32>().ok());
    pid.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists())
}

impl End {
    /// Gives the tunnel's interface its address and MTU, and sets it up.
    ///
    /// # Errors
    /// If there is none.
    pub fn configure_tunnel(&self) -> Result<()> {
        let mut handle = Handle::open_in(&self.netns)?;
        let link = handle.link_by_name(&self.interface)?.context("the tunnel has no interface")?;
        handle.change_link(link.index, &LinkChange::new().mtu(TUNNEL_MTU).up())?;
        replace_address(&mut handle, link.index, Ipv4Net::new(self.overlay, 24)?)
    }

    /// Whether the tunnel's interface is there and up.
    ///
    /// # Errors
    /// If the kernel does not answer.
    pub fn has_tunnel(&self, must_be_up: bool) -> Result<bool> {
        let mut handle = Handle::open_in(&self.netns)?;
        Ok(handle.link_by_name(&self.interface)?.is_some_and(|link| link.up || !must_be_up))
    }

    /// Removes the tunnel's interface, should its owner have left it.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn remove_tunnel(&self) -> Result<()> {
        Ok(Handle::open_in(&self.netns)?.delete_link_by_name(&self.interface)?)
    }

    /// Runs a program to its end inside the namespace.
    ///
    /// # Errors
    /// If it fails: the error carries what it said.
    pub fn command(&self, program: &str, args: &[&str]) -> Result<String> {
        let mut command = Command::new(program);
        self.netns.attach_command(&mut command)?;
        output(command.args(args))
    }

    fn packet_by_packet(&self) -> Result<()> {
        let features = ["-K", UPLINK, "tso", "off", "tx-udp-segmentation", "off", "gro", "on"];
        self.command(ETHTOOL, &features).context("turn segmentation offload off")?;
        Ok(())
    }
}

/// Runs `command`, which prints little, to its end; gives what it printed.
///
/// # Errors
/// If it fails, the error carries what it said. If it hangs, it is killed.
pub fn output(command: &mut Command) -> Result<String> {
    let line = format!("{} {:?}", command.get_program().display(), command.get_args().collect::<Vec<_>>());
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().with_context(|| format!("start {line}"))?;
    if let Err(error) = child::poll(&line, HANGS, || Ok(child.try_wait()?)) {
        let _ = child.kill();
        let _ = child.wait();
        return Err(error);
    }
    let output = child.wait_with_output()?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{line}: {}: {}", output.status, stderr.trim());
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn replace_address(handle: &mut Handle, link: u32, net: Ipv4Net) -> Result<()> {
    Ok(handle.replace_address(&Address { no_prefix_route: false, ..Address::plain(link, IpNet::V4(net)) })?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_interfaces_of_the_dead_are_left_behind() {
        assert!(!is_left_behind(&format!("mb{}ta", std::process::id())));
        // Above the kernel's largest process id.
        assert!(is_left_behind("mb4194305ta"));
        for other in ["mb", "mbt", "mbxta", "wg0", "mesh0", "mbé"] {
            assert!(!is_left_behind(other), "{other}");
        }
    }
}
