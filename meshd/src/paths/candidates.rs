//! Candidates: outer addresses that may become endpoints. An address inside the mesh would loop, so none ever is one.

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use mesh_protocol::record::MAX_CANDIDATES;

/// What this node tells others, best first: what the operator says, then the addresses of its links, then the one the
/// keyserver sees. All but the operator's carry `port`, the UDP port of lane 0.
pub(crate) fn own_candidates(
    advertise: &[SocketAddr],
    underlay: &[IpAddr],
    observed: Option<IpAddr>,
    port: u16,
    mesh: &[IpNet],
) -> Vec<SocketAddr> {
    let found = underlay.iter().copied().chain(observed).map(|address| SocketAddr::new(address.to_canonical(), port));
    let found = found.filter(|candidate| leads_somewhere(candidate.ip()));
    let mut candidates: Vec<SocketAddr> = Vec::new();
    for candidate in advertise.iter().copied().chain(found) {
        let new = !candidates.contains(&candidate) && candidate.port() != 0;
        if new && outside(candidate.ip(), mesh) && candidates.len() < MAX_CANDIDATES {
            candidates.push(candidate);
        }
    }
    candidates
}

/// Those of a peer's candidates that this node may send to: not inside the mesh, and not itself.
pub(crate) fn usable(told: &[SocketAddr], own: &[IpAddr], mesh: &[IpNet]) -> Vec<SocketAddr> {
    let canonical = told.iter().map(|told| SocketAddr::new(told.ip().to_canonical(), told.port()));
    canonical
        .filter(|told| {
            let address = told.ip();
            leads_somewhere(address) && outside(address, mesh) && !own.contains(&address) && told.port() != 0
        })
        .take(MAX_CANDIDATES)
        .collect()
}

fn outside(address: IpAddr, mesh: &[IpNet]) -> bool {
    !mesh.iter().any(|prefix| prefix.contains(&address))
}

/// Whether an address means the same host to others: no loopback, link-local, multicast or wildcard.
fn leads_somewhere(address: IpAddr) -> bool {
    let local = match address {
        IpAddr::V4(v4) => v4.is_link_local() || v4.is_broadcast() || v4.octets()[0] == 0,
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    };
    !(local || address.is_loopback() || address.is_multicast() || address.is_unspecified())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    fn ips(texts: &[&str]) -> Vec<IpAddr> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    fn sockets(texts: &[&str]) -> Vec<SocketAddr> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    fn mesh() -> Vec<IpNet> {
        ["10.1.0.0/16", "fd00::/48"].iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn own_candidates_are_ordered_unique_and_outside_the_mesh() {
        let advertise = sockets(&["198.51.100.7:40000"]);
        let underlay = ips(&["192.0.2.1", "10.1.2.3", "127.0.0.1", "fe80::1", "2001:db8::1", "fd00::9"]);
        let observed = Some("::ffff:192.0.2.1".parse().unwrap());
        let got = own_candidates(&advertise, &underlay, observed, 7100, &mesh());
        assert_eq!(got, sockets(&["198.51.100.7:40000", "192.0.2.1:7100", "[2001:db8::1]:7100"]));
    }

    #[test]
    fn a_peer_cannot_send_us_in_circles() {
        let told = sockets(&["10.1.0.9:7100", "192.0.2.1:7100", "0.0.0.0:7100", "224.0.0.1:7100", "203.0.113.5:7100"]);
        let got = usable(&told, &ips(&["192.0.2.1"]), &mesh());
        assert_eq!(got, sockets(&["203.0.113.5:7100"]));
    }

    #[test]
    fn the_list_is_bounded() {
        let told: Vec<SocketAddr> = (1..200).map(|port| format!("203.0.113.5:{port}").parse().unwrap()).collect();
        assert_eq!(usable(&told, &[], &[]).len(), MAX_CANDIDATES);
        assert_eq!(own_candidates(&told, &[], None, 7100, &[]).len(), MAX_CANDIDATES);
    }
}
