//! The keyserver's signing keys: one file each, the 32 bytes of the seed in hexadecimal, mode 0600.
//!
//! Where systemd hands over the credential for it they are sealed, see [`mesh_protocol::sealed`]: at the next start those
//! that are not yet.

use std::fs::{File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use mesh_protocol::key::SigningKey;
use mesh_protocol::sealed::{self, SealKey};
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

    /// Reads them, with the credential that systemd hands over if there is one.
    pub(crate) fn load(folder: &Path) -> Result<Self, KeyFileError> {
        let seal = seal()?;
        let read = |name: &str| read(folder, name, seal.as_ref());
        let optional = |name| match read(name) {
            Err(KeyFileError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => Ok(None),
            other => other.map(Some),
        };
        Ok(Self {
            root: optional("root")?,
            issuer: optional("issuer")?,
            revoker: optional("revoker")?,
            transport: read("transport")?,
        })
    }
}

/// Reads one, if it is there, with the credential that systemd hands over if there is one.
pub(crate) fn load_optional(folder: &Path, name: &str) -> Result<Option<SigningKey>, KeyFileError> {
    match read(folder, name, seal()?.as_ref()) {
        Err(KeyFileError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => Ok(None),
        other => other.map(Some),
    }
}

/// Reads one that is never sealed, if it is there: the command that made it has no credential.
pub(crate) fn read_plain(folder: &Path, name: &str) -> Result<Option<SigningKey>, KeyFileError> {
    match read(folder, name, None) {
        Err(KeyFileError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => Ok(None),
        other => other.map(Some),
    }
}

/// Puts another key in the place of one, sealed where systemd hands over the credential. A crash leaves the one or the
/// other.
pub(crate) fn replace(folder: &Path, name: &str, key: &SigningKey) -> Result<(), KeyFileError> {
    replace_with(folder, name, key, seal()?.as_ref())
}

fn replace_with(folder: &Path, name: &str, key: &SigningKey, seal: Option<&SealKey>) -> Result<(), KeyFileError> {
    let text = Zeroizing::new(hex::encode(*key.seed()) + "\n");
    match seal {
        Some(seal) => seal_file(folder, name, text.as_bytes(), seal),
        None => replace_file(folder, name, text.as_bytes()),
    }
}

/// Writes one into a file that is not there yet.
pub(crate) fn write(path: &Path, key: &SigningKey) -> Result<(), KeyFileError> {
    let text = Zeroizing::new(hex::encode(*key.seed()) + "\n");
    let io = |source| KeyFileError::Io { path: path.to_owned(), source };
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).map_err(io)?;
    file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).map_err(io)
}

fn read(folder: &Path, name: &str, seal: Option<&SealKey>) -> Result<SigningKey, KeyFileError> {
    let path = &folder.join(name);
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
    let mut bytes = contents(file).map_err(io)?;
    match (sealed::is_sealed(&bytes), seal) {
        (false, None) => {}
        (false, Some(seal)) => seal_file(folder, name, &bytes, seal)?,
        (true, None) => return Err(refused("is sealed: start by the unit, which hands over the credential mesh.seal")),
        (true, Some(seal)) => {
            let opened = seal.open(name, &bytes);
            bytes = opened
                .map_err(|_| refused("was sealed with another mesh.seal, or is damaged: restore it from a copy"))?;
        }
    }
    let mut seed = Zeroizing::new([0; 32]);
    hex::decode_to_slice(bytes.trim_ascii_end(), seed.as_mut_slice())
        .map_err(|_| refused("does not hold 64 hexadecimal digits: restore it from a copy"))?;
    Ok(SigningKey::from_seed(*seed))
}

/// At most a little more than a key file has.
fn contents(file: File) -> std::io::Result<Zeroizing<Vec<u8>>> {
    let most = 100 + sealed::OVERHEAD;
    let mut bytes = Zeroizing::new(Vec::with_capacity(most + 1));
    file.take(most as u64).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Replaces a key file by a sealed one. A crash leaves the one or the other.
fn seal_file(folder: &Path, name: &str, contents: &[u8], seal: &SealKey) -> Result<(), KeyFileError> {
    let sealed = seal.seal(name, contents).map_err(|error| KeyFileError::Random(error.to_string()))?;
    replace_file(folder, name, &sealed)?;
    tracing::info!(key = name, "sealed");
    Ok(())
}

/// Puts a file in the place of one that may be there. A crash leaves the one or the other.
fn replace_file(folder: &Path, name: &str, contents: &[u8]) -> Result<(), KeyFileError> {
    let (path, beside) = (folder.join(name), folder.join(format!("{name}.new")));
    let written = || -> std::io::Result<()> {
        let options = &mut OpenOptions::new();
        let mut file =
            options.write(true).create(true).truncate(true).mode(0o600).custom_flags(O_NOFOLLOW).open(&beside)?;
        file.write_all(contents)?;
        file.sync_all()?;
        std::fs::rename(&beside, &path)?;
        File::open(folder)?.sync_all()
    };
    written().map_err(|source| KeyFileError::Io { path, source })
}

/// The key that the credential stands for which systemd hands over, if it does.
fn seal() -> Result<Option<SealKey>, KeyFileError> {
    let credentials = std::env::var_os("CREDENTIALS_DIRECTORY");
    Ok(credentials.as_deref().map(|folder| read_seal(Path::new(folder))).transpose()?.flatten())
}

/// The key that the credential stands for, if there is one.
fn read_seal(credentials: &Path) -> Result<Option<SealKey>, KeyFileError> {
    let path = credentials.join(sealed::CREDENTIAL);
    match std::fs::read(&path).map(Zeroizing::new) {
        Ok(bytes) => SealKey::new(&bytes)
            .map(Some)
            .map_err(|_| KeyFileError::Refused { path, reason: "is no credential: at least 32 random bytes" }),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(KeyFileError::Io { path, source }),
    }
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
    fn a_replaced_key_is_the_new_one_and_sealed_where_the_others_are() {
        let seal = SealKey::new(&[7; 32]).unwrap();
        for seal in [None, Some(&seal)] {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("transport");
            write(&path, &generate().unwrap()).unwrap();
            read(folder.path(), "transport", seal).unwrap();
            let next = generate().unwrap();
            replace_with(folder.path(), "transport", &next, seal).unwrap();
            let held = read(folder.path(), "transport", seal).unwrap();
            assert_eq!(held.verify_key(), next.verify_key());
            assert_eq!(sealed::is_sealed(&std::fs::read(&path).unwrap()), seal.is_some());
            assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
            assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "nothing is left beside it");
        }
    }

    #[test]
    fn files_that_are_no_key_files_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key");
        let refused = |path: &Path| {
            let name = path.file_name().unwrap().to_str().unwrap();
            matches!(read(path.parent().unwrap(), name, None), Err(KeyFileError::Refused { .. }))
        };
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
