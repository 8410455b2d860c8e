//! Routes as plain values that can be compared, so that a caller computes `desired - actual`.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    route::{
        RouteAddress, RouteAttribute, RouteFlags, RouteMessage, RouteMetric, RouteProtocol, RouteScope, RouteType,
    },
};

use crate::{
    Error, Handle, Result,
    address::{Scope, family},
    error::gone_is_fine,
    socket::{CREATE, REPLACE},
};

/// The routing table that is used when no other rule chose one.
pub const MAIN_TABLE: u32 = 254;
/// The metric an IPv6 route gets that names none.
const IPV6_METRIC: u32 = 1024;

/// What happens to a packet that a route matches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RouteKind {
    /// Sent on.
    #[default]
    Unicast,
    /// Answered with "destination unreachable".
    Unreachable,
    /// Dropped silently.
    Blackhole,
    /// Answered with "administratively prohibited".
    Prohibit,
    /// The lookup goes on with the next rule.
    Throw,
    /// Delivered here.
    Local,
    /// Another kernel number.
    Other(u8),
}

impl From<RouteKind> for RouteType {
    fn from(kind: RouteKind) -> Self {
        match kind {
            RouteKind::Unicast => Self::Unicast,
            RouteKind::Unreachable => Self::Unreachable,
            RouteKind::Blackhole => Self::BlackHole,
            RouteKind::Prohibit => Self::Prohibit,
            RouteKind::Throw => Self::Throw,
            RouteKind::Local => Self::Local,
            RouteKind::Other(number) => Self::from(number),
        }
    }
}

impl From<RouteType> for RouteKind {
    fn from(kind: RouteType) -> Self {
        match kind {
            RouteType::Unicast => Self::Unicast,
            RouteType::Unreachable => Self::Unreachable,
            RouteType::BlackHole => Self::Blackhole,
            RouteType::Prohibit => Self::Prohibit,
            RouteType::Throw => Self::Throw,
            RouteType::Local => Self::Local,
            other => Self::Other(other.into()),
        }
    }
}

/// One route. Two routes with equal [`key`](Self::key) cannot both be in the kernel.
///
/// Compare only [`normalised`](Self::normalised) values with what [`Handle::routes`] reads.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Route {
    /// Where to; host bits are cut.
    pub destination: IpNet,
    /// Routing table.
    pub table: u32,
    /// Who made it: the number that tells our routes from others'.
    pub protocol: u8,
    /// Preference among routes to the same destination, smaller first. IPv6 turns 0 into 1024.
    pub metric: u32,
    /// What happens to the packet.
    pub kind: RouteKind,
    /// How far the destination is; `Link` for what is reached without a gateway. IPv4 only.
    pub scope: Scope,
    /// Index of the link to send on.
    pub link: Option<u32>,
    /// Next hop.
    pub gateway: Option<IpAddr>,
    /// The gateway is on the link even if no route says so.
    pub onlink: bool,
    /// Source address chosen for packets of this host.
    pub preferred_source: Option<IpAddr>,
    /// Path MTU in bytes.
    pub mtu: Option<u32>,
    /// TCP segment size announced, in bytes.
    pub advmss: Option<u32>,
}

impl Route {
    /// A route through a link, without gateway.
    pub fn through(destination: IpNet, link: u32) -> Self {
        let scope = if destination.addr().is_ipv4() { Scope::Link } else { Scope::Universe };
        Self { kind: RouteKind::Unicast, scope, link: Some(link), ..Self::unreachable(destination) }
    }

    /// A route by a gateway, which a route to it must exist for unless [`onlink`](Self::onlink) is set.
    pub fn via(destination: IpNet, gateway: IpAddr) -> Self {
        Self { kind: RouteKind::Unicast, gateway: Some(gateway), ..Self::unreachable(destination) }
    }

    /// A route that answers "unreachable".
    pub fn unreachable(destination: IpNet) -> Self {
        Self {
            destination,
            table: MAIN_TABLE,
            protocol: 0,
            metric: 0,
            kind: RouteKind::Unreachable,
            scope: Scope::Universe,
            link: None,
            gateway: None,
            onlink: false,
            preferred_source: None,
            mtu: None,
            advmss: None,
        }
    }

    /// What a replacement replaces: table, destination, metric.
    pub fn key(&self) -> (u32, IpNet, u32) {
        let route = self.normalised();
        (route.table, route.destination, route.metric)
    }

    /// The form in which the kernel gives it back.
    pub fn normalised(&self) -> Self {
        let mut route = self.clone();
        route.destination = route.destination.trunc();
        let ipv6 = matches!(route.destination, IpNet::V6(_));
        if ipv6 && route.metric == 0 {
            route.metric = IPV6_METRIC;
        }
        if ipv6 || route.refuses() {
            route.scope = Scope::Universe;
        }
        if route.refuses() {
            // IPv6 reports `lo` for these.
            route.link = None;
            route.onlink = false;
        }
        route
    }

    fn refuses(&self) -> bool {
        matches!(self.kind, RouteKind::Unreachable | RouteKind::Blackhole | RouteKind::Prohibit | RouteKind::Throw)
    }
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind {
            RouteKind::Unicast => {}
            kind => write!(f, "{} ", format!("{kind:?}").to_lowercase())?,
        }
        write!(f, "{}", self.destination)?;
        if let Some(gateway) = self.gateway {
            write!(f, " via {gateway}")?;
        }
        if let Some(link) = self.link {
            write!(f, " link number {link}")?;
        }
        write!(f, " table {} metric {}", self.table, self.metric)
    }
}

/// Which routes to read. The kernel filters, so that a host with a full internet table costs nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RouteFilter {
    /// Only of this table.
    pub table: Option<u32>,
    /// Only of this protocol number.
    pub protocol: Option<u8>,
}

impl Handle {
    /// The routes of both families, [normalised](Route::normalised) and sorted. Cached and multipath routes are left out.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn routes(&mut self, filter: RouteFilter) -> Result<Vec<Route>> {
        let mut routes = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut request = RouteMessage::default();
            request.header.address_family = family;
            request.header.protocol = RouteProtocol::from(filter.protocol.unwrap_or(0));
            request.attributes.extend(filter.table.map(RouteAttribute::Table));
            match self.dump("routes", RouteNetlinkMessage::GetRoute(request)) {
                Ok(answers) => routes.extend(answers.iter().filter_map(route_of)),
                // A table without routes does not exist for the kernel; a host without IPv6 has none of it.
                Err(error) if error.is_not_found() || error.errno() == Some(nix::errno::Errno::EOPNOTSUPP) => {}
                Err(error) => return Err(error),
            }
        }
        // Kernels before 4.20 do not filter.
        routes.retain(|route| {
            filter.table.is_none_or(|table| route.table == table)
                && filter.protocol.is_none_or(|protocol| route.protocol == protocol)
        });
        routes.sort();
        Ok(routes)
    }

    /// Puts a route in, in place of the one with the same [`key`](Route::key).
    ///
    /// # Errors
    /// [`Error::NoSuchLink`] if its link is gone; [`Error::Refused`] with the kernel's reason, such as a gateway that
    /// cannot be reached or a link that is down.
    pub fn replace_route(&mut self, route: &Route) -> Result<()> {
        let message = RouteNetlinkMessage::NewRoute(message(route)?);
        self.request(&object(route), message, CREATE | REPLACE)
    }

    /// Removes the route of this destination, table, metric, kind and link. Already gone is success.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn delete_route(&mut self, route: &Route) -> Result<()> {
        let message = RouteNetlinkMessage::DelRoute(message(route)?);
        gone_is_fine(self.request(&object(route), message, 0))
    }
}

fn message(route: &Route) -> Result<RouteMessage> {
    let route = route.normalised();
    let destination = route.destination;
    let others = route.gateway.into_iter().chain(route.preferred_source);
    if let Some(_other) = others.into_iter().find(|ip| ip.is_ipv4() != destination.addr().is_ipv4()) {
        return Err(Error::Invalid { object: object(&route), reason: "its addresses are of two families" });
    }
    let mut message = RouteMessage::default();
    message.header.address_family = family(destination.addr());
    message.header.destination_prefix_length = destination.prefix_len();
    // Numbers above 255 go into the attribute alone.
    message.header.table = u8::try_from(route.table).unwrap_or(0);
    message.header.protocol = RouteProtocol::from(route.protocol);
    message.header.scope = RouteScope::from(u8::from(route.scope));
    message.header.kind = route.kind.into();
    if route.onlink {
        message.header.flags = RouteFlags::Onlink;
    }
    let attributes = &mut message.attributes;
    if destination.prefix_len() > 0 {
        attributes.push(RouteAttribute::Destination(RouteAddress::from(destination.addr())));
    }
    attributes.push(RouteAttribute::Table(route.table));
    if route.metric != 0 {
        attributes.push(RouteAttribute::Priority(route.metric));
    }
    attributes.extend(route.link.map(RouteAttribute::Oif));
    attributes.extend(route.gateway.map(|ip| RouteAttribute::Gateway(ip.into())));
    attributes.extend(route.preferred_source.map(|ip| RouteAttribute::PrefSource(ip.into())));
    let metrics: Vec<_> =
        route.mtu.map(RouteMetric::Mtu).into_iter().chain(route.advmss.map(RouteMetric::Advmss)).collect();
    if !metrics.is_empty() {
        attributes.push(RouteAttribute::Metrics(metrics));
    }
    Ok(message)
}

/// Reads a route out of an rtnetlink message.
pub(crate) fn route_of(message: &RouteNetlinkMessage) -> Option<Route> {
    let (RouteNetlinkMessage::NewRoute(message) | RouteNetlinkMessage::DelRoute(message)) = message else {
        return None;
    };
    let header = &message.header;
    if header.flags.contains(RouteFlags::Cloned) {
        return None;
    }
    let any = match header.address_family {
        AddressFamily::Inet => IpNet::V4(Ipv4Net::new(Ipv4Addr::UNSPECIFIED, header.destination_prefix_length).ok()?),
        AddressFamily::Inet6 => IpNet::V6(Ipv6Net::new(Ipv6Addr::UNSPECIFIED, header.destination_prefix_length).ok()?),
        _ => return None,
    };
    let mut route = Route {
        table: header.table.into(),
        protocol: header.protocol.into(),
        kind: header.kind.into(),
        scope: Scope::from(u8::from(header.scope)),
        onlink: header.flags.contains(RouteFlags::Onlink),
        ..Route::unreachable(any)
    };
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(address) => {
                route.destination = IpNet::new(ip_of(address)?, header.destination_prefix_length).ok()?;
            }
            RouteAttribute::Table(table) => route.table = *table,
            RouteAttribute::Priority(metric) => route.metric = *metric,
            RouteAttribute::Oif(link) => route.link = Some(*link),
            RouteAttribute::Gateway(address) => route.gateway = Some(ip_of(address)?),
            RouteAttribute::PrefSource(address) => route.preferred_source = Some(ip_of(address)?),
            RouteAttribute::MultiPath(_) => return None,
            RouteAttribute::Metrics(metrics) => read_metrics(metrics, &mut route),
            _ => {}
        }
    }
    Some(route.normalised())
}

fn read_metrics(metrics: &[RouteMetric], route: &mut Route) {
    for metric in metrics {
        match metric {
            RouteMetric::Mtu(mtu) => route.mtu = Some(*mtu),
            RouteMetric::Advmss(advmss) => route.advmss = Some(*advmss),
            _ => {}
        }
    }
}

fn ip_of(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(ip) => Some(IpAddr::V4(*ip)),
        RouteAddress::Inet6(ip) => Some(IpAddr::V6(*ip)),
        _ => None,
    }
}

fn object(route: &Route) -> String {
    format!("route {route}")
}
