//! Which offloads this node uses: all that the kernel does right, less what the configuration turns off.
//!
//! What the kernel does right is tried once for each boot, in a network namespace of its own. Making one needs more rights
//! than the daemon has under its unit, so there `meshd try-offloads` runs before it, and leaves what it found beside the
//! daemon's socket.

mod scratch;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use mesh_dataplane::packet::offload::Offloads;
use mesh_dataplane::selfcheck::Class;
use mesh_dataplane::udp::Trains;
use serde::{Deserialize, Serialize};
use tracing::{debug, info, warn};

use crate::config::Config;

/// The file beside the socket.
const FILE: &str = "offloads.json";
/// Longest such file, in bytes: seven kinds with a sentence each.
const MAX_BYTES: u64 = 16 * 1024;

/// What was found on this kernel since it booted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Tried {
    /// Id of the boot.
    boot: String,
    /// Release of the kernel.
    pub(crate) kernel: String,
    /// What is wrong, by the name of the offload; all others came out right.
    pub(crate) faults: BTreeMap<String, String>,
}

impl std::fmt::Display for Tried {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "kernel {}:", self.kernel)?;
        for class in Class::ALL {
            match self.faults.get(class.as_str()) {
                Some(fault) => write!(f, "\n  {class}: off, {fault}")?,
                None => write!(f, "\n  {class}: right")?,
            }
        }
        Ok(())
    }
}

/// What this node uses, and why not more.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Choice {
    /// Of the device.
    pub(crate) offloads: Offloads,
    /// Of the sockets.
    pub(crate) trains: Trains,
    /// Why those that are off are.
    pub(crate) off: BTreeMap<Class, String>,
    /// Why they were not tried, if they were not.
    pub(crate) untried: Option<String>,
}

/// Decides for a daemon that starts: by what was found before, or by trying now.
pub(crate) fn choose(config: &Config) -> Choice {
    let file = file_of(config);
    let tried = match stored(&file) {
        Some(tried) => Ok(tried),
        None => try_and_store(&file),
    };
    let choice = combine(tried, &config.device.offloads_off);
    for (class, reason) in &choice.off {
        info!(offload = class.as_str(), reason, "offload is off");
    }
    if let Some(reason) = &choice.untried {
        warn!(error = reason, "offloads were not tried on this kernel");
    }
    choice
}

/// `meshd try-offloads`: tries now, unless it is known since the kernel booted.
///
/// # Errors
/// The kernel refused a scratch namespace or device, or the file cannot be written.
pub(crate) fn run(config: &Config, again: bool) -> anyhow::Result<Tried> {
    let file = file_of(config);
    match stored(&file).filter(|_| !again) {
        Some(tried) => Ok(tried),
        None => {
            let tried = scratch::try_all()?;
            store(&file, &tried)?;
            Ok(tried)
        }
    }
}

fn file_of(config: &Config) -> PathBuf {
    config.socket.with_file_name(FILE)
}

fn combine(tried: anyhow::Result<Tried>, turned_off: &[Class]) -> Choice {
    let mut choice = Choice { offloads: Offloads::ALL, trains: Trains::ALL, ..Choice::default() };
    match tried {
        Ok(tried) => {
            for class in Class::ALL {
                if let Some(fault) = tried.faults.get(class.as_str()) {
                    choice.off.insert(class, fault.clone());
                }
            }
        }
        Err(error) => choice.untried = Some(format!("{error:#}")),
    }
    for class in turned_off {
        choice.off.insert(*class, "the configuration says so".into());
    }
    for class in choice.off.keys() {
        class.turn_off(&mut choice.offloads, &mut choice.trains);
    }
    choice
}

fn try_and_store(file: &Path) -> anyhow::Result<Tried> {
    let tried = scratch::try_all()?;
    if let Err(error) = store(file, &tried) {
        debug!(%error, "what was found of offloads is not kept");
    }
    Ok(tried)
}

/// What was found since this kernel booted; a file that is damaged or of another boot counts as none.
fn stored(file: &Path) -> Option<Tried> {
    let opened = File::options().read(true).custom_flags(nix::fcntl::OFlag::O_NOFOLLOW.bits()).open(file).ok()?;
    let mut text = String::new();
    opened.take(MAX_BYTES).read_to_string(&mut text).ok()?;
    let tried: Tried = serde_json::from_str(&text).ok()?;
    (Some(&tried.boot) == boot().as_ref() && tried.kernel == kernel()).then_some(tried)
}

fn store(file: &Path, tried: &Tried) -> io::Result<()> {
    let new = file.with_extension(format!("{}.new", std::process::id()));
    let _ = fs::remove_file(&new);
    let mut opened = File::options().write(true).create_new(true).mode(0o600).open(&new)?;
    let written = serde_json::to_vec(tried).map_err(io::Error::from).and_then(|text| opened.write_all(&text));
    written.and_then(|()| fs::rename(&new, file)).inspect_err(|_| {
        let _ = fs::remove_file(&new);
    })
}

/// Differs for each boot.
fn boot() -> Option<String> {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").ok().map(|id| id.trim().to_owned())
}

fn kernel() -> String {
    nix::sys::utsname::uname().map(|name| name.release().to_string_lossy().into_owned()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    fn tried(faults: &[(&str, &str)]) -> Tried {
        let faults = faults.iter().map(|(class, fault)| ((*class).to_owned(), (*fault).to_owned())).collect();
        Tried { boot: boot().unwrap(), kernel: kernel(), faults }
    }

    #[test]
    fn what_is_wrong_and_what_is_not_wanted_is_off() {
        let choice = combine(Ok(tried(&[("uso", "wrong"), ("udp-gro", "refused")])), &[Class::UdpCoalesce, Class::Uso]);
        let reasons: Vec<_> = choice.off.iter().map(|(class, why)| (class.as_str(), why.as_str())).collect();
        let said = "the configuration says so";
        assert_eq!(reasons, [("uso", said), ("udp-coalesce", said), ("udp-gro", "refused")]);
        assert_eq!(choice.offloads, Offloads { uso: false, udp_coalesce: false, ..Offloads::ALL });
        assert_eq!(choice.trains, Trains { send: true, receive: false });
        let unknown = combine(Err(anyhow::anyhow!("no right")), &[Class::Tso6]);
        assert_eq!(
            (unknown.untried.as_deref(), unknown.offloads.tso6, unknown.offloads.tso4),
            (Some("no right"), false, true)
        );
    }

    #[test]
    fn what_is_stored_counts_for_this_boot_only() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join(FILE);
        assert_eq!(stored(&file), None);
        let found = tried(&[("tso4", "wrong")]);
        store(&file, &found).unwrap();
        store(&file, &found).unwrap();
        assert_eq!(stored(&file), Some(found.clone()));
        for other in [Tried { boot: "other".into(), ..found.clone() }, Tried { kernel: "1.0".into(), ..found }] {
            store(&file, &other).unwrap();
            assert_eq!(stored(&file), None);
        }
        fs::write(&file, "{").unwrap();
        assert_eq!(stored(&file), None, "damaged");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn trying_leaves_nothing_and_is_remembered() {
        assert!(nix::unistd::geteuid().is_root(), "this test makes a network namespace: run it as root");
        let folder = tempfile::tempdir().unwrap();
        let config = Config { socket: folder.path().join("meshd.sock"), ..Config::default() };
        let first = run(&config, false).unwrap();
        assert_eq!(first.kernel, kernel());
        // What another one found is believed until it is to be tried again.
        let other = Tried { faults: [("uso".to_owned(), "wrong".to_owned())].into(), ..first.clone() };
        store(&file_of(&config), &other).unwrap();
        assert_eq!(run(&config, false).unwrap(), other);
        assert_eq!(choose(&config).off.len(), 1);
        assert_eq!(run(&config, true).unwrap(), first);
    }
}
