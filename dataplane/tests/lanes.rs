//! Ends of several lanes on real devices of several queues, each queue with its own port: every packet of a flow takes one lane
//! and comes in order, whatever the numbers of lanes. Needs root.
//!
//! The kernel's own choice of a queue goes by a hash that is random for each socket, so the two ends of a flow never agree
//! on it: without the steering program these tests see strays, which one of them shows.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, missing_docs, reason = "tests")]

mod lab;

use std::{
    net::{IpAddr, UdpSocket},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use lab::{Namespace, Pair, secret, wait_until};
use mesh_dataplane::{
    Engine, EngineConfig, LaneParts, Lanes, LocalKey, PeerId, PeerSpec, Preshared, RemoteKey, Snapshot, Table,
    TableSpec,
    packet::flow::FlowHash,
    tun::{Device, DeviceOptions, TunQueue},
    udp::system::{SystemConfig, SystemSocket},
};

const FLOWS: usize = 400;
const FLOW_KEY: [u8; 16] = [0x5a; 16];
const PATIENCE: Duration = Duration::from_secs(30);
/// After so long without, flows send again.
const AGAIN: Duration = Duration::from_millis(200);

/// Two engines with so many lanes each, and their namespaces.
struct Ends {
    pair: Pair,
    engines: [Engine; 2],
}

impl Ends {
    /// With devices that steer, or with the kernel's own choice of a queue.
    fn new(lanes: [usize; 2], steered: bool) -> Self {
        let pair = Pair::new();
        let nets = ["10.1.0.0/16", "10.2.0.0/16"];
        let mut own = 0;
        let engines = [&pair.a, &pair.b].map(|side| {
            let other = 1 - own;
            let queues = open(side, lanes[own], steered);
            side.ip(&format!("address add 10.{}.0.1/32 dev mesh0", own + 1));
            side.ip(&format!("address add fd0{}::1/128 dev mesh0 nodad", own + 1));
            side.ip("link set mesh0 mtu 1420 up");
            side.ip(&format!("route add {} dev mesh0 src 10.{}.0.1", nets[other], own + 1));
            side.ip(&format!("route add fd0{}::/16 dev mesh0", other + 1));
            let parts = queues.into_iter().enumerate().map(|(n, queue)| {
                let port = 7_100 + n as u16;
                let socket = side.enter(move || SystemSocket::bind(&SystemConfig { port, ..Default::default() }));
                LaneParts { queue: Box::new(queue), socket: Box::new(socket.unwrap()) }
            });
            let parts = parts.collect();
            let table = table(own, other, lanes[other]);
            own += 1;
            Engine::start(EngineConfig { flow_key: FLOW_KEY, ..EngineConfig::default() }, table, parts).unwrap()
        });
        Self { pair, engines }
    }

    fn snapshots(&self) -> [Snapshot; 2] {
        [self.engines[0].snapshot(), self.engines[1].snapshot()]
    }
}

fn open(side: &Namespace, lanes: usize, steered: bool) -> Vec<TunQueue> {
    let options = DeviceOptions { queues: lanes, ..DeviceOptions::default() };
    side.enter(move || match steered {
        true => {
            let (device, refusal) = Device::open_steered("mesh0", &options, &FlowHash::new(FLOW_KEY)).unwrap();
            assert!(refusal.is_none(), "{refusal:?}");
            device.into_queues()
        }
        false => Device::open_with("mesh0", &options).unwrap().into_queues(),
    })
}

fn table(own: usize, other: usize, lanes: usize) -> Arc<Table> {
    let nets = |side: usize| -> Vec<ipnet::IpNet> {
        [format!("10.{}.0.0/16", side + 1), format!("fd0{}::/16", side + 1)].map(|text| text.parse().unwrap()).to_vec()
    };
    let peer = PeerSpec {
        id: PeerId(1),
        keys: vec![RemoteKey { epoch: 1, public: secret(other as u8 + 1).to_public() }],
        preshared: Preshared::None,
        allowed_ips: nets(other),
        endpoints: vec![format!("192.0.2.{}:7100", other + 1).parse().unwrap()],
        keepalive: None,
        lanes: Lanes::Each(lanes as u8),
    };
    let spec = TableSpec {
        local_keys: vec![LocalKey { epoch: 1, secret: secret(own as u8 + 1) }],
        peers: vec![peer],
        own_prefixes: nets(own),
        ..TableSpec::default()
    };
    Arc::new(Table::new(spec).unwrap())
}

/// Flows of both families between two sockets each, and what came of them so far.
struct Flows {
    sockets: Vec<[UdpSocket; 2]>,
    sent: u32,
    /// For each flow and each end, the number received last.
    last: Vec<[u32; 2]>,
    received: usize,
    reordered: usize,
}

impl Flows {
    fn new(pair: &Pair) -> Self {
        let bind = |side: &Namespace, own: u8| {
            side.enter(move || {
                let socket = |n: usize| {
                    let address: IpAddr = match n % 2 {
                        0 => [10, own, 0, 1].into(),
                        _ => format!("fd0{own}::1").parse().unwrap(),
                    };
                    UdpSocket::bind((address, 0)).unwrap()
                };
                (0..FLOWS).map(socket).collect::<Vec<_>>()
            })
        };
        let (a, b) = (bind(&pair.a, 1), bind(&pair.b, 2));
        let sockets = a.into_iter().zip(b).map(|(a, b)| {
            a.connect(b.local_addr().unwrap()).unwrap();
            b.connect(a.local_addr().unwrap()).unwrap();
            for socket in [&a, &b] {
                socket.set_nonblocking(true).unwrap();
            }
            [a, b]
        });
        Self { sockets: sockets.collect(), sent: 0, last: vec![[0; 2]; FLOWS], received: 0, reordered: 0 }
    }

    /// One datagram of each flow each way.
    fn send(&mut self) {
        self.sent += 1;
        for ends in &self.sockets {
            for end in ends {
                end.send(&self.sent.to_be_bytes()).unwrap();
            }
        }
        self.receive();
    }

    fn receive(&mut self) {
        for (ends, last) in self.sockets.iter().zip(&mut self.last) {
            for (end, last) in ends.iter().zip(last) {
                let mut number = [0; 4];
                while end.recv(&mut number).is_ok() {
                    let number = u32::from_be_bytes(number);
                    self.reordered += usize::from(number <= *last);
                    *last = number;
                    self.received += 1;
                }
            }
        }
    }

    /// Goes on until a datagram of each flow has come both ways that was sent after number `after`. What a full queue lost
    /// is sent again: it is order that counts, not loss.
    fn wait(&mut self, after: u32) {
        let deadline = Instant::now() + PATIENCE;
        let mut again = Instant::now() + AGAIN;
        loop {
            self.receive();
            let missing = self.last.iter().flatten().filter(|last| **last <= after).count();
            if missing == 0 {
                return;
            }
            assert!(Instant::now() < deadline, "{missing} flows did not come through");
            if Instant::now() > again {
                again = Instant::now() + AGAIN;
                self.send();
            }
            thread::yield_now();
        }
    }
}

/// Sends several datagrams at once on each flow, again and again, with pauses longer than the kernel remembers a flow.
fn run(flows: &mut Flows) {
    // Sessions of all pairs of lanes first: what waits for one is bounded.
    flows.wait(0);
    for round in 0..3 {
        for _ in 0..10 {
            let before = flows.sent;
            for _ in 0..4 {
                flows.send();
            }
            flows.wait(before);
        }
        if round < 2 {
            thread::sleep(Duration::from_secs(5));
        }
    }
}

fn keeps_its_lane(lanes: [usize; 2]) {
    let ends = Ends::new(lanes, true);
    let mut flows = Flows::new(&ends.pair);
    run(&mut flows);
    assert_eq!(flows.reordered, 0, "of {}", flows.received);
    for (n, snapshot) in ends.snapshots().iter().enumerate() {
        assert_eq!(snapshot.lanes.len(), lanes[n]);
        for lane in &snapshot.lanes {
            assert_eq!((lane.strayed_packets, lane.crossed_packets), (0, 0), "{lanes:?}: {lane:?}");
            assert!(lane.traffic.tx_packets > 0 && lane.traffic.rx_packets > 0, "{lanes:?}: {lane:?}");
        }
        let peer = &snapshot.peers[&PeerId(1)];
        assert_eq!(peer.tunnels.len(), lanes[0].max(lanes[1]), "one tunnel for each pair");
        assert_eq!(peer.blocked, []);
    }
}

#[test]
fn flows_keep_their_lane_between_two_lanes_and_one() {
    keeps_its_lane([2, 1]);
}

#[test]
fn flows_keep_their_lane_between_four_lanes_and_four() {
    keeps_its_lane([4, 4]);
}

#[test]
fn flows_keep_their_lane_between_eight_lanes_and_two() {
    keeps_its_lane([8, 2]);
}

#[test]
fn without_the_program_flows_stray() {
    let ends = Ends::new([4, 4], false);
    let mut flows = Flows::new(&ends.pair);
    run(&mut flows);
    let strayed = |snapshot: &Snapshot| snapshot.lanes.iter().map(|lane| lane.strayed_packets).sum::<u64>();
    assert!(ends.snapshots().iter().map(strayed).sum::<u64>() > FLOWS as u64);
}

#[test]
fn flows_of_a_blocked_port_use_lane_0() {
    let ends = Ends::new([2, 2], true);
    ends.pair.b.exec("nft add table inet block");
    ends.pair.b.exec("nft add chain inet block in { type filter hook input priority 0 ; }");
    ends.pair.b.exec("nft add rule inet block in udp dport 7101 drop");
    let mut flows = Flows::new(&ends.pair);
    let blocked = || ends.snapshots()[0].peers.get(&PeerId(1)).map_or(0, |peer| peer.blocked.len());
    wait_until("the lane is blocked and its flows pass all the same", PATIENCE, || {
        flows.send();
        thread::sleep(Duration::from_millis(100));
        flows.receive();
        blocked() == 1 && flows.last.iter().flatten().all(|last| *last > 0)
    });
    let [a, _] = ends.snapshots();
    let pair = a.peers[&PeerId(1)].blocked[0];
    assert_eq!((pair.local, pair.remote), (1, 1));
    assert!(a.lanes[1].crossed_packets > 0);
    let before = flows.sent;
    flows.send();
    flows.wait(before);
}

#[test]
fn a_deleted_device_comes_back_with_all_its_queues() {
    let ends = Ends::new([4, 4], true);
    let mut flows = Flows::new(&ends.pair);
    flows.wait(0);
    ends.pair.a.ip("link del mesh0");
    wait_until("all queues are lost", PATIENCE, || {
        ends.engines[0].snapshot().lanes.iter().all(|lane| !lane.queue_attached)
    });
    for (lane, queue) in open(&ends.pair.a, 4, true).into_iter().enumerate() {
        ends.engines[0].replace_queue(lane, Box::new(queue)).unwrap();
    }
    for args in [
        "address add 10.1.0.1/32 dev mesh0",
        "address add fd01::1/128 dev mesh0 nodad",
        "link set mesh0 mtu 1420 up",
        "route add 10.2.0.0/16 dev mesh0 src 10.1.0.1",
        "route add fd02::/16 dev mesh0",
    ] {
        ends.pair.a.ip(args);
    }
    let before = flows.sent;
    flows.wait(before);
    assert_eq!(ends.engines[0].snapshot().lanes.iter().map(|lane| lane.strayed_packets).sum::<u64>(), 0);
}
