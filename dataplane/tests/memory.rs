//! Two engines in one process, with queues and a network in memory: no kernel device, no root.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, missing_docs, reason = "tests")]

mod lab;

use std::{net::SocketAddr, sync::Arc, time::Duration};

use lab::{secret, table, wait_until};
use mesh_dataplane::{
    Command, Engine, EngineConfig, EngineError, Event, LaneParts, Lanes, LocalKey, PeerId, PeerSpec, Preshared,
    RemoteKey, SecretKey, Table, TableSpec,
    tun::memory::MemoryQueue,
    udp::memory::{MemoryNetwork, MemorySocket},
};

const PATIENCE: Duration = Duration::from_secs(10);

struct Two {
    network: MemoryNetwork,
    a: Engine,
    b: Engine,
    /// The kernel's side of each queue.
    tun_a: MemoryQueue,
    tun_b: MemoryQueue,
}

fn outer(host: u8) -> SocketAddr {
    SocketAddr::from(([192, 0, 2, host], 7100))
}

fn engine(network: &MemoryNetwork, own: u8, other: u8) -> (Engine, MemoryQueue) {
    let (kernel, queue) = MemoryQueue::pair().unwrap();
    let socket = network.bind(outer(own)).unwrap();
    let parts = LaneParts { queue: Box::new(queue), socket: Box::new(socket) };
    let nets = [own, other].map(|n| format!("10.{n}.0.0/16"));
    let table = table(secret(own), &[&nets[0]], secret(other).to_public(), &[&nets[1]], Some(outer(other)));
    (Engine::start(EngineConfig::default(), table, vec![parts]).unwrap(), kernel)
}

fn two() -> Two {
    let network = MemoryNetwork::default();
    let (a, tun_a) = engine(&network, 1, 2);
    let (b, tun_b) = engine(&network, 2, 1);
    Two { network, a, b, tun_a, tun_b }
}

fn packet(from: u8, to: u8, number: u32) -> Vec<u8> {
    let mut packet = vec![0; 60];
    packet[0] = 0x45;
    packet[3] = 60;
    packet[9] = 17;
    packet[12..20].copy_from_slice(&[10, from, 0, 1, 10, to, 0, 1]);
    packet[40..44].copy_from_slice(&number.to_be_bytes());
    packet
}

fn expect(tun: &MemoryQueue, wanted: &[u8]) {
    let mut got = None;
    wait_until("packet", PATIENCE, || {
        got = tun.pop().unwrap();
        got.is_some()
    });
    assert_eq!(got.unwrap(), wanted);
}

#[test]
fn packets_pass_both_ways_and_are_counted() {
    let mut two = two();
    let events = two.a.take_events().unwrap();
    for n in 0..500 {
        assert!(two.tun_a.push(&packet(1, 2, n)).unwrap());
        expect(&two.tun_b, &packet(1, 2, n));
        assert!(two.tun_b.push(&packet(2, 1, n)).unwrap());
        expect(&two.tun_a, &packet(2, 1, n));
    }
    let snapshot = two.a.snapshot();
    let peer = &snapshot.peers[&PeerId(1)];
    assert_eq!((peer.traffic.tx_packets, peer.traffic.rx_packets), (500, 500));
    assert_eq!(peer.endpoint, Some(outer(2)));
    assert!(peer.tunnels[0].confirmed && peer.tunnels[0].sending);
    assert!(peer.last_handshake.unwrap() < PATIENCE);
    assert_eq!(snapshot.lanes.len(), 1);
    assert!(matches!(events.next_within(PATIENCE), Ok(Some(Event::PeerUp { peer: PeerId(1), .. }))));
    assert_eq!(two.a.stop(), []);
    assert_eq!(two.b.stop(), []);
}

#[test]
fn a_lost_queue_does_not_end_the_lane() {
    let mut two = two();
    let events = two.b.take_events().unwrap();
    two.tun_a.push(&packet(1, 2, 0)).unwrap();
    expect(&two.tun_b, &packet(1, 2, 0));
    drop(two.tun_b);
    let lost = || matches!(events.try_next(), Some(Event::QueueLost { lane: 0, .. }));
    wait_until("event", PATIENCE, lost);
    assert!(two.b.is_running());
    assert!(!two.b.snapshot().lanes[0].queue_attached);
    let (kernel, queue) = MemoryQueue::pair().unwrap();
    two.b.replace_queue(0, Box::new(queue)).unwrap();
    two.tun_a.push(&packet(1, 2, 1)).unwrap();
    expect(&kernel, &packet(1, 2, 1));
}

#[test]
fn commands_reach_the_lane() {
    let two = two();
    let probe: MemorySocket = two.network.bind(outer(9)).unwrap();
    two.a.command(Command::SendDatagram { lane: 0, to: outer(9), bytes: vec![0x40, 1, 2] }).unwrap();
    let mut got = None;
    wait_until("datagram", PATIENCE, || {
        got = probe.try_receive();
        got.is_some()
    });
    assert_eq!(got.unwrap(), (outer(1), vec![0x40, 1, 2]));
    two.a.initiate(PeerId(1)).unwrap();
    let confirmed =
        |engine: &Engine| engine.snapshot().peers.values().any(|peer| peer.tunnels.iter().any(|t| t.confirmed));
    wait_until("handshake", PATIENCE, || confirmed(&two.a) && confirmed(&two.b));
    assert!(matches!(two.a.replace_queue(3, Box::new(MemoryQueue::pair().unwrap().0)), Err(EngineError::NoLane(3))));
    // A table without the peer: its tunnel is gone when the lane has taken it.
    let local_keys = vec![LocalKey { epoch: 1, secret: secret(1) }];
    let empty = Table::new(TableSpec { local_keys, ..TableSpec::default() }).unwrap();
    two.a.set_table(Arc::new(empty));
    wait_until("removal", PATIENCE, || two.a.snapshot().lanes[0].tunnels == 0);
}

#[test]
fn no_lanes_is_refused() {
    let table = table(secret(1), &[], secret(7).to_public(), &[], None);
    let error = Engine::start(EngineConfig::default(), table, Vec::new()).unwrap_err();
    assert_eq!(error.to_string(), "0 lanes, must be 1, 2, 4 or 8");
}

#[test]
fn ten_thousand_known_peers_want_nothing() {
    let peers = (0..10_000u32).map(|n| {
        let mut bytes = [7; 32];
        bytes[4..8].copy_from_slice(&n.to_le_bytes());
        PeerSpec {
            id: PeerId(n),
            keys: vec![RemoteKey { epoch: 1, public: SecretKey::new(bytes).to_public() }],
            preshared: Preshared::None,
            allowed_ips: vec![format!("10.{}.{}.0/24", n >> 8, n & 255).parse().unwrap()],
            endpoints: vec![SocketAddr::from(([192, 0, 2, 1], 7100))],
            keepalive: None,
            lanes: Lanes::Plain,
        }
    });
    let local_keys = vec![LocalKey { epoch: 1, secret: secret(9) }];
    let table = Table::new(TableSpec { local_keys, peers: peers.collect(), ..TableSpec::default() }).unwrap();
    let config = mesh_dataplane::lane::LaneConfig {
        lane: 0,
        lanes: 1,
        flow_key: [0; 16],
        handshakes_per_second: 500,
        dscp: mesh_dataplane::packet::dscp::Dscp::Clear,
        seed: [3; 32],
    };
    let now = mesh_dataplane::clock::Instant::from_start(Duration::from_secs(9));
    let table = Arc::new(table);
    let mut lane = mesh_dataplane::lane::Lane::new(config, table.clone(), now);
    lane.set_table(table, now);
    assert_eq!(lane.poll_timeout(), None, "no timer");
    let (stats, peers) = lane.snapshot(now);
    assert_eq!((stats.tunnels, peers.len()), (0, 0), "no state");
}
