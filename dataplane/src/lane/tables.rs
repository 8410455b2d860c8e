//! A new table arrives: what stays, what goes, what is opened anew.

use std::{net::SocketAddr, sync::Arc};

use tracing::info;

use super::{Lane, MAX_LANES};
use crate::{
    clock::Instant,
    key::{PresharedKey, PublicKey},
    peer::{
        Desired, Detour, Peer, PeerSlot,
        curve::is_low_order,
        path::Path,
        tunnel::{Order, Tunnel, TunnelKey},
    },
    table::{PeerId, PeerSpec, Preshared, RemoteKey, Table},
};

/// Tunnels a peer may have: two of our keys times three of its own, and two on keys that are no longer in the table.
const MAX_TUNNELS: usize = 8;

impl Lane {
    /// Uses `table` from now on.
    ///
    /// Peers that are gone lose their tunnels and keys before this returns. Tunnels of the others stay as they are; where
    /// newer keys appeared, another one is opened beside them within the table's spread.
    pub fn set_table(&mut self, table: Arc<Table>, now: Instant) {
        self.gate.set_keys(&table);
        let before = std::mem::replace(&mut self.table, Arc::clone(&table));
        for position in 0..self.peers.len() {
            let Some(mut peer) = self.peers[position].take() else { continue };
            let spec = table.peer(peer.id);
            let same = spec.filter(|spec| before.peer(peer.id).is_some_and(|old| is_same_peer(old, spec)));
            match same {
                Some(spec) if self.keeps_pair(&mut peer, spec) => {
                    self.update_peer(&mut peer, spec, now);
                    self.put(peer);
                }
                // Gone, or the number has another holder: nothing of the old one may serve it. Or it has other lanes.
                _ => self.remove_peer(*peer),
            }
        }
        // Peers that want a session kept up get one without waiting for a packet.
        for spec in table.peers() {
            // One lane holds the path open for all.
            if self.config.lane != 0 || spec.keepalive.is_none() || spec.endpoints.is_empty() {
                continue;
            }
            let Some(mut peer) = self.take_peer(PeerSlot::first(spec.id), now) else { continue };
            if peer.tunnels.is_empty() && peer.open_at.is_none() {
                peer.open_at = Some(now);
                self.schedule(&mut peer, now);
            }
            self.put(peer);
        }
    }

    /// Moves the endpoints of peers; those that were not talked to find theirs in the table.
    pub fn redirect(&mut self, peers: &[(PeerId, SocketAddr)]) {
        for (id, to) in peers {
            let start = self.pairs.position(PeerSlot::first(*id)).min(self.peers.len());
            let slots = self.peers[start..].iter_mut().take(MAX_LANES).flatten();
            for peer in slots.filter(|peer| peer.id == *id) {
                peer.path.redirect(*to, peer.remote_lane);
            }
        }
    }

    /// State for a peer of the table that was not talked to yet.
    pub(super) fn make_peer(&self, at: PeerSlot, now: Instant) -> Option<Box<Peer>> {
        let spec = self.table.peer(at.id)?;
        let desired = self.desired(spec)?;
        let pairing = self.pairs.pairing(spec.lanes, at.slot)?;
        let mut path = Path::new(&spec.endpoints, pairing.remote_lane);
        path.follows_traffic_only = self.table.is_plain();
        let mut peer = Peer::new(at.id, pairing, desired, path, now);
        peer.keepalive = spec.keepalive;
        Some(Box::new(peer))
    }

    /// True if the pair of lanes is one still, although the peer may have more or fewer lanes now.
    fn keeps_pair(&self, peer: &mut Peer, spec: &PeerSpec) -> bool {
        let Some(pairing) = self.pairs.pairing(spec.lanes, peer.slot) else { return false };
        peer.slots = pairing.slots;
        let was_apart = peer.detour == Detour::Plain;
        pairing.remote_lane == peer.remote_lane && was_apart == (pairing.detour == Detour::Plain)
    }

    fn update_peer(&mut self, peer: &mut Peer, spec: &PeerSpec, now: Instant) {
        peer.path.set_candidates(&spec.endpoints, peer.remote_lane);
        peer.keepalive = spec.keepalive;
        let Some(desired) = self.desired(spec) else { return };
        for position in (0..peer.tunnels.len()).rev() {
            let tunnel = &mut peer.tunnels[position];
            if desired.key.is_agreed() && !tunnel.key.is_agreed() {
                self.begin_turn(peer, position, now);
                continue;
            }
            tunnel.stay();
            if !is_in_table(&self.table, spec, tunnel.key) {
                tunnel.cancel_attempt();
            }
        }
        peer.agreed.retain(|key| desired.key.is_agreed() && is_in_table(&self.table, spec, key));
        if peer.desired == desired {
            return;
        }
        peer.desired = desired;
        if peer.has_session(desired.key, now) || peer.tunnels.is_empty() {
            peer.open_at = None;
            return;
        }
        // With a session that works there is no hurry; without one, packets wait for it.
        let works = peer.sending(now).is_some();
        let delay = if works { self.random.below(self.spread(peer, now)) } else { Default::default() };
        peer.open_at = Some(now + delay);
        self.schedule(peer, now + delay);
    }

    /// Drops all that belongs to a peer, keys first.
    fn remove_peer(&mut self, mut peer: Peer) {
        for tunnel in peer.tunnels.drain(..) {
            self.indices.give_back(tunnel.index);
        }
        self.forget_waiting(&mut peer, crate::DropReason::NoRoute);
        info!(lane = self.config.lane, peer = %peer.id, "peer removed, tunnels dropped");
    }

    /// The newest keys of both ends.
    fn desired(&self, spec: &PeerSpec) -> Option<Desired> {
        let (local, remote) = (self.table.local_keys().first()?, spec.keys.first()?);
        if is_low_order(&remote.public) {
            return None;
        }
        let key = TunnelKey { local_epoch: local.epoch, remote_epoch: remote.epoch, psk: self.psk_mark(spec) };
        Some(Desired { key, remote: remote.public })
    }

    /// What tells tunnels with other preshared keys apart.
    pub(super) fn psk_mark(&self, spec: &PeerSpec) -> u64 {
        match &spec.preshared {
            Preshared::None => 0,
            Preshared::Static(psk) => self.random.hash(psk.expose()) | 1,
            Preshared::Agreed { .. } => TunnelKey::agreed(0, 0).psk,
        }
    }

    /// Adds a tunnel for `key` to the peer; its position. `None` if our key is gone or there are too many tunnels.
    pub(super) fn add_tunnel(
        &mut self,
        peer: &mut Peer,
        key: TunnelKey,
        remote: &PublicKey,
        now: Instant,
    ) -> Option<usize> {
        let table = Arc::clone(&self.table);
        let psk = match &table.peer(peer.id)?.preshared {
            Preshared::None => None,
            Preshared::Static(psk) => Some(psk),
            // Only agreements make such tunnels.
            Preshared::Agreed { .. } => return None,
        };
        let index = self.indices.take(peer.at(), &mut self.random)?;
        let position = self.push_tunnel(peer, (key, None), remote, psk, index, now);
        if position.is_none() {
            self.indices.give_back(index);
        }
        position
    }

    /// Makes a tunnel that has an index already; its position. The newest, unless its generation is given. `None` as with
    /// [`add_tunnel`](Self::add_tunnel): the index is the caller's then.
    pub(super) fn push_tunnel(
        &mut self,
        peer: &mut Peer,
        (key, generation): (TunnelKey, Option<u64>),
        remote: &PublicKey,
        psk: Option<&PresharedKey>,
        index: u32,
        now: Instant,
    ) -> Option<usize> {
        if peer.tunnels.len() >= MAX_TUNNELS {
            let sending = peer.sending(now);
            let (worst, _) = peer
                .tunnels
                .iter()
                .enumerate()
                .filter(|(n, _)| Some(*n) != sending)
                .min_by_key(|(_, tunnel)| tunnel.order)?;
            let gone = peer.tunnels.swap_remove(worst);
            self.indices.give_back(gone.index);
        }
        let spec = self.table.peer(peer.id)?;
        let identity = self.gate.identity(key.local_epoch)?;
        // Room for one between any two.
        self.generation += 2;
        // Both ends compare the same two keys and so prefer the same one of two crossed rotations.
        let own_is_lower = self.table.local_publics().first() < spec.keys.first().map(|key| &key.public);
        let order = Order {
            sum: key.local_epoch.saturating_add(key.remote_epoch),
            tie: if own_is_lower { key.local_epoch } else { key.remote_epoch },
            generation: generation.unwrap_or(self.generation),
        };
        peer.tunnels.push(Tunnel::new((key, order), identity, remote, psk, index, now));
        Some(peer.tunnels.len() - 1)
    }

    /// Drops one tunnel of a peer.
    pub(super) fn remove_tunnel(&mut self, peer: &mut Peer, position: usize) {
        let tunnel = peer.tunnels.swap_remove(position);
        self.indices.give_back(tunnel.index);
    }
}

/// True if the two have a key in common and none of one epoch that differs. Tunnels know their keys by epoch only, so
/// whoever shares none is somebody else, even under the same number.
fn is_same_peer(old: &PeerSpec, new: &PeerSpec) -> bool {
    let contradicts = |a: &RemoteKey| new.keys.iter().any(|b| a.epoch == b.epoch && a.public != b.public);
    old.keys.iter().any(|key| new.keys.contains(key)) && !old.keys.iter().any(contradicts)
}

/// True if both keys of the tunnel are still in use.
fn is_in_table(table: &Table, spec: &PeerSpec, key: TunnelKey) -> bool {
    table.local_key(key.local_epoch).is_some() && spec.keys.iter().any(|remote| remote.epoch == key.remote_epoch)
}
