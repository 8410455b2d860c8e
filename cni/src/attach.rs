//! ADD: everything is looked at first, then changed step by step; what fails takes the steps before it back.
//!
//! ```text
//! look: namespace, names free -> lease from meshd -> veth, its end already in the pod -> wiring -> lease still ours?
//! ```
//!
//! The last look is for a DEL of the same pod that ran beside this: see [`detach`].

use std::net::IpAddr;

use ipnet::IpNet;
use mesh_hostnet::Handle;
use mesh_hostnet::link::VethEnd;
use mesh_hostnet::netns::Netns;
use mesh_protocol::local::{Attachment, GATEWAY_V4, GATEWAY_V6, Lease, LocalReply, LocalRequest};

use crate::client;
use crate::command::{failure, unexpected};
use crate::detach;
use crate::input::{self, Config};
use crate::reply::{Attached, Failure, FailureCode};
use crate::wiring::{self, HOST_MAC};

/// Attaches a pod.
///
/// # Errors
/// Any [`Failure`]; then nothing of this pod is left, unless it was there before.
pub(crate) fn attach(attachment: Attachment, netns_path: &str, config: &Config) -> Result<Attached, Failure> {
    let netns = open_netns(netns_path)?;
    let mut host = Handle::open()?;
    let mut pod = Handle::open_in(&netns)?;
    if pod.link_by_name(&attachment.interface)?.is_some() || host.link_by_name(&attachment.host_link())?.is_some() {
        return Err(already_attached(&attachment));
    }
    let lease = lease(&attachment, config)?;
    let built = check_lease(&lease, &attachment).and_then(|()| build(&mut host, &mut pod, &netns, &lease, config));
    match built {
        Ok(attached) => Ok(attached),
        // Another ADD of the same pod was faster, so the lease is in use.
        Err(Undo::Nothing(failure)) => Err(failure),
        Err(Undo::All(failure)) => {
            let undone = host.delete_link_by_name(&attachment.host_link());
            detach::release(&attachment, config);
            Err(match undone {
                Ok(()) => failure,
                Err(error) => failure.with_details(&format!("and it could not be undone: {error}")),
            })
        }
    }
}

/// A failure after the lease, and how much of what was done is ours to undo.
enum Undo {
    Nothing(Failure),
    All(Failure),
}

impl<E: Into<Failure>> From<E> for Undo {
    fn from(error: E) -> Self {
        Self::All(error.into())
    }
}

fn open_netns(path: &str) -> Result<Netns, Failure> {
    let netns = Netns::open(path).map_err(|error| input::wrong_variable("CNI_NETNS", path, &error.to_string()))?;
    if netns.inode()? == Netns::current()?.inode()? {
        return Err(input::wrong_variable("CNI_NETNS", path, "it is the namespace of the host itself"));
    }
    Ok(netns)
}

fn already_attached(attachment: &Attachment) -> Failure {
    let Attachment { container, interface } = attachment;
    let message = format!("CNI_IFNAME: container {container} has an interface {interface} already; DEL it first");
    Failure::new(FailureCode::Environment, message)
}

fn lease(attachment: &Attachment, config: &Config) -> Result<Lease, Failure> {
    let request = LocalRequest::Attach { attachment: attachment.clone(), pod: input::pod() };
    match client::ask(&config.socket, &request) {
        Ok(LocalReply::Lease(lease)) => Ok(lease),
        Ok(_) => Err(unexpected()),
        Err(error) => Err(failure(&error).while_doing("ask meshd for the pod's addresses")),
    }
}

/// A lease that cannot be right would only fail half-way through.
fn check_lease(lease: &Lease, attachment: &Attachment) -> Result<(), Undo> {
    let families = |v4: bool| lease.addresses.iter().filter(|ip| ip.is_ipv4() == v4).count();
    let strange = |ip: &&IpAddr| ip.is_unspecified() || ip.is_loopback() || ip.is_multicast();
    let reason = if lease.attachment != *attachment {
        "is of another pod".to_owned()
    } else if lease.addresses.is_empty() || families(true) > 1 || families(false) > 1 {
        format!("has {} IPv4 and {} IPv6 addresses", families(true), families(false))
    } else if let Some(ip) = lease.addresses.iter().find(strange) {
        format!("has the address {ip}")
    } else if lease.mtu < 1280 {
        format!("has an MTU of {}, below 1280", lease.mtu)
    } else if lease.table == 0 {
        "names no routing table".to_owned()
    } else {
        return Ok(());
    };
    Err(Failure::new(FailureCode::Meshd, format!("the lease that meshd gave {reason}")).into())
}

fn build(host: &mut Handle, pod: &mut Handle, netns: &Netns, lease: &Lease, config: &Config) -> Result<Attached, Undo> {
    let attachment = &lease.attachment;
    let mtu = u32::from(config.mtu.map_or(lease.mtu, |bound| bound.min(lease.mtu)));
    let near =
        VethEnd { name: attachment.host_link(), mtu: Some(mtu), group: Some(lease.link_group), mac: Some(HOST_MAC) };
    let far = VethEnd { mtu: Some(mtu), ..VethEnd::new(&attachment.interface) };
    let host_index = match host.add_veth(&near, &far, Some(netns)) {
        Ok(index) => index,
        Err(error) if error.is_exists() => return Err(Undo::Nothing(already_attached(attachment))),
        Err(error) => return Err(error.into()),
    };
    let pod_link = pod.link_by_name(&attachment.interface)?;
    let pod_link = pod_link.ok_or_else(|| vanished(&attachment.interface))?;
    let pod_mac = pod_link.mac.ok_or_else(|| vanished(&attachment.interface))?;
    wiring::settings(&near.name, &attachment.interface, netns, &lease.addresses)?;
    wiring::inside(pod, pod_link.index, &lease.addresses)?;
    wiring::carrier(host, host_index, pod, pod_link.index)?;
    wiring::outside(host, host_index, pod_mac, lease)?;
    still_leased(lease, config)?;
    Ok(Attached {
        host_link: near.name,
        host_mac: HOST_MAC,
        pod_link: far.name,
        pod_mac,
        mtu,
        sandbox: netns.name().to_owned(),
        addresses: lease.addresses.iter().map(|ip| (IpNet::from(*ip), gateway(*ip))).collect(),
    })
}

fn vanished(interface: &str) -> Failure {
    Failure::new(FailureCode::Kernel, format!("interface {interface} of the pod vanished while it was set up"))
}

fn still_leased(lease: &Lease, config: &Config) -> Result<(), Failure> {
    match client::ask(&config.socket, &LocalRequest::Check { attachment: lease.attachment.clone() }) {
        Ok(LocalReply::Lease(now)) if now.addresses == lease.addresses => Ok(()),
        Ok(_) => Err(Failure::new(FailureCode::TryAgain, "the pod was detached while it was being attached")),
        Err(error) => Err(failure(&error).while_doing("confirm the pod's addresses with meshd")),
    }
}

/// The gateway of a pod's address.
pub(crate) fn gateway(ip: IpAddr) -> IpAddr {
    match ip {
        IpAddr::V4(_) => GATEWAY_V4.into(),
        IpAddr::V6(_) => GATEWAY_V6.into(),
    }
}
