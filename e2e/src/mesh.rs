//! A whole mesh, made by the commands a user types.

use std::fmt::Write as _;
use std::fs;
use std::io::Write as _;
use std::net::IpAddr;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::daemon::{Daemon, binary};
use crate::lab::{Lab, Node};
use crate::pod::Pod;
use crate::wait;

/// How long a mesh of a few nodes may take to settle, on a busy machine.
pub const SETTLE: Duration = Duration::from_secs(30);

/// Clusters every mesh of the lab has, with their IPv4 pools.
pub const CLUSTERS: [(&str, &str); 3] = [("east", "10.1.0.0/16"), ("west", "10.2.0.0/16"), ("onprem", "10.3.0.0/16")];

/// A mesh in a lab: one keyserver, and nodes.
#[derive(Debug)]
pub struct Mesh {
    /// Its nodes, in the order they were added. Dropped before the lab.
    pub nodes: Vec<MeshNode>,
    keyserver: Option<Daemon>,
    keyserver_node: Node,
    /// The namespaces below it.
    pub lab: Lab,
}

/// A node of the mesh and its daemon.
#[derive(Debug)]
pub struct MeshNode {
    /// The namespace.
    pub node: Node,
    /// The daemon, while it runs.
    pub daemon: Option<Daemon>,
}

impl Mesh {
    /// Makes a lab, and a keyserver with the clusters of [`CLUSTERS`].
    ///
    /// # Errors
    /// If anything says no.
    pub fn new(name: &str) -> Result<Self> {
        Self::new_with(name, &[])
    }

    /// As [`Self::new`], with more arguments after `keyserver init`.
    ///
    /// # Errors
    /// If anything says no.
    pub fn new_with(name: &str, init: &[&str]) -> Result<Self> {
        let mut mesh = Self::bare(name)?;
        mesh.init_keyserver(init)?;
        mesh.start_keyserver()?;
        for (cluster, pool) in CLUSTERS {
            mesh.admin(&["cluster", "add", cluster, "--pod-cidr", pool, "--node-prefix", "24"])?;
        }
        Ok(mesh)
    }

    /// Makes a lab with a machine for the keyserver, and nothing on it.
    ///
    /// # Errors
    /// If the kernel says no.
    pub fn bare(name: &str) -> Result<Self> {
        let mut lab = Lab::new(name)?;
        let keyserver_node = lab.node("keys")?;
        Ok(Self { nodes: Vec::new(), keyserver: None, keyserver_node, lab })
    }

    fn init_keyserver(&self, more: &[&str]) -> Result<()> {
        let node = &self.keyserver_node;
        let directory = self.keyserver_directory();
        let address = format!("{}:7443", node.v4());
        let init = ["init", "--dir", path(&directory)?, "--name", "lab", "--address", &address];
        node.output(binary("keyserver")?, &[&init, more].concat())?;
        self.keep_admin_socket_here()
    }

    /// Sets the admin socket of a configuration that `keyserver init` wrote to one in the lab.
    ///
    /// # Errors
    /// If the file is not there.
    pub fn keep_admin_socket_here(&self) -> Result<()> {
        let directory = self.keyserver_directory();
        let config = directory.join("keyserver.toml");
        let text = fs::read_to_string(&config)?;
        let socket = format!("admin_socket = \"{}\"", self.admin_socket().display());
        let mut lines: Vec<String> =
            text.lines().filter(|line| !line.trim_start().starts_with("admin_socket")).map(str::to_owned).collect();
        lines.insert(0, socket);
        fs::write(&config, lines.join("\n") + "\n")?;
        Ok(())
    }

    /// Starts the keyserver and waits until it is ready.
    ///
    /// # Errors
    /// If it does not become ready.
    pub fn start_keyserver(&mut self) -> Result<()> {
        let config = self.keyserver_directory().join("keyserver.toml");
        let mut daemon = Daemon::start(&self.keyserver_node, "keyserver", &["run", "--config", path(&config)?])?;
        daemon.wait_ready()?;
        self.keyserver = Some(daemon);
        Ok(())
    }

    /// Kills the keyserver with SIGKILL.
    ///
    /// # Errors
    /// If it does not run.
    pub fn kill_keyserver(&mut self) -> Result<()> {
        self.keyserver.take().context("no keyserver runs")?.kill9()
    }

    /// The keyserver's machine.
    #[must_use]
    pub fn keyserver_node(&self) -> &Node {
        &self.keyserver_node
    }

    /// The keyserver's directory: keys, store, configuration.
    #[must_use]
    pub fn keyserver_directory(&self) -> PathBuf {
        self.keyserver_node.directory().join("keyserver")
    }

    /// The keyserver's admin socket.
    #[must_use]
    pub fn admin_socket(&self) -> PathBuf {
        self.keyserver_node.directory().join("admin.sock")
    }

    /// Runs `meshctl` against the keyserver; gives its stdout.
    ///
    /// # Errors
    /// If it fails.
    pub fn admin(&self, args: &[&str]) -> Result<String> {
        let socket = self.admin_socket();
        let args = [&["--admin-socket", path(&socket)?], args].concat();
        self.keyserver_node.output(binary("meshctl")?, &args)
    }

    /// As [`Self::admin`] with `--json`; gives the last object printed.
    ///
    /// # Errors
    /// If it fails or prints something else.
    pub fn admin_json(&self, args: &[&str]) -> Result<Value> {
        last_json(&self.admin(&[&["--json"], args].concat())?)
    }

    /// Makes a join token for one node.
    ///
    /// # Errors
    /// If the keyserver says no.
    pub fn token(&self, cluster: &str) -> Result<String> {
        self.token_with(&["--cluster", cluster, "--uses", "1", "--ttl", "1h"])
    }

    /// Makes a join token with other limits: arguments after `meshctl token create`.
    ///
    /// # Errors
    /// If the keyserver says no.
    pub fn token_with(&self, args: &[&str]) -> Result<String> {
        Ok(self.admin(&[&["token", "create"], args].concat())?.trim().to_owned())
    }

    /// Adds a machine, joins it with a fresh token, starts its daemon and waits until it is ready.
    ///
    /// # Errors
    /// If anything says no.
    pub fn add_node(&mut self, name: &str, cluster: &str) -> Result<usize> {
        let mesh_node = self.bare_node(name)?;
        mesh_node.join(&self.token(cluster)?)?;
        self.nodes.push(mesh_node);
        let at = self.nodes.len() - 1;
        self.nodes[at].start()?;
        Ok(at)
    }

    /// The node of that name.
    ///
    /// # Panics
    /// If there is none.
    #[must_use]
    pub fn node(&self, name: &str) -> &MeshNode {
        self.nodes.iter().find(|node| node.node.name() == name).expect("the test made this node")
    }

    /// As [`Self::node`].
    ///
    /// # Panics
    /// If there is none.
    pub fn node_mut(&mut self, name: &str) -> &mut MeshNode {
        self.nodes.iter_mut().find(|node| node.node.name() == name).expect("the test made this node")
    }

    /// Adds a machine with a configuration, neither joined nor started.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn bare_node(&mut self, name: &str) -> Result<MeshNode> {
        let mesh_node = MeshNode { node: self.lab.node(name)?, daemon: None };
        mesh_node.write_config()?;
        Ok(mesh_node)
    }

    /// Attaches a pod to the node of that name.
    ///
    /// # Errors
    /// If the CNI binary says no.
    pub fn pod(&self, node: &str, name: &str) -> Result<Pod> {
        Pod::attach(&self.lab, &self.node(node).node, name)
    }

    /// Waits until every running node knows every other.
    ///
    /// # Errors
    /// If that takes longer than [`SETTLE`].
    pub fn wait_settled(&self) -> Result<()> {
        let others = self.nodes.len().saturating_sub(1);
        for node in self.nodes.iter().filter(|node| node.daemon.is_some()) {
            wait::until(&format!("{} knows {others} peers", node.node.name()), SETTLE, || {
                let known = node.status()?["peers_known"].as_u64().unwrap_or(0);
                ensure!(known as usize >= others, "it knows {known}");
                Ok(())
            })?;
        }
        Ok(())
    }

    /// Waits until each node has a control session: it knows its peers from joining, before that.
    ///
    /// # Errors
    /// If that takes longer than [`SETTLE`].
    pub fn wait_connected(&self) -> Result<()> {
        for node in self.nodes.iter().filter(|node| node.daemon.is_some()) {
            wait::until(&format!("{} has a session", node.node.name()), SETTLE, || {
                ensure!(node.status()?["control"]["connected"] == true, "it has none");
                Ok(())
            })?;
        }
        Ok(())
    }

    /// The ends of all logs, for a failure's report.
    #[must_use]
    pub fn logs(&self) -> String {
        let mut text = String::new();
        let daemons = self.nodes.iter().filter_map(|node| node.daemon.as_ref()).chain(self.keyserver.as_ref());
        for daemon in daemons {
            let _ = writeln!(text, "{}", daemon.log_tail());
        }
        text
    }
}

/// Runs `body` on a mesh with these nodes (name, cluster), settled. On an error it prints the topology, the ends of all
/// logs and how to look around, then panics: that is how a test fails.
///
/// # Panics
/// If anything says no.
pub fn scenario(name: &str, nodes: &[(&str, &str)], body: impl FnOnce(&mut Mesh) -> Result<()>) {
    scenario_with(name, &[], nodes, body);
}

/// As [`scenario`], with more arguments after `keyserver init`.
///
/// # Panics
/// If anything says no.
pub fn scenario_with(name: &str, init: &[&str], nodes: &[(&str, &str)], body: impl FnOnce(&mut Mesh) -> Result<()>) {
    let mut mesh = Mesh::new_with(name, init).unwrap_or_else(|error| panic!("make the mesh: {error:#}"));
    let added = nodes.iter().try_for_each(|(node, cluster)| mesh.add_node(node, cluster).map(|_| ()));
    let settled = added.and_then(|()| mesh.wait_settled()).and_then(|()| mesh.wait_connected());
    let result = settled.and_then(|()| body(&mut mesh));
    if let Err(error) = result {
        eprintln!("{}", mesh.logs());
        for node in &mesh.nodes {
            eprintln!("{}: ip netns exec {} sh  (with MESH_LAB_KEEP=1)", node.node.name(), node.node.netns_name());
        }
        panic!("{name}: {error:#}");
    }
}

impl MeshNode {
    /// Where its configuration is.
    #[must_use]
    pub fn config(&self) -> PathBuf {
        self.node.directory().join("meshd.toml")
    }

    /// Its local API socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.node.directory().join("run/meshd.sock")
    }

    /// Writes a configuration that keeps everything in the node's directory.
    ///
    /// # Errors
    /// If the disk refuses.
    pub fn write_config(&self) -> Result<()> {
        let directory = self.node.directory();
        let text = format!(
            "state_dir = \"{0}/state\"\nsocket = \"{0}/run/meshd.sock\"\n\n[log]\nlevel = \"info\"\n",
            directory.display()
        );
        Ok(fs::write(self.config(), text)?)
    }

    /// Runs `meshd join` with the token on its standard input.
    ///
    /// # Errors
    /// If it fails: with what it printed.
    pub fn join(&self, token: &str) -> Result<String> {
        self.join_with(token, &["--node-name", self.node.name()])
    }

    /// As [`Self::join`] with other arguments.
    ///
    /// # Errors
    /// If it fails: with what it printed.
    pub fn join_with(&self, token: &str, args: &[&str]) -> Result<String> {
        let mut command = self.node.command(binary("meshd")?)?;
        command.arg("join").arg("--config").arg(self.config()).args(args);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        child.stdin.take().context("no stdin")?.write_all(token.as_bytes())?;
        let output = child.wait_with_output()?;
        let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        ensure!(output.status.success(), "meshd join on {}: {}: {text}", self.node.name(), output.status);
        Ok(text)
    }

    /// Starts its daemon and waits until it is ready.
    ///
    /// # Errors
    /// If it does not become ready.
    pub fn start(&mut self) -> Result<()> {
        let config = self.config();
        let mut daemon = Daemon::start(&self.node, "meshd", &["run", "--config", path(&config)?])?;
        daemon.wait_ready()?;
        self.daemon = Some(daemon);
        Ok(())
    }

    /// Kills its daemon with SIGKILL.
    ///
    /// # Errors
    /// If none runs.
    pub fn kill9(&mut self) -> Result<()> {
        self.daemon.take().context("no daemon runs")?.kill9()
    }

    /// Stops its daemon with SIGTERM.
    ///
    /// # Errors
    /// If none runs, or it does not stop.
    pub fn stop(&mut self) -> Result<()> {
        let status = self.daemon.take().context("no daemon runs")?.stop()?;
        ensure!(status.success(), "meshd on {}: {status}", self.node.name());
        Ok(())
    }

    /// Runs `meshd down`: everything of Mesh leaves the machine's network, the daemon stops.
    ///
    /// # Errors
    /// If it fails.
    pub fn down(&self) -> Result<String> {
        let config = self.config();
        self.node.output(binary("meshd")?, &["down", "--config", path(&config)?])
    }

    /// Runs `meshctl` against its daemon; gives its stdout.
    ///
    /// # Errors
    /// If it fails.
    pub fn ctl(&self, args: &[&str]) -> Result<String> {
        let socket = self.socket();
        let nowhere = self.node.directory().join("no-admin.sock");
        let args = [&["--socket", path(&socket)?, "--admin-socket", path(&nowhere)?], args].concat();
        self.node.output(binary("meshctl")?, &args)
    }

    /// As [`Self::ctl`] with `--json`; gives the last object printed.
    ///
    /// # Errors
    /// If it fails or prints something else.
    pub fn ctl_json(&self, args: &[&str]) -> Result<Value> {
        last_json(&self.ctl(&[&["--json"], args].concat())?)
    }

    /// Its state, as `meshctl --json status` prints it.
    ///
    /// # Errors
    /// If it does not answer.
    pub fn status(&self) -> Result<Value> {
        let status = self.ctl_json(&["status"])?;
        Ok(if status["node"].is_object() { status["node"].clone() } else { status })
    }

    /// Its own address in the mesh, of IPv6 or IPv4.
    ///
    /// # Errors
    /// If it does not answer.
    pub fn mesh_address(&self, v6: bool) -> Result<IpAddr> {
        let status = self.status()?;
        let addresses = status["addresses"].as_array().context("no addresses")?;
        let parsed = addresses.iter().filter_map(|address| address.as_str()?.parse::<IpAddr>().ok());
        parsed.into_iter().find(|address| address.is_ipv6() == v6).context("no address of that family")
    }
}

fn path(path: &std::path::Path) -> Result<&str> {
    path.to_str().context("a path that is not UTF-8")
}

fn last_json(text: &str) -> Result<Value> {
    if let Ok(value) = serde_json::from_str(text) {
        return Ok(value);
    }
    let line = text.lines().rfind(|line| !line.trim().is_empty()).context("nothing was printed")?;
    serde_json::from_str(line).with_context(|| format!("not JSON: {line}"))
}
