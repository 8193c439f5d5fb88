//! What a client wants of a server, how much it puts up with, and what it gets.

use super::ClientError;
use crate::chunk::ReplyStyle;
use crate::export::{ExportInfo, Negotiated};

/// What a client wants of a server.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Wants {
    /// What the handshake is for.
    pub goal: Goal,
    /// Name of the export; `""` is the default one. Not used by [`Goal::List`].
    pub export: String,
    /// `NBD_OPT_STARTTLS` before anything else, and no going on without.
    pub tls: bool,
    /// The best style to ask for. The server may settle for less: extended headers fall back to structured
    /// replies, those to simple ones.
    pub style: ReplyStyle,
    /// Metadata contexts to select, by their whole names: e.g. `base:allocation`. What the server does not have
    /// is left out, and without structured replies it has none.
    pub contexts: Vec<String>,
    /// How much the server may say.
    pub limits: ClientLimits,
}

impl Wants {
    /// The export `name` with everything a server may offer, but neither TLS nor contexts.
    pub fn export(name: &str) -> Self {
        Self {
            goal: Goal::Transmission,
            export: name.to_owned(),
            tls: false,
            style: ReplyStyle::Extended,
            contexts: Vec::new(),
            limits: ClientLimits::default(),
        }
    }
}

/// What a handshake is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Goal {
    /// To use the export: `NBD_OPT_GO`, or `NBD_OPT_EXPORT_NAME` with servers that do not know it.
    Transmission,
    /// To hear about the export, and leave: `NBD_OPT_INFO`.
    Info,
    /// To hear which exports there are, and about each, and leave: `NBD_OPT_LIST`.
    List,
}

/// How much a server may say. Time is the caller's to limit.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ClientLimits {
    /// Replies to one option. Default: 65536.
    pub max_replies: u32,
    /// Bytes of names and descriptions kept. Default: 8 MiB.
    pub max_kept_bytes: usize,
    /// How many of the listed exports are asked about on the same connection. nbdkit hangs up after 32 options,
    /// and an export takes two; so for more, connect again with [`Goal::Info`]. Default: 12.
    pub max_described: usize,
}

impl Default for ClientLimits {
    fn default() -> Self {
        Self { max_replies: 1 << 16, max_kept_bytes: 8 << 20, max_described: 12 }
    }
}

/// What the caller does after [`ClientHandshake::advance`](super::ClientHandshake::advance). In every case the
/// output is sent first.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ClientStep {
    /// Read more from the server.
    NeedMore,
    /// Start TLS, then call [`ClientHandshake::tls_started`](super::ClientHandshake::tls_started).
    StartTls,
    /// The transmission phase begins. Input that was not consumed belongs to it.
    Transmission(Negotiated),
    /// What was asked by [`Goal::Info`] (one export) or [`Goal::List`]. The output says goodbye: close the
    /// connection after it.
    Listed(Vec<Listed>),
}

/// An export a client heard about.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Listed {
    /// As it was listed or asked for; the canonical name if the server told it.
    pub name: String,
    /// For a human.
    pub description: Option<String>,
    /// What `NBD_OPT_INFO` told; [`ClientError::Unsupported`] if the server does not know the option, and
    /// [`ClientError::NotAsked`] if it was not asked ([`ClientLimits::max_described`]).
    pub info: Result<ExportInfo, ClientError>,
    /// The server told its block sizes; those in `info` are assumed otherwise.
    pub tells_block_sizes: bool,
    /// The metadata contexts it offers, as far as the server told.
    pub contexts: Vec<String>,
}
