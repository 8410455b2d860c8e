//! `meshctl peers`: all peers of this node.

use std::collections::BTreeSet;

use mesh_protocol::local::{LocalReply, LocalRequest, PeerStatus, TunnelStatus};

use super::{Context, unexpected};
use crate::output::{self, Table};

const HELP: &str = "\
Examples:
  meshctl peers
  meshctl peers --json

JSON: {\"peers\": [{\"node\", \"name\", \"cluster\", \"addresses\", \"pod_cidrs\", \"endpoint\", \"up\", \"last_handshake\", \
\"received_bytes\", \"sent_bytes\", \"post_quantum\", \"post_quantum_required\", \"lanes\", \"blocked_lanes\", \
\"tunnels\": [{\"lane\", \"remote_lane\", \"local_epoch\", \"remote_epoch\", \"confirmed\", \"post_quantum\"}]}]}";

/// List the peers of this node
#[derive(Debug, clap::Args)]
#[command(after_help = HELP)]
pub(crate) struct Args {}

pub(crate) fn run(_: &Args, context: &Context) -> anyhow::Result<()> {
    let peers = match context.ask_node(&LocalRequest::Peers)? {
        LocalReply::Peers { peers } => peers,
        other => return Err(unexpected(other)),
    };
    context.show(&serde_json::json!({ "peers": peers }), || text(&peers))
}

fn text(peers: &[PeerStatus]) -> String {
    let mut table = Table::new([
        "NAME",
        "CLUSTER",
        "UP",
        "ENDPOINT",
        "HANDSHAKE",
        "RECEIVED",
        "SENT",
        "KEYS",
        "PQ",
        "LANES",
        "ADDRESSES",
        "POD CIDRS",
    ]);
    for peer in peers {
        let handshake = peer.last_handshake.map(|age| format!("{} ago", output::seconds(age)));
        table.row([
            peer.name.to_string(),
            peer.cluster.to_string(),
            if peer.up { "yes" } else { "no" }.to_owned(),
            output::maybe(peer.endpoint),
            output::maybe(handshake),
            output::bytes(peer.received_bytes),
            output::bytes(peer.sent_bytes),
            keys(peer),
            post_quantum(peer).to_owned(),
            lanes(peer),
            output::list(&peer.addresses),
            output::list(&peer.pod_cidrs),
        ]);
    }
    table.render()
}

/// Whether a recording of the traffic stays closed to a quantum computer.
fn post_quantum(peer: &PeerStatus) -> &'static str {
    let plain_in_use = || peer.tunnels.iter().any(|tunnel| tunnel.confirmed && !tunnel.post_quantum);
    match (peer.post_quantum, peer.post_quantum_required) {
        (true, _) => "yes",
        (false, true) if plain_in_use() => "turning",
        (false, true) => "required",
        (false, false) => "off",
    }
}

/// How many lanes it has, and which pairs, ours and theirs, do not get through: their flows use lane 0.
fn lanes(peer: &PeerStatus) -> String {
    let blocked: Vec<String> =
        peer.blocked_lanes.iter().map(|pair| format!("{}-{}", pair.local, pair.remote)).collect();
    match blocked.as_slice() {
        [] => peer.lanes.to_string(),
        blocked => format!("{} ({} blocked: by lane 0)", peer.lanes, blocked.join(" ")),
    }
}

/// Epochs of the tunnel in use, ours and theirs, and how many more pairs of epochs have tunnels.
fn keys(peer: &PeerStatus) -> String {
    let Some(first) = peer.tunnels.first() else {
        return "-".to_owned();
    };
    let epochs = |tunnel: &TunnelStatus| (tunnel.local_epoch, tunnel.remote_epoch);
    let all: BTreeSet<_> = peer.tunnels.iter().map(epochs).collect();
    let more = all.len() - 1;
    let unconfirmed = if first.confirmed { "" } else { "?" };
    let tail = if more > 0 { format!(" +{more}") } else { String::new() };
    format!("{}/{}{unconfirmed}{tail}", first.local_epoch, first.remote_epoch)
}
