//! A candidate at work: its two daemons on a link, from their start until a packet crosses, and their end.

use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

use super::candidate::nebula::{self, Certificates};
use super::candidate::wireguard::{self, Keys};
use super::candidate::{Candidate, Kind};
use super::child::Process;
use super::link::Link;
use super::probe;

/// A handshake that takes longer has failed.
const FIRST_PACKET: Duration = Duration::from_secs(30);

/// A running candidate. Dropping it ends its daemons.
#[derive(Debug)]
pub struct Tunnel<'a> {
    link: &'a Link,
    daemons: Vec<Process>,
    keys: Option<Keys>,
    /// Where load goes.
    pub target: Ipv4Addr,
    /// From the start of the daemons to the first echo that came back.
    pub start: Duration,
    /// From the first echo request, sent without a session, to the first echo that came back.
    pub first_packet: Duration,
}

impl<'a> Tunnel<'a> {
    /// Starts `candidate` on `link`.
    ///
    /// # Errors
    /// If no packet crosses: the error carries the last lines of the daemons' logs.
    pub fn up(candidate: &Candidate, link: &'a Link) -> Result<Self> {
        let mut tunnel = Self {
            link,
            daemons: Vec::new(),
            keys: None,
            target: link.ends[1].underlay,
            start: Duration::ZERO,
            first_packet: Duration::ZERO,
        };
        let _ = std::fs::remove_file(tunnel.log());
        let credentials = Credentials::new(&candidate.kind, link)?;
        let began = Instant::now();
        match (&candidate.kind, credentials) {
            (Kind::WireGuard(program), Credentials::Keys(keys)) => {
                for end in &link.ends {
                    tunnel.daemons.push(wireguard::start(program, end, &tunnel.log())?);
                }
                for (at, daemon) in tunnel.daemons.iter_mut().enumerate() {
                    wireguard::configure(daemon, &keys, at, link).with_context(|| log_tail(link))?;
                }
                tunnel.keys = Some(keys);
            }
            (Kind::Nebula { daemon, .. }, Credentials::Certificates(certificates)) => {
                for at in 0..link.ends.len() {
                    tunnel.daemons.push(certificates.start(daemon, at, link, &tunnel.log())?);
                }
                for (at, daemon) in tunnel.daemons.iter_mut().enumerate() {
                    nebula::wait_up(daemon, at, link).with_context(|| log_tail(link))?;
                }
            }
            _ => {}
        }
        if !tunnel.daemons.is_empty() {
            tunnel.target = link.ends[1].overlay;
        }
        tunnel.first_packet =
            probe::first_answer(&link.ends[0].netns, tunnel.target, FIRST_PACKET).with_context(|| log_tail(link))?;
        tunnel.start = began.elapsed();
        Ok(tunnel)
    }

    /// The link it is on.
    #[must_use]
    pub fn link(&self) -> &'a Link {
        self.link
    }

    /// Process ids of its daemons; empty for the bare link.
    #[must_use]
    pub fn pids(&self) -> Vec<u32> {
        self.daemons.iter().map(Process::pid).collect()
    }

    /// Gives the first end `extra` peers beside the second; the time it took.
    ///
    /// # Errors
    /// If the daemon refuses, or is not configured by wg(8).
    pub fn set_peers(&self, extra: u32) -> Result<Duration> {
        wireguard::set(self.keys.as_ref().context("wg(8) does not configure this")?, 0, self.link, extra)
    }

    fn log(&self) -> PathBuf {
        log(self.link)
    }
}

/// What is made before the clock of the start runs.
enum Credentials {
    None,
    Keys(Keys),
    Certificates(Certificates),
}

impl Credentials {
    fn new(kind: &Kind, link: &Link) -> Result<Self> {
        Ok(match kind {
            Kind::Bare => Self::None,
            Kind::WireGuard(_) => Self::Keys(Keys::new()?),
            Kind::Nebula { cert, .. } => Self::Certificates(Certificates::new(cert, link)?),
        })
    }
}

impl Drop for Tunnel<'_> {
    fn drop(&mut self) {
        self.daemons.clear();
        for end in &self.link.ends {
            // Both are gone already if the daemon ended as it should.
            let _ = end.remove_tunnel();
            wireguard::remove_socket(end);
        }
    }
}

fn log(link: &Link) -> PathBuf {
    link.directory().join("daemons.log")
}

fn log_tail(link: &Link) -> String {
    let text = std::fs::read_to_string(log(link)).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    format!("daemons said: {:?}", lines[lines.len().saturating_sub(5)..].join(" | "))
}
