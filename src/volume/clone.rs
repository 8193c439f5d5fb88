//! Volumes that begin as a copy: of another volume, as it is now, or of one of its snapshots.
//!
//! The copy is one of the whole disk in its format, made while the new volume is made (see `create`): a crash meanwhile
//! undoes both. Afterwards neither needs the other.
//!
//! Two file systems with one UUID are not mounted side by side by every kernel driver: a copy of xfs is mounted with
//! `nouuid`, and one of btrfs gets a UUID of its own before it is mounted for the first time. ext4 does not mind.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, anyhow};

use super::capture::{Disk, FREEZE_LIMIT, Target, capture};
use super::copy::How;
use super::filesystem::{run, said};
use super::options::DiskFormat;
use super::{Error, FsKind, Options, Origin, Pool, Progress, Provision, Record, Result, Volume, disk};
use crate::size::human;

/// What is copied.
#[derive(Debug)]
pub(super) struct Original<'a> {
    what: What<'a>,
    /// Of its disk.
    pub(super) format: DiskFormat,
    pub(super) fs: FsKind,
    /// In bytes.
    pub(super) size: u64,
    unclean: bool,
}

#[derive(Debug)]
enum What<'a> {
    /// Nobody else works on it while this is there.
    Volume(Box<Volume<'a>>),
    /// It never changes, so that its volume is free for others.
    Snapshot(&'a Pool, Disk),
}

impl Pool {
    /// Finds what a volume with these options is to be a copy of.
    ///
    /// # Errors
    /// One line: there is no such volume or snapshot; the options ask for what a copy cannot be.
    pub(super) fn original(&self, origin: &Origin, options: &Options) -> Result<Original<'_>> {
        let volume = self.volume(&origin.volume)?;
        let snapshot = origin.snapshot.as_ref().map(|name| volume.find_snapshot(name)).transpose()?;
        let (format, fs, size, unclean) = match &snapshot {
            Some(snapshot) => (snapshot.format, snapshot.fs, snapshot.size, snapshot.unclean),
            None => (volume.own_format()?, volume.record.fs, volume.record.size, volume.record.unclean),
        };
        if let Some(wish) = options.format.filter(|wish| *wish != format) {
            return Err(Error::Refused(format!(
                "option format={wish}: a copy has the format of its origin, and `{origin}` is {format}; leave it out"
            )));
        }
        if let Some(wish) = options.size.filter(|wish| *wish < size) {
            return Err(Error::Refused(format!(
                "option size={}: is smaller than `{origin}`, which has {}; a copy only grows",
                human(wish),
                human(size)
            )));
        }
        let what = match &snapshot {
            Some(snapshot) => What::Snapshot(self, Disk::open(&volume.snapshot_disk(snapshot)?)?),
            None => What::Volume(Box::new(volume)),
        };
        Ok(Original { what, format, fs, size, unclean })
    }
}

impl Volume<'_> {
    /// Sees to it that the file system, on a device and not mounted yet, can be mounted beside the one it is a copy of.
    ///
    /// # Errors
    /// One line: the tool that it takes is missing, or fails.
    pub(super) fn part_from_original(&mut self, device: &Path) -> Result<()> {
        if !self.record.shares_uuid || self.record.fs != FsKind::Btrfs {
            return Ok(());
        }
        // Only superblocks are written, in two steps: cut short, it is done again.
        let output =
            run("btrfstune", "btrfs-progs", device, |command| command.args(["-f", "-m"]).arg(device))?;
        if !output.status.success() {
            return Err(anyhow!("volume `{}`: btrfstune: {}", self.name, said(&output)).into());
        }
        self.record.shares_uuid = false;
        self.save()
    }

    /// Makes all that the record promises, as a copy.
    pub(super) fn fill_from(&mut self, original: &Original<'_>, progress: &dyn Progress) -> Result<()> {
        let target = Target { folder: &self.folder, name: self.own_format()?.disk_name() };
        original.copy(target, FREEZE_LIMIT, progress)?;
        let copy = self.own_disk()?;
        let size = self.record.size;
        if self.record.options.provision == Provision::Thick {
            progress.step("reserving space");
            disk::reserve_all(&copy, size)?;
        } else if size > original.size {
            disk::grow(&copy, original.format, size)?;
        }
        self.folder.sync().with_context(|| format!("{}: cannot flush it", copy.path().display()))?;
        let Options { uid, gid, mode, .. } = self.record.options;
        if uid.is_some() || gid.is_some() || mode.is_some() {
            let mut state = self.state()?;
            let device = self.attach(&mut state, false, progress)?;
            self.prepare(&device, progress)?;
            self.set_root(&device)?;
            self.take_down(&mut state, false)?;
        }
        self.record.formatted = true;
        self.record.pending = None;
        self.save()
    }
}

impl Original<'_> {
    /// The record of a copy.
    pub(super) fn plan(&self, options: &Options) -> Record {
        let size = options.size.unwrap_or(self.size);
        let mut record = Record::new(options.clone(), size, self.fs, Some(self.format));
        record.unclean = self.unclean;
        record.shares_uuid = self.fs == FsKind::Btrfs;
        record.grow_fs = size > self.size && self.fs != FsKind::None;
        record
    }

    /// Makes the file `to`, a copy of its disk; it is durable when this returns, its name is not. Where the volume is in
    /// use, writers are held up for at most `limit`.
    ///
    /// # Errors
    /// One line: no space; a file system that cannot be frozen for so long.
    pub(super) fn copy(&self, to: Target<'_>, limit: Duration, progress: &dyn Progress) -> Result<How> {
        match &self.what {
            What::Volume(volume) => capture(volume, to, true, limit, progress),
            What::Snapshot(pool, disk) => disk.copy(pool, to, progress),
        }
    }
}
