//! Explicit congestion notification across the tunnel (RFC 6040): what routers between the nodes mark reaches the flow.

use super::checksum;

/// The two bits in the traffic class byte, and the value that says "congestion experienced".
pub const MASK: u8 = 3;
const CE: u8 = 3;
const ECT_1: u8 = 1;
const ECT_0: u8 = 2;

/// The traffic class byte of a whole IPv4 or IPv6 packet.
pub fn traffic_class(packet: &[u8]) -> u8 {
    match packet {
        [first, second, ..] if first >> 4 == 4 => *second,
        [first, second, ..] => first << 4 | second >> 4,
        _ => 0,
    }
}

/// Carries what the outer header says into a packet that came out of a tunnel (RFC 6040, figure 4). False if the packet
/// is to be dropped: congestion was marked on a flow that does not know of it.
#[must_use]
pub fn decapsulate(packet: &mut [u8], outer: u8) -> bool {
    let inner = traffic_class(packet) & MASK;
    let new = match (inner, outer & MASK) {
        (0, CE) => return false,
        (ECT_0 | ECT_1, CE) => CE,
        (ECT_0, ECT_1) => ECT_1,
        _ => return true,
    };
    if packet[0] >> 4 == 4 {
        set_v4(packet, new);
    } else {
        packet[1] = packet[1] & !(MASK << 4) | new << 4;
    }
    true
}

fn set_v4(packet: &mut [u8], ecn: u8) {
    let Some(header) = packet.first_chunk_mut::<20>() else { return };
    let old = u16::from_be_bytes([header[0], header[1]]);
    header[1] = header[1] & !MASK | ecn;
    let sum = u16::from_be_bytes([header[10], header[11]]);
    let sum = checksum::adjust(sum, old, u16::from_be_bytes([header[0], header[1]]));
    header[10..12].copy_from_slice(&sum.to_be_bytes());
}

#[cfg(test)]
mod tests {
    use super::{super::model::Model, *};

    #[test]
    fn every_pair_follows_the_table_of_the_standard() {
        // Rows: inner; columns: outer Not-ECT, ECT(1), ECT(0), CE. None: dropped.
        let table = [
            (0, [Some(0), Some(0), Some(0), None]),
            (1, [Some(1), Some(1), Some(1), Some(3)]),
            (2, [Some(2), Some(1), Some(2), Some(3)]),
            (3, [Some(3), Some(3), Some(3), Some(3)]),
        ];
        for v6 in [false, true] {
            for (inner, row) in table {
                for (outer, expected) in (0..4).zip(row) {
                    // The six bits beside them stay, and the outer ones do not matter.
                    let model = Model { v6, tos: 0xb8 | inner, ..Model::udp(vec![1; 9]) };
                    let mut packet = model.bytes();
                    assert_eq!(traffic_class(&packet), 0xb8 | inner);
                    let passed = decapsulate(&mut packet, 0x44 | outer);
                    assert_eq!(passed, expected.is_some(), "{inner} {outer}");
                    if let Some(ecn) = expected {
                        assert_eq!(packet, Model { tos: 0xb8 | ecn, ..model }.bytes(), "{inner} {outer}");
                    }
                }
            }
        }
        assert!(decapsulate(&mut [], 3) || traffic_class(&[]) == 0);
    }
}
