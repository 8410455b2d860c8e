//! What takes part: the bare link, Mesh, and its rivals.

pub mod nebula;
pub mod wireguard;

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;

/// A candidate that can be had on this machine.
#[derive(Debug, Clone)]
pub struct Candidate {
    /// Its name in results.
    pub name: String,
    /// What it says of its version.
    pub version: String,
    /// How it is run.
    pub kind: Kind,
}

impl Candidate {
    /// Whether it can be given peers: those that wg(8) configures.
    #[must_use]
    pub fn takes_peers(&self) -> bool {
        matches!(self.kind, Kind::WireGuard(_))
    }
}

/// How a candidate is run.
#[derive(Debug, Clone)]
pub enum Kind {
    /// No tunnel: the link itself.
    Bare,
    /// A userspace WireGuard that wg(8) configures.
    WireGuard(Program),
    /// Nebula, with `nebula-cert` beside it.
    Nebula {
        /// The daemon.
        daemon: PathBuf,
        /// The tool that signs certificates.
        cert: PathBuf,
    },
}

/// A program that makes an interface and stays in the foreground.
#[derive(Debug, Clone)]
pub struct Program {
    /// What to start.
    pub path: PathBuf,
    /// Its arguments; the interface's name comes last.
    pub args: &'static [&'static str],
    /// Its environment.
    pub env: &'static [(&'static str, &'static str)],
}

/// Where programs may be.
#[derive(Debug, Clone, Default)]
pub struct Places {
    /// `mesh-wg`; beside this executable if not given.
    pub mesh_wg: Option<PathBuf>,
    /// A wireguard-go other than the one that is installed.
    pub wireguard_go: Option<PathBuf>,
    /// Where `cargo install --root` put rivals.
    pub rivals: PathBuf,
}

/// The candidates that can be had, and those that cannot, with the reason.
#[derive(Debug, Default)]
pub struct Field {
    /// Take part.
    pub present: Vec<Candidate>,
    /// Do not.
    pub absent: Vec<(String, String)>,
}

/// Looks for all candidates.
#[must_use]
pub fn find(places: &Places) -> Field {
    let mut field = Field::default();
    field.present.push(Candidate { name: "bare".to_owned(), version: kernel(), kind: Kind::Bare });
    let mesh = places.mesh_wg.clone().or_else(beside).unwrap_or_else(|| PathBuf::from("mesh-wg"));
    field.wireguard("mesh", &mesh, &["-f"], &[], &["--version"]);
    let foreground = &[("WG_PROCESS_FOREGROUND", "1"), ("LOG_LEVEL", "error")];
    if let Some(path) = &places.wireguard_go {
        field.wireguard("wireguard-go-given", path, &["-f"], foreground, &["--version"]);
    }
    field.wireguard("wireguard-go", &places.look("wireguard-go"), &["-f"], foreground, &["--version"]);
    field.wireguard("boringtun-cli", &places.look("boringtun-cli"), &["-f"], &[("WG_SUDO", "true")], &["--version"]);
    let gotatun = &["-f", "-v", "error", "--disable-drop-privileges"];
    field.wireguard("gotatun-cli", &places.look("gotatun"), gotatun, &[], &["--version"]);
    field.nebula(places);
    field
}

impl Field {
    fn wireguard(
        &mut self,
        name: &str,
        path: &Path,
        args: &'static [&'static str],
        env: &'static [(&'static str, &'static str)],
        version: &[&str],
    ) {
        match version_of(path, version) {
            Ok(version) => {
                let kind = Kind::WireGuard(Program { path: path.to_owned(), args, env });
                self.present.push(Candidate { name: name.to_owned(), version, kind });
            }
            Err(error) => self.absent.push((name.to_owned(), format!("{error:#}"))),
        }
    }

    fn nebula(&mut self, places: &Places) {
        let (daemon, cert) = (places.look("nebula"), places.look("nebula-cert"));
        match version_of(&daemon, &["-version"]).and_then(|version| version_of(&cert, &["-version"]).map(|_| version)) {
            Ok(version) => {
                self.present.push(Candidate {
                    name: "nebula".to_owned(),
                    version,
                    kind: Kind::Nebula { daemon, cert },
                });
            }
            Err(error) => self.absent.push(("nebula".to_owned(), format!("{error:#}"))),
        }
    }
}

impl Places {
    /// The program that was installed for the bench, or else the one in the search path.
    fn look(&self, program: &str) -> PathBuf {
        let installed = self.rivals.join("bin").join(program);
        if installed.is_file() { installed } else { PathBuf::from(program) }
    }
}

/// `mesh-wg` of the same build as this executable.
fn beside() -> Option<PathBuf> {
    let path = std::env::current_exe().ok()?.parent()?.join("mesh-wg");
    path.is_file().then_some(path)
}

/// The first line in which a program tells its version.
fn version_of(path: &Path, args: &[&str]) -> Result<String> {
    let output = super::link::output(Command::new(path).args(args))?;
    Ok(output.lines().next().unwrap_or_default().trim().to_owned())
}

fn kernel() -> String {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    format!("Linux {}", release.trim())
}
