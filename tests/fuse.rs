//! The FUSE file and what stands upon it, on this host's kernel: data, space, errors, life and end, and the programs that
//! people use on disk files. Needs root and /dev/fuse.

// Clippy's exception for tests does not reach their helpers.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod support;

#[path = "fuse/attach.rs"]
mod attach;
#[path = "fuse/data.rs"]
mod data;
#[path = "fuse/grow.rs"]
mod grow;
#[path = "fuse/killed.rs"]
mod killed;
#[path = "fuse/last_flush.rs"]
mod last_flush;
#[path = "fuse/life.rs"]
mod life;
#[path = "fuse/outside.rs"]
mod outside;
#[path = "fuse/programs.rs"]
mod programs;
#[path = "fuse/refusals.rs"]
mod refusals;
