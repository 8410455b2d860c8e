//! Userspace WireGuard, configured by wg(8).

use std::fmt::Write as _;
use std::fs;
use std::net::Ipv4Addr;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};

use super::Program;
use crate::bench::child::{self, Process};
use crate::bench::link::{self, End, Link};

/// Where userspace implementations put their sockets; the tools look nowhere else.
const SOCKETS: &str = "/var/run/wireguard";
const PORT: u16 = 51820;
const START: Duration = Duration::from_secs(15);

/// The keys of both ends.
#[derive(Debug)]
pub struct Keys {
    pairs: [(String, String); 2],
}

impl Keys {
    /// Makes them.
    ///
    /// # Errors
    /// Without wg(8).
    pub fn new() -> Result<Self> {
        Ok(Self { pairs: [pair()?, pair()?] })
    }
}

fn pair() -> Result<(String, String)> {
    use std::io::Write as _;
    let private = link::output(Command::new("wg").arg("genkey"))?;
    let mut child = Command::new("wg").arg("pubkey").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    child.stdin.take().context("no input")?.write_all(private.as_bytes())?;
    let output = child.wait_with_output()?;
    ensure!(output.status.success(), "wg pubkey: {}", output.status);
    Ok((private.trim().to_owned(), String::from_utf8(output.stdout)?.trim().to_owned()))
}

/// Starts the daemon of one end.
///
/// # Errors
/// If it cannot be started.
pub fn start(program: &Program, end: &End, log: &Path) -> Result<Process> {
    let mut command = Command::new(&program.path);
    command.args(program.args).arg(&end.interface).envs(program.env.iter().copied());
    Process::daemon(&end.netns, command, log)
}

/// Waits for the daemon's socket and interface, gives it keys and its peer, and the interface its address.
///
/// # Errors
/// If it does not come up.
pub fn configure(daemon: &mut Process, keys: &Keys, at: usize, link: &Link) -> Result<()> {
    let end = &link.ends[at];
    child::poll("the daemon's socket", START, || {
        daemon.ensure_alive()?;
        // wg(8) removes a socket that does not listen yet.
        Ok((UnixStream::connect(socket(end)).is_ok() && end.has_tunnel(false)?).then_some(()))
    })?;
    set(keys, at, link, 0)?;
    end.configure_tunnel()
}

/// Configures one end, with `extra` peers beside the other end; gives the time it took.
///
/// # Errors
/// If the daemon refuses.
pub fn set(keys: &Keys, at: usize, link: &Link, extra: u32) -> Result<Duration> {
    let path = link.directory().join(format!("wg{at}.conf"));
    fs::write(&path, config(keys, at, link, extra)?)?;
    let start = Instant::now();
    link.ends[at].command("wg", &["setconf", &link.ends[at].interface, &path.display().to_string()])?;
    Ok(start.elapsed())
}

fn config(keys: &Keys, at: usize, link: &Link, extra: u32) -> Result<String> {
    let other = &link.ends[1 - at];
    let mut text = format!("[Interface]\nPrivateKey = {}\nListenPort = {PORT}\n", keys.pairs[at].0);
    let mut peer = |key: &str, allowed: Ipv4Addr, endpoint: Ipv4Addr| {
        write!(text, "[Peer]\nPublicKey = {key}\nAllowedIPs = {allowed}/32\nEndpoint = {endpoint}:{PORT}\n")
    };
    peer(&keys.pairs[1 - at].1, other.overlay, other.underlay)?;
    for number in 0..extra {
        let [_, high, middle, low] = number.to_be_bytes();
        // Nobody is there: known and idle. 198.18.0.0/15 is for benchmarks (RFC 2544).
        let endpoint = Ipv4Addr::from(u32::from(Ipv4Addr::new(198, 18, 0, 0)) + number % (1 << 17));
        peer(&random_key()?, Ipv4Addr::new(10, 100 + high, middle, low), endpoint)?;
    }
    Ok(text)
}

/// Any 32 bytes are a public key.
fn random_key() -> Result<String> {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut bytes = [0; 33];
    getrandom::fill(&mut bytes[..32])?;
    let mut text: String = bytes
        .chunks(3)
        .flat_map(|three| {
            let bits = u32::from_be_bytes([0, three[0], three[1], three[2]]);
            [18, 12, 6, 0].map(|shift| char::from(ALPHABET[(bits >> shift & 63) as usize]))
        })
        .collect();
    text.replace_range(43.., "=");
    Ok(text)
}

/// Removes the socket of one end, should the daemon have left it.
pub fn remove_socket(end: &End) {
    let _ = fs::remove_file(socket(end));
}

/// Removes sockets of benches that were killed.
pub fn remove_leftovers() {
    for entry in fs::read_dir(SOCKETS).into_iter().flatten().flatten() {
        let name = entry.file_name();
        if name.to_string_lossy().rsplit_once('.').is_some_and(|(interface, _)| link::is_left_behind(interface)) {
            let _ = fs::remove_file(entry.path());
        }
    }
}

fn socket(end: &End) -> PathBuf {
    Path::new(SOCKETS).join(format!("{}.sock", end.interface))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn random_keys_have_the_shape_of_keys() {
        let (one, other) = (random_key().unwrap(), random_key().unwrap());
        assert_ne!(one, other);
        for key in [one, other] {
            assert_eq!(key.len(), 44);
            assert!(key.ends_with('=') && !key[..43].contains('='), "{key}");
            // 32 bytes leave two bits of the last character: they are zero.
            assert!("AEIMQUYcgkosw048".contains(&key[42..43]), "{key}");
        }
    }
}
