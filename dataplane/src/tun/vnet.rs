//! The virtio header in front of each packet of a fast queue, ten bytes: flags, kind of super-packet, length of headers,
//! size of pieces, where the checksum begins and where its field lies behind that. Numbers are in the host's order.
//! (virtio 1.2, section 5.1.6; Linux: `include/uapi/linux/virtio_net.h`.)

use crate::packet::{
    checksum,
    coalesce::Run,
    offload::{Cut, Offload, Transport},
};

/// Bytes of it.
pub(crate) const HEADER: usize = 10;
/// The checksum is left to whoever takes the packet.
const NEEDS_CSUM: u8 = 1;
const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
const GSO_UDP_L4: u8 = 5;
/// Set beside the kind if the first packet alone carries the flag CWR.
const GSO_ECN: u8 = 0x80;

/// Reads the header and does at once what it leaves to do to a single packet.
pub(super) fn decode(header: &[u8; HEADER], packet: &mut [u8]) -> Offload {
    let field = |at: usize| u16::from_ne_bytes([header[at], header[at + 1]]);
    let transport = match header[1] & !GSO_ECN {
        GSO_NONE if header[0] & NEEDS_CSUM == 0 => return Offload::None,
        GSO_NONE => {
            return match checksum::complete(packet, usize::from(field(6)), usize::from(field(8))) {
                true => Offload::None,
                false => Offload::Unknown,
            };
        }
        GSO_TCPV4 | GSO_TCPV6 => Transport::Tcp,
        GSO_UDP_L4 => Transport::Udp,
        _ => return Offload::Unknown,
    };
    Offload::Cut(Cut { transport, size: field(4) })
}

/// The header for a run; all zeros for a packet that is as it was.
pub(super) fn encode(run: &Run) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    let Some(cut) = run.cut.filter(|_| run.count > 1) else { return header };
    let (ip, headers) = run.headers;
    let (kind, field) = match cut.transport {
        Transport::Tcp if ip == 20 => (GSO_TCPV4, 16),
        Transport::Tcp => (GSO_TCPV6, 16),
        Transport::Udp => (GSO_UDP_L4, 6),
    };
    (header[0], header[1]) = (NEEDS_CSUM, kind);
    for (at, value) in [(2, headers as u16), (4, cut.size), (6, ip as u16), (8, field)] {
        header[at..at + 2].copy_from_slice(&value.to_ne_bytes());
    }
    header
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use proptest::prelude::*;

    use super::*;
    use crate::{
        buffer::Batch,
        packet::{coalesce::Coalescer, model::Model, offload::Offloads},
    };

    #[test]
    fn what_is_written_reads_the_same() {
        for v6 in [false, true] {
            for model in [Model::tcp(vec![3; 2_500]), Model::udp(vec![3; 2_500])] {
                let mut batch = Batch::new(10_000, 8);
                for piece in (Model { v6, ..model }).cut(1_000) {
                    let bytes = piece.bytes();
                    batch.room().unwrap()[..bytes.len()].copy_from_slice(&bytes);
                    batch.push(bytes.len(), ());
                }
                let mut coalescer = Coalescer::default();
                coalescer.plan(&mut batch, Offloads::ALL);
                let [run] = coalescer.runs() else { panic!("one run") };
                assert_eq!(decode(&encode(run), &mut [0; 100]), Offload::Cut(run.cut.unwrap()));
            }
        }
    }

    proptest! {
        #[test]
        fn hostile_headers_do_no_harm(
            header in any::<[u8; HEADER]>(),
            mut packet in proptest::collection::vec(any::<u8>(), 0..100),
        ) {
            decode(&header, &mut packet);
        }
    }
}
