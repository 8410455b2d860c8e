//! The control socket: one thread for each client, several operations for each connection.

use std::{
    fs, io,
    io::{BufRead, BufReader, Read, Write as _},
    os::unix::{
        fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _},
        net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    sync::{Arc, atomic::AtomicUsize, atomic::Ordering},
    thread,
};

use tracing::{debug, warn};
use zeroize::{Zeroize as _, Zeroizing};

use crate::{
    device::Device,
    uapi::{self, MAX_LINE, Parser, Request},
};

/// Where wg(8) looks for sockets.
pub const DIRECTORY: &str = "/var/run/wireguard";
/// Clients at a time, each with a thread; more are turned away.
const MAX_CLIENTS: usize = 64;

/// A bound control socket. Its file goes when it is dropped, unless it is another's by then.
#[derive(Debug)]
pub struct ControlSocket {
    listener: UnixListener,
    path: PathBuf,
    identity: (u64, u64),
    clients: Arc<AtomicUsize>,
}

impl ControlSocket {
    /// Binds `IFACE.sock` in `directory`, which is made if it is not there. A file that nobody listens on is replaced.
    ///
    /// # Errors
    ///
    /// `AddrInUse` if another process serves it; what the system says otherwise.
    pub fn bind(directory: &Path, iface: &str) -> io::Result<Self> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
        let path = directory.join(format!("{iface}.sock"));
        if fs::symlink_metadata(&path).is_ok() {
            if UnixStream::connect(&path).is_ok() {
                return Err(io::Error::new(io::ErrorKind::AddrInUse, "another process serves the control socket"));
            }
            fs::remove_file(&path)?;
        }
        // wg(8) removes a socket that refuses it, as this one would until it listens: it gets its name when it does.
        let unnamed = directory.join(format!(".{iface}.{}", std::process::id()));
        let _ = fs::remove_file(&unnamed);
        let listener = UnixListener::bind(&unnamed)?;
        let named = fs::set_permissions(&unnamed, fs::Permissions::from_mode(0o600))
            .and_then(|()| listener.set_nonblocking(true))
            .and_then(|()| fs::hard_link(&unnamed, &path));
        fs::remove_file(&unnamed)?;
        named.map_err(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => io::Error::new(io::ErrorKind::AddrInUse, error),
            _ => error,
        })?;
        let identity = identity_of(&path)?;
        Ok(Self { listener, path, identity, clients: Arc::default() })
    }

    /// Its file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// To wait for clients on.
    pub fn listener(&self) -> &UnixListener {
        &self.listener
    }

    /// True while its file is there and its own.
    pub fn is_there(&self) -> bool {
        identity_of(&self.path).is_ok_and(|identity| identity == self.identity)
    }

    /// Takes the clients that wait and serves each on a thread of its own.
    pub fn accept(&self, device: &Arc<Device>) {
        loop {
            let stream = match self.listener.accept() {
                Ok((stream, _)) => stream,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => return warn!(%error, "client not accepted"),
            };
            if self.clients.fetch_add(1, Ordering::Relaxed) >= MAX_CLIENTS {
                self.clients.fetch_sub(1, Ordering::Relaxed);
                warn!("too many clients");
                continue;
            }
            let (device, clients) = (Arc::clone(device), Leave(Arc::clone(&self.clients)));
            let served = thread::Builder::new().name("client".into()).spawn(move || {
                let _clients = clients;
                if let Err(error) = serve(&stream, &device) {
                    debug!(%error, "client gone");
                }
            });
            if let Err(error) = served {
                warn!(%error, "client not served");
            }
        }
    }
}

impl Drop for ControlSocket {
    fn drop(&mut self) {
        if self.is_there() {
            // Whoever removed it in between has done the same.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Counts a client as gone when its thread ends, however that is.
struct Leave(Arc<AtomicUsize>);

impl Drop for Leave {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

fn identity_of(path: &Path) -> io::Result<(u64, u64)> {
    fs::symlink_metadata(path).map(|metadata| (metadata.dev(), metadata.ino()))
}

/// Answers one operation after another until the client goes.
fn serve(stream: &UnixStream, device: &Device) -> io::Result<()> {
    let mut reader = BufReader::with_capacity(4096, stream);
    let mut parser = Parser::default();
    let mut line = Zeroizing::new(Vec::with_capacity(MAX_LINE + 1));
    loop {
        line.zeroize();
        if !read_line(&mut reader, &mut line)? {
            return Ok(());
        }
        match parser.line(&line) {
            Ok(None) => {}
            Ok(Some(Request::Get)) => answer(stream, &device.get())?,
            Ok(Some(Request::Set(change))) => answer(stream, &uapi::end(device.set(change)))?,
            Err(error) => answer(stream, &uapi::end(Err(error)))?,
        }
    }
}

/// Reads a line without its end, of a longer one [`MAX_LINE`] bytes and one more; false if the client has gone.
fn read_line(reader: &mut impl BufRead, line: &mut Vec<u8>) -> io::Result<bool> {
    let most = MAX_LINE as u64 + 1;
    Read::take(&mut *reader, most).read_until(b'\n', line)?;
    if line.pop_if(|last| *last == b'\n').is_some() {
        return Ok(true);
    }
    let is_cut = line.len() > MAX_LINE;
    Ok(is_cut && reader.skip_until(b'\n')? > 0)
}

fn answer(mut stream: &UnixStream, text: &str) -> io::Result<()> {
    stream.write_all(text.as_bytes())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    #[test]
    fn whoever_finds_the_socket_is_never_refused() {
        let directory = tempfile::tempdir().unwrap();
        let (at, is_over) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let refused = thread::scope(|scope| {
            let prober = scope.spawn(|| {
                let mut refused = 0;
                while is_over.load(Ordering::Relaxed) == 0 {
                    let path = directory.path().join(format!("t{}.sock", at.load(Ordering::Relaxed)));
                    let found = UnixStream::connect(path).map_err(|error| error.kind());
                    refused += usize::from(matches!(found, Err(io::ErrorKind::ConnectionRefused)));
                }
                refused
            });
            let bind = |n: usize| {
                at.store(n, Ordering::Relaxed);
                ControlSocket::bind(directory.path(), &format!("t{n}")).unwrap()
            };
            // All stay: one that ends refuses those who have just found it.
            let sockets: Vec<_> = (0..500).map(bind).collect();
            let files = fs::read_dir(directory.path()).unwrap().count();
            assert_eq!(files, sockets.len(), "a name before is left");
            is_over.store(1, Ordering::Relaxed);
            prober.join().unwrap()
        });
        assert_eq!(refused, 0);
    }

    #[test]
    fn one_process_serves_a_name_and_another_takes_it_over_only_when_that_is_gone() {
        let directory = tempfile::tempdir().unwrap();
        let first = ControlSocket::bind(directory.path(), "t0").unwrap();
        let second = ControlSocket::bind(directory.path(), "t0").unwrap_err();
        assert_eq!(second.kind(), io::ErrorKind::AddrInUse);
        assert!(first.is_there());
        let path = first.path().to_owned();
        drop(first);
        assert!(!path.exists());
        // One that was killed leaves its file.
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let next = ControlSocket::bind(directory.path(), "t0").unwrap();
        assert!(next.is_there());
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    }
}
