//! Against the kernel, each test in a namespace of its own. They need root and say so.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use mesh_dataplane::tun::linux::TunQueue;
use mesh_hostnet::Handle;
use mesh_hostnet::address::Address;
use mesh_hostnet::link::{LinkChange, VethEnd};
use mesh_hostnet::netns::Netns;
use mesh_hostnet::nft::{Chain, ChainKind, Family, HookPoint, Rule as NftRule, Table};
use mesh_hostnet::route::{Route, RouteFilter};
use mesh_hostnet::rule::{IpFamily, Rule};
use mesh_hostnet::sysctl::{self, Key};
use tokio::sync::mpsc;

use super::look::{Underlay, look};
use super::thread::Host;
use super::*;
use crate::config::Config;
use crate::desired::tests::facts;
use crate::desired::{bare, host_state};
use crate::reconcile::diff::{closing, diff};
use crate::state_dir::StateDir;

/// Runs `body` in a namespace with an uplink `up0`, 192.0.2.1/24, and a default route.
fn in_namespace(body: impl FnOnce(&mut Handle, &Path) + Send) {
    assert!(nix::unistd::geteuid().is_root(), "this test changes a network namespace of its own: run it as root");
    let temp = tempfile::tempdir().unwrap();
    let netns = Netns::create().unwrap();
    netns
        .run(|| {
            let mut handle = Handle::open().unwrap();
            let up = handle.add_veth(&VethEnd::new("up0"), &VethEnd::new("up1"), None).unwrap();
            let far = handle.link_by_name("up1").unwrap().unwrap().index;
            for index in [1, up, far] {
                handle.change_link(index, &LinkChange::new().up()).unwrap();
            }
            handle
                .replace_address(&Address { no_prefix_route: false, ..Address::plain(up, net("192.0.2.1/24")) })
                .unwrap();
            handle.replace_route(&Route::via(net("0.0.0.0/0"), "192.0.2.254".parse().unwrap())).unwrap();
            body(&mut handle, temp.path());
        })
        .unwrap();
}

fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}

fn eventually(what: &str, mut check: impl FnMut() -> bool) -> Duration {
    let start = Instant::now();
    while !check() {
        assert!(start.elapsed() < Duration::from_secs(10), "not within ten seconds: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
    start.elapsed()
}

/// Everything of the namespace that is not ours, and ours.
#[derive(Debug, PartialEq)]
struct World {
    links: Vec<String>,
    routes: Vec<Route>,
    rules: Vec<Rule>,
    foreign_filter: bool,
    our_filter: bool,
    valid_mark: String,
    forwards_all_ipv6: String,
}

fn world(handle: &mut Handle) -> World {
    World {
        links: handle.links().unwrap().into_iter().map(|link| link.name).collect(),
        // Protocol 2 is the kernel: it makes link-local routes whenever a link finds its carrier.
        routes: handle
            .routes(RouteFilter::default())
            .unwrap()
            .into_iter()
            .filter(|route| route.protocol != 2)
            .collect(),
        rules: handle.rules().unwrap(),
        foreign_filter: handle.has_table(&foreign_table()).unwrap(),
        our_filter: handle.table_state(Family::Inet, "mesh").unwrap().is_some(),
        valid_mark: sysctl::read(&Key::ipv4_link("all", "src_valid_mark").unwrap()).unwrap(),
        forwards_all_ipv6: sysctl::read(&Key::ipv6_forwarding()).unwrap(),
    }
}

fn foreign_table() -> Table {
    let mut table = Table::new(Family::Inet, "other");
    let chain = Chain::hooked("in", ChainKind::Filter, HookPoint::Input, 0).rule(NftRule::new().counter());
    table.chains.push(chain);
    table
}

/// What others have on the host, some of it under our numbers.
fn add_foreign(handle: &mut Handle) {
    let up = handle.link_by_name("up0").unwrap().unwrap().index;
    handle.replace_table(&foreign_table()).unwrap();
    handle.add_rule(&Rule { protocol: 99, ..Rule::lookup(IpFamily::V4, 500, 7100) }).unwrap();
    handle.add_rule(&Rule::lookup(IpFamily::V6, 400, 300)).unwrap();
    handle.replace_route(&Route { table: 7100, protocol: 99, ..Route::through(net("10.77.0.0/16"), up) }).unwrap();
    handle.replace_route(&Route { table: 300, protocol: 71, ..Route::through(net("10.78.0.0/16"), up) }).unwrap();
    handle.add_veth(&VethEnd::new("meshother"), &VethEnd::new("meshpeer"), None).unwrap();
    let grouped = handle.add_veth(&VethEnd::new("veth7100"), &VethEnd::new("vethpeer"), None).unwrap();
    handle.change_link(grouped, &LinkChange::new().group(7100)).unwrap();
}

#[test]
fn a_host_is_brought_in_line_repaired_and_cleared_and_nothing_else_is_touched() {
    in_namespace(|handle, temp| {
        add_foreign(handle);
        let before = world(handle);
        let config = Config::default();
        let desired = host_state(&facts(), &config);
        let state = StateDir::open(&temp.join("state")).unwrap();
        let mut host = Host::open(state.clone(), bare(&config)).unwrap();
        let queues = host.open_device("mesh0", DevicePlan::default()).unwrap().queues;
        host.apply(desired.clone()).unwrap();
        assert!(in_line(handle, &desired), "{:#?}", missing(handle, &desired));
        assert_eq!(load(&state).unwrap().as_ref(), Some(&desired), "the guard knows it");

        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let (sender, mut made) = mpsc::channel(4);
        let seen = host.facts().unwrap();
        assert_eq!(
            (seen.underlay_mtu, seen.underlay_addresses.as_slice()),
            (1500, &["192.0.2.1".parse().unwrap()][..])
        );
        let running = host.start(seen, sender).unwrap();
        break_and_watch(handle, &desired, queues, &mut made);

        running.stop();
        assert!(in_line(handle, &desired), "stopping leaves everything in place");
        let refused = Host::open(state.clone(), load(&state).unwrap().unwrap()).unwrap().down();
        assert!(refused.is_empty(), "{refused:?}");
        assert_eq!(world(handle), before);
        assert!(load(&state).unwrap().is_none(), "the guard has nothing to restore");
        drop(runtime);
    });
}

fn missing(handle: &mut Handle, desired: &HostState) -> Vec<String> {
    let look = look(handle, desired, Some(&desired.filter), &mut Underlay::default()).unwrap();
    let mut missing: Vec<String> = diff(desired, &look.actual).iter().map(ToString::to_string).collect();
    missing.extend(look.actual.device.is_none().then(|| "device".to_owned()));
    missing
}

fn in_line(handle: &mut Handle, desired: &HostState) -> bool {
    missing(handle, desired).is_empty()
}

fn break_and_watch(
    handle: &mut Handle,
    desired: &HostState,
    queues: Vec<TunQueue>,
    made: &mut mpsc::Receiver<Vec<TunQueue>>,
) {
    let mesh0 = |handle: &mut Handle| handle.link_by_name("mesh0").unwrap().unwrap();
    let ours = RouteFilter { table: Some(7100), protocol: Some(71) };
    // Each says how much it broke: the host may have mended it before anybody can look.
    type Break<'a> = (&'a str, Box<dyn FnMut(&mut Handle) -> usize + 'a>);
    let breaks: Vec<Break<'_>> = vec![
        (
            "routes flushed",
            Box::new(|handle| {
                let routes = handle.routes(ours).unwrap();
                routes.iter().for_each(|route| handle.delete_route(route).unwrap());
                routes.len()
            }),
        ),
        (
            "rules flushed",
            Box::new(|handle| {
                let mut rules = handle.rules().unwrap();
                rules.retain(|rule| rule.protocol == 71);
                rules.iter().for_each(|rule| handle.delete_rule(rule).unwrap());
                rules.len()
            }),
        ),
        (
            "nftables flushed",
            Box::new(|handle| {
                handle.delete_table(Family::Inet, "mesh").unwrap();
                1
            }),
        ),
        (
            "device down",
            Box::new(|handle| {
                let link = mesh0(handle);
                handle.change_link(link.index, &LinkChange::new().down()).unwrap();
                usize::from(link.up)
            }),
        ),
        (
            "addresses flushed",
            Box::new(|handle| {
                let index = mesh0(handle).index;
                let mut addresses = handle.addresses().unwrap();
                addresses.retain(|address| address.link == index);
                addresses.iter().for_each(|address| handle.delete_address(index, address.net).unwrap());
                addresses.len()
            }),
        ),
        (
            "MTU changed",
            Box::new(|handle| {
                let link = mesh0(handle);
                handle.change_link(link.index, &LinkChange::new().mtu(1300)).unwrap();
                usize::from(link.mtu != 1300)
            }),
        ),
        (
            "device deleted",
            Box::new(|handle| {
                let index = mesh0(handle).index;
                handle.delete_link(index).unwrap();
                1
            }),
        ),
    ];
    let count = u32::try_from(breaks.len()).unwrap();
    let mut took = Duration::ZERO;
    for (what, mut harm) in breaks {
        assert!(harm(handle) > 0, "{what}: nothing was harmed");
        took += eventually(what, || in_line(handle, desired));
    }
    assert!(took / count < super::thread::LOOK_EVERY, "nobody told the host: repaired all in {took:?}");
    let modern = sysctl::read(&Key::ipv6_link("default", "force_forwarding").unwrap()).is_ok();
    let forwards_all = sysctl::read(&Key::ipv6_forwarding()).unwrap() == "1";
    assert_eq!(forwards_all, !modern, "other links are made to forward only where the kernel knows no other way");
    let mut again = None;
    eventually("the lanes get the new device", || {
        again = made.try_recv().ok();
        again.is_some()
    });
    let again = again.unwrap();
    assert_eq!(again.len(), queues.len(), "the lanes get the new device's queues");
    let setting = Key::ipv4_link("mesh0", "forwarding").unwrap();
    sysctl::write(&setting, "0").unwrap();
    eventually("setting changed", || sysctl::read(&setting).unwrap() == "1");
    // The second set of queues keeps the device running until here.
    drop((queues, again));
}

#[test]
fn the_guard_closes_a_machine_that_starts_anew() {
    let desired = host_state(&facts(), &Config::default());
    in_namespace(|handle, temp| {
        let path = temp.join("state");
        assert_eq!(crate::guard::run(&path).unwrap(), crate::guard::Guarded::NothingSaved);
        assert!(!path.exists());
        let state = StateDir::open(&path).unwrap();
        super::saved::save(&state, &desired).unwrap();
        assert_eq!(crate::guard::run(&path).unwrap(), crate::guard::Guarded::MeshdRuns);
        drop(state);
        assert_eq!(crate::guard::run(&path).unwrap(), crate::guard::Guarded::Closed);
        let look = look(handle, &desired, Some(&desired.filter), &mut Underlay::default()).unwrap();
        assert!(closing(&desired, &look.actual).is_empty());
        assert!(look.actual.device.is_none(), "the guard opens no device");
        let udp = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
        let error = udp.send_to(b"clear", "10.2.3.4:9").unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::HostUnreachable, "{error}");
    });
}

#[test]
fn other_names_in_the_configuration_leave_nothing_of_the_old_ones() {
    in_namespace(|handle, temp| {
        let before = world(handle);
        let old = Config::default();
        let state = StateDir::open(&temp.join("state")).unwrap();
        let mut host = Host::open(state.clone(), bare(&old)).unwrap();
        let old_queues = host.open_device("mesh0", DevicePlan::default()).unwrap();
        host.apply(host_state(&facts(), &old)).unwrap();
        drop((host, old_queues));

        let mut new = Config::default();
        new.device.name = "other0".into();
        (new.host.table, new.host.route_protocol, new.host.nftables_table) = (7200, 72, "other_mesh".into());
        let mut host = Host::open(state.clone(), load(&state).unwrap().unwrap()).unwrap();
        let queues = host.open_device("other0", DevicePlan::default()).unwrap();
        let desired = host_state(&facts(), &new);
        host.apply(desired.clone()).unwrap();
        assert!(in_line(handle, &desired), "{:#?}", missing(handle, &desired));
        assert!(handle.link_by_name("mesh0").unwrap().is_none());
        assert!(handle.table_state(Family::Inet, "mesh").unwrap().is_none());
        assert!(handle.routes(RouteFilter { table: Some(7100), protocol: None }).unwrap().is_empty());
        assert!(host.down().is_empty());
        assert_eq!(world(handle), before);
        drop(queues);
    });
}

#[test]
fn a_pod_gets_its_route_when_its_link_appears_and_keeps_a_route_made_by_the_plugin() {
    in_namespace(|handle, temp| {
        let config = Config::default();
        let mut facts = facts();
        let lease = crate::desired::tests::lease("a", "10.1.1.9");
        let name = lease.attachment.host_link();
        facts.pods = Arc::new(vec![lease]);
        let state = StateDir::open(&temp.join("state")).unwrap();
        let mut host = Host::open(state, bare(&config)).unwrap();
        let queues = host.open_device("mesh0", DevicePlan::default()).unwrap();
        host.apply(host_state(&facts, &config)).unwrap();
        let group = VethEnd { group: Some(7100), ..VethEnd::new(name.as_str()) };
        let link = handle.add_veth(&group, &VethEnd::new("pod0"), None).unwrap();
        let pod0 = handle.link_by_name("pod0").unwrap().unwrap().index;
        handle.change_link(link, &LinkChange::new().up()).unwrap();
        handle.change_link(pod0, &LinkChange::new().up()).unwrap();
        // As the plugin makes it, before meshd has seen the link.
        let plugin = Route { table: 7100, protocol: 71, ..Route::through(net("10.1.1.9/32"), link) };
        handle.replace_route(&plugin).unwrap();
        host.apply(host_state(&facts, &config)).unwrap();
        let find = |handle: &mut Handle| {
            let routes = handle.routes(RouteFilter { table: Some(7100), protocol: Some(71) }).unwrap();
            routes.into_iter().find(|route| route.destination == net("10.1.1.9/32"))
        };
        assert!(find(handle).is_some(), "a route by a pod's link stays");
        facts.host = Arc::new(host.facts().unwrap());
        assert_eq!(facts.host.pod_links, std::slice::from_ref(&name));
        host.apply(host_state(&facts, &config)).unwrap();
        assert_eq!(find(handle).unwrap().preferred_source, Some("100.100.0.1".parse().unwrap()));
        let forwarding = sysctl::read(&Key::ipv4_link(&name, "forwarding").unwrap()).unwrap();
        assert_eq!(forwarding, "1");
        drop(queues);
    });
}
