//! Addresses of links.

use ipnet::IpNet;
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    address::{AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, AddressScope},
};
use std::net::IpAddr;

use crate::{
    Handle, Result,
    error::gone_is_fine,
    socket::{CREATE, REPLACE},
};

/// How far an address or a route is valid.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Scope {
    /// Everywhere (0).
    #[default]
    Universe,
    /// On the link (253).
    Link,
    /// In this host (254).
    Host,
    /// Another number.
    Other(u8),
}

impl From<u8> for Scope {
    fn from(number: u8) -> Self {
        match number {
            0 => Self::Universe,
            253 => Self::Link,
            254 => Self::Host,
            other => Self::Other(other),
        }
    }
}

impl From<Scope> for u8 {
    fn from(scope: Scope) -> Self {
        match scope {
            Scope::Universe => 0,
            Scope::Link => 253,
            Scope::Host => 254,
            Scope::Other(other) => other,
        }
    }
}

/// An address of a link.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Address {
    /// Index of the link.
    pub link: u32,
    /// The address with the length of its prefix; host bits are kept.
    pub net: IpNet,
    /// Validity; the kernel chooses it for IPv6 by itself.
    pub scope: Scope,
    /// IPv6: used at once, without duplicate detection (which takes two seconds).
    pub no_dad: bool,
    /// No route to the prefix is made.
    pub no_prefix_route: bool,
    /// Read only, IPv6: duplicate detection still runs, or found a duplicate.
    pub tentative: bool,
}

impl Address {
    /// An address usable at once that makes no route of its own.
    pub fn plain(link: u32, net: IpNet) -> Self {
        Self { link, net, scope: Scope::Universe, no_dad: true, no_prefix_route: true, tentative: false }
    }
}

impl Handle {
    /// All addresses of the namespace.
    ///
    /// # Errors
    /// See [`Error`](crate::Error).
    pub fn addresses(&mut self) -> Result<Vec<Address>> {
        let answers = self.dump("addresses", RouteNetlinkMessage::GetAddress(AddressMessage::default()))?;
        Ok(answers.iter().filter_map(address_of).collect())
    }

    /// Gives a link an address, or changes the flags of one it has.
    ///
    /// # Errors
    /// [`Error::NoSuchLink`](crate::Error::NoSuchLink) if the link is gone.
    pub fn replace_address(&mut self, address: &Address) -> Result<()> {
        let message = RouteNetlinkMessage::NewAddress(message(address));
        self.request(&object(address), message, CREATE | REPLACE)
    }

    /// Takes an address from a link. Already gone is success.
    ///
    /// # Errors
    /// See [`Error`](crate::Error).
    pub fn delete_address(&mut self, link: u32, net: IpNet) -> Result<()> {
        let address = Address::plain(link, net);
        let message = RouteNetlinkMessage::DelAddress(message(&address));
        gone_is_fine(self.request(&object(&address), message, 0))
    }
}

fn message(address: &Address) -> AddressMessage {
    let ip = address.net.addr();
    let mut flags = AddressFlags::empty();
    flags.set(AddressFlags::Nodad, address.no_dad && ip.is_ipv6());
    flags.set(AddressFlags::Noprefixroute, address.no_prefix_route);
    let mut message = AddressMessage::default();
    message.header.family = family(ip);
    message.header.prefix_len = address.net.prefix_len();
    message.header.flags = AddressHeaderFlags::from_bits_truncate(flags.bits() as u8);
    message.header.scope = AddressScope::from(u8::from(address.scope));
    message.header.index = address.link;
    // IPv4: `Local` is the address, `Address` the other end of a point-to-point link or the same again.
    message.attributes.push(AddressAttribute::Local(ip));
    message.attributes.push(AddressAttribute::Address(ip));
    message.attributes.push(AddressAttribute::Flags(flags));
    message
}

/// Reads an address out of an rtnetlink message.
pub(crate) fn address_of(message: &RouteNetlinkMessage) -> Option<Address> {
    let (RouteNetlinkMessage::NewAddress(message) | RouteNetlinkMessage::DelAddress(message)) = message else {
        return None;
    };
    let mut flags = AddressFlags::from_bits_truncate(message.header.flags.bits().into());
    let (mut local, mut other) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(ip) => local = Some(*ip),
            AddressAttribute::Address(ip) => other = Some(*ip),
            AddressAttribute::Flags(all) => flags = *all,
            _ => {}
        }
    }
    Some(Address {
        link: message.header.index,
        net: IpNet::new(local.or(other)?, message.header.prefix_len).ok()?,
        scope: Scope::from(u8::from(message.header.scope)),
        no_dad: flags.contains(AddressFlags::Nodad),
        no_prefix_route: flags.contains(AddressFlags::Noprefixroute),
        tentative: flags.intersects(AddressFlags::Tentative | AddressFlags::Dadfailed),
    })
}

/// The address family of an IP address.
pub(crate) fn family(ip: IpAddr) -> AddressFamily {
    if ip.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 }
}

fn object(address: &Address) -> String {
    format!("address {} of link number {}", address.net, address.link)
}
