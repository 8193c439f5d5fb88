//! What the handshake asks of the server, and what it hands over at the end.

use crate::chunk::ReplyStyle;
use crate::flags::{ClientFlags, TransmissionFlags};

/// An export as it is told to clients.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ExportInfo {
    /// Size in bytes.
    pub size: u64,
    /// What the export can do. Leave out `SEND_DF`: the handshake adds it when replies are chunks, and clears
    /// what may not be advertised ([`TransmissionFlags::advertised`]).
    pub flags: TransmissionFlags,
    /// For a human (`NBD_INFO_DESCRIPTION`); cut to 4096 bytes when sent.
    pub description: Option<String>,
    /// Smallest unit of offset and length, in bytes: a power of two, at most 65536 (section "Size constraints").
    pub min_block: u32,
    /// Efficient unit, in bytes: a power of two, at least `min_block` and at least 512.
    pub preferred_block: u32,
    /// Largest payload of one request, in bytes: at least `preferred_block`, should be at least 32 MiB.
    pub max_payload: u32,
}

impl ExportInfo {
    /// Whether the three sizes keep the rules of section "Size constraints". A server checks this when an
    /// export is defined; the handshake only asserts it in debug builds.
    pub fn block_sizes_are_legal(&self) -> bool {
        self.min_block.is_power_of_two()
            && self.min_block <= 1 << 16
            && self.preferred_block.is_power_of_two()
            && self.preferred_block >= self.min_block.max(512)
            && self.max_payload >= self.preferred_block
    }
}

/// The exports a handshake may name. Asked anew for every option, so the answers may change meanwhile.
///
/// Nothing here should open a backend: a stranger reaches these before TLS, and before choosing an export
/// (CVE-2019-14850).
pub trait Directory {
    /// Calls `each` with every name, and its description if it has one. Names that are no protocol strings
    /// (over 4096 bytes, or with a NUL) are left out of the list.
    fn list(&self, each: &mut dyn FnMut(&str, Option<&str>));

    /// The canonical name and the description of the export called `name`, where `""` is the default export;
    /// `None` if there is no such export.
    fn find(&self, name: &str) -> Option<(String, ExportInfo)>;

    /// The metadata contexts of an export, by its canonical name: e.g. `["base:allocation"]`. The position in
    /// the list is the context's id on the wire.
    fn contexts(&self, name: &str) -> Vec<String>;
}

/// A metadata context that the client selected.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MetaContext {
    /// The id in every block status chunk; this crate's server takes the position in [`Directory::contexts`].
    pub id: u32,
    /// Namespace, colon, leaf name.
    pub name: String,
}

/// The outcome of a handshake, for either side.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Negotiated {
    /// Canonical name of the export; to a client, the name it asked for if the server did not tell another.
    pub export: String,
    /// The export as it was told to the client; `flags` are the ones sent.
    pub info: ExportInfo,
    /// How to answer, and through [`ReplyStyle::extended`] how requests look.
    pub style: ReplyStyle,
    /// The contexts for `NBD_CMD_BLOCK_STATUS`, each of which gets a chunk; without any it is `NBD_EINVAL`.
    pub contexts: Vec<MetaContext>,
    /// The flags the client sent after the greeting.
    pub client_flags: ClientFlags,
    /// The client asked for `NBD_INFO_BLOCK_SIZE` and so promised to keep to it. To a client: the server told
    /// its block sizes; those in `info` are assumed otherwise.
    pub honours_block_size: bool,
    /// The options came over TLS.
    pub encrypted: bool,
}
