//! The CNI plugin under a real container runtime: containerd attaches a container, which reaches a pod of another cluster.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::IpAddr;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use mesh_e2e::capture::new_marker;
use mesh_e2e::daemon::binary;
use mesh_e2e::mesh::{MeshNode, scenario};
use mesh_e2e::traffic::ping;
use mesh_e2e::wait;

#[test]
fn containerd_attaches_a_container_that_reaches_the_other_cluster() {
    for (program, package) in [("containerd", "containerd"), ("runc", "runc"), ("busybox", "busybox-static")] {
        let found = ["/usr/bin", "/usr/sbin", "/bin"].iter().any(|bin| Path::new(bin).join(program).is_file());
        assert!(found, "{program} is missing: apt-get install {package}");
    }
    scenario("runtime", &[("east-1", "east"), ("west-1", "west")], |mesh| {
        let west = mesh.pod("west-1", "a")?;
        let mut container = Container::start(mesh.node("east-1"))?;
        let addresses = container.run("ip -o address show dev eth0")?;
        let address = |family: &str| -> Result<IpAddr> {
            let mut words = addresses.split_whitespace().skip_while(|word| *word != family);
            let address = words.nth(1).with_context(|| format!("no {family} address: {addresses}"))?;
            Ok(address.split('/').next().unwrap_or_default().parse()?)
        };
        let (v4, v6) = (address("inet")?, address("inet6")?);
        ensure!(v4.to_string().starts_with("10.1."), "{v4} is not in the pool of the cluster");
        for to in [west.v4(), west.v6()] {
            wait::until(&format!("the container reaches {to}"), Duration::from_secs(10), || {
                container.run(&format!("ping -c 1 -W 1 {to}"))
            })?;
        }
        for to in [v4, v6] {
            let echo = ping(&west.netns()?, to, 3, new_marker())?;
            ensure!(echo.times.len() == 3, "{to}: {} of 3 answered", echo.times.len());
        }
        container.remove()?;
        wait::until_true("the lease is given back", Duration::from_secs(10), || {
            Ok(mesh.node("east-1").status()?["pods"] == 0)
        })?;
        ensure!(ping(&west.netns()?, v4, 1, new_marker())?.times.is_empty(), "the container is gone and answers");
        Ok(())
    });
}

/// A container, and the script that talks to its containerd.
struct Container {
    script: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

impl Container {
    fn start(node: &MeshNode) -> Result<Self> {
        let directory = node.node.directory().join("containerd");
        std::fs::create_dir_all(&directory)?;
        let mut conflist: serde_json::Value = serde_json::from_str(mesh_configs::CONFLIST)?;
        conflist["plugins"][0]["socket"] = node.socket().display().to_string().into();
        conflist["plugins"][0]["stateDir"] = node.node.directory().join("state").display().to_string().into();
        std::fs::write(directory.join("10-mesh.conflist"), conflist.to_string())?;
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/containerd-pod");
        let namespaces =
            ["--mount", "--propagation", "private", "--pid", "--fork", "--kill-child=KILL", "--mount-proc"];
        let mut command = node.node.command("/usr/bin/unshare")?;
        command.args(namespaces).args(["--uts", "/bin/sh", script]).arg(&directory).arg(binary("mesh-cni")?);
        let mut script = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let input = script.stdin.take();
        let output = BufReader::new(script.stdout.take().context("no stdout")?);
        let mut container = Self { script, input, output };
        let started = container.read_until(|line| line == "ready")?;
        started.context("containerd did not attach the container")?;
        Ok(container)
    }

    /// Runs a line of shell in the container; gives what it printed.
    fn run(&mut self, line: &str) -> Result<String> {
        writeln!(self.input.as_mut().context("removed")?, "{line}")?;
        let mut status = String::new();
        let text = self.read_until(|line| match line.strip_prefix("exit ") {
            Some(code) => {
                status = code.to_owned();
                true
            }
            None => false,
        })?;
        let text = text.context("the container is gone")?;
        if status == "0" { Ok(text) } else { bail!("`{line}` exited with {status}: {text}") }
    }

    fn remove(mut self) -> Result<()> {
        drop(self.input.take());
        self.read_until(|line| line == "gone")?.context("the container was not removed")?;
        self.script.wait()?;
        Ok(())
    }

    /// Lines up to one that `is_last`; `None` if the script ended before.
    fn read_until(&mut self, mut is_last: impl FnMut(&str) -> bool) -> Result<Option<String>> {
        let mut text = String::new();
        loop {
            let mut line = String::new();
            if self.output.read_line(&mut line)? == 0 {
                return Ok(None);
            }
            if is_last(line.trim_end()) {
                return Ok(Some(text));
            }
            text.push_str(&line);
        }
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        let _ = self.script.kill();
        let _ = self.script.wait();
    }
}
