//! Container volumes by hand, with real file systems on this host: made, mounted, limited, checked, removed; what is
//! refused, and what is left of a crash. Needs root, /dev/fuse and loop devices.

// Clippy's exception for tests does not reach their helpers.
#![allow(clippy::unwrap_used)]

mod support;

#[path = "volume/crash.rs"]
mod crash;
#[path = "volume/ends.rs"]
mod ends;
#[path = "volume/hostile.rs"]
mod hostile;
#[path = "containers/http.rs"]
mod http;
#[path = "volume/life.rs"]
mod life;
#[path = "volume/pools.rs"]
mod pools;
#[path = "volume/refusals.rs"]
mod refusals;
#[path = "volume/remote.rs"]
mod remote;
#[path = "volume/stopped.rs"]
mod stopped;
#[path = "volume/units.rs"]
mod units;
#[path = "volume/world.rs"]
mod world;
