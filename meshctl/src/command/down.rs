//! `meshctl down`: take everything of Mesh off this host's network.

use mesh_protocol::local::{LocalReply, LocalRequest};

use super::{Context, unexpected};

const HELP: &str = "\
Device, routes, rules and the packet filter of Mesh go, and nothing that is not ours; pods lose their network. Keys and \
records on disk stay. Where meshd does not run, `meshd down` does the same.

Examples:
  meshctl down

JSON: {\"down\": true}";

/// Remove everything of Mesh from this host's network and stop meshd
#[derive(Debug, clap::Args)]
#[command(after_help = HELP)]
pub(crate) struct Args {}

pub(crate) fn run(_: &Args, context: &Context) -> anyhow::Result<()> {
    match context.ask_node(&LocalRequest::Down)? {
        LocalReply::Done => {
            context.show(&serde_json::json!({ "down": true }), || "mesh is down on this host".to_owned())
        }
        other => Err(unexpected(other)),
    }
}
