//! Super-packets written to one device and forwarded to the other.

use super::{Class, Fault, Findings, SelfCheck};
use crate::{
    packet::{
        checksum,
        header::{Header, TCP},
        model::Model,
        offload::{Offload, Offloads, Transport},
        segment::Segments,
    },
    tun::{Packets, Queue},
    udp::Trains,
};

/// One train: what it is called, its payload, the payload of each packet but the last.
pub(super) const TRAINS: [(&str, usize, usize); 5] = [
    ("short", 150, 100),
    ("equal", 4_800, 1_200),
    ("odd tail", 3_677, 1_200),
    ("tail of one byte", 2_401, 1_200),
    // As many bytes as a super-packet has, and as many datagrams: 64.
    ("full", 57_600, 900),
];
/// The header fields that forwarding changes, at these places: time to live, hop limit.
const TTL: usize = 8;
const HOP_LIMIT: usize = 7;

impl SelfCheck {
    /// Writes runs that the kernel has to cut.
    pub(super) fn try_runs(&mut self, has_v6: bool, findings: &mut Findings) {
        if !self.switch_far(Offloads::NONE) {
            for class in [Class::TcpCoalesce, Class::UdpCoalesce] {
                findings.note(class, Err(Fault::Untried));
            }
            return;
        }
        for (class, transport) in [(Class::TcpCoalesce, Transport::Tcp), (Class::UdpCoalesce, Transport::Udp)] {
            for v6 in families(has_v6) {
                for train in TRAINS {
                    if !findings.try_train(class, || self.try_run(train, transport, v6)) {
                        break;
                    }
                }
            }
        }
    }

    fn try_run(&mut self, train: (&'static str, usize, usize), transport: Transport, v6: bool) -> Result<(), Fault> {
        let expected = self.write_train(train, transport, v6)?;
        let mut got = Vec::new();
        self.read_far(|buffer, len, offload| {
            if is_of_train(&buffer[..len]) {
                got.push((buffer[..len].to_vec(), offload));
            }
            got.len() >= expected.len()
        });
        let whole = got.iter().all(|(_, offload)| *offload == Offload::None);
        let got: Vec<Vec<u8>> = got.into_iter().map(|(packet, _)| packet).collect();
        if whole { compare(train.0, &got, &expected) } else { Err(Fault::Wrong { train: train.0 }) }
    }

    /// Lets the kernel hand over super-packets, and cuts them.
    pub(super) fn try_supers(&mut self, has_v6: bool, findings: &mut Findings) {
        let kinds = [
            (Class::Tso4, Transport::Tcp, Class::TcpCoalesce, &[false][..]),
            (Class::Tso6, Transport::Tcp, Class::TcpCoalesce, &[true]),
            (Class::Uso, Transport::Udp, Class::UdpCoalesce, &[false, true]),
        ];
        for (class, transport, source, versions) in kinds {
            if class == Class::Tso6 && !has_v6 {
                findings.note(class, Err(Fault::Refused));
                continue;
            }
            if findings.fault(source).is_some() {
                // What is cut wrong on the way cannot show whether what comes out is right.
                findings.note(class, Err(Fault::Untried));
                continue;
            }
            let mut only = Offloads::NONE;
            *class.switch(&mut only, &mut Trains::default()) = true;
            if !self.switch_far(only) {
                findings.note(class, Err(Fault::Refused));
                continue;
            }
            for v6 in versions.iter().copied().filter(|v6| has_v6 || !v6) {
                for train in TRAINS {
                    if !findings.try_train(class, || self.try_super(train, transport, v6)) {
                        break;
                    }
                }
            }
        }
        self.switch_far(Offloads::NONE);
    }

    fn try_super(&mut self, train: (&'static str, usize, usize), transport: Transport, v6: bool) -> Result<(), Fault> {
        let expected = self.write_train(train, transport, v6)?;
        let (mut got, mut known) = (Vec::new(), true);
        self.read_far(|buffer, len, offload| {
            if !is_of_train(&buffer[..len]) {
                return false;
            }
            match offload {
                Offload::None => got.push(buffer[..len].to_vec()),
                Offload::Unknown => known = false,
                Offload::Cut(cut) => match Segments::new(buffer, len, cut) {
                    Some(mut segments) => {
                        while let Some((packet, len)) = segments.next() {
                            got.push(packet[..len].to_vec());
                        }
                    }
                    None => known = false,
                },
            }
            !known || got.len() >= expected.len()
        });
        if known { compare(train.0, &got, &expected) } else { Err(Fault::Wrong { train: train.0 }) }
    }

    /// Writes a train to the near device as one run; gives the packets that are to come out of the far one.
    fn write_train(
        &mut self,
        (_, len, size): (&'static str, usize, usize),
        transport: Transport,
        v6: bool,
    ) -> Result<Vec<Vec<u8>>, Fault> {
        let payload = payload(len);
        let model = match transport {
            Transport::Tcp => Model { flags: 0x18, ..Model::tcp(payload) },
            Transport::Udp => Model::udp(payload),
        };
        let pieces: Vec<Vec<u8>> = Model { v6, ..model }.cut(size).iter().map(Model::bytes).collect();
        let mut packets = Packets::new(128 << 10, pieces.len());
        for piece in &pieces {
            let Some(room) = packets.room() else { break };
            room[..piece.len()].copy_from_slice(piece);
            packets.push(piece.len(), ());
        }
        self.near.set_offloads(Offloads::ALL).map_err(|_| Fault::Refused)?;
        self.empty_far();
        let taken = self.near.write(&mut packets);
        let refused = !self.near.offloads().joins(transport) || !taken.is_ok_and(|taken| taken == pieces.len());
        if refused { Err(Fault::Refused) } else { Ok(pieces) }
    }
}

/// Whether IPv6: no and, if there is one, yes.
pub(super) fn families(has_v6: bool) -> impl Iterator<Item = bool> {
    [false, true].into_iter().filter(move |v6| has_v6 || !v6)
}

/// Bytes that differ everywhere.
pub(super) fn payload(len: usize) -> Vec<u8> {
    (0..len as u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect()
}

/// The kernel says a few things of its own on a new link: neighbours, routers, multicast.
fn is_of_train(packet: &[u8]) -> bool {
    let model = Model::tcp(Vec::new());
    Header::parse(packet).and_then(|header| header.ports(packet)) == Some((model.ports[0], model.ports[1]))
}

fn compare(train: &'static str, got: &[Vec<u8>], expected: &[Vec<u8>]) -> Result<(), Fault> {
    if got.len() < expected.len() {
        return Err(Fault::Lost { train });
    }
    let forwarded = expected.iter().map(|packet| without_numbers(packet, 1));
    let same = got.iter().map(|packet| without_numbers(packet, 0)).eq(forwarded);
    let whole = got.iter().all(|packet| checksums_hold(packet));
    if same && whole { Ok(()) } else { Err(Fault::Wrong { train }) }
}

/// The packet after `hops`, without what may be any number where nobody may fragment it (RFC 6864): the identification, and
/// the header's checksum with it.
fn without_numbers(packet: &[u8], hops: u8) -> Vec<u8> {
    let mut packet = packet.to_vec();
    if packet.len() >= 20 && packet[0] >> 4 == 4 {
        packet[TTL] = packet[TTL].wrapping_sub(hops);
        packet[4..6].fill(0);
        packet[10..12].fill(0);
    } else if packet.len() >= 40 {
        packet[HOP_LIMIT] = packet[HOP_LIMIT].wrapping_sub(hops);
    }
    packet
}

/// True if all checksums of a whole packet of TCP or UDP are right.
pub(super) fn checksums_hold(packet: &[u8]) -> bool {
    let Some(header) = Header::parse(packet).filter(|header| header.len == packet.len()) else { return false };
    let (ip, transport) = packet.split_at(header.payload);
    let addresses = if header.source.is_ipv4() { &ip[12..20] } else { &ip[8..40] };
    let protocol = u64::from(header.protocol);
    let sum = checksum::sum(addresses) + transport.len() as u64 + protocol + checksum::sum(transport);
    let is_v4_right = !header.source.is_ipv4() || checksum::fold(checksum::sum(ip)) == 0xffff;
    let has_sum = header.protocol == TCP || transport.get(6..8).is_some_and(|sum| sum != [0, 0]);
    checksum::fold(sum) == 0xffff && is_v4_right && has_sum
}
