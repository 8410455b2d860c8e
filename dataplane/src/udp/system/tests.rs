#![allow(clippy::unwrap_used, clippy::disallowed_methods, reason = "tests")]

use std::time::{Duration, Instant};

use super::*;
use crate::udp::{Ends, Outer};

fn loopback(address: &str) -> SystemSocket {
    let address = Some(address.parse().unwrap());
    SystemSocket::bind(&SystemConfig { address, ..Default::default() }).unwrap()
}

/// The first `want` datagrams that come, or fewer after five seconds.
fn receive_outer(socket: &mut SystemSocket, want: usize) -> Vec<(Outer, Vec<u8>)> {
    let mut arrivals = Arrivals::new(64);
    let mut all = Vec::new();
    let deadline = Instant::now() + Duration::from_secs(5);
    while all.len() < want && Instant::now() < deadline {
        socket.receive(&mut arrivals, 16).unwrap();
        for n in 0..arrivals.len() {
            let (outer, datagrams) = arrivals.get(n).unwrap().unwrap();
            all.extend(datagrams.map(|bytes| (outer, bytes.to_vec())));
        }
    }
    all
}

fn receive(socket: &mut SystemSocket, want: usize) -> Vec<(Ends, Vec<u8>)> {
    receive_outer(socket, want).into_iter().map(|(outer, bytes)| (outer.ends, bytes)).collect()
}

#[test]
fn batches_pass_whole_and_in_order() {
    let (mut a, mut b) = (loopback("127.0.0.1"), loopback("127.0.0.1"));
    let to = b.local_addr().unwrap();
    let mut datagrams = Datagrams::new(300_000, 256);
    for n in 0..200u8 {
        let len = usize::from(n) + 1;
        datagrams.room().unwrap()[..len].fill(n);
        datagrams.push_tight(len, to.into());
    }
    datagrams.room().unwrap()[..65_000].fill(9);
    datagrams.push_tight(65_000, to.into());
    assert_eq!(a.send(&datagrams), 201);
    let got = receive(&mut b, 201);
    assert_eq!(got.len(), 201);
    for ((from, bytes), (_, sent)) in got.iter().zip(datagrams.iter()) {
        assert_eq!(*from, a.local_addr().unwrap().into(), "bound to one address, there is nothing to choose");
        assert_eq!(bytes, sent);
    }
}

#[test]
fn what_has_no_class_of_its_own_gets_the_sockets() {
    let address = |text: &str| Some(text.parse::<IpAddr>().unwrap());
    for (text, bound) in [("127.0.0.1", address("127.0.0.1")), ("127.0.0.1", None), ("::1", None)] {
        let mut from = SystemSocket::bind(&SystemConfig { address: bound, class: 40, ..Default::default() }).unwrap();
        let mut to = loopback(text);
        let ends = Ends::from(to.local_addr().unwrap());
        let mut datagrams = Datagrams::new(1_000, 4);
        for class in [0, 41] {
            datagrams.room().unwrap()[..2].fill(class);
            datagrams.push_tight(2, Outer { class, ..ends.into() });
        }
        assert_eq!(from.send(&datagrams), 2, "{text}");
        let classes: Vec<u8> = receive_outer(&mut to, 2).iter().map(|(outer, _)| outer.class).collect();
        assert_eq!(classes, [40, 41], "{text}");
    }
}

#[test]
fn one_socket_serves_both_families() {
    let mut both = SystemSocket::bind(&SystemConfig::default()).unwrap();
    let port = both.local_addr().unwrap().port();
    let mut v4 = loopback("127.0.0.1");
    let mut datagrams = Datagrams::new(1_000, 4);
    datagrams.room().unwrap()[0] = 5;
    datagrams.push(1, SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port).into());
    assert_eq!(v4.send(&datagrams), 1);
    let got = receive(&mut both, 1);
    let ends = Ends { remote: v4.local_addr().unwrap(), local: Some(Ipv4Addr::LOCALHOST.into()) };
    assert_eq!(got[0].0, ends, "not as mapped addresses");
    datagrams.clear();
    datagrams.push(1, got[0].0.into());
    assert_eq!(both.send(&datagrams), 1, "and back");
    assert_eq!(receive(&mut v4, 1).len(), 1);
}

#[test]
fn unreachable_destinations_do_not_stop_the_others() {
    let (mut a, mut b) = (loopback("127.0.0.1"), loopback("127.0.0.1"));
    let mut datagrams = Datagrams::new(1_000, 4);
    for to in ["[fd00::1]:9".parse().unwrap(), b.local_addr().unwrap()] {
        datagrams.room().unwrap()[0] = 1;
        datagrams.push(1, SocketAddr::into(to));
    }
    assert_eq!(a.send(&datagrams), 1);
    assert_eq!(receive(&mut b, 1).len(), 1);
}

#[test]
fn answers_leave_from_the_address_that_was_reached() {
    // All of 127.0.0.0/8 is ours; left to itself, the system answers from 127.0.0.1.
    let mut server = SystemSocket::bind(&SystemConfig::default()).unwrap();
    let port = server.local_addr().unwrap().port();
    let mut client = loopback("127.0.0.1");
    for host in [2, 3, 1] {
        let asked = SocketAddr::from(([127, 0, 0, host], port));
        let mut datagrams = Datagrams::new(1_000, 4);
        datagrams.push(1, asked.into());
        assert_eq!(client.send(&datagrams), 1);
        let ends = receive(&mut server, 1)[0].0;
        assert_eq!(ends.local, Some(asked.ip()));
        datagrams.clear();
        datagrams.push(1, ends.into());
        assert_eq!(server.send(&datagrams), 1);
        assert_eq!(receive(&mut client, 1)[0].0.remote, asked);
    }
}

#[test]
fn a_source_that_is_gone_is_done_without_until_it_is_heard_of_again() {
    let (mut server, mut client) = (SystemSocket::bind(&SystemConfig::default()).unwrap(), loopback("127.0.0.1"));
    let gone = Some("192.0.2.99".parse().unwrap());
    let mut datagrams = Datagrams::new(1_000, 16);
    for _ in 0..5 {
        datagrams.push(1, Ends { remote: client.local_addr().unwrap(), local: gone }.into());
    }
    assert_eq!(server.send(&datagrams), 5, "from another one");
    assert_eq!(receive(&mut client, 5).len(), 5);
    assert_eq!(server.refusals.sources().len(), 1);
    for host in 1..100 {
        datagrams.clear();
        let local = Some([198, 51, 100, host].into());
        datagrams.push(1, Ends { remote: client.local_addr().unwrap(), local }.into());
        assert_eq!(server.send(&datagrams), 1);
    }
    assert!(server.refusals.sources().len() <= send::MAX_SOURCES);
    server
        .refusals
        .refuse_source(Ends { remote: client.local_addr().unwrap(), local: Some(Ipv4Addr::LOCALHOST.into()) });
    let port = server.local_addr().unwrap().port();
    datagrams.clear();
    datagrams.push(1, SocketAddr::from(([127, 0, 0, 1], port)).into());
    client.send(&datagrams);
    assert_eq!(receive(&mut server, 1).len(), 1);
    assert!(!server.refusals.sources().contains(&Ipv4Addr::LOCALHOST.into()));
}

/// Two sockets for all addresses, and where the second is reached.
fn two(v6: bool) -> (SystemSocket, SystemSocket, SocketAddr) {
    let bind = || SystemSocket::bind(&SystemConfig::default()).unwrap();
    let (a, b) = (bind(), bind());
    let host: IpAddr = if v6 { Ipv6Addr::LOCALHOST.into() } else { Ipv4Addr::LOCALHOST.into() };
    let to = SocketAddr::new(host, b.local_addr().unwrap().port());
    (a, b, to)
}

#[test]
fn trains_arrive_as_the_datagrams_they_were() {
    for v6 in [false, true] {
        let (mut a, mut b, to) = two(v6);
        let mut datagrams = Datagrams::new(300_000, 256);
        for n in 0..150usize {
            // Runs of equal length, shorter ends among them, and one longer than the train before it.
            let len = [1_452, 1_452, 1_452, 700, 64][n / 30];
            datagrams.room().unwrap()[..len].fill(n as u8);
            datagrams.push_tight(len, to.into());
        }
        assert_eq!(a.send(&datagrams), 150);
        let got = receive(&mut b, 150);
        assert!(got.iter().map(|(_, bytes)| &bytes[..]).eq(datagrams.iter().map(|(_, bytes)| bytes)));
        assert!(a.refusals.destinations().is_empty(), "loopback takes trains");
    }
}

#[test]
fn a_train_that_is_refused_goes_singly_and_is_tried_again_later() {
    let (mut a, mut b, to) = two(false);
    a.refusals.refuse_trains(to.ip(), &io::ErrorKind::Other.into());
    let mut datagrams = Datagrams::new(300_000, 64);
    for n in 0..64 {
        datagrams.room().unwrap()[..100].fill(n);
        datagrams.push_tight(100, to.into());
    }
    assert_eq!(a.send(&datagrams), 64);
    assert_eq!(receive(&mut b, 64).len(), 64);
    assert!(!a.refusals.destinations().is_empty());
    for _ in 0..send::RETRY_TRAINS / 64 {
        a.send(&datagrams);
    }
    assert!(a.refusals.destinations().is_empty());
}

#[test]
fn each_destination_is_charged_for_its_own_datagrams() {
    let (mut a, mut b, to) = two(false);
    let (mut c, other) = (loopback("127.0.0.2"), "127.0.0.3".parse().unwrap());
    a.refusals.refuse_trains(to.ip(), &io::ErrorKind::Other.into());
    a.refusals.refuse_trains(other, &io::ErrorKind::Other.into());
    let mut datagrams = Datagrams::new(10_000, 16);
    // The first of the call is for somebody else, and so is most of it.
    for remote in [c.local_addr().unwrap(), c.local_addr().unwrap(), to] {
        datagrams.push_tight(100, remote.into());
    }
    assert_eq!(a.send(&datagrams), 3);
    assert_eq!(receive(&mut b, 1).len() + receive(&mut c, 2).len(), 3);
    assert_eq!(a.refusals.destinations(), [(to.ip(), send::RETRY_TRAINS - 1), (other, send::RETRY_TRAINS)]);
}

#[test]
fn datagrams_without_payload_arrive_each_for_itself() {
    for v6 in [false, true] {
        let (mut a, mut b, to) = two(v6);
        let lens = [0, 0, 300, 300, 0, 300, 0];
        let mut datagrams = Datagrams::new(10_000, 16);
        for len in lens {
            datagrams.push_tight(len, to.into());
        }
        assert_eq!(a.send(&datagrams), lens.len());
        let got = receive(&mut b, lens.len());
        assert_eq!(got.iter().map(|(_, bytes)| bytes.len()).collect::<Vec<_>>(), lens);
    }
}

#[test]
fn the_traffic_class_passes_and_parts_trains() {
    for v6 in [false, true] {
        let (mut a, mut b, to) = two(v6);
        let mut datagrams = Datagrams::new(10_000, 16);
        let classes = [0, 0, 2, 2, 3, 0xb8, 0xb9];
        for class in classes {
            datagrams.room().unwrap()[..200].fill(class);
            datagrams.push_tight(200, Outer { class, ..to.into() });
        }
        assert_eq!(a.send(&datagrams), classes.len());
        let mut arrivals = Arrivals::new(16);
        let mut got = Vec::new();
        let deadline = Instant::now() + Duration::from_secs(5);
        while got.len() < classes.len() && Instant::now() < deadline {
            b.receive(&mut arrivals, 16).unwrap();
            for n in 0..arrivals.len() {
                let (from, datagrams) = arrivals.get(n).unwrap().unwrap();
                got.extend(datagrams.map(|bytes| (from.class, bytes[0])));
            }
        }
        assert_eq!(got, classes.map(|class| (class, class)));
    }
}

/// Sends `count` datagrams of one byte each, one by one, and has the other end receive them: how many came the direct way.
fn pass(from: &mut SystemSocket, to: &mut SystemSocket, ends: Ends, count: u8) -> usize {
    let mut arrivals = Arrivals::new(4);
    let (mut got, mut direct) = (Vec::new(), 0);
    for n in 0..count {
        let mut datagrams = Datagrams::new(1_000, 4);
        datagrams.room().unwrap()[0] = n;
        datagrams.push(1, ends.into());
        assert_eq!(from.send(&datagrams), 1);
        let deadline = Instant::now() + Duration::from_secs(5);
        while got.len() <= n.into() && Instant::now() < deadline {
            to.receive(&mut arrivals, 1).unwrap();
            if arrivals.is_empty() {
                direct += to.receive_direct(&mut arrivals, 1).unwrap();
            }
            for slot in 0..arrivals.len() {
                let (outer, datagrams) = arrivals.get(slot).unwrap().unwrap();
                let port = from.local_addr().unwrap().port();
                let expected =
                    Ends { remote: SocketAddr::new(ends.local.unwrap(), port), local: Some(ends.remote.ip()) };
                assert_eq!(outer.ends, expected, "the same to the lane, whichever way it came");
                got.extend(datagrams.map(<[u8]>::to_vec));
            }
        }
    }
    assert_eq!(got, (0..count).map(|n| vec![n]).collect::<Vec<_>>());
    direct
}

/// A time `seconds` after an arbitrary one.
fn at(seconds: u64) -> crate::clock::Instant {
    crate::clock::Instant::from_start(Duration::from_secs(1_000 + seconds))
}

fn all() -> SystemSocket {
    SystemSocket::bind(&SystemConfig::default()).unwrap()
}

/// The way to `to` on the loopback address of this family.
fn ends(to: &SystemSocket, address: &str) -> Ends {
    let address: IpAddr = address.parse().unwrap();
    Ends { remote: SocketAddr::new(address, to.local_addr().unwrap().port()), local: Some(address) }
}

#[test]
fn the_busiest_end_gets_a_way_of_its_own_and_nobody_elses_datagrams_are_touched() {
    for address in ["127.0.0.1", "::1"] {
        let (mut a, mut b, mut other) = (all(), all(), all());
        let (to_a, to_b, to_other) = (ends(&a, address), ends(&b, address), ends(&other, address));
        assert!(!a.settle(at(0)) && a.direct().is_none());
        assert_eq!(pass(&mut a, &mut b, to_b, 100), 0);
        assert_eq!(pass(&mut a, &mut other, to_other, 30), 0);
        assert!(a.settle(at(1)), "{address}");
        assert!(a.direct().is_some());
        assert_eq!(pass(&mut b, &mut a, to_a, 100), 100, "{address}: what comes from there comes this way");
        assert_eq!(pass(&mut other, &mut a, to_a, 100), 0, "{address}: others come the other way");
        assert_eq!(pass(&mut a, &mut b, to_b, 100), 0, "{address}: nothing changes for the other end");
        assert!(b.settle(at(1)) && other.settle(at(1)));
        assert_eq!(pass(&mut a, &mut b, to_b, 100), 100, "{address}");
        assert_eq!(pass(&mut a, &mut other, to_other, 100), 100, "{address}");
    }
}

#[test]
fn a_direct_way_stays_while_it_is_used_and_is_closed_when_it_is_quiet() {
    let (mut a, mut b) = (all(), all());
    let (to_a, to_b) = (ends(&a, "127.0.0.1"), ends(&b, "127.0.0.1"));
    pass(&mut a, &mut b, to_b, 20);
    assert!(a.settle(at(1)));
    assert!(!a.settle(at(10)), "not quiet for long enough");
    pass(&mut a, &mut b, to_b, 1);
    assert!(!a.settle(at(11)), "something went");
    pass(&mut b, &mut a, to_a, 1);
    assert!(!a.settle(at(21)), "something came");
    let mut datagrams = Datagrams::new(1_000, 4);
    datagrams.push(1, to_a.into());
    assert_eq!(b.send(&datagrams), 1);
    assert!(!a.settle(at(31)), "something waits");
    assert_eq!(a.receive_direct(&mut Arrivals::new(1), 1).unwrap(), 1);
    assert!(!a.settle(at(41)), "it was received");
    assert!(!a.settle(at(50)), "not quiet for long enough");
    assert!(a.settle(at(51)) && a.direct().is_none());
    pass(&mut a, &mut b, to_b, 15);
    assert!(!a.settle(at(52)), "too little to be worth it");
    pass(&mut b, &mut a, to_a, 20);
    assert!(a.direct().is_none(), "only what is sent counts: anybody may send here");
}

#[test]
fn trains_classes_and_probes_go_the_way_they_can() {
    let (mut a, mut b) = (all(), all());
    let to_b = ends(&b, "127.0.0.1");
    pass(&mut a, &mut b, to_b, 20);
    assert!(a.settle(at(1)));
    let mut datagrams = Datagrams::new(300_000, 256);
    for n in 0..120u8 {
        datagrams.room().unwrap()[..500].fill(n);
        let outer = Outer { class: 2 * (n / 40), dont_fragment: n % 40 == 39, ..to_b.into() };
        datagrams.push_tight(500, outer);
    }
    assert_eq!(a.send(&datagrams), 120);
    let got: Vec<_> = receive_outer(&mut b, 120).into_iter().map(|(outer, bytes)| (outer.class, bytes)).collect();
    assert_eq!(got, (0..120u8).map(|n| (2 * (n / 40), vec![n; 500])).collect::<Vec<_>>());
}

#[test]
fn an_end_that_goes_away_and_comes_back_costs_no_datagram_that_it_could_take() {
    let (mut a, mut b) = (all(), all());
    let to_b = ends(&b, "127.0.0.1");
    pass(&mut a, &mut b, to_b, 20);
    assert!(a.settle(at(1)));
    let port = b.local_addr().unwrap().port();
    drop(b);
    let mut datagrams = Datagrams::new(1_000, 4);
    datagrams.push(1, to_b.into());
    for _ in 0..50 {
        // The system reports what earlier ones met; this one is taken by the other way then.
        assert_eq!(a.send(&datagrams), 1);
    }
    assert!(a.receive_direct(&mut Arrivals::new(1), 1).is_err(), "refused");
    let mut b = SystemSocket::bind(&SystemConfig { port, ..Default::default() }).unwrap();
    pass(&mut a, &mut b, to_b, 20);
}
