//! What a person or an engine is told of a volume.

use std::collections::BTreeMap;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::options::DiskFormat;
use super::plane::{Life, Plane};
use super::runtime::State;
use super::{FsKind, Name, Options, Origin, Pool, Record, Result, Snapshot, bounded};
use crate::beneath::Folder;
use crate::os_text;

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
    pub(crate) door: Option<&'static str>,
    /// What becomes of it when its data plane dies.
    pub(crate) guarantee: Option<&'static str>,
    /// Why writes that were answered and not flushed do not survive a crash of its data plane; None where they do.
    pub(crate) loss_after_crash: Option<String>,
    pub(crate) device: Option<PathBuf>,
    #[serde(serialize_with = "os_text::option::serialize")]
    pub(crate) mounted: Option<PathBuf>,
    /// Who uses it, and how often each asked.
    pub(crate) holders: BTreeMap<String, u32>,
    pub(crate) limits: BTreeMap<String, u64>,
    pub(crate) parent: Option<Origin>,
    /// The oldest first.
    pub(crate) snapshots: Vec<Snapshot>,
    /// As it was made.
    pub(crate) options: Options,
}

impl Pool {
    /// What is known of a volume. Takes no locks.
    ///
    /// # Errors
    /// Not found, broken.
    pub(crate) fn status(&self, name: &Name) -> Result<Status> {
        let folder = self.folder_of(name)?;
        let record = Record::read(&folder, name)?;
        let state = self.state(name)?;
        let plane = state.plane.as_ref();
        let mounted = state.mounted.clone().filter(|path| state.is_mounted(record.fs, path));
        let health = match lost_disk(&record, &folder) {
            Some(line) => Health::Bad(line),
            None => health(name, &record, &state, mounted.as_deref()),
        };
        let loss_after_crash = plane.and_then(Plane::loss_after_crash);
        let of_fs = mounted.as_deref().filter(|_| record.fs != FsKind::None && health.is_served());
        Ok(Status {
            name: name.clone(),
            created: record.created,
            size: record.size,
            allocated: record.disk_name().map_or(0, |disk| allocated(&folder, disk)),
            fs: record.fs,
            format: record.format,
            usage: of_fs.and_then(usage),
            door: plane.map(|plane| plane.door()),
            guarantee: plane.map(|plane| plane.guarantee(loss_after_crash.is_some())),
            loss_after_crash,
            device: plane.map(|plane| plane.device.clone()),
            mounted,
            holders: state.holders.clone(),
            limits: record.limits.settings().into_iter().collect(),
            parent: record.parent,
            snapshots: self.snapshots(name)?,
            options: record.options,
            health,
        })
    }
}

impl Health {
    /// A look at its files does not wait for ever.
    fn is_served(&self) -> bool {
        matches!(self, Health::Ok)
    }
}

/// A line for a volume whose disk is not what was made; None for one that is well, and for a remote disk.
fn lost_disk(record: &Record, folder: &Folder) -> Option<String> {
    let name = record.disk_name()?;
    let shown = folder.path().join(name);
    let shown = shown.display();
    let length = match folder.file(name).and_then(|disk| disk.metadata()) {
        Ok(found) => found.len(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Some(format!("its disk {shown} is gone; restore it, or remove the volume with --force"));
        }
        Err(error) => return Some(format!("its disk {shown} cannot be looked at: {error}")),
    };
    let is_whole =
        record.format != Some(DiskFormat::Raw) || record.pending.is_some() || length >= record.size;
    (!is_whole).then(|| format!("its disk {shown} is cut short: it has {length} of {} bytes", record.size))
}

fn health(name: &Name, record: &Record, state: &State, mounted: Option<&Path>) -> Health {
    let plane = state.plane.as_ref();
    let bad = |line: &str| Health::Bad(line.to_owned());
    match (plane.map(|plane| (plane, plane.life())), &record.pending) {
        (_, Some(pending)) => Health::Bad(pending.to_string()),
        (Some((_, Life::Dead)), _) => {
            bad("its data plane has died, and its users get I/O errors; end them and mount it again")
        }
        (Some((_, Life::Recovers)), _) => {
            bad("its data plane has died, and another one is about to take over")
        }
        (Some((plane, Life::Serves)), _) if let Some(pid) = bounded::stopped(&plane.device) => {
            Health::Bad(format!(
                "its data plane, process {pid}, is stopped; let it go on (kill -CONT {pid}), or end it: kill -9 {pid}"
            ))
        }
        (Some((plane, Life::Serves)), _) if state.mounted.is_some() && mounted.is_none() => {
            let used = plane.is_in_use().then(|| format!(", but is in use ({})", plane.describe_use()));
            Health::Bad(format!(
                "was unmounted by somebody else{}; mount it again, or end it: nbdbridge volume umount {name}",
                used.unwrap_or_default()
            ))
        }
        (Some((_, Life::Serves)), _) => Health::Ok,
        (None, _) if record.unclean => bad("was not unmounted; it is checked before it is mounted next"),
        (None, _) => Health::Ok,
    }
}

/// Bytes that a file takes.
fn allocated(folder: &Folder, disk: &str) -> u64 {
    folder.file(disk).and_then(|disk| disk.metadata()).map_or(0, |found| found.blocks() * 512)
}

fn usage(path: &Path) -> Option<Usage> {
    let found = rustix::fs::statvfs(path).ok()?;
    let bytes = |blocks: u64| blocks.saturating_mul(found.f_frsize);
    Some(Usage {
        total: bytes(found.f_blocks),
        used: bytes(found.f_blocks.saturating_sub(found.f_bfree)),
        available: bytes(found.f_bavail),
    })
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
