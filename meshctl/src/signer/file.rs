//! Key files, as the keyserver has them too: the 32 bytes of the seed in hexadecimal, mode 0600.

use std::fs::OpenOptions;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;

use mesh_protocol::key::SigningKey;
use nix::libc;
use zeroize::Zeroizing;

use super::SignerError;

/// Makes a key in a new file.
pub(crate) fn make(path: &Path) -> Result<SigningKey, SignerError> {
    let failed = |reason: String| SignerError::File { path: path.to_owned(), reason };
    let mut seed = Zeroizing::new([0; 32]);
    getrandom::fill(seed.as_mut_slice()).map_err(|error| failed(format!("no random numbers: {error}")))?;
    let text = Zeroizing::new(hex::encode(*seed) + "\n");
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
    let mut file = file.map_err(|error| failed(error.to_string()))?;
    file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).map_err(|error| failed(error.to_string()))?;
    Ok(SigningKey::from_seed(*seed))
}

/// Reads one.
pub(super) fn read(path: &Path) -> Result<SigningKey, SignerError> {
    let failed = |reason: String| SignerError::File { path: path.to_owned(), reason };
    // Not a FIFO nobody writes to: that would hang.
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path);
    let file = file.map_err(|error| failed(error.to_string()))?;
    let metadata = file.metadata().map_err(|error| failed(error.to_string()))?;
    if !metadata.is_file() {
        return Err(failed("is not a regular file".to_owned()));
    }
    if metadata.mode() & 0o077 != 0 {
        return Err(failed("can be read by others: chmod 600 it, and consider the key as known".to_owned()));
    }
    let mut text = Zeroizing::new(String::with_capacity(128));
    file.take(100).read_to_string(&mut text).map_err(|error| failed(error.to_string()))?;
    let mut seed = Zeroizing::new([0; 32]);
    hex::decode_to_slice(text.trim_end(), seed.as_mut_slice())
        .map_err(|_| failed("does not hold 64 hexadecimal digits".to_owned()))?;
    Ok(SigningKey::from_seed(*seed))
}
