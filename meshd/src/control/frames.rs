//! Frames on a stream, read and written.

use mesh_protocol::cbor::CborError;
use mesh_protocol::frame::{self, FrameError, Message};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

/// Reading or writing a frame failed: close the stream.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum StreamError {
    /// The connection.
    #[error("connection lost: {0}")]
    Io(#[from] std::io::Error),
    /// The other end closed it.
    #[error("connection closed by the keyserver")]
    Closed,
    /// It takes no bytes.
    #[error("the keyserver takes no bytes")]
    Stuck,
    /// What arrived is not ours.
    #[error("the keyserver does not speak this protocol: {0}")]
    Frame(#[from] FrameError),
    /// It is, and does not decode.
    #[error("a message of the keyserver does not decode: {0}")]
    Message(CborError),
}

/// A message, or the number of one that this version does not know.
pub(crate) enum Frame<T> {
    /// Known.
    Known(T),
    /// Well-formed, of a later version.
    Unknown(i64),
}

/// Reads one message.
///
/// # Errors
/// [`StreamError`].
///
/// # Cancel safety
/// None: bytes that were read are lost.
pub(crate) async fn read<T: Message>(stream: &mut (impl AsyncRead + Unpin)) -> Result<Frame<T>, StreamError> {
    let mut header = [0; 4];
    match stream.read_exact(&mut header).await {
        Ok(_) => {}
        Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => return Err(StreamError::Closed),
        Err(error) => return Err(error.into()),
    }
    // At most 64 KiB, checked before the buffer is made.
    let mut body = vec![0; frame::message_length(header)?];
    stream.read_exact(&mut body).await?;
    match frame::decode(&body) {
        Ok(message) => Ok(Frame::Known(message)),
        Err(CborError::UnknownMessage(number)) => Ok(Frame::Unknown(number)),
        Err(error) => Err(StreamError::Message(error)),
    }
}

/// Writes one message.
///
/// # Errors
/// [`StreamError`].
///
/// # Cancel safety
/// None: half a frame may be sent.
pub(crate) async fn write<T: Message>(stream: &mut (impl AsyncWrite + Unpin), message: &T) -> Result<(), StreamError> {
    stream.write_all(&frame::encode(message)?).await?;
    Ok(stream.flush().await?)
}
