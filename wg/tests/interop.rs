//! mesh-wg beside other implementations of WireGuard: both directions, both underlays, with and without preshared key.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

mod lab;

use std::process::Command;

use lab::{Device, Kind, Lab, find, run, transfer, within};

/// Who begins.
#[derive(Debug, Clone, Copy)]
enum First {
    Ours,
    Theirs,
}

#[test]
fn wireguard_go() {
    matrix("wireguard-go", Kind::WireguardGo);
}

#[test]
fn boringtun() {
    matrix("boringtun-cli", Kind::Boringtun);
}

#[test]
fn gotatun() {
    matrix("gotatun", Kind::Gotatun);
}

#[test]
fn itself() {
    all_ways(&Kind::MeshWg);
}

fn matrix(program: &str, kind: impl FnOnce(std::path::PathBuf) -> Kind) {
    match find(program) {
        Some(path) => all_ways(&kind(path)),
        None => eprintln!("SKIPPED: mesh-wg beside {program}: {program} is not installed"),
    }
}

fn all_ways(other: &Kind) {
    let lab = Lab::new();
    let (ours, theirs) = (Device::start(&lab.a, &Kind::MeshWg), Device::start(&lab.b, other));
    ours.up(1);
    theirs.up(2);
    let preshared = run(Command::new("wg").arg("genpsk"));
    for underlay in [["192.0.2.1", "192.0.2.2"], ["[2001:db8::1]", "[2001:db8::2]"]] {
        for key in [None, Some(preshared.trim())] {
            for first in [First::Ours, First::Theirs] {
                eprintln!("{other:?}: over {}, preshared key: {}, first: {first:?}", underlay[0], key.is_some());
                one_way(&ours, &theirs, underlay, key, first);
            }
        }
    }
    transfer(&lab.a, &lab.b, "10.9.0.2", 4 << 20);
    transfer(&lab.b, &lab.a, "fd09::1", 4 << 20);
}

fn one_way(ours: &Device<'_>, theirs: &Device<'_>, underlay: [&str; 2], preshared: Option<&str>, first: First) {
    let conf = |own: &Device<'_>, other: &Device<'_>, host: usize, knows: bool| {
        let preshared = preshared.map_or(String::new(), |key| format!("PresharedKey = {key}\n"));
        let endpoint = if knows { format!("Endpoint = {}:700{host}\n", underlay[host - 1]) } else { String::new() };
        format!(
            "[Interface]\nPrivateKey = {}\nListenPort = 700{}\n[Peer]\nPublicKey = {}\n\
             AllowedIPs = 10.9.0.{host}/32, fd09::{host}/128\n{preshared}{endpoint}",
            own.key.secret,
            3 - host,
            other.key.public
        )
    };
    // An empty configuration first: no session of the last round is left.
    for (device, port) in [(ours, 7001), (theirs, 7002)] {
        device.conf("setconf", &format!("[Interface]\nPrivateKey = {}\nListenPort = {port}\n", device.key.secret));
    }
    ours.conf("setconf", &conf(ours, theirs, 2, matches!(first, First::Ours)));
    theirs.conf("setconf", &conf(theirs, ours, 1, matches!(first, First::Theirs)));
    match first {
        First::Ours => ours.ns.ping("10.9.0.2"),
        First::Theirs => theirs.ns.ping("10.9.0.1"),
    }
    ours.ns.ping_with("fd09::2", "-s 1300");
    theirs.ns.ping_with("fd09::1", "-s 1300");
    within("both show the handshake", || {
        let seen = |own: &Device<'_>, other: &Device<'_>| own.shown("latest-handshakes", &other.key.public) != "0";
        seen(ours, theirs) && seen(theirs, ours)
    });
    let endpoint = ours.shown("endpoints", &theirs.key.public);
    assert_eq!(endpoint, format!("{}:7002", underlay[1]));
}
