//! Child processes of the bench: started inside a namespace, waited for with a deadline, ended with their owner.

use std::fs::File;
use std::io::{BufRead as _, BufReader, Read as _};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use mesh_hostnet::netns::Netns;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// How long a process may take to end after SIGTERM before it is killed.
const GRACE: Duration = Duration::from_secs(5);

/// Makes every wait of the bench give up, so that what it made is removed on the way out.
pub fn interrupt() {
    INTERRUPTED.store(true, Ordering::Relaxed);
}

/// Fails once the bench was interrupted.
///
/// # Errors
/// Then.
pub fn ensure_running() -> Result<()> {
    ensure!(!INTERRUPTED.load(Ordering::Relaxed), "interrupted");
    Ok(())
}

/// Asks `check` until it gives a value, at most for `limit`; gives up at once when the bench is interrupted.
///
/// # Errors
/// After `limit`, or if `check` fails.
pub fn poll<T>(what: &str, limit: Duration, mut check: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let start = Instant::now();
    loop {
        ensure_running()?;
        if let Some(value) = check()? {
            return Ok(value);
        }
        ensure!(start.elapsed() < limit, "{what}: not within {limit:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Lets time pass, unless the bench is interrupted.
///
/// # Errors
/// Then.
pub fn pause(time: Duration) -> Result<()> {
    let end = Instant::now() + time;
    while let Some(left) = end.checked_duration_since(Instant::now()) {
        ensure_running()?;
        std::thread::sleep(left.min(Duration::from_millis(50)));
    }
    Ok(())
}

/// A running process. Dropping it asks it to end, then kills it.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
}

impl Process {
    /// Starts `command` inside `netns`, its output appended to `log`.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn daemon(netns: &Netns, mut command: Command, log: &Path) -> Result<Self> {
        netns.attach_command(&mut command)?;
        let name = command.get_program().to_string_lossy().into_owned();
        let output = File::options().create(true).append(true).open(log)?;
        command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
        let child = command.spawn().with_context(|| format!("start {name}"))?;
        Ok(Self { name, child })
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Fails if it has ended.
    ///
    /// # Errors
    /// Then, with its exit status.
    pub fn ensure_alive(&mut self) -> Result<()> {
        if let Some(status) = self.child.try_wait()? {
            bail!("{} ended: {status}", self.name);
        }
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Ok(pid) = i32::try_from(self.child.id()) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
        }
        let end = Instant::now() + GRACE;
        while matches!(self.child.try_wait(), Ok(None)) && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(5));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// One of the bench's own load generators, which is this executable once more. Dropping it kills it.
#[derive(Debug)]
pub struct Load {
    name: String,
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: BufReader<ChildStdout>,
}

impl Load {
    /// Starts `bench load ARGS` inside `netns`.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start(netns: &Netns, args: &[String]) -> Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("load").args(args);
        netns.attach_command(&mut command)?;
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().context("start a load generator")?;
        let stdin = child.stdin.take();
        let stdout = child.stdout.take().context("a load generator without output")?;
        Ok(Self { name: args.join(" "), child, stdin, stdout: BufReader::new(stdout) })
    }

    /// Waits until it says that it is ready.
    ///
    /// # Errors
    /// If it ends before.
    pub fn wait_ready(mut self) -> Result<Self> {
        let mut line = String::new();
        self.stdout.read_line(&mut line)?;
        if line.trim() != "ready" {
            let complaint = self.complaint();
            bail!("load {}: {complaint}", self.name);
        }
        Ok(self)
    }

    /// Waits for its end; gives the figures it printed.
    ///
    /// # Errors
    /// If it fails, or takes longer than `limit`.
    pub fn figures(mut self, limit: Duration) -> Result<Value> {
        let name = self.name.clone();
        let status = poll(&format!("load {name}"), limit, || Ok(self.child.try_wait()?))?;
        ensure!(status.success(), "load {name}: {status}: {}", self.complaint());
        let mut text = String::new();
        self.stdout.read_to_string(&mut text)?;
        serde_json::from_str(&text).with_context(|| format!("load {name} printed {text:?}"))
    }

    /// Tells it to end, by closing its input, and waits; gives the figures it printed.
    ///
    /// # Errors
    /// As [`figures`](Self::figures).
    pub fn finish(mut self) -> Result<Value> {
        drop(self.stdin.take());
        self.figures(Duration::from_secs(20))
    }

    fn complaint(&mut self) -> String {
        let mut text = String::new();
        let _ = self.child.kill();
        if let Some(stderr) = self.child.stderr.as_mut() {
            let _ = stderr.read_to_string(&mut text);
        }
        text.trim().to_owned()
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
