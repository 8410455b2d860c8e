//! A flood of handshakes with the right first MAC: from made-up sources, and from one real one. Others still get in, traffic
//! goes on, memory stays flat. Needs root.
//!
//! Short by default; `make flood` runs it for a minute at 100,000 a second and holds it to the figures of the design.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, missing_docs, reason = "tests")]

mod lab;

use std::{
    net::{Ipv4Addr, SocketAddr, SocketAddrV4, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use lab::{Pair, secret, table, wait_until};
use mesh_dataplane::{
    DropCounters, DropReason, Engine, EngineConfig, LaneParts, Lanes, LocalKey, PeerId, PeerSpec, Preshared, RemoteKey,
    SecretKey, Table, TableSpec,
    clock::Instant as LaneInstant,
    lane::{Lane, LaneConfig, Output},
    packet::dscp::Dscp,
    tun::memory::MemoryQueue,
    udp::system::{SystemConfig, SystemSocket},
};
use socket2::{Domain, Protocol, Socket, Type};

const VICTIM: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(192, 0, 2, 1), 7100);
const LIVE: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(192, 0, 2, 2), 7200);
/// Peers of the victim that come one after another during the flood.
const NEWCOMERS: u32 = 600;
/// How the full run is meant.
const FULL_RATE: u64 = 100_000;

/// Seconds and handshakes a second.
fn size() -> (u64, u64) {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse().ok());
    match number("MESH_FLOOD_SECONDS") {
        Some(seconds) => (seconds, number("MESH_FLOOD_RATE").unwrap_or(FULL_RATE)),
        None => (3, 5_000),
    }
}

fn newcomer(n: u32) -> SecretKey {
    let mut bytes = [0x55; 32];
    bytes[4..8].copy_from_slice(&n.to_le_bytes());
    SecretKey::new(bytes)
}

fn spec(id: u32, key: &SecretKey, allowed: &str) -> PeerSpec {
    PeerSpec {
        id: PeerId(id),
        keys: vec![RemoteKey { epoch: 1, public: key.to_public() }],
        preshared: Preshared::None,
        allowed_ips: vec![allowed.parse().unwrap()],
        endpoints: Vec::new(),
        keepalive: None,
        lanes: Lanes::Plain,
    }
}

/// The engine under attack: its own port, one peer that talks to it all the time, many that want to.
fn victim(pair: &Pair) -> (Engine, MemoryQueue) {
    let mut peers = vec![spec(1, &secret(2), "10.2.0.0/16")];
    peers.extend((0..NEWCOMERS).map(|n| spec(n + 2, &newcomer(n), &format!("10.3.{}.{}/32", n >> 8, n & 255))));
    let table = TableSpec {
        local_keys: vec![LocalKey { epoch: 1, secret: secret(1) }],
        peers,
        own_prefixes: vec!["10.1.0.0/16".parse().unwrap()],
        ..TableSpec::default()
    };
    let socket = pair.a.enter(|| SystemSocket::bind(&SystemConfig { port: VICTIM.port(), ..Default::default() }));
    start(Arc::new(Table::new(table).unwrap()), socket.unwrap())
}

fn start(table: Arc<Table>, socket: SystemSocket) -> (Engine, MemoryQueue) {
    let (kernel, queue) = MemoryQueue::pair().unwrap();
    let parts = LaneParts { queue: Box::new(queue), socket: Box::new(socket) };
    (Engine::start(EngineConfig::default(), table, vec![parts]).unwrap(), kernel)
}

/// A peer of the victim at the other end of the link; port 0 lets the system choose.
fn peer(pair: &Pair, key: SecretKey, port: u16, own: &str) -> (Engine, MemoryQueue) {
    let socket = pair.b.enter(move || SystemSocket::bind(&SystemConfig { port, ..Default::default() })).unwrap();
    start(table(key, &[own], secret(1).to_public(), &["10.1.0.0/16"], Some(VICTIM.into())), socket)
}

/// Initiations of strangers who know the victim's public key.
fn initiations() -> Vec<Vec<u8>> {
    let now = LaneInstant::from_start(Duration::from_secs(1));
    let one = |n: u32| {
        let mut bytes = [0x66; 32];
        bytes[..4].copy_from_slice(&n.to_le_bytes());
        let key = SecretKey::new(bytes);
        let table = table(key, &["10.9.0.0/16"], secret(1).to_public(), &["10.1.0.0/16"], Some(VICTIM.into()));
        let config = LaneConfig {
            lane: 0,
            lanes: 1,
            flow_key: [0; 16],
            handshakes_per_second: 1,
            dscp: Dscp::Clear,
            seed: bytes,
        };
        let mut lane = Lane::new(config, table, now);
        let mut out = Output::new();
        lane.initiate(PeerId(1), now, &mut out);
        out.datagrams.get(0).unwrap().1.to_vec()
    };
    (0..512).map(one).collect()
}

/// Sends `rate` a second, a thousandth of them at a time, until told to stop; how many went.
fn flood(rate: u64, stop: &AtomicBool, mut send: impl FnMut(u64)) -> u64 {
    let (start, mut sent, mut missed) = (Instant::now(), 0, 0);
    while !stop.load(Ordering::Relaxed) {
        let due = (start.elapsed().as_micros() as u64 * rate / 1_000_000).saturating_sub(missed);
        // What a busy machine did not get round to is not made up for at once.
        let behind = due.saturating_sub(sent);
        missed += behind.saturating_sub(rate / 200);
        for _ in 0..behind.min(rate / 200) {
            send(sent);
            sent += 1;
        }
        thread::sleep(Duration::from_millis(1));
    }
    sent
}

/// An IPv4 and a UDP header without checksums of UDP, from an address in 10.66.0.0/16.
fn spoofed(number: u64, payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0; 28];
    packet[0] = 0x45;
    packet[8] = 64;
    packet[9] = 17;
    let host = (number.wrapping_mul(40_503) as u16).to_be_bytes();
    packet[12..20].copy_from_slice(&[10, 66, host[0], host[1], 192, 0, 2, 1]);
    packet[20..22].copy_from_slice(&(1_024 + (number % 60_000) as u16).to_be_bytes());
    packet[22..24].copy_from_slice(&VICTIM.port().to_be_bytes());
    packet[24..26].copy_from_slice(&(8 + payload.len() as u16).to_be_bytes());
    packet.extend_from_slice(payload);
    packet
}

fn numbered(number: u64) -> Vec<u8> {
    let mut packet = vec![0; 60];
    packet[0] = 0x45;
    packet[3] = 60;
    packet[9] = 17;
    packet[12..20].copy_from_slice(&[10, 2, 0, 1, 10, 1, 0, 1]);
    packet[40..48].copy_from_slice(&number.to_be_bytes());
    packet
}

fn resident_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// A thousand packets a second from the live peer; how many were sent and how many arrived.
fn talk(tun: &MemoryQueue, arrived: &MemoryQueue, stop: &AtomicBool) -> (u64, u64) {
    let (mut sent, mut received) = (0, 0);
    let count = |received: &mut u64| {
        while arrived.pop().unwrap().is_some() {
            *received += 1;
        }
    };
    while !stop.load(Ordering::Relaxed) {
        if tun.push(&numbered(sent)).unwrap() {
            sent += 1;
        }
        count(&mut received);
        thread::sleep(Duration::from_millis(1));
    }
    let deadline = Instant::now() + Duration::from_secs(2);
    while received < sent && Instant::now() < deadline {
        count(&mut received);
        thread::sleep(Duration::from_millis(1));
    }
    (sent, received)
}

/// Newcomers come and ask for a session, ten a second, until the time is over; how long each took.
fn newcomers(pair: &Pair, seconds: u64) -> Vec<Duration> {
    let end = Instant::now() + Duration::from_secs(seconds);
    let mut took = Vec::new();
    for n in 0..NEWCOMERS {
        let began = Instant::now();
        if began >= end {
            break;
        }
        let (engine, _tun) = peer(pair, newcomer(n), 0, &format!("10.3.{}.{}/32", n >> 8, n & 255));
        engine.initiate(PeerId(1)).unwrap();
        let has_session = || engine.snapshot().peers.values().any(|peer| peer.tunnels.iter().any(|t| t.confirmed));
        wait_until("a legitimate handshake", Duration::from_secs(30), has_session);
        took.push(began.elapsed());
        thread::sleep(Duration::from_millis(100).saturating_sub(began.elapsed()));
    }
    took.sort();
    took
}

fn survive(
    name: &str,
    limit: Duration,
    make: impl FnOnce(&Pair, Vec<Vec<u8>>) -> Box<dyn FnMut(u64) + Send>,
) -> DropCounters {
    let (seconds, rate) = size();
    let pair = Pair::new();
    let (victim, arrived) = victim(&pair);
    let (live, tun) = peer(&pair, secret(2), LIVE.port(), "10.2.0.0/16");
    assert!(tun.push(&numbered(0)).unwrap());
    wait_until("the live peer", Duration::from_secs(10), || arrived.pop().unwrap().is_some());
    let mut send = make(&pair, initiations());
    let before = resident_kib();
    let stop = AtomicBool::new(false);
    let flooded = AtomicU64::new(0);
    let (took, (sent, received)) = thread::scope(|scope| {
        scope.spawn(|| flooded.store(flood(rate, &stop, &mut send), Ordering::Relaxed));
        let talk = scope.spawn(|| talk(&tun, &arrived, &stop));
        let took = newcomers(&pair, seconds);
        stop.store(true, Ordering::Relaxed);
        (took, talk.join().unwrap())
    });
    let grown = resident_kib().saturating_sub(before);
    let snapshot = victim.snapshot();
    let at = |share: usize| took[(took.len() * share / 100).min(took.len() - 1)];
    let lost = sent - received;
    println!(
        "{name}: {} in {seconds} s ({} cookies sent); {} handshakes: p50 {:.1?} p99 {:.1?}; live traffic lost {lost} of \
         {sent}; memory +{grown} KiB; drops {:?}",
        flooded.load(Ordering::Relaxed),
        snapshot.lanes[0].cookies_sent,
        took.len(),
        at(50),
        at(99),
        snapshot.drops
    );
    assert!(snapshot.drops.count(DropReason::CookieDemanded) > 0, "the flood did not reach the limit");
    assert!(victim.is_running() && live.is_running());
    assert!(grown < 16 << 10, "memory grew by {grown} KiB");
    if std::env::var_os("MESH_FLOOD_SECONDS").is_some() {
        assert!(at(99) < limit, "p99 of a handshake: {:?}", at(99));
        assert!(lost * 100 < sent, "live traffic: {lost} of {sent} lost");
    }
    snapshot.drops
}

#[test]
fn made_up_sources_keep_nobody_out() {
    survive("made-up sources", Duration::from_secs(3), |pair, initiations| {
        pair.a.ip("route add 10.66.0.0/16 via 192.0.2.2");
        let open = || Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::from(255)));
        let socket = pair.b.enter(open).unwrap();
        let to = SocketAddr::from(VICTIM).into();
        Box::new(move |number| {
            let packet = spoofed(number, &initiations[number as usize % initiations.len()]);
            // A full buffer loses some of the flood.
            let _ = socket.send_to(&packet, &to);
        })
    });
}

#[test]
fn one_source_keeps_nobody_else_out() {
    let drops = survive("one source", Duration::from_secs(1), |pair, initiations| {
        pair.b.ip("address add 192.0.2.3/24 dev u0");
        let socket = pair.b.enter(|| UdpSocket::bind("192.0.2.3:9")).unwrap();
        Box::new(move |number| {
            let _ = socket.send_to(&initiations[number as usize % initiations.len()], VICTIM);
        })
    });
    // A few cookies for it, and no more work.
    assert!(drops.count(DropReason::HandshakeFlood) > drops.count(DropReason::CookieDemanded), "{drops:?}");
}
