//! Handshakes: begun, answered, finished, confirmed.

use std::{net::SocketAddr, time::Duration};

use tracing::debug;

use super::{Lane, MAX_LANES, Output, crossing::BLOCKED_AFTER, inbound::receiver_of};
use crate::{
    clock::Instant,
    command::Event,
    drop_reason::DropReason,
    peer::{
        Detour, Peer, PeerSlot,
        handshake::{Admission, Origin},
        index::Indices,
        tunnel::{Due, INITIATION, TunnelKey},
    },
    table::{Lanes, PeerId},
    udp::Ends,
};

impl Lane {
    /// Begins a handshake with the first lane of a peer now, for which there may be no packet yet. Nothing happens for unknown peers,
    /// without an endpoint, or while one is under way.
    pub fn initiate(&mut self, id: PeerId, now: Instant, out: &mut Output) {
        let mut at = PeerSlot::first(id);
        while let Some(mut peer) = self.take_peer(at, now) {
            let slots = peer.slots;
            // A plain peer has lane 0 only.
            if !peer.is_attempting() && peer.detour != Detour::Plain {
                self.begin_handshake(&mut peer, now, out);
            }
            self.put(peer);
            at.slot += 1;
            if at.slot >= slots {
                return;
            }
        }
    }

    /// Somebody at `from` sends on a session that is not here. Is that a peer without any, it lost this one with us, in a
    /// restart or because it was away from the table, and would send into the void until it misses an answer, 15 s
    /// (whitepaper, section 6.5): a handshake begins at once. Nothing authenticates this: there are [`Allowance`]s, and what
    /// stands is left alone. Plain WireGuard does without.
    ///
    /// [`Allowance`]: super::Allowance
    pub(super) fn replace_lost_session(&mut self, from: SocketAddr, now: Instant, out: &mut Output) {
        if self.table.is_plain() {
            return;
        }
        let Some(at) = self.pair_at(from) else { return };
        let stands = self.peers.get(self.pairs.position(at)).and_then(Option::as_ref);
        if stands.is_some_and(|peer| peer.is_attempting() || peer.sending(now).is_some()) || !self.lost.take(now) {
            return;
        }
        let Some(mut peer) = self.take_peer(at, now) else { return };
        debug!(lane = self.config.lane, peer = %peer.id, endpoint = %from, "a session was lost, and another begins");
        self.begin_handshake(&mut peer, now, out);
        self.put(peer);
    }

    /// The pair that has this address at its other end, by the table.
    fn pair_at(&self, from: SocketAddr) -> Option<PeerSlot> {
        let other_end = |lane: u8| {
            let spec = self.table.peer_at(SocketAddr::new(from.ip(), from.port().checked_sub(lane.into())?))?;
            let slot = self.pairs.slot_of_lane(spec.lanes, lane.into())?;
            Some(PeerSlot { id: spec.id, slot })
        };
        (0..MAX_LANES as u8).find_map(other_end)
    }

    /// Sends an initiation for the newest keys of both ends.
    pub(super) fn begin_handshake(&mut self, peer: &mut Peer, now: Instant, out: &mut Output) {
        let desired = peer.desired;
        if desired.key.is_agreed() {
            if let Some(position) = self.agreed_position(peer, now) {
                self.begin_handshake_on(peer, position, now, out);
            }
            return;
        }
        let position = match peer.position(desired.key) {
            Some(position) => position,
            None => match self.add_tunnel(peer, desired.key, &desired.remote, now) {
                Some(position) => position,
                None => return self.drop(DropReason::NoEndpoint),
            },
        };
        self.begin_handshake_on(peer, position, now, out);
    }

    /// Sends an initiation on one tunnel.
    pub(super) fn begin_handshake_on(&mut self, peer: &mut Peer, position: usize, now: Instant, out: &mut Output) {
        if peer.tunnels[position].is_attempting() {
            return;
        }
        if peer.agreed.wanting.is_none() {
            peer.path.begin();
        }
        let Some(room) = out.datagrams.room() else {
            // The timer comes back to it.
            return self.schedule(peer, now);
        };
        let due = peer.tunnels[position].initiate(now, room);
        self.send_due(peer, position, due, now, out);
        self.schedule(peer, now + Duration::from_secs(1));
    }

    /// Puts what a tunnel made into the output, addressed as its kind wants.
    pub(super) fn send_due(&mut self, peer: &mut Peer, position: usize, due: Due, now: Instant, out: &mut Output) {
        match due {
            Due::Initiation(len) => {
                let target = peer.next_target(position, now);
                let jitter = self.random.below(Duration::from_secs(1));
                // A lane that does not answer has to be known soon.
                let young = |time| time < BLOCKED_AFTER && !self.is_first_pair(peer);
                let hurry = peer.tunnels[position].attempting_for(now).is_some_and(young);
                let untried = hurry || peer.path.has_untried();
                let tunnel = &mut peer.tunnels[position];
                tunnel.retry(now, untried, jitter);
                if let Some(retry_at) = tunnel.poll_timeout() {
                    self.schedule(peer, retry_at);
                }
                match target {
                    Some(target) => {
                        if let Some(offer) = peer.tunnels[position].offer_ahead(now) {
                            put_ahead(&offer, len, target, out);
                            peer.wire.count_tx(offer.len());
                        }
                        peer.wire.count_tx(len);
                        out.datagrams.push_tight(len, target.into());
                    }
                    None => self.drop(DropReason::NoEndpoint),
                }
            }
            Due::Keepalive(len) => match peer.path.endpoint() {
                Some(endpoint) => {
                    peer.last_sent = now;
                    peer.wire.count_tx(len);
                    out.datagrams.push_tight(len, endpoint.into());
                }
                None => self.drop(DropReason::NoEndpoint),
            },
            Due::Nothing | Due::GaveUp => {}
        }
    }

    pub(super) fn handle_initiation(&mut self, from: Ends, initiation: &[u8], now: Instant, out: &mut Output) {
        let Some(room) = out.datagrams.room() else {
            return self.drop(DropReason::SendFailed);
        };
        let origin = Origin { from: from.remote, listed: self.table.is_endpoint(from.remote.ip()) };
        let (local_epoch, remote) = match self.gate.admit(origin, initiation, now, &self.random, room) {
            Admission::Admitted { local_epoch, remote } => (local_epoch, remote),
            Admission::Cookie(len) => {
                out.datagrams.push_tight(len, from.into());
                self.stats.handshakes += 1;
                self.stats.cookies_sent += 1;
                return self.drop(DropReason::CookieDemanded);
            }
            Admission::Refused(reason) => return self.drop(reason),
        };
        self.stats.handshakes += 1;
        let Some((id, remote_epoch)) = self.table.peer_of_key(&remote) else {
            return self.drop(DropReason::UnknownPeer);
        };
        let Some(spec) = self.table.peer(id) else {
            return self.drop(DropReason::UnknownPeer);
        };
        let psk = self.psk_mark(spec);
        let Some(slot) = self.slot_of_initiator(spec.lanes, receiver_of(initiation, 4)) else {
            return self.drop(DropReason::WrongLane);
        };
        let Some(mut peer) = self.take_peer(PeerSlot { id, slot }, now) else {
            return self.drop(DropReason::UnknownPeer);
        };
        let key = TunnelKey { local_epoch, remote_epoch, psk };
        if key.is_agreed() {
            self.answer_agreed(&mut peer, (key, remote), (from, initiation), now, out);
            return self.put(peer);
        }
        let known = peer.position(key);
        let position = known.or_else(|| self.add_tunnel(&mut peer, key, &remote, now));
        if let Some(position) = position {
            let answered = self.answer(&mut peer, position, (from, initiation), now, out);
            if let Err(reason) = answered {
                self.drop(reason);
                if known.is_none() {
                    self.remove_tunnel(&mut peer, position);
                }
            }
        }
        self.put(peer);
    }

    /// Which of our pairs an initiation is for whose sender has this index; `None` if it should have reached another lane of
    /// ours. Plain WireGuard peers put no lane into their indices.
    fn slot_of_initiator(&self, theirs: Lanes, sender: u32) -> Option<u8> {
        let lane = match theirs {
            Lanes::Plain => 0,
            Lanes::Each(_) => Indices::lane(sender >> 8),
        };
        self.pairs.slot_of_lane(theirs, lane)
    }

    /// Answers an initiation on the tunnel that it is for. Neither endpoint nor current session change by it.
    pub(super) fn answer(
        &mut self,
        peer: &mut Peer,
        position: usize,
        (from, initiation): (Ends, &[u8]),
        now: Instant,
        out: &mut Output,
    ) -> Result<(), DropReason> {
        self.prepare(peer, position, true, now, out);
        let room = out.datagrams.room().ok_or(DropReason::SendFailed)?;
        let len = peer.tunnels[position].answer(initiation, now, room)?;
        peer.wire.count_rx(initiation.len());
        peer.wire.count_tx(len);
        out.datagrams.push_tight(len, from.into());
        debug!(lane = self.config.lane, peer = %peer.id, endpoint = %from.remote, "initiation answered");
        self.schedule(peer, now + Duration::from_secs(1));
        Ok(())
    }

    /// Lets a tunnel do what it has to before a handshake message; at most a few datagrams.
    fn prepare(&mut self, peer: &mut Peer, position: usize, answering: bool, now: Instant, out: &mut Output) {
        for _ in 0..4 {
            let Some(room) = out.datagrams.room() else { return };
            let due = peer.tunnels[position].before_handshake(now, answering, room);
            if due == Due::Nothing {
                return;
            }
            self.send_due(peer, position, due, now, out);
        }
    }

    pub(super) fn handle_response(&mut self, from: Ends, response: &[u8], now: Instant, out: &mut Output) {
        let Some((mut peer, position)) = self.take_receiver(receiver_of(response, 8), now) else {
            return self.drop(DropReason::UnknownIndex);
        };
        self.prepare(&mut peer, position, false, now, out);
        let finished = match out.datagrams.room() {
            Some(room) => peer.tunnels[position].finish(response, now, room),
            None => Err(DropReason::SendFailed),
        };
        match finished {
            Ok(len) => {
                // Only the peer can have answered an initiation of ours: this address is proved.
                if let Some(before) = peer.path.prove(from, now) {
                    let lane = self.config.lane;
                    self.report(Event::EndpointMoved { lane, peer: peer.id, from: before, to: from.remote });
                }
                peer.last_sent = now;
                peer.wire.count_rx(response.len());
                peer.wire.count_tx(len);
                out.datagrams.push_tight(len, from.into());
                self.session_confirmed(&mut peer, now, out);
            }
            Err(reason) => self.drop(reason),
        }
        self.put(peer);
    }

    pub(super) fn handle_cookie(&mut self, reply: &[u8], now: Instant, out: &mut Output) {
        let Some((mut peer, position)) = self.take_receiver(receiver_of(reply, 4), now) else {
            return self.drop(DropReason::UnknownIndex);
        };
        if let Some(room) = out.datagrams.room() {
            let tunnel = &mut peer.tunnels[position];
            match tunnel.handle_cookie(reply, now, room) {
                Ok(true) => {
                    let due = tunnel.initiate(now, room);
                    // The address that sent the cookie is the one that was tried last.
                    peer.path.try_again();
                    self.send_due(&mut peer, position, due, now, out);
                }
                Ok(false) => {}
                Err(reason) => self.drop(reason),
            }
        }
        self.put(peer);
    }

    /// The peer and tunnel that a receiver index names, taken out to be put back.
    fn take_receiver(&mut self, receiver: u32, now: Instant) -> Option<(Box<Peer>, usize)> {
        let at = self.indices.peer(receiver >> 8)?;
        let peer = self.take_peer(at, now)?;
        match peer.tunnels.iter().position(|tunnel| tunnel.index == receiver >> 8) {
            Some(position) => Some((peer, position)),
            None => {
                self.put(peer);
                None
            }
        }
    }

    /// A session was confirmed: tells control what is new and sends what waited for it.
    pub(super) fn session_confirmed(&mut self, peer: &mut Peer, now: Instant, out: &mut Output) {
        self.end_detour(peer);
        if let Some(endpoint) = peer.path.endpoint() {
            self.gate.remember(endpoint.remote.ip(), &self.random);
        }
        self.settle_agreed(peer, now);
        let lane = self.config.lane;
        if !peer.up {
            peer.up = true;
            self.report(Event::PeerUp { lane, peer: peer.id, endpoint: peer.path.endpoint().map(|ends| ends.remote) });
        }
        for tunnel in &mut peer.tunnels {
            if tunnel.take_confirmation() {
                let TunnelKey { local_epoch, remote_epoch, .. } = tunnel.key;
                self.report(Event::TunnelConfirmed { lane, peer: peer.id, local_epoch, remote_epoch });
            }
        }
        self.flush(peer, now, out);
        self.probe_path(peer, now, out);
        let probes = peer.path_mtu.poll_timeout();
        self.schedule(peer, probes.into_iter().chain([now + Duration::from_secs(1)]).min().unwrap_or(now));
    }
}

/// Puts a datagram before the one of `len` bytes that lies in the room of `out` and was not pushed yet.
fn put_ahead(ahead: &[u8], len: usize, target: Ends, out: &mut Output) {
    let Some(room) = out.datagrams.room() else { return };
    let mut later = [0; INITIATION.1];
    later[..len].copy_from_slice(&room[..len]);
    room[..ahead.len()].copy_from_slice(ahead);
    out.datagrams.push_tight(ahead.len(), target.into());
    // A full output keeps one slot for this: `Output::is_nearly_full` leaves dozens.
    if let Some(room) = out.datagrams.room() {
        room[..len].copy_from_slice(&later[..len]);
    }
}
