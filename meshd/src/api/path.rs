//! What the paths to a node carry, as `meshctl path` shows it.

use mesh_dataplane::{PathSnapshot, PeerId};
use mesh_protocol::local::{LocalError, LocalErrorCode, PathReport, PathStatus};

use super::target;
use crate::app::Node;
use crate::desired;

/// The report on one node.
///
/// # Errors
/// No such node, or this one itself.
pub(super) async fn report(node: &Node, target: &str) -> Result<PathReport, LocalError> {
    let facts = node.facts();
    let unknown = |message| LocalError { code: LocalErrorCode::UnknownNode, message };
    let peer = target::peer(&facts.directory, target).map_err(unknown)?;
    let snapshot = node.snapshot().await;
    let seen = snapshot.peers.get(&PeerId(peer.number));
    let mut paths: Vec<PathStatus> = seen.map(|seen| seen.paths.iter().map(status).collect()).unwrap_or_default();
    paths.sort_by_key(|path| (path.lane, path.remote_lane));
    Ok(PathReport {
        node: peer.node,
        name: peer.name.clone(),
        underlay_mtu: Some(facts.host.underlay_mtu).filter(|mtu| *mtu > 0),
        device_mtu: desired::device_mtu(&facts, &node.config),
        paths,
    })
}

fn status(path: &PathSnapshot) -> PathStatus {
    let count = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
    PathStatus {
        lane: count(path.lane),
        remote_lane: count(path.remote_lane),
        endpoint: path.endpoint,
        path_mtu: path.path_mtu,
        inner_mtu: path.inner_mtu,
        state: path.state.as_str().to_owned(),
        last_probe: path.last_probe.map(|age| age.as_secs()),
        black_holes: path.black_holes,
    }
}
