//! `meshctl keys`: nodes promote their spare WireGuard keys, or take another identity key, without losing a packet.

mod identity;
mod jobs;
mod local;

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::bail;
use mesh_protocol::admin::{
    AdminReply, AdminRequest, LONGEST_WAIT, PlannedRotation, RotationChange, RotationFailure, RotationOrder,
};
use mesh_protocol::id::Name;
use serde::Serialize;

use super::{Context, millis, parse_duration, unexpected};
use crate::client::{ClientError, Conversation, PATIENCE};
use crate::output::{self, Progress, Table};

const HELP: &str = "\
Examples:
  meshctl keys rotate
  meshctl keys rotate --cluster east --wave 10%
  meshctl keys rotate --local
  meshctl keys rotate --identity
  meshctl keys status
  meshctl keys pause";

const ROTATE_HELP: &str = "\
Through the keyserver's admin socket all nodes rotate, or the named ones, or those of a cluster. The rotation is a job of \
the keyserver: it goes on when this command ends, and after any restart. With --local, or where no admin socket is, this \
node alone rotates, through meshd.

A node promotes its own spare key, and no key leaves it. It refuses while its previous key still answers for peers that \
were away, unless forced, and when a keyserver asks too often.

With --identity this node replaces the key that it signs with and that it shows the keyserver, through meshd. Name, addresses \
and tunnels stay. Where the mesh's issuer signs elsewhere the new key waits for it (meshctl grant), and the command waits \
only with --wait.

Examples:
  meshctl keys rotate
  meshctl keys rotate --node n1 --node n2 --wait 2m
  meshctl keys rotate --all --wave 10%
  meshctl keys rotate --cluster east --dry-run
  meshctl keys rotate --at 2030-01-31T03:00:00Z
  meshctl keys rotate --every 7d --wave 5%
  meshctl keys rotate --local --force
  meshctl keys rotate --identity

JSON, through the keyserver: {\"scope\": \"mesh\", \"job\", \"wave\", \"waves\", \"total\", \"promoted\": [..], \
\"confirmed\": [..], \"failed\": [{\"node\", \"error\"}], \"offline\": [..], \"millis\", \"done\"}
JSON, with --dry-run: {\"scope\": \"plan\", \"nodes\": [{\"node\", \"wave\", \"connected\", \"epoch\", \"previous\"}]}
JSON, this node: {\"scope\": \"node\", \"epoch\", \"peers\", \"confirmed\", \"done\"}
JSON, with --identity: {\"scope\": \"identity\", \"from\", \"to\", \"phase\": \"settled\", \"asking\", \"waiting\", \"refused\" or \
\"publishing\", \"error\", \"peers\", \"confirmed\", \"done\"}
Exit status: 0 if every connected node that was asked has rotated and all peers use the new key, or the job is for later";

const STATUS_HELP: &str = "\
On the keyserver's machine: jobs, and of each node how far its newest key is: promoted (in the directory), confirmed (in \
force at every connected node), retired (the key before is wiped). With --local, or where no admin socket is: this node, and \
how far each peer is.

Examples:
  meshctl keys status
  meshctl keys status --local

JSON, through the keyserver: {\"scope\": \"mesh\", \"jobs\": [{\"job\", \"state\", \"whom\", \"wave\", \"waves\", \
\"every\", \"next\", \"began\", \"ended\", \"total\", \"promoted\", \"confirmed\", \"failed\", \"offline\", ..}], \
\"nodes\": [{\"name\", \"node\", \"cluster\", \"connected\", \"epoch\", \"phase\", \"jobs\"}]}
JSON, this node: {\"scope\": \"node\", \"current\", \"previous\", \"spare\", \"age\", \"rotates_in\", \"published\", \
\"peers\": [{\"name\", \"phase\", \"local_epoch\", \"remote_epoch\", \"tunnels\"}]}";

const PAUSE_HELP: &str = "\
Nodes that were asked already go on; no further one is asked.

Examples:
  meshctl keys pause
  meshctl keys pause 3";

const RESUME_HELP: &str = "\
Examples:
  meshctl keys resume
  meshctl keys resume 3";

const CANCEL_HELP: &str = "\
Nodes that were asked already go on; a rotation cannot be taken back. A job that begins again and again ends for good.

Examples:
  meshctl keys cancel 3";

/// How long `rotate` waits unless told otherwise.
const DEFAULT_WAIT: Duration = Duration::from_secs(60);

/// Rotate the keys of nodes
#[derive(Debug, clap::Subcommand)]
#[command(after_help = HELP)]
pub(crate) enum Verb {
    Rotate(Rotate),
    Status(Status),
    Pause(Pause),
    Resume(Resume),
    Cancel(Cancel),
}

/// Promote the spare keys of all nodes, of some, or of this one
#[derive(Debug, clap::Args)]
#[command(after_help = ROTATE_HELP)]
pub(crate) struct Rotate {
    /// Name or id of a node; repeat it for several
    #[arg(long = "node", value_name = "NODE", conflicts_with = "local")]
    nodes: Vec<String>,
    /// All nodes of a cluster
    #[arg(long, value_name = "CLUSTER", conflicts_with_all = ["local", "nodes"])]
    cluster: Option<Name>,
    /// All nodes, which is what happens without this too
    #[arg(long, conflicts_with_all = ["local", "nodes", "cluster"])]
    all: bool,
    /// This node only, through meshd
    #[arg(long)]
    local: bool,
    /// This node's identity key instead of its WireGuard keys
    #[arg(long, conflicts_with_all = ["nodes", "cluster", "all", "force", "at", "every", "wave", "dry_run"])]
    identity: bool,
    /// Also nodes whose previous key still answers for peers that were away
    #[arg(long)]
    force: bool,
    /// Begin then: a time in UTC like 2030-01-31T03:00:00Z, or how long from now, like 2h
    #[arg(long, value_name = "TIME", conflicts_with = "local", value_parser = parse_time)]
    at: Option<u64>,
    /// Begin again so long after the end of the round before
    #[arg(long, value_name = "TIME", conflicts_with = "local", value_parser = parse_duration)]
    every: Option<Duration>,
    /// Ask so many nodes in a hundred at a time; the next ones when these are through
    #[arg(long, value_name = "PERCENT", conflicts_with = "local", value_parser = parse_percent)]
    wave: Option<u8>,
    /// Say what would happen, and in which order
    #[arg(long, conflicts_with = "local")]
    dry_run: bool,
    /// How long to wait for the others to follow; the rotation itself goes on [default: 60s]
    #[arg(long, value_name = "TIME", default_missing_value = "1day", num_args = 0..=1, value_parser = parse_duration)]
    wait: Option<Duration>,
}

/// Show rotations, and how far the keys of nodes are
#[derive(Debug, clap::Args)]
#[command(after_help = STATUS_HELP)]
pub(crate) struct Status {
    /// This node and its peers, through meshd
    #[arg(long)]
    local: bool,
}

/// Hold rotations: no further node is asked
#[derive(Debug, clap::Args)]
#[command(after_help = PAUSE_HELP)]
pub(crate) struct Pause {
    /// Number of the job; without it, all
    job: Option<u64>,
}

/// Let rotations go on that were held
#[derive(Debug, clap::Args)]
#[command(after_help = RESUME_HELP)]
pub(crate) struct Resume {
    /// Number of the job; without it, all
    job: Option<u64>,
}

/// End a rotation: no further node is asked, now or later
#[derive(Debug, clap::Args)]
#[command(after_help = CANCEL_HELP)]
pub(crate) struct Cancel {
    /// Number of the job
    job: u64,
}

/// Seconds since 1970 of a time, or of now and a duration.
fn parse_time(text: &str) -> Result<u64, String> {
    let time = match humantime::parse_duration(text) {
        Ok(later) => SystemTime::now().checked_add(later).ok_or("that is too far away")?,
        Err(_) => humantime::parse_rfc3339_weak(text)
            .map_err(|error| format!("{error}; write it like 2030-01-31T03:00:00Z, or like 2h"))?,
    };
    time.duration_since(UNIX_EPOCH).map(|since| since.as_secs()).map_err(|_| "that is before 1970".to_owned())
}

fn parse_percent(text: &str) -> Result<u8, String> {
    let number = text.strip_suffix('%').unwrap_or(text).parse::<u8>().ok();
    number.filter(|percent| (1..=100).contains(percent)).ok_or_else(|| "it is 1% to 100%".to_owned())
}

pub(crate) fn run(verb: Verb, context: &Context) -> anyhow::Result<()> {
    match verb {
        Verb::Rotate(args) => rotate(&args, context),
        Verb::Status(args) => jobs::status(args.local, context),
        Verb::Pause(args) => jobs::change(args.job, RotationChange::Pause, context),
        Verb::Resume(args) => jobs::change(args.job, RotationChange::Resume, context),
        Verb::Cancel(args) => jobs::change(Some(args.job), RotationChange::Cancel, context),
    }
}

fn rotate(args: &Rotate, context: &Context) -> anyhow::Result<()> {
    if args.identity {
        return identity::rotate(args.wait, context);
    }
    if args.local {
        return local::rotate(args.force, args.wait(), context);
    }
    let order = args.order();
    // Only this is also a wish for this node.
    let plain = order == RotationOrder { force: args.force, ..RotationOrder::default() } && !args.all;
    let request = AdminRequest::Rotate { order, wait: millis(args.wait()) };
    match Conversation::start(&context.admin_socket, &request) {
        Ok(conversation) if args.dry_run => plan(conversation, context),
        Ok(conversation) => rotate_mesh(args, conversation, context),
        Err(ClientError::NoSocket { .. }) if plain => {
            output::note("no keyserver on this machine: rotating this node only");
            local::rotate(args.force, args.wait(), context)
        }
        Err(error) => Err(error.into()),
    }
}

impl Rotate {
    fn wait(&self) -> Duration {
        self.wait.unwrap_or(DEFAULT_WAIT)
    }

    fn order(&self) -> RotationOrder {
        RotationOrder {
            nodes: self.nodes.clone(),
            cluster: self.cluster.clone(),
            force: self.force,
            at: self.at,
            every: self.every.map(|every| every.as_secs()),
            wave: self.wave,
            dry_run: self.dry_run,
        }
    }
}

fn plan(mut conversation: Conversation<AdminReply>, context: &Context) -> anyhow::Result<()> {
    let nodes = match conversation.next(PATIENCE)? {
        AdminReply::RotationPlan { nodes } => nodes,
        other => return Err(unexpected(other)),
    };
    context.show(&serde_json::json!({ "scope": "plan", "nodes": nodes }), || plan_text(&nodes))
}

fn plan_text(nodes: &[PlannedRotation]) -> String {
    let mut table = Table::new(["WAVE", "NODE", "KEY", "REMARK"]);
    for node in nodes {
        let remark = match (node.connected, node.previous) {
            (false, _) => "not connected: asked when it comes".to_owned(),
            (true, Some(previous)) => format!("epoch {previous} still answers: refuses without --force"),
            (true, None) => String::new(),
        };
        table.row([node.wave.to_string(), node.node.to_string(), output::maybe(node.epoch), remark]);
    }
    table.render()
}

#[derive(Debug, Serialize)]
struct MeshRotation {
    scope: &'static str,
    job: u64,
    wave: u32,
    waves: u32,
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
            AdminReply::Rotation { job, wave, waves, total, promoted, confirmed, failed, offline, millis, done } => {
                let scope = "mesh";
                Ok(Self { scope, job, wave, waves, total, promoted, confirmed, failed, offline, millis, done })
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

    fn show_in(&self, progress: &mut Progress) {
        let expected = (self.total as usize).saturating_sub(self.failed.len() + self.offline.len());
        let wave = if self.waves > 1 { format!(", wave {} of {}", self.wave, self.waves) } else { String::new() };
        progress.update(self.confirmed.len(), expected, &format!("confirmed, {} promoted{wave}", self.promoted.len()));
    }

    fn text(&self) -> String {
        if self.waves == 0 {
            return format!("rotation {} has nobody to ask yet: see meshctl keys status\n", self.job);
        }
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
    let deadline = Instant::now() + args.wait();
    let mut progress = Progress::new(context.json);
    let rotation = loop {
        let rotation = MeshRotation::try_from(conversation.next(args.wait() + PATIENCE)?)?;
        rotation.show_in(&mut progress);
        let left = deadline.saturating_duration_since(Instant::now());
        if !rotation.done {
            continue;
        }
        if rotation.missing() == 0 || left.is_zero() || rotation.millis < millis(LONGEST_WAIT) {
            break rotation;
        }
        let request = AdminRequest::RotationFollow { job: rotation.job, wait: millis(left) };
        conversation = Conversation::start(&context.admin_socket, &request)?;
    };
    drop(progress);
    context.show(&rotation, || rotation.text())?;
    if let Some(first) = rotation.failed.first() {
        let count = output::plural(rotation.failed.len(), "node", "nodes");
        bail!("{count} did not rotate; {}: {}", first.node, first.error);
    }
    if rotation.missing() > 0 {
        let count = output::plural(rotation.missing(), "node", "nodes");
        let wait = humantime::format_duration(args.wait());
        bail!(
            "{count} not confirmed everywhere within {wait}; rotation {} goes on by itself, see meshctl keys status",
            rotation.job
        );
    }
    if !args.nodes.is_empty() && !rotation.offline.is_empty() {
        bail!("not connected: {}; rotate again when they are back", output::list(&rotation.offline));
    }
    Ok(())
}
