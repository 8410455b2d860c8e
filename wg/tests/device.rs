//! What the kernel's WireGuard device does, mesh-wg does too.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

mod lab;

use std::{fmt::Write as _, fs, io::Write as _};

use lab::{Device, Key, Kind, Lab, find, within};

/// Two devices that know each other: 10.9.0.1 on port 7001 and 10.9.0.2 on port 7002.
fn pair<'a>(lab: &'a Lab, other: &Kind) -> (Device<'a>, Device<'a>) {
    let (ours, theirs) = (Device::start(&lab.a, &Kind::MeshWg), Device::start(&lab.b, other));
    for (own, other, host) in [(&ours, &theirs, 2), (&theirs, &ours, 1)] {
        own.conf("setconf", &conf(own, &other.key, host));
        own.up(3 - host);
    }
    lab.a.ping("10.9.0.2");
    (ours, theirs)
}

fn conf(own: &Device<'_>, peer: &Key, host: u8) -> String {
    format!(
        "[Interface]\nPrivateKey = {}\nListenPort = 700{}\n[Peer]\nPublicKey = {}\n\
         AllowedIPs = 10.9.0.{host}/32, fd09::{host}/128\nEndpoint = 192.0.2.{host}:700{host}\n",
        own.key.secret,
        3 - host,
        peer.public
    )
}

/// Their implementation where it is installed, else our own.
fn other() -> Kind {
    find("wireguard-go").map_or(Kind::MeshWg, Kind::WireguardGo)
}

#[test]
fn each_end_follows_the_other_when_it_moves() {
    let lab = Lab::new();
    let (ours, theirs) = pair(&lab, &other());
    theirs.wg("set {} listen-port 7102").unwrap();
    lab.b.ping("10.9.0.1");
    within("ours follows", || ours.shown("endpoints", &theirs.key.public) == "192.0.2.2:7102");
    ours.wg("set {} listen-port 7101").unwrap();
    lab.a.ping("10.9.0.2");
    within("theirs follows", || theirs.shown("endpoints", &ours.key.public) == "192.0.2.1:7101");
    // To another address, by hand and back by traffic.
    lab.b.ip("address add 192.0.2.22/24 dev u0");
    ours.wg(&format!("set {{}} peer {} endpoint 192.0.2.22:7102", theirs.key.public)).unwrap();
    lab.a.ping("10.9.0.2");
    assert_eq!(ours.shown("endpoints", &theirs.key.public), "192.0.2.22:7102");
    // Another port of the system's choice.
    ours.wg("set {} listen-port 0").unwrap();
    lab.a.ping("10.9.0.2");
    assert!(!["0", "7101"].contains(&ours.wg("show {} listen-port").unwrap().trim()));
}

#[test]
fn answers_leave_from_the_address_that_was_asked() {
    let lab = Lab::new();
    let (ours, theirs) = pair(&lab, &other());
    lab.a.ip("address add 192.0.2.11/24 dev u0");
    theirs.wg(&format!("set {{}} peer {} endpoint 192.0.2.11:7001", ours.key.public)).unwrap();
    lab.b.ping("10.9.0.1");
    for _ in 0..3 {
        lab.b.ping("10.9.0.1");
        assert_eq!(theirs.shown("endpoints", &ours.key.public), "192.0.2.11:7001", "it answers from there");
    }
    lab.a.ip("address del 192.0.2.11/24 dev u0");
    lab.a.ping("10.9.0.2");
    within("the other address serves", || theirs.shown("endpoints", &ours.key.public) == "192.0.2.1:7001");
}

#[test]
fn another_private_key_makes_all_sessions_anew() {
    let lab = Lab::new();
    let (ours, theirs) = pair(&lab, &other());
    let (old, new) = (ours.key.public.clone(), Key::new());
    ours.conf("addconf", &format!("[Interface]\nPrivateKey = {}\n", new.secret));
    assert_eq!(ours.wg("show {} public-key").unwrap().trim(), new.public);
    assert!(!lab.a.is_answered("10.9.0.2", ""), "the old session is over");
    theirs.wg(&format!("set {{}} peer {old} remove")).unwrap();
    let allowed = "allowed-ips 10.9.0.1/32,fd09::1/128 endpoint 192.0.2.1:7001";
    theirs.wg(&format!("set {{}} peer {} {allowed}", new.public)).unwrap();
    lab.b.ping("10.9.0.1");
    // A peer with our own key does not come in, and goes when the key becomes ours.
    let third = Key::new();
    ours.wg(&format!(
        "set {{}} peer {} allowed-ips 10.9.3.0/24 peer {} allowed-ips 10.9.4.0/24",
        third.public, new.public
    ))
    .unwrap();
    let peers = || ours.wg("show {} peers").unwrap();
    assert!(peers().contains(&third.public) && !peers().contains(&new.public));
    ours.conf("addconf", &format!("[Interface]\nPrivateKey = {}\n", third.secret));
    assert!(!peers().contains(&third.public) && peers().contains(&theirs.key.public));
    ours.conf("addconf", &format!("[Interface]\nPrivateKey = {}\n", new.secret));
    lab.a.ping("10.9.0.2");
    // Without a key it carries nothing, and knows its peers all the same.
    ours.uapi("set=1\nprivate_key=\n\n");
    assert_eq!(ours.wg("show {} private-key").unwrap().trim(), "(none)");
    assert!(!lab.a.is_answered("10.9.0.2", ""));
    ours.conf("addconf", &format!("[Interface]\nPrivateKey = {}\n", new.secret));
    lab.a.ping("10.9.0.2");
}

#[test]
fn an_allowed_ip_is_the_last_claimers_and_filters_by_the_longest_prefix() {
    let lab = Lab::new();
    let (ours, theirs) = pair(&lab, &other());
    let second = Key::new();
    let them = &theirs.key.public;
    ours.wg(&format!("set {{}} peer {} allowed-ips 10.9.0.2/32", second.public)).unwrap();
    assert_eq!(ours.shown("allowed-ips", them), "fd09::2/128");
    assert!(!lab.b.is_answered("10.9.0.1", ""), "the source is another peer's now");
    ours.wg(&format!("set {{}} peer {them} allowed-ips 10.9.0.0/24")).unwrap();
    assert!(!lab.b.is_answered("10.9.0.1", ""), "the longest prefix over all peers is another's");
    ours.wg(&format!("set {{}} peer {} remove", second.public)).unwrap();
    lab.b.ping("10.9.0.1");
    // One by one, as newer wg(8) does; what another peer has is not this one's to lose.
    let hex = them_hex(&ours);
    let answer = ours.uapi(&format!("set=1\npublic_key={hex}\nallowed_ip=-10.9.0.0/24\nallowed_ip=-10.77.0.0/16\n\n"));
    assert_eq!(answer, "errno=0\n\n");
    assert_eq!(ours.shown("allowed-ips", them), "(none)");
    // Everything, both families.
    ours.wg(&format!("set {{}} peer {them} allowed-ips 0.0.0.0/0,::/0")).unwrap();
    lab.a.ping("10.9.0.2");
    lab.b.ping("fd09::1");
}

/// The only peer's key as the control socket has it.
fn them_hex(device: &Device<'_>) -> String {
    let all = device.uapi("get=1\n\n");
    all.lines().find_map(|line| line.strip_prefix("public_key=")).unwrap().to_owned()
}

#[test]
fn the_mark_is_on_all_it_sends_and_changes_at_run_time() {
    let lab = Lab::new();
    let (ours, _theirs) = pair(&lab, &other());
    lab.a.ip("rule add fwmark 0x1234 unreachable");
    ours.wg("set {} fwmark 0x1234").unwrap();
    assert!(!lab.a.is_answered("10.9.0.2", ""));
    assert_eq!(ours.wg("show {} fwmark").unwrap().trim(), "0x1234");
    ours.wg("set {} fwmark 0").unwrap();
    lab.a.ping("10.9.0.2");
    ours.wg("set {} fwmark 0x1234").unwrap();
    // Also of a socket that is opened later.
    ours.ip("link set {} down");
    ours.ip("link set {} up");
    assert!(!lab.a.is_answered("10.9.0.2", ""));
    lab.a.ip("rule del fwmark 0x1234");
    lab.a.ping("10.9.0.2");
}

#[test]
fn the_socket_is_open_while_the_link_is_up() {
    let lab = Lab::new();
    let (ours, theirs) = pair(&lab, &other());
    let listens = || lab.a.exec("ss -Hlun").contains(":7001");
    within("it listens", listens);
    ours.ip("link set {} down");
    within("it listens no more", || !listens());
    let before = ours.shown("transfer", &theirs.key.public);
    assert_ne!(before, "0\t0", "counters stay");
    assert_ne!(ours.shown("latest-handshakes", &theirs.key.public), "0");
    // Meanwhile somebody else has the port.
    let taken = lab.a.spawn(|| std::net::UdpSocket::bind("0.0.0.0:7001").unwrap()).join().unwrap();
    ours.wg("set {} listen-port 7201").unwrap();
    ours.ip("link set {} up");
    lab.a.ping("10.9.0.2");
    let refused = ours.wg("set {} listen-port 7001").unwrap_err();
    assert!(refused.contains("Address already in use"), "{refused}");
    assert_eq!(ours.wg("show {} listen-port").unwrap().trim(), "7201");
    drop(taken);
    ours.wg("set {} listen-port 7001").unwrap();
    lab.a.ping("10.9.0.2");
}

#[test]
fn a_packet_for_nobody_is_answered() {
    let lab = Lab::new();
    let (ours, theirs) = pair(&lab, &other());
    ours.ip("route add 10.10.0.0/16 dev {}");
    let says = |address: &str| {
        let output = lab.a.command(&format!("ping -n -c 1 -W 2 {address}")).output().unwrap();
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    assert!(says("10.10.0.1").contains("Destination Host Unreachable"), "nobody has it");
    let lonely = Key::new();
    ours.wg(&format!("set {{}} peer {} allowed-ips 10.10.0.0/16", lonely.public)).unwrap();
    assert!(says("10.10.0.1").contains("Destination Host Unreachable"), "a peer without endpoint has it");
    drop(theirs);
}

#[test]
fn a_device_whose_endpoint_lies_inside_itself_does_not_blow_up() {
    let lab = Lab::new();
    let (ours, theirs) = pair(&lab, &other());
    let sent = || -> u64 {
        let statistics = lab.a.exec(&format!("cat /sys/class/net/{}/statistics/tx_bytes", ours.name));
        statistics.trim().parse().unwrap()
    };
    let listener = lab.b.spawn(|| std::net::TcpListener::bind("10.9.0.2:0").unwrap()).join().unwrap();
    let target = listener.local_addr().unwrap();
    let stream = lab.a.spawn(move || std::net::TcpStream::connect(target).unwrap()).join().unwrap();
    stream.set_nonblocking(true).unwrap();
    // There is a session; now its datagrams are routed into the device, also in trains.
    ours.wg(&format!("set {{}} peer {} allowed-ips 10.9.0.2/32,fd09::2/128,192.0.2.2/32", theirs.key.public)).unwrap();
    ours.ip("route add 192.0.2.2/32 dev {}");
    let before = sent();
    let written = (&stream).write(&vec![7; 1 << 20]).unwrap();
    assert!(written > 10_000, "{written}");
    for size in [56, 1300, 1392] {
        assert!(!lab.a.is_answered("10.9.0.2", &format!("-s {size}")));
    }
    let after = sent();
    assert!(after - before < 700_000, "{} bytes went round", after - before);
    ours.ip("route del 192.0.2.2/32 dev {}");
    lab.a.ping("10.9.0.2");
}

#[test]
fn a_tunnel_runs_inside_a_tunnel() {
    let lab = Lab::new();
    let (_ours, _theirs) = pair(&lab, &other());
    let (inner, far) = (Device::start(&lab.a, &Kind::MeshWg), Device::start(&lab.b, &other()));
    for (own, other, host) in [(&inner, &far, 2), (&far, &inner, 1)] {
        let text = conf(own, &other.key, host).replace("10.9.0.", "10.8.0.").replace("192.0.2.", "10.9.0.");
        own.conf("setconf", &text.replace("= 700", "= 710").replace(":700", ":710").replace("fd09::", "fd08::"));
        own.ip(&format!("address add 10.8.0.{}/24 dev {{}}", 3 - host));
        own.ip("link set {} mtu 1340 up");
    }
    lab.a.ping("10.8.0.2");
    lab.b.ping_with("10.8.0.1", "-s 1300 -M do");
    lab::transfer(&lab.a, &lab.b, "10.8.0.2", 1 << 20);
}

#[test]
fn a_hundred_thousand_allowed_ips() {
    let lab = Lab::new();
    let ours = Device::start(&lab.a, &Kind::MeshWg);
    let (many, other) = (Key::new(), Key::new());
    let mut text = format!("[Interface]\nPrivateKey = {}\n[Peer]\nPublicKey = {}\n", ours.key.secret, many.public);
    for n in 0..130_000u32 {
        let [_, a, b, c] = n.to_be_bytes();
        writeln!(text, "AllowedIPs = 10.{a}.{b}.{c}/32").unwrap();
    }
    ours.conf("setconf", &text);
    ours.ip("link set {} up");
    assert_eq!(ours.shown("allowed-ips", &many.public).split_whitespace().count(), 130_000);
    // All of them to another peer, and away.
    ours.conf("addconf", &text.replace(&many.public, &other.public));
    assert_eq!(ours.shown("allowed-ips", &many.public), "(none)");
    ours.wg(&format!("set {{}} peer {} remove", other.public)).unwrap();
    assert_eq!(ours.wg("show {} allowed-ips").unwrap().trim(), format!("{}\t(none)", many.public));
}

#[test]
fn keys_of_low_order_are_listed_and_never_talked_to() {
    let lab = Lab::new();
    let (ours, theirs) = pair(&lab, &other());
    let zero = "00".repeat(32);
    let one = format!("01{}", "00".repeat(31));
    for key in [&zero, &one] {
        let request = format!("set=1\npublic_key={key}\nendpoint=192.0.2.2:9\nallowed_ip=10.66.0.0/16\n\n");
        assert_eq!(ours.uapi(&request), "errno=0\n\n");
    }
    assert!(ours.uapi("get=1\n\n").contains(&format!("public_key={one}\n")));
    ours.ip("route add 10.66.0.0/16 dev {}");
    assert!(!lab.a.is_answered("10.66.0.1", ""));
    assert!(ours.uapi("get=1\n\n").split("public_key=").filter(|peer| peer.starts_with("0")).all(|peer| {
        !peer.starts_with(&zero[..60]) && !peer.starts_with(&one[..60]) || peer.contains("tx_bytes=0\n")
    }));
    lab.a.ping("10.9.0.2");
    drop(theirs);
}

#[test]
fn the_mtu_is_the_links() {
    let lab = Lab::new();
    let (ours, theirs) = pair(&lab, &other());
    assert!(ours.ip("link show {}").contains("mtu 1420"));
    for side in [&lab.a, &lab.b] {
        side.ip("link set u0 mtu 9000");
    }
    for device in [&ours, &theirs] {
        device.ip("link set {} mtu 8900");
    }
    within("the peer takes large packets", || lab.a.is_answered("10.9.0.2", "-M do -s 8872"));
    for mtu in [1280, 600, 68] {
        ours.ip(&format!("link set {{}} mtu {mtu}"));
        let fitting = format!("-M do -s {}", mtu - 28);
        within("packets of that size pass", || lab.a.is_answered("10.9.0.2", &fitting));
    }
}

#[test]
fn a_device_in_another_namespace_keeps_its_socket_where_it_was_made() {
    let lab = Lab::new();
    let (ours, theirs) = pair(&lab, &other());
    let inside = lab::Namespace::new(format!("{}i", lab.a.name));
    let answers = |host: &str| within(host, || inside.is_answered(host, ""));
    for (name, netns) in
        [(&ours.name, &inside.name), (&"moved".to_owned(), &lab.a.name), (&"moved".to_owned(), &inside.name)]
    {
        let from = if *netns == inside.name { &lab.a } else { &inside };
        from.ip(&format!("link set {name} netns {netns} name moved"));
    }
    inside.ip("address add 10.9.0.1/24 dev moved");
    inside.ip("link set moved up");
    answers("10.9.0.2");
    assert!(lab.a.exec("ss -Hlun").contains(":7001") && !inside.exec("ss -Hlun").contains(":7001"));
    inside.ip("link set moved down");
    within("the socket is closed", || !lab.a.exec("ss -Hlun").contains(":7001"));
    inside.ip("link set moved up");
    answers("10.9.0.2");
    let mut ours = ours;
    inside.ip("link del moved");
    ours.ends();
    drop(theirs);
}

#[test]
fn it_ends_with_its_device_or_its_socket() {
    let lab = Lab::new();
    let mut first = Device::start(&lab.a, &Kind::MeshWg);
    first.ip("link del {}");
    first.ends();
    assert!(!first.socket().exists(), "the socket goes with it");
    let mut second = Device::start(&lab.a, &Kind::MeshWg);
    fs::remove_file(second.socket()).unwrap();
    second.ends();
    assert!(!lab.a.ip("link show").contains(&second.name), "the device goes with it");
}

#[test]
fn its_socket_is_roots_alone_and_has_one_server() {
    use std::os::unix::fs::PermissionsExt as _;
    let lab = Lab::new();
    let ours = Device::start(&lab.a, &Kind::MeshWg);
    assert_eq!(fs::metadata(ours.socket()).unwrap().permissions().mode() & 0o777, 0o600);
    let mut again = lab.b.command(env!("CARGO_BIN_EXE_mesh-wg"));
    let output = again.args(["-f", &ours.name]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("another process serves"));
    assert!(ours.wg("show {}").is_ok());
}

#[test]
fn it_goes_into_the_background_when_it_is_ready() {
    let lab = Lab::new();
    let name = format!("mq{}", std::process::id() % 1_000_000);
    let program = env!("CARGO_BIN_EXE_mesh-wg");
    lab.a.exec(&format!("{program} {name}"));
    lab.a.exec(&format!("wg show {name}"));
    let output = lab.a.command(&format!("{program} {name}")).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "its failure is told");
    assert!(!output.stderr.is_empty());
    lab.a.ip(&format!("link del {name}"));
    within("the socket is gone", || !std::path::Path::new(&format!("/var/run/wireguard/{name}.sock")).exists());
}

#[test]
fn offloads_are_tried_before_it_starts_and_what_cannot_be_tried_is_said() {
    let (lab, directory) = (Lab::new(), tempfile::tempdir().unwrap());
    for (prefix, is_tried) in [("", true), ("setpriv --bounding-set=-sys_admin ", false)] {
        let name = format!("mo{}", std::process::id() % 1_000_000);
        let log = directory.path().join(&name);
        let mut command = lab.a.command(&format!("{prefix}{} -f {name}", env!("CARGO_BIN_EXE_mesh-wg")));
        let mut child = command.env("LOG_LEVEL", "verbose").stderr(fs::File::create(&log).unwrap()).spawn().unwrap();
        let said = |text: &str| fs::read_to_string(&log).unwrap().contains(text);
        within("it is ready", || said("device ready"));
        let log = fs::read_to_string(&log).unwrap();
        assert_eq!(log.contains("offloads were tried"), is_tried, "{log}");
        assert_eq!(log.contains("offloads were not tried on this kernel"), !is_tried, "{log}");
        lab.a.ip(&format!("link del {name}"));
        child.wait().unwrap();
    }
}

#[test]
fn wg_quick_brings_it_up_and_takes_it_down() {
    let lab = Lab::new();
    let theirs = Device::start(&lab.b, &other());
    let (key, directory) = (Key::new(), tempfile::tempdir().unwrap());
    let name = format!("mk{}", std::process::id() % 1_000_000);
    let path = directory.path().join(format!("{name}.conf"));
    let text = format!(
        "[Interface]\nPrivateKey = {}\nListenPort = 7001\nAddress = 10.9.0.1/24, fd09::1/64\nMTU = 1400\n\
         [Peer]\nPublicKey = {}\nAllowedIPs = 0.0.0.0/0, ::/0\nEndpoint = 192.0.2.2:7002\nPersistentKeepalive = 25\n",
        key.secret, theirs.key.public
    );
    fs::write(&path, &text).unwrap();
    let peer = format!(
        "[Interface]\nPrivateKey = {}\nListenPort = 7002\n[Peer]\nPublicKey = {}\n",
        theirs.key.secret, key.public
    );
    theirs.conf("setconf", &format!("{peer}AllowedIPs = 10.9.0.1/32, fd09::1/128\n"));
    theirs.up(2);
    let quick = |verb: &str| {
        let mut command = lab.a.command(&format!("wg-quick {verb}"));
        lab::run(command.arg(&path).env("WG_QUICK_USERSPACE_IMPLEMENTATION", env!("CARGO_BIN_EXE_mesh-wg")))
    };
    quick("up");
    // All that is not the underlay's goes through the tunnel: wg-quick marks what the device itself sends.
    lab.b.ip("address add 10.200.0.1/32 dev lo");
    lab.a.ping("10.200.0.1");
    lab.a.ping("fd09::2");
    let stripped = lab.a.exec(&format!("wg-quick strip {}", path.display()));
    // Without the mark that wg-quick chose, wg(8) takes it away.
    let marked = stripped.replace("[Interface]\n", "[Interface]\nFwMark = 51820\n");
    lab::run_with_input(&mut lab.a.command(&format!("wg syncconf {name} /dev/stdin")), &marked);
    lab.a.ping("10.200.0.1");
    quick("down");
    within("the socket is gone", || !std::path::Path::new(&format!("/var/run/wireguard/{name}.sock")).exists());
    assert!(!lab.a.ip("link show").contains(&name));
    assert!(!lab.a.ip("rule show").contains("51820"), "no rule is left");
}
