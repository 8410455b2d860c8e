//! What a command of this program asks the running keyserver, over the operators' socket.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, bail};
use mesh_protocol::admin::{AdminReply, AdminRequest};
use mesh_protocol::line;

/// How much longer than it was asked to wait the keyserver may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// One request, on which it may work for `wait`; its last answer.
pub(crate) fn last_answer(socket: &Path, request: &AdminRequest, wait: Duration) -> anyhow::Result<AdminReply> {
    let mut stream = UnixStream::connect(socket)
        .with_context(|| format!("reach the keyserver at {}: it has to be running", socket.display()))?;
    stream.set_read_timeout(Some(wait + PATIENCE))?;
    stream.write_all(&line::encode(request)?)?;
    for text in BufReader::new(stream).lines() {
        match line::decode(text?.as_bytes())? {
            AdminReply::Error(error) => return Err(error.into()),
            reply if reply.is_final() => return Ok(reply),
            _ => {}
        }
    }
    bail!("it closed the connection before it answered; look at its log")
}
