//! Slow and obvious: packets built field by field, super-packets cut by copying. What the fast ways and the kernel's are held
//! against.

use super::{
    checksum,
    header::{TCP, UDP},
};

/// One packet in parts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Model {
    pub v6: bool,
    pub protocol: u8,
    pub ports: [u16; 2],
    pub id: u16,
    pub tos: u8,
    pub dont_fragment: bool,
    pub ip_options: Vec<u8>,
    /// IPv6: the options are a routing header of this kind, the stops of which are to be made yet.
    pub routing: Option<u8>,
    pub sequence: u32,
    pub ack: u32,
    pub flags: u8,
    pub tcp_options: Vec<u8>,
    pub payload: Vec<u8>,
}

impl Model {
    pub(crate) fn tcp(payload: Vec<u8>) -> Self {
        Self {
            v6: false,
            protocol: TCP,
            ports: [40_000, 443],
            id: 0xfffe,
            tos: 2,
            dont_fragment: true,
            ip_options: Vec::new(),
            routing: None,
            sequence: 0xffff_ff00,
            ack: 77,
            flags: 0x10,
            tcp_options: vec![1, 1, 8, 10, 0, 0, 0, 5, 0, 0, 0, 6],
            payload,
        }
    }

    pub(crate) fn udp(payload: Vec<u8>) -> Self {
        Self { protocol: UDP, flags: 0, tcp_options: Vec::new(), sequence: 0, ack: 0, ..Self::tcp(payload) }
    }

    /// The whole packet, checksums done.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut transport = Vec::new();
        transport.extend(self.ports[0].to_be_bytes());
        transport.extend(self.ports[1].to_be_bytes());
        let field = if self.protocol == TCP {
            transport.extend(self.sequence.to_be_bytes());
            transport.extend(self.ack.to_be_bytes());
            transport.extend([(5 + self.tcp_options.len() as u8 / 4) << 4, self.flags, 1, 0, 0, 0, 0, 0]);
            transport.extend(&self.tcp_options);
            16
        } else {
            transport.extend((8 + self.payload.len() as u16).to_be_bytes());
            transport.extend([0, 0]);
            6
        };
        transport.extend(&self.payload);
        let (mut ip, addresses) = self.ip(transport.len());
        let mut sum = words(&addresses) + transport.len() as u64 + u64::from(self.protocol) + words(&transport);
        sum = u64::from(checksum::finish(sum));
        if sum == 0 && self.protocol == UDP {
            sum = 0xffff;
        }
        transport[field..field + 2].copy_from_slice(&(sum as u16).to_be_bytes());
        ip.extend(transport);
        ip
    }

    fn ip(&self, transport: usize) -> (Vec<u8>, Vec<u8>) {
        let mut ip = Vec::new();
        if self.v6 {
            ip.extend([0x60 | self.tos >> 4, self.tos << 4, 0, 0]);
            let len = (transport + self.ip_options.len()) as u16;
            ip.extend(len.to_be_bytes());
            let options = if self.routing.is_some() { 43 } else { 60 };
            ip.extend([if self.ip_options.is_empty() { self.protocol } else { options }, 64]);
            ip.extend([0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
            ip.extend([0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2]);
            // Destination options, to which the caller gave the right length.
            ip.extend(&self.ip_options);
            if !self.ip_options.is_empty() {
                ip[40] = self.protocol;
            }
            let mut addresses = ip[8..40].to_vec();
            match self.routing {
                Some(4) => addresses[16..].copy_from_slice(&ip[48..64]),
                Some(_) => addresses[16..].copy_from_slice(&ip[ip.len() - 16..]),
                None => {}
            }
            return (ip, addresses);
        }
        let header = 20 + self.ip_options.len();
        ip.extend([0x40 | (header / 4) as u8, self.tos]);
        ip.extend(((header + transport) as u16).to_be_bytes());
        ip.extend(self.id.to_be_bytes());
        ip.extend([if self.dont_fragment { 0x40 } else { 0 }, 0, 64, self.protocol, 0, 0]);
        ip.extend([10, 1, 0, 1, 10, 2, 0, 2]);
        ip.extend(&self.ip_options);
        let sum = checksum::finish(words(&ip));
        ip[10..12].copy_from_slice(&sum.to_be_bytes());
        let addresses = ip[12..20].to_vec();
        (ip, addresses)
    }

    /// The packets that this one stands for.
    pub(crate) fn cut(&self, size: usize) -> Vec<Model> {
        let last = self.payload.chunks(size).count() - 1;
        let piece = |(n, payload): (usize, &[u8])| Model {
            id: if self.v6 { self.id } else { self.id.wrapping_add(n as u16) },
            sequence: self.sequence.wrapping_add(if self.protocol == TCP { (n * size) as u32 } else { 0 }),
            flags: self.flags & !(if n < last { 0x09 } else { 0 }) & !(if n > 0 { 0x80 } else { 0 }),
            payload: payload.to_vec(),
            ..self.clone()
        };
        self.payload.chunks(size).enumerate().map(piece).collect()
    }
}

fn words(bytes: &[u8]) -> u64 {
    bytes.chunks(2).map(|w| u64::from(w[0]) << 8 | u64::from(*w.get(1).unwrap_or(&0))).sum()
}
