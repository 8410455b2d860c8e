//! JSON lines: the framing of the local and the admin socket. One request or reply is one line of JSON, at most 1 MiB.
//!
//! A request is answered by any number of progress replies and one final reply, in order.

use serde::Serialize;
use serde::de::DeserializeOwned;

/// Longest line, in bytes, without the newline.
pub const MAX_LINE_BYTES: usize = 1024 * 1024;

/// A line was refused. The stream cannot go on after [`LineError::TooLong`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LineError {
    /// No newline within [`MAX_LINE_BYTES`].
    #[error("line is longer than {MAX_LINE_BYTES} bytes")]
    TooLong,
    /// Not JSON, or not a message expected here.
    #[error("message does not decode: {0}")]
    Json(#[from] serde_json::Error),
}

/// Encodes a message and its newline.
///
/// # Errors
/// [`LineError::TooLong`].
pub fn encode<T: Serialize>(message: &T) -> Result<Vec<u8>, LineError> {
    let mut line = serde_json::to_vec(message)?;
    if line.len() > MAX_LINE_BYTES {
        return Err(LineError::TooLong);
    }
    line.push(b'\n');
    Ok(line)
}

/// Decodes one line, with or without its newline. Nesting is limited by the parser (128).
///
/// # Errors
/// [`LineError`].
pub fn decode<T: DeserializeOwned>(line: &[u8]) -> Result<T, LineError> {
    if line.len() > MAX_LINE_BYTES + 1 {
        return Err(LineError::TooLong);
    }
    Ok(serde_json::from_slice(line)?)
}

/// Collects bytes as they arrive and gives out whole lines. Holds at most [`MAX_LINE_BYTES`] and what was pushed last, as
/// long as the lines are taken out between pushes. Each byte is looked at once and moved once, however short the lines.
#[derive(Default)]
pub struct LineBuffer {
    bytes: Vec<u8>,
    /// Where the first line not given out begins.
    start: usize,
    /// Up to here no newline follows `start`.
    searched: usize,
}

impl LineBuffer {
    /// Adds what was read.
    pub fn push(&mut self, bytes: &[u8]) {
        self.bytes.drain(..self.start);
        self.searched -= self.start;
        self.start = 0;
        self.bytes.extend_from_slice(bytes);
    }

    /// The next whole line, without its newline; `None` until more bytes arrive.
    ///
    /// # Errors
    /// [`LineError::TooLong`], from then on.
    pub fn next_line(&mut self) -> Result<Option<Vec<u8>>, LineError> {
        let found = self.bytes[self.searched..].iter().position(|byte| *byte == b'\n');
        let end = found.map_or(self.bytes.len(), |found| self.searched + found);
        self.searched = end;
        if end - self.start > MAX_LINE_BYTES {
            return Err(LineError::TooLong);
        }
        if found.is_none() {
            return Ok(None);
        }
        let line = self.bytes[self.start..end].to_vec();
        self.start = end + 1;
        self.searched = self.start;
        Ok(Some(line))
    }
}

/// Lines may hold secrets: only lengths are shown.
impl std::fmt::Debug for LineBuffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "LineBuffer({} bytes)", self.bytes.len() - self.start)
    }
}

#[cfg(test)]
mod tests;
