//! Bytes as lines of text between two marks.
//!
//! ```text
//! -----BEGIN label-----
//! base64 of ( bytes ‖ first 4 bytes of SHA-256(bytes) ), 76 characters a line
//! -----END label-----
//! ```

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;

use super::FileError;
use crate::id::sha256;

/// Longest text that is looked at, in bytes.
pub const MAX_FILE_BYTES: usize = 4 * 1024 * 1024;
/// Characters of a line (RFC 2045, section 6.8).
const LINE: usize = 76;

pub(super) fn encode(label: &str, bytes: &[u8]) -> String {
    let check = sha256(&[bytes]);
    let body = BASE64.encode([bytes, &check[..4]].concat());
    let mut text = format!("-----BEGIN {label}-----\n");
    for line in body.as_bytes().chunks(LINE) {
        text.extend(line.iter().copied().map(char::from));
        text.push('\n');
    }
    text + &format!("-----END {label}-----\n")
}

/// Takes the first block of that label. Spaces and line ends of any system do not matter.
pub(super) fn decode(label: &'static str, text: &str) -> Result<Vec<u8>, FileError> {
    if text.len() > MAX_FILE_BYTES {
        return Err(FileError::TooLong);
    }
    let (begin, end) = (format!("-----BEGIN {label}-----"), format!("-----END {label}-----"));
    let (_, rest) = text.split_once(&begin).ok_or(FileError::NoBegin(label))?;
    let (body, _) = rest.split_once(&end).ok_or(FileError::Damaged)?;
    let body: String = body.split_ascii_whitespace().collect();
    let mut bytes = BASE64.decode(body).map_err(|_| FileError::Damaged)?;
    let (content, check) = bytes.split_last_chunk::<4>().ok_or(FileError::Damaged)?;
    if sha256(&[content])[..4] != *check {
        return Err(FileError::Damaged);
    }
    bytes.truncate(bytes.len() - 4);
    Ok(bytes)
}
