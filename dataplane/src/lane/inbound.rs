//! A datagram from the network: what it is, whose it is, may it come in.

use std::net::IpAddr;

use super::{Lane, MAX_CONTROL_DATAGRAM, Output};
use crate::{
    clock::Instant,
    command::Event,
    drop_reason::DropReason,
    packet::{
        ecn,
        header::{Header, TCP, is_martian_source},
        mss,
        own::{Kind, Own},
    },
    peer::tunnel::{COOKIE, DATA, INITIATION, Opened, RESPONSE, TunnelKey},
    table::{Owner, PeerId, Table},
    udp::{Ends, Outer},
};

/// What STUN messages have in their second word (RFC 8489, section 5). The first byte of a STUN answer is 1, as in a
/// handshake initiation; this tells them apart.
const STUN_MAGIC: [u8; 4] = [0x21, 0x12, 0xa4, 0x42];

impl Lane {
    /// Takes a datagram that arrived under the header `outer`, whose remote end may be forged.
    pub fn handle_datagram(&mut self, outer: impl Into<Outer>, datagram: &[u8], now: Instant, out: &mut Output) {
        let outer = outer.into();
        let from = outer.ends;
        let &[kind, a, b, c, ..] = datagram else {
            return self.drop(DropReason::MalformedDatagram);
        };
        if !(1..=4).contains(&kind) || datagram.get(4..8) == Some(&STUN_MAGIC) && [a, b, c] != [0; 3] {
            return self.pass_to_control(from, datagram, now);
        }
        if [a, b, c] != [0; 3] {
            return self.drop(DropReason::MalformedDatagram);
        }
        match (kind, datagram.len()) {
            (kind, len) if kind == DATA.0 && len >= DATA.1 => self.handle_data(outer, datagram, now, out),
            INITIATION => self.handle_initiation(from, datagram, now, out),
            RESPONSE => self.handle_response(from, datagram, now, out),
            COOKIE => self.handle_cookie(datagram, now, out),
            _ => self.drop(DropReason::MalformedDatagram),
        }
    }

    /// A datagram that is not WireGuard's becomes an event.
    fn pass_to_control(&mut self, from: Ends, datagram: &[u8], now: Instant) {
        if datagram.len() > MAX_CONTROL_DATAGRAM {
            return self.drop(DropReason::MalformedDatagram);
        }
        let is_expected = datagram.get(4..).and_then(<[u8]>::first_chunk).is_some_and(|mark| self.marks.contains(mark));
        let allowance = if is_expected { &mut self.expected } else { &mut self.control };
        if !allowance.take(now) {
            return self.drop(DropReason::EventQueueFull);
        }
        self.report(Event::Datagram { lane: self.config.lane, from: from.remote, bytes: datagram.to_vec() });
    }

    /// Opens a data message and lets the packet in if it may come from this peer.
    fn handle_data(&mut self, outer: Outer, datagram: &[u8], now: Instant, out: &mut Output) {
        let (from, receiver) = (outer.ends, receiver_of(datagram, 4));
        let Some(at) = self.indices.peer(receiver >> 8) else {
            self.drop(DropReason::UnknownIndex);
            return self.replace_lost_session(from.remote, now, out);
        };
        let id = at.id;
        let Some(Some(peer)) = self.peers.get_mut(self.pairs.position(at)) else {
            return self.drop(DropReason::UnknownIndex);
        };
        let Some(tunnel) = peer.tunnels.iter_mut().find(|tunnel| tunnel.index == receiver >> 8) else {
            return self.drop(DropReason::UnknownIndex);
        };
        let Some(room) = out.packets.room().filter(|room| room.len() >= datagram.len()) else {
            return self.drop(DropReason::QueueRefused);
        };
        let had_session = tunnel.can_send(now);
        let opened = match tunnel.open(datagram, now, room) {
            Ok(opened) => opened,
            Err(reason) => return self.drop(reason),
        };
        let news = !had_session || !peer.up || tunnel.is_newly_confirmed();
        let stays = peer.path.is_second(from.remote, now) && stays(&self.table, id, tunnel.key);
        let moved = if stays { None } else { peer.path.prove(from, now) };
        peer.wire.count_rx(datagram.len());
        let (mut probe, mut class) = (None, outer.class);
        let arrived = match opened {
            Opened::Packet(len) => match Own::parse(&room[..len]).filter(|_| !self.table.is_plain()) {
                None => Ok(Some(len)),
                Some(piece) if matches!(piece.kind, Kind::Piece { .. }) => {
                    let whole = peer.assembly.take(piece, &room[..len], class);
                    Ok(whole.map(|(packet, marked)| {
                        class = marked;
                        room[..packet.len()].copy_from_slice(&packet);
                        packet.len()
                    }))
                }
                other => {
                    probe = other;
                    Ok(None)
                }
            },
            Opened::Keepalive => Ok(None),
            Opened::Malformed => Err(DropReason::MalformedInner),
        };
        let segment = peer.path_mtu.limits(self.table.inner_mtu()).fits;
        let check = |len: usize| check(&self.table, id, &mut room[..len], class, segment);
        match arrived.and_then(|len| len.map(check).transpose()) {
            Ok(Some(len)) => {
                peer.traffic.count_rx(len);
                self.stats.traffic.count_rx(len);
                out.packets.push(len, ());
            }
            Ok(None) => {}
            Err(reason) => {
                peer.refused_packets += 1;
                self.stats.drops.add(reason);
            }
        }
        if let Some(before) = moved {
            self.report(Event::EndpointMoved { lane: self.config.lane, peer: id, from: before, to: from.remote });
        }
        if (news || probe.is_some())
            && let Some(mut peer) = self.take_peer(at, now)
        {
            if news {
                self.session_confirmed(&mut peer, now, out);
            }
            if let Some(probe) = probe {
                self.handle_probe(&mut peer, probe, datagram.len(), now, out);
            }
            self.put(peer);
        }
    }
}

/// The receiver index at `at`.
pub(super) fn receiver_of(datagram: &[u8], at: usize) -> u32 {
    match datagram.get(at..at + 4) {
        Some(&[a, b, c, d]) => u32::from_le_bytes([a, b, c, d]),
        _ => 0,
    }
}

/// Two ends that answer each other where they are heard may each hear the other by the address it is about to leave, and
/// change places for ever. One stays: that whose key of this tunnel is the lower one.
fn stays(table: &Table, peer: PeerId, tunnel: TunnelKey) -> bool {
    let local = table.local_keys().iter().zip(table.local_publics()).find(|(key, _)| key.epoch == tunnel.local_epoch);
    let remote = table.peer(peer).and_then(|spec| spec.keys.iter().find(|key| key.epoch == tunnel.remote_epoch));
    !table.is_plain() && local.zip(remote).is_some_and(|((_, local), remote)| *local < remote.public)
}

/// Decides whether an authentic packet of a peer may come in, and its length; carries congestion marks of the way into it and cuts TCP's
/// segment size to what the path back carries, `segment`.
fn check(table: &Table, peer: PeerId, packet: &mut [u8], class: u8, segment: u16) -> Result<usize, DropReason> {
    let header = Header::parse(packet).ok_or(DropReason::MalformedInner)?;
    if is_martian_source(header.source) && !table.is_plain() {
        return Err(DropReason::MartianSource);
    }
    match table.owner(header.source) {
        Some(Owner::Peer(owner)) if owner == peer => {}
        Some(Owner::Own) => return Err(DropReason::OwnSource),
        _ => return Err(DropReason::WrongSource),
    }
    if !table.is_plain() && !is_ours(table, header.destination) {
        return Err(DropReason::ForeignDestination);
    }
    if !ecn::decapsulate(packet, class) && !table.is_plain() {
        return Err(DropReason::CongestionUnmarkable);
    }
    if header.protocol == TCP && !table.is_plain() {
        mss::clamp(packet, &header, segment);
    }
    Ok(header.len)
}

/// True for destinations that packets may have when they come out of a tunnel.
fn is_ours(table: &Table, destination: IpAddr) -> bool {
    // Multicast, loopback and the like are refused as destinations just as they are as sources.
    !is_martian_source(destination) && (!table.checks_own() || table.owner(destination) == Some(Owner::Own))
}
