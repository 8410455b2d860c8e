//! Timers: one entry in the wheel for each peer that has something to wait for.

use std::time::Duration;

use tracing::debug;

use super::{Lane, Output};
use crate::{
    clock::Instant,
    command::Event,
    drop_reason::DropReason,
    peer::{
        DOUBT, Detour, Peer,
        tunnel::{Due, Sealed},
    },
};

/// How often the timers of a peer with tunnels run.
const PULSE: Duration = Duration::from_secs(1);
/// A tunnel on new keys that could not be opened is tried again after this time and a random part of the spread.
const REOPEN: Duration = Duration::from_secs(30);
/// Age at which a session is renewed that only keepalives pass (whitepaper, section 6.2).
const RENEW_AFTER: Duration = Duration::from_secs(120);
/// Peers a call serves, so that packets get their turn.
const BUDGET: usize = 64;

impl Lane {
    /// Runs the timers that are due at `now`. Calling early is harmless; call again while
    /// [`poll_timeout`](Self::poll_timeout) is due.
    pub fn handle_timeout(&mut self, now: Instant, out: &mut Output) {
        for _ in 0..BUDGET {
            if out.is_nearly_full() {
                return;
            }
            let Some((at, tick)) = self.wheel.pop(now) else { return };
            let position = self.pairs.position(at);
            let Some(slot) = self.peers.get_mut(position) else { continue };
            let Some(mut peer) = slot.take() else { continue };
            // Not the entry it waits for: it was scheduled anew since.
            if peer.scheduled == Some(tick) {
                peer.scheduled = None;
                self.handle_peer_timeout(&mut peer, now, out);
            }
            self.put(peer);
        }
    }

    /// Makes the timers of a peer run at `at`, or earlier if that is planned already.
    pub(super) fn schedule(&mut self, peer: &mut Peer, at: Instant) {
        let tick = self.wheel.tick(at);
        if peer.scheduled.is_some_and(|scheduled| scheduled <= tick) {
            return;
        }
        peer.scheduled = Some(self.wheel.schedule(peer.at(), at));
    }

    fn handle_peer_timeout(&mut self, peer: &mut Peer, now: Instant, out: &mut Output) {
        let sending = peer.sending(now);
        if sending.is_some_and(|n| peer.tunnels[n].unanswered(now) >= DOUBT) {
            // The address of ours that data leaves from may have lost its way out: the system chooses another.
            peer.path.forget_local();
        }
        self.end_turn(peer, now);
        let mut gave_up = peer.desired.key.is_agreed() && self.renew_agreed(peer, now, out);
        // It may have dropped tunnels.
        let sending = peer.sending(now);
        for position in 0..peer.tunnels.len() {
            let Some(room) = out.datagrams.room() else { break };
            let usable = sending == Some(position) && self.may_rekey(peer, position);
            let due = peer.tunnels[position].handle_timeout(now, usable, room);
            gave_up |= due == Due::GaveUp;
            self.send_due(peer, position, due, now, out);
        }
        self.check_blocked(peer, now, out);
        if gave_up {
            self.handle_failure(peer, now);
        }
        self.flush(peer, now, out);
        self.probe_path(peer, now, out);
        self.open_planned(peer, now, out);
        self.keep_alive(peer, now, out);
        self.retire(peer, now);
        self.drop_if_idle(peer, now);
        if let Some(at) = next_timeout(peer, self.is_first_pair(peer), now) {
            self.schedule(peer, at);
        }
    }

    /// True unless the keys of the tunnel are no longer in the table: then it serves until it is over.
    fn may_rekey(&self, peer: &Peer, position: usize) -> bool {
        let key = peer.tunnels[position].key;
        let remote = self
            .table
            .peer(peer.id)
            .is_some_and(|spec| spec.keys.iter().any(|remote| remote.epoch == key.remote_epoch));
        remote && key.psk == peer.desired.key.psk && self.table.local_key(key.local_epoch).is_some()
    }

    /// A handshake was given up.
    fn handle_failure(&mut self, peer: &mut Peer, now: Instant) {
        if peer.sending(now).is_some() {
            // What is leaving ends soon.
            let rest = if peer.sends_on_leaving(now) { Duration::ZERO } else { REOPEN };
            peer.open_at = Some(now + rest + self.random.below(self.spread(peer, now)));
            return;
        }
        if matches!(peer.detour, Detour::Blocked { .. }) {
            // Its packets have another way.
            return;
        }
        self.forget_waiting(peer, DropReason::HandshakeTimeout);
        self.report(Event::HandshakeFailed { lane: self.config.lane, peer: peer.id });
    }

    /// Opens a tunnel on the newest keys if that is due, and a new session if one has carried enough messages.
    fn open_planned(&mut self, peer: &mut Peer, now: Instant, out: &mut Output) {
        if peer.open_at.is_some_and(|at| at <= now) {
            peer.open_at = None;
            if !peer.has_session(peer.desired.key, now) {
                self.begin_handshake(peer, now, out);
            }
        }
        if let Some(sending) = peer.sending(now)
            && peer.tunnels[sending].wants_rekey()
        {
            self.begin_handshake_on(peer, sending, now, out);
        }
        if peer.is_waiting() && peer.sending(now).is_none() && !peer.is_attempting() {
            self.begin_handshake(peer, now, out);
        }
    }

    /// Sends an empty packet where the table wants the path kept open. The first pair of lanes is kept up for ever, the
    /// others as long as they have a session.
    fn keep_alive(&mut self, peer: &mut Peer, now: Instant, out: &mut Output) {
        let Some(pause) = peer.keepalive else { return };
        if now.since(peer.last_sent) < pause {
            return;
        }
        peer.last_sent = now;
        let sending = peer.sending(now);
        let keeps_up = self.is_first_pair(peer);
        if let Some(sending) = sending
            && keeps_up
        {
            // boringtun renews a session that carries data; one that is only kept alive ends after three minutes.
            let age = peer.tunnels[sending].established().map(|at| now.since(at));
            if age.is_some_and(|age| age >= RENEW_AFTER) && self.may_rekey(peer, sending) {
                self.begin_handshake_on(peer, sending, now, out);
            }
        }
        match (sending, peer.path.endpoint(), out.datagrams.room()) {
            (Some(sending), Some(endpoint), Some(room)) => {
                if let Sealed::Data(len) = peer.tunnels[sending].seal(&[], now, room) {
                    peer.wire.count_tx(len);
                    out.datagrams.push_tight(len, endpoint.into());
                }
            }
            (None, Some(_), Some(_)) if keeps_up && !peer.is_attempting() => self.begin_handshake(peer, now, out),
            _ => {}
        }
    }

    /// Drops tunnels on older keys that nobody uses any more.
    fn retire(&mut self, peer: &mut Peer, now: Instant) {
        for tunnel in peer.retire(now) {
            self.indices.give_back(tunnel.index);
            let (local_epoch, remote_epoch) = (tunnel.key.local_epoch, tunnel.key.remote_epoch);
            let lane = self.config.lane;
            self.report(Event::TunnelRetired { lane, peer: peer.id, local_epoch, remote_epoch });
        }
    }

    /// Drops all tunnels of a peer that has no session left and works on none.
    fn drop_if_idle(&mut self, peer: &mut Peer, now: Instant) {
        if peer.up && peer.sending(now).is_none() {
            peer.up = false;
            self.report(Event::PeerIdle { lane: self.config.lane, peer: peer.id });
        }
        if peer.tunnels.is_empty() || peer.is_alive(now) || peer.is_waiting() {
            return;
        }
        peer.last_handshake = peer.last_handshake();
        for tunnel in peer.tunnels.drain(..) {
            self.indices.give_back(tunnel.index);
        }
        debug!(lane = self.config.lane, peer = %peer.id, "idle, tunnels dropped");
    }
}

/// When the timers of a peer have to run again; never for one without tunnels or plans.
fn next_timeout(peer: &Peer, keeps_up: bool, now: Instant) -> Option<Instant> {
    let pulse = (!peer.tunnels.is_empty()).then(|| now + PULSE);
    let attempts = peer.tunnels.iter().filter_map(|tunnel| tunnel.poll_timeout());
    let keepalive = peer.keepalive.filter(|_| keeps_up || !peer.tunnels.is_empty()).map(|pause| peer.last_sent + pause);
    let probes = peer.path_mtu.poll_timeout().filter(|_| peer.sending(now).is_some());
    let offers = peer.agreed.poll_timeout();
    attempts.chain(pulse).chain(probes).chain(peer.open_at).chain(keepalive).chain(offers).min()
}
