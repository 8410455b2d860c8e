//! `keys rotate --identity`: replaces the identity key and tells how far that is.

use std::io;
use std::time::Duration;

use mesh_protocol::id::{KeyId, NodeId};
use mesh_protocol::local::{IdentityPhase, LocalErrorCode, LocalReply};
use tokio::time::{Instant, sleep};

use super::connection::{Replies, error};
use super::status::is_up;
use crate::app::Node;
use crate::control::{ControlReport, RotateError};

/// How often progress is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// Least time between two progress replies that say the same.
const TELL_EVERY: Duration = Duration::from_secs(2);

/// Begins, then sends progress until all peers with a session know the node by the new key. How long that may take is for the
/// client to say: an issuer elsewhere may take days.
///
/// # Errors
/// The client is gone; the change goes on without it.
pub(super) async fn run(node: &Node, replies: &mut Replies) -> io::Result<()> {
    let (from, to) = match node.control.succeed().await {
        Ok(keys) => keys,
        Err(refusal) => {
            let code = match refusal {
                RotateError::Storage(_) => LocalErrorCode::Internal,
                _ => LocalErrorCode::NotReady,
            };
            return replies.send(&error(code, refusal.to_string())).await;
        }
    };
    let mut told: Option<(LocalReply, Instant)> = None;
    loop {
        let up = peers_up(node).await;
        let reply = progress(&node.control.report.borrow().clone(), from, to, &up);
        let done = reply.is_final();
        let same = told.as_ref().is_some_and(|(last, at)| *last == reply && at.elapsed() < TELL_EVERY);
        if done || !same {
            replies.send(&reply).await?;
            told = Some((reply, Instant::now()));
        }
        if done {
            return Ok(());
        }
        tokio::select! {
            () = sleep(LOOK_EVERY) => {}
            _ = node.shutdown.begun() => {
                let message = "meshd is stopping; the change goes on when it runs again".into();
                return replies.send(&error(LocalErrorCode::NotReady, message)).await;
            }
        }
    }
}

/// Peers with a session.
async fn peers_up(node: &Node) -> Vec<NodeId> {
    let snapshot = node.snapshot().await;
    let facts = node.control.facts.borrow().clone();
    let up = |number: u32| snapshot.peers.get(&mesh_dataplane::PeerId(number)).is_some_and(is_up);
    facts.peers.iter().filter(|peer| up(peer.number)).map(|peer| peer.node).collect()
}

fn progress(report: &ControlReport, from: KeyId, to: KeyId, up: &[NodeId]) -> LocalReply {
    let identity = report.identity.as_ref();
    let phase = identity.map_or(IdentityPhase::Asking, |identity| identity.phase);
    let settled = identity.is_some_and(|identity| identity.key == to && phase == IdentityPhase::Settled);
    let knows = |peer: &&NodeId| report.acknowledged.get(*peer).is_some_and(|seq| *seq >= report.seq);
    let confirmed = if settled { up.iter().filter(knows).count() } else { 0 };
    let count = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
    let (peers, confirmed) = (count(up.len()), count(confirmed));
    let error = identity.and_then(|identity| identity.error.clone());
    LocalReply::Identity { from, to, phase, error, peers, confirmed, done: settled && confirmed == peers }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::sync::Arc;

    use mesh_protocol::local::IdentityStatus;

    use super::*;

    fn report(key: u8, phase: IdentityPhase, acknowledged: &[(u8, u64)]) -> ControlReport {
        let identity = IdentityStatus { key: KeyId([key; 32]), next: None, phase, error: None };
        let acknowledged: BTreeMap<NodeId, u64> =
            acknowledged.iter().map(|(node, seq)| (NodeId([*node; 32]), *seq)).collect();
        ControlReport {
            identity: Some(identity),
            seq: 7,
            acknowledged: Arc::new(acknowledged),
            ..ControlReport::default()
        }
    }

    #[test]
    fn peers_count_once_they_have_the_record_that_the_new_key_signed() {
        let up = [NodeId([1; 32]), NodeId([2; 32])];
        let (from, to) = (KeyId([1; 32]), KeyId([2; 32]));
        let told = |report: ControlReport| match progress(&report, from, to, &up) {
            LocalReply::Identity { peers, confirmed, done, .. } => (peers, confirmed, done),
            other => panic!("{other:?}"),
        };
        let all = [(1, 7), (2, 8), (3, 7)];
        assert_eq!(told(report(1, IdentityPhase::Waiting, &all)), (2, 0, false));
        assert_eq!(told(report(2, IdentityPhase::Publishing, &all)), (2, 0, false));
        assert_eq!(told(report(2, IdentityPhase::Settled, &[(1, 6), (2, 7)])), (2, 1, false));
        assert_eq!(told(report(2, IdentityPhase::Settled, &all)), (2, 2, true));
    }
}
