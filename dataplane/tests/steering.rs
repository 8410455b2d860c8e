//! The steering program on a real TUN device, in a namespace of its own. Needs root.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, missing_docs, reason = "tests")]

mod lab;

use std::{net::UdpSocket, sync::Mutex};

use lab::Pair;
use mesh_dataplane::{
    packet::{
        flow::FlowHash,
        header::{Fragment, Header},
    },
    tun::{Device, Queue, Supers, TunQueue, steering::Steering},
};

const LANES: usize = 4;

/// One test at a time: what another thread starts holds all queues until it runs, and those that close late change the
/// numbers of the others.
static ALONE: Mutex<()> = Mutex::new(());

/// A device of four queues in namespace `a`, steered by `flow`.
fn steered(pair: &Pair, flow: FlowHash) -> Vec<TunQueue> {
    let queues = pair.a.enter(|| Device::open("mesh0", LANES)).unwrap().into_queues();
    Steering::load(&flow, LANES as u32).unwrap().attach(&queues[0]).unwrap();
    for args in [
        "address add 10.1.0.1/32 dev mesh0",
        "address add fd01::1/128 dev mesh0 nodad",
        "link set mesh0 mtu 1420 up",
        "route add 10.2.0.0/16 dev mesh0",
        "route add fd02::/16 dev mesh0",
    ] {
        pair.a.ip(args);
    }
    queues
}

/// All packets that wait, each with the queue that it waited in.
fn read_all(queues: &mut [TunQueue]) -> Vec<(usize, Vec<u8>)> {
    let mut all = Vec::new();
    for (n, queue) in queues.iter_mut().enumerate() {
        loop {
            let mut packets = Supers::new(192 << 10, 64);
            if !queue.read(&mut packets, 64).is_ok_and(|count| count > 0) {
                break;
            }
            all.extend(packets.iter().map(|(_, packet)| (n, packet.to_vec())));
        }
    }
    all
}

#[test]
fn every_flow_comes_out_of_the_queue_of_its_lane() {
    let _alone = ALONE.lock();
    let pair = Pair::new();
    let flow = FlowHash::new([7; 16]);
    let mut queues = steered(&pair, flow);
    for (family, own) in [("v4", "10.1.0.1:0"), ("v6", "[fd01::1]:0")] {
        let sockets = pair.a.enter(move || (0..100).map(|_| UdpSocket::bind(own).unwrap()).collect::<Vec<_>>());
        // What the device itself says at first is no concern of ours.
        read_all(&mut queues);
        let mut seen = [0; LANES];
        for (n, socket) in sockets.iter().enumerate() {
            let host = n % 7 + 1;
            let to = if family == "v4" { format!("10.2.0.{host}:900") } else { format!("[fd02::{host}]:900") };
            for len in [1, 1_200, 4_000] {
                socket.send_to(&vec![7; len], &to).unwrap();
            }
            let packets = read_all(&mut queues);
            let ours = packets.iter().filter(|(_, packet)| flow_of(packet).is_some());
            let mut count = 0;
            for (queue, packet) in ours {
                assert_eq!(*queue, flow.lane_of(packet, LANES), "{family} {packet:02x?}");
                seen[*queue] += 1;
                count += 1;
            }
            // Two whole packets and the three fragments of the third, which all take one queue.
            assert_eq!(count, 5, "{family} {packets:?}");
            let pieces = packets.iter().filter(|(_, packet)| flow_of(packet) == Some(true)).map(|(queue, _)| queue);
            assert_eq!(pieces.collect::<std::collections::BTreeSet<_>>().len(), 1);
        }
        // How even, is for the tests of the hash to say, which choose their flows.
        assert!(seen.iter().all(|count| *count > 0), "{family} {seen:?}");
    }
}

#[test]
fn the_program_stays_with_the_device() {
    let _alone = ALONE.lock();
    let pair = Pair::new();
    let flow = FlowHash::new([8; 16]);
    drop(steered(&pair, flow));
    let mut queues = pair.a.enter(|| Device::open("mesh0", LANES)).unwrap().into_queues();
    let socket = pair.a.enter(|| UdpSocket::bind("10.1.0.1:0")).unwrap();
    for port in 1..100 {
        socket.send_to(&[1], ("10.2.0.1", port)).unwrap();
    }
    let mut packets = read_all(&mut queues);
    // What the device said while its queues were opened one by one went to those that there were.
    packets.retain(|(_, packet)| flow_of(packet).is_some());
    assert_eq!(packets.len(), 99);
    for (queue, packet) in packets {
        assert_eq!(queue, flow.lane_of(&packet, LANES));
    }
}

/// True for a fragment of what the test sends, false for a whole packet of it.
fn flow_of(packet: &[u8]) -> Option<bool> {
    let header = Header::parse(packet)?;
    let sent = header.protocol == 17 && !header.destination.is_multicast();
    sent.then_some(header.fragment != Fragment::Whole)
}
