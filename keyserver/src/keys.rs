//! The keyserver's signing keys: one file each, the 32 bytes of the seed in hexadecimal, mode 0600.

use std::fs::{File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use mesh_protocol::key::SigningKey;
use nix::libc::O_NOFOLLOW;
use zeroize::{Zeroize as _, Zeroizing};

/// A key file cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum KeyFileError {
    /// It is not what a key file is.
    #[error("key file {path} {reason}")]
    Refused {
        /// Which.
        path: PathBuf,
        /// What is wrong, and what to do.
        reason: &'static str,
    },
    /// It cannot be read or written.
    #[error("key file {path}: {source}")]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The system gives no random numbers.
    #[error("the system gives no random numbers: {0}")]
    Random(String),
}

/// Fills an array from the system's random source.
pub(crate) fn random<const N: usize>() -> Result<[u8; N], KeyFileError> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(|error| KeyFileError::Random(error.to_string()))?;
    Ok(bytes)
}

/// Draws a new key.
pub(crate) fn generate() -> Result<SigningKey, KeyFileError> {
    let mut seed = random()?;
    let key = SigningKey::from_seed(seed);
    seed.zeroize();
    Ok(key)
}

/// The keys of a keyserver in easy mode. The root and the issuer may be kept elsewhere.
#[derive(Debug, Clone)]
pub(crate) struct Keys {
    /// Signs policies.
    pub(crate) root: Option<SigningKey>,
    /// Signs grants and tokens.
    pub(crate) issuer: Option<SigningKey>,
    /// Signs revocations.
    pub(crate) revoker: Option<SigningKey>,
    /// Shown on the control channel; signs checkpoints.
    pub(crate) transport: SigningKey,
}

impl Keys {
    /// Draws all four.
    pub(crate) fn generate() -> Result<Self, KeyFileError> {
        let (root, issuer) = (Some(generate()?), Some(generate()?));
        Ok(Self { root, issuer, ..Self::without_authority()? })
    }

    /// Draws those that a keyserver in strict mode has: none of them grants, none changes the policy.
    pub(crate) fn without_authority() -> Result<Self, KeyFileError> {
        Ok(Self { root: None, issuer: None, revoker: Some(generate()?), transport: generate()? })
    }

    /// Writes them into `folder`, which exists and is empty.
    pub(crate) fn save(&self, folder: &Path) -> Result<(), KeyFileError> {
        let always = [("transport", &self.transport)];
        let optional = [("root", &self.root), ("issuer", &self.issuer), ("revoker", &self.revoker)];
        let present = optional.iter().filter_map(|(name, key)| Some((*name, key.as_ref()?)));
        present.chain(always).try_for_each(|(name, key)| write(&folder.join(name), key))
    }

    /// Reads them.
    pub(crate) fn load(folder: &Path) -> Result<Self, KeyFileError> {
        let optional = |name| match read(&folder.join(name)) {
            Err(KeyFileError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => Ok(None),
            other => other.map(Some),
        };
        Ok(Self {
            root: optional("root")?,
            issuer: optional("issuer")?,
            revoker: optional("revoker")?,
            transport: read(&folder.join("transport"))?,
        })
    }
}

fn write(path: &Path, key: &SigningKey) -> Result<(), KeyFileError> {
    let text = Zeroizing::new(hex::encode(*key.seed()) + "\n");
    let io = |source| KeyFileError::Io { path: path.to_owned(), source };
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).map_err(io)?;
    file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).map_err(io)
}

fn read(path: &Path) -> Result<SigningKey, KeyFileError> {
    let refused = |reason| KeyFileError::Refused { path: path.to_owned(), reason };
    let io = |source| KeyFileError::Io { path: path.to_owned(), source };
    let found = std::fs::symlink_metadata(path).map_err(io)?;
    if !found.is_file() {
        return Err(refused("is not a regular file: put the key itself there"));
    }
    let file = OpenOptions::new().read(true).custom_flags(O_NOFOLLOW).open(path).map_err(io)?;
    let metadata = file.metadata().map_err(io)?;
    if metadata.mode() & 0o077 != 0 {
        return Err(refused("can be read by others: chmod 600 it, and consider the key as known"));
    }
    if metadata.uid() != nix::unistd::geteuid().as_raw() {
        return Err(refused("belongs to another user: chown it"));
    }
    let text = text(file).map_err(io)?;
    let mut seed = Zeroizing::new([0; 32]);
    hex::decode_to_slice(text.trim_end(), seed.as_mut_slice())
        .map_err(|_| refused("does not hold 64 hexadecimal digits: restore it from a copy"))?;
    Ok(SigningKey::from_seed(*seed))
}

/// At most a little more than a key file has.
fn text(file: File) -> std::io::Result<Zeroizing<String>> {
    let mut text = Zeroizing::new(String::with_capacity(128));
    file.take(100).read_to_string(&mut text)?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn saved_keys_load_again_and_strict_mode_lacks_two() {
        let folder = tempfile::tempdir().unwrap();
        let keys = Keys::generate().unwrap();
        keys.save(folder.path()).unwrap();
        let loaded = Keys::load(folder.path()).unwrap();
        let public = |keys: &Keys| keys.revoker.as_ref().map(SigningKey::verify_key);
        assert_eq!(public(&loaded), public(&keys));
        assert!(loaded.root.is_some() && loaded.issuer.is_some());
        assert!(keys.save(folder.path()).is_err(), "nothing is overwritten");
        std::fs::remove_file(folder.path().join("root")).unwrap();
        assert!(Keys::load(folder.path()).unwrap().root.is_none());
        std::fs::remove_file(folder.path().join("issuer")).unwrap();
        assert!(Keys::load(folder.path()).unwrap().issuer.is_none());
    }

    #[test]
    fn files_that_are_no_key_files_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key");
        let refused = |path: &Path| matches!(read(path), Err(KeyFileError::Refused { .. }));
        write(&path, &generate().unwrap()).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        assert!(refused(&path), "readable by others");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        for text in ["", "00", &"0".repeat(62), &"0".repeat(66), &"z".repeat(64)] {
            std::fs::write(&path, text).unwrap();
            assert!(refused(&path), "{text}");
        }
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(refused(&link) && refused(folder.path()));
    }
}
