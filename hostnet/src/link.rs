//! Links: list, make, change, delete.

use std::{fmt, os::fd::AsRawFd, str::FromStr};

use netlink_packet_route::{
    RouteNetlinkMessage,
    link::{
        AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InfoBridge, InfoData, InfoKind, InfoVeth, LinkAttribute,
        LinkExtentMask, LinkFlags, LinkInfo, LinkMessage,
    },
};

use crate::{
    Error, Handle, Result,
    error::gone_is_fine,
    netns::Netns,
    socket::{CREATE, EXCLUSIVE},
};

/// A hardware address; printed as `02:00:00:00:00:01`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mac(pub [u8; 6]);

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl FromStr for Mac {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let invalid = || Error::Invalid {
            object: format!("hardware address {text}"),
            reason: "six hexadecimal bytes are expected",
        };
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|part| part.len() == 2).ok_or_else(invalid)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| invalid())?;
        }
        if parts.next().is_some() {
            return Err(invalid());
        }
        Ok(Self(bytes))
    }
}

/// A link as the kernel describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// Number, unique in the namespace.
    pub index: u32,
    /// Name, unique in the namespace.
    pub name: String,
    /// Largest packet in bytes, without the link's own header.
    pub mtu: u32,
    /// Set up by the administrator (`IFF_UP`).
    pub up: bool,
    /// Able to carry packets (`IFF_RUNNING`).
    pub running: bool,
    /// The loopback device.
    pub loopback: bool,
    /// Group number; 0 unless set.
    pub group: u32,
    /// Free text set by [`LinkChange::alias`].
    pub alias: Option<String>,
    /// `veth`, `bridge`, `tun`, ...; `None` for hardware.
    pub kind: Option<String>,
    /// The bridge or bond it is a port of.
    pub master: Option<u32>,
    /// Index of its other end or lower link, in the namespace `peer_netns` if that is given.
    pub peer: Option<u32>,
    /// Number, in this namespace, of the namespace the other end is in.
    pub peer_netns: Option<i32>,
    /// Hardware address; `None` for links without one, such as a TUN device.
    pub mac: Option<Mac>,
}

/// One end of a veth pair to be made.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VethEnd {
    /// Name in its namespace; at most 15 bytes.
    pub name: String,
    /// MTU in bytes, the kernel's 1500 if `None`.
    pub mtu: Option<u32>,
    /// Link group, 0 if `None`.
    pub group: Option<u32>,
    /// Hardware address, random if `None`.
    pub mac: Option<Mac>,
}

impl VethEnd {
    /// An end with defaults.
    pub fn new(name: impl Into<String>) -> Self {
        Self { name: name.into(), ..Self::default() }
    }
}

/// What to change of a link; what is not named stays.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LinkChange {
    up: Option<bool>,
    attributes: Vec<LinkAttribute>,
}

impl LinkChange {
    /// Changes nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the link up.
    pub fn up(mut self) -> Self {
        self.up = Some(true);
        self
    }

    /// Sets the link down.
    pub fn down(mut self) -> Self {
        self.up = Some(false);
        self
    }

    /// Sets the MTU in bytes. Below 1280 the kernel removes all IPv6 addresses of the link.
    pub fn mtu(self, mtu: u32) -> Self {
        self.with(LinkAttribute::Mtu(mtu))
    }

    /// Sets how many packets may wait in front of the link; of a TUN device, in each of its queues.
    pub fn queue_length(self, packets: u32) -> Self {
        self.with(LinkAttribute::TxQueueLen(packets))
    }

    /// Puts the link into a group.
    pub fn group(self, group: u32) -> Self {
        self.with(LinkAttribute::Group(group))
    }

    /// Sets the free text; empty removes it.
    pub fn alias(self, alias: impl Into<String>) -> Self {
        self.with(LinkAttribute::IfAlias(alias.into()))
    }

    /// Makes the link a port of a bridge; 0 frees it.
    pub fn master(self, index: u32) -> Self {
        self.with(LinkAttribute::Controller(index))
    }

    /// Renames the link. Kernels before 6.2 want it down.
    pub fn name(self, name: impl Into<String>) -> Self {
        self.with(LinkAttribute::IfName(name.into()))
    }

    /// Sets the hardware address.
    pub fn mac(self, mac: Mac) -> Self {
        self.with(LinkAttribute::Address(mac.0.to_vec()))
    }

    /// Stops the kernel from giving the link an IPv6 link-local address when it comes up.
    pub fn no_ipv6_link_local(self) -> Self {
        let mode = AfSpecInet6::AddrGenMode(In6AddrGenMode::None);
        self.with(LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(vec![mode])]))
    }

    /// Moves the link into another namespace, where its index may differ. `netns` must stay open until the change is made.
    pub fn netns(self, netns: &Netns) -> Self {
        use std::os::fd::AsFd;
        self.with(LinkAttribute::NetNsFd(netns.as_fd().as_raw_fd()))
    }

    fn with(mut self, attribute: LinkAttribute) -> Self {
        self.attributes.push(attribute);
        self
    }
}

impl Handle {
    /// All links of the namespace, by index.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn links(&mut self) -> Result<Vec<Link>> {
        let mut request = LinkMessage::default();
        request.attributes.push(LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]));
        let answers = self.dump("links", RouteNetlinkMessage::GetLink(request))?;
        let mut links: Vec<Link> = answers.iter().filter_map(link_of).collect();
        links.sort_by_key(|link| link.index);
        Ok(links)
    }

    /// A link by name, `None` if there is none.
    ///
    /// # Errors
    /// [`Error::Invalid`] for an impossible name.
    pub fn link_by_name(&mut self, name: &str) -> Result<Option<Link>> {
        check_name(name)?;
        let mut request = LinkMessage::default();
        request.attributes.push(LinkAttribute::IfName(name.into()));
        self.one_link(&object(name), request)
    }

    /// A link by index, `None` if there is none.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn link_by_index(&mut self, index: u32) -> Result<Option<Link>> {
        self.one_link(&numbered(index), message(index))
    }

    fn one_link(&mut self, object: &str, mut request: LinkMessage) -> Result<Option<Link>> {
        request.attributes.push(LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]));
        match self.get(object, RouteNetlinkMessage::GetLink(request)) {
            Ok(answer) => Ok(answer.as_ref().and_then(link_of)),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Makes a veth pair, `near` here and `far` directly in `far_netns` (or here too), and gives the index of `near`.
    ///
    /// Both ends are down. No name is taken in this namespace for the far end, not even for a moment.
    ///
    /// # Errors
    /// [`Error::Exists`] if either name is taken, [`Error::Invalid`] for an impossible name.
    pub fn add_veth(&mut self, near: &VethEnd, far: &VethEnd, far_netns: Option<&Netns>) -> Result<u32> {
        let mut peer = end_message(far)?;
        peer.attributes.extend(far_netns.map(|netns| {
            use std::os::fd::AsFd;
            LinkAttribute::NetNsFd(netns.as_fd().as_raw_fd())
        }));
        let mut request = end_message(near)?;
        request.attributes.push(LinkAttribute::LinkInfo(vec![
            LinkInfo::Kind(InfoKind::Veth),
            LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(peer))),
        ]));
        let object = format!("veth pair {} and {}", near.name, far.name);
        self.create(&object, &near.name, request)
    }

    /// Makes a bridge, down and without spanning tree, and gives its index.
    ///
    /// # Errors
    /// [`Error::Exists`] if the name is taken, [`Error::Invalid`] for an impossible name.
    pub fn add_bridge(&mut self, name: &str) -> Result<u32> {
        check_name(name)?;
        let mut request = LinkMessage::default();
        request.attributes.push(LinkAttribute::IfName(name.into()));
        // Multicast snooping would hold back neighbour discovery until a querier is heard.
        request.attributes.push(LinkAttribute::LinkInfo(vec![
            LinkInfo::Kind(InfoKind::Bridge),
            LinkInfo::Data(InfoData::Bridge(vec![InfoBridge::MulticastSnooping(false)])),
        ]));
        self.create(&format!("bridge {name}"), name, request)
    }

    fn create(&mut self, object: &str, name: &str, request: LinkMessage) -> Result<u32> {
        self.request(object, RouteNetlinkMessage::NewLink(request), CREATE | EXCLUSIVE)?;
        let made = self.link_by_name(name)?;
        made.map(|link| link.index).ok_or_else(|| Error::NotFound { object: object.into() })
    }

    /// Changes a link.
    ///
    /// # Errors
    /// [`Error::NoSuchLink`] if it is gone. A change of several things may be done in part when it fails.
    pub fn change_link(&mut self, index: u32, change: &LinkChange) -> Result<()> {
        let mut request = message(index);
        if let Some(up) = change.up {
            request.header.change_mask = LinkFlags::Up;
            request.header.flags = if up { LinkFlags::Up } else { LinkFlags::empty() };
        }
        request.attributes.clone_from(&change.attributes);
        self.request(&numbered(index), RouteNetlinkMessage::SetLink(request), 0)
    }

    /// Deletes a link, and with one end of a veth pair the other. Already gone is success.
    ///
    /// # Errors
    /// [`Error::Refused`] for links that cannot be deleted, such as `lo`.
    pub fn delete_link(&mut self, index: u32) -> Result<()> {
        gone_is_fine(self.request(&numbered(index), RouteNetlinkMessage::DelLink(message(index)), 0))
    }

    /// Deletes a link by name. Already gone is success.
    ///
    /// # Errors
    /// As [`delete_link`](Self::delete_link).
    pub fn delete_link_by_name(&mut self, name: &str) -> Result<()> {
        check_name(name)?;
        let mut request = LinkMessage::default();
        request.attributes.push(LinkAttribute::IfName(name.into()));
        gone_is_fine(self.request(&object(name), RouteNetlinkMessage::DelLink(request), 0))
    }
}

/// Checks a link name as the kernel does (`dev_valid_name`).
///
/// # Errors
/// [`Error::Invalid`] if it is empty, longer than 15 bytes, or holds a slash, colon or space.
pub fn check_name(name: &str) -> Result<()> {
    let reason = if name.is_empty() || name.len() > 15 {
        "a link name has 1 to 15 bytes"
    } else if name == "."
        || name == ".."
        || name.contains(|c: char| c == '/' || c == ':' || c == '\0' || c.is_whitespace())
    {
        "a link name holds no slash, colon or space"
    } else {
        return Ok(());
    };
    Err(Error::Invalid { object: object(name), reason })
}

/// Reads a link out of an rtnetlink message.
pub(crate) fn link_of(message: &RouteNetlinkMessage) -> Option<Link> {
    let (RouteNetlinkMessage::NewLink(message) | RouteNetlinkMessage::DelLink(message)) = message else {
        return None;
    };
    let flags = message.header.flags;
    let mut link = Link {
        index: message.header.index,
        name: String::new(),
        mtu: 0,
        up: flags.contains(LinkFlags::Up),
        running: flags.contains(LinkFlags::Running),
        loopback: flags.contains(LinkFlags::Loopback),
        group: 0,
        alias: None,
        kind: None,
        master: None,
        peer: None,
        peer_netns: None,
        mac: None,
    };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name.clone_from(name),
            LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
            LinkAttribute::Group(group) => link.group = *group,
            LinkAttribute::IfAlias(alias) => link.alias = Some(alias.clone()),
            LinkAttribute::Controller(index) => link.master = Some(*index).filter(|index| *index != 0),
            LinkAttribute::Link(index) => link.peer = Some(*index),
            LinkAttribute::LinkNetNsId(id) => link.peer_netns = Some(*id),
            LinkAttribute::Address(bytes) => link.mac = bytes.as_slice().try_into().ok().map(Mac),
            LinkAttribute::LinkInfo(infos) => {
                link.kind = infos.iter().find_map(|info| match info {
                    LinkInfo::Kind(kind) => Some(kind.to_string()),
                    _ => None,
                });
            }
            _ => {}
        }
    }
    (!link.name.is_empty()).then_some(link)
}

fn end_message(end: &VethEnd) -> Result<LinkMessage> {
    check_name(&end.name)?;
    let mut message = LinkMessage::default();
    message.attributes.push(LinkAttribute::IfName(end.name.clone()));
    message.attributes.extend(end.mtu.map(LinkAttribute::Mtu));
    message.attributes.extend(end.group.map(LinkAttribute::Group));
    message.attributes.extend(end.mac.map(|mac| LinkAttribute::Address(mac.0.to_vec())));
    Ok(message)
}

fn message(index: u32) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message
}

fn object(name: &str) -> String {
    format!("link {name}")
}

fn numbered(index: u32) -> String {
    format!("link number {index}")
}
