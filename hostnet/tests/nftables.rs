//! nftables: what tables do to packets, and what is read back of them.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

mod support;

use std::{
    io::ErrorKind,
    net::{IpAddr, SocketAddr, UdpSocket},
    time::Duration,
};

use ipnet::IpNet;
use mesh_hostnet::{
    Error, Handle,
    address::Address,
    nft::{
        Addresses, Chain, ChainKind, Family, Hook, HookPoint, IpVersion, Is, Policy, Rule, Set, Side, Table, Term,
        connection_state,
    },
    route::Route,
    rule::{IpFamily, Rule as IpRule},
};
use support::{Pair, netns, pair};

/// Whether a datagram from `left` to `right` arrives: its source there, or nothing. A virtual link delivers, or not,
/// within the sender's call: the wait is only for a busy machine.
fn arrives(pair: &Pair, from: &str, to: &str) -> Option<SocketAddr> {
    let receiver = pair.right.run(|| UdpSocket::bind(to).unwrap()).unwrap();
    receiver.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    let target = receiver.local_addr().unwrap();
    let sender = pair.left.run(|| UdpSocket::bind(from).unwrap()).unwrap();
    // A drop on the way out shows as EPERM.
    let _ = sender.send_to(b"x", target);
    match receiver.recv_from(&mut [0; 8]) {
        Ok((_, source)) => Some(source),
        Err(error) if error.kind() == ErrorKind::WouldBlock => None,
        Err(error) => panic!("{error}"),
    }
}

fn sets() -> Vec<Set> {
    let nets: Vec<IpNet> = ["10.9.0.0/25", "10.9.0.128/25", "10.64.0.0/10", "fd09::/64", "255.0.0.0/8"]
        .map(|net| net.parse().unwrap())
        .into();
    vec![Set::v4("remote4", nets.clone()), Set::v6("remote6", nets), Set::v4("empty", [])]
}

fn table_with(chain: Chain) -> Table {
    Table { sets: sets(), chains: vec![chain], ..Table::new(Family::Inet, "mesh") }
}

fn outgoing(rule: Rule) -> Table {
    table_with(Chain::hooked("wire-out", ChainKind::Filter, HookPoint::Postrouting, 200).rule(rule))
}

fn incoming(rule: Rule) -> Table {
    table_with(Chain::hooked("wire-in", ChainKind::Filter, HookPoint::Prerouting, -300).rule(rule))
}

#[test]
fn destinations_in_a_set_are_dropped_on_other_links_only() {
    let mut pair = pair();
    let rule = |link: &str, set: Addresses| {
        Rule::new().output_link(Is::NotEqual, link).address(Side::Destination, Is::Equal, set).counter().drop()
    };
    let four = || Addresses::V4Set("remote4".into());
    let six = || Addresses::V6Set("remote6".into());
    for (link, set, v4, v6) in [
        ("mesh0", four(), false, true),
        ("mesh0", six(), true, false),
        ("l", four(), true, true),
        ("mesh0", Addresses::V4Set("empty".into()), true, true),
        ("mesh0", Addresses::Prefix("10.9.0.2/32".parse().unwrap()), false, true),
        ("mesh0", Addresses::Prefix("10.9.0.0/28".parse().unwrap()), false, true),
        ("mesh0", Addresses::Prefix("10.9.0.16/28".parse().unwrap()), true, true),
        ("mesh0", Addresses::Prefix("fd09::/16".parse().unwrap()), true, false),
    ] {
        pair.near.replace_table(&outgoing(rule(link, set.clone()))).unwrap();
        assert_eq!(arrives(&pair, "0.0.0.0:0", "10.9.0.2:0").is_some(), v4, "{link} {set:?}");
        assert_eq!(arrives(&pair, "[::]:0", "[fd09::2]:0").is_some(), v6, "{link} {set:?}");
    }
}

#[test]
fn conditions_on_what_arrives() {
    let mut pair = pair();
    pair.far.change_link(pair.r, &mesh_hostnet::link::LinkChange::new().group(7100)).unwrap();
    let other = || Addresses::V4Set("empty".into());
    for (rule, passes) in [
        (Rule::new().input_link(Is::Equal, "r").drop(), false),
        (Rule::new().input_link(Is::NotEqual, "r").drop(), true),
        (Rule::new().input_group(Is::Equal, 7100).drop(), false),
        (Rule::new().input_group(Is::NotEqual, 7100).drop(), true),
        (Rule::new().address(Side::Source, Is::NotEqual, other()).drop(), false),
        (Rule::new().udp_port(Side::Destination, 7100..=7107).drop(), false),
        (Rule::new().udp_port(Side::Destination, 7104..=7104).drop(), false),
        (Rule::new().udp_port(Side::Destination, 7105..=7107).drop(), true),
        (Rule::new().udp_port(Side::Source, 4000..=5000).drop(), false),
        (Rule::new().udp_port(Side::Source, 4001..=5000).drop(), true),
        (Rule::new().tcp_port(Side::Destination, 0..=65535).drop(), true),
        (Rule::new().term(Term::Protocol { is: Is::NotEqual, number: 17 }).drop(), true),
        (Rule::new().set_mark(0x40, 0x40).mark(Is::Equal, 0x40, 0x40).drop(), false),
        (Rule::new().set_mark(0xff, 0x40).mark(Is::Equal, 0x40, 0xffff_ffff).drop(), false),
        (Rule::new().mark(Is::NotEqual, 0x40, 0x40).drop(), false),
        (Rule::new().no_track().counter().accept(), true),
        (Rule::new().reject(), false),
    ] {
        let hook = if rule.terms == [Term::Reject] { HookPoint::Input } else { HookPoint::Prerouting };
        let chain = Chain::hooked("in", ChainKind::Filter, hook, -300).rule(rule.clone());
        pair.far.replace_table(&table_with(chain)).unwrap();
        assert_eq!(arrives(&pair, "0.0.0.0:4000", "10.9.0.2:7104").is_some(), passes, "{rule:?}");
    }
}

#[test]
fn a_jump_comes_back_and_a_policy_judges_the_rest() {
    let mut pair = pair();
    let hook = Hook { kind: ChainKind::Filter, point: HookPoint::Input, priority: 0, policy: Policy::Drop };
    for (last, passes) in [(Rule::new().counter().accept(), true), (Rule::new().return_(), false)] {
        let exempt = Chain { name: "exempt".into(), hook: None, rules: vec![Rule::new().counter(), last] };
        let first = Rule::new().udp_port(Side::Destination, 1..=65535).jump("exempt").comment("our own ports");
        let input = Chain { name: "in".into(), hook: Some(hook), rules: vec![first] };
        let table = Table { chains: vec![input, exempt], ..Table::new(Family::Inet, "mesh") };
        pair.far.replace_table(&table).unwrap();
        assert!(pair.far.has_table(&table).unwrap());
        assert_eq!(arrives(&pair, "0.0.0.0:0", "10.9.0.2:0").is_some(), passes);
    }
}

#[test]
fn a_source_is_kept_from_a_later_masquerade_or_translated() {
    let mut pair = pair();
    let own: Vec<IpNet> = vec!["10.50.0.1/32".parse().unwrap(), "fd50::1/128".parse().unwrap()];
    for net in &own {
        pair.near.replace_address(&Address::plain(pair.l, *net)).unwrap();
        pair.far.replace_route(&Route::through(*net, pair.r)).unwrap();
    }
    let nat = |priority, name: &str, rules| Table {
        sets: vec![Set::v4("own4", own.clone()), Set::v6("own6", own.clone())],
        chains: vec![Chain { rules, ..Chain::hooked("nat", ChainKind::Nat, HookPoint::Postrouting, priority) }],
        ..Table::new(Family::Inet, name)
    };
    let ip = |text: &str| text.parse::<IpAddr>().unwrap();
    // What another CNI does: everything leaves with the link's address.
    let masquerade = vec![Rule::new().source_to(ip("10.9.0.1")), Rule::new().source_to(ip("fd09::1"))];
    pair.near.replace_table(&nat(100, "cni", masquerade)).unwrap();
    let seen = |pair: &Pair| {
        let v4 = arrives(pair, "10.50.0.1:0", "10.9.0.2:0").unwrap().ip();
        (v4, arrives(pair, "[fd50::1]:0", "[fd09::2]:0").unwrap().ip())
    };
    assert_eq!(seen(&pair), (ip("10.9.0.1"), ip("fd09::1")));

    let keep = |side_set: Addresses, version| {
        Rule::new().output_link(Is::Equal, "l").address(Side::Source, Is::Equal, side_set).keep_source(version)
    };
    let rules = vec![
        keep(Addresses::V4Set("own4".into()), IpVersion::V4),
        keep(Addresses::V6Set("own6".into()), IpVersion::V6),
    ];
    pair.near.replace_table(&nat(90, "mesh", rules)).unwrap();
    assert_eq!(seen(&pair), (ip("10.50.0.1"), ip("fd50::1")));
}

#[test]
fn connections_are_told_by_their_state() {
    let mut pair = pair();
    let states = connection_state::ESTABLISHED | connection_state::RELATED;
    let rule = Rule::new().term(Term::ConnectionState { states });
    let hook = Hook { kind: ChainKind::Filter, point: HookPoint::Input, priority: 0, policy: Policy::Drop };
    let chain = Chain { name: "in".into(), hook: Some(hook), rules: vec![rule.accept()] };
    pair.near.replace_table(&table_with(chain)).unwrap();
    let far = pair.right.run(|| UdpSocket::bind("10.9.0.2:0").unwrap()).unwrap();
    let near = pair.left.run(|| UdpSocket::bind("10.9.0.1:0").unwrap()).unwrap();
    for socket in [&near, &far] {
        socket.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    }
    far.send_to(b"x", near.local_addr().unwrap()).unwrap();
    assert!(near.recv(&mut [0; 8]).is_err(), "a stranger is refused");
    near.send_to(b"x", far.local_addr().unwrap()).unwrap();
    far.send_to(b"y", near.local_addr().unwrap()).unwrap();
    assert!(near.recv(&mut [0; 8]).is_ok(), "an answer comes in");
}

#[test]
fn the_mark_of_a_route_chain_chooses_the_table() {
    let mut pair = pair();
    let rule = IpRule { mark: Some((0x40, 0x40)), ..IpRule::lookup(IpFamily::V4, 400, 7100) };
    pair.near.add_rule(&rule).unwrap();
    pair.near.replace_route(&Route { table: 7100, ..Route::unreachable("0.0.0.0/0".parse().unwrap()) }).unwrap();
    assert!(arrives(&pair, "0.0.0.0:0", "10.9.0.2:0").is_some());
    let chain = Chain::hooked("mark", ChainKind::Route, HookPoint::Output, -150);
    pair.near.replace_table(&table_with(chain.rule(Rule::new().set_mark(0x40, 0x40)))).unwrap();
    assert!(arrives(&pair, "0.0.0.0:0", "10.9.0.2:0").is_none());
}

#[test]
fn a_table_is_recognised_and_tampering_is_noticed() {
    let mut handle = Handle::open_in(&netns()).unwrap();
    let table = incoming(Rule::new().input_link(Is::NotEqual, "mesh0").counter().drop());
    assert_eq!(handle.table_state(Family::Inet, "mesh").unwrap(), None);
    handle.replace_table(&table).unwrap();
    handle.replace_table(&table).unwrap();
    let state = handle.table_state(Family::Inet, "mesh").unwrap().unwrap();
    assert!(state.matches(&table), "{state:?}");
    // 10.9.0.0/24, 10.64.0.0/10, 255.0.0.0/8 without an end; fd09::/64.
    assert_eq!((state.chains, state.rules, state.sets, state.elements), (1, 1, 3, 7));

    let changed = incoming(Rule::new().input_link(Is::NotEqual, "mesh0").counter().accept());
    assert_ne!(changed.fingerprint(), table.fingerprint());
    assert!(!handle.has_table(&changed).unwrap());
    let generation = handle.ruleset_generation().unwrap();
    handle.replace_table(&changed).unwrap();
    assert!(handle.ruleset_generation().unwrap() > generation);
    assert_ne!(handle.table_state(Family::Inet, "mesh").unwrap().unwrap().digest, state.digest);
    handle.replace_table(&table).unwrap();
    assert_eq!(handle.table_state(Family::Inet, "mesh").unwrap().unwrap(), state);

    handle.replace_table(&Table::new(Family::Ip, "mesh")).unwrap();
    handle.delete_table(Family::Inet, "mesh").unwrap();
    handle.delete_table(Family::Inet, "mesh").unwrap();
    assert!(!handle.has_table(&table).unwrap());
    assert!(handle.table_state(Family::Ip, "mesh").unwrap().is_some(), "a table of another family is another");
}

#[test]
fn a_refused_batch_changes_nothing() {
    let mut handle = Handle::open_in(&netns()).unwrap();
    let table = incoming(Rule::new().counter().drop());
    handle.replace_table(&table).unwrap();
    let nowhere = incoming(Rule::new().jump("nowhere"));
    let error = handle.replace_table(&nowhere).unwrap_err();
    assert!(error.is_not_found() && error.to_string().contains("rule 1 of chain wire-in"), "{error}");
    let nat_in_forward = table_with(Chain::hooked("x", ChainKind::Nat, HookPoint::Forward, 0));
    assert!(handle.replace_table(&nat_in_forward).is_err());
    let unknown = incoming(Rule::new().address(Side::Source, Is::Equal, Addresses::V4Set("lost".into())));
    assert!(matches!(handle.replace_table(&unknown), Err(Error::Invalid { .. })));
    assert!(handle.has_table(&table).unwrap());
}

#[test]
fn sets_of_ten_thousand_prefixes_are_replaced_at_once() {
    let mut pair = pair();
    let nets = (0..10_000_u32).map(|number| {
        let [_, _, high, low] = number.to_be_bytes();
        // Not touching one another, so that nothing is merged.
        format!("100.{high}.{low}.0/25").parse().unwrap()
    });
    let six = (0..10_000_u32).map(|number| format!("fd64:0:{number:x}::/64").parse().unwrap());
    let rule = Rule::new().address(Side::Destination, Is::Equal, Addresses::V4Set("many4".into())).drop();
    let mut table = outgoing(rule);
    table.sets = vec![Set::v4("many4", nets.chain(["10.9.0.2/32".parse().unwrap()])), Set::v6("many6", six)];
    pair.near.replace_table(&table).unwrap();
    assert!(pair.near.has_table(&table).unwrap());
    assert!(arrives(&pair, "0.0.0.0:0", "10.9.0.2:0").is_none());
}
