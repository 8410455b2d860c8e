//! Super-packets cut into the packets that they stand for.
//!
//! No payload moves: the header of each packet is written just in front of its part of the payload, over the end of the
//! packet before it, which has been sealed by then.

use super::{
    checksum,
    header::{Fragment, Header, TCP, UDP},
    offload::{Cut, Transport},
    source_route,
};

/// Longest headers of a super-packet, IP options and extension headers included.
const MAX_HEADERS: usize = 256;
/// Bytes behind a packet that the caller may overwrite with padding.
const SPARE: usize = 15;
/// TCP flags that stand in the last packet only, and in the first only (RFC 3168, section 6.1.2).
const FIN_PSH: u8 = 0x09;
const CWR: u8 = 0x80;
const SYN_RST_URG: u8 = 0x26;

/// The packets of one super-packet; take them one by one with [`next`](Self::next).
#[derive(Debug)]
pub struct Segments<'a> {
    buffer: &'a mut [u8],
    header: Header,
    transport: Transport,
    template: [u8; MAX_HEADERS],
    /// Bytes of IP and transport header.
    headers: usize,
    /// Sum of the addresses that the transport's checksum covers.
    addresses: u64,
    size: usize,
    /// Where the payload of the next packet begins.
    at: usize,
    count: u16,
    /// What lay behind the packet given out last, and where: padding may have overwritten it.
    saved: ([u8; SPARE], usize),
}

impl<'a> Segments<'a> {
    /// Cuts the super-packet in the first `len` bytes of `buffer`. Of what lies behind it, 15 bytes may be overwritten.
    ///
    /// `None` if its headers are not those of a super-packet of this kind.
    pub fn new(buffer: &'a mut [u8], len: usize, cut: Cut) -> Option<Self> {
        let header = Header::parse(buffer.get(..len)?)?;
        let protocol = if cut.transport == Transport::Tcp { TCP } else { UDP };
        if header.protocol != protocol || header.fragment != Fragment::Whole || cut.size == 0 {
            return None;
        }
        let transport = buffer.get(header.payload..header.len)?;
        let headers = header.payload
            + match cut.transport {
                Transport::Udp => 8,
                Transport::Tcp => {
                    let len = usize::from(transport.get(12)? >> 4) * 4;
                    // What never stands in many packets at once cannot be cut.
                    if len < 20 || transport.get(13)? & SYN_RST_URG != 0 {
                        return None;
                    }
                    len
                }
            };
        if headers >= header.len || headers > MAX_HEADERS {
            return None;
        }
        let mut template = [0; MAX_HEADERS];
        template[..headers].copy_from_slice(&buffer[..headers]);
        let addresses = source_route::covered_addresses(&template[..header.payload])?;
        let size = usize::from(cut.size);
        let (transport, saved) = (cut.transport, ([0; SPARE], 0));
        Some(Self { buffer, header, transport, template, headers, addresses, size, at: headers, count: 0, saved })
    }

    /// The headers of the super-packet; its length is that of all packets together.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Bytes of IP and transport header in front of each payload.
    pub fn headers(&self) -> usize {
        self.headers
    }

    /// The headers as they came.
    pub fn start(&self) -> &[u8] {
        &self.template[..self.headers]
    }

    /// Length of the longest packet.
    pub fn longest(&self) -> usize {
        self.headers + self.size.min(self.header.len - self.headers)
    }

    /// Makes packets of at most `mtu` bytes. False if these cannot be: datagrams keep their length.
    pub fn limit(&mut self, mtu: u16) -> bool {
        if self.longest() <= usize::from(mtu) {
            return true;
        }
        match usize::from(mtu).checked_sub(self.headers) {
            Some(size @ 1..) if self.transport == Transport::Tcp => {
                self.size = size;
                true
            }
            _ => false,
        }
    }

    /// True when all packets were taken.
    pub fn is_done(&self) -> bool {
        self.at >= self.header.len
    }

    /// The next packet, whole, with up to 15 bytes behind it that may be overwritten; and its length.
    #[allow(clippy::should_implement_trait, reason = "the packet borrows from the buffer")]
    pub fn next(&mut self) -> Option<(&mut [u8], usize)> {
        let (tail, at) = self.saved;
        if at > 0 {
            let behind = self.buffer.len().min(at + SPARE);
            self.buffer[at..behind].copy_from_slice(&tail[..behind - at]);
        }
        let left = self.header.len.checked_sub(self.at).filter(|left| *left > 0)?;
        let payload = left.min(self.size);
        let (start, end) = (self.at - self.headers, self.at + payload);
        self.write_headers(start, end, payload == left);
        let behind = self.buffer.len().min(end + SPARE);
        self.saved.0[..behind - end].copy_from_slice(&self.buffer[end..behind]);
        self.saved.1 = end;
        self.at = end;
        self.count = self.count.wrapping_add(1);
        Some((&mut self.buffer[start..behind], end - start))
    }

    /// Writes the headers of the packet from `start` to `end`, its checksums among them.
    fn write_headers(&mut self, start: usize, end: usize, last: bool) {
        let packet = &mut self.buffer[start..end];
        packet[..self.headers].copy_from_slice(&self.template[..self.headers]);
        let (ip, transport) = packet.split_at_mut(self.header.payload);
        let len = ip.len() + transport.len();
        match self.header.source.is_ipv4() {
            true => write_v4(ip, len, self.count),
            false => write_v6(ip, len),
        }
        let pseudo = self.addresses + transport.len() as u64;
        let field = match self.transport {
            Transport::Tcp => {
                let sequence = u32::from_be_bytes([transport[4], transport[5], transport[6], transport[7]]);
                let sequence = sequence.wrapping_add((self.at - self.headers) as u32);
                transport[4..8].copy_from_slice(&sequence.to_be_bytes());
                transport[13] &= !(if last { 0 } else { FIN_PSH } | if self.count == 0 { 0 } else { CWR });
                16
            }
            Transport::Udp => {
                let len = transport.len() as u16;
                transport[4..6].copy_from_slice(&len.to_be_bytes());
                6
            }
        };
        let protocol = if self.transport == Transport::Tcp { TCP } else { UDP };
        transport[field..field + 2].fill(0);
        let mut sum = checksum::finish(pseudo + u64::from(protocol) + checksum::sum(transport));
        if sum == 0 && self.transport == Transport::Udp {
            // Zero would mean that there is none (RFC 768).
            sum = 0xffff;
        }
        transport[field..field + 2].copy_from_slice(&sum.to_be_bytes());
    }
}

/// Writes what changes in an IPv4 header.
fn write_v4(ip: &mut [u8], len: usize, number: u16) {
    let id = u16::from_be_bytes([ip[4], ip[5]]).wrapping_add(number);
    ip[2..4].copy_from_slice(&(len as u16).to_be_bytes());
    ip[4..6].copy_from_slice(&id.to_be_bytes());
    ip[10..12].fill(0);
    let sum = checksum::finish(checksum::sum(ip));
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
}

/// The same for IPv6.
fn write_v6(ip: &mut [u8], len: usize) {
    ip[4..6].copy_from_slice(&((len - 40) as u16).to_be_bytes());
}

#[cfg(test)]
mod tests;
