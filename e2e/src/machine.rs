//! A systemd of its own on a node: units as on a real machine, with its sandboxes, restarts and credentials.
//!
//! The machine is a set of namespaces in which `/lib/systemd/systemd` is the first process, over a copy-on-write view of
//! this root (`machine/boot.sh`); its network is the node's. None of this machine's units start in it.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use crate::control_group;
use crate::daemon::binary;
use crate::lab::Node;
use crate::wait;

const SYSTEMD: &str = "/lib/systemd/systemd";
/// Where a control group of version 2 is mounted: alone, or beside those of version 1.
const CONTROL_GROUPS: [&str; 2] = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"];
const PREFIX: &str = "mesh-machine-";
const PATIENCE: Duration = Duration::from_secs(60);
const ENVIRONMENT: [&str; 2] = [
    "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "SYSTEMD_UNIT_PATH=/etc/systemd/system:/usr/local/lib/mesh-machine",
];

/// A machine's disk: what differs from this root, in memory. Dropping it forgets it.
#[derive(Debug)]
pub struct Disk {
    node: Node,
    directory: PathBuf,
    /// Keeps the mount namespace in which the disk is.
    holder: Child,
}

/// A booted machine. Dropping it ends every process in it.
#[derive(Debug)]
pub struct Machine {
    node: Node,
    unshare: Child,
    init: String,
    group: PathBuf,
}

/// Why this machine cannot hold another: a reason to leave a test out, by name.
///
/// # Errors
/// What is missing.
pub fn possible() -> Result<()> {
    ensure!(Path::new(SYSTEMD).exists(), "systemd is not installed");
    own_group().map(drop)
}

/// The control group of version 2 that this process is in.
fn own_group() -> Result<PathBuf> {
    let own = fs::read_to_string("/proc/self/cgroup")?;
    let own = own.lines().find_map(|line| line.strip_prefix("0::/")).context("no control group of version 2")?;
    let root = CONTROL_GROUPS.iter().map(Path::new).find(|root| root.join("cgroup.controllers").exists());
    Ok(root.context("control groups of version 2 are not mounted")?.join(own))
}

impl Disk {
    /// An empty one for `node`.
    ///
    /// # Errors
    /// If the kernel refuses the mount.
    pub fn new(node: &Node) -> Result<Self> {
        let directory = node.directory().join("machine");
        fs::create_dir_all(&directory)?;
        let script = "mount -t tmpfs -o size=512m,mode=700 machine \"$1\" && echo there && read -r _";
        let mut holder = Command::new("unshare")
            .args(["--mount", "--propagation", "private", "bash", "-c", script, "disk"])
            .arg(&directory)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("start unshare")?;
        let mut line = String::new();
        BufReader::new(holder.stdout.take().context("no output")?).read_line(&mut line)?;
        let disk = Self { node: node.clone(), directory, holder };
        ensure!(line == "there\n", "the disk of {} cannot be mounted", node.name());
        Ok(disk)
    }

    /// Boots a machine from it, which has to be off.
    ///
    /// # Errors
    /// If the kernel refuses a namespace or a mount, or systemd is not up within a minute.
    pub fn boot(&self) -> Result<Machine> {
        let groups = own_group()?;
        control_group::remove_leftovers(&groups, PREFIX);
        let group = groups.join(format!("{PREFIX}{}-{}", std::process::id(), self.node.name()));
        fs::create_dir_all(&group).with_context(|| format!("make {}", group.display()))?;
        for program in ["meshd", "meshctl", "keyserver"] {
            binary(program)?;
        }
        let holder = Path::new("/proc").join(self.holder.id().to_string());
        let init = holder.join("root").join(self.directory.strip_prefix("/")?).join("init");
        let _ = fs::remove_file(&init);
        let log = self.node.directory().join("boot.log");
        let output = File::options().create(true).append(true).open(&log)?;
        // Ends with this process; is in its control group before that becomes the root in there.
        let script = "echo $$ >\"$1/cgroup.procs\"; shift; \
                      exec unshare --mount --pid --uts --ipc --cgroup --fork --kill-child --propagation private \
                      bash -c \"$@\"";
        let unshare = self
            .node
            .command("nsenter")?
            .arg(format!("--mount={}", holder.join("ns/mnt").display()))
            .args(["setpriv", "--pdeathsig", "KILL", "bash", "-c", script, "boot"])
            .arg(&group)
            .args([include_str!("machine/boot.sh"), "boot.sh"])
            .arg(&self.directory)
            .arg(binary("meshd")?.parent().context("a program without a directory")?)
            .args(ENVIRONMENT)
            .stdout(output.try_clone()?)
            .stderr(output)
            .process_group(0)
            .spawn()
            .context("start nsenter")?;
        let mut machine = Machine { node: self.node.clone(), unshare, init: String::new(), group };
        machine.wait_up(&init).with_context(|| {
            let said = fs::read_to_string(&log).unwrap_or_default();
            format!("boot a machine on {}: {}", self.node.name(), said.trim())
        })?;
        Ok(machine)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // Its input ends.
        drop(self.holder.stdin.take());
        let _ = self.holder.wait();
    }
}

impl Machine {
    fn wait_up(&mut self, init: &Path) -> Result<()> {
        self.init = wait::until("its first process", PATIENCE, || {
            let ended = self.unshare.try_wait()?;
            match fs::read_to_string(init) {
                Ok(text) if text.ends_with('\n') => Ok(Ok(text.trim().to_owned())),
                _ => ended.map(Err).context("it is not there"),
            }
        })?
        .map_err(|status| anyhow::anyhow!("it ended: {status}"))?;
        wait::until_true("multi-user.target", PATIENCE, || {
            Ok(self.output("systemctl", &["is-active", "multi-user.target"]).is_ok())
        })
    }

    /// The node it runs on.
    #[must_use]
    pub fn node(&self) -> &Node {
        &self.node
    }

    /// Runs a program in the machine to its end.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn run(&self, program: &str, args: &[&str]) -> Result<Output> {
        let mut enter = Command::new("nsenter");
        enter.args([
            "--target", &self.init, "--mount", "--pid", "--net", "--uts", "--ipc", "--cgroup", "--root", "--wd",
        ]);
        enter.args(["--", "env", "-i"]).args(ENVIRONMENT).arg(program).args(args).stdin(Stdio::null());
        enter.output().context("start nsenter")
    }

    /// As [`run`](Self::run), and gives back what it printed on stdout.
    ///
    /// # Errors
    /// Also if it exits with anything but 0: with what it printed.
    pub fn output(&self, program: &str, args: &[&str]) -> Result<String> {
        let output = self.run(program, args)?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let line = format!("{program} {}", args.join(" "));
        let name = self.node.name();
        let error = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "on {name}: `{line}`: {}\n{text}{error}", output.status);
        Ok(text)
    }

    /// Runs a script of the shell, as typed by root.
    ///
    /// # Errors
    /// As [`output`](Self::output).
    pub fn sh(&self, script: &str) -> Result<String> {
        self.output("bash", &["-euc", script])
    }

    /// Writes a file of root's, 0644, in directories that need not exist.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn write(&self, path: &str, text: &str) -> Result<()> {
        self.output(
            "bash",
            &["-euc", "install -D -m 0644 /dev/null \"$1\"; printf %s \"$2\" >\"$1\"", "write", path, text],
        )
        .map(drop)
    }

    /// What the journal holds of a unit.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn journal(&self, unit: &str) -> Result<String> {
        self.output("journalctl", &["--no-pager", "--output", "cat", "--unit", unit])
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.unshare.kill();
        let _ = self.unshare.wait();
        // The kernel ends what was in there, a moment later.
        let _ = wait::until_true("the machine's control groups are empty", PATIENCE, || {
            Ok(control_group::remove(&self.group))
        });
    }
}
