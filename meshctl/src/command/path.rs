//! `meshctl path`: how large packets to a node may be.

use mesh_protocol::local::{LocalReply, LocalRequest, PathReport};

use super::{Context, unexpected};
use crate::output::{self, Table};

const HELP: &str = "\
Examples:
  meshctl path n2
  meshctl path 10.2.7.9 --json

States: unanswered (no probe came back yet, the MTU is the device's), searching, confirmed, black-hole (larger packets vanish \
on the way without a word and are cut). Paths that nobody sends on are not probed.

JSON: {\"node\", \"name\", \"underlay_mtu\", \"device_mtu\", \"paths\": [{\"lane\", \"remote_lane\", \"endpoint\", \"path_mtu\", \
\"inner_mtu\", \"state\", \"last_probe\", \"black_holes\"}]}";

/// Show what the paths to a node carry
#[derive(Debug, clap::Args)]
#[command(after_help = HELP)]
pub(crate) struct Args {
    /// Name, id or the start of an id, or an address of it or of a pod on it
    node: String,
}

pub(crate) fn run(args: Args, context: &Context) -> anyhow::Result<()> {
    let report = match context.ask_node(&LocalRequest::Path { target: args.node })? {
        LocalReply::Path(report) => report,
        other => return Err(unexpected(other)),
    };
    context.show(&report, || text(&report))
}

fn text(report: &PathReport) -> String {
    let underlay = output::maybe(report.underlay_mtu);
    let head = format!("{}: underlay MTU {underlay}, device MTU {}\n", report.name, report.device_mtu);
    if report.paths.is_empty() {
        return head + "nothing was sent there yet: try meshctl ping\n";
    }
    let mut table =
        Table::new(["LANE", "THEIRS", "ENDPOINT", "PATH MTU", "INNER MTU", "STATE", "LAST PROBE", "BLACK HOLES"]);
    for path in &report.paths {
        table.row([
            path.lane.to_string(),
            path.remote_lane.to_string(),
            path.endpoint.to_string(),
            path.path_mtu.to_string(),
            path.inner_mtu.to_string(),
            path.state.clone(),
            path.last_probe.map_or_else(|| "-".to_owned(), |age| format!("{} ago", output::seconds(age))),
            path.black_holes.to_string(),
        ]);
    }
    head + &table.render()
}
