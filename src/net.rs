//! The NBD door: serves exports to NBD clients over TCP and Unix sockets.
//!
//! ```text
//!  listener ──socket──> session (handshake) ──> reader ──try──> Export    answers go to the worker's arena,
//!                                                │  └──slow task──> Export  one send for the whole batch
//!                                                v
//!                                              writer (only what the socket or the storage made wait)
//! ```
//!
//! A connection lives on one worker. Its reader and its writer own the socket at the same time; whoever sends,
//! sends alone; between them any number of requests is in flight, up to a cap that stops the reader.
//! The bytes on the wire are `nbd-proto`'s business, what a request does is `bridge`'s.

mod arena;
mod clients;
mod connection;
mod directory;
mod door;
mod gather;
mod input;
mod late;
mod linger;
mod listener;
mod output;
mod pass;
mod read;
mod reader;
mod server;
mod session;
mod slow;
mod socket;
mod splice;
mod translate;
mod write;

pub(crate) use door::NetDoor;
pub(crate) use server::Settings;
