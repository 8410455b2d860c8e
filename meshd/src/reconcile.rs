//! The difference between what should be and what is, and its application.
//!
//! ```text
//! desired ─┐
//!          ├─ diff ─ actions in order ─ apply ─> kernel
//! actual  ─┘
//! ```

pub(crate) mod apply;
pub(crate) mod diff;

use std::collections::BTreeSet;
use std::fmt;

use ipnet::IpNet;
use mesh_hostnet::rule::Rule;

use crate::desired::{FilterState, RouteState};

/// What of ours the kernel has.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Actual {
    /// The TUN device.
    pub(crate) device: Option<ActualDevice>,
    /// Routes of our table and protocol that go out of a link or refuse.
    pub(crate) routes: Vec<RouteState>,
    /// Rules that lead to our table and carry our protocol number.
    pub(crate) rules: Vec<Rule>,
    /// The filter, if it is one that this program put there.
    pub(crate) filter: Option<FilterState>,
    /// Host ends of pod links.
    pub(crate) pod_links: BTreeSet<String>,
}

/// The TUN device as the kernel has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ActualDevice {
    /// Its index.
    pub(crate) index: u32,
    /// Set up.
    pub(crate) up: bool,
    /// MTU in bytes.
    pub(crate) mtu: u32,
    /// Addresses usable now, without link-local ones.
    pub(crate) addresses: BTreeSet<IpNet>,
}

/// One step from what is to what should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Action {
    /// Put this filter in place of any, in one atomic step.
    PutFilter(FilterState),
    /// Put a route in place of one with the same prefix and metric.
    PutRoute(RouteState),
    /// Remove a route.
    RemoveRoute(RouteState),
    /// Add an ip rule.
    AddRule(Rule),
    /// Remove an ip rule.
    RemoveRule(Rule),
    /// Set the device's MTU.
    SetMtu(u16),
    /// Set the device up.
    SetUp,
    /// Give the device an address.
    AddAddress(IpNet),
    /// Take an address from the device.
    RemoveAddress(IpNet),
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let route = |f: &mut fmt::Formatter<'_>, verb, route: &RouteState| match &route.link {
            Some(link) => write!(f, "{verb} route {} through {link}", route.prefix),
            None => write!(f, "{verb} unreachable route {}", route.prefix),
        };
        match self {
            Self::PutFilter(_) => f.write_str("put nftables table"),
            Self::PutRoute(state) => route(f, "put", state),
            Self::RemoveRoute(state) => route(f, "remove", state),
            Self::AddRule(rule) => write!(f, "add ip rule {rule}"),
            Self::RemoveRule(rule) => write!(f, "remove ip rule {rule}"),
            Self::SetMtu(mtu) => write!(f, "set device MTU {mtu}"),
            Self::SetUp => f.write_str("set device up"),
            Self::AddAddress(net) => write!(f, "add address {net}"),
            Self::RemoveAddress(net) => write!(f, "remove address {net}"),
        }
    }
}
