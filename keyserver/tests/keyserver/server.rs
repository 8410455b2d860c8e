//! A keyserver process in a directory of its own, killed when dropped.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use ipnet::IpNet;
use mesh_protocol::admin::{AdminError, AdminReply, AdminRequest, KeyserverStatus, NodeStatus, TokenStatus};
use mesh_protocol::line;
use mesh_protocol::token::JoinToken;

pub const DEADLINE: Duration = Duration::from_secs(20);

pub fn binary() -> Command {
    Command::new(env!("CARGO_BIN_EXE_keyserver"))
}

pub struct Server {
    pub folder: tempfile::TempDir,
    pub address: SocketAddr,
    /// Where credentials lie, as systemd says it.
    pub credentials: Option<PathBuf>,
    child: Option<Child>,
}

impl Server {
    /// A new mesh with cluster `east`, running.
    pub fn start() -> Self {
        let mut server = Self::stopped();
        server.run();
        server.add_cluster("east", &["10.1.0.0/16"]).unwrap();
        server
    }

    /// A new mesh, not running yet.
    pub fn stopped() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let address = free_port();
        let out = binary()
            .args(["init", "--name", "test", "--address", &address.to_string(), "--dir"])
            .arg(folder.path().join("ks"))
            .output()
            .unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        let server = Self { folder, address, credentials: None, child: None };
        let text = std::fs::read_to_string(server.config()).unwrap();
        let listen = format!("admin_socket = \"{}\"\nlisten = [\"{address}\"]\n", server.socket().display());
        let kept: Vec<&str> = text.lines().filter(|line| !line.starts_with("listen")).collect();
        std::fs::write(server.config(), listen + &kept.join("\n")).unwrap();
        server
    }

    pub fn dir(&self) -> PathBuf {
        self.folder.path().join("ks")
    }

    pub fn config(&self) -> PathBuf {
        self.dir().join("keyserver.toml")
    }

    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("admin.sock")
    }

    pub fn log(&self) -> PathBuf {
        self.folder.path().join("log")
    }

    /// Starts the process and waits until it answers.
    pub fn run(&mut self) {
        let child = binary()
            .args(["run", "--config"])
            .arg(self.config())
            .stdin(Stdio::null())
            .stderr(std::fs::File::options().create(true).append(true).open(self.log()).unwrap())
            .env_remove("NOTIFY_SOCKET")
            .envs(self.credentials.iter().map(|path| ("CREDENTIALS_DIRECTORY", path)))
            .spawn()
            .unwrap();
        self.child = Some(child);
        let begun = Instant::now();
        while UnixStream::connect(self.socket()).is_err() {
            assert!(begun.elapsed() < DEADLINE, "keyserver does not come up");
            if let Some(status) = self.child.as_mut().unwrap().try_wait().unwrap() {
                panic!("keyserver ended: {status}");
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// SIGTERM, and the exit code.
    pub fn stop(&mut self) -> Option<i32> {
        let mut child = self.child.take().unwrap();
        let pid = nix::unistd::Pid::from_raw(i32::try_from(child.id()).unwrap());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
        child.wait().unwrap().code()
    }

    pub fn command(&self, verb: &str) -> Output {
        binary().args([verb, "--config"]).arg(self.config()).output().unwrap()
    }

    /// Every reply to one request.
    pub fn ask_all(&self, request: &AdminRequest) -> Vec<AdminReply> {
        let mut stream = UnixStream::connect(self.socket()).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        stream.write_all(&line::encode(request).unwrap()).unwrap();
        let mut replies = Vec::new();
        for text in BufReader::new(stream).lines() {
            let reply: AdminReply = line::decode(text.unwrap().as_bytes()).unwrap();
            let last = reply.is_final();
            replies.push(reply);
            if last {
                return replies;
            }
        }
        panic!("no final reply after {replies:?}");
    }

    pub fn ask(&self, request: &AdminRequest) -> Result<AdminReply, AdminError> {
        match self.ask_all(request).pop().unwrap() {
            AdminReply::Error(error) => Err(error),
            reply => Ok(reply),
        }
    }

    pub fn add_cluster(&self, name: &str, cidrs: &[&str]) -> Result<AdminReply, AdminError> {
        self.ask(&AdminRequest::ClusterAdd {
            cluster: name.parse().unwrap(),
            pod_cidrs: nets(cidrs),
            node_prefix: None,
            node_prefix6: None,
        })
    }

    pub fn token(&self, uses: u32) -> JoinToken {
        self.token_with("east", uses, 3600, &[]).unwrap().0
    }

    pub fn token_with(
        &self,
        cluster: &str,
        uses: u32,
        ttl: u64,
        cidrs: &[&str],
    ) -> Result<(JoinToken, TokenStatus), AdminError> {
        let cluster = cluster.parse().unwrap();
        let request = AdminRequest::TokenCreate { cluster, uses, ttl, cidrs: nets(cidrs), tags: Vec::new() };
        let AdminReply::Token { line, token } = self.ask(&request)? else { panic!("another reply") };
        Ok((line.parse().unwrap(), token))
    }

    pub fn tokens(&self) -> Vec<TokenStatus> {
        let Ok(AdminReply::Tokens { tokens }) = self.ask(&AdminRequest::TokenList) else { panic!("another reply") };
        tokens
    }

    pub fn nodes(&self) -> Vec<NodeStatus> {
        let Ok(AdminReply::Nodes { nodes }) = self.ask(&AdminRequest::NodeList) else { panic!("another reply") };
        nodes
    }

    pub fn status(&self) -> KeyserverStatus {
        let Ok(AdminReply::Status(status)) = self.ask(&AdminRequest::Status) else { panic!("another reply") };
        *status
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            let log = std::fs::read_to_string(self.log()).unwrap_or_default();
            let from = log.char_indices().rev().nth(4_000).map_or(0, |(at, _)| at);
            eprintln!("the keyserver's log ends with:\n{}", &log[from..]);
        }
    }
}

pub fn nets(texts: &[&str]) -> Vec<IpNet> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}

/// A port that was free for TCP and UDP a moment ago.
fn free_port() -> SocketAddr {
    loop {
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = tcp.local_addr().unwrap();
        if UdpSocket::bind(address).is_ok() {
            return address;
        }
    }
}
