//! Daemons as child processes in a node's namespace.

use std::fs::{self, File};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::lab::Node;
use crate::wait;

/// How long a daemon may take to become ready, or to stop: generous, the machine may be busy.
const PATIENCE: Duration = Duration::from_secs(30);

/// A program of this workspace: next to the running executable, or in `MESH_BIN_DIR`.
///
/// # Errors
/// If it was not built.
pub fn binary(name: &str) -> Result<PathBuf> {
    let directory = match std::env::var_os("MESH_BIN_DIR") {
        Some(directory) => PathBuf::from(directory),
        None => {
            let own = std::env::current_exe()?;
            let mut directory = own.parent().context("executable without a directory")?;
            if directory.ends_with("deps") {
                directory = directory.parent().context("deps without a parent")?;
            }
            directory.to_owned()
        }
    };
    let path = directory.join(name);
    ensure!(path.is_file(), "{} is not built: run `cargo build --workspace`, or set MESH_BIN_DIR", path.display());
    Ok(path)
}

/// A running daemon. Dropping it kills it.
#[derive(Debug)]
pub struct Daemon {
    name: String,
    child: Child,
    log: PathBuf,
    notify: UnixDatagram,
}

impl Daemon {
    /// Starts `program` in the node's namespace; its output goes to `NAME.log` in the node's directory, appended.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start(node: &Node, program: &str, args: &[&str]) -> Result<Self> {
        let socket = node.directory().join(format!("{program}.notify"));
        let _ = fs::remove_file(&socket);
        let notify = UnixDatagram::bind(&socket).with_context(|| format!("bind {}", socket.display()))?;
        notify.set_nonblocking(true)?;
        let log = node.directory().join(format!("{program}.log"));
        let output = File::options().create(true).append(true).open(&log)?;
        let child = node
            .command(binary(program)?)?
            .args(args)
            .env("NOTIFY_SOCKET", &socket)
            .stdout(output.try_clone()?)
            .stderr(output)
            .stdin(Stdio::null())
            .spawn()
            .with_context(|| format!("start {program} on {}", node.name()))?;
        Ok(Self { name: format!("{program} on {}", node.name()), child, log, notify })
    }

    /// Waits until it says `READY=1`.
    ///
    /// # Errors
    /// If it ends before, or does not within 30 s: with the end of its log.
    pub fn wait_ready(&mut self) -> Result<()> {
        let mut ended = None;
        let ready = wait::until(&format!("{} is ready", self.name), PATIENCE, || {
            ended = self.child.try_wait()?;
            let mut message = [0; 4096];
            match self.notify.recv(&mut message) {
                Ok(length) if String::from_utf8_lossy(&message[..length]).lines().any(|line| line == "READY=1") => {
                    Ok(true)
                }
                _ if ended.is_some() => Ok(false),
                _ => bail!("no READY=1"),
            }
        });
        match ready {
            Ok(true) => Ok(()),
            Ok(false) => bail!("{} ended with {ended:?}\n{}", self.name, self.log_tail()),
            Err(error) => bail!("{error:#}\n{}", self.log_tail()),
        }
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Where its output goes.
    #[must_use]
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// The last lines it wrote.
    #[must_use]
    pub fn log_tail(&self) -> String {
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        let tail = &lines[lines.len().saturating_sub(40)..];
        format!("--- last lines of {}\n{}", self.log.display(), tail.join("\n"))
    }

    /// Resident memory, in KiB.
    ///
    /// # Errors
    /// If it is gone.
    pub fn resident_kib(&self) -> Result<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid()))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
        Ok(line.trim().trim_end_matches("kB").trim().parse()?)
    }

    /// Sends SIGKILL and waits for the end.
    ///
    /// # Errors
    /// If it cannot be waited for.
    pub fn kill9(mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// Sends SIGTERM and waits for the end.
    ///
    /// # Errors
    /// If it does not end within 30 s.
    pub fn stop(mut self) -> Result<ExitStatus> {
        kill(Pid::from_raw(i32::try_from(self.pid())?), Signal::SIGTERM)?;
        let stopped =
            wait::until(&format!("{} stops", self.name), PATIENCE, || self.child.try_wait()?.context("still running"));
        stopped.with_context(|| self.log_tail())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
