//! Container volumes as storage, on this host's kernel: resize, snapshots and copies, while they are in use too, and what
//! is left when a process is killed in the middle. Needs root, /dev/fuse and loop devices.

// Clippy's exception for tests does not reach their helpers.
#![allow(clippy::unwrap_used)]

mod support;

#[path = "volume_storage/copies.rs"]
mod copies;
#[path = "volume_storage/crash.rs"]
mod crash;
#[path = "volume_storage/frozen.rs"]
mod frozen;
#[path = "volume_storage/pool.rs"]
mod pool;
#[path = "volume_storage/resize.rs"]
mod resize;
