//! UDP datagrams over IPv4 that came in fragments, put together again (RFC 791, section 3.2), so that the kernel takes in one
//! write what it would take in two and keep for a while, and many such datagrams as one run.
//!
//! Only what lies in one batch, complete, in order and without overlap: nothing is kept. All else passes as it is, for the
//! receiver to judge. A link behind that is too narrow may cut it again, which is why it is done with IPv4 only, and only
//! where "do not fragment" is not set.

use super::{checksum, header::UDP};
use crate::buffer::{Batch, MAX_PACKET};

/// Bytes of the header; those with options pass as they are.
const HEADER: usize = 20;
/// Datagrams that may be incomplete at one time; with more, the one begun first passes as it is.
const OPEN: usize = 64;
/// In the word of flags and offset: "more fragments", the offset.
const MORE: u16 = 0x2000;
const OFFSET: u16 = 0x1fff;

/// Finds the datagrams of one batch after another; its memory is kept.
#[derive(Debug, Default)]
pub struct Reassembly {
    open: Vec<Datagram>,
    /// For each packet the next one of its datagram.
    next: Vec<usize>,
    /// Packets that are part of another one now.
    gone: Vec<bool>,
    parts: Vec<(usize, usize)>,
}

/// The beginning of a datagram.
#[derive(Debug, Clone, Copy)]
struct Datagram {
    identity: Identity,
    first: usize,
    last: usize,
    /// Bytes of payload so far.
    reach: usize,
}

/// What fragments of one datagram have in common (RFC 791), and what they need to have in common to be joined: class of service
/// with the congestion mark (RFC 3168, section 5.3), time to live.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Identity {
    addresses: [u8; 8],
    number: [u8; 2],
    class: u8,
    ttl: u8,
}

/// One fragment.
#[derive(Debug, Clone, Copy)]
struct Part {
    identity: Identity,
    /// Where its payload lies in the datagram's.
    offset: usize,
    len: usize,
    is_last: bool,
}

impl Reassembly {
    /// Puts the datagrams of a batch together. Each takes the place of its last fragment.
    pub fn join(&mut self, packets: &mut Batch<()>) {
        self.open.clear();
        self.next.clear();
        self.gone.clear();
        for n in 0..packets.len() {
            let Some(part) = packets.get(n).and_then(|(_, packet)| Part::parse(packet)) else { continue };
            self.place(packets, n, part);
        }
        if !self.gone.is_empty() {
            packets.retain(|n| !self.gone[n]);
        }
    }

    fn place(&mut self, packets: &mut Batch<()>, n: usize, part: Part) {
        let found = self.open.iter().position(|datagram| datagram.identity == part.identity);
        let Some(position) = found else {
            if part.offset == 0 {
                if self.open.len() == OPEN {
                    self.open.remove(0);
                }
                self.open.push(Datagram { identity: part.identity, first: n, last: n, reach: part.len });
            }
            return;
        };
        let datagram = &mut self.open[position];
        if part.offset != datagram.reach || part.offset + part.len + HEADER > MAX_PACKET {
            // Out of order, twice, or overlapping.
            self.open.remove(position);
            return;
        }
        self.next.resize(packets.len(), usize::MAX);
        self.next[datagram.last] = n;
        datagram.last = n;
        datagram.reach += part.len;
        if part.is_last {
            let datagram = self.open.remove(position);
            self.complete(packets, &datagram);
        }
    }

    fn complete(&mut self, packets: &mut Batch<()>, datagram: &Datagram) {
        self.parts.clear();
        self.parts.push((datagram.first, 0));
        let mut at = datagram.first;
        while at != datagram.last {
            at = self.next[at];
            self.parts.push((at, HEADER));
        }
        if !packets.gather(&self.parts, datagram.last) {
            return;
        }
        self.gone.resize(packets.len(), false);
        for (n, _) in &self.parts[..self.parts.len() - 1] {
            self.gone[*n] = true;
        }
        let Some(header) = packets.get_mut(datagram.last).and_then(|packet| packet.first_chunk_mut::<HEADER>()) else {
            return;
        };
        header[2..4].copy_from_slice(&((HEADER + datagram.reach) as u16).to_be_bytes());
        header[6..8].fill(0);
        header[10..12].fill(0);
        let sum = checksum::finish(checksum::sum(header));
        header[10..12].copy_from_slice(&sum.to_be_bytes());
    }
}

impl Part {
    /// `None` for what is no fragment, or not to be joined.
    fn parse(packet: &[u8]) -> Option<Self> {
        let header: &[u8; HEADER] = packet.first_chunk()?;
        let word = u16::from_be_bytes([header[6], header[7]]);
        if header[0] != 0x45 || word & (OFFSET | MORE) == 0 || header[9] != UDP {
            return None;
        }
        let (offset, len, is_last) = (usize::from(word & OFFSET) * 8, packet.len() - HEADER, word & MORE == 0);
        let is_whole = usize::from(u16::from_be_bytes([header[2], header[3]])) == packet.len()
            && checksum::fold(checksum::sum(header)) == 0xffff;
        let has_flags = word & !(OFFSET | MORE) != 0;
        // All but the last count in units of eight.
        if !is_whole || has_flags || len == 0 || (!is_last && len % 8 != 0) {
            return None;
        }
        let mut addresses = [0; 8];
        addresses.copy_from_slice(&header[12..20]);
        let identity = Identity { addresses, number: [header[4], header[5]], class: header[1], ttl: header[8] };
        Some(Self { identity, offset, len, is_last })
    }
}

#[cfg(test)]
mod tests;
