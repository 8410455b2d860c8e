//! A packet from the TUN: whose it is, may it go, seal it or let it wait.

use super::{Lane, MAX_WAITING_BYTES, Output, crossing::Way};
use crate::{
    clock::Instant,
    drop_reason::DropReason,
    packet::{
        checksum,
        dscp::Dscp,
        ecn,
        fragment::Fragments,
        header::{Fragment, Header, TCP, UDP, is_unroutable_destination},
        icmp::{self, Problem},
        mss,
        offload::{Cut, Transport},
        own,
        pieces::Pieces,
        segment::Segments,
    },
    peer::{
        Peer, PeerSlot,
        path_mtu::Limits,
        tunnel::{DATA, Sealed},
    },
    table::Owner,
    udp::Outer,
};

/// Length of a UDP header.
const UDP_HEADER: usize = 8;
/// Up to so many peers, all are looked at for one that a datagram comes back from: 1 us.
const LOOP_PEERS: usize = 256;

impl Lane {
    /// Takes a packet that a local sender wants carried: the first `len` bytes of `buffer`. The bytes behind it, up to
    /// the next multiple of 16, are overwritten with padding; without them the packet goes unpadded.
    pub fn handle_packet(&mut self, buffer: &mut [u8], len: usize, now: Instant, out: &mut Output) {
        let Some((packet, header)) = parse(buffer, len) else {
            return self.drop(DropReason::MalformedPacket);
        };
        let way = match self.route(packet, &header, now, out) {
            Ok(way) => way,
            Err(reason) => return self.drop(reason),
        };
        if header.protocol == TCP && !self.table.is_plain() {
            mss::clamp(packet, &header, self.limits(way).fits);
        }
        self.send_fitting(way, (buffer, header), now, out);
    }

    /// Sends a packet in as many pieces as its way wants, or tells its sender what that carries.
    pub(super) fn send_fitting(
        &mut self,
        way: Way,
        (buffer, header): (&mut [u8], Header),
        now: Instant,
        out: &mut Output,
    ) {
        let limits = self.limits(way);
        if header.len <= usize::from(limits.cut) || self.table.is_plain() {
            let padded = pad(buffer, header.len, limits.cut);
            return self.send(way, &header, padded, now, out);
        }
        if header.protocol == TCP && checksum::holds(buffer, &header) {
            let cut = Cut { transport: Transport::Tcp, size: u16::MAX };
            if let Some(mut segments) =
                Segments::new(buffer, header.len, cut).filter(|s| s.headers() < limits.cut.into())
            {
                segments.limit(limits.cut);
                while let Some((buffer, len)) = segments.next() {
                    self.send(way, &Header { len, ..header }, pad(buffer, len, limits.cut), now, out);
                }
                return;
            }
        }
        let packet = &buffer[..header.len];
        if header.len <= usize::from(limits.mtu()) {
            return self.send_in_pieces(way, packet, &header, limits.cut, now, out);
        }
        if !header.dont_fragment {
            return self.send_in_fragments(way, packet, &header, limits.cut, now, out);
        }
        self.answer_sender(Problem::TooBig(limits.mtu()), packet, &header, now, out);
        self.drop(DropReason::PacketTooBig);
    }

    /// Sends a packet of which nobody is told that it is too large for the path.
    fn send_in_pieces(&mut self, way: Way, packet: &[u8], header: &Header, most: u16, now: Instant, out: &mut Output) {
        self.pieces = self.pieces.wrapping_add(1);
        let Some(mut pieces) = Pieces::new(packet, self.pieces, most) else {
            // Too long for that: the path is in doubt, and may carry it.
            return self.send(way, header, packet, now, out);
        };
        let mut piece = std::mem::take(&mut self.piece);
        piece.resize(usize::from(most), 0);
        while let Some(len) = pieces.write(&mut piece) {
            own::set_class(&mut piece, ecn::traffic_class(packet));
            let Some((_, header)) = parse(&mut piece, len) else { break };
            let padded = pad(&mut piece, len, most);
            self.send(way, &header, padded, now, out);
        }
        self.piece = piece;
    }

    /// What packets may be that take this way.
    pub(super) fn limits(&self, way: Way) -> Limits {
        let most = self.table.inner_mtu();
        let peer = match way {
            Way::Slot(at) => self.peers.get(self.pairs.position(at)).and_then(Option::as_deref),
            // Lane 0 knows.
            Way::Crossing => None,
        };
        peer.map_or(Limits::flat(most), |peer| peer.path_mtu.limits(most))
    }

    /// Takes packets of a super-packet as long as `out` has room; call again with the same until it
    /// [is done](Segments::is_done).
    pub fn handle_segments(&mut self, segments: &mut Segments<'_>, now: Instant, out: &mut Output) {
        let header = *segments.header();
        let way = match self.route(segments.start(), &header, now, out) {
            Ok(way) => way,
            Err(reason) => {
                while segments.next().is_some() {
                    self.drop(reason);
                }
                return;
            }
        };
        let mtu = self.limits(way).cut;
        if !segments.limit(mtu) {
            // Each datagram for itself: cut to fragments, or answered.
            while !out.is_nearly_full()
                && let Some((buffer, len)) = segments.next()
            {
                self.send_fitting(way, (buffer, Header { len, ..header }), now, out);
            }
            return;
        }
        while !out.is_nearly_full()
            && let Some((buffer, len)) = segments.next()
        {
            self.send(way, &Header { len, ..header }, pad(buffer, len, mtu), now, out);
        }
    }

    /// Cuts a packet that is larger than the path carries and sends the pieces: up to 133 on the narrowest.
    fn send_in_fragments(
        &mut self,
        way: Way,
        packet: &[u8],
        header: &Header,
        mtu: u16,
        now: Instant,
        out: &mut Output,
    ) {
        let Some(mut fragments) = Fragments::new(packet, header, mtu) else {
            return self.drop(DropReason::MalformedPacket);
        };
        // Made for the first such packet and kept: 64 KiB at most.
        let mut piece = std::mem::take(&mut self.piece);
        piece.resize(usize::from(mtu), 0);
        while let Some(len) = fragments.write(&mut piece) {
            let Some((_, header)) = parse(&mut piece, len) else { break };
            let padded = pad(&mut piece, len, mtu);
            self.send(way, &header, padded, now, out);
        }
        self.piece = piece;
    }

    /// Finds the way to the peer that a packet is for, or why it is for nobody; tells the sender if that helps.
    fn route(&mut self, packet: &[u8], header: &Header, now: Instant, out: &mut Output) -> Result<Way, DropReason> {
        if is_unroutable_destination(header.destination) && !self.table.is_plain() {
            return Err(DropReason::UnroutableDestination);
        }
        if self.config.lanes > 1 && self.flow.lane(header, packet, self.config.lanes) != self.config.lane {
            self.stats.strayed_packets += 1;
        }
        if self.table.checks_own() && self.table.owner(header.source) != Some(Owner::Own) {
            return Err(DropReason::ForeignSource);
        }
        let Some(Owner::Peer(peer)) = self.table.owner(header.destination) else {
            self.answer_sender(Problem::Unreachable, packet, header, now, out);
            return Err(DropReason::NoRoute);
        };
        self.way(peer, |lane| lane.flow.hash(header, packet), now, out).ok_or(DropReason::NoRoute)
    }

    /// True for a datagram of this device itself, whose way to its peer leads into the device. Each round would make it
    /// longer, then cut it in two: without end, and more with each round.
    fn comes_back(&self, packet: &[u8], header: &Header, at: PeerSlot) -> bool {
        if header.protocol != UDP || !self.table.is_plain() || header.fragment == Fragment::Later {
            return false;
        }
        let Some(datagram) = packet.get(header.payload + UDP_HEADER..) else { return false };
        if datagram.first() != Some(&DATA.0) {
            return false;
        }
        let made = |peer: &Peer| {
            let to = peer.path.endpoint().map(|ends| ends.remote.ip());
            to == Some(header.destination) && peer.tunnels.iter().any(|tunnel| tunnel.is_own(datagram))
        };
        // Mostly the very peer; a loop over several is looked for among few only.
        let others = if self.peers.len() <= LOOP_PEERS { self.peers.as_slice() } else { &[] };
        let first = self.peers.get(self.pairs.position(at)).into_iter();
        first.chain(others).flatten().any(|peer| made(peer))
    }

    /// Seals a packet for the way it takes, or keeps it until there is a session.
    pub(super) fn send(&mut self, way: Way, header: &Header, padded: &[u8], now: Instant, out: &mut Output) {
        let at = match way {
            Way::Slot(at) => at,
            Way::Crossing => return self.cross(&padded[..header.len], out),
        };
        if self.comes_back(padded, header, at) {
            return self.drop(DropReason::RoutingLoop);
        }
        if let Some(Some(peer)) = self.peers.get_mut(self.pairs.position(at))
            && !peer.is_waiting()
            && let Some(sending) = peer.sending(now)
        {
            match seal(peer, sending, (padded, header.len), self.config.dscp, now, out) {
                Ok(()) => self.stats.traffic.count_tx(header.len),
                Err(reason) => self.drop(reason),
            }
            return;
        }
        let Some(mut peer) = self.take_peer(at, now) else {
            return self.drop(DropReason::NoRoute);
        };
        if peer.path.endpoint().is_none() {
            self.answer_sender(Problem::Unreachable, padded, header, now, out);
            self.drop(DropReason::NoEndpoint);
        } else {
            let fits = self.waiting_bytes + padded.len() <= MAX_WAITING_BYTES;
            if fits && peer.wait(padded) {
                self.waiting_bytes += padded.len();
            } else {
                self.drop(DropReason::QueueFull);
            }
            if peer.sending(now).is_some() {
                self.flush(&mut peer, now, out);
            } else if !peer.is_attempting() {
                self.begin_handshake(&mut peer, now, out);
            }
        }
        self.put(peer);
    }

    /// Seals packets that waited, as long as there is room; the rest comes with the next timer.
    pub(super) fn flush(&mut self, peer: &mut Peer, now: Instant, out: &mut Output) {
        let Some(sending) = peer.sending(now) else { return };
        while let Some(room) = out.datagrams.room()
            && let Some(endpoint) = peer.path.endpoint()
            && let Some(len) = peer.tunnels[sending].next_kept(room)
        {
            peer.wire.count_tx(len);
            out.datagrams.push_tight(len, endpoint.into());
        }
        while peer.is_waiting() {
            if out.is_nearly_full() {
                self.schedule(peer, now);
                return;
            }
            let Some(padded) = peer.next_waiting() else { break };
            self.waiting_bytes -= padded.len();
            let len = Header::parse(&padded).map_or(padded.len(), |header| header.len);
            match seal(peer, sending, (&padded, len), self.config.dscp, now, out) {
                Ok(()) => self.stats.traffic.count_tx(len),
                Err(reason) => self.drop(reason),
            }
        }
    }

    /// Writes an ICMP error back into the TUN, as often as the allowance permits.
    fn answer_sender(&mut self, problem: Problem, packet: &[u8], header: &Header, now: Instant, out: &mut Output) {
        let allowance = match problem {
            Problem::Unreachable => &mut self.unreachable,
            Problem::TooBig(_) => &mut self.too_big,
        };
        if let Some(room) = out.packets.room()
            && allowance.take(now)
            && let Some(len) = icmp::write(problem, packet, header, room)
        {
            out.packets.push(len, ());
        }
    }
}

/// The packet without what lies behind it, and its header.
pub(super) fn parse(buffer: &mut [u8], len: usize) -> Option<(&mut [u8], Header)> {
    let packet = buffer.get_mut(..len)?;
    let header = Header::parse(packet)?;
    Some((packet.get_mut(..header.len)?, header))
}

/// Extends a packet by zeros to a multiple of 16, but not beyond the MTU (whitepaper, section 5.4.6).
pub(super) fn pad(buffer: &mut [u8], len: usize, mtu: u16) -> &[u8] {
    let most = len.max(usize::from(mtu)).min(buffer.len());
    let padded = len.next_multiple_of(16).min(most);
    buffer[len..padded].fill(0);
    &buffer[..padded]
}

/// Seals one packet on a tunnel of the peer that can send.
fn seal(
    peer: &mut Peer,
    sending: usize,
    (padded, len): (&[u8], usize),
    dscp: Dscp,
    now: Instant,
    out: &mut Output,
) -> Result<(), DropReason> {
    let endpoint = peer.path.endpoint().ok_or(DropReason::NoEndpoint)?;
    let room = out.datagrams.room().ok_or(DropReason::SendFailed)?;
    match peer.tunnels[sending].seal(padded, now, room) {
        Sealed::Data(len) => {
            peer.wire.count_tx(len);
            let class = dscp.outer_class(ecn::traffic_class(padded));
            peer.path_mtu.note_packet(padded.len());
            out.datagrams.push_tight(len, Outer { class, ..endpoint.into() });
        }
        Sealed::Initiation(len) => {
            peer.wire.count_tx(len);
            out.datagrams.push_tight(len, endpoint.into());
        }
        Sealed::Kept => {}
    }
    peer.last_sent = now;
    peer.traffic.count_tx(len);
    Ok(())
}
