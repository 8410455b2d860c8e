//! `meshctl keys rotate --local` and `keys status --local`: this node alone, through meshd.

use std::time::{Duration, Instant};

use anyhow::bail;
use mesh_protocol::local::{LocalReply, LocalRequest, PeerStatus, Status};
use serde::Serialize;

use crate::client::{ClientError, Conversation};
use crate::command::{Context, unexpected};
use crate::output::{self, Progress, Table};

#[derive(Debug, Serialize)]
struct NodeRotation {
    scope: &'static str,
    epoch: u64,
    peers: u32,
    confirmed: u32,
    done: bool,
}

/// Promotes this node's spare key and waits for its peers to follow.
pub(super) fn rotate(force: bool, wait: Duration, context: &Context) -> anyhow::Result<()> {
    let deadline = Instant::now() + wait;
    let mut conversation = Conversation::<LocalReply>::start(&context.socket, &LocalRequest::Rotate { force })?;
    let mut progress = Progress::new(context.json);
    let mut newest: Option<NodeRotation> = None;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let reply = match conversation.next(left) {
            Err(ClientError::Timeout { .. }) if newest.is_some() => break,
            reply => reply?,
        };
        let LocalReply::Rotation { epoch, peers, confirmed, done } = reply else {
            return Err(unexpected(reply));
        };
        progress.update(confirmed as usize, peers as usize, &format!("peers use epoch {epoch}"));
        newest = Some(NodeRotation { scope: "node", epoch, peers, confirmed, done });
        if done {
            break;
        }
    }
    drop(progress);
    let Some(rotation) = newest else {
        bail!("meshd said nothing about the rotation; look at its log");
    };
    context.show(&rotation, || {
        format!(
            "epoch {} is current; {} of {} connected peers use it",
            rotation.epoch, rotation.confirmed, rotation.peers
        )
    })?;
    if !rotation.done {
        let wait = humantime::format_duration(wait);
        bail!("not all peers follow within {wait}; it goes on by itself, see meshctl peers");
    }
    Ok(())
}

/// This node's keys, and how far each peer follows.
#[derive(Debug, Serialize)]
struct KeysOfNode {
    scope: &'static str,
    current: u64,
    previous: Option<u64>,
    spare: u64,
    age: u64,
    rotates_in: Option<u64>,
    published: bool,
    peers: Vec<PeerKeys>,
}

#[derive(Debug, Serialize)]
struct PeerKeys {
    name: String,
    phase: &'static str,
    local_epoch: Option<u64>,
    remote_epoch: Option<u64>,
    tunnels: usize,
}

impl PeerKeys {
    /// How far `peer` is with our key of epoch `current`: `promoted`, no tunnel on it is known to work; `confirmed`, one
    /// is; `retired`, and none on an older key is left. `idle`: no tunnel at all.
    fn of(peer: &PeerStatus, current: u64) -> Self {
        let confirmed = peer.tunnels.iter().any(|tunnel| tunnel.confirmed && tunnel.local_epoch >= current);
        let older = peer.tunnels.iter().any(|tunnel| tunnel.local_epoch < current);
        let phase = match (peer.tunnels.is_empty(), confirmed, older) {
            (true, ..) => "idle",
            (false, false, _) => "promoted",
            (false, true, true) => "confirmed",
            (false, true, false) => "retired",
        };
        let used = peer.tunnels.first();
        Self {
            name: peer.name.to_string(),
            phase,
            local_epoch: used.map(|tunnel| tunnel.local_epoch),
            remote_epoch: used.map(|tunnel| tunnel.remote_epoch),
            tunnels: peer.tunnels.len(),
        }
    }
}

/// Shows this node's keys and how far each peer follows.
pub(super) fn status(context: &Context) -> anyhow::Result<()> {
    let node: Box<Status> = match context.ask_node(&LocalRequest::Status)? {
        LocalReply::Status(status) => status,
        other => return Err(unexpected(other)),
    };
    let peers = match context.ask_node(&LocalRequest::Peers)? {
        LocalReply::Peers { peers } => peers,
        other => return Err(unexpected(other)),
    };
    let keys = &node.keys;
    let shown = KeysOfNode {
        scope: "node",
        current: keys.current,
        previous: keys.previous,
        spare: keys.spare,
        age: keys.current_age,
        rotates_in: keys.rotates_in,
        published: keys.published,
        peers: peers.iter().map(|peer| PeerKeys::of(peer, keys.current)).collect(),
    };
    context.show(&shown, || text(&shown))
}

fn text(keys: &KeysOfNode) -> String {
    let previous = keys.previous.map(|epoch| format!(", previous {epoch} still answers")).unwrap_or_default();
    let next = keys.rotates_in.map_or_else(
        || "rotates on an operator's word only".to_owned(),
        |left| format!("rotates by itself in {}", output::seconds(left)),
    );
    let published = if keys.published { "" } else { ", NOT PUBLISHED yet" };
    let mut table = Table::new(["PEER", "PHASE", "OUR KEY", "ITS KEY", "TUNNELS"]);
    for peer in &keys.peers {
        table.row([
            peer.name.clone(),
            peer.phase.to_owned(),
            output::maybe(peer.local_epoch),
            output::maybe(peer.remote_epoch),
            peer.tunnels.to_string(),
        ]);
    }
    let age = output::seconds(keys.age);
    format!("epoch {} since {age}{previous}, spare {}{published}; {next}\n{}", keys.current, keys.spare, table.render())
}
