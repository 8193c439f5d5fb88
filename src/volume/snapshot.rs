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

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Context;
use serde::{Deserialize, Serialize};

use super::capture::{self, Target, capture};
use super::copy::How;
use super::options::DiskFormat;
use super::{Error, FsKind, Name, Pending, Pool, Progress, Record, Result, Volume, freeze};
use crate::beneath::{Entry, Folder};

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
        let folder = self.folder_of(volume)?;
        Record::read(&folder, volume)?;
        list(&folder)
    }

    /// Removes a snapshot.
    ///
    /// # Errors
    /// One line: there is none of that name.
    pub(crate) fn remove_snapshot(&self, volume: &Name, name: &Name) -> Result<()> {
        let volume = self.volume(volume)?;
        let cannot = || cannot_remove(&volume, name);
        let folder = open_all(&volume.folder)?;
        // One that is not sound can be removed as well.
        let there = match &folder {
            Some(folder) => folder.kind(name).with_context(cannot)?.is_some(),
            None => false,
        };
        let Some(folder) = folder.filter(|_| there) else {
            return volume.find_snapshot(name).map(drop);
        };
        folder
            .remove(GONE)
            .and_then(|()| folder.rename(name, &folder, GONE))
            .and_then(|()| folder.sync())
            .and_then(|()| folder.remove(GONE))
            .with_context(cannot)?;
        Ok(())
    }
}

impl Volume<'_> {
    /// A snapshot by its name.
    ///
    /// # Errors
    /// One line with those that there are.
    pub(super) fn find_snapshot(&self, name: &Name) -> Result<Snapshot> {
        if let Some(folder) = open_all(&self.folder)?
            && folder.kind(name).is_ok_and(|kind| kind.is_some())
        {
            return read(&folder, name.clone()).map_err(|error| {
                let path = folder.path().join(name);
                Error::Broken(format!(
                    "snapshot `{}@{name}` is broken: {}: {error:#}",
                    self.name,
                    path.display()
                ))
            });
        }
        let names: Vec<_> = list(&self.folder)?.iter().map(|snapshot| snapshot.name.to_string()).collect();
        let there = if names.is_empty() { "none".to_owned() } else { names.join(", ") };
        Err(Error::NoSnapshot(format!("volume `{}` has no snapshot `{name}`; there is {there}", self.name)))
    }

    /// A snapshot's disk.
    ///
    /// # Errors
    /// It is no regular file.
    pub(super) fn snapshot_disk(&self, snapshot: &Snapshot) -> Result<Entry> {
        let name = Path::new(FOLDER).join(&snapshot.name).join(snapshot.format.disk_name());
        let found = self.folder.file(&name);
        Ok(found.with_context(|| format!("{}: cannot open it", self.folder.path().join(&name).display()))?)
    }

    fn take_snapshot(&mut self, name: &Name, limit: Duration, progress: &dyn Progress) -> Result<Taken> {
        let format = self.own_format()?;
        let cannot = || format!("{}: cannot look into it", self.folder.path().join(FOLDER).display());
        let made = self.folder.make_folder(FOLDER);
        let folder = made.with_context(cannot)?;
        if folder.kind(name).with_context(cannot)?.is_some() {
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
            let _ = folder.remove(NEW);
        }
        self.record.pending = None;
        self.save()?;
        let how = made?;
        Ok(Taken { snapshot: self.find_snapshot(name)?, reflink: how == How::Reflink })
    }

    fn make_snapshot(
        &self,
        folder: &Folder,
        name: &Name,
        written: &Written,
        limit: Duration,
        progress: &dyn Progress,
    ) -> Result<How> {
        let cannot = || format!("{}: cannot make the snapshot", folder.path().join(NEW).display());
        folder.remove(NEW).with_context(cannot)?;
        let new = folder.make_folder(NEW).with_context(cannot)?;
        self.folder.sync().with_context(cannot)?;
        let target = Target { folder: &new, name: written.format.disk_name() };
        let how = capture(self, target, false, limit, progress)?;
        let json = serde_json::to_vec_pretty(written).context("a snapshot's record as JSON")?;
        new.write(FILE, &json)
            .and_then(|()| folder.rename(NEW, folder, name))
            .and_then(|()| folder.sync())
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
        if let Some(folder) = open_all(&self.folder)? {
            for left in [NEW, GONE] {
                let removed = folder.remove(left);
                removed
                    .with_context(|| format!("{}: cannot remove it", folder.path().join(left).display()))?;
            }
        }
        self.record.pending = None;
        self.save()
    }
}

fn cannot_remove(volume: &Volume<'_>, name: &Name) -> String {
    format!("volume `{}`: cannot remove the snapshot `{name}`", volume.name)
}

/// Opens the folder of a volume's snapshots; None where there is none.
fn open_all(volume: &Folder) -> Result<Option<Folder>> {
    match volume.folder(FOLDER) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::Broken(format!("{}: {error}", volume.path().join(FOLDER).display()))),
        Ok(folder) => Ok(Some(folder)),
    }
}

/// What the snapshots in a volume's folder take of the pool at most, in bytes.
pub(super) fn promised(volume: &Folder) -> u64 {
    let all = list(volume).unwrap_or_default();
    all.iter().fold(0, |sum, snapshot| sum.saturating_add(snapshot.allocated))
}

/// All that are whole, the oldest first. One that cannot be read is left out: its name still cannot be given again.
fn list(volume: &Folder) -> Result<Vec<Snapshot>> {
    let Some(folder) = open_all(volume)? else { return Ok(Vec::new()) };
    let mut all = Vec::new();
    let names =
        folder.names().with_context(|| format!("{}: cannot look into it", folder.path().display()))?;
    for name in names.iter().filter_map(|name| name.to_str()?.parse::<Name>().ok()) {
        match read(&folder, name.clone()) {
            Ok(snapshot) => all.push(snapshot),
            Err(error) => {
                tracing::warn!("{}: is no sound snapshot: {error:#}", folder.path().join(name).display());
            }
        }
    }
    all.sort_by(|a, b| (a.created, &a.name).cmp(&(b.created, &b.name)));
    Ok(all)
}

fn read(all: &Folder, name: Name) -> anyhow::Result<Snapshot> {
    let folder = all.folder(&name)?;
    let json = folder.read(FILE).context(FILE)?;
    let Written { schema, created, size, fs, format, unclean } = serde_json::from_slice(&json)?;
    anyhow::ensure!(schema == SCHEMA, "has schema {schema}, and this version knows {SCHEMA}");
    let disk = folder.file(format.disk_name()).and_then(|disk| disk.metadata());
    let disk = disk.with_context(|| format!("its {}", format.disk_name()))?;
    Ok(Snapshot { name, created, size, allocated: disk.blocks() * 512, fs, format, unclean })
}
