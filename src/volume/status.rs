//! What a person or an engine is told of a volume.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Serialize;

use super::options::DiskFormat;
use super::{FsKind, Name, Options, Origin};

/// A volume, as `inspect` shows it and Docker's `Get`.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Status {
    pub(crate) name: Name,
    pub(crate) health: Health,
    /// Seconds since 1970.
    pub(crate) created: u64,
    /// In bytes.
    pub(crate) size: u64,
    /// What its disk takes of the pool, in bytes.
    pub(crate) allocated: u64,
    pub(crate) fs: FsKind,
    /// None where the disk is a remote one.
    pub(crate) format: Option<DiskFormat>,
    /// Of the mounted file system.
    pub(crate) usage: Option<Usage>,
    /// The door it is served through now; None while it is not in use.
    pub(crate) door: Option<String>,
    /// What becomes of it when its data plane dies.
    pub(crate) guarantee: Option<String>,
    pub(crate) device: Option<PathBuf>,
    pub(crate) mounted: Option<PathBuf>,
    /// Who uses it, and how often each asked.
    pub(crate) holders: BTreeMap<String, u32>,
    pub(crate) limits: BTreeMap<String, u64>,
    pub(crate) parent: Option<Origin>,
    /// As it was made.
    pub(crate) options: Options,
}

/// Bytes of a mounted file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Usage {
    pub(crate) total: u64,
    pub(crate) used: u64,
    pub(crate) available: u64,
}

/// Whether a volume is well.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Health {
    Ok,
    /// What is wrong, and the way out.
    Bad(String),
}
