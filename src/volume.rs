//! The volume engine: disks with a file system of their own for containers, kept in a pool. Used by hand
//! (`nbdbridge volume`), by the plugin daemon and whoever else has containers to serve.
//!
//! ```text
//!   command (by hand), the plugin daemon
//!      │ names, options, holders
//!   Pool ── create, remove, mount, limit, fsck, status ──┬── filesystem: mkfs, fsck, probe
//!      │ locks a Volume, and its Record (volume.json)    ├── plane: `nbdbridge attach`, a process for each volume in use
//!      │                                                 └── runtime: what is attached and mounted now (/run)
//!   POOL/<name>/disk.raw|disk.qcow2, volume.json, snapshots/
//! ```
//!
//! - A volume is a folder, and moves to another host by copying it: what is mounted is mounted elsewhere, below /run.
//! - What has been answered is durable. A step that was cut short is undone or finished by whoever opens the pool next.
//! - A file system is made once, in `create`, and never because something could not be read.
//! - Functions here block, and are called from threads that may.

mod allowed;
mod bounded;
mod capture;
mod clone;
pub(crate) mod command;
mod copy;
mod create;
mod disk;
mod docker;
mod error;
mod filesystem;
pub(crate) mod freeze;
mod grow;
mod holders;
mod limit;
mod mount;
mod mount_at;
mod name;
mod options;
mod plane;
mod pool;
mod private;
mod progress;
mod record;
mod recover;
mod remove;
mod resize;
mod runtime;
mod set;
mod snapshot;
mod space;
mod status;
mod superblock;

pub(crate) use create::Created;
pub(crate) use docker::{DaemonArgs, run as run_daemon};
pub(crate) use error::{Error, Result};
pub(crate) use filesystem::Verdict;
pub(crate) use name::{Name, Origin};
pub(crate) use options::{DoorChoice, FsKind, Options, Provision};
pub(crate) use pool::{Pool, Volume};
pub(crate) use progress::Progress;
pub(crate) use progress::Silent;
pub(crate) use record::{Pending, Record};
pub(crate) use resize::Resized;
pub(crate) use snapshot::{Snapshot, Taken};
pub(crate) use space::{Privilege, Settings, Share, Space};
pub(crate) use status::{Health, Status};
