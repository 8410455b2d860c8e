//! Who used the processor: the bench and all it started, kernel threads, daemons, and everybody else.
//!
//! The bench lives in a control group of its own, so that even processes too short-lived to be seen in `/proc` count
//! for the side they belong to. What others used, `foreign`, says how far a sample can be trusted.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use nix::unistd::{SysconfVar, sysconf};

use super::child;
use crate::control_group;

/// Where the two generations of control groups count processor time.
const PLACES: [(&str, Unit); 3] = [
    ("/sys/fs/cgroup/cpuacct", Unit::Nanoseconds),
    ("/sys/fs/cgroup", Unit::StatFile),
    ("/sys/fs/cgroup/unified", Unit::StatFile),
];
const PREFIX: &str = "mesh-bench-";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Unit {
    /// `cpuacct.usage`.
    Nanoseconds,
    /// `usage_usec` in `cpu.stat`.
    StatFile,
}

/// Counts processor time. Dropping it leaves its control group.
#[derive(Debug)]
pub struct Cpu {
    root: PathBuf,
    unit: Unit,
    group: Option<PathBuf>,
    ticks: f64,
}

/// A reading.
#[derive(Debug, Clone, Copy)]
pub struct Reading {
    at: Instant,
    all: f64,
    own: f64,
    kernel: f64,
    daemons: f64,
}

/// What was used between two readings, in seconds of processor time.
#[derive(Debug, Clone, Copy)]
pub struct Used {
    /// By the bench, its load, the daemons and the kernel's threads.
    pub machine: f64,
    /// By the daemons.
    pub daemons: f64,
    /// Cores kept busy by anybody else on average, if that can be told.
    pub foreign: Option<f64>,
}

impl Cpu {
    /// Moves this process into a control group of its own. Without control groups, nothing is known of others.
    ///
    /// # Errors
    /// If the kernel does not tell its clock.
    pub fn new() -> Result<Self> {
        let ticks = sysconf(SysconfVar::CLK_TCK)?.context("no clock tick")? as f64;
        for (root, unit) in PLACES {
            let root = PathBuf::from(root);
            if usage(&root, unit).is_err() {
                continue;
            }
            control_group::remove_leftovers(&root, PREFIX);
            let group = root.join(format!("{PREFIX}{}", std::process::id()));
            if fs::create_dir(&group).and_then(|()| enter(&group)).is_ok() {
                return Ok(Self { root, unit, group: Some(group), ticks });
            }
        }
        Ok(Self { root: PathBuf::new(), unit: Unit::StatFile, group: None, ticks })
    }

    /// Reads all counters; `pids` are the daemons.
    #[must_use]
    pub fn read(&self, pids: &[u32]) -> Reading {
        let daemons = pids.iter().filter_map(|pid| self.of_process(&pid.to_string())).map(|(time, _)| time).sum();
        let group = |path: &Path| usage(path, self.unit).unwrap_or_default();
        let (all, own) = self.group.as_ref().map_or((0.0, 0.0), |own| (group(&self.root), group(own)));
        Reading { at: Instant::now(), all, own, kernel: self.of_kernel_threads(), daemons }
    }

    /// What was used since `before`.
    #[must_use]
    pub fn since(&self, before: &Reading, pids: &[u32]) -> Used {
        let now = self.read(pids);
        let kernel = now.kernel - before.kernel;
        let own = now.own - before.own;
        let time = (now.at - before.at).as_secs_f64();
        let foreign = self.group.is_some().then(|| ((now.all - before.all - own - kernel) / time).max(0.0));
        Used { machine: own + kernel, daemons: now.daemons - before.daemons, foreign }
    }

    /// Waits at most `limit` until others keep less than `cores` busy.
    ///
    /// # Errors
    /// If the bench is interrupted.
    pub fn wait_quiet(&self, cores: f64, limit: Duration) -> Result<()> {
        let end = Instant::now() + limit;
        while Instant::now() < end {
            let before = self.read(&[]);
            child::pause(Duration::from_millis(500).min(limit))?;
            if self.since(&before, &[]).foreign.is_none_or(|foreign| foreign <= cores) {
                break;
            }
        }
        Ok(())
    }

    fn of_kernel_threads(&self) -> f64 {
        let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
        let names = processes.filter_map(|entry| entry.file_name().into_string().ok());
        let threads = names.filter(|name| name.starts_with(|first: char| first.is_ascii_digit()));
        threads.filter_map(|pid| self.of_process(&pid)).filter(|(_, parent)| *parent == 2).map(|(time, _)| time).sum()
    }

    /// Seconds a process used, and its parent.
    fn of_process(&self, pid: &str) -> Option<(f64, u32)> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name, in parentheses, may hold anything.
        let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
        let ticks = |at: usize| fields.get(at)?.parse::<f64>().ok();
        Some(((ticks(11)? + ticks(12)?) / self.ticks, fields.get(1)?.parse().ok()?))
    }
}

impl Drop for Cpu {
    fn drop(&mut self) {
        if let Some(group) = &self.group {
            let _ = enter(&self.root);
            let _ = fs::remove_dir(group);
        }
    }
}

/// Seconds of processor time of a process's threads, to the nanosecond: `/proc/PID/stat` counts in hundredths. What
/// threads that have ended used is not in it.
///
/// # Errors
/// If it is gone.
pub fn of_threads(pid: u32) -> Result<f64> {
    let mut nanos = 0.0;
    for thread in fs::read_dir(format!("/proc/{pid}/task"))?.flatten() {
        // One that ended since the directory was read.
        let Ok(stat) = fs::read_to_string(thread.path().join("schedstat")) else { continue };
        nanos += stat.split_whitespace().next().context("an empty schedstat")?.parse::<f64>()?;
    }
    Ok(nanos / 1e9)
}

/// Resident memory of a process, in MiB.
///
/// # Errors
/// If it is gone.
pub fn resident_mib(pid: u32) -> Result<f64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    let kib: f64 = line.trim().trim_end_matches("kB").trim().parse()?;
    Ok(kib / 1024.0)
}

fn enter(group: &Path) -> std::io::Result<()> {
    fs::write(group.join("cgroup.procs"), std::process::id().to_string())
}

/// Seconds of processor time a control group used.
fn usage(group: &Path, unit: Unit) -> Result<f64> {
    if unit == Unit::Nanoseconds {
        return Ok(fs::read_to_string(group.join("cpuacct.usage"))?.trim().parse::<f64>()? / 1e9);
    }
    let stat = fs::read_to_string(group.join("cpu.stat"))?;
    let usage = stat.lines().find_map(|line| line.strip_prefix("usage_usec ")).context("no usage_usec")?;
    Ok(usage.parse::<f64>()? / 1e6)
}
