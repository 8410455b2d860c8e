//! Our data plane against wireguard-go, driven by wg(8). Needs root and Debian's wireguard-go and wireguard-tools.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, missing_docs, reason = "tests")]

mod lab;

use std::{
    io::Write,
    os::unix::net::UnixStream,
    process::{Command, Stdio},
    time::Duration,
};

use lab::{Namespace, Pair, Process, secret, table, wait_until};
use mesh_dataplane::{Engine, EngineConfig, PeerId, PublicKey, SecretKey};

const PATIENCE: Duration = Duration::from_secs(10);

/// Runs wg(8) with `input` and returns what it prints.
fn wg(args: &[&str], input: &str) -> String {
    let mut child = Command::new("wg")
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("wg(8): install wireguard-tools");
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

fn decode(base64: &str) -> [u8; 32] {
    const ALPHABET: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut bytes = Vec::new();
    let (mut bits, mut have) = (0u32, 0);
    for symbol in base64.bytes().filter(|symbol| *symbol != b'=') {
        bits = bits << 6 | ALPHABET.iter().position(|a| *a == symbol).unwrap() as u32;
        have += 6;
        if have >= 8 {
            have -= 8;
            bytes.push((bits >> have) as u8);
        }
    }
    bytes[..32].try_into().unwrap()
}

fn encode(key: &[u8; 32]) -> String {
    const ALPHABET: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for chunk in key.chunks(3) {
        let mut three = [0; 3];
        three[..chunk.len()].copy_from_slice(chunk);
        let bits = u32::from_be_bytes([0, three[0], three[1], three[2]]);
        for n in 0..4 {
            let symbol = ALPHABET[(bits >> (18 - 6 * n)) as usize & 63] as char;
            text.push(if n <= chunk.len() { symbol } else { '=' });
        }
    }
    text
}

/// wireguard-go in a namespace, with addresses and routes; `extra` goes into the peer's section.
fn wireguard_go(space: &Namespace, private: &str, remote: &PublicKey, extra: &str) -> Process {
    // Its control socket lies in a folder that namespaces share: the name must be its own.
    let link = space.name.replace("mdp", "w");
    let child = space
        .command(&format!("wireguard-go -f {link}"))
        .env("LOG_LEVEL", "error")
        .stdout(Stdio::null())
        .spawn()
        .expect("wireguard-go: install it");
    let process = Process(child);
    // Not by wg(8), which removes a socket that does not listen yet.
    let socket = format!("/var/run/wireguard/{link}.sock");
    wait_until("wireguard-go", PATIENCE, || UnixStream::connect(&socket).is_ok());
    let config = format!(
        "[Interface]\nPrivateKey = {private}\nListenPort = 51820\n[Peer]\nPublicKey = {}\n\
         AllowedIPs = 10.1.0.0/16, fd01::/16\n{extra}\n",
        encode(remote.as_bytes())
    );
    let mut set = space.command(&format!("wg setconf {link} /dev/stdin")).stdin(Stdio::piped()).spawn().unwrap();
    set.stdin.take().unwrap().write_all(config.as_bytes()).unwrap();
    assert!(set.wait().unwrap().success());
    for args in [
        "address add 10.2.0.1/32 dev wg0",
        "address add fd02::1/128 dev wg0 nodad",
        "link set wg0 mtu 1420 up",
        "route add 10.1.0.0/16 dev wg0",
        "route add fd01::/16 dev wg0",
    ] {
        space.ip(&args.replace("wg0", &link));
    }
    process
}

fn engine(pair: &Pair, local: SecretKey, remote: PublicKey, endpoint: Option<&str>) -> Engine {
    let lane = pair.a.lane(7100, &["10.1.0.1/32", "fd01::1/128"], &["10.2.0.0/16", "fd02::/16"]);
    let endpoint = endpoint.map(|text| text.parse().unwrap());
    let (own, theirs) = (["10.1.0.0/16", "fd01::/16"], ["10.2.0.0/16", "fd02::/16"]);
    let table = table(local, &own, remote, &theirs, endpoint);
    Engine::start(EngineConfig::default(), table, vec![lane]).unwrap()
}

fn traffic_both_ways(pair: &Pair, engine: &Engine) {
    pair.a.exec("ping -q -c 20 -i 0.01 -W 2 -s 1300 10.2.0.1");
    pair.b.exec("ping -q -c 20 -i 0.01 -W 2 -s 1300 10.1.0.1");
    pair.b.exec("ping -q -c 20 -i 0.01 -W 2 fd01::1");
    let snapshot = engine.snapshot();
    let peer = &snapshot.peers[&PeerId(1)];
    assert!(peer.traffic.rx_packets >= 60 && peer.traffic.tx_packets >= 60, "{peer:?}");
    assert!(peer.tunnels.iter().any(|tunnel| tunnel.confirmed));
}

#[test]
fn we_initiate_and_traffic_passes_both_ways() {
    let pair = Pair::new();
    let private = wg(&["genkey"], "");
    let remote = PublicKey::new(decode(&wg(&["pubkey"], &private)));
    let engine = engine(&pair, secret(41), remote, Some("192.0.2.2:51820"));
    let _go = wireguard_go(&pair.b, &private, &secret(41).to_public(), "");
    pair.a.ping("10.2.0.1");
    traffic_both_ways(&pair, &engine);
}

#[test]
fn it_initiates_and_traffic_passes_both_ways() {
    let pair = Pair::new();
    let private = wg(&["genkey"], "");
    let remote = PublicKey::new(decode(&wg(&["pubkey"], &private)));
    let engine = engine(&pair, secret(42), remote, None);
    let _go = wireguard_go(&pair.b, &private, &secret(42).to_public(), "Endpoint = 192.0.2.1:7100");
    pair.b.ping("10.1.0.1");
    traffic_both_ways(&pair, &engine);
}
