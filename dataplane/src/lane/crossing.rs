//! Packets that have to leave by another pair of lanes than their flow's: by lane 0, which every peer has.
//!
//! A plain WireGuard peer knows lane 0 only. Any other may be behind something that lets the port of lane 0 through and
//! not that of the next: then a handshake on that lane stays unanswered, and its flows take the way of lane 0 until one
//! is answered. Lane 0 owns its tunnels, so packets cross to it in batches ([`Output::crossing`]).

use std::time::Duration;

use tracing::info;

use super::{Lane, Output, outbound};
use crate::{
    clock::Instant,
    drop_reason::DropReason,
    packet::{header::TCP, mss},
    peer::{Detour, Peer, PeerSlot},
    table::{Owner, PeerId},
};

/// A handshake of another pair of lanes than the first that stays unanswered for so long makes its flows use lane 0. Two
/// initiations, a second apart, are lost by chance rarely enough.
pub(super) const BLOCKED_AFTER: Duration = Duration::from_secs(2);
/// While packets take the way of lane 0, their own lane is tried again after this time.
const TRY_AGAIN: Duration = Duration::from_secs(60);

/// Which way a packet takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    /// One of this lane's.
    Slot(PeerSlot),
    /// Lane 0 sends it.
    Crossing,
}

impl Lane {
    /// The way of a flow to a peer; `None` if the peer is not in the table.
    pub(super) fn way(
        &mut self,
        id: PeerId,
        hash: impl FnOnce(&Self) -> u32,
        now: Instant,
        out: &mut Output,
    ) -> Option<Way> {
        let first = PeerSlot::first(id);
        let position = self.pairs.position(first);
        if self.peers.get(position).is_none_or(Option::is_none) {
            let peer = self.take_peer(first, now)?;
            self.put(peer);
        }
        let slots = self.peers[position].as_ref().map_or(1, |peer| peer.slots);
        let mut at = first;
        if slots > 1 {
            at.slot = self.pairs.slot_of_flow(hash(self), slots);
        }
        let peer = self.peers.get(self.pairs.position(at)).and_then(Option::as_deref);
        let way = match peer.map(|peer| peer.detour) {
            None | Some(Detour::None) => return Some(Way::Slot(at)),
            Some(Detour::Plain) => return Some(Way::Crossing),
            Some(Detour::Blocked { .. }) if self.config.lane == 0 => Way::Slot(first),
            Some(Detour::Blocked { .. }) => Way::Crossing,
        };
        self.try_again(at, now, out);
        Some(way)
    }

    /// Takes a packet that crossed over from another lane; see [`handle_packet`](Self::handle_packet).
    pub fn handle_crossed(&mut self, buffer: &mut [u8], len: usize, now: Instant, out: &mut Output) {
        let Some((packet, header)) = outbound::parse(buffer, len) else {
            return self.drop(DropReason::MalformedPacket);
        };
        let Some(Owner::Peer(id)) = self.table.owner(header.destination) else {
            return self.drop(DropReason::NoRoute);
        };
        let way = Way::Slot(PeerSlot::first(id));
        if header.protocol == TCP && !self.table.is_plain() {
            mss::clamp(packet, &header, self.limits(way).fits);
        }
        self.send_fitting(way, (buffer, header), now, out);
    }

    /// Puts a packet among those that cross to lane 0.
    pub(super) fn cross(&mut self, packet: &[u8], out: &mut Output) {
        match out.crossing.room() {
            Some(room) => {
                room[..packet.len()].copy_from_slice(packet);
                out.crossing.push(packet.len(), ());
                self.stats.crossed_packets += 1;
            }
            None => self.drop(DropReason::CrossingFull),
        }
    }

    /// True if this is the pair of lanes that all peers have: what is blocked there has no other way.
    pub(super) fn is_first_pair(&self, peer: &Peer) -> bool {
        self.config.lane == 0 && peer.slot == 0
    }

    /// Takes the way of lane 0 from now on if a handshake has been unanswered for too long; what waits goes first.
    pub(super) fn check_blocked(&mut self, peer: &mut Peer, now: Instant, out: &mut Output) {
        let unanswered = peer.tunnels.iter().filter_map(|tunnel| tunnel.attempting_for(now)).max();
        let blocked = unanswered.is_some_and(|time| time >= BLOCKED_AFTER);
        if !blocked || self.is_first_pair(peer) || peer.sending(now).is_some() {
            return;
        }
        if peer.detour == Detour::None {
            let (lane, remote_lane) = (self.config.lane, peer.remote_lane);
            info!(lane, remote_lane, peer = %peer.id, "lane unanswered, its flows use lane 0");
            peer.detour = Detour::Blocked { tried: now };
        }
        while let Some(mut packet) = peer.next_waiting() {
            self.waiting_bytes -= packet.len();
            if self.config.lane == 0 {
                let len = packet.len();
                self.handle_crossed(&mut packet, len, now, out);
            } else {
                self.cross(&packet, out);
            }
        }
    }

    /// Begins a handshake on a blocked pair of lanes if the last one is long ago.
    fn try_again(&mut self, at: PeerSlot, now: Instant, out: &mut Output) {
        let Some(Some(peer)) = self.peers.get_mut(self.pairs.position(at)) else { return };
        let Detour::Blocked { tried } = &mut peer.detour else { return };
        if now.since(*tried) < TRY_AGAIN {
            return;
        }
        *tried = now;
        let Some(mut peer) = self.take_peer(at, now) else { return };
        if !peer.is_attempting() {
            self.begin_handshake(&mut peer, now, out);
        }
        self.put(peer);
    }

    /// Flows of this pair use it again.
    pub(super) fn end_detour(&mut self, peer: &mut Peer) {
        if let Detour::Blocked { .. } = peer.detour {
            peer.detour = Detour::None;
            let (lane, remote_lane) = (self.config.lane, peer.remote_lane);
            info!(lane, remote_lane, peer = %peer.id, "lane answers, its flows use it again");
        }
    }
}
