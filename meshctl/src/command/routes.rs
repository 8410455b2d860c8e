//! `meshctl routes`: what this node sends where.

use mesh_protocol::local::{LocalReply, LocalRequest, RouteStatus};

use super::{Context, unexpected};
use crate::output::{self, Table};

const HELP: &str = "\
Examples:
  meshctl routes
  meshctl routes --json

JSON: {\"routes\": [{\"prefix\", \"kind\", \"via\", \"link\", \"mtu\"}]}; `kind` is peer, pod, own or pool; `link` is null for \
what is refused as unreachable";

/// List the mesh routes of this node
#[derive(Debug, clap::Args)]
#[command(after_help = HELP)]
pub(crate) struct Args {}

pub(crate) fn run(_: &Args, context: &Context) -> anyhow::Result<()> {
    let routes = match context.ask_node(&LocalRequest::Routes)? {
        LocalReply::Routes { routes } => routes,
        other => return Err(unexpected(other)),
    };
    context.show(&serde_json::json!({ "routes": routes }), || text(&routes))
}

fn text(routes: &[RouteStatus]) -> String {
    let mut table = Table::new(["PREFIX", "KIND", "VIA", "LINK", "MTU"]);
    for route in routes {
        table.row([
            route.prefix.to_string(),
            route.kind.clone(),
            output::maybe(route.via.as_ref()),
            route.link.clone().unwrap_or_else(|| "unreachable".to_owned()),
            output::maybe(route.mtu),
        ]);
    }
    table.render()
}
