//! Namespaces for tests of this crate: made, used and removed by one test.
#![allow(dead_code, unreachable_pub, clippy::disallowed_methods, reason = "each test binary uses a part")]

use std::{
    fs::File,
    net::{IpAddr, SocketAddr},
    process::{Child, Command, Output, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use mesh_dataplane::{
    LaneParts, Lanes, LocalKey, PeerId, PeerSpec, Preshared, PublicKey, RemoteKey, SecretKey, Table, TableSpec,
    tun::{Device, DeviceOptions, TunQueue, Wanted},
    udp::system::{SystemConfig, SystemSocket},
};
use nix::sched::{CloneFlags, setns};

static COUNT: AtomicU32 = AtomicU32::new(0);

/// Fails the test clearly unless it may make namespaces.
pub fn require_root() {
    assert!(nix::unistd::geteuid().is_root(), "this test makes network namespaces: run it as root");
}

/// Two namespaces, `a` and `b`, joined by a veth pair: 192.0.2.1 and 192.0.2.2.
pub struct Pair {
    pub a: Namespace,
    pub b: Namespace,
}

impl Pair {
    pub fn new() -> Self {
        Self::of(Wanted::Any)
    }

    /// With devices of this kind.
    pub fn of(wanted: Wanted) -> Self {
        require_root();
        let n = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = |side: &str| format!("mdp{}x{n}{side}", std::process::id());
        let pair = Self { a: Namespace::new(name("a"), wanted), b: Namespace::new(name("b"), wanted) };
        pair.a.ip(&format!("link add u0 type veth peer name u0 netns {}", pair.b.name));
        for (side, address) in [(&pair.a, "192.0.2.1/24"), (&pair.b, "192.0.2.2/24")] {
            side.ip(&format!("address add {address} dev u0"));
            side.ip("link set u0 up");
            side.ip("link set lo up");
        }
        pair
    }
}

/// A network namespace; removed when dropped.
pub struct Namespace {
    pub name: String,
    /// The kind of its devices.
    pub options: DeviceOptions,
}

impl Namespace {
    fn new(name: String, wanted: Wanted) -> Self {
        run(Command::new("ip").args(["netns", "add", &name]));
        Self { name, options: DeviceOptions { wanted, ..DeviceOptions::default() } }
    }

    /// Runs `ip` inside.
    pub fn ip(&self, args: &str) {
        run(Command::new("ip").args(["-n", &self.name]).args(args.split_whitespace()));
    }

    /// Runs a command inside and fails unless it succeeds.
    pub fn exec(&self, command: &str) -> Output {
        run(&mut self.command(command))
    }

    /// A command to be run inside.
    pub fn command(&self, command: &str) -> Command {
        let mut full = Command::new("ip");
        full.args(["netns", "exec", &self.name]).args(command.split_whitespace());
        full
    }

    /// Runs `work` on a thread inside; sockets and devices it opens stay there.
    pub fn enter<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        self.spawn(work).join().expect("a thread in a namespace panicked")
    }

    /// Starts a thread inside.
    pub fn spawn<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> thread::JoinHandle<T> {
        let file = File::open(format!("/run/netns/{}", self.name)).expect("namespace exists");
        thread::spawn(move || {
            setns(file, CloneFlags::CLONE_NEWNET).expect("enter the namespace");
            work()
        })
    }

    /// Opens `mesh0` with one queue and gives it addresses and routes.
    pub fn open_device(&self, addresses: &[&str], routes: &[&str]) -> TunQueue {
        let options = self.options;
        let device = self.enter(move || Device::open_with("mesh0", &options)).expect("open the TUN device");
        for address in addresses {
            self.ip(&format!("address add {address} dev mesh0 nodad"));
        }
        self.ip("link set mesh0 mtu 1420 up");
        for route in routes {
            self.ip(&format!("route add {route} dev mesh0"));
        }
        device.into_queues().remove(0)
    }

    /// A lane's parts: device and socket on `port`.
    pub fn lane(&self, port: u16, addresses: &[&str], routes: &[&str]) -> LaneParts {
        let socket = self.enter(move || SystemSocket::bind(&SystemConfig { port, ..Default::default() }));
        LaneParts {
            queue: Box::new(self.open_device(addresses, routes)),
            socket: Box::new(socket.expect("bind the socket")),
        }
    }

    /// Fails unless `address` answers within ten seconds.
    pub fn ping(&self, address: &str) {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            let output = self.command(&format!("ping -c 1 -W 1 {address}")).output().expect("run ping");
            if output.status.success() {
                return;
            }
            assert!(
                Instant::now() < deadline,
                "{address} does not answer from {}; look with: ip netns exec {} ip addr",
                self.name,
                self.name
            );
        }
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.name]).status();
    }
}

/// A child process; killed when dropped.
pub struct Process(pub Child);

impl Drop for Process {
    fn drop(&mut self) {
        // Politely, so that it removes its socket; then not.
        let pid = nix::unistd::Pid::from_raw(self.0.id().cast_signed());
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
        let deadline = Instant::now() + Duration::from_secs(2);
        while Instant::now() < deadline {
            if let Ok(Some(_)) = self.0.try_wait() {
                return;
            }
            thread::sleep(Duration::from_millis(5));
        }
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub fn run(command: &mut Command) -> Output {
    let output = command.stdin(Stdio::null()).output().expect("run a command");
    assert!(
        output.status.success(),
        "{command:?} failed: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    output
}

/// Polls `done` until it is true; fails after `patience`.
pub fn wait_until(what: &str, patience: Duration, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + patience;
    while !done() {
        assert!(Instant::now() < deadline, "{what}: not within {patience:?}");
        thread::sleep(Duration::from_millis(1));
    }
}

/// A secret that only this test uses.
pub fn secret(seed: u8) -> SecretKey {
    SecretKey::new([seed; 32])
}

/// A table with one peer.
pub fn table(
    local: SecretKey,
    own: &[&str],
    remote: PublicKey,
    allowed: &[&str],
    endpoint: Option<SocketAddr>,
) -> Arc<Table> {
    let nets = |texts: &[&str]| texts.iter().map(|text| text.parse().expect("a prefix")).collect();
    let peer = PeerSpec {
        id: PeerId(1),
        keys: vec![RemoteKey { epoch: 1, public: remote }],
        preshared: Preshared::None,
        allowed_ips: nets(allowed),
        endpoints: endpoint.into_iter().collect(),
        keepalive: None,
        lanes: Lanes::Plain,
    };
    let spec = TableSpec {
        local_keys: vec![LocalKey { epoch: 1, secret: local }],
        peers: vec![peer],
        own_prefixes: nets(own),
        ..TableSpec::default()
    };
    Arc::new(Table::new(spec).expect("a right table"))
}

pub fn address(text: &str) -> IpAddr {
    text.parse().expect("an address")
}
