//! Neighbour entries: which hardware address stands for an IP address on a link.

use std::net::IpAddr;

use netlink_packet_route::{
    RouteNetlinkMessage,
    neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState},
    route::RouteType,
};

use crate::{
    Handle, Result,
    address::family,
    error::gone_is_fine,
    link::Mac,
    socket::{CREATE, REPLACE},
};

/// A neighbour of a link.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Neighbour {
    /// Index of the link.
    pub link: u32,
    /// Its IP address.
    pub ip: IpAddr,
    /// Its hardware address; `None` while unresolved.
    pub mac: Option<Mac>,
    /// Set by hand and never asked for.
    pub permanent: bool,
}

impl Handle {
    /// All neighbours of the namespace.
    ///
    /// # Errors
    /// See [`Error`](crate::Error).
    pub fn neighbours(&mut self) -> Result<Vec<Neighbour>> {
        let answers = self.dump("neighbours", RouteNetlinkMessage::GetNeighbour(NeighbourMessage::default()))?;
        Ok(answers.iter().filter_map(neighbour_of).collect())
    }

    /// Sets a permanent entry, in place of any other for that address.
    ///
    /// # Errors
    /// [`Error::NoSuchLink`](crate::Error::NoSuchLink) if the link is gone.
    pub fn replace_neighbour(&mut self, link: u32, ip: IpAddr, mac: Mac) -> Result<()> {
        let mut message = message(link, ip);
        message.header.state = NeighbourState::Permanent;
        message.attributes.push(NeighbourAttribute::LinkLayerAddress(mac.0.to_vec()));
        self.request(&object(link, ip), RouteNetlinkMessage::NewNeighbour(message), CREATE | REPLACE)
    }

    /// Removes an entry. Already gone is success.
    ///
    /// # Errors
    /// See [`Error`](crate::Error).
    pub fn delete_neighbour(&mut self, link: u32, ip: IpAddr) -> Result<()> {
        let message = RouteNetlinkMessage::DelNeighbour(message(link, ip));
        gone_is_fine(self.request(&object(link, ip), message, 0))
    }
}

fn message(link: u32, ip: IpAddr) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = family(ip);
    message.header.ifindex = link;
    message.header.kind = RouteType::Unicast;
    message.attributes.push(NeighbourAttribute::Destination(NeighbourAddress::from(ip)));
    message
}

fn neighbour_of(message: &RouteNetlinkMessage) -> Option<Neighbour> {
    let RouteNetlinkMessage::NewNeighbour(message) = message else {
        return None;
    };
    let (mut ip, mut mac) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(v4)) => ip = Some(IpAddr::V4(*v4)),
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(v6)) => ip = Some(IpAddr::V6(*v6)),
            NeighbourAttribute::LinkLayerAddress(bytes) => mac = bytes.as_slice().try_into().ok().map(Mac),
            _ => {}
        }
    }
    Some(Neighbour {
        link: message.header.ifindex,
        ip: ip?,
        mac,
        permanent: message.header.state == NeighbourState::Permanent,
    })
}

fn object(link: u32, ip: IpAddr) -> String {
    format!("neighbour {ip} on link number {link}")
}
