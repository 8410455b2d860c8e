//! mesh-wg beside a kernel's WireGuard in a small virtual machine, which `make interop` prepares.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

mod lab;

use std::{
    env,
    io::{Read as _, Write as _},
    net::TcpStream,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use lab::{Device, Key, Kind, Lab, Namespace, PATIENCE, run, within};

/// How long a machine without hardware help may take to boot, and a command in it to end.
const BOOT: Duration = Duration::from_secs(240);
const COMMAND: Duration = Duration::from_secs(60);

/// A virtual machine with one interface, 192.0.2.2 and 2001:db8::2.
struct Machine {
    qemu: Child,
    serial: UnixStream,
    _directory: tempfile::TempDir,
}

impl Machine {
    /// Boots one on the tap device `tap` of `ns`.
    fn boot(files: &Path, ns: &Namespace, tap: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("serial");
        let mut command =
            ns.command("qemu-system-x86_64 -accel tcg,tb-size=64 -cpu qemu64,+rdrand -m 192 -smp 1 -nodefaults");
        command.args("-machine pc,usb=off,vmport=off -no-user-config -display none -no-reboot".split(' '));
        command.arg("-kernel").arg(files.join("vmlinuz")).arg("-initrd").arg(files.join("initrd"));
        command.args(["-append", "console=ttyS0 quiet panic=-1 mitigations=off tsc=reliable no_timer_check"]);
        command.args(["-serial", "null", "-serial", &format!("unix:{},server=on,wait=off", socket.display())]);
        command.args(["-netdev", &format!("tap,id=n,ifname={tap},script=no,downscript=no")]);
        command.args(["-device", "virtio-net-pci,netdev=n,romfile="]);
        let qemu = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        within("the machine starts", || UnixStream::connect(&socket).is_ok());
        let serial = UnixStream::connect(&socket).unwrap();
        let mut machine = Self { qemu, serial, _directory: directory };
        // Asked until it answers, for what is said before somebody listens is lost; the last question's answer is the last.
        machine.serial.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
        let deadline = Instant::now() + BOOT;
        for attempt in 1.. {
            assert!(Instant::now() < deadline, "the machine does not boot");
            if machine.answer(&format!("echo up{attempt}"), &format!("up{attempt}\n\nRC=0\n")).is_some() {
                break;
            }
        }
        machine.serial.set_read_timeout(Some(COMMAND)).unwrap();
        machine.exec("ip addr add 192.0.2.2/24 dev eth0; ip addr add 2001:db8::2/64 dev eth0 nodad");
        machine
    }

    /// Runs a command in it and fails unless it succeeds.
    fn exec(&mut self, command: &str) -> String {
        let answer = self.answer(&format!("{command}; echo CODE=$?"), "\nRC=0\n");
        let text = answer.unwrap_or_else(|| panic!("no answer to: {command}"));
        let (text, code) = text.rsplit_once("CODE=").unwrap();
        assert!(code.starts_with("0\n"), "{command}: {text}");
        text.to_owned()
    }

    /// Sends a line and reads until the answer `ends` so; `None` if it does not in time.
    fn answer(&mut self, line: &str, ends: &str) -> Option<String> {
        self.serial.write_all(format!("{line}\n").as_bytes()).ok()?;
        let (mut all, mut part) = (Vec::new(), [0; 4096]);
        loop {
            let count = self.serial.read(&mut part).ok().filter(|count| *count > 0)?;
            all.extend_from_slice(&part[..count]);
            let text = String::from_utf8_lossy(&all).replace("\r\n", "\n");
            if text.ends_with(ends) {
                return Some(text);
            }
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

fn files() -> Result<PathBuf, &'static str> {
    let prepared = Path::new(env!("CARGO_BIN_EXE_mesh-wg")).parent().unwrap().parent().unwrap().join("interop/vm");
    let files = env::var_os("MESH_WG_VM").map_or(prepared, PathBuf::from);
    if Command::new("qemu-system-x86_64").arg("--version").output().is_err() {
        return Err("qemu-system-x86_64 is not installed");
    }
    if !files.join("initrd").is_file() {
        return Err("the machine is not prepared: make interop");
    }
    Ok(files)
}

#[test]
fn a_kernels_device_and_ours() {
    let files = match files() {
        Ok(files) => files,
        Err(reason) => return eprintln!("SKIPPED: mesh-wg beside a kernel's WireGuard: {reason}"),
    };
    let lab = Lab::new();
    lab.a.ip("link del u0");
    lab.a.ip("tuntap add mode tap name u0");
    lab.a.ip("address add 192.0.2.1/24 dev u0");
    lab.a.ip("address add 2001:db8::1/64 dev u0 nodad");
    lab.a.ip("link set u0 up");
    let mut machine = Machine::boot(&files, &lab.a, "u0");
    lab.a.ping("192.0.2.2");

    let (ours, kernel) = (Device::start(&lab.a, &Kind::MeshWg), Key::new());
    ours.conf("setconf", &format!("[Interface]\nPrivateKey = {}\nListenPort = 7001\n", ours.key.secret));
    ours.up(1);
    machine.exec(&format!("echo {} >/run/key; ip link add wg0 type wireguard", kernel.secret));
    machine.exec("wg set wg0 private-key /run/key listen-port 7002");
    machine.exec("ip addr add 10.9.0.2/24 dev wg0; ip addr add fd09::2/64 dev wg0 nodad; ip link set wg0 up");
    both_ways(&lab, &ours, &mut machine, &kernel);
    each_follows(&lab, &ours, &mut machine, &kernel);
    bytes_arrive(&lab, &mut machine);
    // What each of them counts is what the other does.
    within("both count the same bytes", || {
        let (own, theirs) = (ours.shown("transfer", &kernel.public), machine.exec("wg show wg0 transfer"));
        let (received, sent) = own.split_once('\t').unwrap();
        theirs.trim().ends_with(&format!("\t{sent}\t{received}"))
    });
    match env::var_os("MESH_WG_REKEY") {
        Some(_) => sessions_are_renewed(&lab, &ours, &kernel),
        None => eprintln!("SKIPPED: a new session with a kernel after two minutes: MESH_WG_REKEY is not set"),
    }
}

/// After two minutes there is another session, and no packet is lost over it.
fn sessions_are_renewed(lab: &Lab, ours: &Device<'_>, kernel: &Key) {
    let before = ours.shown("latest-handshakes", &kernel.public);
    let said = lab.a.exec("ping -n -q -c 260 -i 0.5 -W 5 10.9.0.2");
    assert!(said.contains(" 0% packet loss"), "{said}");
    assert_ne!(ours.shown("latest-handshakes", &kernel.public), before);
}

/// Handshakes begun by either, over both underlays, with and without preshared key.
fn both_ways(lab: &Lab, ours: &Device<'_>, machine: &mut Machine, kernel: &Key) {
    let preshared = run(Command::new("wg").arg("genpsk"));
    machine.exec(&format!("echo {} >/run/psk; : >/run/nopsk", preshared.trim()));
    for [near, far] in [["192.0.2.1", "192.0.2.2"], ["[2001:db8::1]", "[2001:db8::2]"]] {
        for with_key in [false, true] {
            for ours_first in [true, false] {
                eprintln!("a kernel's, over {near}, preshared key: {with_key}, ours first: {ours_first}");
                ours.wg(&format!("set {{}} peer {} remove", kernel.public)).unwrap();
                machine.exec(&format!("wg set wg0 peer {} remove", ours.key.public));
                let key = if with_key { format!("PresharedKey = {}\n", preshared.trim()) } else { String::new() };
                let to = if ours_first { format!("Endpoint = {far}:7002\n") } else { String::new() };
                let peer = format!("[Peer]\nPublicKey = {}\nAllowedIPs = 10.9.0.2/32, fd09::2/128\n", kernel.public);
                ours.conf("addconf", &format!("{peer}{key}{to}"));
                let file = if with_key { "/run/psk" } else { "/run/nopsk" };
                let to = if ours_first { String::new() } else { format!("endpoint {near}:7001") };
                let allowed = "allowed-ips 10.9.0.1/32,fd09::1/128";
                machine.exec(&format!("wg set wg0 peer {} preshared-key {file} {allowed} {to}", ours.key.public));
                if ours_first {
                    lab.a.ping("10.9.0.2");
                }
                machine.exec("ping -c 3 -W 5 10.9.0.1 && ping6 -c 3 -W 5 -s 1300 fd09::1");
                lab.a.ping_with("fd09::2", "-s 1300");
            }
        }
    }
}

/// Roaming, both ways.
fn each_follows(lab: &Lab, ours: &Device<'_>, machine: &mut Machine, kernel: &Key) {
    machine.exec("wg set wg0 listen-port 7102; ping -c 3 -W 5 10.9.0.1");
    within("ours follows", || ours.shown("endpoints", &kernel.public).ends_with(":7102"));
    ours.wg("set {} listen-port 7101").unwrap();
    lab.a.ping("10.9.0.2");
    assert!(machine.exec("wg show wg0 endpoints").trim().ends_with(":7101"));
    machine.exec("ip addr add 192.0.2.22/24 dev eth0");
    ours.wg(&format!("set {{}} peer {} endpoint 192.0.2.22:7102", kernel.public)).unwrap();
    lab.a.ping("10.9.0.2");
    assert_eq!(ours.shown("endpoints", &kernel.public), "192.0.2.22:7102");
}

/// TCP, both ways, in trains on our side.
fn bytes_arrive(lab: &Lab, machine: &mut Machine) {
    let bytes: Vec<u8> = (0..1_u32 << 18).flat_map(|n| n.wrapping_mul(0x9e37_79b9).to_le_bytes()).collect();
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), &bytes).unwrap();
    let sum = run(Command::new("sha256sum").arg(file.path()));
    let sum = sum.split_whitespace().next().unwrap();
    machine.exec("nc -l -p 5000 >/run/file </dev/null 2>/dev/null & true");
    let connect = |port: u16| {
        let mut stream = None;
        within("the machine listens", || {
            let tried = lab.a.spawn(move || TcpStream::connect_timeout(&([10, 9, 0, 2], port).into(), PATIENCE));
            stream = tried.join().unwrap().ok();
            stream.is_some()
        });
        stream.unwrap()
    };
    connect(5000).write_all(&bytes).unwrap();
    within("all of it arrives as it was", || machine.exec("sha256sum /run/file").contains(sum));
    machine.exec("nc -l -p 5001 </run/file >/dev/null 2>&1 & true");
    let mut back = Vec::new();
    let mut stream = connect(5001);
    stream.set_read_timeout(Some(COMMAND)).unwrap();
    back.resize(bytes.len(), 0);
    stream.read_exact(&mut back).unwrap();
    assert!(back == bytes, "it comes back as it went");
}
