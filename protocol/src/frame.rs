//! Frames on an ordered stream: a `u32` length in network byte order (at most 64 KiB, checked before anything is
//! allocated), then one CBOR message.

use minicbor::{Decode, Encode};

use crate::cbor::{self, CborError};

/// Longest message, in bytes, without the length in front.
pub const MAX_MESSAGE_BYTES: usize = 64 * 1024;

/// A stream does not carry frames.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FrameError {
    /// A length of 0, or above [`MAX_MESSAGE_BYTES`]: nothing after it can be trusted, close the stream.
    #[error("frame of {0} bytes")]
    Length(u32),
    /// The message is not in our dialect, or not one expected here.
    #[error(transparent)]
    Message(#[from] CborError),
}

/// A message that travels in frames: an enum encoded as `[number, fields]`.
pub trait Message: Encode<()> + for<'b> Decode<'b, ()> {
    /// Numbers this version knows are below this one.
    const KNOWN: i64;
}

/// Encodes a message with its length in front.
///
/// # Errors
/// [`FrameError::Length`] if it is longer than [`MAX_MESSAGE_BYTES`].
pub fn encode<T: Message>(message: &T) -> Result<Vec<u8>, FrameError> {
    let body = cbor::to_vec(message);
    let length = u32::try_from(body.len()).unwrap_or(u32::MAX);
    if body.len() > MAX_MESSAGE_BYTES {
        return Err(FrameError::Length(length));
    }
    Ok([&length.to_be_bytes(), body.as_slice()].concat())
}

/// Reads the length in front of a message.
///
/// # Errors
/// [`FrameError::Length`].
pub fn message_length(header: [u8; 4]) -> Result<usize, FrameError> {
    let length = u32::from_be_bytes(header);
    match usize::try_from(length) {
        Ok(bytes @ 1..=MAX_MESSAGE_BYTES) => Ok(bytes),
        _ => Err(FrameError::Length(length)),
    }
}

/// Decodes one message, without its length.
///
/// # Errors
/// [`CborError::UnknownMessage`] for a well-formed message of a later version: answer with an error, keep the session.
/// Any other [`CborError`]: close the stream.
pub fn decode<T: Message>(body: &[u8]) -> Result<T, CborError> {
    cbor::check(body, u64::MAX)?;
    let mut decoder = minicbor::Decoder::new(body);
    let number = decoder
        .array()
        .and_then(|_| decoder.i64())
        .map_err(|_| CborError::Meaning("not a numbered message".to_owned()))?;
    if !(0..T::KNOWN).contains(&number) {
        return Err(CborError::UnknownMessage(number));
    }
    cbor::decode_checked(body)
}
