//! Leases on disk, with the boot they were made in.

use serde::{Deserialize, Serialize};

use super::ipam::Ipam;
use crate::state_dir::{StateDir, StateError};

const FILE: &str = "leases";
const LABEL: &str = "mesh leases 1";
/// A lease takes about 200 bytes, so this is room for eighty thousand.
const MAX_BYTES: u64 = 16 * 1024 * 1024;
const FIX: &str = "stop all pods of this node, remove it, and start meshd";
/// Changes with each boot, and only then.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

#[derive(Serialize, Deserialize)]
struct Stored {
    boot: String,
    ipam: Ipam,
}

/// Reads the leases, and says whether the machine was started anew since they were stored.
///
/// # Errors
/// Any [`StateError`] but the directory being in use.
pub(super) fn load(state: &StateDir) -> Result<(Ipam, bool), StateError> {
    let Some(bytes) = state.read(FILE, LABEL, MAX_BYTES, FIX)? else { return Ok((Ipam::default(), false)) };
    let stored: Stored = serde_json::from_slice(&bytes).map_err(|error| state.damaged(FILE, error.to_string(), FIX))?;
    let mut ipam = stored.ipam;
    ipam.index();
    Ok((ipam, stored.boot != boot()))
}

/// Stores the leases, durably.
///
/// # Errors
/// [`StateError::Io`]; what was stored before stays.
pub(super) fn save(state: &StateDir, ipam: &Ipam) -> Result<(), StateError> {
    let stored = Stored { boot: boot(), ipam: ipam.clone() };
    state.write(FILE, LABEL, &serde_json::to_vec(&stored).unwrap_or_default())
}

/// Empty where the kernel does not say: then no start of the machine is ever noticed, and leaks are found by time.
fn boot() -> String {
    std::fs::read_to_string(BOOT_ID).unwrap_or_default().trim().to_owned()
}
