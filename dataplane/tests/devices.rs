//! Packets of every shape through two engines: on devices with offloads, without, on plain ones, on one of each, and on queues
//! in memory. What comes out is what went in. Needs root.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, missing_docs, reason = "tests")]

mod lab;
#[path = "lab/shapes.rs"]
mod shapes;

use std::{sync::Arc, time::Duration, time::Instant};

use lab::{Namespace, Pair, secret, table};
use mesh_dataplane::{
    Engine, EngineConfig, LaneParts, Table,
    packet::{
        offload::{Offload, Offloads},
        segment::Segments,
    },
    tun::{Device, DeviceOptions, Packets, Queue, Supers, TunQueue, Wanted, memory::MemoryQueue},
    udp::memory::MemoryNetwork,
};
use shapes::{after_hops, datagrams, shapes, without_numbers};

const PATIENCE: Duration = Duration::from_secs(10);

/// What comes before and behind the two engines.
trait Way {
    /// Sends packets at once, as far as it can.
    fn send(&mut self, packets: &[Vec<u8>]);
    /// What has come out.
    fn receive(&mut self) -> Vec<Vec<u8>>;
    /// Routers on the way.
    fn hops(&self) -> u8;
}

/// A TUN device of each namespace, between which and `mesh0` the kernel forwards.
struct Routed {
    near: TunQueue,
    far: TunQueue,
    /// Super-packets that came out.
    supers: usize,
    _pair: Pair,
    _engines: [Engine; 2],
}

impl Routed {
    fn new([a, b]: [DeviceOptions; 2]) -> Self {
        let mut pair = Pair::new();
        (pair.a.options, pair.b.options) = (a, b);
        let edges = [(&pair.a, ["10.1.0.0/16", "fd01::/16"]), (&pair.b, ["10.2.0.0/16", "fd02::/16"])];
        let [near, far] = edges.map(|(side, routes)| edge(side, routes));
        let lanes = [
            pair.a.lane(7100, &["10.1.255.1/32", "fd01::ffff/128"], &["10.2.0.0/16", "fd02::/16"]),
            pair.b.lane(7100, &["10.2.255.1/32", "fd02::ffff/128"], &["10.1.0.0/16", "fd01::/16"]),
        ];
        let engines = start(lanes, ["192.0.2.1:7100", "192.0.2.2:7100"]);
        Self { near, far, supers: 0, _pair: pair, _engines: engines }
    }
}

/// The device by which packets come into a namespace and leave it.
fn edge(side: &Namespace, routes: [&str; 2]) -> TunQueue {
    let options = DeviceOptions { wanted: Wanted::Fast, ..DeviceOptions::default() };
    let queue = side.enter(move || Device::open_with("edge0", &options)).unwrap().into_queues().remove(0);
    side.exec("sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1 net.ipv4.conf.all.rp_filter=0");
    side.ip("link set edge0 mtu 1500 up");
    for route in routes {
        side.ip(&format!("route add {route} dev edge0"));
    }
    queue
}

fn start(lanes: [LaneParts; 2], ends: [&str; 2]) -> [Engine; 2] {
    let nets = [["10.1.0.0/16", "fd01::/16"], ["10.2.0.0/16", "fd02::/16"]];
    let one = |own: usize| -> Arc<Table> {
        let other = 1 - own;
        let (secret_own, theirs) = (secret(own as u8 + 1), secret(other as u8 + 1).to_public());
        table(secret_own, &nets[own], theirs, &nets[other], Some(ends[other].parse().unwrap()))
    };
    let mut own = 0..2;
    lanes.map(|lane| Engine::start(EngineConfig::default(), one(own.next().unwrap()), vec![lane]).unwrap())
}

impl Way for Routed {
    fn send(&mut self, packets: &[Vec<u8>]) {
        let mut batch = Packets::new(192 << 10, packets.len());
        for packet in packets {
            batch.room().unwrap()[..packet.len()].copy_from_slice(packet);
            batch.push(packet.len(), ());
        }
        assert_eq!(self.near.write(&mut batch).unwrap(), packets.len());
    }

    fn receive(&mut self) -> Vec<Vec<u8>> {
        let mut supers = Supers::new(192 << 10, 64);
        let mut all = Vec::new();
        self.far.read(&mut supers, 64).unwrap();
        for n in 0..supers.len() {
            let (offload, buffer, len) = supers.get_padded_mut(n).unwrap();
            match offload {
                Offload::None => all.push(buffer[..len].to_vec()),
                Offload::Unknown => panic!("a packet that nobody asked for"),
                Offload::Cut(cut) => {
                    self.supers += 1;
                    let mut segments = Segments::new(buffer, len, cut).unwrap();
                    while let Some((packet, len)) = segments.next() {
                        all.push(packet[..len].to_vec());
                    }
                }
            }
        }
        all
    }

    fn hops(&self) -> u8 {
        2
    }
}

/// Queues and a network in memory.
struct Memory {
    near: MemoryQueue,
    far: MemoryQueue,
    _engines: [Engine; 2],
}

impl Memory {
    fn new() -> Self {
        let network = MemoryNetwork::default();
        let ends = ["192.0.2.1:7100", "192.0.2.2:7100"];
        let mut outside = Vec::new();
        let lanes = ends.map(|end| {
            let (kernel, queue) = MemoryQueue::pair().unwrap();
            outside.push(kernel);
            LaneParts { queue: Box::new(queue), socket: Box::new(network.bind(end.parse().unwrap()).unwrap()) }
        });
        let engines = start(lanes, ends);
        let far = outside.pop().unwrap();
        Self { near: outside.pop().unwrap(), far, _engines: engines }
    }
}

impl Way for Memory {
    fn send(&mut self, packets: &[Vec<u8>]) {
        for packet in packets {
            assert!(self.near.push(packet).unwrap());
        }
    }

    fn receive(&mut self) -> Vec<Vec<u8>> {
        std::iter::from_fn(|| self.far.pop().unwrap()).collect()
    }

    fn hops(&self) -> u8 {
        0
    }
}

/// Sends `packets` and returns as many of ours as come within the time.
fn through(way: &mut dyn Way, packets: &[Vec<u8>]) -> Vec<Vec<u8>> {
    way.send(packets);
    let deadline = Instant::now() + PATIENCE;
    let mut got = Vec::new();
    while got.len() < packets.len() && Instant::now() < deadline {
        got.extend(way.receive().into_iter().filter(|packet| shapes::is_ours(packet)));
        std::thread::yield_now();
    }
    got
}

fn every_shape_arrives(way: &mut dyn Way) {
    // The first waits for the handshake.
    let all = shapes();
    assert_eq!(through(way, &all[0].packets[..1]).len(), 1, "the first packet");
    for shape in &all {
        let got: Vec<_> = through(way, &shape.packets).iter().map(|packet| without_numbers(packet)).collect();
        let hops = way.hops();
        let expected: Vec<_> = shape.packets.iter().map(|packet| without_numbers(&after_hops(packet, hops))).collect();
        let (got, expected) = (datagrams(&got), datagrams(&expected));
        assert_eq!(got.len(), expected.len(), "{}", shape.name);
        for (n, (got, expected)) in got.iter().zip(&expected).enumerate() {
            assert!(got == expected, "{}, packet {n}:\n{got:02x?}\nin place of\n{expected:02x?}", shape.name);
        }
    }
}

fn fast(offloads: Offloads) -> DeviceOptions {
    DeviceOptions { wanted: Wanted::Fast, offloads, ..DeviceOptions::default() }
}

fn plain() -> DeviceOptions {
    DeviceOptions { wanted: Wanted::Plain, ..DeviceOptions::default() }
}

#[test]
fn every_shape_arrives_with_offloads() {
    let mut way = Routed::new([fast(Offloads::ALL); 2]);
    every_shape_arrives(&mut way);
    assert!(way.supers > 20, "what goes in joined comes out joined");
}

#[test]
fn every_shape_arrives_without_offloads() {
    every_shape_arrives(&mut Routed::new([fast(Offloads::NONE); 2]));
}

#[test]
fn every_shape_arrives_with_some_offloads() {
    let one = Offloads { tso6: false, udp_coalesce: false, ..Offloads::ALL };
    let other = Offloads { tso4: false, uso: false, tcp_coalesce: false, ..Offloads::ALL };
    every_shape_arrives(&mut Routed::new([fast(one), fast(other)]));
    every_shape_arrives(&mut Routed::new([fast(other), fast(one)]));
}

#[test]
fn every_shape_arrives_on_plain_devices() {
    let mut way = Routed::new([plain(); 2]);
    every_shape_arrives(&mut way);
    assert_eq!(way.supers, 0);
}

#[test]
fn every_shape_arrives_between_a_fast_and_a_plain_device() {
    every_shape_arrives(&mut Routed::new([fast(Offloads::ALL), plain()]));
    every_shape_arrives(&mut Routed::new([plain(), fast(Offloads::ALL)]));
}

#[test]
fn every_shape_arrives_in_memory() {
    every_shape_arrives(&mut Memory::new());
}

/// Long and short fragments in turn, of datagrams that each device on the way has to cut.
fn fragments() -> Vec<Vec<u8>> {
    let shape = shapes().into_iter().find(|shape| shape.name == "UDP, fragments, IPv4").unwrap();
    let numbered = |id: u16| {
        shape.packets.clone().into_iter().map(move |mut packet| {
            packet[4..6].copy_from_slice(&id.to_be_bytes());
            after_hops(&packet, 0)
        })
    };
    (0..16).flat_map(numbered).collect()
}

/// Whether it is seen before long: it needs fragments to come in one batch.
fn is_seen(way: &mut dyn Way, seen: impl Fn(&[Vec<u8>]) -> bool) -> bool {
    let first = &shapes()[0].packets[..1];
    assert_eq!(through(way, first).len(), 1, "the first packet");
    (0..20).any(|_| seen(&through(way, &fragments())))
}

#[test]
fn fragments_that_come_together_are_one_datagram_for_the_kernel() {
    // It cuts the whole to its own 1,500; what is in fragments of 1,420 it leaves alone.
    let cut_anew = |got: &[Vec<u8>]| got.iter().any(|packet| packet.len() == 1_500);
    assert!(is_seen(&mut Routed::new([fast(Offloads::ALL); 2]), cut_anew));
    let apart = fast(Offloads { udp_coalesce: false, ..Offloads::ALL });
    assert!(!is_seen(&mut Routed::new([fast(Offloads::ALL), apart]), cut_anew), "switched off");
}

#[test]
fn fragments_are_sent_by_length() {
    let two_long = |got: &[Vec<u8>]| got.windows(2).any(|pair| pair.iter().all(|packet| packet.len() > 1_000));
    assert!(!two_long(&fragments()), "they go in as long and short in turn");
    assert!(is_seen(&mut Memory::new(), two_long));
}
