//! `meshctl node`: the nodes of the mesh, as the keyserver sees them.

use std::time::Duration;

use anyhow::bail;
use mesh_protocol::admin::{AdminReply, AdminRequest, NodeStatus};
use mesh_protocol::id::Name;
use mesh_protocol::offline::{InFile as _, RevocationFile};
use serde::Serialize;

use super::{Context, millis, parse_duration, unexpected};
use crate::client::{Conversation, PATIENCE};
use crate::output::{self, Progress, Table};
use crate::signer::Signer;

const HELP: &str = "\
Examples:
  meshctl node list
  meshctl node revoke n1 --reason stolen
  meshctl node restore n1";

const LIST_HELP: &str = "\
Examples:
  meshctl node list
  meshctl node list --json

JSON: {\"nodes\": [{\"node\", \"name\", \"cluster\", \"addresses\", \"pod_cidrs\", \"generation\", \"expires\", \"connected\": \
null or from where, \"key_epoch\", \"revoked\"}]}";

const REVOKE_HELP: &str = "\
Every connected node drops the revoked one at once; the command waits until all have confirmed that no packet of it is \
accepted any more. A revocation stays for ever: to come back, the machine enrols anew with another identity, or \
'meshctl node restore' grants it anew what it had.

Examples:
  meshctl node revoke n1 --reason stolen
  meshctl node revoke n1 --void-tokens --wait 30s

JSON: {\"node\", \"online\", \"confirmed\", \"waiting\": [..], \"offline\": [..], \"millis\", \"done\"}
Exit status: 0 if every connected node confirmed in time; the revocation is in force in either case";

const RESTORE_HELP: &str = "\
Only for a machine that was never out of your hands: whoever has its key is in again. The new grant names the revocation \
that it lifts; name, address and pod CIDRs are those it had, and have to be free still. Where the issuer's key is elsewhere, \
the node waits for it as one that joins does (meshctl grant --help).

Examples:
  meshctl node restore n1

JSON: the node as in 'meshctl node list'; where its issuer's key is elsewhere, {\"pending\": [..]} as 'meshctl grant list-pending'";

/// Show the nodes of the mesh, or cut one off
#[derive(Debug, clap::Subcommand)]
#[command(after_help = HELP)]
pub(crate) enum Verb {
    List(List),
    Revoke(Revoke),
    Restore(Restore),
}

/// List all nodes
#[derive(Debug, clap::Args)]
#[command(after_help = LIST_HELP)]
pub(crate) struct List {}

/// Cut a node off everywhere, at once
#[derive(Debug, clap::Args)]
#[command(after_help = REVOKE_HELP)]
pub(crate) struct Revoke {
    /// Name, id, or the start of an id
    node: String,
    /// Why, for people
    #[arg(long, default_value = "")]
    reason: String,
    /// Void every open join token of its cluster too
    #[arg(long)]
    void_tokens: bool,
    /// The revoker's key, where it is not the keyserver's: a key file, exec:COMMAND or pkcs11:.. (meshctl signer show --help)
    #[arg(long)]
    signer: Option<String>,
    /// How long to wait for connected nodes to confirm
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = parse_duration)]
    wait: Duration,
}

/// Let a revoked node back in
#[derive(Debug, clap::Args)]
#[command(after_help = RESTORE_HELP)]
pub(crate) struct Restore {
    /// Name, id, or the start of an id
    node: String,
}

pub(crate) fn run(verb: Verb, context: &Context) -> anyhow::Result<()> {
    match verb {
        Verb::List(_) => list(context),
        Verb::Revoke(args) => revoke(args, context),
        Verb::Restore(args) => restore(args, context),
    }
}

fn list(context: &Context) -> anyhow::Result<()> {
    let nodes = match context.ask_keyserver(&AdminRequest::NodeList)? {
        AdminReply::Nodes { nodes } => nodes,
        other => return Err(unexpected(other)),
    };
    context.show(&serde_json::json!({ "nodes": nodes }), || list_text(&nodes))
}

fn list_text(nodes: &[NodeStatus]) -> String {
    let mut table = Table::new(["NAME", "ID", "CLUSTER", "CONNECTED", "KEY", "ADDRESSES", "POD CIDRS", "GRANT UNTIL"]);
    for node in nodes {
        let connected = if node.revoked { "REVOKED".to_owned() } else { output::maybe(node.connected) };
        table.row([
            node.name.to_string(),
            node.node.short(),
            node.cluster.to_string(),
            connected,
            output::maybe(node.key_epoch),
            output::list(&node.addresses),
            output::list(&node.pod_cidrs),
            output::date(node.expires),
        ]);
    }
    table.render()
}

#[derive(Debug, Serialize)]
struct Revocation {
    node: Name,
    online: u32,
    confirmed: u32,
    waiting: Vec<Name>,
    offline: Vec<Name>,
    millis: u64,
    done: bool,
}

impl TryFrom<AdminReply> for Revocation {
    type Error = anyhow::Error;

    fn try_from(reply: AdminReply) -> anyhow::Result<Self> {
        match reply {
            AdminReply::Revocation { node, online, confirmed, waiting, offline, millis, done } => {
                Ok(Self { node, online, confirmed, waiting, offline, millis, done })
            }
            other => Err(unexpected(other)),
        }
    }
}

impl Revocation {
    fn text(&self) -> String {
        let online = output::plural(self.online as usize, "connected node", "connected nodes");
        let mut text = if self.confirmed >= self.online {
            format!("{} is revoked; {online} confirmed, the last one after {} ms\n", self.node, self.millis)
        } else {
            format!("{} is revoked; {} of {online} confirmed after {} ms\n", self.node, self.confirmed, self.millis)
        };
        if !self.waiting.is_empty() {
            text.push_str(&format!("did not confirm: {}\n", output::list(&self.waiting)));
        }
        if !self.offline.is_empty() {
            text.push_str(&format!("offline, learn of it when they come back: {}\n", output::list(&self.offline)));
        }
        text
    }
}

/// Asks the keyserver for the revocation, and has it signed here.
fn signed(args: &Revoke, spec: &str, context: &Context) -> anyhow::Result<String> {
    let signer = Signer::open(spec)?;
    let (node, reason, revoker) = (args.node.clone(), args.reason.clone(), signer.public());
    let file = match context.ask_keyserver(&AdminRequest::RevocationDraft { node, reason, revoker })? {
        AdminReply::RevocationDraft { file } => RevocationFile::from_text(&file)?,
        other => return Err(unexpected(other)),
    };
    // Nothing but a revocation is ever signed with this key.
    let _: mesh_protocol::record::Revocation = file.revocation.unverified()?;
    let revocation = signer.sign(file.mesh, file.revocation)?;
    Ok(RevocationFile { mesh: file.mesh, revocation }.to_text())
}

fn revoke(args: Revoke, context: &Context) -> anyhow::Result<()> {
    let signed = args.signer.as_deref().map(|spec| signed(&args, spec, context)).transpose()?;
    let request = AdminRequest::NodeRevoke {
        node: args.node,
        reason: args.reason,
        void_tokens: args.void_tokens,
        wait: millis(args.wait),
        signed,
    };
    let mut conversation = Conversation::<AdminReply>::start(&context.admin_socket, &request)?;
    let mut progress = Progress::new(context.json);
    let revocation = loop {
        let revocation = Revocation::try_from(conversation.next(args.wait + PATIENCE)?)?;
        let message = format!("nodes have cut off {}", revocation.node);
        progress.update(revocation.confirmed as usize, revocation.online as usize, &message);
        if revocation.done {
            break revocation;
        }
    };
    drop(progress);
    context.show(&revocation, || revocation.text())?;
    if !revocation.waiting.is_empty() {
        let count = output::plural(revocation.waiting.len(), "connected node", "connected nodes");
        let wait = humantime::format_duration(args.wait);
        bail!("{count} did not confirm within {wait}; the revocation stands, look at them or cut their network");
    }
    Ok(())
}

fn restore(args: Restore, context: &Context) -> anyhow::Result<()> {
    match context.ask_keyserver(&AdminRequest::NodeRestore { node: args.node })? {
        AdminReply::Nodes { nodes } => {
            let [node] = nodes.as_slice() else { bail!("the keyserver named no node, or more than one") };
            context.show(node, || format!("{} is in again, at generation {}\n", node.name, node.generation))
        }
        AdminReply::GrantsPending { pending, .. } => {
            let [waits] = pending.as_slice() else { bail!("the keyserver named no node, or more than one") };
            context.show(&serde_json::json!({ "pending": pending }), || {
                format!(
                    "{} waits for issuer {} until {}\n\
                     next: meshctl grant list-pending --out FILE, grant sign --restore {} there, grant import here\n",
                    waits.name,
                    waits.issuer.id().short(),
                    output::date(waits.until),
                    waits.name
                )
            })
        }
        other => Err(unexpected(other)),
    }
}
