//! Frames on an asynchronous stream, each read and write with a deadline.

use std::time::Duration;

use mesh_protocol::cbor::CborError;
use mesh_protocol::frame::{self, FrameError, Message};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::time::timeout;

/// A frame has to arrive whole within this, once its first bytes are there.
const BODY_WITHIN: Duration = Duration::from_secs(5);
/// A frame has to be taken by the other end within this.
const WRITE_WITHIN: Duration = Duration::from_secs(10);

/// The stream is over.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum WireError {
    /// Closed, or broken.
    #[error("stream ended: {0}")]
    Io(#[from] std::io::Error),
    /// What came is no frame.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// Nothing came, or nothing was taken, for too long.
    #[error("peer is too slow")]
    Slow,
}

/// One end of a connection, for reading.
pub(crate) type Reader = Box<dyn AsyncRead + Send + Unpin>;
/// One end of a connection, for writing.
pub(crate) type Writing = Box<dyn AsyncWrite + Send + Unpin>;

/// What arrived.
#[derive(Debug)]
pub(crate) enum Arrived<T> {
    /// A message.
    Message(T),
    /// One that this version does not know: answer with an error, go on.
    Unknown(i64),
}

/// Reads one message, which has to begin within `idle`.
///
/// # Cancel safety
/// None: bytes are lost.
pub(crate) async fn read<T: Message>(reader: &mut Reader, idle: Duration) -> Result<Arrived<T>, WireError> {
    let mut header = [0; 4];
    let first = timeout(idle, reader.read_u8()).await.map_err(|_| WireError::Slow)??;
    header[0] = first;
    let rest = async {
        reader.read_exact(&mut header[1..]).await?;
        // At most 64 KiB, checked before they are allocated.
        let mut body = vec![0; frame::message_length(header)?];
        reader.read_exact(&mut body).await?;
        Ok::<_, WireError>(body)
    };
    let body = timeout(BODY_WITHIN, rest).await.map_err(|_| WireError::Slow)??;
    match frame::decode(&body) {
        Ok(message) => Ok(Arrived::Message(message)),
        Err(CborError::UnknownMessage(number)) => Ok(Arrived::Unknown(number)),
        Err(error) => Err(FrameError::Message(error).into()),
    }
}

/// Writes bytes that are frames already.
pub(crate) async fn write(writer: &mut Writing, frame: &[u8]) -> Result<(), WireError> {
    let all = async {
        writer.write_all(frame).await?;
        writer.flush().await
    };
    Ok(timeout(WRITE_WITHIN, all).await.map_err(|_| WireError::Slow)??)
}

/// Encodes and writes one message.
pub(crate) async fn send<T: Message>(writer: &mut Writing, message: &T) -> Result<(), WireError> {
    write(writer, &frame::encode(message)?).await
}
