//! Snapshots: copies of a volume's disk that nobody changes any more, kept in the volume's folder.
//!
//! ```text
//!   POOL/<volume>/snapshots/<name>/disk.raw|disk.qcow2, snapshot.json      one is whole, or it is not there:
//!                           .new/                                          being made; then renamed
//!                           .gone/                                         renamed; then removed
//! ```
//!
//! What they take counts as promised in the pool. Each has all that it needs: blocks that it shares with the volume or a copy are the file system's business. So a snapshot
//! can be removed whatever was made from it, and it moves with the volume's folder.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Context;
use serde::{Deserialize, Serialize};

use super::capture::{self, capture};
use super::copy::How;
use super::options::DiskFormat;
use super::{Error, FsKind, Name, Pending, Pool, Progress, Record, Result, Volume, durable, freeze};

/// In a volume's folder.
const FOLDER: &str = "snapshots";

/// The file that says what a snapshot is.
const FILE: &str = "snapshot.json";

/// The version of that file's meaning.
const SCHEMA: u32 = 1;

/// What is being made, and what is being removed. No snapshot has such a name.
const NEW: &str = ".new";
const GONE: &str = ".gone";

/// What is written down of a snapshot. Fields may be added.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Written {
    schema: u32,
    created: u64,
    size: u64,
    fs: FsKind,
    format: DiskFormat,
    /// It was in use, or had not been unmounted: it is checked before it is mounted.
    unclean: bool,
}

/// A snapshot, as `inspect` shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Snapshot {
    pub(crate) name: Name,
    /// Seconds since 1970.
    pub(crate) created: u64,
    /// Of the disk, in bytes.
    pub(crate) size: u64,
    /// Bytes of storage, of which some may be shared.
    pub(crate) allocated: u64,
    pub(crate) fs: FsKind,
    pub(crate) format: DiskFormat,
    #[serde(skip)]
    pub(super) unclean: bool,
}

/// A snapshot that was just made.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Taken {
    #[serde(flatten)]
    pub(crate) snapshot: Snapshot,
    /// It shares the volume's blocks.
    pub(crate) reflink: bool,
}

impl Pool {
    /// Takes a snapshot of a volume, whether or not it is in use; writers are held up for at most `limit`.
    ///
    /// # Errors
    /// One line: there is one of that name, no space, a file system that cannot be frozen for so long.
    pub(crate) fn snapshot(
        &self,
        volume: &Name,
        name: &Name,
        limit: Duration,
        progress: &dyn Progress,
    ) -> Result<Taken> {
        self.volume(volume)?.take_snapshot(name, limit, progress)
    }

    /// The snapshots of a volume, the oldest first.
    ///
    /// # Errors
    /// One line: there is no such volume, or its folder cannot be read.
    pub(crate) fn snapshots(&self, volume: &Name) -> Result<Vec<Snapshot>> {
        let folder = self.path_of(volume);
        Record::read(&folder, volume)?;
        list(&folder)
    }

    /// Removes a snapshot.
    ///
    /// # Errors
    /// One line: there is none of that name.
    pub(crate) fn remove_snapshot(&self, volume: &Name, name: &Name) -> Result<()> {
        let volume = self.volume(volume)?;
        let folder = volume.folder().join(FOLDER);
        // One that is not sound can be removed as well.
        if !folder.join(name).is_dir() {
            volume.find_snapshot(name)?;
        }
        let gone = folder.join(GONE);
        clear(&gone)
            .and_then(|()| fs::rename(folder.join(name), &gone))
            .with_context(|| cannot_remove(&volume, name))?;
        durable::sync_folder(&folder).with_context(|| cannot_remove(&volume, name))?;
        clear(&gone).with_context(|| cannot_remove(&volume, name))?;
        Ok(())
    }
}

impl Volume<'_> {
    /// A snapshot by its name.
    ///
    /// # Errors
    /// One line with those that there are.
    pub(super) fn find_snapshot(&self, name: &Name) -> Result<Snapshot> {
        let all = list(&self.folder())?;
        let names: Vec<_> = all.iter().map(|snapshot| snapshot.name.to_string()).collect();
        all.into_iter().find(|snapshot| snapshot.name == *name).ok_or_else(|| {
            let there = if names.is_empty() { "none".to_owned() } else { names.join(", ") };
            Error::NoSnapshot(format!("volume `{}` has no snapshot `{name}`; there is {there}", self.name))
        })
    }

    /// Where a snapshot's disk is.
    pub(super) fn snapshot_disk(&self, snapshot: &Snapshot) -> PathBuf {
        self.folder().join(FOLDER).join(&snapshot.name).join(snapshot.format.disk_name())
    }

    fn take_snapshot(&mut self, name: &Name, limit: Duration, progress: &dyn Progress) -> Result<Taken> {
        let format = self.own_format()?;
        let folder = self.folder().join(FOLDER);
        if folder.join(name).exists() {
            return Err(Error::Exists(format!("volume `{}` has a snapshot `{name}` already", self.name)));
        }
        let written = Written {
            schema: SCHEMA,
            created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
            size: self.record.size,
            fs: self.record.fs,
            format,
            unclean: self.record.unclean,
        };
        self.record.pending = Some(Pending::Snapshot { name: name.clone() });
        self.save()?;
        let made = self.make_snapshot(&folder, name, &written, limit, progress);
        if made.is_err() {
            // The first error is the one to tell.
            let _ = clear(&folder.join(NEW));
        }
        self.record.pending = None;
        self.save()?;
        let how = made?;
        Ok(Taken { snapshot: self.find_snapshot(name)?, reflink: how == How::Reflink })
    }

    fn make_snapshot(
        &self,
        folder: &Path,
        name: &Name,
        written: &Written,
        limit: Duration,
        progress: &dyn Progress,
    ) -> Result<How> {
        let new = folder.join(NEW);
        let cannot = || format!("{}: cannot make the snapshot", new.display());
        clear(&new).with_context(cannot)?;
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&new).with_context(cannot)?;
        durable::sync_folder(&self.folder()).with_context(cannot)?;
        let how = capture(self, &new.join(written.format.disk_name()), false, limit, progress)?;
        let json = serde_json::to_vec_pretty(written).context("a snapshot's record as JSON")?;
        durable::write(&new, FILE, &json)
            .and_then(|()| fs::rename(&new, folder.join(name)))
            .and_then(|()| durable::sync_folder(folder))
            .with_context(cannot)?;
        Ok(how)
    }

    /// Undoes a snapshot that was cut short: it is whole, or there is none. Nobody is left waiting for a thaw.
    ///
    /// # Errors
    /// One line.
    pub(super) fn undo_snapshot(&mut self) -> Result<()> {
        if let Some(point) = self.state()?.mounted.filter(|point| capture::is_mounted(point)) {
            match freeze::thaw_left(&point) {
                Ok(true) => tracing::warn!("volume `{}`: was left frozen; thawed", self.name),
                Ok(false) => {}
                Err(error) => tracing::warn!("{}: cannot be thawed: {error}", point.display()),
            }
        }
        let folder = self.folder().join(FOLDER);
        for left in [NEW, GONE].map(|name| folder.join(name)) {
            clear(&left).with_context(|| format!("{}: cannot remove it", left.display()))?;
        }
        self.record.pending = None;
        self.save()
    }
}

fn cannot_remove(volume: &Volume<'_>, name: &Name) -> String {
    format!("volume `{}`: cannot remove the snapshot `{name}`", volume.name)
}

/// Removes a folder that may be there.
fn clear(folder: &Path) -> io::Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// What the snapshots in a volume's folder take of the pool at most, in bytes.
pub(super) fn promised(volume: &Path) -> u64 {
    let all = list(volume).unwrap_or_default();
    all.iter().fold(0, |sum, snapshot| sum.saturating_add(snapshot.allocated))
}

/// All that are whole, the oldest first. One that cannot be read is left out: its name still cannot be given again.
fn list(volume: &Path) -> Result<Vec<Snapshot>> {
    let folder = volume.join(FOLDER);
    let cannot = || format!("{}: cannot look into it", folder.display());
    let entries = match fs::read_dir(&folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.with_context(cannot)?,
    };
    let mut all = Vec::new();
    for entry in entries {
        let entry = entry.with_context(cannot)?;
        let Some(name) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        match read(&entry.path(), name) {
            Ok(snapshot) => all.push(snapshot),
            Err(error) => tracing::warn!("{}: is no sound snapshot: {error:#}", entry.path().display()),
        }
    }
    all.sort_by(|a, b| (a.created, &a.name).cmp(&(b.created, &b.name)));
    Ok(all)
}

fn read(folder: &Path, name: Name) -> anyhow::Result<Snapshot> {
    let Written { schema, created, size, fs, format, unclean } =
        serde_json::from_slice(&durable::read(&folder.join(FILE))?)?;
    anyhow::ensure!(schema == SCHEMA, "has schema {schema}, and this version knows {SCHEMA}");
    let disk = folder.join(format.disk_name()).metadata().context("its disk")?;
    Ok(Snapshot { name, created, size, allocated: disk.blocks() * 512, fs, format, unclean })
}
