//! ADD and DEL as a runtime calls them, with packets through what they made.

#![allow(clippy::unwrap_used, missing_docs, unreachable_pub, reason = "tests")]

mod support;

use std::collections::BTreeSet;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use mesh_hostnet::Handle;
use mesh_hostnet::netns::Netns;
use mesh_hostnet::sysctl::{self, Key};
use mesh_protocol::local::LocalErrorCode;
use support::{Host, MTU, Mood, Pod, ips};

const PATIENCE: Duration = Duration::from_secs(10);

/// A datagram from one namespace to the other and back, as large as the link's MTU allows.
#[track_caller]
fn echo(from: &Netns, to: &Netns, address: IpAddr) {
    let server = to.run(|| UdpSocket::bind(SocketAddr::new(address, 0)).unwrap()).unwrap();
    let any: SocketAddr = if address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }.parse().unwrap();
    let client = from.run(|| UdpSocket::bind(any).unwrap()).unwrap();
    for socket in [&server, &client] {
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
    }
    let headers = if address.is_ipv4() { 28 } else { 48 };
    let payload = vec![7; usize::from(MTU) - headers];
    client.send_to(&payload, server.local_addr().unwrap()).unwrap();
    let mut buffer = vec![0; 2000];
    let (len, peer) = server.recv_from(&mut buffer).unwrap();
    assert_eq!(len, payload.len());
    server.send_to(&buffer[..len], peer).unwrap();
    assert_eq!(client.recv(&mut buffer).unwrap(), payload.len());
}

fn transfer(from: &Netns, to: &Netns, address: IpAddr) {
    let listener = to.run(|| TcpListener::bind(SocketAddr::new(address, 0)).unwrap()).unwrap();
    let target = listener.local_addr().unwrap();
    let mut client = from.run(|| TcpStream::connect_timeout(&target, PATIENCE).unwrap()).unwrap();
    let (mut server, _) = listener.accept().unwrap();
    let sender = std::thread::spawn(move || client.write_all(&vec![1; 1 << 20]).unwrap());
    let mut received = Vec::new();
    server.set_read_timeout(Some(PATIENCE)).unwrap();
    server.read_to_end(&mut received).unwrap();
    sender.join().unwrap();
    assert_eq!(received.len(), 1 << 20);
}

#[test]
fn two_pods_of_a_host_reach_each_other_and_their_host() {
    let (host, a, b) = (Host::new(), Pod::new("a"), Pod::new("b"));
    let (to_a, to_b) = (ips(&host.add(&a)), ips(&host.add(&b)));
    assert_eq!(to_a.len(), 2);
    for (address_a, address_b) in to_a.iter().zip(&to_b) {
        // The first packet counts: nothing is resolved, nothing tentative.
        echo(&a.netns, &b.netns, *address_b);
        echo(&b.netns, &a.netns, *address_a);
        transfer(&a.netns, &b.netns, *address_b);
    }
    for address in to_a {
        echo(&host.netns, &a.netns, address);
    }

    host.del(&a);
    assert!(!a.has_eth0() && b.has_eth0());
    echo(&b.netns, &b.netns, to_b[0]);
    host.del(&b);
    host.assert_clean();
}

#[test]
fn a_namespace_with_ipv6_switched_off_gets_it_back_on_its_interface() {
    let (host, a, b) = (Host::new(), Pod::new("a"), Pod::new("b"));
    a.netns.run(|| sysctl::write(&Key::ipv6_link("default", "disable_ipv6").unwrap(), "1").unwrap()).unwrap();
    host.add(&a);
    let to_b = ips(&host.add(&b));
    echo(&a.netns, &b.netns, to_b[1]);
}

#[test]
fn interface_has_the_mtu_of_the_lease_or_the_lower_one_of_the_configuration() {
    let (host, a, b) = (Host::new(), Pod::new("a"), Pod::new("b"));
    for (pod, bound, expected) in [(&a, 9000, u32::from(MTU)), (&b, 1300, 1300)] {
        let mut config = host.config("1.1.0");
        config["mtu"] = bound.into();
        assert_eq!(host.run_for("ADD", pod, &config).ok()["interfaces"][1]["mtu"], expected);
        let link = Handle::open_in(&pod.netns).unwrap().link_by_name("eth0").unwrap().unwrap();
        assert_eq!((link.mtu, link.up), (expected, true));
    }
}

#[test]
fn second_add_is_refused_and_leaves_the_first_alone() {
    let (host, a, b) = (Host::new(), Pod::new("a"), Pod::new("b"));
    let (_, to_b) = (host.add(&a), ips(&host.add(&b)));
    host.run_for("ADD", &a, &host.config("1.0.0")).fails(4, "CNI_IFNAME");
    // The same container in another namespace, which the runtime did not DEL.
    let elsewhere = Pod::new("a");
    host.run_for("ADD", &elsewhere, &host.config("1.0.0")).fails(4, "DEL it first");
    assert_eq!((host.leases().len(), host.links().len(), host.route_count()), (2, 2, 4));
    for address in to_b {
        echo(&a.netns, &b.netns, address);
    }
}

#[test]
fn fifty_adds_at_once_get_fifty_addresses() {
    let host = Host::new();
    let pods: Vec<Pod> = (0..50).map(|number| Pod::new(&format!("pod{number}"))).collect();
    let start = Instant::now();
    let results: Vec<_> = std::thread::scope(|scope| {
        let runs: Vec<_> = pods.iter().map(|pod| scope.spawn(|| host.add(pod))).collect();
        runs.into_iter().map(|run| run.join().unwrap()).collect()
    });
    println!("50 ADDs at once: {:?}", start.elapsed());
    let distinct: BTreeSet<IpAddr> = results.iter().flat_map(ips).collect();
    assert_eq!(distinct.len(), 100);
    echo(&pods[0].netns, &pods[49].netns, ips(&results[49])[0]);
    std::thread::scope(|scope| pods.iter().for_each(|pod| drop(scope.spawn(|| host.del(pod)))));
    host.assert_clean();
}

#[test]
fn failure_undoes_what_was_done_before_it() {
    let (host, pod) = (Host::new(), Pod::new("a"));
    let config = host.config("1.1.0");

    // Before anything: no lease.
    host.set_mood(Mood::Refuses(LocalErrorCode::PoolExhausted));
    host.run_for("ADD", &pod, &config).fails(11, "pool exhausted");
    host.set_mood(Mood::Refuses(LocalErrorCode::NotReady));
    host.run_for("ADD", &pod, &config).fails(11, "meshd refused");
    host.set_mood(Mood::Refuses(LocalErrorCode::Internal));
    host.run_for("ADD", &pod, &config).fails(101, "meshd refused");
    host.set_mood(Mood::HangsUp);
    host.run_for("ADD", &pod, &config).fails(11, "closed the connection");
    host.set_mood(Mood::Says("{}\n"));
    host.run_for("ADD", &pod, &config).fails(101, "does not understand");

    // At the veth: the interface appears in the pod after the look at it.
    host.set_mood(Mood::StopsAt("attach"));
    let child = host.spawn_for("ADD", &pod, &config);
    let stopped = host.wait_for_stop();
    let mut inside = Handle::open_in(&pod.netns).unwrap();
    let bridge = inside.add_bridge("eth0").unwrap();
    drop(stopped);
    support::Ran::of(child).fails(4, "already");
    inside.delete_link(bridge).unwrap();
    host.set_mood(Mood::Well);
    host.del(&pod);

    // At the end: the link is taken away from under it.
    host.set_mood(Mood::StopsAt("check"));
    let child = host.spawn_for("ADD", &pod, &config);
    let stopped = host.wait_for_stop();
    host.set_mood(Mood::Well);
    host.del(&pod);
    host.set_mood(Mood::Refuses(LocalErrorCode::UnknownPod));
    drop(stopped);
    assert!(support::Ran::of(child).code <= 1);
    assert!(!pod.has_eth0());
    host.assert_clean();
    host.set_mood(Mood::Well);
    host.add(&pod);
}

#[test]
fn add_beside_del_of_one_pod_ends_whole_or_not_at_all() {
    let (host, pod) = (Host::new(), Pod::new("a"));
    for _ in 0..25 {
        let add = host.spawn_for("ADD", &pod, &host.config("1.1.0"));
        let del = host.spawn_for("DEL", &pod, &host.config("1.1.0"));
        support::Ran::of(add);
        assert_eq!(support::Ran::of(del).code, 0);
        let (links, routes, leases) = (host.links().len(), host.route_count(), host.leases().len());
        assert!(matches!((links, routes, leases), (0, 0, 0) | (1, 2, 1)), "{links} {routes} {leases}");
        host.del(&pod);
        host.assert_clean();
    }
}

#[test]
fn host_end_carries_the_group_and_does_not_listen_to_the_pod() {
    let (host, pod) = (Host::new(), Pod::new("a"));
    host.add(&pod);
    let name = pod.attachment().host_link();
    let link = Handle::open_in(&host.netns).unwrap().link_by_name(&name).unwrap().unwrap();
    assert_eq!((link.group, link.up), (mesh_protocol::local::POD_LINK_GROUP, true));
    let read = |key: mesh_hostnet::Result<Key>| host.netns.run(|| sysctl::read(&key.unwrap()).unwrap()).unwrap();
    assert_eq!(read(Key::ipv4_link(&name, "proxy_arp")), "0");
    assert_eq!(read(Key::ipv6_link(&name, "accept_ra")), "0");
    let own = Handle::open_in(&host.netns).unwrap().addresses().unwrap();
    assert!(own.iter().all(|address| address.link != link.index), "{own:?}");
}
