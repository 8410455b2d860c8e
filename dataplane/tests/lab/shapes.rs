//! Packets of every shape, built field by field.
#![allow(unreachable_pub, reason = "each test binary is a crate of its own")]

use mesh_dataplane::packet::checksum;

const TCP: u8 = 6;
const UDP: u8 = 17;
const ICMP: u8 = 1;
const ICMPV6: u8 = 58;
const ACK: u8 = 0x10;
const PSH: u8 = 0x08;
const FIN: u8 = 0x01;
const CWR: u8 = 0x80;
/// Where all of them come from, as the tests know them again.
const SOURCE_V4: [u8; 4] = [10, 1, 0, 1];
const SOURCE_V6: [u8; 16] = [0xfd, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
const DESTINATION_V4: [u8; 4] = [10, 2, 0, 2];
const DESTINATION_V6: [u8; 16] = [0xfd, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2];

/// Packets that are sent at once.
pub struct Shape {
    pub name: String,
    pub packets: Vec<Vec<u8>>,
}

/// One packet.
#[derive(Clone)]
struct Packet {
    v6: bool,
    protocol: u8,
    class: u8,
    id: u16,
    dont_fragment: bool,
    /// IPv4: options, a multiple of four bytes. IPv6: extension headers, each with the number of the next but the last.
    options: Vec<u8>,
    /// IPv6: number of the first extension header.
    first: u8,
    sequence: u32,
    flags: u8,
    payload: Vec<u8>,
}

impl Packet {
    fn new(v6: bool, protocol: u8, len: usize) -> Self {
        let payload = (0..len as u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        Self {
            v6,
            protocol,
            class: 0,
            id: 0xfff0,
            dont_fragment: true,
            options: Vec::new(),
            first: protocol,
            sequence: 0xffff_f000,
            flags: ACK,
            payload,
        }
    }

    fn bytes(&self) -> Vec<u8> {
        self.ip(&self.transport())
    }

    fn transport(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        let field = match self.protocol {
            TCP => {
                bytes.extend([0x9c, 0x40, 0x01, 0xbb]);
                bytes.extend(self.sequence.to_be_bytes());
                bytes.extend([0, 0, 0, 7, 0x80, self.flags, 4, 0, 0, 0, 0, 0]);
                bytes.extend([1, 1, 8, 10, 0, 0, 0, 5, 0, 0, 0, 6]);
                16
            }
            UDP => {
                bytes.extend([0x9c, 0x40, 0x01, 0xbb]);
                bytes.extend((8 + self.payload.len() as u16).to_be_bytes());
                bytes.extend([0, 0]);
                6
            }
            ICMP => {
                bytes.extend([8, 0, 0, 0, 0, 1, 0, 2]);
                2
            }
            _ => {
                bytes.extend([128, 0, 0, 0, 0, 1, 0, 2]);
                2
            }
        };
        bytes.extend(&self.payload);
        let addresses = match (self.v6, self.protocol) {
            (true, _) => [SOURCE_V6, DESTINATION_V6].concat(),
            (false, ICMP) => Vec::new(),
            (false, _) => [SOURCE_V4, DESTINATION_V4].concat(),
        };
        let mut sum = checksum::sum(&addresses) + checksum::sum(&bytes);
        if !addresses.is_empty() {
            sum += bytes.len() as u64 + u64::from(self.protocol);
        }
        let sum = match (checksum::finish(sum), self.protocol) {
            // Zero would mean that there is none (RFC 768).
            (0, UDP) => 0xffff,
            (sum, _) => sum,
        };
        bytes[field..field + 2].copy_from_slice(&sum.to_be_bytes());
        bytes
    }

    fn ip(&self, payload: &[u8]) -> Vec<u8> {
        let len = self.options.len() + payload.len();
        let mut ip = Vec::new();
        if self.v6 {
            ip.extend([0x60 | self.class >> 4, self.class << 4, 0, 9]);
            ip.extend((len as u16).to_be_bytes());
            ip.extend([self.first, 64]);
            ip.extend([SOURCE_V6, DESTINATION_V6].concat());
            ip.extend(&self.options);
        } else {
            ip.extend([0x45 + (self.options.len() / 4) as u8, self.class]);
            ip.extend((20 + len as u16).to_be_bytes());
            ip.extend(self.id.to_be_bytes());
            ip.extend([if self.dont_fragment { 0x40 } else { 0 }, 0, 64, self.protocol, 0, 0]);
            ip.extend([SOURCE_V4, DESTINATION_V4].concat());
            ip.extend(&self.options);
            sum_header(&mut ip);
        }
        ip.extend(payload);
        ip
    }

    /// The packets of `sizes` bytes that follow each other, this one's payload begun anew in each; the last with `flags` too.
    fn train(&self, sizes: &[usize], flags: u8) -> Vec<Vec<u8>> {
        let mut next = self.clone();
        let last = sizes.len() - 1;
        let piece = |(n, size): (usize, &usize)| {
            let mut packet = next.clone();
            packet.payload = Packet::new(self.v6, self.protocol, size + n).payload.split_off(n);
            packet.flags |= if n == last { flags } else { 0 };
            next.sequence = next.sequence.wrapping_add(*size as u32);
            next.id = next.id.wrapping_add(1);
            packet.bytes()
        };
        sizes.iter().enumerate().map(piece).collect()
    }

    /// The packet in two fragments, the first with `at` bytes of payload.
    fn fragments(&self, at: usize) -> Vec<Vec<u8>> {
        let transport = self.transport();
        let (first, second) = transport.split_at(at);
        let place = (at as u16 / 8) << 3;
        let pieces = [(first, 0, true), (second, place, false)];
        let piece = |(payload, place, more): (&[u8], u16, bool)| {
            if self.v6 {
                let word = (place | u16::from(more)).to_be_bytes();
                let header = [&[self.protocol, 0], &word[..], &[0, 0, 0, 5]].concat();
                return Packet { first: 44, options: header, ..self.clone() }.ip(payload);
            }
            let mut ip = Packet { dont_fragment: false, ..self.clone() }.ip(payload);
            let word = place >> 3 | if more { 0x2000 } else { 0 };
            ip[6..8].copy_from_slice(&word.to_be_bytes());
            sum_header(&mut ip[..20]);
            ip
        };
        pieces.map(piece).to_vec()
    }
}

fn sum_header(ip: &mut [u8]) {
    ip[10..12].fill(0);
    let sum = checksum::finish(checksum::sum(ip));
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
}

/// All of them. Each set is one flow, so that its order says something.
pub fn shapes() -> Vec<Shape> {
    let mut all = Vec::new();
    for v6 in [false, true] {
        let mut add = |name: &str, packets: Vec<Vec<u8>>| {
            all.push(Shape { name: format!("{name}, IPv{}", if v6 { 6 } else { 4 }), packets });
        };
        for (protocol, name) in [(TCP, "TCP"), (UDP, "UDP")] {
            let packet = Packet::new(v6, protocol, 300);
            add(&format!("{name}, one"), vec![packet.bytes()]);
            add(&format!("{name}, equal pieces"), packet.train(&[1_200; 8], PSH));
            add(&format!("{name}, odd tail"), packet.train(&[1_200, 1_200, 1_200, 333], PSH));
            add(&format!("{name}, tail of one byte"), packet.train(&[700, 700, 1], PSH));
            add(&format!("{name}, short pieces"), packet.train(&[3; 40], PSH));
            add(&format!("{name}, unequal pieces"), packet.train(&[100, 900, 900, 50, 51, 52], 0));
            add(&format!("{name}, without payload in between"), packet.train(&[500, 500, 0, 500, 0, 0, 500], 0));
            for (class, text) in [(2, "ECT(0)"), (1, "ECT(1)"), (3, "CE"), (0xb8, "EF")] {
                let marked = Packet { class, ..packet.clone() };
                add(&format!("{name}, {text}"), marked.train(&[1_000, 1_000, 1_000], 0));
            }
            let fragile = Packet { dont_fragment: false, ..packet.clone() };
            add(&format!("{name}, may be fragmented"), fragile.train(&[800, 800, 800, 801], 0));
            let long = Packet::new(v6, protocol, 1_996);
            add(&format!("{name}, fragments"), long.fragments(1_200));
            add(&format!("{name}, fragments out of order"), long.fragments(1_200).into_iter().rev().collect());
            for (text, first, options) in extensions(v6, protocol) {
                let packet = Packet { first, options, ..packet.clone() };
                add(&format!("{name}, {text}"), packet.train(&[900, 900, 900, 11], PSH));
            }
        }
        let tcp = Packet::new(v6, TCP, 0);
        add("TCP, FIN at the end", tcp.train(&[1_000, 1_000, 500], FIN | PSH));
        add("TCP, CWR at the beginning", {
            let mut train = Packet { flags: ACK | CWR, ..tcp.clone() }.train(&[1_000], 0);
            train
                .extend(Packet { sequence: tcp.sequence.wrapping_add(1_000), ..tcp.clone() }.train(&[1_000, 1_000], 0));
            train
        });
        let (icmp, name) = if v6 { (ICMPV6, "ICMPv6") } else { (ICMP, "ICMP") };
        add(name, Packet::new(v6, icmp, 56).train(&[56, 1_300], 0));
    }
    all
}

/// IPv4 options and IPv6 extension headers that routers leave as they are.
fn extensions(v6: bool, protocol: u8) -> Vec<(&'static str, u8, Vec<u8>)> {
    if !v6 {
        // Fillers; a stream identifier, which nobody has used for decades (RFC 6814).
        return vec![
            ("options of fillers", protocol, vec![1, 1, 1, 0]),
            ("an option with a value", protocol, vec![136, 4, 0, 9]),
        ];
    }
    let padding = [1, 4, 0, 0, 0, 0];
    let hop_by_hop = [&[protocol, 0][..], &padding].concat();
    let options = [&[protocol, 0][..], &padding].concat();
    let both = [&[60, 0][..], &padding, &options].concat();
    let at_its_end = [&[protocol, 2, 4, 0, 0, 0, 0, 0][..], &DESTINATION_V6].concat();
    let atomic = vec![protocol, 0, 0, 0, 0, 0, 0, 3];
    vec![
        ("hop-by-hop options", 0, hop_by_hop),
        ("destination options", 60, options),
        ("two extension headers", 0, both),
        ("a routing header at its end", 43, at_its_end),
        ("a fragment of one piece", 44, atomic),
    ]
}

/// True for packets made here.
pub fn is_ours(packet: &[u8]) -> bool {
    packet.get(12..16) == Some(&SOURCE_V4) || packet.get(8..24) == Some(&SOURCE_V6)
}

/// The packet as it is after so many routers.
pub fn after_hops(packet: &[u8], hops: u8) -> Vec<u8> {
    let mut packet = packet.to_vec();
    if packet[0] >> 4 == 6 {
        packet[7] -= hops;
        return packet;
    }
    packet[8] -= hops;
    let header = usize::from(packet[0] & 15) * 4;
    sum_header(&mut packet[..header]);
    packet
}

/// The packet without the number that means nothing where nobody may fragment it (RFC 6864).
pub fn without_numbers(packet: &[u8]) -> Vec<u8> {
    let mut packet = packet.to_vec();
    if packet[0] >> 4 == 4 && packet[6] & 0x40 != 0 {
        let header = usize::from(packet[0] & 15) * 4;
        assert_eq!(checksum::fold(checksum::sum(&packet[..header])), 0xffff, "the header's checksum is wrong");
        packet[4..6].fill(0);
        sum_header(&mut packet[..header]);
    }
    packet
}

/// Fragments over IPv4 put together, wherever one wholly came: where it is cut is the way's business. Slow and obvious.
pub fn datagrams(packets: &[Vec<u8>]) -> Vec<Vec<u8>> {
    let is_fragment = |packet: &[u8]| packet[0] == 0x45 && u16::from_be_bytes([packet[6], packet[7]]) & 0x3fff != 0;
    let (mut fragments, mut all): (Vec<_>, Vec<_>) = packets.iter().cloned().partition(|packet| is_fragment(packet));
    let offset = |packet: &[u8]| usize::from(u16::from_be_bytes([packet[6] & 0x1f, packet[7]])) * 8;
    fragments.sort_by_key(|packet| (packet[4..6].to_vec(), offset(packet)));
    for numbered in fragments.chunk_by(|one, other| one[4..6] == other[4..6]) {
        let mut whole = numbered[0][..20].to_vec();
        for piece in numbered {
            assert_eq!(offset(piece), whole.len() - 20, "a gap or an overlap");
            whole.extend(&piece[20..]);
        }
        assert_eq!(numbered[numbered.len() - 1][6] & 0x20, 0, "the last one is missing");
        let len = whole.len() as u16;
        whole[2..4].copy_from_slice(&len.to_be_bytes());
        whole[6..8].fill(0);
        sum_header(&mut whole[..20]);
        all.push(whole);
    }
    all
}
