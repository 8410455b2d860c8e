//! Typed Linux network calls: namespaces, links, addresses, routes, rules, nftables, sysctls.
//!
//! Every call is synchronous and does one thing to one object of the kernel; nothing here decides what should be done.
//! No external program is run: rtnetlink and nf_tables are spoken directly.
//!
//! A [`Handle`] belongs to the network namespace of the thread that opened it and keeps to it, from whichever thread it is
//! used later. [`netns::Netns::run`] executes a closure on a fresh thread inside a namespace, so that the caller's own
//! thread (a runtime worker, say) never changes its namespace.
//!
//! ```no_run
//! use mesh_hostnet::{Handle, link::LinkChange, netns::Netns};
//! # fn main() -> mesh_hostnet::Result<()> {
//! let pod = Netns::open("/run/netns/pod1")?;
//! let mut inside = Handle::open_in(&pod)?;
//! if let Some(eth0) = inside.link_by_name("eth0")? {
//!     inside.change_link(eth0.index, &LinkChange::new().up().mtu(1420))?;
//! }
//! # Ok(()) }
//! ```

pub mod address;
mod error;
pub mod link;
pub mod neighbour;
pub mod netns;
pub mod nft;
pub mod route;
pub mod rule;
pub mod scratch;
mod socket;
pub mod sysctl;
pub mod watch;
mod wire;

pub use error::{Error, Result};
pub use socket::Handle;
