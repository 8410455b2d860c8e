//! Writes settings of the kernel, and remembers the old values of those that outlive our links.

use std::collections::BTreeMap;

use mesh_hostnet::sysctl::{self, Key};
use mesh_hostnet::{Error, Result};
use tracing::info;

use crate::desired::{Setting, legacy_ipv6, settings};
use crate::state_dir::{StateDir, StateError};

const FILE: &str = "settings";
const LABEL: &str = "mesh settings 1";
const FIX: &str = "remove it: `meshd down` then leaves kernel settings as they are";
const MAX_BYTES: u64 = 1024 * 1024;

/// Old values, by path below `/proc/sys/net`.
pub(super) type Old = BTreeMap<String, String>;

/// What was remembered.
///
/// # Errors
/// Any [`StateError`] but the directory being in use.
pub(super) fn load(state: &StateDir) -> std::result::Result<Old, StateError> {
    let Some(bytes) = state.read(FILE, LABEL, MAX_BYTES, FIX)? else { return Ok(Old::new()) };
    serde_json::from_slice(&bytes).map_err(|error| state.damaged(FILE, error.to_string(), FIX))
}

/// Makes all settings hold; says what was refused. `old` gains the values that were changed.
pub(super) fn hold(device: &str, pod_links: &[String], has_ipv6: bool, links: &[&str], old: &mut Old) -> Vec<String> {
    let mut wanted = settings(device, pod_links, has_ipv6);
    // Asked of the template of all links: the device itself may be gone at this moment.
    let modern = read("ipv6/conf/default/force_forwarding").is_ok();
    if has_ipv6 && !modern {
        let learning = |link: &&&str| read(&format!("ipv6/conf/{link}/accept_ra")).is_ok_and(|value| value == "1");
        let learning: Vec<String> = links.iter().filter(learning).map(|link| (*link).to_owned()).collect();
        wanted.extend(legacy_ipv6(&learning));
    }
    let mut refused = Vec::new();
    for setting in wanted {
        match hold_one(&setting, old) {
            Ok(()) => {}
            // The link went away, or the kernel never had it.
            Err(error) if error.is_not_found() && (setting.optional || !setting.lasting) => {}
            Err(error) => refused.push(format!("set net/{} to {}: {error}", setting.path, setting.value)),
        }
    }
    refused
}

fn hold_one(setting: &Setting, old: &mut Old) -> Result<()> {
    let key = Key::net(&setting.path)?;
    let before = sysctl::read(&key)?;
    if before == setting.value {
        return Ok(());
    }
    sysctl::write(&key, setting.value)?;
    info!(setting = setting.path, from = before, to = setting.value, "kernel setting changed");
    if setting.lasting {
        old.entry(setting.path.clone()).or_insert(before);
    }
    Ok(())
}

/// Remembers old values, durably.
///
/// # Errors
/// [`StateError::Io`].
pub(super) fn save(state: &StateDir, old: &Old) -> std::result::Result<(), StateError> {
    state.write(FILE, LABEL, &serde_json::to_vec(old).unwrap_or_default())
}

/// Puts old values back and forgets them; says what was refused.
pub(super) fn restore(state: &StateDir) -> Vec<String> {
    let old = match load(state) {
        Ok(old) => old,
        Err(error) => return vec![error.to_string()],
    };
    let put = |(path, value): (&String, &String)| {
        let written = Key::net(path).and_then(|key| sysctl::write(&key, value));
        match written {
            Err(error) if !error.is_not_found() => Some(format!("set net/{path} back to {value}: {error}")),
            _ => None,
        }
    };
    let refused: Vec<String> = old.iter().rev().filter_map(put).collect();
    if refused.is_empty() {
        // What cannot be removed is written again by the next change.
        let _ = std::fs::remove_file(state.path_of(FILE));
    }
    refused
}

fn read(path: &str) -> std::result::Result<String, Error> {
    Key::net(path).and_then(|key| sysctl::read(&key))
}
