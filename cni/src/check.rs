//! CHECK: is what ADD made still there? Only our own is judged; other plugins may have added to it, or moved the pod's
//! default route.

use std::net::IpAddr;

use ipnet::IpNet;
use mesh_hostnet::Handle;
use mesh_hostnet::link::Link;
use mesh_hostnet::netns::Netns;
use mesh_hostnet::route::RouteFilter;
use mesh_protocol::local::{Attachment, Lease, LocalReply, LocalRequest};
use serde::Deserialize;

use crate::attach::gateway;
use crate::client;
use crate::command::{failure, unexpected};
use crate::input::Config;
use crate::reply::{Failure, FailureCode, default_prefix};
use crate::wiring::{self, HOST_MAC};

/// Compares the kernel with the lease.
///
/// # Errors
/// What is missing, or why nobody knows.
pub(crate) fn check(attachment: &Attachment, netns_path: &str, config: &Config) -> Result<(), Failure> {
    let lease = match client::ask(&config.socket, &LocalRequest::Check { attachment: attachment.clone() }) {
        Ok(LocalReply::Lease(lease)) => lease,
        Ok(_) => return Err(unexpected()),
        Err(error) => return Err(failure(&error)),
    };
    check_result(&lease, config)?;
    let netns = Netns::open(netns_path)
        .map_err(|error| Failure::new(FailureCode::UnknownContainer, format!("open the pod's namespace: {error}")))?;
    check_host(&mut Handle::open()?, &lease)?;
    check_pod(&mut Handle::open_in(&netns)?, &lease)
}

/// The runtime remembers what meshd does.
fn check_result(lease: &Lease, config: &Config) -> Result<(), Failure> {
    #[derive(Deserialize)]
    struct Previous {
        #[serde(default)]
        ips: Vec<Ip>,
    }
    #[derive(Deserialize)]
    struct Ip {
        address: IpNet,
    }
    let Some(previous) = &config.previous else {
        return Ok(());
    };
    let previous: Previous = serde_json::from_str(previous.get())
        .map_err(|error| Failure::new(FailureCode::Decode, format!("prevResult: {error}")))?;
    for ip in &lease.addresses {
        require(previous.ips.iter().any(|other| other.address.addr() == *ip), || format!("{ip} is not in prevResult"))?;
    }
    Ok(())
}

fn check_host(host: &mut Handle, lease: &Lease) -> Result<(), Failure> {
    let link = up(host, &lease.attachment.host_link())?;
    require(link.group == lease.link_group, || format!("link {} is not in group {}", link.name, lease.link_group))?;
    let routes = host.routes(RouteFilter { table: Some(lease.table), ..RouteFilter::default() })?;
    for ip in &lease.addresses {
        let wanted = wiring::pod_route(*ip, link.index, lease).normalised();
        let found = routes.iter().any(|route| route.key() == wanted.key() && route.link == wanted.link);
        require(found, || format!("host has no route to {ip} through {} in table {}", link.name, lease.table))?;
    }
    Ok(())
}

fn check_pod(pod: &mut Handle, lease: &Lease) -> Result<(), Failure> {
    let name = &lease.attachment.interface;
    let link = up(pod, name)?;
    let (addresses, neighbours) = (pod.addresses()?, pod.neighbours()?);
    let routes = pod.routes(RouteFilter::default())?;
    for ip in &lease.addresses {
        let has = |ip: IpAddr| addresses.iter().any(|address| address.link == link.index && address.net.addr() == ip);
        require(has(*ip), || format!("{name} in the pod has lost its address {ip}"))?;
        let via = gateway(*ip);
        let known = neighbours.iter().any(|one| one.link == link.index && one.ip == via && one.mac == Some(HOST_MAC));
        require(known, || format!("{name} in the pod has lost the neighbour entry of its gateway {via}"))?;
        let default = routes.iter().any(|route| route.destination == default_prefix(*ip));
        require(default, || format!("the pod has no default route for the family of {ip}"))?;
    }
    Ok(())
}

fn up(handle: &mut Handle, name: &str) -> Result<Link, Failure> {
    let link = handle.link_by_name(name)?;
    let link = link.ok_or_else(|| Failure::new(FailureCode::Missing, format!("link {name} is gone")))?;
    require(link.up, || format!("link {name} is down"))?;
    Ok(link)
}

fn require(holds: bool, otherwise: impl FnOnce() -> String) -> Result<(), Failure> {
    if holds { Ok(()) } else { Err(Failure::new(FailureCode::Missing, otherwise())) }
}
