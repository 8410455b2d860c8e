//! Runs of one flow joined to super-packets, so that the kernel takes many packets in one write.
//!
//! Nothing is copied: a run is a list of packets of a batch. The header of its first packet is changed to speak for all,
//! the others give their payload. Within a flow the order stays.
//!
//! Whatever is joined gets a checksum from the kernel that holds, so each packet's own is verified first (a broken one
//! stays alone, and broken). Only what cutting would make again the same is joined: equal headers, sequence numbers in
//! order, equal lengths but for the last.

use super::{
    checksum,
    header::{TCP, UDP},
    offload::{Cut, Offloads, Transport},
};
use crate::buffer::{Batch, MAX_PACKET};

/// Flows whose runs are open at one time; with more, the one opened first is closed.
const OPEN: usize = 16;
/// Packets in one super-packet, and datagrams: all kernels that take any take so many.
pub const MAX_PACKETS: usize = 128;
const MAX_DATAGRAMS: usize = 64;
/// Headers of what can be joined: IPv6 without extension headers, TCP with all its options.
const MAX_HEADERS: usize = 40 + 60;

const ACK_ECE: u8 = 0x50;
const ACK: u8 = 0x10;
const FIN_PSH: u8 = 0x09;

/// Packets that go out in one write.
#[derive(Debug, Clone, Copy)]
pub struct Run {
    /// Number of the first packet in its batch.
    pub first: usize,
    /// How many packets.
    pub count: usize,
    /// How the kernel is to cut it; `None` for a packet that is as it was.
    pub cut: Option<Cut>,
    /// Bytes of IP header, and of both headers: what the packets behind the first do not give.
    pub headers: (usize, usize),
    last: usize,
    flow: Flow,
    payload: usize,
    /// True if the first packet's checksum was found right.
    verified: bool,
    /// True if nothing may follow the last packet.
    closed: bool,
    saved: [u8; MAX_HEADERS],
}

/// Who talks to whom. IPv4 addresses fill the beginning.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Flow {
    addresses: [u8; 32],
    ports: [u8; 4],
    transport: u8,
}

/// A packet that may be part of a run.
#[derive(Clone, Copy)]
struct Part {
    flow: Flow,
    transport: Transport,
    ip: usize,
    headers: usize,
    payload: usize,
}

/// Plans the writes of one batch after another; its memory is kept.
#[derive(Debug, Default)]
pub struct Coalescer {
    runs: Vec<Run>,
    /// For each packet the next one of its run.
    next: Vec<usize>,
    /// Runs that may grow, oldest first.
    open: Vec<usize>,
}

impl Coalescer {
    /// Finds the runs of a batch, in the order in which they are to be written, and changes the headers that speak for
    /// more than one packet. Only what `offloads` has is joined.
    pub fn plan(&mut self, packets: &mut Batch<()>, offloads: Offloads) {
        self.runs.clear();
        self.open.clear();
        self.next.clear();
        self.next.resize(packets.len(), usize::MAX);
        for n in 0..packets.len() {
            let Some((_, packet)) = packets.get(n) else { break };
            match Part::parse(packet).filter(|part| offloads.joins(part.transport)) {
                Some(part) => self.place(packets, n, part, packet),
                None => {
                    // It may belong to any flow, and overtakes nothing.
                    self.open.clear();
                    self.runs.push(Run::single(n));
                }
            }
        }
        for run in &mut self.runs {
            if run.count > 1 {
                join(packets, run);
            }
        }
    }

    /// The runs of the batch planned last.
    pub fn runs(&self) -> &[Run] {
        &self.runs
    }

    /// Numbers of the packets behind the first of a run.
    pub fn followers(&self, run: &Run) -> impl Iterator<Item = usize> + '_ {
        let mut at = run.first;
        (1..run.count).map(move |_| {
            at = self.next[at];
            at
        })
    }

    /// Makes the packets of a run again what they were: the kernel refused it.
    pub fn part(&self, packets: &mut Batch<()>, run: &Run) {
        if run.count > 1
            && let Some(packet) = packets.get_mut(run.first)
        {
            packet[..run.headers.1].copy_from_slice(&run.saved[..run.headers.1]);
        }
    }

    /// Puts a packet behind the run of its flow, or begins one.
    fn place(&mut self, packets: &Batch<()>, n: usize, part: Part, packet: &[u8]) {
        let found = self.open.iter().rposition(|&run| self.runs[run].flow == part.flow);
        if let Some(position) = found {
            let run = &mut self.runs[self.open[position]];
            if run.takes(packets, part, packet) {
                self.next[run.last] = n;
                (run.last, run.count) = (n, run.count + 1);
                run.closed = part.ends_run(packet, run.payload_size());
                run.payload += part.payload;
                return;
            }
            self.open.remove(position);
        }
        if !part.may_begin(packet) {
            self.runs.push(Run::single(n));
            return;
        }
        if self.open.len() >= OPEN {
            self.open.remove(0);
        }
        self.open.push(self.runs.len());
        self.runs.push(Run::begin(n, part, packet));
    }
}

impl Part {
    /// `None` for what is never part of a run: other protocols, fragments, IP options and extension headers.
    fn parse(packet: &[u8]) -> Option<Self> {
        let mut flow = Flow::default();
        let (ip, protocol) = match packet.first()? {
            0x45 => {
                let header: &[u8; 20] = packet.first_chunk()?;
                let is_fragment = u16::from_be_bytes([header[6], header[7]]) & 0x3fff != 0;
                if is_fragment || usize::from(u16::from_be_bytes([header[2], header[3]])) != packet.len() {
                    return None;
                }
                flow.addresses[..8].copy_from_slice(&header[12..20]);
                (20, header[9])
            }
            first if first >> 4 == 6 => {
                let header: &[u8; 40] = packet.first_chunk()?;
                if usize::from(u16::from_be_bytes([header[4], header[5]])) + 40 != packet.len() {
                    return None;
                }
                flow.addresses.copy_from_slice(&header[8..40]);
                (40, header[6])
            }
            _ => return None,
        };
        let (transport, headers) = match protocol {
            TCP => {
                let len = usize::from(packet.get(ip + 12)? >> 4) * 4;
                // A length that cannot be stays as it is, and alone.
                (Transport::Tcp, ip + Some(len).filter(|len| *len >= 20)?)
            }
            UDP => (Transport::Udp, ip + 8),
            _ => return None,
        };
        let payload = packet.len().checked_sub(headers)?;
        flow.ports.copy_from_slice(packet.get(ip..ip + 4)?);
        flow.transport = protocol;
        Some(Self { flow, transport, ip, headers, payload })
    }

    /// True if others may follow it: it carries data and nothing that concerns it alone.
    fn may_begin(&self, packet: &[u8]) -> bool {
        self.payload > 0
            && match self.transport {
                Transport::Tcp => packet[self.ip + 13] & !0x40 == ACK,
                // Without a checksum nothing says that it is whole.
                Transport::Udp => packet[self.ip + 6..self.ip + 8] != [0, 0] && self.has_right_length(packet),
            }
    }

    fn has_right_length(&self, packet: &[u8]) -> bool {
        usize::from(u16::from_be_bytes([packet[self.ip + 4], packet[self.ip + 5]])) == packet.len() - self.ip
    }

    /// True if nothing may follow it in a run of payloads of `size` bytes.
    fn ends_run(&self, packet: &[u8], size: usize) -> bool {
        self.payload < size || self.transport == Transport::Tcp && packet[self.ip + 13] & FIN_PSH != 0
    }

    /// True if the checksums of both headers hold; IPv6 has none.
    fn is_whole(&self, packet: &[u8]) -> bool {
        let (ip, transport) = packet.split_at(self.ip);
        let sum = pseudo(ip, transport.len(), self.flow.transport) + checksum::sum(transport);
        checksum::fold(sum) == 0xffff && (ip.len() != 20 || checksum::fold(checksum::sum(ip)) == 0xffff)
    }
}

/// Sum of the pseudo-header that goes with an IP header.
fn pseudo(ip: &[u8], transport: usize, protocol: u8) -> u64 {
    let addresses = if ip.len() == 20 { &ip[12..20] } else { &ip[8..40] };
    checksum::sum(addresses) + transport as u64 + u64::from(protocol)
}

impl Run {
    /// One packet, as it is.
    pub(crate) fn single(n: usize) -> Self {
        Self {
            first: n,
            count: 1,
            cut: None,
            headers: (0, 0),
            last: n,
            flow: Flow::default(),
            payload: 0,
            verified: false,
            closed: true,
            saved: [0; MAX_HEADERS],
        }
    }

    fn begin(n: usize, part: Part, packet: &[u8]) -> Self {
        let size = part.payload.min(MAX_PACKET) as u16;
        let mut run = Self::single(n);
        run.cut = Some(Cut { transport: part.transport, size });
        run.headers = (part.ip, part.headers);
        run.flow = part.flow;
        run.payload = part.payload;
        run.closed = false;
        run.saved[..part.headers].copy_from_slice(&packet[..part.headers]);
        run
    }

    /// Payload of each packet but the last.
    fn payload_size(&self) -> usize {
        self.cut.map_or(0, |cut| usize::from(cut.size))
    }

    /// True if the packet may follow. Verifies the checksums that joining would hide.
    fn takes(&mut self, packets: &Batch<()>, part: Part, packet: &[u8]) -> bool {
        let fits = part.headers == self.headers.1
            && part.payload > 0
            && part.payload <= self.payload_size()
            && self.headers.1 + self.payload + part.payload <= MAX_PACKET
            && self.count < if part.transport == Transport::Tcp { MAX_PACKETS } else { MAX_DATAGRAMS };
        if self.closed || !fits || !self.continues(part, packet) {
            return false;
        }
        if !self.verified {
            let Some((_, first)) = packets.get(self.first) else { return false };
            self.verified = part_of(self, first).is_whole(first);
            if !self.verified {
                self.closed = true;
                return false;
            }
        }
        part.is_whole(packet)
    }

    /// True if the headers are what cutting the run would give this packet.
    fn continues(&self, part: Part, packet: &[u8]) -> bool {
        let (first, ip) = (&self.saved, part.ip);
        let same_ip = if ip == 20 {
            let dont_fragment = first[6] & 0x40 != 0;
            let number = |header: &[u8]| u16::from_be_bytes([header[4], header[5]]);
            // Where nobody may cut, the identification means nothing (RFC 6864).
            let in_order = dont_fragment || number(packet) == number(first).wrapping_add(self.count as u16);
            first[1] == packet[1] && first[6..9] == packet[6..9] && in_order
        } else {
            first[..4] == packet[..4] && first[7] == packet[7]
        };
        let (first, transport) = (&first[ip..], &packet[ip..]);
        same_ip
            && match part.transport {
                Transport::Udp => transport[6..8] != [0, 0] && part.has_right_length(packet),
                Transport::Tcp => {
                    let number = |tcp: &[u8]| u32::from_be_bytes([tcp[4], tcp[5], tcp[6], tcp[7]]);
                    let (flags, options) = (transport[13], 20..part.headers - ip);
                    number(transport) == number(first).wrapping_add(self.payload as u32)
                        && flags & !FIN_PSH == first[13] & ACK_ECE
                        && first[8..13] == transport[8..13]
                        && first[14..16] == transport[14..16]
                        && first[18..20] == transport[18..20]
                        && first[options.clone()] == transport[options]
                }
            }
    }
}

fn part_of(run: &Run, first: &[u8]) -> Part {
    let transport = run.cut.map_or(Transport::Tcp, |cut| cut.transport);
    let (ip, headers) = run.headers;
    Part { flow: run.flow, transport, ip, headers, payload: first.len() - headers }
}

/// Makes the first header of a run speak for all of it. The checksum field gets the sum of the pseudo-header alone, as
/// whoever is to complete it expects.
fn join(packets: &mut Batch<()>, run: &Run) {
    let last_flags = match packets.get(run.last) {
        Some((_, last)) if run.flow.transport == TCP => last.get(run.headers.0 + 13).copied().unwrap_or_default(),
        _ => 0,
    };
    let Some(packet) = packets.get_mut(run.first) else { return };
    let (ip, transport) = packet[..run.headers.1].split_at_mut(run.headers.0);
    let transport_len = transport.len() + run.payload;
    let total = (run.headers.1 + run.payload) as u16;
    if ip.len() == 20 {
        ip[2..4].copy_from_slice(&total.to_be_bytes());
        ip[10..12].fill(0);
        let sum = checksum::finish(checksum::sum(ip));
        ip[10..12].copy_from_slice(&sum.to_be_bytes());
    } else {
        ip[4..6].copy_from_slice(&(transport_len as u16).to_be_bytes());
    }
    let field = if run.flow.transport == TCP { 16 } else { 6 };
    if run.flow.transport == TCP {
        transport[13] |= last_flags & FIN_PSH;
    } else {
        transport[4..6].copy_from_slice(&(transport_len as u16).to_be_bytes());
    }
    let sum = checksum::fold(pseudo(ip, transport_len, run.flow.transport));
    transport[field..field + 2].copy_from_slice(&sum.to_be_bytes());
}

#[cfg(test)]
mod tests;
