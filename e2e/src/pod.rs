//! Pods: a namespace, attached by running the CNI binary the way a runtime does.

use std::io::Write as _;
use std::net::IpAddr;
use std::process::Stdio;

use anyhow::{Context as _, Result, ensure};
use mesh_hostnet::netns::{self, Netns};
use serde_json::Value;

use crate::daemon::binary;
use crate::lab::{Lab, Node};

/// What the CNI binary answered.
#[derive(Debug, Clone)]
pub struct CniOutput {
    /// It exited with 0.
    pub success: bool,
    /// Its stdout as JSON; null if it printed nothing.
    pub json: Value,
    /// Its stderr.
    pub stderr: String,
}

/// A pod's namespace and addresses.
#[derive(Debug, Clone)]
pub struct Pod {
    name: String,
    node: Node,
    netns_name: String,
    addresses: Vec<IpAddr>,
}

impl Pod {
    /// Makes a namespace and attaches it to `node` as `eth0`.
    ///
    /// # Errors
    /// If the CNI binary says no.
    pub fn attach(lab: &Lab, node: &Node, name: &str) -> Result<Self> {
        let netns_name = lab.empty(&format!("{}-{name}", node.name()))?;
        let mut pod = Self { name: name.to_owned(), node: node.clone(), netns_name, addresses: Vec::new() };
        let output = pod.cni("ADD")?;
        ensure!(output.success, "attach {name} on {}: {} {}", node.name(), output.json, output.stderr);
        for ip in output.json["ips"].as_array().into_iter().flatten() {
            let address = ip["address"].as_str().and_then(|address| address.split('/').next()).context("no address")?;
            pod.addresses.push(address.parse()?);
        }
        Ok(pod)
    }

    /// Runs one verb of the CNI binary for this pod.
    ///
    /// # Errors
    /// If it cannot be run, or prints something that is not JSON.
    pub fn cni(&self, verb: &str) -> Result<CniOutput> {
        run_cni(&self.node, verb, &self.container(), Some(&self.netns_path()))
    }

    /// Detaches it and removes its namespace.
    ///
    /// # Errors
    /// If the CNI binary says no.
    pub fn detach(self) -> Result<()> {
        let output = self.cni("DEL")?;
        ensure!(output.success, "detach {}: {} {}", self.name, output.json, output.stderr);
        Ok(netns::delete_named(&self.netns_name)?)
    }

    /// The id a runtime would give.
    #[must_use]
    pub fn container(&self) -> String {
        format!("{}-{}", self.node.name(), self.name)
    }

    /// `node/name`.
    #[must_use]
    pub fn label(&self) -> String {
        format!("{}/{}", self.node.name(), self.name)
    }

    /// The node it runs on.
    #[must_use]
    pub fn node(&self) -> &Node {
        &self.node
    }

    /// Its namespace's path.
    #[must_use]
    pub fn netns_path(&self) -> String {
        format!("{}/{}", netns::NAMED_DIRECTORY, self.netns_name)
    }

    /// Its namespace.
    ///
    /// # Errors
    /// If it is gone.
    pub fn netns(&self) -> Result<Netns> {
        Ok(Netns::open_named(&self.netns_name)?)
    }

    /// Its IPv4 address.
    ///
    /// # Panics
    /// If it has none.
    #[must_use]
    pub fn v4(&self) -> IpAddr {
        *self.addresses.iter().find(|address| address.is_ipv4()).expect("the pod has an IPv4 address")
    }

    /// Its IPv6 address.
    ///
    /// # Panics
    /// If it has none.
    #[must_use]
    pub fn v6(&self) -> IpAddr {
        *self.addresses.iter().find(|address| address.is_ipv6()).expect("the pod has an IPv6 address")
    }
}

/// Runs the CNI binary on `node` as a runtime does, with the node's socket and state directory in its configuration.
///
/// # Errors
/// If it cannot be run, or prints something that is not JSON.
pub fn run_cni(node: &Node, verb: &str, container: &str, netns: Option<&str>) -> Result<CniOutput> {
    let config = serde_json::json!({
        "cniVersion": "1.0.0",
        "name": "mesh",
        "type": "mesh-cni",
        "socket": node.directory().join("run/meshd.sock"),
        "stateDir": node.directory().join("state"),
    });
    let mut command = node.command(binary("mesh-cni")?)?;
    command.env_clear();
    command.env("CNI_COMMAND", verb).env("CNI_CONTAINERID", container).env("CNI_IFNAME", "eth0");
    command.env("CNI_PATH", "/opt/cni/bin").envs(netns.map(|netns| ("CNI_NETNS", netns)));
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    child.stdin.take().context("no stdin")?.write_all(config.to_string().as_bytes())?;
    let output = child.wait_with_output()?;
    let stdout = String::from_utf8(output.stdout)?;
    let json = if stdout.trim().is_empty() { Value::Null } else { serde_json::from_str(&stdout)? };
    Ok(CniOutput {
        success: output.status.success(),
        json,
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    })
}
