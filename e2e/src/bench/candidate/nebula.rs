//! Nebula: certificates and configuration of two hosts that know each other.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::Result;

use crate::bench::child::{self, Process};
use crate::bench::link::{self, Link, TUNNEL_MTU};

const PORT: u16 = 4242;
const START: Duration = Duration::from_secs(15);

/// Certificates of both ends.
#[derive(Debug)]
pub struct Certificates {
    directory: PathBuf,
}

impl Certificates {
    /// Makes an authority and signs both ends.
    ///
    /// # Errors
    /// If `cert`, the tool, fails.
    pub fn new(cert: &Path, link: &Link) -> Result<Self> {
        let directory = link.directory().join("nebula");
        // The tool overwrites nothing, so those of an earlier turn go first.
        let _ = fs::remove_dir_all(&directory);
        fs::create_dir_all(&directory)?;
        let made = Self { directory };
        let mut authority = Command::new(cert);
        authority.args(["ca", "-name", "bench", "-out-crt", &made.file("ca.crt"), "-out-key", &made.file("ca.key")]);
        link::output(&mut authority)?;
        for (at, end) in link.ends.iter().enumerate() {
            let mut sign = Command::new(cert);
            sign.args(["sign", "-ca-crt", &made.file("ca.crt"), "-ca-key", &made.file("ca.key")]);
            sign.args(["-name", &format!("end{at}"), "-ip", &format!("{}/24", end.overlay)]);
            sign.args(["-out-crt", &made.file(&format!("{at}.crt")), "-out-key", &made.file(&format!("{at}.key"))]);
            link::output(&mut sign)?;
        }
        Ok(made)
    }

    fn file(&self, name: &str) -> String {
        self.directory.join(name).display().to_string()
    }

    /// Starts the daemon of one end; it makes and configures its interface itself.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start(&self, daemon: &Path, at: usize, link: &Link, log: &Path) -> Result<Process> {
        let (end, other) = (&link.ends[at], &link.ends[1 - at]);
        let config = self.file(&format!("{at}.yml"));
        let (ca, cert, key) = (self.file("ca.crt"), self.file(&format!("{at}.crt")), self.file(&format!("{at}.key")));
        let any = "[{port: any, proto: any, host: any}]";
        fs::write(
            &config,
            format!(
                "pki: {{ca: {ca}, cert: {cert}, key: {key}}}\n\
                 static_host_map:\n  \"{}\": [\"{}:{PORT}\"]\n\
                 lighthouse: {{am_lighthouse: false, interval: 60, hosts: []}}\n\
                 listen: {{host: 0.0.0.0, port: {PORT}}}\npunchy: {{punch: false}}\ncipher: aes\n\
                 tun: {{dev: {}, mtu: {TUNNEL_MTU}, tx_queue: 500}}\nlogging: {{level: error}}\n\
                 firewall:\n  outbound: {any}\n  inbound: {any}\n",
                other.overlay, other.underlay, end.interface
            ),
        )?;
        let mut command = Command::new(daemon);
        command.args(["-config", &config]);
        Process::daemon(&end.netns, command, log)
    }
}

/// Waits until the daemon's interface is up.
///
/// # Errors
/// If it does not come up.
pub fn wait_up(daemon: &mut Process, at: usize, link: &Link) -> Result<()> {
    child::poll("the interface is up", START, || {
        daemon.ensure_alive()?;
        Ok(link.ends[at].has_tunnel(true)?.then_some(()))
    })
}
