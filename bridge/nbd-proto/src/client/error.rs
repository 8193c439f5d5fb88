//! Why a client's handshake failed. The texts are for a person: each names what the server did.

use crate::consts::MAX_NAME_BYTES;
use crate::error::BadReply;
use crate::option::{OptReply, OptionCode};

/// Why a server cannot be used, or not as it was asked. Close the connection.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClientError {
    /// The greeting is not NBD's. The number is what stands where a magic number belongs.
    #[error("no NBD server: it begins with {0:#018x}")]
    NotNbd(u64),
    /// An oldstyle server: it has one export and no options.
    #[error("the server speaks the oldstyle handshake, which is not supported")]
    Oldstyle,
    /// The server knows nothing but `NBD_OPT_EXPORT_NAME`, and something else was wanted.
    #[error("the server is too old (no fixed newstyle handshake) to {0}")]
    NotFixedNewstyle(&'static str),
    /// The name that was to be asked for is no protocol string.
    #[error("an export's name has at most {MAX_NAME_BYTES} bytes and no NUL")]
    BadName,
    /// `NBD_REP_ERR_TLS_REQD`, and TLS was not wanted.
    #[error("the server requires TLS")]
    TlsRequired,
    /// TLS was wanted, and `NBD_OPT_STARTTLS` refused. The text is the server's, or empty.
    #[error("the server refuses TLS{}", colon(.0))]
    TlsRefused(String),
    /// Plain bytes between the acknowledgement of `NBD_OPT_STARTTLS` and TLS (CVE-2021-3716).
    #[error("the server, or somebody between, sent plain bytes where TLS begins")]
    PlainBytes,
    /// `NBD_REP_ERR_UNKNOWN`; or the server hung up on `NBD_OPT_EXPORT_NAME`, which cannot say more.
    #[error("the server has no export called {name:?}{}", colon(.message))]
    UnknownExport {
        /// The name that was asked for.
        name: String,
        /// The server's text, or empty.
        message: String,
    },
    /// `NBD_REP_ERR_UNSUP` for something that cannot be done without.
    #[error("the server does not know {0:?}")]
    Unsupported(OptionCode),
    /// Any other refusal.
    #[error("the server refuses {option:?} ({kind:?}){}", colon(.message))]
    Refused {
        /// What was asked.
        option: OptionCode,
        /// How it was refused; always an error.
        kind: OptReply,
        /// The server's text, or empty.
        message: String,
    },
    /// A message that breaks the protocol.
    #[error("the server's answer to {option:?} is malformed: {what}")]
    Malformed {
        /// What was asked.
        option: OptionCode,
        /// What is wrong with the answer.
        what: &'static str,
    },
    /// The frame of an option reply is wrong.
    #[error("the server's answer to an option cannot be read: {0}")]
    Frame(#[from] BadReply),
    /// More than [`ClientLimits`](super::ClientLimits) allow.
    #[error("the server's answer to {0:?} does not end")]
    TooMuch(OptionCode),
    /// A size or block sizes that no client can work with.
    #[error(
        "the export's sizes make no sense: {size} bytes in blocks of {min_block}, {preferred_block} \
             preferred, payload up to {max_payload}"
    )]
    BadSizes {
        /// Size of the export in bytes.
        size: u64,
        /// Minimum block in bytes.
        min_block: u32,
        /// Preferred block in bytes.
        preferred_block: u32,
        /// Largest payload in bytes.
        max_payload: u32,
    },
    /// The connection ended before the handshake.
    #[error("the server closed the connection {0}")]
    HungUp(&'static str),
    /// The export was not asked about ([`ClientLimits::max_described`](super::ClientLimits::max_described)).
    #[error("the server was not asked about it")]
    NotAsked,
    /// The handshake was fed after its end: an error of the caller.
    #[error("the handshake is over")]
    Finished,
}

impl ClientError {
    /// What an error reply means.
    pub(super) fn refused(option: OptionCode, kind: OptReply, data: &[u8], name: &str) -> Self {
        let message = printable(data);
        match kind {
            OptReply::ErrTlsReqd => Self::TlsRequired,
            OptReply::ErrUnsup => Self::Unsupported(option),
            OptReply::ErrUnknown => Self::UnknownExport { name: name.to_owned(), message },
            _ => Self::Refused { option, kind, message },
        }
    }
}

/// The server's text, harmless to a terminal. It may break the rules for strings: it is only shown.
pub(super) fn printable(data: &[u8]) -> String {
    let data = &data[..data.len().min(MAX_NAME_BYTES)];
    String::from_utf8_lossy(data).chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

fn colon(text: &str) -> String {
    if text.is_empty() { String::new() } else { format!(": {text}") }
}
