//! Two engines over real UDP sockets and TUN devices, in namespaces of their own. Needs root.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, missing_docs, reason = "tests")]

mod lab;

use std::{
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    time::{Duration, Instant},
};

use lab::{Pair, secret, table, wait_until};
use mesh_dataplane::{
    Engine, EngineConfig, Event,
    tun::{Device, DeviceOptions, Mode, Wanted},
};

const PATIENCE: Duration = Duration::from_secs(10);

fn engines(pair: &Pair) -> (Engine, Engine) {
    let a = pair.a.lane(7100, &["10.1.0.1/32", "fd01::1/128"], &["10.2.0.0/16", "fd02::/16"]);
    let b = pair.b.lane(7100, &["10.2.0.1/32", "fd02::1/128"], &["10.1.0.0/16", "fd01::/16"]);
    let (of_a, of_b) = (["10.1.0.0/16", "fd01::/16"], ["10.2.0.0/16", "fd02::/16"]);
    let table_a = table(secret(1), &of_a, secret(2).to_public(), &of_b, Some("192.0.2.2:7100".parse().unwrap()));
    let table_b = table(secret(2), &of_b, secret(1).to_public(), &of_a, Some("192.0.2.1:7100".parse().unwrap()));
    let start = |table, lane| Engine::start(EngineConfig::default(), table, vec![lane]).unwrap();
    (start(table_a, a), start(table_b, b))
}

/// Makes each of the functions a test on every kind of device.
macro_rules! on_each_device {
    ($($name:ident),+ $(,)?) => {
        on_each_device!(fast Fast $($name)+);
        on_each_device!(plain Plain $($name)+);
    };
    ($kind:ident $wanted:ident $($name:ident)+) => {
        mod $kind {
            use super::*;

            $(#[test]
            fn $name() {
                super::$name(&Pair::of(Wanted::$wanted));
            })+
        }
    };
}

on_each_device!(
    ping_and_bulk_pass_in_both_families,
    a_deleted_device_is_replaced_and_traffic_returns,
    a_device_taken_down_and_up_again_goes_on,
    without_ipv6_the_socket_is_ipv4,
    unknown_destination_is_reported_to_the_sender,
    a_node_with_two_addresses_on_a_link_answers_from_the_one_that_was_asked,
);

/// Bytes of a stream that differ everywhere.
fn content(len: usize) -> Vec<u8> {
    (0..len as u32).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).take(len).collect()
}

fn ping_and_bulk_pass_in_both_families(pair: &Pair) {
    let (a, b) = engines(pair);
    for address in ["10.2.0.1", "fd02::1"] {
        pair.a.ping(address);
    }
    for address in ["10.2.0.1:900", "[fd02::1]:900"] {
        let listener = pair.b.enter(move || TcpListener::bind(address)).unwrap();
        let reader = pair.b.spawn(move || {
            let mut all = Vec::new();
            listener.accept().unwrap().0.read_to_end(&mut all).unwrap();
            all
        });
        let sent = content(20_000_000);
        let copy = sent.clone();
        let start = Instant::now();
        pair.a.enter(move || TcpStream::connect(address).unwrap().write_all(&copy).unwrap());
        assert!(reader.join().unwrap() == sent, "the bytes differ");
        println!("{address}: 20 MB in {:?}", start.elapsed());
    }
    let drops = a.snapshot().drops;
    println!("drops of a: {drops:?}, of b: {:?}", b.snapshot().drops);
    assert!(a.is_running() && b.is_running());
}

fn a_deleted_device_is_replaced_and_traffic_returns(pair: &Pair) {
    let (mut a, _b) = engines(pair);
    let events = a.take_events().unwrap();
    pair.a.ping("10.2.0.1");
    pair.a.ip("link del mesh0");
    wait_until("QueueLost", PATIENCE, || matches!(events.try_next(), Some(Event::QueueLost { .. })));
    let queue = pair.a.open_device(&["10.1.0.1/32", "fd01::1/128"], &["10.2.0.0/16"]);
    a.replace_queue(0, Box::new(queue)).unwrap();
    pair.a.ping("10.2.0.1");
}

fn a_device_taken_down_and_up_again_goes_on(pair: &Pair) {
    let (a, _b) = engines(pair);
    pair.a.ping("10.2.0.1");
    pair.a.ip("link set mesh0 down");
    pair.a.ip("link set mesh0 up");
    pair.a.ip("route replace 10.2.0.0/16 dev mesh0");
    pair.a.ping("10.2.0.1");
    assert!(a.snapshot().lanes[0].queue_attached);
}

#[test]
fn device_outlives_its_process_with_addresses_and_routes() {
    let pair = Pair::new();
    drop(pair.a.open_device(&["10.1.0.1/32"], &["10.2.0.0/16"]));
    let route = pair.a.exec("ip route show 10.2.0.0/16");
    assert!(String::from_utf8_lossy(&route.stdout).contains("mesh0"));
    for queues in [1, 4, 2] {
        let device = pair.a.enter(move || Device::open("mesh0", queues)).unwrap();
        assert_eq!((device.name(), device.mode()), ("mesh0", Mode::Fast));
        assert_eq!(device.into_queues().len(), queues);
    }
}

#[test]
fn a_device_of_the_other_kind_is_replaced_where_one_kind_is_wanted() {
    let pair = Pair::new();
    let open = |wanted| {
        let options = DeviceOptions { queues: 2, wanted, ..DeviceOptions::default() };
        // A child that another test has just started holds copies of all descriptors until it executes its program.
        let mut device = None;
        wait_until("the device", PATIENCE, || {
            device = pair.a.enter(move || Device::open_with("mesh0", &options)).ok();
            device.is_some()
        });
        let device = device.unwrap();
        (device.mode(), device.into_queues().len())
    };
    assert_eq!(open(Wanted::Plain), (Mode::Plain, 1));
    assert_eq!(open(Wanted::Any), (Mode::Plain, 1), "what is there stays");
    assert_eq!(open(Wanted::Fast), (Mode::Fast, 2));
    assert_eq!(open(Wanted::Plain), (Mode::Plain, 1));
    let busy = pair.a.enter(|| Device::open("mesh0", 1)).unwrap();
    let options = DeviceOptions { wanted: Wanted::Fast, ..DeviceOptions::default() };
    pair.a.enter(move || Device::open_with("mesh0", &options)).map(drop).unwrap_err();
    assert_eq!(busy.mode(), Mode::Plain, "one that is in use is not removed");
}

#[test]
fn plain_device_takes_the_place_where_the_fast_one_is_refused() {
    let pair = Pair::new();
    // A device without multi-queue in the way: the kernel refuses the fast kind with EINVAL.
    pair.a.ip("tuntap add dev mesh0 mode tun");
    let device = pair.a.enter(|| Device::open("mesh0", 4)).unwrap();
    assert_eq!(device.mode(), Mode::Plain);
    let queue = device.into_queues().remove(0);
    let mut lane = pair.b.lane(7100, &["10.2.0.1/32"], &["10.1.0.0/16"]);
    lane.queue = Box::new(pair.b.open_device(&[], &[]));
    for args in ["address add 10.1.0.1/32 dev mesh0", "link set mesh0 mtu 1420 up", "route add 10.2.0.0/16 dev mesh0"] {
        pair.a.ip(args);
    }
    let socket = pair.a.enter(|| mesh_dataplane::udp::system::SystemSocket::bind(&Default::default())).unwrap();
    let parts = mesh_dataplane::LaneParts { queue: Box::new(queue), socket: Box::new(socket) };
    let endpoint = Some("192.0.2.2:7100".parse().unwrap());
    let table_a = table(secret(1), &["10.1.0.0/16"], secret(2).to_public(), &["10.2.0.0/16"], endpoint);
    let table_b = table(secret(2), &["10.2.0.0/16"], secret(1).to_public(), &["10.1.0.0/16"], None);
    let _a = Engine::start(EngineConfig::default(), table_a, vec![parts]).unwrap();
    let _b = Engine::start(EngineConfig::default(), table_b, vec![lane]).unwrap();
    pair.a.ping("10.2.0.1");
}

fn without_ipv6_the_socket_is_ipv4(pair: &Pair) {
    pair.a.exec("sysctl -qw net.ipv6.conf.all.disable_ipv6=1 net.ipv6.conf.default.disable_ipv6=1");
    pair.a.exec("sysctl -qw net.ipv6.conf.lo.disable_ipv6=1");
    let (_a, _b) = engines_v4(pair);
    pair.a.ping("10.2.0.1");
}

fn engines_v4(pair: &Pair) -> (Engine, Engine) {
    let a = pair.a.lane(7100, &["10.1.0.1/32"], &["10.2.0.0/16"]);
    let b = pair.b.lane(7100, &["10.2.0.1/32"], &["10.1.0.0/16"]);
    let endpoint = |text: &str| Some(text.parse().unwrap());
    let table_a =
        table(secret(1), &["10.1.0.0/16"], secret(2).to_public(), &["10.2.0.0/16"], endpoint("192.0.2.2:7100"));
    let table_b =
        table(secret(2), &["10.2.0.0/16"], secret(1).to_public(), &["10.1.0.0/16"], endpoint("192.0.2.1:7100"));
    let start = |table, lane| Engine::start(EngineConfig::default(), table, vec![lane]).unwrap();
    (start(table_a, a), start(table_b, b))
}

fn unknown_destination_is_reported_to_the_sender(pair: &Pair) {
    let (_a, _b) = engines(pair);
    pair.a.ip("route add 10.99.0.0/16 dev mesh0");
    pair.a.ip("route add fd99::/16 dev mesh0");
    for address in ["10.99.0.1:9", "[fd99::1]:9"] {
        let start = Instant::now();
        let error = pair.a.enter(move || TcpStream::connect(address).unwrap_err());
        assert!(matches!(error.raw_os_error(), Some(libc::EHOSTUNREACH | libc::ENETUNREACH)), "{address}: {error}");
        assert!(start.elapsed() < Duration::from_secs(1), "at once, not by a time-out");
    }
}

fn a_node_with_two_addresses_on_a_link_answers_from_the_one_that_was_asked(pair: &Pair) {
    for args in ["192.0.2.22/24 dev u0", "fd77::2/64 dev u0 nodad", "fd77::22/64 dev u0 nodad"] {
        pair.b.ip(&format!("address add {args}"));
    }
    pair.a.ip("address add fd77::1/64 dev u0 nodad");
    for (asked, other) in [("192.0.2.22:7100", "192.0.2.2:7100"), ("[fd77::2]:7100", "[fd77::22]:7100")] {
        // Left to itself the system prefers the first IPv4 and the last IPv6 address.
        let (asked, other) = (asked.parse().unwrap(), other.parse().unwrap());
        let lanes = [
            pair.a.lane(7100, &["10.1.0.1/32"], &["10.2.0.0/16"]),
            pair.b.lane(7100, &["10.2.0.1/32"], &["10.1.0.0/16"]),
        ];
        let table_a = table(secret(1), &["10.1.0.0/16"], secret(2).to_public(), &["10.2.0.0/16"], Some(asked));
        let table_b = table(secret(2), &["10.2.0.0/16"], secret(1).to_public(), &["10.1.0.0/16"], None);
        let [lane_a, lane_b] = lanes;
        let a = Engine::start(EngineConfig::default(), table_a, vec![lane_a]).unwrap();
        let _b = Engine::start(EngineConfig::default(), table_b, vec![lane_b]).unwrap();
        let endpoint = || a.snapshot().peers.values().next().and_then(|peer| peer.endpoint);
        pair.a.ping("10.2.0.1");
        pair.b.ping("10.1.0.1");
        assert_eq!(endpoint(), Some(asked), "data came from there, or it would have moved");
        pair.b.ip(&format!("address del {}/{} dev u0", asked.ip(), if asked.is_ipv4() { 24 } else { 64 }));
        pair.b.ping("10.1.0.1");
        assert_eq!(endpoint(), Some(other), "gone: sent from the other one at once");
        for side in [&pair.a, &pair.b] {
            side.ip("link del mesh0");
        }
    }
}
