//! One connection attempt and, if it comes up, the frames on it. Runs as its own task, so that half a frame is never
//! lost to a timer; ends when dropped.

use std::time::Duration;

use mesh_protocol::control::{NodeMessage, ServerMessage};
use mesh_protocol::key::VerifyKey;
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::connect::{Connection, Dialer, Transport};
use super::frames::{self, Frame, StreamError};

/// Messages on their way to the driver: 16 frames of at most 64 KiB. When full, the stream is not read, and the
/// keyserver waits or resets the session.
const INBOUND: usize = 16;
/// Messages on their way to the keyserver: own objects and answers, a few KiB each. When full, the session is closed.
const OUTBOUND: usize = 64;
/// A keyserver that takes no bytes for this long is gone.
const WRITE_WITHIN: Duration = Duration::from_secs(20);

/// What a link tells.
pub(super) enum LinkEvent {
    /// The connection is up.
    Up { transport: Transport, server: VerifyKey },
    /// A message.
    Message(ServerMessage),
    /// A message of a later version.
    Unknown(i64),
    /// It never came up, or is over.
    Down(String),
}

/// A running link.
pub(super) struct Link {
    events: mpsc::Receiver<LinkEvent>,
    messages: mpsc::Sender<NodeMessage>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Link {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Link {
    /// Starts connecting.
    pub(super) fn start(dialer: Dialer, address: String, preferred: Transport) -> Self {
        let (event_sender, events) = mpsc::channel(INBOUND);
        let (messages, message_receiver) = mpsc::channel(OUTBOUND);
        let task = tokio::spawn(run(dialer, address, preferred, event_sender, message_receiver));
        Self { events, messages, task }
    }

    /// The next event. After [`LinkEvent::Down`] there is none.
    ///
    /// # Cancel safety
    /// Safe.
    pub(super) async fn next(&mut self) -> LinkEvent {
        self.events.recv().await.unwrap_or_else(|| LinkEvent::Down("the link ended".to_owned()))
    }

    /// Hands over a message; `false` if too many wait already.
    pub(super) fn send(&self, message: NodeMessage) -> bool {
        self.messages.try_send(message).is_ok()
    }
}

async fn run(
    dialer: Dialer,
    address: String,
    preferred: Transport,
    events: mpsc::Sender<LinkEvent>,
    messages: mpsc::Receiver<NodeMessage>,
) {
    let down = match dialer.dial(&address, preferred).await {
        Ok(connection) => {
            let up = LinkEvent::Up { transport: connection.transport, server: connection.server };
            if events.send(up).await.is_err() {
                return;
            }
            carry(connection, &events, messages).await.to_string()
        }
        Err(error) => error.to_string(),
    };
    // If nobody listens any more, nobody needs to know.
    let _ = events.send(LinkEvent::Down(down)).await;
}

/// Carries frames both ways until one way fails.
async fn carry(
    mut connection: Connection,
    events: &mpsc::Sender<LinkEvent>,
    mut messages: mpsc::Receiver<NodeMessage>,
) -> StreamError {
    let Connection { reader, writer, .. } = &mut connection;
    let read = async {
        loop {
            let event = match frames::read(reader).await {
                Ok(Frame::Known(message)) => LinkEvent::Message(message),
                Ok(Frame::Unknown(number)) => LinkEvent::Unknown(number),
                Err(error) => return error,
            };
            if events.send(event).await.is_err() {
                return StreamError::Closed;
            }
        }
    };
    let write = async {
        while let Some(message) = messages.recv().await {
            let written = timeout(WRITE_WITHIN, frames::write(writer, &message)).await;
            if let Err(error) = written.unwrap_or(Err(StreamError::Stuck)) {
                return error;
            }
        }
        StreamError::Closed
    };
    tokio::select! {
        error = read => error,
        error = write => error,
    }
}
