//! `meshd guard`: closes the host from what is on disk, before anything can send.

use std::path::Path;

use tracing::info;

use crate::host::{self, Host, HostError};
use crate::state_dir::{StateDir, StateError};

/// What the guard found to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Guarded {
    /// The host is closed.
    Closed,
    /// Nothing was ever saved: this host carries no mesh yet.
    NothingSaved,
    /// `meshd` runs and does it itself.
    MeshdRuns,
}

impl std::fmt::Display for Guarded {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Closed => "closed: nothing of the mesh leaves in clear text",
            Self::NothingSaved => "nothing to guard: this host has not carried the mesh yet",
            Self::MeshdRuns => "nothing to do: meshd runs",
        })
    }
}

/// Puts filter, refusing routes and rules in place.
///
/// # Errors
/// The disk or the kernel refused; what could be closed is closed.
pub(crate) fn run(state_dir: &Path) -> Result<Guarded, HostError> {
    // A host that never joined gets no state directory by being guarded.
    if std::fs::symlink_metadata(state_dir).is_err() {
        return Ok(Guarded::NothingSaved);
    }
    let state = match StateDir::open(state_dir) {
        Ok(state) => state,
        Err(StateError::InUse { .. }) => return Ok(Guarded::MeshdRuns),
        Err(error) => return Err(error.into()),
    };
    let Some(saved) = host::load(&state)? else { return Ok(Guarded::NothingSaved) };
    let prefixes = saved.filter.remote.len();
    Host::open(state, saved)?.close()?;
    info!(prefixes, "host closed");
    Ok(Guarded::Closed)
}
