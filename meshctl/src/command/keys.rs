//! `meshctl keys rotate`: nodes promote their spare WireGuard keys, without losing a packet.

use std::time::{Duration, Instant};

use anyhow::bail;
use mesh_protocol::admin::{AdminReply, AdminRequest, RotationFailure};
use mesh_protocol::id::Name;
use mesh_protocol::local::{LocalReply, LocalRequest};
use serde::Serialize;

use super::{Context, millis, parse_duration, unexpected};
use crate::client::{ClientError, Conversation, PATIENCE};
use crate::output::{self, Progress};

const HELP: &str = "\
Examples:
  meshctl keys rotate
  meshctl keys rotate --node n1 --node n2
  meshctl keys rotate --local";

const ROTATE_HELP: &str = "\
Through the keyserver's admin socket all nodes rotate, or the named ones. With --local, or where no admin socket is, \
this node alone rotates, through meshd.

Examples:
  meshctl keys rotate
  meshctl keys rotate --node n1 --node n2 --wait 2m
  meshctl keys rotate --local --force

JSON, through the keyserver: {\"scope\": \"mesh\", \"total\", \"promoted\": [..], \"confirmed\": [..], \"failed\": \
[{\"node\", \"error\"}], \"offline\": [..], \"millis\", \"done\"}
JSON, this node: {\"scope\": \"node\", \"epoch\", \"peers\", \"confirmed\", \"done\"}
Exit status: 0 if every connected node that was asked has rotated and all peers use the new key";

/// Rotate the keys of nodes
#[derive(Debug, clap::Subcommand)]
#[command(after_help = HELP)]
pub(crate) enum Verb {
    Rotate(Rotate),
}

/// Promote the spare keys of all nodes, of some, or of this one
#[derive(Debug, clap::Args)]
#[command(after_help = ROTATE_HELP)]
pub(crate) struct Rotate {
    /// Name or id of a node; repeat it for several
    #[arg(long = "node", value_name = "NODE", conflicts_with = "local")]
    nodes: Vec<String>,
    /// This node only, through meshd
    #[arg(long)]
    local: bool,
    /// Also nodes whose previous key still answers for peers that were away
    #[arg(long)]
    force: bool,
    /// How long to wait for the others to follow; the rotation itself goes on
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = parse_duration)]
    wait: Duration,
}

pub(crate) fn run(verb: Verb, context: &Context) -> anyhow::Result<()> {
    let Verb::Rotate(args) = verb;
    if args.local {
        return rotate_node(&args, context);
    }
    let request = AdminRequest::Rotate { nodes: args.nodes.clone(), force: args.force, wait: millis(args.wait) };
    match Conversation::start(&context.admin_socket, &request) {
        Ok(conversation) => rotate_mesh(&args, conversation, context),
        Err(ClientError::NoSocket { .. }) if args.nodes.is_empty() => {
            output::note("no keyserver on this machine: rotating this node only");
            rotate_node(&args, context)
        }
        Err(error) => Err(error.into()),
    }
}

#[derive(Debug, Serialize)]
struct MeshRotation {
    scope: &'static str,
    total: u32,
    promoted: Vec<Name>,
    confirmed: Vec<Name>,
    failed: Vec<RotationFailure>,
    offline: Vec<Name>,
    millis: u64,
    done: bool,
}

impl TryFrom<AdminReply> for MeshRotation {
    type Error = anyhow::Error;

    fn try_from(reply: AdminReply) -> anyhow::Result<Self> {
        match reply {
            AdminReply::Rotation { total, promoted, confirmed, failed, offline, millis, done } => {
                Ok(Self { scope: "mesh", total, promoted, confirmed, failed, offline, millis, done })
            }
            other => Err(unexpected(other)),
        }
    }
}

impl MeshRotation {
    /// Connected nodes that were asked, did not refuse, and are not yet known everywhere with the new key.
    fn missing(&self) -> usize {
        (self.total as usize).saturating_sub(self.confirmed.len() + self.failed.len() + self.offline.len())
    }

    fn text(&self) -> String {
        let total = output::plural(self.total as usize, "node", "nodes");
        let mut text =
            format!("{} of {total} rotated, all others know after {} ms\n", self.confirmed.len(), self.millis);
        if self.missing() > 0 {
            let promoted = self.promoted.len();
            text = format!("{promoted} of {total} rotated, {} known everywhere so far\n", self.confirmed.len());
        }
        for failure in &self.failed {
            text.push_str(&output::visible(&format!("{} refused: {}", failure.node, failure.error)));
            text.push('\n');
        }
        if !self.offline.is_empty() {
            text.push_str(&format!("not connected, so not rotated: {}\n", output::list(&self.offline)));
        }
        text
    }
}

fn rotate_mesh(args: &Rotate, mut conversation: Conversation<AdminReply>, context: &Context) -> anyhow::Result<()> {
    let mut progress = Progress::new(context.json);
    let rotation = loop {
        let rotation = MeshRotation::try_from(conversation.next(args.wait + PATIENCE)?)?;
        if rotation.done {
            break rotation;
        }
        let expected = (rotation.total as usize).saturating_sub(rotation.failed.len() + rotation.offline.len());
        progress.update(
            rotation.confirmed.len(),
            expected,
            &format!("confirmed, {} promoted", rotation.promoted.len()),
        );
    };
    drop(progress);
    context.show(&rotation, || rotation.text())?;
    if let Some(first) = rotation.failed.first() {
        let count = output::plural(rotation.failed.len(), "node", "nodes");
        bail!("{count} did not rotate; {}: {}", first.node, first.error);
    }
    if rotation.missing() > 0 {
        let count = output::plural(rotation.missing(), "node", "nodes");
        let wait = humantime::format_duration(args.wait);
        bail!("{count} not confirmed everywhere within {wait}; it goes on by itself, see meshctl node list");
    }
    if !args.nodes.is_empty() && !rotation.offline.is_empty() {
        bail!("not connected: {}; rotate again when they are back", output::list(&rotation.offline));
    }
    Ok(())
}

#[derive(Debug, Serialize)]
struct NodeRotation {
    scope: &'static str,
    epoch: u64,
    peers: u32,
    confirmed: u32,
    done: bool,
}

fn rotate_node(args: &Rotate, context: &Context) -> anyhow::Result<()> {
    let deadline = Instant::now() + args.wait;
    let mut conversation =
        Conversation::<LocalReply>::start(&context.socket, &LocalRequest::Rotate { force: args.force })?;
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
        let wait = humantime::format_duration(args.wait);
        bail!("not all peers follow within {wait}; it goes on by itself, see meshctl peers");
    }
    Ok(())
}
