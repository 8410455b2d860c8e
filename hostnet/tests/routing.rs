//! Routes, rules and announcements, read back from the kernel.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

mod support;

use std::{
    net::UdpSocket,
    time::{Duration, Instant},
};

use mesh_hostnet::{
    Handle,
    address::{Address, Scope},
    link::{LinkChange, VethEnd},
    nft::{Family, Table},
    route::{Route, RouteFilter, RouteKind},
    rule::{IpFamily, Rule, RuleVerdict},
    watch::{Event, Watch},
};
use nix::errno::Errno;
use proptest::prelude::*;
use support::{netns, pair};

const OURS: RouteFilter = RouteFilter { table: Some(7100), protocol: Some(71) };

fn ours(route: Route) -> Route {
    Route { table: 7100, protocol: 71, metric: 50, ..route }
}

#[test]
fn routes_are_read_back_as_they_were_written() {
    let mut pair = pair();
    assert!(pair.near.routes(OURS).unwrap().is_empty(), "a table that does not exist is empty");
    let mut wanted = vec![
        Route {
            mtu: Some(1380),
            advmss: Some(1340),
            preferred_source: Some("10.9.0.1".parse().unwrap()),
            ..ours(Route::through("10.2.0.0/16".parse().unwrap(), pair.l))
        },
        Route {
            mtu: Some(1380),
            preferred_source: Some("fd09::1".parse().unwrap()),
            ..ours(Route::through("fd02::/48".parse().unwrap(), pair.l))
        },
        Route {
            link: Some(pair.l),
            onlink: true,
            ..ours(Route::via("10.4.0.0/16".parse().unwrap(), "192.0.2.9".parse().unwrap()))
        },
        Route { link: Some(pair.l), ..ours(Route::via("::/0".parse().unwrap(), "fd09::2".parse().unwrap())) },
        ours(Route { scope: Scope::Link, ..Route::through("10.5.0.1/32".parse().unwrap(), pair.l) }),
    ];
    for kind in [RouteKind::Unreachable, RouteKind::Blackhole, RouteKind::Prohibit, RouteKind::Throw] {
        for (number, prefix) in ["10.2.0.0/16", "fd02::/48"].into_iter().enumerate() {
            let route = Route::unreachable(prefix.parse().unwrap());
            let metric = 4000 + as_number(kind) + number as u32;
            wanted.push(Route { kind, table: 7100, protocol: 71, metric, ..route });
        }
    }
    for route in &wanted {
        pair.near.replace_route(route).unwrap();
        pair.near.replace_route(route).unwrap();
    }
    wanted = wanted.iter().map(Route::normalised).collect();
    wanted.sort();
    assert_eq!(pair.near.routes(OURS).unwrap(), wanted);
    assert!(pair.near.routes(RouteFilter::default()).unwrap().len() > wanted.len(), "the kernel's own are there too");

    for route in &wanted {
        pair.near.delete_route(route).unwrap();
        pair.near.delete_route(route).unwrap();
    }
    assert!(pair.near.routes(OURS).unwrap().is_empty());
}

#[test]
fn a_replacement_has_the_same_key() {
    let mut pair = pair();
    for prefix in ["10.2.0.0/16", "fd02::/48"] {
        let first = ours(Route::through(prefix.parse().unwrap(), pair.l));
        let second = Route { mtu: Some(1300), ..first.clone() };
        let third = ours(Route::unreachable(prefix.parse().unwrap()));
        assert!(first.key() == second.key() && second.key() == third.key());
        for route in [first, second, third] {
            pair.near.replace_route(&route).unwrap();
            assert_eq!(pair.near.routes(OURS).unwrap(), [route.normalised()]);
        }
        let third = ours(Route::unreachable(prefix.parse().unwrap()));
        pair.near.delete_route(&third).unwrap();
    }
}

#[test]
fn refusals_say_why() {
    let mut pair = pair();
    let lost = Route::via("10.4.0.0/16".parse().unwrap(), "203.0.113.9".parse().unwrap());
    let error = pair.near.replace_route(&lost).unwrap_err();
    assert!(
        error.errno() == Some(Errno::ENETUNREACH) && error.to_string().contains("Nexthop has invalid gateway"),
        "{error}"
    );
    assert!(error.to_string().contains("10.4.0.0/16"), "{error}");
    let nowhere = Route::through("10.4.0.0/16".parse().unwrap(), 4_000_000);
    assert!(pair.near.replace_route(&nowhere).unwrap_err().is_not_found());
    let mixed = Route::via("10.4.0.0/16".parse().unwrap(), "fd09::2".parse().unwrap());
    assert!(pair.near.replace_route(&mixed).is_err());
}

#[test]
fn twins_answer_when_the_link_is_gone() {
    let mut pair = pair();
    for (prefix, probe) in [("10.2.0.0/16", "10.2.0.1:9"), ("fd02::/48", "[fd02::1]:9")] {
        pair.near.replace_route(&Route { metric: 4096, ..Route::unreachable(prefix.parse().unwrap()) }).unwrap();
        pair.near.replace_route(&Route { metric: 50, ..Route::through(prefix.parse().unwrap(), pair.l) }).unwrap();
        let connect = |probe: &str| {
            let any = if probe.starts_with('[') { "[::]:0" } else { "0.0.0.0:0" };
            pair.left
                .run(|| UdpSocket::bind(any).unwrap().connect(probe).map_err(|error| error.raw_os_error()))
                .unwrap()
        };
        assert_eq!(connect(probe), Ok(()));
        pair.near.change_link(pair.l, &LinkChange::new().down()).unwrap();
        assert!(matches!(connect(probe), Err(Some(libc::EHOSTUNREACH | libc::ENETUNREACH))));
        pair.near.change_link(pair.l, &LinkChange::new().up()).unwrap();
    }
}

#[test]
fn rules_are_added_once_and_removed() {
    let mut handle = Handle::open_in(&netns()).unwrap();
    let before = handle.rules().unwrap();
    assert!(before.iter().any(|rule| rule.verdict == RuleVerdict::Lookup(254)));
    for family in [IpFamily::V4, IpFamily::V6] {
        let rule = Rule { protocol: 71, ..Rule::lookup(family, 400, 7100).unless_marked(0x40, 0x40) };
        let other = Rule { invert: false, ..rule.clone() };
        handle.add_rule(&rule).unwrap();
        handle.add_rule(&rule).unwrap();
        handle.add_rule(&other).unwrap();
        let found = handle.rules().unwrap();
        assert_eq!(found.iter().filter(|found| **found == rule).count(), 1, "{found:?}");
        assert_eq!(found.iter().filter(|found| **found == other).count(), 1, "{found:?}");
        handle.delete_rule(&rule).unwrap();
        handle.delete_rule(&rule).unwrap();
        assert!(handle.rules().unwrap().contains(&other), "only the rule that was named went");
        handle.delete_rule(&other).unwrap();
    }
    let from = Rule {
        source: Some("10.1.2.0/24".parse().unwrap()),
        destination: Some("10.9.0.0/16".parse().unwrap()),
        input_link: Some("eth7".into()),
        verdict: RuleVerdict::Unreachable,
        ..Rule::lookup(IpFamily::V4, 401, 0)
    };
    handle.add_rule(&from).unwrap();
    assert!(handle.rules().unwrap().contains(&from), "{:?}", handle.rules());
    handle.delete_rule(&from).unwrap();
    assert_eq!(handle.rules().unwrap(), before);
}

#[test]
fn changes_are_announced() {
    let mut pair = pair();
    let mut watch = Watch::open_in(&pair.left).unwrap();
    let route = ours(Route::through("10.2.0.0/16".parse().unwrap(), pair.l));
    let rule = Rule::lookup(IpFamily::V6, 400, 7100).unless_marked(0x40, 0x40);
    let address = Address::plain(pair.l, "10.77.0.1/32".parse().unwrap());
    pair.near.replace_route(&route).unwrap();
    expect(&mut watch, |event| *event == Event::RouteChanged(route.normalised()));
    pair.near.delete_route(&route).unwrap();
    expect(&mut watch, |event| *event == Event::RouteGone(route.normalised()));
    pair.near.add_rule(&rule).unwrap();
    expect(&mut watch, |event| *event == Event::RuleAdded(rule.clone()));
    pair.near.delete_rule(&rule).unwrap();
    expect(&mut watch, |event| *event == Event::RuleGone(rule.clone()));
    pair.near.replace_address(&address).unwrap();
    expect(&mut watch, |event| matches!(event, Event::AddressChanged(found) if found.net == address.net));
    pair.near.replace_table(&Table::new(Family::Inet, "mesh")).unwrap();
    let tables = |event: &Event| match event {
        Event::Nftables(change) => {
            change.tables.contains("mesh") && change.thread_id == nix::unistd::gettid().as_raw() as u32
        }
        _ => false,
    };
    expect(&mut watch, tables);
    let name = pair.near.add_veth(&VethEnd::new("x"), &VethEnd::new("y"), None).unwrap();
    expect(&mut watch, |event| matches!(event, Event::LinkChanged(link) if link.name == "x"));
    pair.near.delete_link(name).unwrap();
    expect(&mut watch, |event| matches!(event, Event::LinkGone(link) if link.name == "x"));
}

#[test]
fn waiting_ends_by_time_and_by_a_waker() {
    let mut watch = Watch::open_in(&netns()).unwrap();
    let start = Instant::now();
    assert_eq!(watch.next(Duration::from_millis(20)).unwrap(), None);
    assert!(start.elapsed() >= Duration::from_millis(20));
    let waker = watch.waker();
    let thread = std::thread::spawn(move || waker.wake());
    assert_eq!(watch.next(Duration::from_secs(20)).unwrap(), Some(Event::Woken));
    thread.join().unwrap();
}

#[test]
fn a_flood_of_changes_is_reported_as_overflow() {
    let mut pair = pair();
    let mut watch = Watch::open_in(&pair.left).unwrap();
    for number in 0..20_000_u32 {
        let [_, _, high, low] = number.to_be_bytes();
        let route = ours(Route::through(format!("10.200.{high}.{low}/32").parse().unwrap(), pair.l));
        pair.near.replace_route(&route).unwrap();
    }
    expect(&mut watch, |event| *event == Event::Overflow);
    assert_eq!(pair.near.routes(OURS).unwrap().len(), 20_000);
}

fn expect(watch: &mut Watch, wanted: impl Fn(&Event) -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    let mut seen = Vec::new();
    while let Some(event) = watch.next(deadline.saturating_duration_since(Instant::now())).unwrap() {
        if wanted(&event) {
            return;
        }
        if seen.len() < 20 {
            seen.push(event);
        }
    }
    panic!("the announcement did not come, but these did: {seen:#?}");
}

fn as_number(kind: RouteKind) -> u32 {
    match kind {
        RouteKind::Unreachable => 10,
        RouteKind::Blackhole => 20,
        RouteKind::Prohibit => 30,
        _ => 40,
    }
}

proptest! {
    #[test]
    fn normalising_twice_changes_nothing(v4: bool, ip: u128, length: u8, metric: u32, refuses: bool, link in 1_u32..9) {
        let net = if v4 {
            ipnet::Ipv4Net::new((ip as u32).into(), length % 33).unwrap().into()
        } else {
            ipnet::IpNet::V6(ipnet::Ipv6Net::new(ip.into(), length % 129).unwrap())
        };
        let route = if refuses { Route::unreachable(net) } else { Route::through(net, link) };
        let route = Route { metric, ..route }.normalised();
        prop_assert_eq!(&route.normalised(), &route);
        prop_assert_eq!(route.key(), (254, route.destination, route.metric));
    }
}
