//! Carries what happens in one part to those it matters to.

use std::io;
use std::sync::{Arc, Weak};
use std::time::Duration;

use anyhow::bail;
use mesh_dataplane::tun::linux::TunQueue;
use mesh_dataplane::{Event, Events};
use mesh_protocol::offer;
use tokio::sync::mpsc;
use tracing::{debug, info, warn};

use super::Node;

/// How often the lanes are asked which peers have a session.
const ACTIVITY_EVERY: Duration = Duration::from_secs(5);
/// How long the events thread waits before it looks whether it is still wanted.
const PATIENCE: Duration = Duration::from_millis(200);

/// Gives the lanes the queues of a device that was made again.
///
/// # Errors
/// A lane has stopped.
pub(super) async fn queues(node: Arc<Node>, mut made: mpsc::Receiver<Vec<TunQueue>>) -> anyhow::Result<()> {
    while let Some(queues) = made.recv().await {
        for (lane, queue) in queues.into_iter().enumerate().take(node.engine.lanes()) {
            node.engine.replace_queue(lane, Box::new(queue))?;
        }
        info!("lanes have the queues of the new device");
    }
    // The host thread ended: `meshd down`.
    Ok(())
}

/// Tells control which peers have a session, and notices a lane that ended.
///
/// # Errors
/// A lane has ended by itself: the daemon has to start anew.
pub(super) async fn activity(node: Arc<Node>) -> anyhow::Result<()> {
    let mut due = tokio::time::interval(ACTIVITY_EVERY);
    loop {
        // At once after a handshake: the next start, which shakes hands with whom this one talked to, may be soon.
        tokio::select! {
            _ = due.tick() => {}
            () = node.session_up.notified() => {}
        }
        if !node.engine.is_running() {
            bail!("a lane has ended by itself");
        }
        let snapshot = node.snapshot().await;
        let up = snapshot.peers.values().filter(|peer| peer.tunnels.iter().any(|tunnel| tunnel.confirmed));
        node.control.peer_active(up.map(|peer| peer.id.0).collect());
    }
}

/// Logs what happens on the lanes and passes on what is for others, on a thread that ends with the node.
///
/// # Errors
/// The system refused a thread.
pub(super) fn events(node: Arc<Node>, events: Events) -> io::Result<()> {
    let node = Arc::downgrade(&node);
    std::thread::Builder::new().name("events".into()).spawn(move || follow(&node, &events)).map(drop)
}

fn follow(node: &Weak<Node>, events: &Events) {
    loop {
        let Ok(event) = events.next_within(PATIENCE) else { return };
        let Some(node) = node.upgrade() else { return };
        if let Some(event) = event {
            handle(&node, event);
        }
    }
}

fn handle(node: &Node, event: Event) {
    let name = |peer: mesh_dataplane::PeerId| {
        let directory = node.control.facts.borrow();
        let found = directory.peers.iter().find(|facts| facts.number == peer.0);
        found.map_or_else(|| peer.to_string(), |facts| facts.name.to_string())
    };
    match event {
        Event::PeerUp { lane, peer, endpoint } => {
            let endpoint = endpoint.map(|endpoint| endpoint.to_string());
            info!(lane, peer = name(peer), endpoint, "session up");
            node.session_up.notify_one();
        }
        Event::PeerIdle { lane, peer } => debug!(lane, peer = name(peer), "session over"),
        Event::HandshakeFailed { lane, peer } => warn!(lane, peer = name(peer), "peer does not answer handshakes"),
        Event::TunnelConfirmed { lane, peer, local_epoch, remote_epoch } => {
            debug!(lane, peer = name(peer), local_epoch, remote_epoch, "tunnel confirmed");
        }
        Event::TunnelRetired { lane, peer, local_epoch, remote_epoch } => {
            debug!(lane, peer = name(peer), local_epoch, remote_epoch, "tunnel retired");
        }
        Event::EndpointMoved { lane, peer, from, to } => {
            let from = from.map(|from| from.to_string());
            info!(lane, peer = name(peer), from, endpoint = %to, "endpoint moved");
        }
        Event::QueueLost { lane, error } => {
            warn!(lane, %error, "TUN queue lost");
            node.host.look();
        }
        Event::KeyWanted { peer, local_epoch, remote_epoch, .. } => node.psk.wanted(peer, local_epoch, remote_epoch),
        Event::Datagram { bytes, .. } if offer::is_offer(&bytes) => node.psk.offered(bytes),
        // Nothing but WireGuard and offers is expected on these ports yet.
        _ => {}
    }
}
