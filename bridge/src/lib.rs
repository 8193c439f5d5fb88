//! The shared request pipeline: every door (NBD, later ublk and FUSE) turns what its peer asks into a
//! [`Request`], and [`Export::execute`] carries it through the layers to a backend.
//!
//! ```text
//!   door ──Request──> Export ──> layer ──> layer ──> backend
//!          (validate, account,    (throttle, ...)     (file, memory, null)
//!           answer exactly once)
//! ```
//!
//! This crate knows no NBD, ublk or FUSE, no command line, and no name of a door.

// A library prints nothing: a server may have no stdout or stderr that can be written to.
#![warn(clippy::print_stdout, clippy::print_stderr)]

pub mod admission;
pub mod backend;
mod boot;
pub mod buffer;
pub mod error;
pub mod export;
pub mod extent;
pub mod geometry;
pub mod layer;
pub mod partition;
mod passes;
pub mod random;
mod ranges;
pub mod request;
pub mod stats;
mod sys;
mod transfer;
mod uring;
pub mod worker;
pub mod zero;

pub use admission::{Account, Budget, Charge};
pub use backend::{Backend, FileRange, LocalFuture, Piped, RangeOrHole};
pub use buffer::Buffer;
pub use error::{Error, ErrorKind, OpenError, Result};
pub use export::{Data, Export, Reply};
pub use extent::{Depth, Extent, ExtentKind};
pub use geometry::{Capabilities, Geometry};
pub use request::{Flags, Operation, Request};
