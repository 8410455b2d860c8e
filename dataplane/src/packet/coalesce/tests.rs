#![allow(clippy::unwrap_used, reason = "tests")]

use proptest::prelude::*;

use super::{
    super::{model::Model, segment::Segments},
    *,
};

fn batch(packets: &[Vec<u8>]) -> Batch<()> {
    let mut batch = Batch::new(400_000, packets.len().max(1));
    for packet in packets {
        batch.room().unwrap()[..packet.len()].copy_from_slice(packet);
        batch.push(packet.len(), ());
    }
    batch
}

/// What is written: each run's bytes and how the kernel is to cut them.
fn writes(packets: &[Vec<u8>], offloads: Offloads) -> Vec<(Vec<u8>, Option<Cut>)> {
    let mut batch = batch(packets);
    let mut coalescer = Coalescer::default();
    coalescer.plan(&mut batch, offloads);
    let mut all = Vec::new();
    for run in coalescer.runs() {
        let mut bytes = batch.get(run.first).unwrap().1.to_vec();
        for n in coalescer.followers(run) {
            bytes.extend(&batch.get(n).unwrap().1[run.headers.1..]);
        }
        all.push((bytes, run.cut.filter(|_| run.count > 1)));
    }
    // A refused run comes apart again.
    for run in coalescer.runs() {
        coalescer.part(&mut batch, run);
    }
    assert!(batch.iter().map(|(_, packet)| packet).eq(packets.iter()), "parted");
    all
}

/// What the kernel makes of the writes: cut as the model cuts, by way of the segmenter that was held against it.
fn cut(writes: Vec<(Vec<u8>, Option<Cut>)>) -> Vec<Vec<u8>> {
    let mut all = Vec::new();
    for (mut bytes, cut) in writes {
        let Some(cut) = cut else {
            all.push(bytes);
            continue;
        };
        let len = bytes.len();
        let mut segments = Segments::new(&mut bytes, len, cut).expect("a run is a super-packet");
        while let Some((packet, len)) = segments.next() {
            all.push(packet[..len].to_vec());
        }
    }
    all
}

fn flow_of(packet: &[u8]) -> Vec<u8> {
    let (addresses, protocol) = if packet[0] >> 4 == 4 { (12, packet[9]) } else { (8, packet[6]) };
    let ports = if packet[0] >> 4 == 4 { 20 } else { 40 };
    // A changed version may promise more than there is.
    [&[packet[0], protocol], packet.get(addresses..ports + 4).unwrap_or(packet)].concat()
}

fn by_flow(packets: &[Vec<u8>]) -> Vec<Vec<u8>> {
    let mut sorted = packets.to_vec();
    sorted.sort_by_key(|packet| flow_of(packet));
    sorted
}

fn counts(packets: &[Vec<u8>]) -> Vec<usize> {
    let mut batch = batch(packets);
    let mut coalescer = Coalescer::default();
    coalescer.plan(&mut batch, Offloads::ALL);
    coalescer.runs().iter().map(|run| run.count).collect()
}

fn train(model: &Model, size: usize) -> Vec<Vec<u8>> {
    model.cut(size).iter().map(Model::bytes).collect()
}

#[test]
fn trains_become_one_write_and_come_apart_the_same() {
    for v6 in [false, true] {
        for len in [1_000, 2_000, 2_001, 10_000, 64_000] {
            let payload: Vec<u8> = (0..len).map(|n| (n / 3) as u8).collect();
            for model in [Model::tcp(payload.clone()), Model::udp(payload)] {
                let packets = train(&Model { v6, ..model }, 1_000);
                let written = writes(&packets, Offloads::ALL);
                assert_eq!(written.len(), 1, "{len} bytes, {} packets", packets.len());
                assert_eq!(cut(written), packets);
                assert_eq!(writes(&packets, Offloads::NONE).len(), packets.len());
            }
        }
    }
}

#[test]
fn what_concerns_one_packet_is_not_spread_over_many() {
    let base = Model::tcp(vec![5; 4_000]);
    let altered = |n: usize, change: &dyn Fn(&mut Model)| {
        let mut models = base.cut(1_000);
        change(&mut models[n]);
        counts(&models.iter().map(Model::bytes).collect::<Vec<_>>())
    };
    assert_eq!(altered(1, &|_| ()), [4]);
    assert_eq!(altered(1, &|m| m.flags |= 8), [2, 2], "PSH ends a run");
    assert_eq!(altered(3, &|m| m.flags |= 1), [4], "FIN may stand at the end");
    assert_eq!(altered(2, &|m| m.flags |= 1), [3, 1]);
    for flag in [2, 4, 0x20, 0x80] {
        assert_eq!(altered(1, &|m| m.flags |= flag), [1, 1, 2], "SYN, RST, URG, CWR stand alone");
    }
    assert_eq!(altered(2, &|m| m.tos = 3), [2, 1, 1], "congestion marks");
    assert_eq!(altered(2, &|m| m.ack += 1), [2, 1, 1]);
    assert_eq!(altered(2, &|m| m.tcp_options[5] = 9), [2, 1, 1], "timestamps");
    assert_eq!(altered(2, &|m| m.sequence -= 1), [2, 1, 1], "overlap");
    assert_eq!(altered(2, &|m| m.payload.truncate(10)), [3, 1]);
    assert_eq!(altered(2, &|m| m.payload.clear()), [2, 1, 1], "an acknowledgement in between");
    assert_eq!(altered(2, &|m| m.ip_options = vec![1; 4]), [2, 1, 1]);
    assert_eq!(altered(2, &|m| m.id = 9), [4], "with DF the identification means nothing");
    let fragile = Model { dont_fragment: false, ..base };
    let mut models = fragile.cut(1_000);
    assert_eq!(counts(&models.iter().map(Model::bytes).collect::<Vec<_>>()), [4]);
    models[2].id = 9;
    assert_eq!(counts(&models.iter().map(Model::bytes).collect::<Vec<_>>()), [2, 1, 1]);
}

#[test]
fn a_wrong_checksum_is_neither_hidden_nor_spread() {
    for model in [Model::tcp(vec![5; 4_000]), Model::udp(vec![5; 4_000])] {
        for wrong in 0..4 {
            let mut packets = train(&model, 1_000);
            packets[wrong][900] ^= 1;
            let written = writes(&packets, Offloads::ALL);
            assert!(written.iter().any(|(bytes, cut)| *bytes == packets[wrong] && cut.is_none()), "{wrong}");
            assert_eq!(cut(written), packets);
        }
    }
    let mut packets = train(&Model::udp(vec![5; 4_000]), 1_000);
    packets.iter_mut().for_each(|packet| packet[26..28].fill(0));
    assert_eq!(counts(&packets), [1; 4], "without a checksum nothing is joined");
}

#[test]
fn bounds_hold() {
    assert_eq!(counts(&train(&Model::udp(vec![1; 150 * 10]), 10)), [64, 64, 22]);
    let long: Vec<_> = (0..3).flat_map(|_| train(&Model::tcp(vec![1; 60_000]), 1_000)).collect();
    assert!(counts(&long).iter().all(|count| *count <= 65));
    // More flows at once than runs are kept open.
    let flows: Vec<_> = (0..40u16).map(|n| Model { ports: [n, 80], ..Model::tcp(vec![1; 2_000]) }.cut(1_000)).collect();
    let interleaved: Vec<_> = (0..2).flat_map(|at| flows.iter().map(move |flow| flow[at].bytes())).collect();
    let written = writes(&interleaved, Offloads::ALL);
    assert_eq!(by_flow(&cut(written)), by_flow(&interleaved));
    let few: Vec<_> = (0..2).flat_map(|at| flows[..8].iter().map(move |flow| flow[at].bytes())).collect();
    assert_eq!(counts(&few), [2; 8], "interleaved flows are told apart");
}

proptest! {
    #[test]
    fn any_mix_comes_apart_into_the_same_packets_in_order(
        pieces in proptest::collection::vec((0..4u16, any::<bool>(), any::<bool>(), 1..5_000usize, 1..1_500usize), 1..12),
        swaps in proptest::collection::vec((0..40usize, 0..40usize), 0..6),
        flips in proptest::collection::vec((0..40usize, 0..60usize, any::<u8>()), 0..3),
    ) {
        let mut packets = Vec::new();
        for (flow, tcp, v6, len, size) in pieces {
            let payload = vec![flow as u8; len];
            let model = if tcp { Model::tcp(payload) } else { Model::udp(payload) };
            packets.extend(train(&Model { ports: [flow, 9], v6, ..model }, size));
        }
        packets.truncate(120);
        let count = packets.len();
        for (a, b) in swaps {
            packets.swap(a % count, b % count);
        }
        for (n, at, value) in flips {
            let packet = &mut packets[n % count];
            let at = at % packet.len();
            packet[at] ^= value;
        }
        let out = cut(writes(&packets, Offloads::ALL));
        prop_assert_eq!(out.len(), packets.len());
        let clean = |packets: &[Vec<u8>]| -> Vec<Vec<u8>> {
            packets.iter().map(|packet| {
                let mut packet = packet.clone();
                // With DF set the identification may change.
                if packet[0] == 0x45 && packet[6] & 0x40 != 0 {
                    packet[4..6].fill(0);
                    packet[10..12].fill(0);
                }
                packet
            }).collect()
        };
        prop_assert_eq!(by_flow(&clean(&out)), by_flow(&clean(&packets)));
    }
}
