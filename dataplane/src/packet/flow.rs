//! The symmetric flow hash: both directions of a flow, on both nodes, name the same lane.
//!
//! Each end of the flow (address, port) is mixed under the key by itself and the two results are added, so that
//! direction does not matter and structured addresses do not collide. Only multiplications, shifts and additions of 64
//! bits, so that a small program in the kernel computes the same: see [`tun::steering`](crate::tun::steering), which
//! has to change with this.

use std::net::IpAddr;

use super::header::{Fragment, Header};

/// Multipliers of the finalizer of SplitMix64.
pub(crate) const MULTIPLIERS: [u64; 2] = [0xbf58_476d_1ce4_e5b9, 0x94d0_49bb_1331_11eb];

/// Hashes flows under a key of 16 bytes.
#[derive(Debug, Clone, Copy)]
pub struct FlowHash {
    first: u64,
    second: u64,
}

impl FlowHash {
    /// The same key on all nodes makes all of them agree.
    pub fn new(key: [u8; 16]) -> Self {
        let key = u128::from_le_bytes(key);
        Self { first: key as u64, second: (key >> 64) as u64 }
    }

    /// Hash of the flow this packet belongs to: addresses and protocol, and the ports of TCP and UDP. Fragments hash
    /// by addresses alone, all of them and so the first too: what the others carry they do not always say.
    pub fn hash(&self, header: &Header, packet: &[u8]) -> u32 {
        let (source, destination) = header.ports(packet).unwrap_or_default();
        let protocol = if header.fragment == Fragment::Whole { header.protocol } else { 0 };
        let ends = self.end(header.source, source).wrapping_add(self.end(header.destination, destination));
        (mix(ends ^ u64::from(protocol) ^ self.second) >> 32) as u32
    }

    /// The lane, of `lanes`, that this packet's flow belongs to.
    pub fn lane(&self, header: &Header, packet: &[u8], lanes: usize) -> usize {
        self.hash(header, packet) as usize % lanes.max(1)
    }

    /// The lane, of `lanes`, that a packet from the kernel belongs to; lane 0 for what is no whole packet.
    pub fn lane_of(&self, packet: &[u8], lanes: usize) -> usize {
        Header::parse(packet).map_or(0, |header| self.lane(&header, packet, lanes))
    }

    /// Both halves of the key.
    pub(crate) fn keys(&self) -> [u64; 2] {
        [self.first, self.second]
    }

    fn end(&self, address: IpAddr, port: u16) -> u64 {
        let (high, low) = match address {
            IpAddr::V4(v4) => (0, u64::from(v4.to_bits())),
            IpAddr::V6(v6) => ((v6.to_bits() >> 64) as u64, v6.to_bits() as u64),
        };
        let high = mix(high ^ self.first);
        mix(high.wrapping_add(low) ^ self.second ^ (u64::from(port) << 48))
    }
}

/// The finalizer of SplitMix64: every input bit moves every output bit.
fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(MULTIPLIERS[0]);
    x = (x ^ (x >> 27)).wrapping_mul(MULTIPLIERS[1]);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::header::{Fragment, TCP};

    fn header(source: IpAddr, destination: IpAddr, fragment: Fragment) -> Header {
        Header { source, destination, len: 4, protocol: TCP, payload: 0, fragment, dont_fragment: true }
    }

    #[test]
    fn both_directions_hash_alike_and_spread() {
        let flow = FlowHash::new([9; 16]);
        let mut lanes = [0; 4];
        for n in 0..4_000u16 {
            let [a, b] = n.to_be_bytes();
            let (x, y) = (IpAddr::from([10, 1, a, b]), IpAddr::from([10, 2, a, b]));
            let there = flow.lane(&header(x, y, Fragment::Whole), &[1, 2, a, b], 4);
            let back = flow.lane(&header(y, x, Fragment::Whole), &[a, b, 1, 2], 4);
            assert_eq!(there, back);
            lanes[there] += 1;
        }
        assert!(lanes.iter().all(|count| (850..1150).contains(count)), "{lanes:?}");
    }

    #[test]
    fn headers_are_enough() {
        let flow = FlowHash::new([9; 16]);
        let (x, y) = (IpAddr::from([10, 1, 0, 1]), IpAddr::from([10, 2, 0, 1]));
        let long = Header { len: 60_000, ..header(x, y, Fragment::Whole) };
        assert_ne!(flow.hash(&long, &[1, 2, 3, 4]), flow.hash(&long, &[1, 2, 3, 5]));
    }

    #[test]
    fn fragments_ignore_ports_and_what_they_say_to_carry() {
        let flow = FlowHash::new([9; 16]);
        let (x, y) = (IpAddr::from([10, 1, 0, 1]), IpAddr::from([10, 2, 0, 1]));
        let first = flow.hash(&header(x, y, Fragment::First), &[1, 2, 3, 4]);
        let later = Header { protocol: 60, ..header(x, y, Fragment::Later) };
        assert_eq!(first, flow.hash(&later, &[5, 6, 7, 8]));
    }
}
