//! What a lane keeps of one peer it has talked to: tunnels, path, packets that wait, counters.

pub(crate) mod agreed;
pub(crate) mod curve;
pub(crate) mod handshake;
pub(crate) mod index;
pub(crate) mod path;
pub(crate) mod path_mtu;
pub(crate) mod tunnel;

use std::{collections::VecDeque, time::Duration};

use crate::{
    clock::Instant,
    command::{LanePair, PeerSnapshot, Traffic, TunnelSnapshot},
    key::PublicKey,
    packet::pieces::Assembly,
    table::PeerId,
    udp::Ends,
};
use agreed::AgreedKeys;
use path::Path;
use path_mtu::PathMtu;
use tunnel::{Tunnel, TunnelKey};

/// Packets and bytes that wait for a handshake with one peer; the newest are dropped beyond.
const MAX_WAITING: usize = 64;
const MAX_WAITING_BYTES: usize = 128 << 10;
/// Handshakes with a peer that answers stay at its endpoint for so long.
const STEADY: Duration = Duration::from_secs(3);
/// When data stayed unanswered for so long, longer than an honest peer takes, the way may have ended.
pub(crate) const DOUBT: Duration = Duration::from_secs(12);
/// After a newer tunnel carried data, one on older keys is kept until it was idle for so long.
pub(crate) const RETIRE_AFTER: Duration = Duration::from_secs(360);

/// One of a lane's pairs with a lane of a peer's: see [`lane::pairs`](crate::lane).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PeerSlot {
    pub(crate) id: PeerId,
    pub(crate) slot: u8,
}

impl PeerSlot {
    /// The pair that every lane has with every peer.
    pub(crate) fn first(id: PeerId) -> Self {
        Self { id, slot: 0 }
    }
}

/// Why packets of a pair of lanes go by lane 0 instead.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Detour {
    /// They do not.
    None,
    /// The peer is plain WireGuard, and this is another lane.
    Plain,
    /// A handshake stayed unanswered; the last one was begun then.
    Blocked { tried: Instant },
}

/// What a pair of lanes has to be told about itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Pairing {
    pub(crate) slot: u8,
    /// Slots that our lane has with this peer.
    pub(crate) slots: u8,
    pub(crate) remote_lane: u8,
    pub(crate) detour: Detour,
}

/// The tunnel that handshakes are to be begun on: the newest keys of both ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Desired {
    pub(crate) key: TunnelKey,
    pub(crate) remote: PublicKey,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Peer {
    pub(crate) id: PeerId,
    /// Which pair of lanes this is; the same peer may be there once for each.
    pub(crate) slot: u8,
    /// How many pairs our lane has with this peer.
    pub(crate) slots: u8,
    /// The peer's lane.
    pub(crate) remote_lane: u8,
    pub(crate) detour: Detour,
    pub(crate) desired: Desired,
    pub(crate) tunnels: Vec<Tunnel>,
    pub(crate) path: Path,
    pub(crate) path_mtu: PathMtu,
    pub(crate) assembly: Assembly,
    pub(crate) traffic: Traffic,
    /// Datagrams, where `traffic` counts packets.
    pub(crate) wire: Traffic,
    /// When the last handshake was completed whose tunnel is gone.
    pub(crate) last_handshake: Option<Instant>,
    pub(crate) refused_packets: u64,
    pub(crate) keepalive: Option<Duration>,
    /// When a tunnel on the newest keys is to be opened, if that is planned.
    pub(crate) open_at: Option<Instant>,
    pub(crate) last_sent: Instant,
    /// Tick of the wheel at which its timers run next.
    pub(crate) scheduled: Option<u64>,
    /// True while it has had a working session without a pause.
    pub(crate) up: bool,
    /// Keys that were agreed on and wait for their tunnel.
    pub(crate) agreed: AgreedKeys,
    waiting: VecDeque<Vec<u8>>,
    waiting_bytes: usize,
}

impl Peer {
    pub(crate) fn new(id: PeerId, pairing: Pairing, desired: Desired, path: Path, now: Instant) -> Self {
        let Pairing { slot, slots, remote_lane, detour } = pairing;
        Self {
            id,
            slot,
            slots,
            remote_lane,
            detour,
            desired,
            tunnels: Vec::new(),
            path,
            path_mtu: PathMtu::new(now),
            assembly: Assembly::default(),
            traffic: Traffic::default(),
            wire: Traffic::default(),
            last_handshake: None,
            refused_packets: 0,
            keepalive: None,
            open_at: None,
            last_sent: now,
            scheduled: None,
            up: false,
            agreed: AgreedKeys::default(),
            waiting: VecDeque::new(),
            waiting_bytes: 0,
        }
    }

    /// Where its lane keeps it.
    pub(crate) fn at(&self) -> PeerSlot {
        PeerSlot { id: self.id, slot: self.slot }
    }

    /// Position of the tunnel to send on: the newest confirmed one whose session is alive; one that is leaving only if there
    /// is no other.
    pub(crate) fn sending(&self, now: Instant) -> Option<usize> {
        let rank = |tunnel: &Tunnel| (!tunnel.is_leaving(), tunnel.order);
        let mut best: Option<usize> = None;
        for (n, tunnel) in self.tunnels.iter().enumerate() {
            if tunnel.can_send(now) && best.is_none_or(|b| rank(tunnel) > rank(&self.tunnels[b])) {
                best = Some(n);
            }
        }
        best
    }

    /// True while packets go by a tunnel that is leaving.
    pub(crate) fn sends_on_leaving(&self, now: Instant) -> bool {
        self.sending(now).is_some_and(|sending| self.tunnels[sending].is_leaving())
    }

    /// Position of the tunnel with this key.
    pub(crate) fn position(&self, key: TunnelKey) -> Option<usize> {
        self.tunnels.iter().position(|tunnel| tunnel.key == key)
    }

    /// Position of the newest tunnel with this key that we may begin a handshake on.
    pub(crate) fn initiating(&self, key: TunnelKey) -> Option<usize> {
        let may = |tunnel: &&(usize, &Tunnel)| tunnel.1.key == key && tunnel.1.may_initiate();
        let best = self.tunnels.iter().enumerate().filter(|tunnel| may(&tunnel)).max_by_key(|tunnel| tunnel.1.order);
        best.map(|(position, _)| position)
    }

    /// True if packets may be sent on a tunnel with this key.
    pub(crate) fn has_session(&self, key: TunnelKey, now: Instant) -> bool {
        self.tunnels.iter().any(|tunnel| tunnel.key == key && tunnel.can_send(now))
    }

    /// A key has to be agreed on: who begins to want one begins with the best address, and tries the others until there is one.
    pub(crate) fn want_agreed(&mut self, now: Instant) {
        if self.agreed.wanting.is_none() {
            self.agreed.wanting = Some(now);
            self.path.begin();
        }
    }

    /// Where the next initiation of the tunnel at `position` goes: while the peer answers where it is, not elsewhere too, for
    /// what comes by another address moves the tunnel there. That it answers does not say that it still hears, so the others
    /// get their turn all the same.
    pub(crate) fn next_target(&mut self, position: usize, now: Instant) -> Option<Ends> {
        let wanting = self.agreed.wanting.map(|since| now.since(since));
        let trying = self.tunnels[position].attempting_for(now).max(wanting).unwrap_or_default();
        let answers = self.sending(now).is_some_and(|sending| self.tunnels[sending].unanswered(now) < DOUBT);
        match self.path.proved() {
            Some(endpoint) if answers && trying < STEADY => Some(endpoint),
            // From whichever address the system thinks best: the answer tells which one works.
            _ => self.path.next_target().map(Ends::from),
        }
    }

    /// True while any handshake of ours is unanswered.
    pub(crate) fn is_attempting(&self) -> bool {
        self.tunnels.iter().any(Tunnel::is_attempting)
    }

    /// True while a tunnel has a session or works on one.
    pub(crate) fn is_alive(&self, now: Instant) -> bool {
        self.tunnels.iter().any(|tunnel| tunnel.is_alive(now))
    }

    /// Keeps a packet until there is a session; false if too many wait.
    pub(crate) fn wait(&mut self, packet: &[u8]) -> bool {
        if self.waiting.len() >= MAX_WAITING || self.waiting_bytes + packet.len() > MAX_WAITING_BYTES {
            return false;
        }
        self.waiting_bytes += packet.len();
        self.waiting.push_back(packet.to_vec());
        true
    }

    /// The packet that waits longest.
    pub(crate) fn next_waiting(&mut self) -> Option<Vec<u8>> {
        let packet = self.waiting.pop_front()?;
        self.waiting_bytes -= packet.len();
        if self.waiting.is_empty() {
            self.waiting = VecDeque::new();
        }
        Some(packet)
    }

    pub(crate) fn is_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Drops all that waits; says how many packets and bytes that were.
    pub(crate) fn forget_waiting(&mut self) -> (usize, usize) {
        let gone = (self.waiting.len(), self.waiting_bytes);
        self.waiting = VecDeque::new();
        self.waiting_bytes = 0;
        gone
    }

    /// Removes and returns tunnels that a newer one has made superfluous, and those that never came to life.
    pub(crate) fn retire(&mut self, now: Instant) -> Vec<Tunnel> {
        let Some(sending) = self.sending(now) else { return Vec::new() };
        let newest = &self.tunnels[sending];
        let (order, carried) = (newest.order, newest.last_data().is_some());
        let superfluous = |tunnel: &mut Tunnel| {
            if tunnel.order < order {
                carried && tunnel.idle(now) >= RETIRE_AFTER
            } else {
                tunnel.order != order && !tunnel.is_alive(now)
            }
        };
        self.tunnels.extract_if(.., superfluous).collect()
    }

    /// When the last handshake was completed.
    pub(crate) fn last_handshake(&self) -> Option<Instant> {
        self.tunnels.iter().filter_map(Tunnel::established).chain(self.last_handshake).max()
    }

    pub(crate) fn snapshot(&self, lane: usize, now: Instant) -> PeerSnapshot {
        let sending = self.sending(now).map(|n| self.tunnels[n].index);
        let mut ordered: Vec<&Tunnel> = self.tunnels.iter().collect();
        ordered.sort_by_key(|tunnel| tunnel.order);
        let tunnels = ordered.into_iter().map(|tunnel| TunnelSnapshot {
            lane,
            remote_lane: self.remote_lane.into(),
            local_epoch: tunnel.key.local_epoch,
            remote_epoch: tunnel.key.remote_epoch,
            preshared: tunnel.key.psk != 0,
            confirmed: tunnel.can_send(now),
            sending: Some(tunnel.index) == sending,
            established: tunnel.established().map(|at| now.since(at)),
            last_data: tunnel.last_data().map(|at| now.since(at)),
        });
        PeerSnapshot {
            id: self.id,
            endpoint: self.path.endpoint().map(|ends| ends.remote),
            last_handshake: self.last_handshake().map(|at| now.since(at)),
            traffic: self.traffic,
            wire: self.wire,
            refused_packets: self.refused_packets,
            tunnels: tunnels.collect(),
            paths: self.path_mtu.snapshot(lane, self.remote_lane.into(), now).into_iter().collect(),
            blocked: match self.detour {
                Detour::Blocked { .. } => vec![LanePair { local: lane, remote: self.remote_lane.into() }],
                Detour::None | Detour::Plain => Vec::new(),
            },
        }
    }
}
