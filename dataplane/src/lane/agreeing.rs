//! Tunnels whose preshared keys control agrees on with the peer, one by one: asked for, used, renewed.
//!
//! [`peer::agreed`](crate::peer::agreed) has the picture. What an agreement is made of is control's: here a key is 32
//! bytes, and an offer a datagram that is sent ahead of the initiation it belongs to.

use std::sync::Arc;

use tracing::debug;

use super::{Lane, Output, inbound::receiver_of};
use crate::{
    clock::Instant,
    command::{Agreement, Event, Origin},
    drop_reason::DropReason,
    key::PublicKey,
    peer::{
        Peer, PeerSlot,
        agreed::{ASK_AGAIN, OurKey, PARKED_FOR, Parked, RENEW_AFTER, TheirKey},
        index::Indices,
        tunnel::{ATTEMPT_TIME, Agreed, INITIATION, TunnelKey},
    },
    table::{PeerSpec, Preshared},
    udp::Ends,
};

impl Lane {
    /// Takes the keys of an agreement for the pairs of this lane. Dropped without a word unless the table says
    /// [`Preshared::Agreed`] of the peer and has both keys.
    pub fn agree(&mut self, agreement: &Agreement, now: Instant, out: &mut Output) {
        let table = Arc::clone(&self.table);
        let Some(spec) = table.peer(agreement.peer) else { return };
        let tunnel = TunnelKey::agreed(agreement.local_epoch, agreement.remote_epoch);
        let Some(remote) = self.remote_of(spec, tunnel) else { return };
        let own = self.config.lane;
        for pair in agreement.pairs.iter().filter(|pair| pair.lanes.local == own) {
            let Ok(remote_lane) = u32::try_from(pair.lanes.remote) else { continue };
            let Some(slot) = self.pairs.slot_of_lane(spec.lanes, remote_lane) else { continue };
            let Some(mut peer) = self.take_peer(PeerSlot { id: spec.id, slot }, now) else { continue };
            let (psk, since) = (pair.psk.clone(), now);
            match &agreement.origin {
                Origin::Own { offer } if Indices::lane(pair.index) as usize == own => {
                    let key = OurKey { tunnel, psk, index: pair.index, offer: Arc::clone(offer), since };
                    peer.agreed.set_ours(key);
                    if peer.agreed.asked.take().is_some() {
                        self.begin_handshake(&mut peer, now, out);
                    }
                }
                Origin::Own { .. } => {}
                Origin::Peer => {
                    peer.agreed.add_theirs(TheirKey { tunnel, psk, sender: pair.index, since });
                    if let Some(parked) = peer.agreed.unpark(tunnel, pair.index, now) {
                        let arrived = (parked.from, parked.initiation.as_slice());
                        self.answer_agreed(&mut peer, (tunnel, remote), arrived, now, out);
                    }
                }
            }
            if let Some(at) = peer.agreed.poll_timeout() {
                self.schedule(&mut peer, at);
            }
            self.put(peer);
        }
    }

    /// The peer's key of a tunnel, if agreed keys are what the table wants and it has both static ones.
    fn remote_of(&self, spec: &PeerSpec, tunnel: TunnelKey) -> Option<PublicKey> {
        self.table.local_key(tunnel.local_epoch)?;
        let remote = spec.keys.iter().find(|remote| remote.epoch == tunnel.remote_epoch)?;
        matches!(spec.preshared, Preshared::Agreed { .. }).then_some(remote.public)
    }

    /// Finds or makes the tunnel to begin a handshake on. `None`: a key has to be agreed on first, or the peer is about
    /// to confirm a tunnel of its own.
    pub(super) fn agreed_position(&mut self, peer: &mut Peer, now: Instant) -> Option<usize> {
        let (key, remote) = (peer.desired.key, peer.desired.remote);
        if let Some(position) = peer.initiating(key) {
            return Some(position);
        }
        if peer.tunnels.iter().any(|tunnel| tunnel.key == key && tunnel.awaits_confirmation(now, ASK_AGAIN)) {
            self.schedule(peer, now + ASK_AGAIN);
            return None;
        }
        let made = peer.agreed.take_ours(key, now).and_then(|ours| {
            let OurKey { psk, index, offer, .. } = ours;
            if !self.indices.reserve(index, peer.at()) {
                return None;
            }
            let position = self.push_tunnel(peer, (key, None), &remote, Some(&psk), index, now);
            if position.is_none() {
                self.indices.give_back(index);
            }
            let position = position?;
            peer.tunnels[position].agreed = Some(Agreed { offer: Some(offer), remote_index: None, is_spent: false });
            Some(position)
        });
        if made.is_none() {
            self.ask_for_key(peer, now);
        }
        made
    }

    /// Asks control for a key, unless it was just asked.
    fn ask_for_key(&mut self, peer: &mut Peer, now: Instant) {
        if peer.agreed.asked.is_some_and(|at| now.since(at) < ASK_AGAIN) {
            return;
        }
        peer.agreed.asked = Some(now);
        peer.want_agreed(now);
        let TunnelKey { local_epoch, remote_epoch, .. } = peer.desired.key;
        self.report(Event::KeyWanted { lane: self.config.lane, peer: peer.id, local_epoch, remote_epoch });
        self.schedule(peer, now + ASK_AGAIN);
    }

    /// Answers an initiation whose key is here; parks it if not.
    pub(super) fn answer_agreed(
        &mut self,
        peer: &mut Peer,
        (tunnel, remote): (TunnelKey, PublicKey),
        (from, initiation): (Ends, &[u8]),
        now: Instant,
        out: &mut Output,
    ) {
        let sender = receiver_of(initiation, 4) >> 8;
        let known = peer.tunnels.iter().position(|known| known.key == tunnel && known.is_of_sender(sender));
        let position = known.or_else(|| self.add_theirs(peer, tunnel, &remote, sender, now));
        let Some(position) = position else {
            return self.park(peer, (tunnel, sender), (from, initiation), now);
        };
        match self.answer(peer, position, (from, initiation), now, out) {
            Ok(()) => peer.agreed.forget_theirs(tunnel, sender),
            Err(reason) => {
                self.drop(reason);
                if known.is_none() {
                    self.remove_tunnel(peer, position);
                }
            }
        }
    }

    /// Makes the tunnel for an initiation of the peer's; `None` if its key is not here.
    fn add_theirs(
        &mut self,
        peer: &mut Peer,
        tunnel: TunnelKey,
        remote: &PublicKey,
        sender: u32,
        now: Instant,
    ) -> Option<usize> {
        let psk = peer.agreed.theirs(tunnel, sender)?.psk.clone();
        // Offers that crossed: what the lower node offered is preferred, by both ends. Any other is newer than ours.
        let crossed = peer.tunnels.iter().filter(|own| own.key == tunnel && own.awaits_answer());
        let crossed = crossed.map(|own| own.order.generation).max().filter(|_| self.goes_first(peer));
        let index = self.indices.take(peer.at(), &mut self.random)?;
        let below = crossed.map(|generation| generation - 1);
        let position = self.push_tunnel(peer, (tunnel, below), remote, Some(&psk), index, now);
        if position.is_none() {
            self.indices.give_back(index);
        }
        let position = position?;
        peer.tunnels[position].agreed = Some(Agreed { offer: None, remote_index: Some(sender), is_spent: false });
        Some(position)
    }

    fn goes_first(&self, peer: &Peer) -> bool {
        let spec = self.table.peer(peer.id);
        matches!(spec.map(|spec| &spec.preshared), Some(Preshared::Agreed { own_first: true }))
    }

    fn park(
        &mut self,
        peer: &mut Peer,
        (tunnel, sender): (TunnelKey, u32),
        (from, initiation): (Ends, &[u8]),
        now: Instant,
    ) {
        let Ok(initiation) = <[u8; INITIATION.1]>::try_from(initiation) else {
            return self.drop(DropReason::MalformedDatagram);
        };
        let parked = Parked { from, initiation: Box::new(initiation), tunnel, sender, since: now };
        if !peer.agreed.park(parked) {
            self.drop(DropReason::MissingKey);
        }
        self.schedule(peer, now + PARKED_FOR);
    }

    /// Drops what waited too long, gives up handshakes that another key may help, asks again. True if the peer has been
    /// out of reach for so long that its packets are to be dropped.
    pub(super) fn renew_agreed(&mut self, peer: &mut Peer, now: Instant, out: &mut Output) -> bool {
        if peer.agreed.expire(now) {
            self.drop(DropReason::MissingKey);
        }
        let mut renew = peer.agreed.asked.is_some_and(|at| now.since(at) >= ASK_AGAIN);
        for position in (0..peer.tunnels.len()).rev() {
            let tunnel = &mut peer.tunnels[position];
            if !tunnel.needs_another_key(now, RENEW_AFTER) {
                continue;
            }
            renew |= tunnel.key == peer.desired.key;
            tunnel.spend();
            if !tunnel.is_alive(now) {
                self.remove_tunnel(peer, position);
            }
        }
        let key = peer.desired.key;
        let works =
            |tunnel: &crate::peer::tunnel::Tunnel| tunnel.key == key && tunnel.can_send(now) && !tunnel.is_spent();
        if !renew {
            return false;
        }
        if peer.tunnels.iter().any(works) {
            // What was asked for before the keys changed, say, is not wanted any more.
            peer.agreed.settle();
            return false;
        }
        if peer.agreed.wanting.is_some_and(|since| now.since(since) >= ATTEMPT_TIME) {
            debug!(lane = self.config.lane, peer = %peer.id, "no key agreed on, or none that the peer answers");
            peer.agreed.settle();
            return true;
        }
        peer.want_agreed(now);
        self.begin_handshake(peer, now, out);
        false
    }

    /// A tunnel was confirmed: what is under way on one that gives way to it ends.
    pub(super) fn settle_agreed(&mut self, peer: &mut Peer, now: Instant) {
        let Some(sending) = peer.sending(now) else { return };
        let (key, order) = (peer.tunnels[sending].key, peer.tunnels[sending].order);
        if key != peer.desired.key {
            return;
        }
        peer.agreed.settle();
        for tunnel in peer.tunnels.iter_mut().filter(|tunnel| tunnel.key == key && tunnel.order < order) {
            if tunnel.agreed.is_some() {
                tunnel.cancel_attempt();
            }
        }
    }
}
