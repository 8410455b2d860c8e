//! The self-check of offloads, on this kernel as it is and on one that is made to do wrong. Needs root.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, missing_docs, reason = "tests")]

mod lab;

use std::{collections::BTreeMap, time::Duration};

use lab::{Pair, wait_until};
use mesh_dataplane::selfcheck::{Class, Fault, Findings, SelfCheck};

/// The scratch devices in namespace `a`, as the caller has to set them up.
fn scratch(pair: &Pair) -> SelfCheck {
    let check = pair.a.enter(SelfCheck::open).unwrap();
    pair.a.exec("sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1");
    for link in SelfCheck::links() {
        pair.a.ip(&format!("link set {} mtu 1500 up", link.name));
        for address in link.addresses {
            pair.a.ip(&format!("address add {address} dev {} nodad", link.name));
        }
        for route in link.routes {
            pair.a.ip(&format!("route add {route} dev {}", link.name));
        }
    }
    check
}

fn found(pair: &Pair, check: SelfCheck) -> BTreeMap<Class, Fault> {
    let findings: Findings = pair.a.enter(move || check.run(true));
    for (class, fault) in findings.faults() {
        println!("{class}: {fault}");
    }
    findings.faults().collect()
}

fn nft(pair: &Pair, rules: &[&str]) {
    pair.a.exec("nft add table inet try");
    for rule in rules {
        pair.a.exec(&format!("nft add {rule}"));
    }
}

#[test]
fn a_sound_kernel_passes_and_nothing_of_it_stays() {
    let pair = Pair::new();
    assert_eq!(found(&pair, scratch(&pair)), BTreeMap::new());
    // A program that another test starts has the descriptors until it has begun.
    wait_until("no scratch device", Duration::from_secs(5), || {
        let links = pair.a.exec("ip -o link show");
        !String::from_utf8_lossy(&links.stdout).contains("mesh-")
    });
}

#[test]
fn bytes_that_change_on_the_way_are_noticed() {
    let pair = Pair::new();
    let check = scratch(&pair);
    // One byte of each forwarded datagram's payload, and of what a socket sends to the far device.
    nft(
        &pair,
        &[
            "chain inet try forward { type filter hook forward priority 0 ; }",
            "rule inet try forward meta l4proto udp @th,160,8 set 0x5a",
            "chain inet try out { type filter hook output priority 0 ; }",
            "rule inet try out udp dport 9 @th,160,8 set 0x5a",
        ],
    );
    let found = found(&pair, check);
    let off: Vec<Class> = found.keys().copied().collect();
    assert_eq!(off, [Class::Uso, Class::UdpCoalesce, Class::UdpSegment]);
    assert!(matches!(found[&Class::UdpCoalesce], Fault::Wrong { .. }));
    assert!(matches!(found[&Class::UdpSegment], Fault::Wrong { .. }));
    assert_eq!(found[&Class::Uso], Fault::Untried);
}

#[test]
fn packets_that_do_not_come_out_are_noticed() {
    let pair = Pair::new();
    let check = scratch(&pair);
    nft(
        &pair,
        &[
            "chain inet try forward { type filter hook forward priority 0 ; }",
            "rule inet try forward ip6 nexthdr tcp meta length > 20000 drop",
        ],
    );
    let found = found(&pair, check);
    assert!(matches!(found[&Class::TcpCoalesce], Fault::Lost { train: "full" }), "{found:?}");
    let off: Vec<Class> = found.keys().copied().collect();
    assert_eq!(off, [Class::Tso4, Class::Tso6, Class::TcpCoalesce], "UDP has nothing to do with it");
}

#[test]
fn what_the_kernel_refuses_is_off() {
    let pair = Pair::new();
    let check = scratch(&pair);
    pair.a.ip("link set mesh-near down");
    let found = found(&pair, check);
    assert_eq!((found[&Class::TcpCoalesce], found[&Class::UdpCoalesce]), (Fault::Refused, Fault::Refused));
    assert_eq!(found.len(), 5, "sockets do not need that device: {found:?}");
}
