//! What the kernel may answer, sorted by how a caller reacts.

use std::io;

use nix::errno::Errno;

/// Shorthand for results of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// A kernel call failed. `object` always names what was acted upon, such as `link veth0` or `route 10.1.0.0/16`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The object to be made is there already (`EEXIST`).
    #[error("{object} exists already")]
    Exists {
        /// What was to be made.
        object: String,
    },
    /// The object is not there (`ENOENT`, `ESRCH`, `EADDRNOTAVAIL`).
    #[error("{object} does not exist")]
    NotFound {
        /// What was looked for.
        object: String,
    },
    /// A link that the call names is not there (`ENODEV`, `ENXIO`).
    #[error("no such network device, needed for {object}")]
    NoSuchLink {
        /// What was acted upon.
        object: String,
    },
    /// The process lacks the right, usually `CAP_NET_ADMIN` (`EPERM`, `EACCES`).
    #[error("no permission to change {object}: CAP_NET_ADMIN and CAP_SYS_ADMIN are needed")]
    Permission {
        /// What was acted upon.
        object: String,
    },
    /// The kernel refused for another reason.
    #[error("kernel refused {object}: {}{}", errno.desc(), extended(message))]
    Refused {
        /// What was acted upon.
        object: String,
        /// The kernel's error number.
        errno: Errno,
        /// The text of the extended acknowledgement, where the kernel gave one.
        message: Option<String>,
    },
    /// The caller's description cannot be expressed to the kernel.
    #[error("{object} is not valid: {reason}")]
    Invalid {
        /// What was described.
        object: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The kernel's answer could not be understood.
    #[error("unexpected answer from the kernel about {object}: {reason}")]
    Malformed {
        /// What was asked about.
        object: String,
        /// What did not fit.
        reason: String,
    },
    /// A file or socket operation failed.
    #[error("{object}: {source}")]
    Io {
        /// File or socket.
        object: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

fn extended(message: &Option<String>) -> String {
    message.as_ref().map(|text| format!(" ({text})")).unwrap_or_default()
}

impl Error {
    /// Sorts an error number.
    pub(crate) fn from_errno(object: impl Into<String>, errno: Errno, message: Option<String>) -> Self {
        let object = object.into();
        match errno {
            Errno::EEXIST => Self::Exists { object },
            Errno::ENOENT | Errno::ESRCH | Errno::EADDRNOTAVAIL => Self::NotFound { object },
            Errno::ENODEV | Errno::ENXIO => Self::NoSuchLink { object },
            Errno::EPERM | Errno::EACCES => Self::Permission { object },
            errno => Self::Refused { object, errno, message },
        }
    }

    /// Sorts an error of a file operation.
    pub(crate) fn from_io(object: impl Into<String>, source: io::Error) -> Self {
        let object = object.into();
        match source.kind() {
            io::ErrorKind::NotFound => Self::NotFound { object },
            io::ErrorKind::AlreadyExists => Self::Exists { object },
            io::ErrorKind::PermissionDenied => Self::Permission { object },
            _ => Self::Io { object, source },
        }
    }

    /// Whether the object acted upon, or the link it belongs to, was not there.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::NotFound { .. } | Self::NoSuchLink { .. })
    }

    /// Whether the object to be made was there already.
    pub fn is_exists(&self) -> bool {
        matches!(self, Self::Exists { .. })
    }

    /// The error number, where the kernel's refusal has no variant of its own.
    pub fn errno(&self) -> Option<Errno> {
        match self {
            Self::Refused { errno, .. } => Some(*errno),
            Self::Io { source, .. } => source.raw_os_error().map(Errno::from_raw),
            _ => None,
        }
    }
}

/// Turns "was not there" into success, for removals.
pub(crate) fn gone_is_fine(result: Result<()>) -> Result<()> {
    match result {
        Err(error) if error.is_not_found() => Ok(()),
        other => other,
    }
}

/// Turns "was there already" into success, for additions.
pub(crate) fn there_is_fine(result: Result<()>) -> Result<()> {
    match result {
        Err(error) if error.is_exists() => Ok(()),
        other => other,
    }
}
