//! The pipeline's errors: [`Error`] for a request that failed, [`OpenError`] for a source that could not be
//! opened. Which wire errno a kind becomes is each door's own table.

use std::borrow::Cow;
use std::fmt;
use std::path::{Path, PathBuf};

use rustix::io::Errno;

/// The result of one request.
pub type Result<T> = std::result::Result<T, Error>;

/// What went wrong with a request, as far as a caller needs to act on it.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// The request makes no sense: a range past the end (reads), a flag that does not apply (EINVAL).
    InvalidInput,
    /// No room: a full disk, a quota, or a write past the end (ENOSPC).
    NoSpace,
    /// The export does not allow changes (EPERM).
    ReadOnly,
    /// This source cannot do that, or not fast (ENOTSUP).
    NotSupported,
    /// The answer would not fit (EOVERFLOW).
    Overflow,
    /// No memory (ENOMEM).
    NoMemory,
    /// The server is going away (ESHUTDOWN).
    ShuttingDown,
    /// Everything else: the storage failed (EIO).
    Io,
}

/// A request's failure: a kind to act on, the operating system's own errno where there was one, and a few
/// words for the log.
#[derive(Clone, Debug)]
pub struct Error {
    kind: ErrorKind,
    errno: Option<i32>,
    context: Cow<'static, str>,
}

impl Error {
    /// An error of ours, with no errno behind it.
    pub fn new(kind: ErrorKind, context: impl Into<Cow<'static, str>>) -> Self {
        Error { kind, errno: None, context: context.into() }
    }

    /// An error of the operating system's, which keeps its errno.
    pub fn from_errno(errno: Errno, context: impl Into<Cow<'static, str>>) -> Self {
        let kind = match errno {
            Errno::INVAL => ErrorKind::InvalidInput,
            Errno::NOSPC | Errno::DQUOT | Errno::FBIG => ErrorKind::NoSpace,
            Errno::PERM | Errno::ROFS => ErrorKind::ReadOnly,
            Errno::OPNOTSUPP | Errno::NOTTY => ErrorKind::NotSupported,
            Errno::NOMEM => ErrorKind::NoMemory,
            _ => ErrorKind::Io,
        };
        Error { kind, errno: Some(errno.raw_os_error()), context: context.into() }
    }

    /// What a caller acts on.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// The operating system's errno, where the failure came from it.
    pub fn errno(&self) -> Option<i32> {
        self.errno
    }

    /// The bounded words for a log or a peer.
    pub fn context(&self) -> &str {
        &self.context
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.context)?;
        match self.errno {
            Some(errno) => write!(f, ": {}", std::io::Error::from_raw_os_error(errno)),
            None => Ok(()),
        }
    }
}

impl std::error::Error for Error {}

/// What is missing there, and how to get one where that is easy.
fn missing(path: &Path) -> String {
    if path.starts_with("/dev") && !path.starts_with("/dev/shm") {
        return "device".to_owned();
    }
    format!("file (`nbdbridge create {} SIZE` makes one)", path.display())
}

/// A source that could not be opened. Each text is one line that names the thing and the way out.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The path leads nowhere.
    #[error("{}: no such {}", .0.display(), missing(.0))]
    NotFound(PathBuf),
    /// The path is a directory, a pipe or a character device.
    #[error("{}: is {what}, not a disk image or block device", .path.display())]
    NotADisk {
        /// The path as given.
        path: PathBuf,
        /// What it is, with its article.
        what: &'static str,
    },
    /// The file's mode does not let us in.
    #[error("{}: no permission to open it {how}{hint}", .path.display())]
    Permission {
        /// The path as given.
        path: PathBuf,
        /// "for writing" or "for reading".
        how: &'static str,
        /// The way out, with a leading blank, or nothing.
        hint: &'static str,
    },
    /// Another process has the image locked.
    #[error("{}: in use by another process ({lock} lock refused); stop it, or serve with {way_out}", .path.display())]
    Locked {
        /// The path as given.
        path: PathBuf,
        /// The name of the permission that was refused, as qemu spells it.
        lock: &'static str,
        /// What to type instead.
        way_out: &'static str,
    },
    /// This process has the image open, in a way that does not go together with this one.
    #[error("{}: this process has it open already; the same file cannot be used twice where one use changes it", .0.display())]
    Twice(PathBuf),
    /// The file to be created is there already.
    #[error("{}: exists already; remove it first, or choose another name", .0.display())]
    Exists(PathBuf),
    /// A setting that this source cannot honour.
    #[error("{}: {reason}", .path.display())]
    Unsupported {
        /// The path as given.
        path: PathBuf,
        /// What is not possible, and the way out.
        reason: String,
    },
    /// A remote export that cannot be had.
    #[error("{uri}: {reason}")]
    Remote {
        /// Its address.
        uri: String,
        /// What is wrong with it, or with the way there.
        reason: String,
    },
    /// Anything else the operating system said. Its words are part of the text, and no source beside it.
    #[error("{}: {action}: {error}", .path.display())]
    Os {
        /// The path as given.
        path: PathBuf,
        /// What was tried, as in "cannot open".
        action: &'static str,
        /// The operating system's answer.
        error: std::io::Error,
    },
}
