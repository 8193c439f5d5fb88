//! What bounds a handshake, and what it asks its caller to do.

use crate::error::CloseReason;
use crate::export::Negotiated;

/// How much a stranger may ask for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// Options in one handshake; one more closes the connection. Default: 1024.
    pub max_options: u32,
    /// Bytes of data of one option; more is skipped and answered `NBD_REP_ERR_TOO_BIG`. Default: 64 KiB. It
    /// should have room for a name and some queries of 4096 bytes each.
    pub max_option_bytes: u32,
    /// Once the output has this many bytes, no further option is answered before they are sent. Default:
    /// 64 KiB.
    pub max_output_bytes: usize,
}

/// Options that a client asks for each export that was listed: qemu-nbd has two, nbdinfo up to four.
const OPTIONS_FOR_EACH_EXPORT: u32 = 8;

impl Limits {
    /// Returns the limits of a server with so many exports: clients that list them (`qemu-nbd --list`, `nbdinfo --list`)
    /// ask about each one in the handshake that listed them.
    #[must_use]
    pub fn for_exports(self, exports: usize) -> Self {
        let more = u32::try_from(exports).unwrap_or(u32::MAX).saturating_mul(OPTIONS_FOR_EACH_EXPORT);
        Limits { max_options: self.max_options.saturating_add(more), ..self }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self { max_options: 1024, max_option_bytes: 64 << 10, max_output_bytes: 64 << 10 }
    }
}

/// Whether connections may, or must, use TLS (section "TLS support").
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum TlsPolicy {
    /// NOTLS: `NBD_OPT_STARTTLS` is refused with `NBD_REP_ERR_POLICY`.
    #[default]
    Disabled,
    /// SELECTIVETLS, with no export for which TLS is mandatory.
    Optional,
    /// FORCEDTLS: nothing but `NBD_OPT_STARTTLS` and `NBD_OPT_ABORT` before TLS.
    Required,
}

/// What the caller does after [`Handshake::advance`](crate::Handshake::advance). In every case the output is
/// sent first.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Step {
    /// Read more from the client.
    NeedMore,
    /// Send the output before calling again with the rest of the input: it has reached
    /// [`Limits::max_output_bytes`].
    Flush,
    /// The transmission phase begins. Input that was not consumed belongs to it.
    Transmission(Negotiated),
    /// Start TLS, then call [`Handshake::tls_started`](crate::Handshake::tls_started). Plaintext already
    /// received, here and in any buffer of the caller, must be thrown away (CVE-2021-3716).
    StartTls,
    /// Close the connection.
    Close(CloseReason),
}
