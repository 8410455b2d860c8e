//! One sample of one test: load through the tunnel, and what it took.

use std::fmt;
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde_json::{Map, Value, json};

use super::child::{self, Load};
use super::cpu::{self, Cpu};
use super::search;
use super::tunnel::Tunnel;

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Test {
    /// One TCP stream
    Tcp1,
    /// Four TCP streams
    Tcp4,
    /// One byte there and back over TCP
    Rr,
    /// Echo requests: 100 a second, then back to back
    Ping,
    /// Datagrams of 1,400 bytes, at most 1 % lost
    Udp1400,
    /// Datagrams of 64 bytes, at most 1 % lost
    Udp64,
    /// Start, first packet, memory before and after load
    Start,
    /// 1,000 and 10,000 peers known
    Peers,
}

impl Test {
    /// All of them, in the order of a run.
    pub const ALL: [Self; 8] =
        [Self::Ping, Self::Rr, Self::Tcp1, Self::Tcp4, Self::Udp1400, Self::Udp64, Self::Start, Self::Peers];

    /// Its name in results.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Tcp1 => "tcp1",
            Self::Tcp4 => "tcp4",
            Self::Rr => "rr",
            Self::Ping => "ping",
            Self::Udp1400 => "udp1400",
            Self::Udp64 => "udp64",
            Self::Start => "start",
            Self::Peers => "peers",
        }
    }

    /// Whether it loads a tunnel that is up; the others start their own.
    #[must_use]
    pub fn is_load(self) -> bool {
        !matches!(self, Self::Start | Self::Peers)
    }

    /// Whether a noisy sample is taken again as a whole; the search of the others copes by itself.
    #[must_use]
    pub fn is_repeated(self) -> bool {
        matches!(self, Self::Tcp1 | Self::Tcp4 | Self::Rr)
    }
}

impl fmt::Display for Test {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// How long and how careful.
#[derive(Debug, Clone, Copy)]
pub struct Pace {
    /// Seconds of each TCP and request/response sample.
    pub seconds: f64,
    /// Seconds of each attempt at a UDP rate.
    pub udp_seconds: f64,
    /// A UDP rate is found when the next one that fails is at most so many times higher.
    pub udp_close: f64,
    /// Echo requests back to back; a fortieth of it with pauses.
    pub pings: usize,
    /// Numbers of peers.
    pub peers: &'static [u32],
    /// Seconds to look at idle daemons with many peers.
    pub idle_seconds: f64,
    /// Cores that others may keep busy in a sample that counts as quiet.
    pub max_foreign: f64,
    /// How long to wait for quiet before a sample.
    pub wait_quiet: Duration,
    /// How often a noisy sample is taken again.
    pub repeats: u32,
}

/// Figures of a sample by name.
pub type Figures = Map<String, Value>;

/// Loads `tunnel` once.
///
/// # Errors
/// If load does not get through.
pub fn load(test: Test, tunnel: &Tunnel<'_>, cpu: &Cpu, pace: &Pace) -> Result<Figures> {
    let value = match test {
        Test::Tcp1 => tcp(tunnel, 1, pace.seconds),
        Test::Tcp4 => tcp(tunnel, 4, pace.seconds),
        Test::Rr => rr(tunnel, pace.seconds),
        Test::Ping => ping(tunnel, pace.pings),
        Test::Udp1400 => search::udp(tunnel, 1400, cpu, pace),
        Test::Udp64 => search::udp(tunnel, 64, cpu, pace),
        Test::Start | Test::Peers => unreachable!("not a load"),
    }?;
    object(value)
}

/// Runs a generator at the first end to its end.
///
/// # Errors
/// If it fails, or is still running `seconds` and half a minute later.
pub(super) fn near(tunnel: &Tunnel<'_>, args: &[String], seconds: f64) -> Result<Value> {
    let limit = Duration::from_secs_f64(seconds) + Duration::from_secs(30);
    Load::start(&tunnel.link().ends[0].netns, args)?.figures(limit)
}

/// Starts a generator at the second end and waits until it is ready.
///
/// # Errors
/// If it fails.
pub(super) fn far(tunnel: &Tunnel<'_>, args: &[String]) -> Result<Load> {
    Load::start(&tunnel.link().ends[1].netns, args)?.wait_ready()
}

pub(super) fn args(verb: &str, tunnel: &Tunnel<'_>, rest: &[&dyn fmt::Display]) -> Vec<String> {
    let mut args = vec![verb.to_owned(), tunnel.target.to_string()];
    args.extend(rest.iter().map(ToString::to_string));
    args
}

fn tcp(tunnel: &Tunnel<'_>, streams: usize, seconds: f64) -> Result<Value> {
    let server = far(tunnel, &args("tcp-serve", tunnel, &[&streams]))?;
    let sent = near(tunnel, &args("tcp-send", tunnel, &[&streams, &seconds]), seconds)?;
    let got = server.figures(Duration::from_secs(20))?;
    let bytes = number(&got, "bytes")?;
    Ok(json!({
        "mbit_per_second": bytes * 8.0 / 1e6 / number(&got, "seconds")?,
        "gb": bytes / 1e9,
        "retransmits": sent["retransmits"],
    }))
}

fn rr(tunnel: &Tunnel<'_>, seconds: f64) -> Result<Value> {
    let server = far(tunnel, &args("rr-serve", tunnel, &[]))?;
    let figures = near(tunnel, &args("rr", tunnel, &[&seconds]), seconds)?;
    server.finish()?;
    Ok(figures)
}

fn ping(tunnel: &Tunnel<'_>, count: usize) -> Result<Value> {
    let slow = (count / 25).max(10);
    let idle = near(tunnel, &args("ping", tunnel, &[&slow, &10_000]), slow as f64 / 100.0)?;
    let flood = near(tunnel, &args("ping", tunnel, &[&count, &0]), 30.0)?;
    Ok(json!({
        "idle_p50_us": idle["p50_us"],
        "idle_p99_us": idle["p99_us"],
        "flood_p50_us": flood["p50_us"],
        "flood_p99_us": flood["p99_us"],
        "lost": number(&idle, "sent")? + number(&flood, "sent")? - number(&idle, "answered")? - number(&flood, "answered")?,
    }))
}

/// Memory and processor time of the first end's daemon as more and more peers are known to it, and throughput then.
///
/// # Errors
/// If the daemon refuses, or load does not get through.
pub fn peers(tunnel: &Tunnel<'_>, pace: &Pace) -> Result<Figures> {
    let pid = *tunnel.pids().first().context("nobody to give peers to")?;
    let mut figures = Figures::new();
    figures.insert("rss_mib".to_owned(), json!(cpu::resident_mib(pid)?));
    for &extra in pace.peers {
        let took = tunnel.set_peers(extra)?;
        // What configuration set going is not idling: give it a moment, the same for all.
        child::pause(Duration::from_secs_f64(pace.idle_seconds / 2.0))?;
        let before = cpu::of_threads(pid)?;
        child::pause(Duration::from_secs_f64(pace.idle_seconds))?;
        let idle = (cpu::of_threads(pid)? - before) / pace.idle_seconds * 100.0;
        let rss = cpu::resident_mib(pid)?;
        let loaded = tcp(tunnel, 1, pace.seconds).with_context(|| format!("with {extra} peers"))?;
        for (name, value) in [
            ("configure_s", json!(took.as_secs_f64())),
            ("rss_mib", json!(rss)),
            ("idle_cpu_percent", json!(idle)),
            ("mbit_per_second", loaded["mbit_per_second"].clone()),
        ] {
            figures.insert(format!("{extra}_{name}"), value);
        }
    }
    Ok(figures)
}

/// A number that a generator printed.
///
/// # Errors
/// If it is not there.
pub(super) fn number(figures: &Value, name: &str) -> Result<f64> {
    figures[name].as_f64().with_context(|| format!("no {name} in {figures}"))
}

fn object(value: Value) -> Result<Figures> {
    match value {
        Value::Object(figures) => Ok(figures),
        other => anyhow::bail!("not figures: {other}"),
    }
}
