//! The control socket, line by line.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

mod lab;

use std::{
    io::{BufRead as _, BufReader, Write as _},
    os::unix::net::UnixStream,
};

use lab::{Device, Kind, Lab, PATIENCE};

const KEY: &str = "a8dac1d8a70a751f0f699fb14ba1cff7b79cf4fbd8f09f44c6e6a90d0369604f";
const PEER: &str = "662e14fd594556f522604703340351258903b64f35553763f19426ab2a515c58";

fn ask(device: &Device<'_>, lines: &str) -> String {
    device.uapi(&format!("{lines}\n\n"))
}

#[test]
fn what_is_set_is_told() {
    let lab = Lab::new();
    let device = Device::start(&lab.a, &Kind::MeshWg);
    assert_eq!(ask(&device, "get=1"), "listen_port=0\nerrno=0\n\n");
    let psk = "188515093e952f5f22e865cef3012e72f8b5f0b598ac0309d5dacce3b70fcf52";
    let set = format!(
        "set=1\nprivate_key={KEY}\nlisten_port=12912\nfwmark=4660\nreplace_peers=true\npublic_key={PEER}\n\
         preshared_key={psk}\nendpoint=[2607:5300:60:6b0::c05f:543]:2468\npersistent_keepalive_interval=111\n\
         replace_allowed_ips=true\nallowed_ip=192.168.4.6/32\nallowed_ip=10.10.10.9/8\nallowed_ip=abcd::/16\n\
         protocol_version=1"
    );
    assert_eq!(ask(&device, &set), "errno=0\n\n");
    let told = format!(
        "private_key={KEY}\nlisten_port=12912\nfwmark=4660\npublic_key={PEER}\npreshared_key={psk}\nprotocol_version=1\n\
         endpoint=[2607:5300:60:6b0::c05f:543]:2468\nlast_handshake_time_sec=0\nlast_handshake_time_nsec=0\ntx_bytes=0\n\
         rx_bytes=0\npersistent_keepalive_interval=111\nallowed_ip=192.168.4.6/32\nallowed_ip=10.0.0.0/8\n\
         allowed_ip=abcd::/16\nerrno=0\n\n"
    );
    assert_eq!(ask(&device, "get=1"), told);
    // Only of peers that are there; away with the rest.
    let other = PEER.replace("66", "67");
    assert_eq!(
        ask(&device, &format!("set=1\npublic_key={other}\nupdate_only=true\nallowed_ip=1.0.0.0/8")),
        "errno=0\n\n"
    );
    assert_eq!(ask(&device, "get=1"), told);
    let less = format!("public_key={PEER}\nupdate_only=true\npreshared_key=\npersistent_keepalive_interval=0");
    assert_eq!(ask(&device, &format!("set=1\nfwmark=0\n{less}\nreplace_allowed_ips=true")), "errno=0\n\n");
    let now = ask(&device, "get=1");
    for line in ["fwmark", "allowed_ip"] {
        assert!(!now.contains(line), "{now}");
    }
    assert!(now.contains(&format!("preshared_key={}\n", "0".repeat(64))), "{now}");
    assert_eq!(ask(&device, &format!("set=1\npublic_key={PEER}\nremove=true\nprivate_key=")), "errno=-22\n\n");
    assert_eq!(ask(&device, &format!("set=1\nprivate_key=\npublic_key={PEER}\nremove=true")), "errno=0\n\n");
    assert_eq!(ask(&device, "get=1"), "listen_port=12912\nerrno=0\n\n");
}

#[test]
fn mistakes_have_their_numbers_and_change_nothing() {
    let lab = Lab::new();
    let device = Device::start(&lab.a, &Kind::MeshWg);
    let before = ask(&device, "get=1");
    let of_peer = |line: &str| format!("set=1\nlisten_port=9\npublic_key={PEER}\n{line}");
    let invalid = [
        "set=1\nprivate_key=abc".to_owned(),
        format!("set=1\nprivate_key={KEY}00"),
        "set=1\nlisten_port=65536".into(),
        "set=1\nlisten_port=-1".into(),
        "set=1\nlisten_port=".into(),
        "set=1\nfwmark=4294967296".into(),
        "set=1\nreplace_peers=false".into(),
        "set=1\npublic_key=".into(),
        "set=1\nallowed_ip=10.0.0.0/8".into(),
        "set=1\nlisten_port=9\nno_such_key=1".into(),
        of_peer("listen_port=1"),
        of_peer("remove=false"),
        of_peer("update_only=1"),
        of_peer("preshared_key=zz"),
        of_peer("endpoint=192.0.2.1"),
        of_peer("endpoint=example.org:1"),
        of_peer("endpoint=[fe80::1%no-such-link]:1"),
        of_peer("persistent_keepalive_interval=65536"),
        of_peer("persistent_keepalive_interval=off"),
        of_peer("allowed_ip=10.0.0.0/33"),
        of_peer("allowed_ip=10.0.0/8"),
        of_peer("allowed_ip=--10.0.0.0/8"),
        of_peer("protocol_version=2"),
        of_peer("rx_bytes=1"),
        "get=1\nprivate_key=1".into(),
    ];
    for request in invalid {
        assert_eq!(ask(&device, &request), "errno=-22\n\n", "{request}");
    }
    for request in ["set=1\nlisten_port", "delete=1", "get=2", "x", "set=1\nlisten_port=9\n=\u{fffd}"] {
        let errno = ask(&device, request);
        assert!(["errno=-71\n\n", "errno=-22\n\n"].contains(&errno.as_str()), "{request}: {errno}");
    }
    assert_eq!(device.uapi(&format!("set=1\nlisten_port={}\n\n", "1".repeat(5_000))), "errno=-71\n\n");
    assert_eq!(device.uapi("set=1\nlisten_port=9\n"), "", "cut short: nothing is done");
    assert_eq!(ask(&device, "get=1"), before);
    device.ip("link set {} up");
    let taken = lab.a.spawn(|| std::net::UdpSocket::bind("0.0.0.0:0").unwrap()).join().unwrap();
    let port = taken.local_addr().unwrap().port();
    assert_eq!(ask(&device, &format!("set=1\nfwmark=7\nlisten_port={port}")), "errno=-98\n\n");
    assert!(!ask(&device, "get=1").contains("fwmark"));
}

#[test]
fn a_connection_carries_many_operations() {
    let lab = Lab::new();
    let device = Device::start(&lab.a, &Kind::MeshWg);
    let mut stream = UnixStream::connect(device.socket()).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut answer = || {
        let mut text = String::new();
        while !text.ends_with("\n\n") {
            assert!(reader.read_line(&mut text).unwrap() > 0, "{text}");
        }
        text
    };
    for port in 1000..1100u16 {
        write!(stream, "set=1\nlisten_port={port}\n\nget=1\n\n").unwrap();
        assert_eq!(answer(), "errno=0\n\n");
        assert_eq!(answer(), format!("listen_port={port}\nerrno=0\n\n"));
    }
    // After a mistake the next operation counts again; it is told at once.
    write!(stream, "set=1\nlisten_port=no\n").unwrap();
    assert_eq!(answer(), "errno=-22\n\n");
    write!(stream, "fwmark=7\nanything\n\nget=1\n\n").unwrap();
    assert_eq!(answer(), "listen_port=1099\nerrno=0\n\n");
}

#[test]
fn many_clients_at_a_time() {
    let lab = Lab::new();
    let device = Device::start(&lab.a, &Kind::MeshWg);
    let idle: Vec<UnixStream> = (0..20).map(|_| UnixStream::connect(device.socket()).unwrap()).collect();
    std::thread::scope(|scope| {
        for client in 0..8u8 {
            let device = &device;
            scope.spawn(move || {
                for n in 0..50u8 {
                    let key = format!("{client:02x}{n:02x}{}", &PEER[4..]);
                    let set = format!("set=1\npublic_key={key}\nallowed_ip=10.{client}.{n}.0/24");
                    assert_eq!(ask(device, &set), "errno=0\n\n");
                }
            });
        }
    });
    assert_eq!(ask(&device, "get=1").matches("public_key=").count(), 400);
    drop(idle);
}
