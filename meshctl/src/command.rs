//! The verbs, one file each: `Args` says what may be asked, `run` asks it and prints the answer.

pub(crate) mod audit;
pub(crate) mod cluster;
pub(crate) mod completion;
pub(crate) mod down;
pub(crate) mod grant;
pub(crate) mod keys;
pub(crate) mod man;
pub(crate) mod node;
pub(crate) mod path;
pub(crate) mod peers;
pub(crate) mod ping;
pub(crate) mod policy;
pub(crate) mod routes;
pub(crate) mod signer;
pub(crate) mod status;
pub(crate) mod token;

use std::path::PathBuf;
use std::time::Duration;

use mesh_protocol::admin::{AdminReply, AdminRequest};
use mesh_protocol::local::{LocalReply, LocalRequest};
use serde::Serialize;

use crate::client::{self, ClientError, Reply};
use crate::output;

/// What all verbs share.
#[derive(Debug)]
pub(crate) struct Context {
    /// meshd's socket.
    pub(crate) socket: PathBuf,
    /// The keyserver's admin socket.
    pub(crate) admin_socket: PathBuf,
    /// One JSON document instead of text.
    pub(crate) json: bool,
}

impl Context {
    /// Asks meshd one question.
    fn ask_node(&self, request: &LocalRequest) -> Result<LocalReply, ClientError> {
        client::ask(&self.socket, request)
    }

    /// Asks the keyserver one question.
    fn ask_keyserver(&self, request: &AdminRequest) -> Result<AdminReply, ClientError> {
        client::ask(&self.admin_socket, request)
    }

    /// Prints a result: `value` with `--json`, else the text.
    fn show<T: Serialize>(&self, value: &T, text: impl FnOnce() -> String) -> anyhow::Result<()> {
        if self.json { output::print_json(value) } else { Ok(output::print(&text())?) }
    }
}

/// A reply that answers another question.
fn unexpected<R: Reply>(_: R) -> anyhow::Error {
    ClientError::Unexpected { service: R::SERVICE }.into()
}

/// Milliseconds of a duration, as messages carry it.
fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Parses `60s` or `1h 30m`: from one second to a year.
fn parse_duration(text: &str) -> Result<Duration, String> {
    let year = Duration::from_secs(366 * 86_400);
    let duration = humantime::parse_duration(text).map_err(|error| format!("{error}; write it like 60s or 1h 30m"))?;
    if duration < Duration::from_secs(1) || duration > year {
        return Err("it has to be between one second and a year".to_owned());
    }
    Ok(duration)
}
