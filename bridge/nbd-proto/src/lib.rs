//! The NBD protocol without I/O: bytes in, values out; values in, bytes out.
//!
//! What is here:
//!
//! * [`Request`] and the reply encoders (`put_*`), for the transmission phase, in all three [`ReplyStyle`]s;
//! * [`Reply`], the client's view of the same bytes;
//! * [`Handshake`], the server side of the fixed newstyle negotiation, fed with any cut of the client's bytes;
//! * [`ClientHandshake`], the client side of it, and below it [`put_option`] and [`OptionReply`];
//! * [`uri`], the addresses of exports.
//!
//! ```text
//!   socket bytes --> Handshake::advance --> Step::Transmission(Negotiated)
//!                         |    ^                      |
//!                     Directory (names, sizes)        v
//!                                   Request::parse ... put_data_header, put_done, put_error
//! ```
//!
//! What is deliberately not here: sockets, files, clocks, tasks, TLS itself, and the meaning of a request
//! (range, alignment and read-only checks belong to whoever executes it). Deadlines and connection counts are
//! the caller's too: this crate bounds memory and output, not time.
//!
//! The source for every layout is the [protocol document][spec]; extended headers follow the document's
//! `extension-ext-header` branch. All integers on the wire are big-endian.
//!
//! [spec]: https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md

// A library prints nothing: a server may have no stdout or stderr that can be written to.
#![warn(clippy::print_stdout, clippy::print_stderr)]

mod chunk;
mod client;
mod consts;
mod error;
mod export;
mod flags;
mod handshake;
mod option;
mod parse;
mod reply;
mod request;
#[cfg(test)]
mod testing;
pub mod uri;
mod wire;

pub use chunk::{ChunkHeader, ChunkType, ReplyStyle};
pub use client::{ClientError, ClientHandshake, ClientLimits, ClientStep, Goal, Listed, Wants};
pub use consts::*;
pub use error::{BadMagic, BadReply, CloseReason, NbdError};
pub use export::{Directory, ExportInfo, MetaContext, Negotiated};
pub use flags::{ClientFlags, CommandFlags, HandshakeFlags, StateFlags, TransmissionFlags};
pub use handshake::{Handshake, Limits, Step, TlsPolicy};
pub use option::{InfoType, OptReply, OptionCode, OptionReply, put_option};
pub use parse::{ChunkBody, Extents, Reply, ReplyHeader};
pub use reply::{put_block_status, put_data_header, put_done, put_error, put_hole, simple_reply};
pub use request::{Command, Request};
