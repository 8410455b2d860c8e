//! `meshctl keys status`, `pause`, `resume`, `cancel`: the keyserver's rotations.

use mesh_protocol::admin::{AdminReply, AdminRequest, NodeKeys, RotationChange, RotationJob};
use serde::Serialize;

use super::local;
use crate::client::ClientError;
use crate::command::{Context, unexpected};
use crate::output::{self, Table};

/// Shows jobs and the keys of nodes; of this node where no keyserver is.
pub(super) fn status(of_this_node: bool, context: &Context) -> anyhow::Result<()> {
    if of_this_node {
        return local::status(context);
    }
    let (jobs, nodes) = match context.ask_keyserver(&AdminRequest::RotationList) {
        Ok(AdminReply::Rotations { jobs, nodes }) => (jobs, nodes),
        Ok(other) => return Err(unexpected(other)),
        Err(ClientError::NoSocket { .. }) => {
            output::note("no keyserver on this machine: showing this node only");
            return local::status(context);
        }
        Err(error) => return Err(error.into()),
    };
    let shown = serde_json::json!({ "scope": "mesh", "jobs": jobs, "nodes": nodes });
    context.show(&shown, || format!("{}\n{}", jobs_text(&jobs), nodes_text(&nodes)))
}

/// Holds, resumes or ends jobs, and shows those that changed.
pub(super) fn change(job: Option<u64>, change: RotationChange, context: &Context) -> anyhow::Result<()> {
    let jobs = match context.ask_keyserver(&AdminRequest::RotationChange { job, change })? {
        AdminReply::Rotations { jobs, .. } => jobs,
        other => return Err(unexpected(other)),
    };
    context.show(&serde_json::json!({ "jobs": jobs }), || jobs_text(&jobs))
}

fn jobs_text(jobs: &[RotationJob]) -> String {
    if jobs.is_empty() {
        return "no rotations\n".to_owned();
    }
    let mut table = Table::new(["JOB", "STATE", "WHOM", "WAVE", "PROMOTED", "CONFIRMED", "FAILED", "OFFLINE", "TIME"]);
    for job in jobs {
        table.row([
            job.job.to_string(),
            word(&job.state),
            job.whom.clone(),
            format!("{}/{}", job.wave, job.waves),
            format!("{}/{}", job.promoted, job.total),
            format!("{}/{}", job.confirmed, job.total),
            job.failed.len().to_string(),
            job.offline.to_string(),
            time(job),
        ]);
    }
    let mut text = table.render();
    for job in jobs {
        for failure in &job.failed {
            text.push_str(&output::visible(&format!("job {}: {} refused: {}", job.job, failure.node, failure.error)));
            text.push('\n');
        }
    }
    text
}

fn time(job: &RotationJob) -> String {
    let every = job.every.map(|every| format!(", then every {}", output::seconds(every))).unwrap_or_default();
    match (job.next, job.ended, job.began) {
        (Some(next), ..) => format!("begins {}{every}", output::date(next)),
        (None, Some(ended), _) => format!("ended {}", output::date(ended)),
        (None, None, began) => format!("began {}{every}", began.map_or_else(|| "-".to_owned(), output::date)),
    }
}

fn nodes_text(nodes: &[NodeKeys]) -> String {
    let mut table = Table::new(["NODE", "CLUSTER", "CONNECTED", "KEY", "PHASE", "WANTED BY"]);
    for node in nodes {
        table.row([
            node.name.to_string(),
            node.cluster.to_string(),
            if node.connected { "yes" } else { "no" }.to_owned(),
            output::maybe(node.epoch),
            node.phase.as_ref().map_or_else(|| "-".to_owned(), word),
            output::list(&node.jobs),
        ]);
    }
    table.render()
}

/// A state as `--json` writes it.
fn word<T: Serialize>(value: &T) -> String {
    serde_json::to_value(value).ok().and_then(|value| value.as_str().map(str::to_owned)).unwrap_or_default()
}
