//! Why something cannot be done with a volume: a kind that callers match on, and one line for a person.

use std::path::PathBuf;

use super::Name;

/// What the engine's functions give.
pub(crate) type Result<T> = std::result::Result<T, Error>;

/// A refusal or a failure. Its text is one line that names the volume and the way out.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// There is no such volume.
    #[error("{}: no volume is named `{name}` there", pool.display())]
    NotFound {
        /// The one that was asked for.
        name: Name,
        /// Where.
        pool: PathBuf,
    },
    /// A volume has no such snapshot.
    #[error("{0}")]
    NoSnapshot(String),
    /// There is one already, and it is another.
    #[error("{0}")]
    Exists(String),
    /// Somebody uses it.
    #[error("{0}")]
    InUse(String),
    /// What was asked for makes no sense.
    #[error("{0}")]
    Usage(String),
    /// It makes sense, and is not to be had: there is not so much, or not of that kind.
    #[error("{0}")]
    Refused(String),
    /// What is on the disk is not what it should be.
    #[error("{0}")]
    Broken(String),
    /// It has ended as was asked, but its last flush failed: what was written since the last one may be lost.
    #[error("{0}")]
    Lost(String),
    /// All else; the operating system's errors among them.
    #[error("{0:#}")]
    Other(anyhow::Error),
}

impl From<anyhow::Error> for Error {
    fn from(error: anyhow::Error) -> Self {
        Error::Other(error)
    }
}
