//! What `meshctl` shows: the node, its peers, its routes.

pub(crate) mod device;

use std::time::Instant;

use mesh_dataplane::command::LanePair;
use mesh_dataplane::{PeerId, PeerSnapshot};
use mesh_protocol::local::{
    Alarm, KeyStatus, LanePairStatus, LocalError, LocalErrorCode, LocalReply, PeerStatus, RouteStatus, Status,
    TunnelStatus,
};

use crate::app::Node;
use crate::desired;
use crate::directory::evidence;
use crate::facts::PeerFacts;

/// The node's state.
pub(super) async fn status(node: &Node) -> Status {
    let snapshot = node.snapshot().await;
    let facts = node.facts();
    let report = node.control.report.borrow().clone();
    let (directory, own, keys) = (&facts.directory, &facts.directory.own, &facts.keys);
    let (now, wall) = (Instant::now(), crate::control::now().wall);
    let due = node.config.keys.due(own.node, keys.current.0, keys.promoted);
    let waiting_for = node.ready.waiting_for();
    let drops = snapshot.drops.iter().filter(|(_, count)| *count > 0);
    let mut alarms: Vec<Alarm> = report.alarms(now);
    alarms.extend(node.alarms.list(now));
    Status {
        version: env!("CARGO_PKG_VERSION").into(),
        mesh: directory.mesh_name.clone(),
        mesh_id: directory.mesh,
        node: own.node,
        name: own.name.clone(),
        cluster: own.cluster.clone(),
        addresses: own.addresses.clone(),
        pod_cidrs: own.pod_cidrs.clone(),
        pods: count(facts.pods.len()),
        ready: waiting_for.is_empty(),
        waiting_for,
        control: report.status(now),
        policy_version: directory.policy_version,
        keys: KeyStatus {
            seq: keys.seq,
            current: keys.current.0,
            previous: keys.previous.as_ref().map(|(epoch, _)| *epoch),
            spare: keys.spare_epoch,
            current_age: wall.saturating_sub(keys.promoted),
            rotates_in: due.map(|due| due.saturating_sub(wall)),
            published: report.published,
            sealed: node.state.is_sealing(),
        },
        identity: report.identity.clone(),
        device: device::status(node, &facts, &snapshot),
        peers_known: count(directory.peers.len()),
        peers_post_quantum: count(
            directory.peers.iter().filter(|peer| is_post_quantum(snapshot.peers.get(&PeerId(peer.number)))).count(),
        ),
        peers_up: count(snapshot.peers.values().filter(|peer| is_up(peer)).count()),
        uptime: now.saturating_duration_since(node.started).as_secs(),
        dropped: drops.map(|(reason, count)| (reason.as_str().to_owned(), count)).collect(),
        alarms,
    }
}

/// What somebody has to look at.
///
/// # Errors
/// The state directory cannot be listed.
pub(super) fn audit(node: &Node) -> Result<LocalReply, LocalError> {
    let now = Instant::now();
    let mut alarms = node.control.report.borrow().alarms(now);
    alarms.extend(node.alarms.list(now));
    let evidence = evidence::kept(&node.state);
    let evidence =
        evidence.map_err(|error| LocalError { code: LocalErrorCode::Internal, message: error.to_string() })?;
    Ok(LocalReply::Audit { alarms, evidence })
}

/// All peers, by name.
pub(super) async fn peers(node: &Node) -> Vec<PeerStatus> {
    let snapshot = node.snapshot().await;
    let directory = node.control.facts.borrow().clone();
    let acknowledged = node.control.report.borrow().acknowledged.clone();
    let status = |peer: &PeerFacts| PeerStatus {
        acknowledged_seq: acknowledged.get(&peer.node).copied(),
        ..peer_status(peer, snapshot.peers.get(&PeerId(peer.number)))
    };
    let mut peers: Vec<PeerStatus> = directory.peers.iter().map(status).collect();
    peers.sort_by(|a, b| a.name.as_str().cmp(b.name.as_str()));
    peers
}

fn peer_status(peer: &PeerFacts, seen: Option<&PeerSnapshot>) -> PeerStatus {
    let mut tunnels: Vec<_> = seen.map(|seen| seen.tunnels.clone()).unwrap_or_default();
    // The snapshot lists the best last.
    tunnels.reverse();
    tunnels.sort_by_key(|tunnel| !tunnel.sending);
    PeerStatus {
        node: peer.node,
        name: peer.name.clone(),
        cluster: peer.cluster.clone(),
        addresses: peer.addresses.clone(),
        pod_cidrs: peer.pod_cidrs.clone(),
        endpoint: seen.and_then(|seen| seen.endpoint).or_else(|| peer.candidates.first().copied()),
        up: seen.is_some_and(is_up),
        last_handshake: seen.and_then(|seen| seen.last_handshake).map(|age| age.as_secs()),
        received_bytes: seen.map_or(0, |seen| seen.traffic.rx_bytes),
        sent_bytes: seen.map_or(0, |seen| seen.traffic.tx_bytes),
        post_quantum: is_post_quantum(seen),
        post_quantum_required: peer.post_quantum,
        acknowledged_seq: None,
        lanes: peer.lanes.into(),
        blocked_lanes: seen.map(|seen| seen.blocked.iter().map(pair).collect()).unwrap_or_default(),
        tunnels: tunnels
            .into_iter()
            .map(|tunnel| TunnelStatus {
                lane: count(tunnel.lane),
                remote_lane: count(tunnel.remote_lane),
                local_epoch: tunnel.local_epoch,
                remote_epoch: tunnel.remote_epoch,
                confirmed: tunnel.confirmed,
                post_quantum: tunnel.preshared,
            })
            .collect(),
    }
}

/// Whether packets to a peer go by tunnels with preshared keys, on every pair of lanes. In a mesh those come from key offers only.
pub(crate) fn is_post_quantum(peer: Option<&PeerSnapshot>) -> bool {
    let tunnels = peer.map(|peer| peer.tunnels.as_slice()).unwrap_or_default();
    let mut sending = tunnels.iter().filter(|tunnel| tunnel.sending).peekable();
    sending.peek().is_some() && sending.all(|tunnel| tunnel.preshared)
}

fn pair(pair: &LanePair) -> LanePairStatus {
    LanePairStatus { local: count(pair.local), remote: count(pair.remote) }
}

/// Whether a session is live.
pub(super) fn is_up(peer: &PeerSnapshot) -> bool {
    peer.tunnels.iter().any(|tunnel| tunnel.confirmed)
}

/// All mesh routes, by prefix.
pub(super) fn routes(node: &Node) -> Vec<RouteStatus> {
    let facts = node.facts();
    let state = desired::host_state(&facts, &node.config);
    let device = &state.device;
    let (directory, own) = (&facts.directory, &facts.directory.own);
    let mut routes = Vec::new();
    for route in &state.routes {
        let kind = match &route.link {
            Some(link) if *link == device.name => "pool",
            Some(_) => "pod",
            None if own.pod_cidrs.contains(&route.prefix) => "own",
            // The twin of a pool: it is no way to anywhere.
            None => continue,
        };
        let pod = facts.pods.iter().find(|lease| lease.addresses.contains(&route.prefix.addr()));
        let pod =
            pod.filter(|_| kind == "pod").map(|lease| lease.pod.clone().unwrap_or(lease.attachment.container.clone()));
        let pool =
            directory.pools.iter().find(|pool| pool.prefix == route.prefix).and_then(|pool| pool.cluster.as_ref());
        let via = pod.or_else(|| pool.filter(|_| kind == "pool").map(ToString::to_string));
        routes.push(RouteStatus {
            prefix: route.prefix,
            kind: kind.into(),
            via,
            link: route.link.clone(),
            mtu: route.mtu,
        });
    }
    for peer in &directory.peers {
        let addresses = peer.addresses.iter().map(|ip| ipnet::IpNet::from(*ip));
        routes.extend(addresses.chain(peer.pod_cidrs.iter().copied()).map(|prefix| RouteStatus {
            prefix,
            kind: "peer".into(),
            via: Some(peer.name.to_string()),
            link: Some(device.name.clone()),
            mtu: Some(device.mtu),
        }));
    }
    routes.sort_by(|a, b| (a.prefix, &a.kind).cmp(&(b.prefix, &b.kind)));
    routes
}

fn count(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}
