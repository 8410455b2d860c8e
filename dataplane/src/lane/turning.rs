//! A peer turns to agreed keys while tunnels without carry its packets.
//!
//! ```text
//! the table says so ── tunnels without: no handshake any more ── agreed tunnel confirmed: it sends ── IN_FLIGHT later:
//!                      they send and receive                     they receive                        they are dropped
//! ```
//!
//! Without a tunnel that works nothing is kept: no session without an agreed key begins after the turn. Those that are there
//! end by themselves, 180 s after they began, also if the peer never turns: a busy one has 55 s left at the least, since
//! it is renewed at 120 s. What is to be sent then waits for an agreed key.

use std::time::Duration;

use tracing::{debug, info};

use super::Lane;
use crate::{clock::Instant, peer::Peer};

/// Agreed tunnels beside such that are leaving are opened within this time, at random, so that a turn of the whole mesh is no
/// flood of handshakes: within a fifth of what a busy session has left.
const SPREAD: Duration = Duration::from_secs(10);
/// For so long after both ends were seen to use an agreed tunnel, a datagram of the one before may still be under way.
const IN_FLIGHT: Duration = Duration::from_secs(5);

impl Lane {
    /// A tunnel without an agreed key, of a peer that has to have one: its sessions are its last. Dropped at once if it
    /// has none.
    pub(super) fn begin_turn(&mut self, peer: &mut Peer, position: usize, now: Instant) {
        let tunnel = &mut peer.tunnels[position];
        tunnel.leave();
        if !tunnel.has_session(now) {
            return self.remove_tunnel(peer, position);
        }
        debug!(lane = self.config.lane, peer = %peer.id, "tunnel without an agreed key serves until there is one");
    }

    /// Drops what is leaving once an agreed tunnel has taken its place, or its last session is over.
    pub(super) fn end_turn(&mut self, peer: &mut Peer, now: Instant) {
        if !peer.tunnels.iter().any(|tunnel| tunnel.is_leaving()) {
            return;
        }
        let agreed = peer.tunnels.iter().filter(|tunnel| tunnel.key.is_agreed());
        let replaced = agreed.filter_map(|tunnel| tunnel.proved_for(now)).any(|time| time >= IN_FLIGHT);
        let before = peer.tunnels.len();
        for position in (0..before).rev() {
            let tunnel = &peer.tunnels[position];
            if tunnel.is_leaving() && (replaced || !tunnel.has_session(now)) {
                self.remove_tunnel(peer, position);
            }
        }
        if peer.tunnels.len() == before {
            return;
        }
        if peer.sending(now).is_none() {
            info!(lane = self.config.lane, peer = %peer.id, "last session without an agreed key is over, and there is none with one");
        } else if replaced {
            debug!(lane = self.config.lane, peer = %peer.id, "tunnels without an agreed key dropped");
        }
    }

    /// Over which time a tunnel on newer keys of the peer is opened.
    pub(super) fn spread(&self, peer: &Peer, now: Instant) -> Duration {
        let spread = self.table.rotation_spread();
        if peer.sends_on_leaving(now) { spread.min(SPREAD) } else { spread }
    }
}
