//! Does the steps one after the other. A step that fails is reported and the others go on: each makes the host safer or
//! the next look finds it still undone.

use std::collections::BTreeMap;

use mesh_hostnet::address::Address;
use mesh_hostnet::link::LinkChange;
use mesh_hostnet::route::Route;
use mesh_hostnet::{Error, Handle};
use tracing::{debug, info};

use super::Action;
use crate::desired::{HostState, RouteState, nft_table};

/// A step the kernel refused.
#[derive(Debug, thiserror::Error)]
#[error("{step}: {cause}")]
pub(crate) struct ApplyError {
    /// What was tried.
    pub(crate) step: String,
    /// What the kernel said.
    pub(crate) cause: Error,
}

/// Does all steps towards `desired`. `links` are names and indexes of the links there are.
pub(crate) fn apply(
    handle: &mut Handle,
    desired: &HostState,
    links: &BTreeMap<String, u32>,
    actions: &[Action],
) -> Vec<ApplyError> {
    let mut errors = Vec::new();
    for action in actions {
        match step(handle, desired, links, action) {
            Ok(()) => debug!(step = %action, "host changed"),
            // A pod's link went away since it was seen: its route has gone with it, and the next look knows.
            Err(error) if error.is_not_found() && is_of_another_link(action, desired) => {
                debug!(step = %action, %error, "link is gone");
            }
            Err(cause) => errors.push(ApplyError { step: action.to_string(), cause }),
        }
    }
    if !actions.is_empty() {
        info!(steps = actions.len(), failed = errors.len(), "host network brought in line");
    }
    errors
}

fn is_of_another_link(action: &Action, desired: &HostState) -> bool {
    matches!(action, Action::PutRoute(RouteState { link: Some(link), .. }) if *link != desired.device.name)
}

fn step(handle: &mut Handle, desired: &HostState, links: &BTreeMap<String, u32>, action: &Action) -> Result<(), Error> {
    let index = |name: &str| {
        let missing = || Error::NotFound { object: format!("link {name}") };
        links.get(name).copied().ok_or_else(missing)
    };
    let device = || index(&desired.device.name);
    match action {
        Action::PutFilter(filter) => {
            let state = HostState { filter: filter.clone(), ..desired.clone() };
            handle.replace_table(&nft_table(&state))
        }
        Action::PutRoute(route) => handle.replace_route(&kernel_route(route, desired, index)?),
        Action::RemoveRoute(route) => match kernel_route(route, desired, index) {
            Ok(route) => handle.delete_route(&route),
            // The route went with its link.
            Err(error) if error.is_not_found() => Ok(()),
            Err(error) => Err(error),
        },
        Action::AddRule(rule) => handle.add_rule(rule),
        Action::RemoveRule(rule) => handle.delete_rule(rule),
        Action::SetMtu(mtu) => handle.change_link(device()?, &LinkChange::new().mtu((*mtu).into())),
        Action::SetUp => set_up(handle, device()?, desired.has_ipv6),
        Action::AddAddress(net) => handle.replace_address(&Address::plain(device()?, *net)),
        Action::RemoveAddress(net) => handle.delete_address(device()?, *net),
    }
}

/// Packets that may wait in a queue of the device: what a fast sender produces while a busy machine does not run the lane
/// for a tenth of a second. The kernel's 500 last for a quarter of that.
const QUEUE_LENGTH: u32 = 2_048;

/// Sets the device up without a link-local address: nothing on a TUN device would answer it.
fn set_up(handle: &mut Handle, index: u32, has_ipv6: bool) -> Result<(), Error> {
    if has_ipv6 {
        handle.change_link(index, &LinkChange::new().no_ipv6_link_local())?;
    }
    handle.change_link(index, &LinkChange::new().queue_length(QUEUE_LENGTH).up())
}

fn kernel_route(
    state: &RouteState,
    desired: &HostState,
    index: impl Fn(&str) -> Result<u32, Error>,
) -> Result<Route, Error> {
    let mut route = match &state.link {
        Some(link) => Route::through(state.prefix, index(link)?),
        None => Route::unreachable(state.prefix),
    };
    route.table = desired.names.table;
    route.protocol = desired.names.route_protocol;
    route.metric = state.metric;
    route.preferred_source = state.source;
    route.mtu = state.mtu.map(u32::from);
    route.advmss = state.advmss.map(u32::from);
    Ok(route)
}
