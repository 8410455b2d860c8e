//! What the host should look like, on disk: the guard puts the closed part of it back before anything can send.

use crate::desired::HostState;
use crate::state_dir::{StateDir, StateError};

/// File in the state directory.
const FILE: &str = "host";
/// First line of the file.
const LABEL: &str = "mesh host 1";
/// Largest it may be: ten thousand pods need under 2 MiB.
const MAX_BYTES: u64 = 16 * 1024 * 1024;
const FIX: &str = "remove it: meshd writes it anew, and until then the guard cannot close the host";

/// What was saved last, if anything was.
///
/// # Errors
/// Any [`StateError`] but the directory being in use.
pub(crate) fn load(state: &StateDir) -> Result<Option<HostState>, StateError> {
    let Some(bytes) = state.read(FILE, LABEL, MAX_BYTES, FIX)? else { return Ok(None) };
    let saved = serde_json::from_slice(&bytes).map_err(|error| state.damaged(FILE, error.to_string(), FIX))?;
    Ok(Some(saved))
}

/// Saves it, durably.
///
/// # Errors
/// [`StateError::Io`]: what was there stays.
pub(crate) fn save(state: &StateDir, host: &HostState) -> Result<(), StateError> {
    let bytes = serde_json::to_vec(host).unwrap_or_default();
    state.write(FILE, LABEL, &bytes)
}

/// Forgets it, so that the guard restores nothing.
///
/// # Errors
/// [`StateError::Io`].
pub(crate) fn remove(state: &StateDir) -> Result<(), StateError> {
    let path = state.path_of(FILE);
    match std::fs::remove_file(&path) {
        Err(cause) if cause.kind() != std::io::ErrorKind::NotFound => {
            Err(StateError::Io { doing: "remove", path, cause })
        }
        _ => Ok(()),
    }
}
