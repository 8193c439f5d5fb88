//! What the tests of the whole program share: the server as a child process, and a client of raw bytes that
//! checks every reply against the rules of the protocol.
//!
//! The client blocks, with a limit on every wait, so that a broken server fails a test instead of hanging it.

// Each test program uses its own part of this.
#![allow(dead_code, unused_imports)]

mod client;
pub(crate) mod mount;
mod negotiation;
mod random;
mod server;
mod stream;
mod tools;

pub(crate) use client::{Answer, Client, NO_FLAGS, STYLES};
pub(crate) use negotiation::{Negotiation, go_data, meta_data};
pub(crate) use random::Random;
pub(crate) use server::{CONTROL_FOLDER, PROGRAM, Server, eventually, net, one_line, resident_bytes, text};
pub(crate) use stream::{LIMIT, Stream};
pub(crate) use tools::{Loop, lacks, refusal, run};
