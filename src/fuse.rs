//! The FUSE door: an export as one regular file that any program, losetup or qemu can open, without ublk and without
//! root.
//!
//! ```text
//!   program ──> kernel ──> /dev/fuse ──┬─ thread 0 ─┬─ fast path inline ─────────────> answer
//!                                      └─ thread n ─┴─ the rest, with its answer ──> worker ──> answer
//! ```
//!
//! | file | what it has |
//! |---|---|
//! | `door` | the door's life: open, serve, unmount, drain |
//! | `point` | FILE: found or made, cleared of a dead mount, put back at the end |
//! | `mount`, `helper` | mounting by ourselves, or through fusermount3 |
//! | `mounts` | what is mounted where |
//! | `users` | who has FILE open |
//! | `file`, `slow` | the requests: what a FUSE thread answers, and what a worker does |
//! | `length` | keeps requests and a shrinking file apart |
//! | `attributes` | what stat(2) shows |
//! | `translate` | fallocate modes and errors, each in one table |
//!
//! The file is opened with direct I/O, always: other doors' writes are seen, and nothing is kept in a second cache.

mod attributes;
mod door;
mod file;
mod helper;
mod length;
mod mount;
mod mounts;
mod point;
mod slow;
mod translate;
mod users;

pub(crate) use door::{FuseDoor, note, shown};
pub(crate) use mount::{Unmounted, unmount};
pub(crate) use mounts::Mounted;
pub(crate) use point::{Answer, Made, ask, clear_dead, kind, look, resolve};
pub(crate) use users::describe as describe_users;
