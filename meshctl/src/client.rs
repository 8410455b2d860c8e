//! One conversation over a Unix socket: a request, any number of progress replies, one final reply; each a line of JSON.
//!
//! What the other end sends is not trusted to be right or in time: lines are bounded, every wait has a deadline.

use std::io::{self, Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use mesh_protocol::admin::AdminReply;
use mesh_protocol::line::{self, LineBuffer, LineError};
use mesh_protocol::local::LocalReply;
use nix::errno::Errno;
use nix::sys::socket::{self, AddressFamily, SockFlag, SockType, UnixAddr, sockopt};
use nix::sys::time::{TimeVal, TimeValLike as _};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// How long a reply may take that needs no work elsewhere: long enough for a loaded machine, short enough for a person.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);

/// Who is at the other end; for messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Service {
    /// `meshd` on this node.
    Node,
    /// The keyserver on this machine.
    Keyserver,
}

impl Service {
    fn name(self) -> &'static str {
        match self {
            Self::Node => "meshd",
            Self::Keyserver => "the keyserver",
        }
    }

    fn how_to_start(self) -> &'static str {
        match self {
            Self::Node => "start it (systemctl start meshd), or name its socket with --socket",
            Self::Keyserver => {
                "run this on the keyserver's machine, start it there (systemctl start keyserver), or name its socket \
                 with --admin-socket"
            }
        }
    }

    fn how_to_be_allowed(self) -> &'static str {
        match self {
            Self::Node => "run as root; members of the socket's group may read",
            Self::Keyserver => "run as root",
        }
    }
}

/// A conversation failed. The message says what was tried, on what, and what to do.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ClientError {
    /// The path can never be a socket.
    #[error("'{}' cannot be the socket of {}: {reason}", path.display(), service.name())]
    BadPath { service: Service, path: PathBuf, reason: String },
    /// Nobody made the socket.
    #[error("cannot reach {}: no socket at {}; {}", service.name(), path.display(), service.how_to_start())]
    NoSocket { service: Service, path: PathBuf },
    /// The socket is there, its owner is not.
    #[error("cannot reach {}: nobody listens at {}; {}", service.name(), path.display(), service.how_to_start())]
    NotListening { service: Service, path: PathBuf },
    /// The kernel says no.
    #[error("not permitted to open {}: {}", path.display(), service.how_to_be_allowed())]
    NotPermitted { service: Service, path: PathBuf },
    /// Some other failure of the socket.
    #[error("talk to {} at {}", service.name(), path.display())]
    Io {
        service: Service,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// No reply in time.
    #[error("{} at {} did not answer within {}; look at its log", service.name(), path.display(), humantime::format_duration(*after))]
    Timeout { service: Service, path: PathBuf, after: Duration },
    /// The end came before the final reply.
    #[error("{} closed the connection before it answered; look at its log, then try again", service.name())]
    Closed { service: Service },
    /// A line that does not decode or is too long.
    #[error("{} answered what this meshctl does not understand; are both of one version?", service.name())]
    Malformed {
        service: Service,
        #[source]
        source: LineError,
    },
    /// A well-formed reply to another question.
    #[error("{} answered another question than was asked; are both of one version?", service.name())]
    Unexpected { service: Service },
    /// The request was understood and refused.
    #[error("{} refused: {message}", service.name())]
    Refused { service: Service, code: String, message: String },
}

impl ClientError {
    /// For programs: kebab-case, stable; the code of a refusal is the server's.
    pub(crate) fn code(&self) -> &str {
        match self {
            Self::BadPath { .. } => "bad-path",
            Self::NoSocket { .. } => "no-socket",
            Self::NotListening { .. } => "not-listening",
            Self::NotPermitted { .. } => "not-permitted",
            Self::Io { .. } => "io",
            Self::Timeout { .. } => "timeout",
            Self::Closed { .. } => "closed",
            Self::Malformed { .. } => "malformed",
            Self::Unexpected { .. } => "unexpected",
            Self::Refused { code, .. } => code,
        }
    }
}

/// A refusal inside a reply: code and message.
pub(crate) type Refusal = (String, String);

/// What both sockets' replies have in common.
pub(crate) trait Reply: DeserializeOwned {
    /// Who sends it.
    const SERVICE: Service;

    /// Takes a refusal out.
    fn into_result(self) -> Result<Self, Refusal>;
}

impl Reply for LocalReply {
    const SERVICE: Service = Service::Node;

    fn into_result(self) -> Result<Self, Refusal> {
        match self {
            Self::Error(error) => Err((code_name(&error.code), error.message)),
            reply => Ok(reply),
        }
    }
}

impl Reply for AdminReply {
    const SERVICE: Service = Service::Keyserver;

    fn into_result(self) -> Result<Self, Refusal> {
        match self {
            Self::Error(error) => Err((code_name(&error.code), error.message)),
            reply => Ok(reply),
        }
    }
}

fn code_name<C: Serialize>(code: &C) -> String {
    serde_json::to_value(code).ok().and_then(|value| value.as_str().map(str::to_owned)).unwrap_or_default()
}

/// An open conversation whose replies are of type `R`.
#[derive(Debug)]
pub(crate) struct Conversation<R> {
    stream: UnixStream,
    buffer: LineBuffer,
    path: PathBuf,
    reply: std::marker::PhantomData<R>,
}

impl<R: Reply> Conversation<R> {
    /// Connects and sends the request.
    pub(crate) fn start<Q: Serialize>(path: &Path, request: &Q) -> Result<Self, ClientError> {
        let service = R::SERVICE;
        let stream = connect(service, path)?;
        let line = line::encode(request).map_err(|source| ClientError::Malformed { service, source })?;
        let mut conversation =
            Self { stream, buffer: LineBuffer::default(), path: path.to_owned(), reply: std::marker::PhantomData };
        conversation.stream.write_all(&line).map_err(|source| conversation.failed(source))?;
        Ok(conversation)
    }

    /// The next reply, waiting for `patience` at most. A refusal is an error.
    pub(crate) fn next(&mut self, patience: Duration) -> Result<R, ClientError> {
        let service = R::SERVICE;
        let deadline = Instant::now() + patience;
        let mut chunk = [0; 16 * 1024];
        loop {
            let line = self.buffer.next_line().map_err(|source| ClientError::Malformed { service, source })?;
            if let Some(line) = line {
                let reply: R = line::decode(&line).map_err(|source| ClientError::Malformed { service, source })?;
                return reply.into_result().map_err(|(code, message)| ClientError::Refused { service, code, message });
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(self.late(patience));
            }
            self.stream.set_read_timeout(Some(left)).map_err(|source| self.failed(source))?;
            match self.stream.read(&mut chunk) {
                Ok(0) => return Err(ClientError::Closed { service }),
                Ok(len) => self.buffer.push(&chunk[..len]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Err(self.late(patience)),
                Err(error) => return Err(self.failed(error)),
            }
        }
    }

    fn late(&self, after: Duration) -> ClientError {
        ClientError::Timeout { service: R::SERVICE, path: self.path.clone(), after }
    }

    fn failed(&self, source: io::Error) -> ClientError {
        match source.kind() {
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => ClientError::Closed { service: R::SERVICE },
            _ => ClientError::Io { service: R::SERVICE, path: self.path.clone(), source },
        }
    }
}

/// Asks one question that has one answer.
pub(crate) fn ask<R: Reply, Q: Serialize>(path: &Path, request: &Q) -> Result<R, ClientError> {
    Conversation::start(path, request)?.next(PATIENCE)
}

/// Connects, also against a listener that accepts nobody: the send timeout bounds `connect` too (unix(7)).
fn connect(service: Service, path: &Path) -> Result<UnixStream, ClientError> {
    let bad = |reason: String| ClientError::BadPath { service, path: path.to_owned(), reason };
    let address = match UnixAddr::new(path) {
        Ok(_) if path.as_os_str().is_empty() => return Err(bad("the path is empty".into())),
        Ok(address) => address,
        Err(_) => return Err(bad("the path is longer than 107 bytes, or has a zero byte in it".into())),
    };
    let io = |errno: Errno| ClientError::Io { service, path: path.to_owned(), source: errno.into() };
    let fd = socket::socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).map_err(io)?;
    let seconds = i64::try_from(PATIENCE.as_secs()).unwrap_or(i64::MAX);
    socket::setsockopt(&fd, sockopt::SendTimeout, &TimeVal::seconds(seconds)).map_err(io)?;
    match socket::connect(fd.as_raw_fd(), &address) {
        Ok(()) => Ok(UnixStream::from(fd)),
        Err(Errno::ENOENT) => Err(ClientError::NoSocket { service, path: path.to_owned() }),
        Err(Errno::ECONNREFUSED) if is_no_socket(path) => Err(bad("it is a file of another kind".into())),
        Err(Errno::ECONNREFUSED) => Err(ClientError::NotListening { service, path: path.to_owned() }),
        Err(Errno::ENOTDIR) => Err(bad("part of the path is not a directory".into())),
        Err(Errno::EACCES | Errno::EPERM) => Err(ClientError::NotPermitted { service, path: path.to_owned() }),
        Err(Errno::EAGAIN) => Err(ClientError::Timeout { service, path: path.to_owned(), after: PATIENCE }),
        Err(errno) => Err(io(errno)),
    }
}

fn is_no_socket(path: &Path) -> bool {
    use std::os::unix::fs::FileTypeExt as _;
    std::fs::metadata(path).is_ok_and(|meta| !meta.file_type().is_socket())
}
