//! Preshared keys that control agreed on with a peer, for one pair of lanes: those that wait for their tunnel, and the
//! initiation that waits for its key.
//!
//! boringtun takes a preshared key only when a tunnel is made. So a key comes with the index that tells its tunnel's
//! initiations: ours are made with it, the peer's carry it as their sender index.
//!
//! ```text
//! we begin     KeyWanted ─> control ─> Agreement (ours): kept, or at once: offer, initiation ───────> peer
//! peer begins  offer ─> Event::Datagram ─> control ─> Agreement (peer's): kept ─┐
//!              initiation ─> its key is here? ──────────────────────────────────┴─> tunnel, response
//!                            not yet: parked for 250 ms
//! ```

use std::{collections::VecDeque, sync::Arc, time::Duration};

use super::tunnel::{INITIATION, TunnelKey};
use crate::{clock::Instant, key::PresharedKey, udp::Ends};

/// How long an initiation waits for its key.
pub(crate) const PARKED_FOR: Duration = Duration::from_millis(250);
/// A key that is wanted is asked for again after this time.
pub(crate) const ASK_AGAIN: Duration = Duration::from_secs(1);
/// A handshake with an agreed key that is unanswered for so long needs another key: the peer may have lost this one.
pub(crate) const RENEW_AFTER: Duration = Duration::from_secs(5);
/// A key of ours that no tunnel took within this time is not used: the peer may have been started anew since.
const OURS_FRESH_FOR: Duration = Duration::from_secs(60);
/// A key of the peer's is kept for so long: its handshake may come later, on another lane.
const THEIRS_KEPT_FOR: Duration = Duration::from_secs(120);
/// Keys of the peer's that are kept; the oldest makes room. 120 bytes each.
const MAX_THEIRS: usize = 4;

/// A key for a tunnel that we begin.
#[derive(Debug, Clone)]
pub(crate) struct OurKey {
    pub(crate) tunnel: TunnelKey,
    pub(crate) psk: PresharedKey,
    /// Index that the tunnel has to have.
    pub(crate) index: u32,
    /// What goes to the peer ahead of the initiation.
    pub(crate) offer: Arc<[u8]>,
    pub(crate) since: Instant,
}

/// A key for a tunnel that the peer begins.
#[derive(Debug, Clone)]
pub(crate) struct TheirKey {
    pub(crate) tunnel: TunnelKey,
    pub(crate) psk: PresharedKey,
    /// Upper 24 bits of the sender index of its initiations.
    pub(crate) sender: u32,
    pub(crate) since: Instant,
}

/// An initiation, admitted, whose key is not here yet.
#[derive(Debug)]
pub(crate) struct Parked {
    pub(crate) from: Ends,
    pub(crate) initiation: Box<[u8; INITIATION.1]>,
    pub(crate) tunnel: TunnelKey,
    pub(crate) sender: u32,
    pub(crate) since: Instant,
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct AgreedKeys {
    ours: Option<OurKey>,
    theirs: VecDeque<TheirKey>,
    parked: Option<Parked>,
    /// When control was last asked for a key that did not come yet.
    pub(crate) asked: Option<Instant>,
    /// Since when there has been neither key nor answer.
    pub(crate) wanting: Option<Instant>,
}

impl AgreedKeys {
    pub(crate) fn set_ours(&mut self, key: OurKey) {
        self.ours = Some(key);
    }

    /// Takes the key for a tunnel that we are about to begin.
    pub(crate) fn take_ours(&mut self, tunnel: TunnelKey, now: Instant) -> Option<OurKey> {
        self.ours.take().filter(|key| key.tunnel == tunnel && now.since(key.since) < OURS_FRESH_FOR)
    }

    pub(crate) fn add_theirs(&mut self, key: TheirKey) {
        if self.theirs.len() >= MAX_THEIRS {
            self.theirs.pop_front();
        }
        self.theirs.push_back(key);
    }

    /// The key of an initiation of the peer's. It stays until [`forget_theirs`](Self::forget_theirs): whoever saw its
    /// index on the wire may forge the first initiation that names it.
    pub(crate) fn theirs(&self, tunnel: TunnelKey, sender: u32) -> Option<&TheirKey> {
        self.theirs.iter().rev().find(|key| key.tunnel == tunnel && key.sender == sender)
    }

    pub(crate) fn forget_theirs(&mut self, tunnel: TunnelKey, sender: u32) {
        self.theirs.retain(|key| key.tunnel != tunnel || key.sender != sender);
    }

    /// Keeps an initiation until its key comes; false if another one had to go for it.
    pub(crate) fn park(&mut self, parked: Parked) -> bool {
        self.parked.replace(parked).is_none()
    }

    /// The initiation that waited for this key.
    pub(crate) fn unpark(&mut self, tunnel: TunnelKey, sender: u32, now: Instant) -> Option<Parked> {
        let fits = |parked: &mut Parked| {
            parked.tunnel == tunnel && parked.sender == sender && now.since(parked.since) <= PARKED_FOR
        };
        self.parked.take_if(fits)
    }

    /// Drops what waited for too long; true if an initiation was among it.
    pub(crate) fn expire(&mut self, now: Instant) -> bool {
        self.ours.take_if(|key| now.since(key.since) >= OURS_FRESH_FOR);
        self.theirs.retain(|key| now.since(key.since) < THEIRS_KEPT_FOR);
        self.parked.take_if(|parked| now.since(parked.since) > PARKED_FOR).is_some()
    }

    /// Drops keys whose tunnels may not be made any more.
    pub(crate) fn retain(&mut self, may_stay: impl Fn(TunnelKey) -> bool) {
        self.ours.take_if(|key| !may_stay(key.tunnel));
        self.theirs.retain(|key| may_stay(key.tunnel));
        self.parked.take_if(|parked| !may_stay(parked.tunnel));
    }

    /// A tunnel is there: nothing is wanted any more.
    pub(crate) fn settle(&mut self) {
        (self.asked, self.wanting) = (None, None);
    }

    /// When [`expire`](Self::expire) or another question is due.
    pub(crate) fn poll_timeout(&self) -> Option<Instant> {
        let parked = self.parked.as_ref().map(|parked| parked.since + PARKED_FOR);
        let ours = self.ours.as_ref().map(|key| key.since + OURS_FRESH_FOR);
        let theirs = self.theirs.front().map(|key| key.since + THEIRS_KEPT_FOR);
        let asked = self.asked.map(|at| at + ASK_AGAIN);
        parked.into_iter().chain(ours).chain(theirs).chain(asked).min()
    }
}
