//! One connection: lines in, lines out, each with a deadline.

use std::io;
use std::time::Duration;

use mesh_protocol::line::{self, LineBuffer};
use mesh_protocol::local::{LocalError, LocalErrorCode, LocalReply, LocalRequest};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::time::timeout;
use tracing::{debug, warn};

use super::verbs;

/// How long a client may be silent, or take for one line.
const SILENCE: Duration = if cfg!(test) { Duration::from_millis(500) } else { Duration::from_secs(30) };
/// How long it may take to read an answer.
const WRITING: Duration = if cfg!(test) { Duration::from_millis(500) } else { Duration::from_secs(5) };

/// Who is at the other end, by the kernel's word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Peer {
    /// Its user.
    pub(super) uid: u32,
    /// Its process, if the kernel knows.
    pub(super) pid: Option<i32>,
}

impl Peer {
    /// Whether it may send everything.
    pub(super) fn is_root(self) -> bool {
        self.uid == 0
    }
}

/// Sends replies of one request.
#[derive(Debug)]
pub(super) struct Replies(OwnedWriteHalf);

impl Replies {
    /// Sends one.
    ///
    /// # Errors
    /// The client is gone or does not read.
    pub(super) async fn send(&mut self, reply: &LocalReply) -> io::Result<()> {
        let bytes = line::encode(reply).or_else(|error| line::encode(&internal(&error)));
        let bytes = bytes.map_err(io::Error::other)?;
        timeout(WRITING, self.0.write_all(&bytes)).await?
    }
}

/// Who answers requests: the node, or a stand-in of a test.
pub(super) trait Answers: Sync {
    /// Does what is asked and sends all replies.
    ///
    /// # Errors
    /// The client is gone.
    fn answer(&self, request: LocalRequest, replies: &mut Replies) -> impl Future<Output = io::Result<()>> + Send;
}

/// Answers requests until the client leaves, breaks a rule or is silent for too long.
pub(super) async fn serve(stream: UnixStream, peer: Peer, node: &impl Answers) {
    let (reader, writer) = stream.into_split();
    let mut lines = Lines { reader, buffer: LineBuffer::default() };
    let mut replies = Replies(writer);
    loop {
        let bytes = match timeout(SILENCE, lines.next()).await {
            Ok(Ok(Some(bytes))) => bytes,
            Ok(Ok(None)) | Err(_) => return,
            Ok(Err(error)) => {
                // After that the stream means nothing.
                let _ = replies.send(&bad_request(&error)).await;
                return;
            }
        };
        let request: LocalRequest = match line::decode(&bytes) {
            Ok(request) => request,
            Err(error) => {
                if replies.send(&bad_request(&error)).await.is_err() {
                    return;
                }
                continue;
            }
        };
        if !peer.is_root() && !request.is_read_only() {
            warn!(uid = peer.uid, pid = peer.pid, request = verbs::name(&request), "refused: only root may");
            let refusal = error(LocalErrorCode::NotPermitted, "only root may do that: run it with sudo".into());
            if replies.send(&refusal).await.is_err() {
                return;
            }
            continue;
        }
        debug!(uid = peer.uid, pid = peer.pid, request = verbs::name(&request), "local request");
        // A client that leaves ends its request.
        if node.answer(request, &mut replies).await.is_err() {
            return;
        }
    }
}

/// Tells a client that there are too many, without waiting.
pub(super) fn refuse(stream: &UnixStream) {
    let refusal = error(LocalErrorCode::NotReady, "too many local connections: try again".into());
    if let Ok(bytes) = line::encode(&refusal) {
        let _ = stream.try_write(&bytes);
    }
}

struct Lines {
    reader: OwnedReadHalf,
    buffer: LineBuffer,
}

impl Lines {
    async fn next(&mut self) -> Result<Option<Vec<u8>>, Box<dyn std::error::Error + Send + Sync>> {
        let mut chunk = [0; 8192];
        loop {
            if let Some(bytes) = self.buffer.next_line()? {
                return Ok(Some(bytes));
            }
            let count = self.reader.read(&mut chunk).await?;
            if count == 0 {
                return Ok(None);
            }
            self.buffer.push(&chunk[..count]);
        }
    }
}

/// A failure as a reply.
pub(super) fn error(code: LocalErrorCode, message: String) -> LocalReply {
    LocalReply::Error(LocalError { code, message })
}

fn bad_request(reason: &dyn std::fmt::Display) -> LocalReply {
    error(LocalErrorCode::BadRequest, format!("the request cannot be read: {reason}"))
}

fn internal(reason: &dyn std::fmt::Display) -> LocalReply {
    error(LocalErrorCode::Internal, format!("the answer cannot be sent: {reason}"))
}

#[cfg(test)]
mod tests;
