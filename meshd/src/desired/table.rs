//! The data plane's table: keys, peers, allowed IPs, endpoints.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use mesh_dataplane::table::Owner;
use mesh_dataplane::{
    Lanes, LocalKey, PeerId, PeerSpec, Preshared, PublicKey, RemoteKey, SecretKey, Table, TableError, TableSpec,
};
use mesh_protocol::key::{TunnelKey, TunnelSecret};

use crate::facts::{Facts, PeerFacts};

/// Tunnels on a new key are opened at this pace, so that a thousand handshakes do not begin in one moment.
const SPREAD_PER_PEER: Duration = Duration::from_millis(50);
/// The longest such spread.
const MAX_SPREAD: Duration = Duration::from_secs(120);

/// What the data plane should know. No peers while the node is cut off for longer than the policy allows.
pub(crate) fn table_spec(facts: &Facts, inner_mtu: u16) -> TableSpec {
    let directory = &facts.directory;
    let members: &[PeerFacts] = if directory.exposed { &[] } else { &directory.peers };
    let peers: Vec<PeerSpec> = members.iter().map(|peer| peer_spec(peer, facts)).collect();
    let count = u32::try_from(peers.len()).unwrap_or(u32::MAX);
    TableSpec {
        local_keys: local_keys(facts),
        peers,
        own_prefixes: own_prefixes(facts),
        inner_mtu,
        plain: false,
        rotation_spread: SPREAD_PER_PEER.saturating_mul(count).min(MAX_SPREAD),
    }
}

/// A peer the data plane does not take, and why. Never the reason to lose the others.
pub(crate) type Refused = (PeerId, TableError);

/// Builds the table; a peer that makes it invalid is left out and reported.
///
/// # Errors
/// [`TableError`] if the fault is none of a peer's.
pub(crate) fn checked_table(mut spec: TableSpec) -> Result<(Arc<Table>, Vec<Refused>), TableError> {
    let mut refused = Vec::new();
    loop {
        let error = match Table::new(spec.clone()) {
            Ok(table) => return Ok((Arc::new(table), refused)),
            Err(error) => error,
        };
        let Some(peer) = culprit(&error) else { return Err(error) };
        let before = spec.peers.len();
        spec.peers.retain(|spec| spec.id != peer);
        if spec.peers.len() == before {
            return Err(error);
        }
        refused.push((peer, error));
    }
}

/// The peer to leave out: of two that claim one thing, the second.
fn culprit(error: &TableError) -> Option<PeerId> {
    match error {
        TableError::PeerIdTooLarge(peer)
        | TableError::PeerIdTwice(peer)
        | TableError::NoRemoteKey(peer)
        | TableError::KeyTwice { peer, .. }
        | TableError::LowOrderKey { peer, .. }
        | TableError::BadEndpoint { peer, .. }
        | TableError::PrefixTwice { second: Owner::Peer(peer), .. } => Some(*peer),
        TableError::PrefixTwice { first: Owner::Peer(peer), .. } => Some(*peer),
        _ => None,
    }
}

fn local_keys(facts: &Facts) -> Vec<LocalKey> {
    let key =
        |(epoch, secret): &(u64, TunnelSecret)| LocalKey { epoch: *epoch, secret: SecretKey::new(*secret.bytes()) };
    std::iter::once(&facts.keys.current).chain(&facts.keys.previous).map(key).collect()
}

fn own_prefixes(facts: &Facts) -> Vec<IpNet> {
    let own = &facts.directory.own;
    own.addresses.iter().map(|ip| IpNet::from(*ip)).chain(own.pod_cidrs.iter().copied()).collect()
}

fn peer_spec(peer: &PeerFacts, facts: &Facts) -> PeerSpec {
    // The spare is accepted before the peer's promotion is heard of: the key and the news travel separate ways.
    let keys = [Some(&peer.current), Some(&peer.spare), peer.previous.as_ref()];
    let key = |(epoch, key): &(u64, TunnelKey)| RemoteKey { epoch: *epoch, public: PublicKey::new(*key.as_bytes()) };
    let addresses = peer.addresses.iter().map(|ip| IpNet::from(*ip));
    let endpoints = peer.candidates.iter().map(|endpoint| canonical(*endpoint));
    PeerSpec {
        id: PeerId(peer.number),
        keys: keys.into_iter().flatten().map(key).collect(),
        preshared: preshared(peer, facts),
        allowed_ips: addresses.chain(peer.pod_cidrs.iter().copied()).collect(),
        endpoints: endpoints.filter(|endpoint| may_be_endpoint(*endpoint, facts)).collect(),
        keepalive: None,
        lanes: Lanes::Each(lanes(peer.lanes)),
    }
}

/// With a post-quantum peer each tunnel has a key of its own, or there is none. Of two tunnels that the ends began at once, the
/// lower node's is preferred.
fn preshared(peer: &PeerFacts, facts: &Facts) -> Preshared {
    if peer.post_quantum {
        Preshared::Agreed { own_first: facts.directory.own.node < peer.node }
    } else {
        Preshared::None
    }
}

/// A record may name any number from 1 to 8; lanes are a power of two.
pub(crate) fn lanes(recorded: u8) -> u8 {
    1 << recorded.clamp(1, 8).ilog2()
}

/// An IPv4-mapped address as the IPv4 address it means.
fn canonical(endpoint: SocketAddr) -> SocketAddr {
    SocketAddr::new(endpoint.ip().to_canonical(), endpoint.port())
}

/// Refuses endpoints that would send datagrams back into the mesh, to ourselves or to nobody.
fn may_be_endpoint(endpoint: SocketAddr, facts: &Facts) -> bool {
    let ip = endpoint.ip();
    let own = &facts.directory.own;
    let nobody = ip.is_unspecified() || ip.is_multicast() || ip.is_loopback() || endpoint.port() == 0;
    let link_local = match ip {
        IpAddr::V4(ip) => ip.is_link_local() || ip.is_broadcast(),
        // Without a scope it leads nowhere.
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    };
    let in_nodes = facts.directory.pools.iter().any(|pool| pool.cluster.is_none() && pool.prefix.contains(&ip));
    let in_own_pods = own.pod_cidrs.iter().any(|cidr| cidr.contains(&ip));
    let ourselves = own.addresses.contains(&ip) || facts.host.underlay_addresses.contains(&ip);
    !(nobody || link_local || in_nodes || in_own_pods || ourselves)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::super::tests::{facts, peer};
    use super::*;

    #[test]
    fn keys_prefixes_and_endpoints_reach_the_table() {
        let facts = facts();
        let (table, refused) = checked_table(table_spec(&facts, 1420)).unwrap();
        assert!(refused.is_empty());
        assert_eq!(table.local_keys().iter().map(|key| key.epoch).collect::<Vec<_>>(), [2, 1]);
        let peer = table.peer(PeerId(7)).unwrap();
        assert_eq!(peer.keys.iter().map(|key| key.epoch).collect::<Vec<_>>(), [4, 5, 3]);
        assert_eq!(table.owner("10.2.7.3".parse().unwrap()), Some(Owner::Peer(PeerId(7))));
        assert_eq!(table.owner("10.1.1.3".parse().unwrap()), Some(Owner::Own));
        assert_eq!(table.owner("fd00:1::1".parse().unwrap()), Some(Owner::Own));
        assert_eq!(table.owner("10.2.8.3".parse().unwrap()), None);
        assert_eq!(table.rotation_spread(), Duration::from_millis(50));
    }

    #[test]
    fn a_post_quantum_peer_has_no_tunnel_without_a_key_of_its_own() {
        let mut facts = facts();
        let of = |facts: &Facts| table_spec(facts, 1420).peers[0].preshared.clone();
        assert_eq!(of(&facts), Preshared::None);
        Arc::make_mut(&mut facts.directory).peers[0].post_quantum = true;
        let own_first = facts.directory.own.node < facts.directory.peers[0].node;
        assert_eq!(of(&facts), Preshared::Agreed { own_first });
        let directory = Arc::make_mut(&mut facts.directory);
        std::mem::swap(&mut directory.own.node, &mut directory.peers[0].node);
        assert_eq!(of(&facts), Preshared::Agreed { own_first: !own_first }, "the other end says the opposite");
    }

    #[test]
    fn endpoints_that_lead_into_the_mesh_or_to_ourselves_are_refused() {
        let mut facts = facts();
        let bad = [
            "100.100.1.7:7100",
            "10.1.1.3:7100",
            "192.0.2.1:7100",
            "127.0.0.1:7100",
            "0.0.0.0:7100",
            "224.0.0.1:7100",
            "192.0.2.9:0",
            "[fe80::1]:7100",
            "[::1]:7100",
            "[::ffff:100.100.1.7]:7100",
        ];
        let good = ["192.0.2.9:7100", "10.2.200.1:7100", "[2001:db8::1]:7100"];
        let directory = Arc::make_mut(&mut facts.directory);
        directory.peers[0].candidates = bad.iter().chain(&good).map(|text| text.parse().unwrap()).collect();
        let spec = table_spec(&facts, 1420);
        let kept: Vec<String> = spec.peers[0].endpoints.iter().map(ToString::to_string).collect();
        assert_eq!(kept, good);
    }

    #[test]
    fn a_bad_peer_costs_only_itself() {
        let mut facts = facts();
        let directory = Arc::make_mut(&mut facts.directory);
        directory.peers = vec![peer(7), peer(8), peer(9)];
        directory.peers[1].pod_cidrs = directory.peers[0].pod_cidrs.clone();
        let (table, refused) = checked_table(table_spec(&facts, 1420)).unwrap();
        assert_eq!(refused.iter().map(|(peer, _)| peer.0).collect::<Vec<_>>(), [8]);
        assert_eq!(table.peers().iter().map(|peer| peer.id.0).collect::<Vec<_>>(), [7, 9]);
    }

    #[test]
    fn exposure_closes_all_tunnels_and_keeps_the_keys() {
        let mut facts = facts();
        Arc::make_mut(&mut facts.directory).exposed = true;
        let (table, _) = checked_table(table_spec(&facts, 1420)).unwrap();
        assert!(table.peers().is_empty());
        assert_eq!(table.local_keys().len(), 2);
    }
}
