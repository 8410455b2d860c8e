//! `keys rotate`: promotes the spare key and tells how peers follow.

use std::io;
use std::time::Duration;

use mesh_dataplane::{PeerSnapshot, Snapshot};
use mesh_protocol::local::{LocalErrorCode, LocalReply};
use tokio::time::{Instant, sleep};

use super::connection::{Replies, error};
use super::status::is_up;
use crate::app::Node;

/// How often progress is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// Least time between two progress replies that say the same.
const TELL_EVERY: Duration = Duration::from_secs(2);
/// Peers follow within the spread of two minutes, then retry handshakes for 90 seconds.
const PATIENCE: Duration = Duration::from_secs(240);

/// Promotes, then sends progress until all peers with a session use the new key.
///
/// # Errors
/// The client is gone; the rotation goes on without it.
pub(super) async fn run(node: &Node, force: bool, replies: &mut Replies) -> io::Result<()> {
    let epoch = match node.control.rotate(force).await {
        Ok(epoch) => epoch,
        Err(refusal) => {
            let code = match refusal {
                crate::control::RotateError::Storage(_) => LocalErrorCode::Internal,
                _ => LocalErrorCode::NotReady,
            };
            return replies.send(&error(code, refusal.to_string())).await;
        }
    };
    let deadline = Instant::now() + PATIENCE;
    let mut told: Option<((u32, u32), Instant)> = None;
    loop {
        let (peers, confirmed) = progress(&node.snapshot().await, epoch);
        let done = confirmed >= peers;
        let same = told.is_some_and(|(last, at)| last == (peers, confirmed) && at.elapsed() < TELL_EVERY);
        if done || !same {
            replies.send(&LocalReply::Rotation { epoch, peers, confirmed, done }).await?;
            told = Some(((peers, confirmed), Instant::now()));
        }
        if done {
            return Ok(());
        }
        if Instant::now() > deadline {
            let left = peers - confirmed;
            let message = format!(
                "key of epoch {epoch} is in use, but {left} of {peers} peers do not answer on it yet; the old key still \
                 serves them: see meshctl peers"
            );
            return replies.send(&error(LocalErrorCode::NotReady, message)).await;
        }
        sleep(LOOK_EVERY).await;
    }
}

/// Peers with a session, and those of them that use our key of `epoch` or a newer one.
fn progress(snapshot: &Snapshot, epoch: u64) -> (u32, u32) {
    let uses_it =
        |peer: &&PeerSnapshot| peer.tunnels.iter().any(|tunnel| tunnel.confirmed && tunnel.local_epoch >= epoch);
    let up: Vec<&PeerSnapshot> = snapshot.peers.values().filter(|peer| is_up(peer)).collect();
    let confirmed = up.iter().copied().filter(uses_it).count();
    let count = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
    (count(up.len()), count(confirmed))
}

#[cfg(test)]
mod tests {
    use mesh_dataplane::{PeerId, TunnelSnapshot};

    use super::*;

    fn peer(number: u32, tunnels: &[(u64, bool)]) -> (PeerId, PeerSnapshot) {
        let tunnel = |(local_epoch, confirmed): &(u64, bool)| TunnelSnapshot {
            lane: 0,
            remote_lane: 0,
            local_epoch: *local_epoch,
            remote_epoch: 1,
            preshared: false,
            confirmed: *confirmed,
            sending: *confirmed,
            established: None,
            last_data: None,
        };
        let snapshot = PeerSnapshot {
            wire: Default::default(),
            id: PeerId(number),
            endpoint: None,
            last_handshake: None,
            traffic: Default::default(),
            refused_packets: 0,
            tunnels: tunnels.iter().map(tunnel).collect(),
            blocked: Vec::new(),
            paths: Vec::new(),
        };
        (PeerId(number), snapshot)
    }

    #[test]
    fn peers_count_when_a_tunnel_on_the_new_key_is_confirmed() {
        let peers = [
            peer(1, &[(1, true), (2, true)]),
            peer(2, &[(1, true), (2, false)]),
            peer(3, &[(1, false)]),
            peer(4, &[(3, true)]),
        ];
        let snapshot = Snapshot { peers: peers.into(), ..Snapshot::default() };
        assert_eq!(progress(&snapshot, 2), (3, 2));
        assert_eq!(progress(&Snapshot::default(), 2), (0, 0));
    }
}
