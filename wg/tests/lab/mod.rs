//! Two namespaces with a WireGuard device each, any implementation on either side; made, used and removed by one test.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used, reason = "tests; each test binary uses a part")]

use std::{
    env,
    fs::{self, File},
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::{Duration, Instant},
};

use nix::sched::{CloneFlags, setns};

static COUNT: AtomicU32 = AtomicU32::new(0);
/// How long anything may take that should happen at once.
pub const PATIENCE: Duration = Duration::from_secs(15);

/// Two namespaces, joined by a veth pair: 192.0.2.1 and .2, 2001:db8::1 and ::2.
pub struct Lab {
    pub a: Namespace,
    pub b: Namespace,
}

impl Lab {
    pub fn new() -> Self {
        assert!(nix::unistd::geteuid().is_root(), "this test makes network namespaces: run it as root");
        let n = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = |side: &str| format!("mw{}x{n}{side}", std::process::id());
        let lab = Self { a: Namespace::new(name("a")), b: Namespace::new(name("b")) };
        lab.a.ip(&format!("link add u0 type veth peer name u0 netns {}", lab.b.name));
        for (side, host) in [(&lab.a, 1), (&lab.b, 2)] {
            side.ip(&format!("address add 192.0.2.{host}/24 dev u0"));
            side.ip(&format!("address add 2001:db8::{host}/64 dev u0 nodad"));
            side.ip("link set u0 up");
            side.ip("link set lo up");
        }
        lab
    }
}

/// A network namespace; removed when dropped.
pub struct Namespace {
    pub name: String,
}

impl Namespace {
    pub fn new(name: String) -> Self {
        run(Command::new("ip").args(["netns", "add", &name]));
        Self { name }
    }

    /// Runs `ip` inside.
    pub fn ip(&self, args: &str) -> String {
        run(Command::new("ip").args(["-n", &self.name]).args(args.split_whitespace()))
    }

    /// Runs a command inside and fails unless it succeeds.
    pub fn exec(&self, command: &str) -> String {
        run(&mut self.command(command))
    }

    /// A command to be run inside.
    pub fn command(&self, command: &str) -> Command {
        let mut full = Command::new("ip");
        full.args(["netns", "exec", &self.name]).args(command.split_whitespace());
        full
    }

    /// Starts a thread inside.
    pub fn spawn<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> thread::JoinHandle<T> {
        let file = File::open(format!("/run/netns/{}", self.name)).unwrap();
        thread::spawn(move || {
            setns(file, CloneFlags::CLONE_NEWNET).unwrap();
            work()
        })
    }

    /// Fails unless `address` answers in time.
    pub fn ping(&self, address: &str) {
        self.ping_with(address, "");
    }

    /// The same with more arguments for ping.
    pub fn ping_with(&self, address: &str, more: &str) {
        within(&format!("{address} answers"), || self.is_answered(address, more));
    }

    /// Whether `address` answers one ping within a second.
    pub fn is_answered(&self, address: &str, more: &str) -> bool {
        self.command(&format!("ping -n -c 1 -W 1 {more} {address}")).output().unwrap().status.success()
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.name]).output();
    }
}

/// Who implements WireGuard.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    MeshWg,
    WireguardGo(PathBuf),
    Boringtun(PathBuf),
    Gotatun(PathBuf),
}

/// Finds a program of others: the variable `MESH_WG_<PROGRAM>`, what `make bench` installed, the search path.
pub fn find(program: &str) -> Option<PathBuf> {
    let variable = format!("MESH_WG_{}", program.to_uppercase().replace('-', "_"));
    let installed = Path::new(env!("CARGO_BIN_EXE_mesh-wg")).parent()?.parent()?.join("bench/rivals/bin");
    let path = env::var_os("PATH").unwrap_or_default();
    let mut places: Vec<PathBuf> = env::var_os(variable).map(PathBuf::from).into_iter().collect();
    places.push(installed.join(program));
    places.extend(env::split_paths(&path).map(|place| place.join(program)));
    places.into_iter().find(|place| place.is_file())
}

/// A running WireGuard device.
pub struct Device<'a> {
    pub ns: &'a Namespace,
    pub name: String,
    pub key: Key,
    child: Child,
}

/// A secret key and its public key, as wg(8) writes them.
#[derive(Clone)]
pub struct Key {
    pub secret: String,
    pub public: String,
}

impl Key {
    pub fn new() -> Self {
        let secret = run(Command::new("wg").arg("genkey")).trim().to_owned();
        let public = run_with_input(Command::new("wg").arg("pubkey"), &secret).trim().to_owned();
        Self { secret, public }
    }
}

impl<'a> Device<'a> {
    /// Starts a device in the foreground and waits for its control socket.
    pub fn start(ns: &'a Namespace, kind: &Kind) -> Self {
        let name = format!("m{}n{}", std::process::id() % 1_000_000, COUNT.fetch_add(1, Ordering::Relaxed));
        let (program, args): (&Path, &[&str]) = match kind {
            Kind::MeshWg => (Path::new(env!("CARGO_BIN_EXE_mesh-wg")), &["-f"]),
            Kind::WireguardGo(path) => (path, &["-f"]),
            Kind::Boringtun(path) => (path, &["-f"]),
            Kind::Gotatun(path) => (path, &["-f", "-v", "error", "--disable-drop-privileges"]),
        };
        let mut command = ns.command("");
        command.arg(program).args(args).arg(&name).env("WG_SUDO", "true");
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let device = Self { ns, name, key: Key::new(), child };
        // Not by wg(8), which removes a socket that does not listen yet.
        let socket = format!("/var/run/wireguard/{}.sock", device.name);
        within("the control socket answers", || UnixStream::connect(&socket).is_ok());
        device
    }

    /// Runs `wg`; `{}` in the arguments stands for the device.
    pub fn wg(&self, args: &str) -> Result<String, String> {
        let output = self.ns.command(&format!("wg {}", args.replace("{}", &self.name))).output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
    }

    /// Runs `ip`; `{}` stands for the device.
    pub fn ip(&self, args: &str) -> String {
        self.ns.ip(&args.replace("{}", &self.name))
    }

    /// Hands `wg` a configuration on its standard input: `setconf`, `syncconf` or `addconf`.
    pub fn conf(&self, verb: &str, text: &str) {
        run_with_input(&mut self.ns.command(&format!("wg {verb} {} /dev/stdin", self.name)), text);
    }

    /// Answers a few lines on the control socket.
    pub fn uapi(&self, request: &str) -> String {
        let mut stream = std::os::unix::net::UnixStream::connect(self.socket()).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }

    pub fn socket(&self) -> PathBuf {
        format!("/var/run/wireguard/{}.sock", self.name).into()
    }

    /// One column of `wg show IFACE WHAT` for the peer.
    pub fn shown(&self, what: &str, peer: &str) -> String {
        let all = self.wg(&format!("show {{}} {what}")).unwrap();
        let line = all.lines().find_map(|line| line.strip_prefix(peer));
        line.unwrap_or_default().trim().to_owned()
    }

    /// Waits until the process has ended by itself.
    pub fn ends(&mut self) {
        let child = &mut self.child;
        within("the process ends", || child.try_wait().unwrap().is_some());
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Addresses 10.9.0.HOST and fd09::HOST, and up.
    pub fn up(&self, host: u8) {
        self.ip(&format!("address add 10.9.0.{host}/24 dev {{}}"));
        self.ip(&format!("address add fd09::{host}/64 dev {{}} nodad"));
        self.ip("link set {} up");
    }
}

impl Drop for Device<'_> {
    fn drop(&mut self) {
        // The signal at which each of them removes its socket.
        let pid = nix::unistd::Pid::from_raw(self.child.id() as i32);
        if self.child.try_wait().is_ok_and(|status| status.is_none()) {
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
            let deadline = Instant::now() + Duration::from_secs(3);
            while Instant::now() < deadline && self.child.try_wait().is_ok_and(|status| status.is_none()) {
                thread::sleep(Duration::from_millis(10));
            }
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_file(self.socket());
    }
}

/// Sends bytes over TCP from one namespace to the other, and fails unless they arrive as they were sent.
pub fn transfer(from: &Namespace, to: &Namespace, address: &str, bytes: usize) {
    let pattern = move |n: usize| (n as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) as u8;
    let address: std::net::IpAddr = address.parse().unwrap();
    let listener = to.spawn(move || TcpListener::bind((address, 0)).unwrap()).join().unwrap();
    let target: SocketAddr = listener.local_addr().unwrap();
    let receiver = thread::spawn(move || {
        let mut all = Vec::new();
        listener.accept().unwrap().0.read_to_end(&mut all).unwrap();
        all
    });
    let sender = from.spawn(move || {
        let mut stream = TcpStream::connect_timeout(&target, PATIENCE).unwrap();
        stream.write_all(&(0..bytes).map(pattern).collect::<Vec<u8>>()).unwrap();
    });
    sender.join().unwrap();
    let received = receiver.join().unwrap();
    assert_eq!(received.len(), bytes);
    assert!(received.iter().enumerate().all(|(n, byte)| *byte == pattern(n)), "bytes changed on the way");
}

/// Polls until `done`, or fails.
pub fn within(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < deadline, "not in time: {what}");
        thread::sleep(Duration::from_millis(20));
    }
}

pub fn run(command: &mut Command) -> String {
    finish(command.stdin(Stdio::null()).output(), command)
}

pub fn run_with_input(command: &mut Command, input: &str) -> String {
    let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let output = child.and_then(|mut child| {
        child.stdin.take().unwrap().write_all(input.as_bytes())?;
        child.wait_with_output()
    });
    finish(output, command)
}

fn finish(output: std::io::Result<Output>, command: &Command) -> String {
    let output = output.unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {}: {error}", output.status);
    String::from_utf8_lossy(&output.stdout).into_owned()
}
