//! The state directory: who may read it, how a file in it is read and written.
//!
//! Every file is small, private (0600 in a 0700 directory), and replaced as a whole: written beside its place, fsynced,
//! renamed over it, and the directory fsynced. So a crash at any moment leaves the old file or the new one. A file
//! carries a label and a hash, so that damage is told from a format of another version:
//!
//! ```text
//! file = label ‖ "\n" ‖ contents ‖ SHA-256 of everything before
//! ```
//!
//! Files with keys are sealed if systemd hands over the credential for it, see [`mesh_protocol::sealed`]: what lies there
//! unsealed is sealed at the next start.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use mesh_protocol::id::sha256;
use mesh_protocol::sealed::{self, SealError, SealKey};
use nix::fcntl::{Flock, FlockArg, OFlag};
use tracing::info;
use zeroize::Zeroizing;

/// Length of the hash at the end of a labelled file, in bytes.
const CHECK_BYTES: usize = 32;
/// Files that hold keys: sealed where there is something to seal them with.
const SECRET_FILES: [&str; 3] = ["identity", "identity-next", "keys"];
/// Longest of them, in bytes.
const SECRET_LIMIT: u64 = 1 << 20;

/// The state directory, or a file in it, cannot be used. Nothing was overwritten.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum StateError {
    /// The kernel refused.
    #[error("{doing} {}: {cause}", path.display())]
    Io {
        /// What was tried.
        doing: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not. In the message already, so not its source too.
        cause: io::Error,
    },
    /// A link, FIFO, directory or device where a file should be, or the reverse.
    #[error("{} is not {expected}: move it away, then start again", path.display())]
    WrongType {
        /// What.
        path: PathBuf,
        /// What it should be.
        expected: &'static str,
    },
    /// Others may read or write it.
    #[error("{path} is open to others (mode {mode:04o}): if nobody read it, run: chmod {wanted:o} {path}",
        path = path.display())]
    TooOpen {
        /// What.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
        /// What they should be.
        wanted: u32,
    },
    /// Somebody else owns it.
    #[error("{path} belongs to uid {owner}, not to uid {wanted}: if you trust it, run: chown {wanted} {path}",
        path = path.display())]
    WrongOwner {
        /// What.
        path: PathBuf,
        /// Who owns it.
        owner: u32,
        /// Who should.
        wanted: u32,
    },
    /// Not as long as such a file is.
    #[error("{} is {got} bytes long, {wanted} expected: put back a backup of it", path.display())]
    WrongSize {
        /// What.
        path: PathBuf,
        /// Its length.
        got: u64,
        /// What it should be.
        wanted: String,
    },
    /// The hash at its end does not match, or its contents do not decode.
    #[error("{} is damaged ({reason}): {fix}", path.display())]
    Damaged {
        /// What.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
        /// What to do.
        fix: &'static str,
    },
    /// It is sealed, and cannot be opened.
    #[error("{} is sealed: {reason}", path.display())]
    Sealed {
        /// What.
        path: PathBuf,
        /// Why it does not open.
        reason: String,
    },
    /// Another process works on this directory.
    #[error("{} is in use by another meshd: stop that one first", path.display())]
    InUse {
        /// The directory.
        path: PathBuf,
    },
}

/// An open, checked and locked state directory. Clones share the lock.
#[derive(Debug, Clone)]
pub(crate) struct StateDir {
    path: PathBuf,
    seal: Option<Arc<SealKey>>,
    _lock: Arc<Flock<File>>,
}

impl StateDir {
    /// Opens the directory, makes it if it is missing, and locks it against other processes.
    ///
    /// # Errors
    /// Any [`StateError`]: it is not a directory, not ours, open to others, or in use; the credential is no key.
    pub(crate) fn open(path: &Path) -> Result<Self, StateError> {
        let credentials = std::env::var_os("CREDENTIALS_DIRECTORY");
        Self::open_with(path, credentials.as_deref().map(Path::new))
    }

    fn open_with(path: &Path, credentials: Option<&Path>) -> Result<Self, StateError> {
        match fs::symlink_metadata(path) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(io_error("make", path))?;
            }
            Err(error) => return Err(io_error("look at", path)(error)),
        }
        let metadata = fs::symlink_metadata(path).map_err(io_error("look at", path))?;
        if !metadata.is_dir() {
            return Err(StateError::WrongType { path: path.to_owned(), expected: "a directory" });
        }
        check_access(path, &metadata, 0o700)?;
        let lock = open_private(&path.join("lock"), OpenOptions::new().write(true).create(true))?;
        let lock = Flock::lock(lock, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| match errno {
            nix::errno::Errno::EWOULDBLOCK => StateError::InUse { path: path.to_owned() },
            errno => io_error("lock", path)(errno.into()),
        })?;
        let seal = credentials.map(read_seal).transpose()?.flatten().map(Arc::new);
        let state = Self { path: path.to_owned(), seal, _lock: Arc::new(lock) };
        state.seal_what_is_open()?;
        Ok(state)
    }

    /// Seals files with keys that were written without the credential, by `meshd join` for one.
    fn seal_what_is_open(&self) -> Result<(), StateError> {
        if self.seal.is_none() {
            return Ok(());
        }
        for name in SECRET_FILES {
            if let Some(bytes) = self.read_file(name, SECRET_LIMIT)?.filter(|bytes| !sealed::is_sealed(bytes)) {
                self.write_raw(name, &bytes)?;
                info!(file = name, "sealed");
            }
        }
        Ok(())
    }

    /// Whether files with keys are sealed.
    pub(crate) fn is_sealing(&self) -> bool {
        self.seal.is_some()
    }

    /// Where a file of that name lies.
    pub(crate) fn path_of(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Whether there is anything of that name.
    pub(crate) fn has(&self, name: &str) -> bool {
        fs::symlink_metadata(self.path_of(name)).is_ok()
    }

    /// Names of files that start with `prefix`.
    ///
    /// # Errors
    /// [`StateError::Io`].
    pub(crate) fn names(&self, prefix: &str) -> Result<Vec<String>, StateError> {
        let entries = fs::read_dir(&self.path).map_err(io_error("list", &self.path))?;
        let names = entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
        Ok(names.filter(|name| name.starts_with(prefix)).collect())
    }

    /// Reads a file of exactly `size` bytes; `None` if there is none.
    ///
    /// # Errors
    /// Any [`StateError`] but [`StateError::InUse`].
    pub(crate) fn read_exact(&self, name: &str, size: usize) -> Result<Option<Zeroizing<Vec<u8>>>, StateError> {
        let Some(bytes) = self.read_raw(name, size as u64)? else { return Ok(None) };
        if bytes.len() == size {
            return Ok(Some(bytes));
        }
        Err(StateError::WrongSize { path: self.path_of(name), got: bytes.len() as u64, wanted: size.to_string() })
    }

    /// Reads a labelled file of at most `limit` bytes and gives back its contents; `None` if there is none. `fix` says
    /// what an operator does about a damaged one.
    ///
    /// # Errors
    /// Any [`StateError`] but [`StateError::InUse`].
    pub(crate) fn read(
        &self,
        name: &str,
        label: &str,
        limit: u64,
        fix: &'static str,
    ) -> Result<Option<Zeroizing<Vec<u8>>>, StateError> {
        let Some(mut bytes) = self.read_raw(name, limit)? else { return Ok(None) };
        let damaged = |reason: &str| self.damaged(name, reason.to_owned(), fix);
        let Some(end) = bytes.len().checked_sub(CHECK_BYTES) else { return Err(damaged("cut short")) };
        if sha256(&[&bytes[..end]]) != bytes[end..] {
            return Err(damaged("its hash does not match"));
        }
        let start = label.len() + 1;
        if bytes.len() < start + CHECK_BYTES || !bytes.starts_with(label.as_bytes()) || bytes[label.len()] != b'\n' {
            return Err(damaged("written by another version, or another file"));
        }
        bytes.truncate(end);
        bytes.drain(..start);
        Ok(Some(bytes))
    }

    /// The error for a file whose hash is right and whose contents make no sense.
    pub(crate) fn damaged(&self, name: &str, reason: String, fix: &'static str) -> StateError {
        StateError::Damaged { path: self.path_of(name), reason, fix }
    }

    /// Replaces a labelled file.
    ///
    /// # Errors
    /// [`StateError::Io`]; the file is then as it was.
    pub(crate) fn write(&self, name: &str, label: &str, contents: &[u8]) -> Result<(), StateError> {
        let mut bytes = Zeroizing::new(Vec::with_capacity(label.len() + 1 + contents.len() + CHECK_BYTES));
        bytes.extend_from_slice(label.as_bytes());
        bytes.push(b'\n');
        bytes.extend_from_slice(contents);
        let check = sha256(&[&bytes]);
        bytes.extend_from_slice(&check);
        self.write_raw(name, &bytes)
    }

    /// Replaces a file with exactly these bytes.
    ///
    /// # Errors
    /// [`StateError::Io`]; the file is then as it was.
    pub(crate) fn write_raw(&self, name: &str, bytes: &[u8]) -> Result<(), StateError> {
        let target = self.path_of(name);
        let beside = self.path_of(&format!("{name}.new"));
        // What a crash left behind, whatever it is: a link there must not lead the write elsewhere.
        match fs::remove_file(&beside) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(io_error("remove", &beside)(error)),
            _ => {}
        }
        let sealed = match &self.seal {
            Some(seal) if SECRET_FILES.contains(&name) => seal.seal(name, bytes).map(Some),
            _ => Ok(None),
        };
        let sealed = sealed.map_err(|error| self.sealed(name, error))?;
        let written =
            write_new(&beside, sealed.as_deref().unwrap_or(bytes)).and_then(|()| fs::rename(&beside, &target));
        if let Err(error) = written {
            // The old file is untouched; a half-written one beside it is of no use to anybody.
            let _ = fs::remove_file(&beside);
            return Err(io_error("write", &target)(error));
        }
        File::open(&self.path).and_then(|dir| dir.sync_all()).map_err(io_error("sync", &self.path))
    }

    /// Removes a file, if it is there.
    ///
    /// # Errors
    /// [`StateError::Io`]; the file may still be there then.
    pub(crate) fn remove(&self, name: &str) -> Result<(), StateError> {
        let path = self.path_of(name);
        match fs::remove_file(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            removed => removed.map_err(io_error("remove", &path))?,
        }
        File::open(&self.path).and_then(|dir| dir.sync_all()).map_err(io_error("sync", &self.path))
    }

    fn sealed(&self, name: &str, error: SealError) -> StateError {
        StateError::Sealed { path: self.path_of(name), reason: error.to_string() }
    }

    /// Reads a file of at most `limit` bytes, before it was sealed.
    fn read_raw(&self, name: &str, limit: u64) -> Result<Option<Zeroizing<Vec<u8>>>, StateError> {
        let Some(bytes) = self.read_file(name, limit + sealed::OVERHEAD as u64)? else { return Ok(None) };
        if sealed::is_sealed(&bytes) {
            let seal = self.seal.as_ref().ok_or_else(|| StateError::Sealed {
                path: self.path_of(name),
                reason: format!("start meshd by its unit, which hands over the credential {}", sealed::CREDENTIAL),
            })?;
            return seal.open(name, &bytes).map(Some).map_err(|error| self.sealed(name, error));
        }
        match bytes.len() as u64 > limit {
            true => Err(StateError::WrongSize {
                path: self.path_of(name),
                got: bytes.len() as u64,
                wanted: format!("at most {limit}"),
            }),
            false => Ok(Some(bytes)),
        }
    }

    fn read_file(&self, name: &str, limit: u64) -> Result<Option<Zeroizing<Vec<u8>>>, StateError> {
        let path = self.path_of(name);
        let file = match open_private(&path, OpenOptions::new().read(true)) {
            Ok(file) => file,
            Err(StateError::Io { cause, .. }) if cause.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let length = file.metadata().map_err(io_error("look at", &path))?.len();
        if length > limit {
            return Err(StateError::WrongSize { path, got: length, wanted: format!("at most {limit}") });
        }
        // Room for all of it at once: a growing buffer would leave copies of secrets behind.
        let mut bytes = Zeroizing::new(Vec::with_capacity(usize::try_from(length).unwrap_or(0) + 1));
        file.take(limit).read_to_end(&mut bytes).map_err(io_error("read", &path))?;
        Ok(Some(bytes))
    }
}

/// The key that the credential stands for, if there is one.
fn read_seal(credentials: &Path) -> Result<Option<SealKey>, StateError> {
    let path = credentials.join(sealed::CREDENTIAL);
    let bytes = match fs::read(&path) {
        Ok(bytes) => Zeroizing::new(bytes),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(io_error("read", &path)(error)),
    };
    SealKey::new(&bytes).map(Some).map_err(|error| StateError::Sealed { path, reason: error.to_string() })
}

/// Opens a regular file that is ours and private. Neither follows a link nor waits for the other end of a FIFO.
fn open_private(path: &Path, options: &mut OpenOptions) -> Result<File, StateError> {
    let flags = OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    let not_a_file = || StateError::WrongType { path: path.to_owned(), expected: "a regular file" };
    let file = options.mode(0o600).custom_flags(flags.bits()).open(path).map_err(|error| {
        match error.raw_os_error().map(nix::errno::Errno::from_raw) {
            // ELOOP: a link. ENXIO: a FIFO nobody reads. EISDIR: a directory.
            Some(nix::errno::Errno::ELOOP | nix::errno::Errno::ENXIO | nix::errno::Errno::EISDIR) => not_a_file(),
            _ => io_error("open", path)(error),
        }
    })?;
    let metadata = file.metadata().map_err(io_error("look at", path))?;
    if !metadata.is_file() {
        return Err(not_a_file());
    }
    check_access(path, &metadata, 0o600)?;
    Ok(file)
}

fn check_access(path: &Path, metadata: &fs::Metadata, wanted: u32) -> Result<(), StateError> {
    let (owner, own) = (metadata.uid(), nix::unistd::geteuid().as_raw());
    if owner != own {
        return Err(StateError::WrongOwner { path: path.to_owned(), owner, wanted: own });
    }
    let mode = metadata.mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(StateError::TooOpen { path: path.to_owned(), mode, wanted });
    }
    Ok(())
}

fn write_new(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

fn io_error(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StateError {
    move |cause| StateError::Io { doing, path: path.to_owned(), cause }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::*;

    #[test]
    fn keys_are_sealed_where_there_is_a_credential_and_need_it_from_then_on() {
        let temp = tempfile::tempdir().unwrap();
        let (path, credentials) = (temp.path().join("state"), temp.path().join("credentials"));
        fs::create_dir(&credentials).unwrap();
        let open = |with: bool| StateDir::open_with(&path, with.then_some(credentials.as_path()));
        let on_disk = |name: &str| fs::read(path.join(name)).unwrap();
        {
            let state = open(true).unwrap();
            assert!(!state.is_sealing(), "the directory alone is no credential");
            state.write_raw("identity", &[7; 32]).unwrap();
            state.write("directory", LABEL, b"known to all").unwrap();
        }
        assert_eq!(on_disk("identity"), [7; 32]);
        fs::write(credentials.join(sealed::CREDENTIAL), [3; 40]).unwrap();
        {
            let state = open(true).unwrap();
            assert!(state.is_sealing());
            assert!(sealed::is_sealed(&on_disk("identity")), "what was open is sealed");
            state.write("keys", LABEL, b"secrets of tunnels").unwrap();
            assert_eq!(*state.read("keys", LABEL, 18 + 44, FIX).unwrap().unwrap(), b"secrets of tunnels");
            assert!(state.read("keys", LABEL, 1, FIX).is_err(), "too long");
        }
        assert!(!on_disk("keys").windows(7).any(|window| window == b"secrets"));
        assert!(on_disk("directory").windows(5).any(|window| window == b"known"), "no secret, not sealed");
        {
            let state = open(true).unwrap();
            assert_eq!(*state.read_exact("identity", 32).unwrap().unwrap(), [7; 32]);
        }
        let error = open(false).unwrap().read_exact("identity", 32).unwrap_err().to_string();
        assert!(error.ends_with("start meshd by its unit, which hands over the credential mesh.seal"), "{error}");
        fs::write(credentials.join(sealed::CREDENTIAL), [4; 40]).unwrap();
        let error = open(true).unwrap().read_exact("identity", 32).unwrap_err().to_string();
        assert!(error.ends_with("it was sealed with another mesh.seal, or is damaged"), "{error}");
        fs::write(credentials.join(sealed::CREDENTIAL), [4; 4]).unwrap();
        assert!(open(true).is_err(), "no key");
    }

    const LABEL: &str = "mesh test 1";
    const FIX: &str = "throw it away";

    fn dir() -> (tempfile::TempDir, StateDir) {
        let temp = tempfile::tempdir().unwrap();
        let state = StateDir::open(&temp.path().join("state")).unwrap();
        (temp, state)
    }

    fn read(state: &StateDir, name: &str) -> Result<Option<Zeroizing<Vec<u8>>>, StateError> {
        state.read(name, LABEL, 1 << 20, FIX)
    }

    #[test]
    fn what_is_written_is_read_and_private() {
        let (_temp, state) = dir();
        assert!(read(&state, "thing").unwrap().is_none());
        state.write("thing", LABEL, b"one").unwrap();
        state.write("thing", LABEL, b"two").unwrap();
        assert_eq!(*read(&state, "thing").unwrap().unwrap(), b"two");
        assert_eq!(fs::metadata(state.path_of("thing")).unwrap().mode() & 0o7777, 0o600);
        assert!(!state.has("thing.new"));
    }

    #[test]
    fn a_second_process_is_refused() {
        let (temp, _state) = dir();
        let second = StateDir::open(&temp.path().join("state")).unwrap_err();
        assert!(matches!(second, StateError::InUse { .. }), "{second}");
    }

    #[test]
    fn a_crash_before_the_rename_leaves_the_old_file() {
        let (_temp, state) = dir();
        state.write("thing", LABEL, b"old").unwrap();
        fs::write(state.path_of("thing.new"), b"half a fi").unwrap();
        assert_eq!(*read(&state, "thing").unwrap().unwrap(), b"old");
        state.write("thing", LABEL, b"new").unwrap();
        assert_eq!(*read(&state, "thing").unwrap().unwrap(), b"new");
    }

    #[test]
    fn every_damage_is_named_and_nothing_overwritten() {
        let (_temp, state) = dir();
        state.write("thing", LABEL, b"contents").unwrap();
        let whole = fs::read(state.path_of("thing")).unwrap();
        let cuts = (0..whole.len()).map(|end| whole[..end].to_vec());
        let flips = (0..whole.len()).map(|at| {
            let mut bytes = whole.clone();
            bytes[at] ^= 1;
            bytes
        });
        for bytes in cuts.chain(flips) {
            fs::write(state.path_of("thing"), &bytes).unwrap();
            let error = read(&state, "thing").unwrap_err();
            assert!(error.to_string().contains(FIX), "{error}");
            assert_eq!(fs::read(state.path_of("thing")).unwrap(), bytes);
        }
    }

    #[test]
    fn links_fifos_directories_and_open_modes_are_refused_with_a_fix() {
        let (temp, state) = dir();
        let path = state.path_of("thing");
        symlink("/etc/hostname", &path).unwrap();
        assert!(matches!(read(&state, "thing").unwrap_err(), StateError::WrongType { .. }));
        fs::remove_file(&path).unwrap();
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(matches!(read(&state, "thing").unwrap_err(), StateError::WrongType { .. }));
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        assert!(matches!(read(&state, "thing").unwrap_err(), StateError::WrongType { .. }));
        fs::remove_dir(&path).unwrap();
        state.write("thing", LABEL, b"x").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        let error = read(&state, "thing").unwrap_err();
        assert!(error.to_string().contains("chmod 600"), "{error}");
        drop(state);
        let root = temp.path().join("state");
        fs::set_permissions(&root, fs::Permissions::from_mode(0o755)).unwrap();
        let error = StateDir::open(&root).unwrap_err();
        assert!(error.to_string().contains("chmod 700"), "{error}");
    }

    #[test]
    fn sizes_are_checked() {
        let (_temp, state) = dir();
        for size in [0, 31, 33, 4096] {
            state.write_raw("seed", &vec![1; size]).unwrap();
            let error = state.read_exact("seed", 32).unwrap_err();
            assert!(matches!(error, StateError::WrongSize { .. }), "{error}");
        }
        state.write_raw("seed", &[1; 32]).unwrap();
        assert_eq!(state.read_exact("seed", 32).unwrap().unwrap().len(), 32);
    }
}
