//! Post-quantum tunnels for a mesh that was made without: by the policy, or cluster by cluster by grants.

use std::path::PathBuf;

use anyhow::bail;
use mesh_protocol::admin::{AdminReply, AdminRequest, PostQuantumState};
use mesh_protocol::id::Name;
use mesh_protocol::record::PostQuantum;

use super::change::parse_pq;
use crate::command::{Context, unexpected};
use crate::files;
use crate::output;

const HELP: &str = "\
Tunnels without a post-quantum preshared key go on carrying packets until there is one with, for three minutes at most; no new one \
begins. Upgrade every node before. With --cluster the policy stays as it is, and every tunnel of a node of these clusters is \
post-quantum; nodes that join later get what the policy says. Where the issuer's key is elsewhere, --out writes what it has to sign.

Examples:
  meshctl policy set-pq required
  meshctl policy set-pq required --cluster east
  meshctl policy set-pq required --cluster east --out pending.txt
  meshctl policy set-pq off

JSON: {\"policy_version\", \"policy\": \"required\" or \"off\", \"total\", \"required\": nodes whose own grants say so, \"left\", \
\"pending\": grants that an issuer elsewhere has to sign, \"file\": text for 'grant sign' or null}
Exit status: 0 if nothing is left to be signed";

/// Have tunnels be post-quantum, of all nodes or of some clusters
#[derive(Debug, clap::Args)]
#[command(after_help = HELP)]
pub(crate) struct SetPq {
    /// required or off
    #[arg(value_name = "MODE", value_parser = parse_pq)]
    pq: PostQuantum,
    /// Of the nodes of this cluster, by new grants; repeat it for several
    #[arg(long, value_name = "NAME")]
    cluster: Vec<Name>,
    /// Where grants go that an issuer elsewhere has to sign; - for standard output
    #[arg(long, value_name = "FILE", requires = "cluster")]
    out: Option<PathBuf>,
}

pub(super) fn run(args: &SetPq, context: &Context) -> anyhow::Result<()> {
    let mut state = ask(args, context)?;
    // Some grants at a time, so that others are served in between.
    while state.left > 0 {
        let before = state.left;
        state = ask(args, context)?;
        if state.left >= before {
            bail!("{} of {} grants are signed: try again", state.required, state.total);
        }
    }
    if let (Some(out), Some(file)) = (&args.out, &state.file) {
        files::write(out, file)?;
        let count = output::plural(state.pending as usize, "grant waits", "grants wait");
        output::note(&format!("{count}; to sign: meshctl grant sign {} --signer KEY --out FILE", out.display()));
        return Ok(());
    }
    context.show(&state, || text(&state, args))?;
    match state.pending {
        0 => Ok(()),
        pending => {
            let count = output::plural(pending as usize, "grant has", "grants have");
            bail!("{count} to be signed where the issuer's key is: --out FILE writes what it needs")
        }
    }
}

fn ask(args: &SetPq, context: &Context) -> anyhow::Result<PostQuantumState> {
    let request = AdminRequest::SetPostQuantum { pq: args.pq, clusters: args.cluster.clone() };
    match context.ask_keyserver(&request)? {
        AdminReply::PostQuantum(state) => Ok(state),
        other => Err(unexpected(other)),
    }
}

fn text(state: &PostQuantumState, args: &SetPq) -> String {
    let grants = format!("grants of {} of {} nodes require it by themselves", state.required, state.total);
    if !args.cluster.is_empty() {
        return format!("clusters {}: {grants}\n", output::list(&args.cluster));
    }
    let policy = match state.policy {
        PostQuantum::Required => "required of every node",
        PostQuantum::Off => "off, but for nodes whose grants require it",
    };
    format!("policy {}: post-quantum tunnels are {policy}; {grants}\n", state.policy_version)
}
