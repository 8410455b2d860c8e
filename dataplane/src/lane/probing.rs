//! Probes of the paths' MTU: sent from the timers, answered, their answers taken.
//!
//! A probe is a packet on the tunnel that packets are sent on, larger than it needs to be and not to be fragmented; see
//! [`packet::own`](crate::packet::own). Plain WireGuard peers get none: of them control has to know.

use tracing::info;

use super::{Lane, Output};
use crate::{
    clock::Instant,
    packet::own::{Kind, LEN, Own},
    peer::{Peer, tunnel::Sealed},
    table::Lanes,
    udp::Outer,
};

/// What lies around a packet in a datagram: WireGuard's header and tag.
const AROUND: usize = 32;

impl Lane {
    /// Goes on with the search for what the path to a peer carries.
    pub(super) fn probe_path(&mut self, peer: &mut Peer, now: Instant, out: &mut Output) {
        if !self.knows_probes(peer) {
            return peer.path_mtu.forget(now);
        }
        let Some(endpoint) = peer.path.endpoint().filter(|_| peer.sending(now).is_some()) else { return };
        let before = peer.path_mtu.black_holes();
        peer.path_mtu.follow(endpoint.remote, self.table.inner_mtu(), now);
        peer.path_mtu.handle_timeout(peer.traffic.tx_packets, now);
        if peer.path_mtu.black_holes() > before {
            self.stats.black_holes += 1;
            let (lane, remote_lane) = (self.config.lane, peer.remote_lane);
            info!(lane, remote_lane, peer = %peer.id, endpoint = %endpoint.remote, "large packets vanish on the way, trying smaller ones");
        }
        while let Some(probe) = peer.path_mtu.poll_transmit() {
            self.send_probe(peer, probe, now, out);
        }
    }

    /// Takes a probe or an answer that came out of a tunnel, in a datagram of `datagram` bytes.
    pub(super) fn handle_probe(
        &mut self,
        peer: &mut Peer,
        probe: Own,
        datagram: usize,
        now: Instant,
        out: &mut Output,
    ) {
        match probe.kind {
            // One for one and never larger than what was asked: nobody gains by asking much.
            Kind::Probe => {
                let arrived = datagram.saturating_sub(AROUND).min(probe.size.into()) as u16;
                self.send_probe(peer, Own { kind: Kind::Answer, size: arrived, ..probe }, now, out);
            }
            Kind::Answer => {
                peer.path_mtu.handle_answer(probe.number, probe.size, now);
                if let Some(at) = peer.path_mtu.poll_timeout() {
                    self.schedule(peer, at);
                }
            }
            Kind::Piece { .. } => {}
        }
    }

    fn send_probe(&mut self, peer: &mut Peer, probe: Own, now: Instant, out: &mut Output) {
        let dont_fragment = probe.kind == Kind::Probe;
        let size = if dont_fragment { usize::from(probe.size) } else { LEN.next_multiple_of(16) };
        let (Some(sending), Some(ends)) = (peer.sending(now), peer.path.endpoint()) else { return };
        let Some(room) = out.datagrams.room() else { return };
        self.piece.clear();
        self.piece.resize(size.max(LEN), 0);
        probe.write(LEN as u16, &mut self.piece);
        match peer.tunnels[sending].seal(&self.piece, now, room) {
            Sealed::Data(len) => {
                peer.wire.count_tx(len);
                out.datagrams.push_tight(len, Outer { dont_fragment, ..ends.into() });
            }
            Sealed::Initiation(len) => {
                peer.wire.count_tx(len);
                out.datagrams.push_tight(len, ends.into());
            }
            Sealed::Kept => {}
        }
    }

    /// True unless the peer is plain WireGuard, or we are to be.
    fn knows_probes(&self, peer: &Peer) -> bool {
        let is_mesh = |lanes| matches!(lanes, Lanes::Each(_));
        !self.table.is_plain() && self.table.peer(peer.id).is_some_and(|spec| is_mesh(spec.lanes))
    }
}
