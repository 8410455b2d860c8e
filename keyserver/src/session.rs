//! One control session: what the directory queues goes out, what the node says goes in.

use std::time::Duration;

use mesh_protocol::control::{NodeMessage, Refusal, RefusalCode, ServerMessage};
use tokio::io::AsyncWriteExt as _;
use tokio::sync::mpsc;
use tokio::time::{Instant, interval_at};
use tracing::debug;

use crate::directory::{Frame, Hello, Opening, SessionKey, refusal};
use crate::listen::Connection;
use crate::wire::{self, Arrived, Reader, WireError, Writing};
use crate::writer::{Stopped, Writer};

/// From the handshake to the node's first message.
const HELLO_WITHIN: Duration = Duration::from_secs(5);
/// The node is asked whether it is there this often, and hears by it that this keyserver is: it gives up after 10 s. Over
/// TLS nothing else tells it of a machine that died. Ten thousand nodes make 3,300 pings a second.
const PING_EVERY: Duration = Duration::from_secs(3);
/// A node that says nothing for this long, though asked, is gone.
const SILENCE: Duration = Duration::from_secs(60);
/// Messages that a node may send in a burst: a full map is answered frame by frame.
const BURST: f64 = 1_000.0;
/// Messages that a node may send in a second, on average.
const PER_SECOND: f64 = 100.0;
/// Answers that wait to be written: a node that asks and does not read is not read from any more. Small each.
const ANSWERS: usize = 32;

/// Why a session ended.
#[derive(Debug, thiserror::Error)]
enum SessionError {
    #[error(transparent)]
    Wire(#[from] WireError),
    #[error(transparent)]
    Stopped(#[from] Stopped),
    #[error("not a member")]
    Stranger,
    #[error("refused: {0}")]
    Refused(Refusal),
    #[error("another session of this node took over, or the node is out")]
    Ended,
    #[error("it did not begin with a hello")]
    NoHello,
}

/// Serves one session to its end. A stranger and a revoked node see the same: the stream ends.
pub(crate) async fn serve(writer: &Writer, mut connection: Connection) {
    let peer = connection.peer;
    let opening = match open(writer, &mut connection).await {
        Ok(opening) => opening,
        Err(error) => {
            debug!(%peer, %error, "no session");
            let _ = connection.writer.shutdown().await;
            return;
        }
    };
    let Opening { key, first, rest } = opening;
    let (answers, answered) = mpsc::channel(ANSWERS);
    let Connection { mut reader, writer: mut out, .. } = connection;
    let result = tokio::select! {
        result = listen_to(writer, &mut reader, key, answers) => result,
        result = talk_to(&mut out, first, rest, answered) => result,
    };
    if let Err(error) = result {
        debug!(%peer, %error, "session over");
    }
    // The writer is gone only when the process is.
    let _ = writer.call(move |directory| directory.close_session(key)).await;
    let _ = tokio::time::timeout(Duration::from_secs(1), out.shutdown()).await;
}

async fn open(writer: &Writer, connection: &mut Connection) -> Result<Opening, SessionError> {
    // A stranger's hello is awaited too, so that nothing tells it apart from a member by then.
    let message = wire::read(&mut connection.reader, HELLO_WITHIN).await?;
    let shown = match &message {
        Arrived::Message(NodeMessage::Hello { grant, .. }) => grant.clone(),
        _ => None,
    };
    let identity = connection.identity;
    let admitted = writer.call(move |directory| directory.admit(&identity, shown.as_ref())).await?;
    let node = admitted.ok_or(SessionError::Stranger)?;
    let Arrived::Message(NodeMessage::Hello { mesh, position, policy_version, version, grant: _ }) = message else {
        return Err(SessionError::NoHello);
    };
    debug!(node = %node.short(), version = ?version.chars().take(64).collect::<String>(), "hello");
    let (hello, peer) = (Hello { identity, mesh, position, policy_version }, connection.peer);
    match writer.call(move |directory| directory.open_session(node, peer, &hello)).await? {
        Ok(opening) => Ok(opening),
        Err(refusal) => {
            wire::send(&mut connection.writer, &ServerMessage::Error { refusal: refusal.clone() }).await?;
            Err(SessionError::Refused(refusal))
        }
    }
}

/// Writes what is queued, in order, and a ping now and then.
async fn talk_to(
    out: &mut Writing,
    first: Vec<Frame>,
    mut rest: mpsc::Receiver<Frame>,
    mut answers: mpsc::Receiver<ServerMessage>,
) -> Result<(), SessionError> {
    for frame in first {
        wire::write(out, &frame).await?;
    }
    let mut pings = interval_at(Instant::now() + PING_EVERY, PING_EVERY);
    let mut nonce = 0;
    loop {
        tokio::select! {
            frame = rest.recv() => match frame {
                Some(frame) => wire::write(out, &frame).await?,
                None => return Err(SessionError::Ended),
            },
            Some(answer) = answers.recv() => wire::send(out, &answer).await?,
            _ = pings.tick() => {
                nonce += 1;
                wire::send(out, &ServerMessage::Ping { nonce }).await?;
            }
        }
    }
}

/// Takes what the node says.
async fn listen_to(
    writer: &Writer,
    reader: &mut Reader,
    key: SessionKey,
    answers: mpsc::Sender<ServerMessage>,
) -> Result<(), SessionError> {
    let mut pace = Pace { left: BURST, at: Instant::now() };
    loop {
        pace.take().await;
        let answer = match wire::read(reader, SILENCE).await? {
            Arrived::Message(message) => take(writer, key, message).await?,
            Arrived::Unknown(number) => Some(error(format!("message {number} is not known to this keyserver"))),
        };
        if let Some(answer) = answer {
            answers.send(answer).await.map_err(|_| SessionError::Ended)?;
        }
    }
}

/// How fast a node may speak. Whoever is faster is not read for a while, so that one node cannot keep the writer busy.
struct Pace {
    left: f64,
    at: Instant,
}

impl Pace {
    async fn take(&mut self) {
        let now = Instant::now();
        self.left = (self.left + now.duration_since(self.at).as_secs_f64() * PER_SECOND).min(BURST) - 1.0;
        self.at = now;
        if self.left < 0.0 {
            tokio::time::sleep(Duration::from_secs_f64(-self.left / PER_SECOND)).await;
        }
    }
}

fn error(message: String) -> ServerMessage {
    ServerMessage::Error { refusal: refusal(RefusalCode::BadMessage, message) }
}

async fn take(writer: &Writer, key: SessionKey, message: NodeMessage) -> Result<Option<ServerMessage>, SessionError> {
    match message {
        NodeMessage::Hello { .. } => return Ok(Some(error("the session is open already".to_owned()))),
        NodeMessage::Publish { envelope } => {
            let work = move |directory: &mut crate::directory::Directory| {
                directory.is_current(key).then(|| directory.publish(key.node, &envelope))
            };
            let result = writer.call(work).await?.ok_or(SessionError::Ended)?;
            return Ok(Some(match result {
                Ok(published) => ServerMessage::Published { seq: published.seq, endpoints: published.endpoints },
                Err(refusal) => ServerMessage::Error { refusal },
            }));
        }
        NodeMessage::Applied { position } => {
            writer.call(move |directory| directory.applied(key, position)).await?;
        }
        NodeMessage::Rotated { request, epoch, error } => {
            writer.call(move |directory| directory.rotated(key, request, epoch, error)).await?;
        }
        NodeMessage::Succeed { identity, handover } => {
            let work = move |directory: &mut crate::directory::Directory| {
                directory.is_current(key).then(|| directory.succeed(key.node, identity, handover))
            };
            let result = writer.call(work).await?.ok_or(SessionError::Ended)?;
            let (granted, refusal) = result.map_or_else(|refusal| (false, Some(refusal)), |granted| (granted, None));
            return Ok(Some(ServerMessage::Succession { identity: identity.id(), granted, refusal }));
        }
        NodeMessage::Pong { .. } => {}
        NodeMessage::Error { refusal } => {
            let words: String = refusal.message.chars().take(256).collect();
            debug!(node = %key.node.short(), ?words, "node did not understand");
        }
    }
    Ok(None)
}
