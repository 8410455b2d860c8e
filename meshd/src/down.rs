//! `meshd down`: takes everything of ours off the host, by a running `meshd` if there is one.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use mesh_protocol::line::{self, LineBuffer};
use mesh_protocol::local::{LocalReply, LocalRequest};

use crate::config::Config;
use crate::desired;
use crate::host::{self, Host, HostError};
use crate::state_dir::{StateDir, StateError};

/// How long a running `meshd` may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// The host could not be cleared.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum DownError {
    /// A running `meshd` said no, or did not answer.
    #[error("ask meshd at {socket} to clear the host: {reason}")]
    Asked {
        /// Its socket.
        socket: String,
        /// What went wrong.
        reason: String,
    },
    /// Something could not be removed.
    #[error("removed what could be, but: {}", .0.join("; "))]
    Refused(Vec<String>),
    /// The disk or the kernel.
    #[error(transparent)]
    Host(#[from] HostError),
}

/// Clears the host. When it returns, no `meshd` works on this state directory.
///
/// # Errors
/// Any [`DownError`].
pub(crate) fn run(config: &Config) -> Result<(), DownError> {
    if std::fs::symlink_metadata(&config.state_dir).is_err() {
        return clear_without_state(config);
    }
    match StateDir::open(&config.state_dir) {
        Ok(state) => clear(config, state),
        Err(StateError::InUse { .. }) => ask(&config.socket, &config.state_dir),
        Err(error) => Err(HostError::State(error).into()),
    }
}

fn clear(config: &Config, state: StateDir) -> Result<(), DownError> {
    // What was saved knows under which names things are; a configuration changed since does not.
    let saved = host::load(&state).map_err(HostError::State)?;
    let refused = Host::open(state, saved.unwrap_or_else(|| desired::bare(config)))?.down();
    if refused.is_empty() { Ok(()) } else { Err(DownError::Refused(refused)) }
}

/// The state directory was deleted by hand: what is on the host goes by its configured names.
fn clear_without_state(config: &Config) -> Result<(), DownError> {
    let refused = host::clear_by_name(&desired::bare(config))?;
    if refused.is_empty() { Ok(()) } else { Err(DownError::Refused(refused)) }
}

fn ask(socket: &Path, state_dir: &Path) -> Result<(), DownError> {
    let failed = |reason: String| DownError::Asked { socket: socket.display().to_string(), reason };
    let reply = converse(socket).map_err(|error| failed(error.to_string()))?;
    match reply {
        LocalReply::Done => {}
        LocalReply::Error(error) => return Err(failed(error.message)),
        _ => return Err(failed("an unexpected answer".into())),
    }
    // It has cleared the host; now it stops.
    let deadline = Instant::now() + PATIENCE;
    while matches!(StateDir::open(state_dir), Err(StateError::InUse { .. })) {
        if Instant::now() > deadline {
            return Err(failed("the host is cleared, but meshd does not stop".into()));
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

fn converse(socket: &Path) -> Result<LocalReply, Box<dyn std::error::Error>> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.write_all(&line::encode(&LocalRequest::Down)?)?;
    let mut buffer = LineBuffer::default();
    let mut chunk = [0; 4096];
    loop {
        if let Some(bytes) = buffer.next_line()? {
            return Ok(line::decode(&bytes)?);
        }
        let count = stream.read(&mut chunk)?;
        if count == 0 {
            return Err("it closed the connection".into());
        }
        buffer.push(&chunk[..count]);
    }
}
