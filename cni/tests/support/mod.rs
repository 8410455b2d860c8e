//! The real binary inside a host namespace of its own, with pods in further ones and a meshd that is a thread of the test.
//! Namespaces have no names: they, and all in them, end with the values that hold them.

#![allow(dead_code, reason = "each test file uses a part of it")]

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};

use mesh_hostnet::Handle;
use mesh_hostnet::address::Address;
use mesh_hostnet::link::LinkChange;
use mesh_hostnet::netns::Netns;
use mesh_hostnet::route::RouteFilter;
use mesh_hostnet::rule::{IpFamily, Rule};
use mesh_hostnet::sysctl::{self, Key};
use mesh_protocol::line;
use mesh_protocol::local::{Attachment, Lease, LocalError, LocalErrorCode, LocalReply, LocalRequest, POD_LINK_GROUP};
use serde_json::{Value, json};
use tempfile::TempDir;

pub const TABLE: u32 = 7100;
pub const ROUTE_PROTOCOL: u8 = 71;
pub const MTU: u16 = 1420;
/// The host's own addresses in the mesh.
pub const HOST_ADDRESSES: [&str; 2] = ["100.64.0.1/32", "fd00::1/128"];

/// How the meshd of a test behaves.
#[derive(Debug, Clone, PartialEq)]
pub enum Mood {
    /// As it should.
    Well,
    /// Refuses everything with this code.
    Refuses(LocalErrorCode),
    /// Answers with these bytes.
    Says(&'static str),
    /// Closes every connection.
    HangsUp,
    /// Tells the test when this request arrives, and answers when the test is done with it.
    StopsAt(&'static str),
}

#[derive(Debug)]
struct State {
    mood: Mood,
    leases: BTreeMap<Attachment, Lease>,
    asked: Vec<LocalRequest>,
}

/// A request at which meshd stopped; dropping it lets meshd go on.
#[derive(Debug)]
pub struct Stopped(#[allow(dead_code, reason = "its end is what counts")] Sender<()>);

/// A host: its namespace, its meshd, its files.
pub struct Host {
    pub netns: Netns,
    dir: TempDir,
    state: Arc<Mutex<State>>,
    stops: Mutex<Receiver<Stopped>>,
}

impl Host {
    /// A host that forwards and looks pods up in the mesh table, as meshd sets it up.
    pub fn new() -> Self {
        let netns = Netns::create().expect("these tests make namespaces: run them as root");
        netns
            .run(|| {
                let mut handle = Handle::open().unwrap();
                let loopback = handle.links().unwrap().into_iter().find(|link| link.loopback).unwrap();
                handle.change_link(loopback.index, &LinkChange::new().up()).unwrap();
                for address in HOST_ADDRESSES {
                    handle.replace_address(&Address::plain(loopback.index, address.parse().unwrap())).unwrap();
                }
                for family in [IpFamily::V4, IpFamily::V6] {
                    handle.add_rule(&Rule::lookup(family, 400, TABLE)).unwrap();
                }
                if sysctl::read(&Key::ipv6_link("lo", "force_forwarding").unwrap()).is_err() {
                    sysctl::ensure(&Key::ipv6_forwarding(), "1").unwrap();
                }
            })
            .unwrap();
        let dir = tempfile::tempdir().unwrap();
        let state = Arc::new(Mutex::new(State { mood: Mood::Well, leases: BTreeMap::new(), asked: Vec::new() }));
        let (stop, stops) = channel();
        let host = Self { netns, dir, state, stops: Mutex::new(stops) };
        host.serve(stop);
        host
    }

    fn serve(&self, stop: Sender<Stopped>) {
        let listener = UnixListener::bind(self.socket()).unwrap();
        let state = Arc::clone(&self.state);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (state, stop) = (Arc::clone(&state), stop.clone());
                std::thread::spawn(move || converse(&stream.unwrap(), &state, &stop));
            }
        });
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("meshd.sock")
    }

    pub fn state_dir(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    pub fn set_mood(&self, mood: Mood) {
        self.state.lock().unwrap().mood = mood;
    }

    /// From now on nobody listens.
    pub fn stop_meshd(&self) {
        std::fs::remove_file(self.socket()).unwrap();
    }

    pub fn leases(&self) -> Vec<Lease> {
        self.state.lock().unwrap().leases.values().cloned().collect()
    }

    pub fn asked(&self) -> Vec<LocalRequest> {
        self.state.lock().unwrap().asked.clone()
    }

    /// Waits until meshd stands at the request it was told to stop at.
    pub fn wait_for_stop(&self) -> Stopped {
        self.stops.lock().unwrap().recv_timeout(std::time::Duration::from_secs(20)).unwrap()
    }

    pub fn config(&self, version: &str) -> Value {
        json!({"cniVersion": version, "name": "mesh", "type": "mesh-cni", "socket": self.socket(),
            "stateDir": self.state_dir(), "someone": {"elses": ["key"]}})
    }

    /// Starts the plugin.
    pub fn spawn(&self, variables: &[(&str, &str)], input: &str) -> Child {
        let mut command = Command::new(env!("CARGO_BIN_EXE_mesh-cni"));
        command.env_clear().envs(variables.iter().copied());
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        self.netns.attach_command(&mut command).unwrap();
        let mut child = command.spawn().unwrap();
        // A plugin that refuses at once does not read its input.
        let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
        child
    }

    pub fn run(&self, variables: &[(&str, &str)], input: &str) -> Ran {
        Ran::of(self.spawn(variables, input))
    }

    pub fn spawn_for(&self, command: &str, pod: &Pod, config: &Value) -> Child {
        let variables = [
            ("CNI_COMMAND", command),
            ("CNI_CONTAINERID", &pod.container),
            ("CNI_IFNAME", "eth0"),
            ("CNI_NETNS", &pod.path()),
            ("CNI_ARGS", "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=cart"),
        ];
        self.spawn(&variables, &config.to_string())
    }

    pub fn run_for(&self, command: &str, pod: &Pod, config: &Value) -> Ran {
        Ran::of(self.spawn_for(command, pod, config))
    }

    #[track_caller]
    pub fn add(&self, pod: &Pod) -> Value {
        self.run_for("ADD", pod, &self.config("1.1.0")).ok()
    }

    #[track_caller]
    pub fn del(&self, pod: &Pod) {
        let ran = self.run_for("DEL", pod, &self.config("1.1.0"));
        assert_eq!((ran.code, ran.out.as_str()), (0, ""), "{ran:?}");
    }

    /// Host ends of pod links.
    pub fn links(&self) -> Vec<String> {
        let links = Handle::open_in(&self.netns).unwrap().links().unwrap();
        links.into_iter().map(|link| link.name).filter(|name| name.starts_with("mesh")).collect()
    }

    pub fn route_count(&self) -> usize {
        let filter = RouteFilter { table: Some(TABLE), ..RouteFilter::default() };
        Handle::open_in(&self.netns).unwrap().routes(filter).unwrap().len()
    }

    /// Names of files that queue a release.
    pub fn queued(&self) -> Vec<String> {
        let Ok(files) = std::fs::read_dir(self.state_dir().join("released")) else {
            return Vec::new();
        };
        files.map(|file| file.unwrap().file_name().into_string().unwrap()).collect()
    }

    /// Nothing of any pod is left.
    #[track_caller]
    pub fn assert_clean(&self) {
        assert_eq!(self.links(), Vec::<String>::new(), "links are left");
        assert_eq!(self.route_count(), 0, "routes are left");
        assert_eq!(self.leases(), [], "leases are left");
    }
}

fn converse(stream: &UnixStream, state: &Mutex<State>, stop: &Sender<Stopped>) {
    let mut text = String::new();
    let Ok(1..) = BufReader::new(stream).read_line(&mut text) else {
        return;
    };
    let request: LocalRequest = line::decode(text.as_bytes()).unwrap();
    let name = serde_json::to_value(&request).unwrap()["request"].clone();
    let mood = {
        let mut state = state.lock().unwrap();
        state.asked.push(request.clone());
        state.mood.clone()
    };
    let reply = match mood {
        Mood::Refuses(code) => LocalReply::Error(LocalError { code, message: "10.1.0.0/24: pool exhausted".into() }),
        Mood::HangsUp => return,
        Mood::Says(text) => {
            let _ = (&*stream).write_all(text.as_bytes());
            return;
        }
        Mood::StopsAt(at) if name == at => {
            let reply = state.lock().unwrap().answer(request);
            let (end, ended) = channel();
            let _ = stop.send(Stopped(end));
            let _ = ended.recv();
            reply
        }
        Mood::Well | Mood::StopsAt(_) => state.lock().unwrap().answer(request),
    };
    // The plugin may have been killed.
    let _ = (&*stream).write_all(&line::encode(&reply).unwrap());
}

impl State {
    fn answer(&mut self, request: LocalRequest) -> LocalReply {
        match request {
            LocalRequest::Attach { attachment, pod } => {
                let used = |number: u16| self.leases.values().any(|lease| lease.addresses == addresses(number));
                let number = (2..).find(|number| !used(*number)).unwrap();
                let lease = self.leases.entry(attachment.clone()).or_insert_with(|| Lease {
                    attachment,
                    pod,
                    addresses: addresses(number),
                    mtu: MTU,
                    link_group: POD_LINK_GROUP,
                    table: TABLE,
                    route_protocol: ROUTE_PROTOCOL,
                });
                LocalReply::Lease(lease.clone())
            }
            LocalRequest::Detach { attachment } => {
                self.leases.remove(&attachment);
                LocalReply::Done
            }
            LocalRequest::Check { attachment } => match self.leases.get(&attachment) {
                Some(lease) => LocalReply::Lease(lease.clone()),
                None => {
                    LocalReply::Error(LocalError { code: LocalErrorCode::UnknownPod, message: "no such pod".into() })
                }
            },
            LocalRequest::Collect { valid } => {
                let before = self.leases.len();
                self.leases.retain(|attachment, _| valid.contains(attachment));
                LocalReply::Released { count: u32::try_from(before - self.leases.len()).unwrap() }
            }
            _ => LocalReply::Done,
        }
    }
}

fn addresses(number: u16) -> Vec<IpAddr> {
    let [high, low] = number.to_be_bytes();
    vec![Ipv4Addr::new(10, 1, high, low).into(), Ipv6Addr::new(0xfd00, 1, 0, 0, 0, 0, 0, number).into()]
}

/// A pod: a container id and a namespace.
pub struct Pod {
    pub container: String,
    pub netns: Netns,
}

impl Pod {
    pub fn new(container: &str) -> Self {
        Self { container: container.into(), netns: Netns::create().unwrap() }
    }

    pub fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.netns.as_fd().as_raw_fd())
    }

    pub fn attachment(&self) -> Attachment {
        Attachment { container: self.container.clone(), interface: "eth0".into() }
    }

    pub fn has_eth0(&self) -> bool {
        Handle::open_in(&self.netns).unwrap().link_by_name("eth0").unwrap().is_some()
    }
}

/// The addresses in a result.
pub fn ips(result: &Value) -> Vec<IpAddr> {
    let addresses = result["ips"].as_array().unwrap().iter();
    addresses.map(|ip| ip["address"].as_str().unwrap().split('/').next().unwrap().parse().unwrap()).collect()
}

/// What a run left.
#[derive(Debug)]
pub struct Ran {
    pub code: i32,
    pub out: String,
    pub err: String,
}

impl Ran {
    pub fn of(child: Child) -> Self {
        let output = child.wait_with_output().unwrap();
        Self {
            code: output.status.code().unwrap_or(-1),
            out: String::from_utf8(output.stdout).unwrap(),
            err: String::from_utf8(output.stderr).unwrap(),
        }
    }

    /// The result of a run that succeeded.
    #[track_caller]
    pub fn ok(self) -> Value {
        assert_eq!(self.code, 0, "{self:?}");
        serde_json::from_str(&self.out).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// The run failed with this code of the specification, and said so on standard output alone.
    #[track_caller]
    pub fn fails(&self, code: u32, part: &str) {
        assert_eq!(self.code, 1, "{self:?}");
        let error: Value = serde_json::from_str(&self.out).unwrap_or_else(|error| panic!("{error}: {self:?}"));
        assert_eq!(error["code"], code, "{self:?}");
        assert!(error["cniVersion"].is_string() && error["msg"].as_str().unwrap().contains(part), "{self:?}");
    }
}
