//! Errors: those the protocol sends, and those that end a connection.

use crate::option::OptionCode;

/// An error number as the protocol sends it (section "Error values"). Nothing else may go on the wire.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, thiserror::Error)]
#[repr(u32)]
pub enum NbdError {
    /// `NBD_EPERM` (1).
    #[error("operation not permitted")]
    Perm = 1,
    /// `NBD_EIO` (5).
    #[error("input/output error")]
    Io = 5,
    /// `NBD_ENOMEM` (12).
    #[error("cannot allocate memory")]
    NoMem = 12,
    /// `NBD_EINVAL` (22).
    #[error("invalid argument")]
    Inval = 22,
    /// `NBD_ENOSPC` (28); quota and file size limits are told as this, too.
    #[error("no space left on device")]
    NoSpc = 28,
    /// `NBD_EOVERFLOW` (75).
    #[error("value too large")]
    Overflow = 75,
    /// `NBD_ENOTSUP` (95).
    #[error("operation not supported")]
    NotSup = 95,
    /// `NBD_ESHUTDOWN` (108).
    #[error("server is shutting down")]
    Shutdown = 108,
}

impl NbdError {
    /// The number on the wire.
    #[inline]
    pub const fn wire(self) -> u32 {
        match self {
            Self::Perm => 1,
            Self::Io => 5,
            Self::NoMem => 12,
            Self::Inval => 22,
            Self::NoSpc => 28,
            Self::Overflow => 75,
            Self::NotSup => 95,
            Self::Shutdown => 108,
        }
    }

    /// The error a number on the wire stands for; `None` for 0, which is success. A number the protocol does
    /// not list counts as `NBD_EINVAL`, as the document asks of clients.
    #[inline]
    pub const fn from_wire(number: u32) -> Option<Self> {
        Some(match number {
            0 => return None,
            1 => Self::Perm,
            5 => Self::Io,
            12 => Self::NoMem,
            28 => Self::NoSpc,
            75 => Self::Overflow,
            95 => Self::NotSup,
            108 => Self::Shutdown,
            _ => Self::Inval,
        })
    }
}

/// A message did not begin with the magic number expected there. The stream cannot be followed any further:
/// drop the connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("bad magic number {found:#x}")]
pub struct BadMagic {
    /// What stood there instead; 32-bit magics are widened.
    pub found: u64,
}

/// Why a message from a server cannot be used. Drop the connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BadReply {
    /// The message does not begin with a magic number of the negotiated style.
    #[error(transparent)]
    Magic(#[from] BadMagic),
    /// The payload is longer than the caller allows.
    #[error("a reply payload of {length} bytes, where at most {max} are expected")]
    TooLong {
        /// The length the header states, in bytes.
        length: u64,
        /// The longest accepted, in bytes.
        max: u64,
    },
    /// The payload does not have the layout its type demands, or a field has a value the protocol forbids.
    #[error("malformed reply chunk of type {kind:#x}")]
    Malformed {
        /// The chunk type on the wire.
        kind: u16,
    },
}

/// Why a handshake ended without transmission.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CloseReason {
    /// The client sent `NBD_OPT_ABORT`; the acknowledgement is in the output. Not an error.
    #[error("the client aborted the negotiation")]
    Abort,
    /// The client set flags that the greeting did not offer.
    #[error("unknown client flags {0:#x}")]
    ClientFlags(u32),
    /// An option did not begin with `IHAVEOPT`.
    #[error("an option begins with {0:#x} instead of the option magic")]
    OptionMagic(u64),
    /// More options than [`Limits::max_options`](crate::Limits::max_options).
    #[error("more than {0} options")]
    TooManyOptions(u32),
    /// Without fixed newstyle only `NBD_OPT_EXPORT_NAME` can be sent, since a refusal could not be told.
    #[error("{0:?} without fixed newstyle")]
    NotFixedNewstyle(OptionCode),
    /// `NBD_OPT_EXPORT_NAME` with a name that is too long, not UTF-8 or holds a NUL.
    #[error("malformed export name")]
    BadExportName,
    /// `NBD_OPT_EXPORT_NAME` named no export that exists. The text is the name.
    #[error("unknown export {0:?}")]
    UnknownExport(String),
    /// `NBD_OPT_EXPORT_NAME` without TLS, where TLS is required.
    #[error("NBD_OPT_EXPORT_NAME without TLS")]
    TlsRequired,
    /// `NBD_OPT_EXPORT_NAME` after extended headers, which forbid it.
    #[error("NBD_OPT_EXPORT_NAME after extended headers")]
    ExtendedExportName,
    /// `NBD_OPT_EXPORT_NAME` while the server shuts down.
    #[error("the server is shutting down")]
    ShuttingDown,
    /// The handshake was fed after it had ended in transmission: an error of the caller.
    #[error("the handshake is over")]
    Finished,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_match_the_document_row_by_row() {
        let rows = [
            (1, NbdError::Perm),
            (5, NbdError::Io),
            (12, NbdError::NoMem),
            (22, NbdError::Inval),
            (28, NbdError::NoSpc),
            (75, NbdError::Overflow),
            (95, NbdError::NotSup),
            (108, NbdError::Shutdown),
        ];
        for (number, error) in rows {
            assert_eq!(error.wire(), number);
            assert_eq!(NbdError::from_wire(number), Some(error));
        }
        assert_eq!(NbdError::from_wire(0), None);
        assert_eq!(NbdError::from_wire(122), Some(NbdError::Inval));
    }
}
