//! The socket: made with its final rights in one step, made again when somebody removes it.

use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nix::unistd::{Group, chown, geteuid};
use tokio::net::UnixListener;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tracing::{info, warn};

use super::connection::{self, Peer};
use crate::app::Node;

/// Connections of root at one time: as many pods as start together, and more. One takes under 10 KiB, or the line it sends.
const ROOT_CONNECTIONS: usize = 512;
/// Connections of all others together. With a line of 1 MiB each that is 32 MiB.
const OTHER_CONNECTIONS: usize = 32;
/// How often the socket's file is looked at.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// Wait after `accept` failed, when descriptors are short.
const PAUSE: Duration = Duration::from_millis(200);

/// The socket cannot be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum ListenError {
    /// The kernel refused.
    #[error("{doing} {}: {cause}", path.display())]
    Io {
        /// What was tried.
        doing: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        cause: io::Error,
    },
    /// Others could put their own socket in its place.
    #[error("{} may be written by others: run: chmod go-w {}", path.display(), path.display())]
    OpenDirectory {
        /// The socket's directory.
        path: PathBuf,
    },
    /// Another process answers there.
    #[error("another meshd listens on {}: stop it, or configure another socket", path.display())]
    InUse {
        /// The socket.
        path: PathBuf,
    },
}

/// The bound socket.
#[derive(Debug)]
pub(crate) struct Listener {
    path: PathBuf,
    group: String,
    socket: UnixListener,
    /// Device and inode of the socket's file.
    file: (u64, u64),
}

impl Listener {
    /// Makes the socket. What a killed process left there is replaced.
    ///
    /// # Errors
    /// Any [`ListenError`].
    pub(crate) fn bind(path: &Path, group: &str) -> Result<Self, ListenError> {
        if std::os::unix::net::UnixStream::connect(path).is_ok() {
            return Err(ListenError::InUse { path: path.to_owned() });
        }
        let socket = bind(path, group)?;
        let file = identity(path).map_err(io_error("look at", path))?;
        info!(socket = %path.display(), "local API open");
        Ok(Self { path: path.to_owned(), group: group.to_owned(), socket, file })
    }

    /// Accepts connections for ever; connections end with the future.
    pub(crate) async fn run(mut self, node: Arc<Node>) {
        let root = Arc::new(Semaphore::new(ROOT_CONNECTIONS));
        let others = Arc::new(Semaphore::new(OTHER_CONNECTIONS));
        let mut tasks = JoinSet::new();
        let mut look = tokio::time::interval(LOOK_EVERY);
        loop {
            let accepted = tokio::select! {
                accepted = self.socket.accept() => accepted,
                _ = look.tick() => {
                    self.keep();
                    continue;
                }
                Some(_ended) = tasks.join_next() => continue,
            };
            let stream = match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    warn!(%error, "cannot accept a local connection");
                    tokio::time::sleep(PAUSE).await;
                    continue;
                }
            };
            let Ok(credentials) = stream.peer_cred() else { continue };
            let peer = Peer { uid: credentials.uid(), pid: credentials.pid() };
            let limit = if peer.is_root() { &root } else { &others };
            match Arc::clone(limit).try_acquire_owned() {
                Ok(permit) => {
                    let node = Arc::clone(&node);
                    tasks.spawn(async move {
                        connection::serve(stream, peer, &*node).await;
                        drop(permit);
                    });
                }
                Err(_) => connection::refuse(&stream),
            }
        }
    }

    /// Makes the socket again if its file is gone or another.
    fn keep(&mut self) {
        if identity(&self.path).is_ok_and(|file| file == self.file) {
            return;
        }
        warn!(socket = %self.path.display(), "socket was removed or replaced, making it again");
        let made = bind(&self.path, &self.group).and_then(|socket| {
            let file = identity(&self.path).map_err(io_error("look at", &self.path))?;
            Ok((socket, file))
        });
        match made {
            Ok((socket, file)) => (self.socket, self.file) = (socket, file),
            Err(error) => warn!(%error, "cannot make the socket again"),
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // A socket that is not ours any more stays.
        if identity(&self.path).is_ok_and(|file| file == self.file) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    fs::symlink_metadata(path).map(|metadata| (metadata.dev(), metadata.ino()))
}

/// Binds in a private directory, sets the rights, and moves the socket to its place: nobody can open it before.
fn bind(path: &Path, group: &str) -> Result<UnixListener, ListenError> {
    let directory = path.parent().unwrap_or(Path::new("/"));
    DirBuilder::new().recursive(true).mode(0o755).create(directory).map_err(io_error("make", directory))?;
    let metadata = fs::metadata(directory).map_err(io_error("look at", directory))?;
    let trusted = metadata.uid() == 0 || metadata.uid() == geteuid().as_raw();
    if !trusted || metadata.mode() & 0o022 != 0 {
        return Err(ListenError::OpenDirectory { path: directory.to_owned() });
    }
    // Short, so that it is no longer than the path that was checked.
    let private = directory.join(".new");
    let _ = fs::remove_dir_all(&private);
    DirBuilder::new().mode(0o700).create(&private).map_err(io_error("make", &private))?;
    let bound = bind_in(&private, path, group);
    let _ = fs::remove_dir_all(&private);
    bound
}

fn bind_in(private: &Path, path: &Path, group: &str) -> Result<UnixListener, ListenError> {
    let new = private.join("s");
    let socket = UnixListener::bind(&new).map_err(io_error("bind", &new))?;
    let found = Group::from_name(group).map_err(|errno| io_error("look up the group of", &new)(errno.into()))?;
    let mode = if let Some(group) = found {
        chown(&new, None, Some(group.gid)).map_err(|errno| io_error("chown", &new)(errno.into()))?;
        0o660
    } else {
        warn!(group, "no such group: the socket is for root alone");
        0o600
    };
    fs::set_permissions(&new, Permissions::from_mode(mode)).map_err(io_error("chmod", &new))?;
    fs::rename(&new, path).map_err(io_error("put in place", path))?;
    Ok(socket)
}

fn io_error(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> ListenError {
    move |cause| ListenError::Io { doing, path: path.to_owned(), cause }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use std::os::unix::fs::symlink;

    use super::*;

    #[tokio::test]
    async fn stale_sockets_and_links_are_replaced_and_a_live_one_is_not() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("run/meshd.sock");
        fs::create_dir(temp.path().join("run")).unwrap();
        // What kill -9 leaves.
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        let listener = Listener::bind(&path, "no-such-group").unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o600);
        assert!(matches!(Listener::bind(&path, "root"), Err(ListenError::InUse { .. })));
        drop(listener);
        assert!(!path.exists());
        let victim = temp.path().join("victim");
        fs::write(&victim, "untouched").unwrap();
        symlink(&victim, &path).unwrap();
        let _listener = Listener::bind(&path, "root").unwrap();
        assert_eq!(fs::read_to_string(&victim).unwrap(), "untouched");
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o660);
    }

    #[tokio::test]
    async fn a_directory_others_may_write_is_refused() {
        let temp = tempfile::tempdir().unwrap();
        let run = temp.path().join("run");
        fs::create_dir(&run).unwrap();
        fs::set_permissions(&run, Permissions::from_mode(0o777)).unwrap();
        let refused = Listener::bind(&run.join("meshd.sock"), "root");
        assert!(matches!(refused, Err(ListenError::OpenDirectory { .. })));
    }

    #[tokio::test]
    async fn a_removed_socket_is_made_again() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("run/meshd.sock");
        let mut listener = Listener::bind(&path, "root").unwrap();
        fs::remove_file(&path).unwrap();
        listener.keep();
        assert!(std::os::unix::net::UnixStream::connect(&path).is_ok());
    }
}
