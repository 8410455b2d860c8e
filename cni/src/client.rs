//! One question to meshd, one answer, both within a deadline: a pod's creation never hangs on us.

use std::io::{self, Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use mesh_protocol::line::{self, LineBuffer};
use mesh_protocol::local::{LocalError, LocalReply, LocalRequest};
use nix::errno::Errno;
use nix::sys::socket::{self, AddressFamily, SockFlag, SockType, UnixAddr, sockopt};
use nix::sys::time::{TimeVal, TimeValLike as _};

/// How long meshd may take. It answers from memory and one fsync; a disk under load takes seconds.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);

/// meshd gave no good answer.
#[derive(Debug)]
pub(crate) enum ClientError {
    /// Nobody is there, or nobody answered in time.
    Unreachable(String),
    /// It answered what this version does not understand.
    Malformed(String),
    /// It refused.
    Refused(LocalError),
}

impl ClientError {
    /// The text for people.
    pub(crate) fn message(&self) -> String {
        match self {
            Self::Unreachable(text) => text.clone(),
            Self::Malformed(text) => format!("meshd answered what mesh-cni does not understand: {text}"),
            Self::Refused(error) => format!("meshd refused: {error}"),
        }
    }
}

/// Asks meshd at `path`.
pub(crate) fn ask(path: &Path, request: &LocalRequest) -> Result<LocalReply, ClientError> {
    let deadline = Instant::now() + PATIENCE;
    let line = line::encode(request).map_err(|error| ClientError::Malformed(error.to_string()))?;
    let reply = exchange(path, &line, deadline).map_err(|error| match error.kind() {
        io::ErrorKind::InvalidData => ClientError::Malformed(error.to_string()),
        _ => ClientError::Unreachable(unreachable_text(path, &error)),
    })?;
    match line::decode(&reply) {
        Ok(LocalReply::Error(error)) => Err(ClientError::Refused(error)),
        Ok(reply) => Ok(reply),
        Err(error) => Err(ClientError::Malformed(error.to_string())),
    }
}

fn unreachable_text(path: &Path, error: &io::Error) -> String {
    let what = match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => "it does not run".to_owned(),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => "it does not answer in time".to_owned(),
        io::ErrorKind::UnexpectedEof => "it closed the connection".to_owned(),
        _ => error.to_string(),
    };
    format!("cannot reach meshd at {}: {what}", path.display())
}

fn exchange(path: &Path, request: &[u8], deadline: Instant) -> io::Result<Vec<u8>> {
    let mut stream = connect(path)?;
    stream.write_all(request)?;
    let mut buffer = LineBuffer::default();
    let mut chunk = [0; 4096];
    loop {
        if let Some(line) = buffer.next_line().map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))? {
            return Ok(line);
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        stream.set_read_timeout(Some(left))?;
        match stream.read(&mut chunk) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(len) => buffer.push(&chunk[..len]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// Connects; the send timeout bounds `connect` too, against a listener that accepts nobody (unix(7)).
fn connect(path: &Path) -> io::Result<UnixStream> {
    let address = UnixAddr::new(path)?;
    let fd = socket::socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    let seconds = i64::try_from(PATIENCE.as_secs()).unwrap_or(i64::MAX);
    socket::setsockopt(&fd, sockopt::SendTimeout, &TimeVal::seconds(seconds))?;
    match socket::connect(fd.as_raw_fd(), &address) {
        Ok(()) => Ok(UnixStream::from(fd)),
        Err(Errno::EAGAIN) => Err(io::ErrorKind::TimedOut.into()),
        Err(errno) => Err(errno.into()),
    }
}
