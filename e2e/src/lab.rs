//! Namespaces on one underlay: a router with a bridge in the middle, nodes around it, each with a default route to it.
//!
//! Whatever a node sends in clear text to an address it has no better route for reaches the router, and the capture.

mod leftovers;

use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use mesh_hostnet::Handle;
use mesh_hostnet::address::Address;
use mesh_hostnet::link::{LinkChange, Mac, VethEnd};
use mesh_hostnet::netns::{self, Netns};
use mesh_hostnet::route::Route;
use mesh_hostnet::sysctl;

use crate::wait;

/// How long a virtual link may take to carry packets, on a busy machine.
const CARRIER: Duration = Duration::from_secs(20);

static LABS: AtomicU32 = AtomicU32::new(0);

/// The router's own addresses on the underlay; every node's default route leads there.
pub const ROUTER_V4: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
/// As [`ROUTER_V4`].
pub const ROUTER_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1);

/// A lab. Dropping it ends its processes' namespaces and removes its directory.
#[derive(Debug)]
pub struct Lab {
    prefix: String,
    directory: PathBuf,
    guardian: Child,
    bridge: u32,
    next_host: u8,
}

impl Lab {
    /// Makes the router and its bridge. `name` is for people and short: it becomes part of names.
    ///
    /// # Errors
    /// Without root, or if the kernel refuses a namespace or a link.
    pub fn new(name: &str) -> Result<Self> {
        ensure!(nix::unistd::geteuid().is_root(), "the lab makes network namespaces: run as root");
        leftovers::remove(&std::env::temp_dir());
        let number = LABS.fetch_add(1, Ordering::Relaxed);
        let prefix = format!("mt{}-{number}-{name}-", std::process::id());
        let directory = std::env::temp_dir().join(prefix.trim_end_matches('-'));
        std::fs::create_dir_all(&directory).with_context(|| format!("make {}", directory.display()))?;
        let guardian = guardian(&prefix, &directory)?;
        let mut lab = Self { prefix, directory, guardian, bridge: 0, next_host: 10 };
        lab.make_router().context("make the router namespace")?;
        Ok(lab)
    }

    /// Its name, unique on this machine.
    #[must_use]
    pub fn name(&self) -> &str {
        self.prefix.trim_end_matches('-')
    }

    /// Where its files are: short, because Unix sockets go in there.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The router's namespace, where everything on the underlay passes.
    ///
    /// # Errors
    /// If it is gone.
    pub fn router(&self) -> Result<Netns> {
        Ok(Netns::open_named(&self.full_name("router"))?)
    }

    /// Adds a node: a namespace with one link to the underlay.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn node(&mut self, name: &str) -> Result<Node> {
        let host = self.next_host;
        self.next_host += 1;
        let netns_name = self.full_name(name);
        let netns = Netns::create_named(&netns_name)?;
        let v4 = Ipv4Addr::new(192, 0, 2, host);
        let v6 = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, u16::from(host));
        self.plug(&netns, host).with_context(|| format!("connect {name} to the underlay"))?;
        netns.run(|| configure_node(v4, v6))?.with_context(|| format!("configure {name}"))?;
        let mut router = Handle::open_in(&self.router()?)?;
        wait_running(&mut router, &format!("port{host}"))?;
        let directory = self.directory.join(name);
        std::fs::create_dir_all(&directory)?;
        Ok(Node { name: name.to_owned(), netns_name, directory, v4, v6 })
    }

    /// Tells `node` and each of `others` the other's hardware address, for good.
    ///
    /// All namespaces share the kernel's limit of neighbours that were asked for, 1,024 of each family: some dozens of
    /// nodes that all talk to each other are beyond it, and lose packets. Entries set by hand do not count.
    ///
    /// # Errors
    /// If a namespace is gone, or the kernel refuses an entry.
    pub fn introduce<'a>(&self, node: &Node, others: impl Iterator<Item = &'a Node>) -> Result<()> {
        let (mut handle, link, mac) = node.uplink()?;
        for other in others {
            let (mut other_handle, other_link, other_mac) = other.uplink()?;
            for (ours, theirs) in [(node.v4.into(), other.v4.into()), (node.v6.into(), other.v6.into())] {
                handle.replace_neighbour(link, theirs, other_mac)?;
                other_handle.replace_neighbour(other_link, ours, mac)?;
            }
        }
        Ok(())
    }

    /// Makes a namespace with nothing in it but the loopback link, down.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn empty(&self, name: &str) -> Result<String> {
        let full = self.full_name(name);
        Netns::create_named(&full)?.run(allow_ping)??;
        Ok(full)
    }

    fn full_name(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    fn make_router(&mut self) -> Result<()> {
        let netns = Netns::create_named(&self.full_name("router"))?;
        self.bridge = netns.run(|| -> Result<u32> {
            let mut handle = Handle::open()?;
            up(&mut handle, "lo")?;
            let bridge = handle.add_bridge("br0")?;
            handle.change_link(bridge, &LinkChange::new().up())?;
            address(&mut handle, bridge, IpNet::V4(Ipv4Net::new(ROUTER_V4, 24)?))?;
            address(&mut handle, bridge, IpNet::V6(Ipv6Net::new(ROUTER_V6, 64)?))?;
            Ok(bridge)
        })??;
        Ok(())
    }

    fn plug(&self, node: &Netns, host: u8) -> Result<()> {
        let bridge = self.bridge;
        self.router()?.run(|| -> Result<()> {
            let mut handle = Handle::open()?;
            let near = VethEnd::new(format!("port{host}"));
            let port = handle.add_veth(&near, &VethEnd::new("uplink"), Some(node))?;
            handle.change_link(port, &LinkChange::new().master(bridge).up())?;
            Ok(())
        })?
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        for name in netns::list_named().unwrap_or_default() {
            if name.starts_with(&self.prefix) {
                let _ = netns::delete_named(&name);
            }
        }
        let keep = std::thread::panicking() || std::env::var_os("MESH_LAB_KEEP").is_some();
        if !keep {
            let _ = std::fs::remove_dir_all(&self.directory);
        }
        // Its input ends: it looks once more, and ends.
        drop(self.guardian.stdin.take());
        let _ = self.guardian.wait();
    }
}

/// A namespace that stands for a machine.
#[derive(Debug, Clone)]
pub struct Node {
    name: String,
    netns_name: String,
    directory: PathBuf,
    v4: Ipv4Addr,
    v6: Ipv6Addr,
}

impl Node {
    /// Its short name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The namespace's name, for `ip netns exec`.
    #[must_use]
    pub fn netns_name(&self) -> &str {
        &self.netns_name
    }

    /// Where this machine's files are.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Its IPv4 address on the underlay.
    #[must_use]
    pub fn v4(&self) -> Ipv4Addr {
        self.v4
    }

    /// Its IPv6 address on the underlay.
    #[must_use]
    pub fn v6(&self) -> Ipv6Addr {
        self.v6
    }

    /// Its namespace.
    ///
    /// # Errors
    /// If it is gone.
    pub fn netns(&self) -> Result<Netns> {
        Ok(Netns::open_named(&self.netns_name)?)
    }

    /// Its link to the underlay, and a handle to change things there.
    fn uplink(&self) -> Result<(Handle, u32, Mac)> {
        let mut handle = Handle::open_in(&self.netns()?)?;
        let link = handle.link_by_name("uplink")?.with_context(|| format!("{} has no uplink", self.name))?;
        let mac = link.mac.with_context(|| format!("the uplink of {} has no hardware address", self.name))?;
        Ok((handle, link.index, mac))
    }

    /// A command that will run in its namespace.
    ///
    /// # Errors
    /// If the namespace is gone.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Result<Command> {
        let mut command = Command::new(program);
        self.netns()?.attach_command(&mut command)?;
        command.stdin(Stdio::null());
        Ok(command)
    }

    /// Runs a program to its end and gives back what it printed on stdout.
    ///
    /// # Errors
    /// If it cannot be started, or exits with anything but 0: the error carries its stderr.
    pub fn output(&self, program: impl AsRef<std::ffi::OsStr>, args: &[&str]) -> Result<String> {
        let output = self.command(program.as_ref())?.args(args).output()?;
        let line = format!("{} {}", Path::new(program.as_ref()).display(), args.join(" "));
        ensure!(
            output.status.success(),
            "on {}: `{line}`: {}\n{}{}",
            self.name,
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(String::from_utf8(output.stdout)?)
    }
}

fn configure_node(v4: Ipv4Addr, v6: Ipv6Addr) -> Result<()> {
    let mut handle = Handle::open()?;
    up(&mut handle, "lo")?;
    let uplink = up(&mut handle, "uplink")?;
    address(&mut handle, uplink, IpNet::V4(Ipv4Net::new(v4, 24)?))?;
    address(&mut handle, uplink, IpNet::V6(Ipv6Net::new(v6, 64)?))?;
    handle.replace_route(&Route::via("0.0.0.0/0".parse()?, ROUTER_V4.into()))?;
    handle.replace_route(&Route::via("::/0".parse()?, ROUTER_V6.into()))?;
    allow_ping()?;
    wait_running(&mut handle, "uplink")
}

/// The kernel starts a link's queue, and a bridge its port, a moment after the carrier, and drops what comes until then.
fn wait_running(handle: &mut Handle, name: &str) -> Result<()> {
    wait::until_true(&format!("link {name} runs"), CARRIER, || {
        Ok(handle.link_by_name(name)?.is_some_and(|link| link.running))
    })
}

fn up(handle: &mut Handle, name: &str) -> Result<u32> {
    let link = handle.link_by_name(name)?.with_context(|| format!("no link {name}"))?;
    handle.change_link(link.index, &LinkChange::new().up())?;
    Ok(link.index)
}

fn address(handle: &mut Handle, link: u32, net: IpNet) -> Result<()> {
    Ok(handle.replace_address(&Address { no_prefix_route: false, ..Address::plain(link, net) })?)
}

/// A process of its own group that waits for this one to end, then removes what the lab's `Drop` did not get to.
fn guardian(prefix: &str, directory: &Path) -> Result<Child> {
    use std::os::unix::process::CommandExt as _;
    let keep = if std::env::var_os("MESH_LAB_KEEP").is_some() { ":" } else { "rm -rf \"$2\"" };
    let script = format!(
        "read _; for n in /run/netns/\"$1\"*; do [ -e \"$n\" ] || continue; umount -l \"$n\"; rm -f \"$n\"; gone=1; done; \
         [ -z \"$gone\" ] || {keep}"
    );
    Command::new("/bin/sh")
        .args(["-c", &script, "guardian", prefix])
        .arg(directory)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0)
        .spawn()
        .context("start the lab's guardian")
}

/// Lets root open ping sockets: a runtime's pods have it, a bare namespace does not.
fn allow_ping() -> Result<()> {
    sysctl::ensure(&sysctl::Key::net("ipv4/ping_group_range")?, "0\t0")?;
    Ok(())
}
