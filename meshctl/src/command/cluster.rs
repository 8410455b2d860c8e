//! `meshctl cluster`: clusters and their address pools.

use ipnet::IpNet;
use mesh_protocol::admin::{AdminReply, AdminRequest, ClusterStatus};
use mesh_protocol::id::Name;

use super::{Context, unexpected};
use crate::output::{self, Table};

const HELP: &str = "\
Examples:
  meshctl cluster add east --pod-cidr 10.1.0.0/16
  meshctl cluster list";

const ADD_HELP: &str = "\
Without an IPv6 pool one is derived from the mesh id.

Examples:
  meshctl cluster add east --pod-cidr 10.1.0.0/16
  meshctl cluster add west --pod-cidr 10.2.0.0/16 --pod-cidr fd00:2::/64 --node-prefix 25 --node-prefix6 80

JSON: {\"clusters\": [{\"cluster\", \"pod_cidrs\", \"node_prefix\", \"node_prefix6\", \"nodes\"}]}";

const LIST_HELP: &str = "\
Examples:
  meshctl cluster list

JSON: {\"clusters\": [{\"cluster\", \"pod_cidrs\", \"node_prefix\", \"node_prefix6\", \"nodes\"}]}";

/// Add a cluster, or list them
#[derive(Debug, clap::Subcommand)]
#[command(after_help = HELP)]
pub(crate) enum Verb {
    Add(Add),
    List(List),
}

/// Add a cluster and the pool its nodes get pod CIDRs from
#[derive(Debug, clap::Args)]
#[command(after_help = ADD_HELP)]
pub(crate) struct Add {
    /// Its name: letters a-z, digits and '-'
    cluster: Name,
    /// Pool of addresses for its pods, at most one of each family
    #[arg(long = "pod-cidr", value_name = "CIDR", required = true, value_parser = parse_pool)]
    pod_cidrs: Vec<IpNet>,
    /// Prefix length of a node's IPv4 pod CIDR [default: 24]
    #[arg(long, value_name = "LENGTH", value_parser = clap::value_parser!(u8).range(1..=32))]
    node_prefix: Option<u8>,
    /// Prefix length of a node's IPv6 pod CIDR [default: 80]
    #[arg(long, value_name = "LENGTH", value_parser = clap::value_parser!(u8).range(1..=128))]
    node_prefix6: Option<u8>,
}

/// List all clusters
#[derive(Debug, clap::Args)]
#[command(after_help = LIST_HELP)]
pub(crate) struct List {}

pub(crate) fn run(verb: Verb, context: &Context) -> anyhow::Result<()> {
    let request = match verb {
        Verb::Add(Add { cluster, pod_cidrs, node_prefix, node_prefix6 }) => {
            AdminRequest::ClusterAdd { cluster, pod_cidrs, node_prefix, node_prefix6 }
        }
        Verb::List(_) => AdminRequest::ClusterList,
    };
    let clusters = match context.ask_keyserver(&request)? {
        AdminReply::Clusters { clusters } => clusters,
        other => return Err(unexpected(other)),
    };
    context.show(&serde_json::json!({ "clusters": clusters }), || text(&clusters))
}

fn text(clusters: &[ClusterStatus]) -> String {
    let mut table = Table::new(["CLUSTER", "POD CIDRS", "NODE PREFIXES", "NODES"]);
    for cluster in clusters {
        table.row([
            cluster.cluster.to_string(),
            output::list(&cluster.pod_cidrs),
            format!("/{}, /{}", cluster.node_prefix, cluster.node_prefix6),
            cluster.nodes.to_string(),
        ]);
    }
    table.render()
}

/// A prefix without host bits: `10.1.2.3/16` is a slip of the hand more often than not.
pub(super) fn parse_pool(text: &str) -> Result<IpNet, String> {
    let net: IpNet = text.parse().map_err(|_| "write it like 10.1.0.0/16 or fd00:1::/64".to_owned())?;
    if net.trunc() == net {
        Ok(net)
    } else {
        Err(format!("it has bits behind the prefix; did you mean {}?", net.trunc()))
    }
}
