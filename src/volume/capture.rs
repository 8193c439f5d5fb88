//! A copy of a volume's disk at one moment, also while the volume is in use: its file system is frozen as long as that
//! takes, or, where it has none, the blocks are shared at one stroke.
//!
//! Formats are kept: a qcow2 disk is copied as the file it is. Once its file system is frozen and its device flushed,
//! all that its data plane knows is in the file.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;

use super::copy::{self, How};
use super::freeze::Frozen;
use super::{Error, Pool, Progress, Result, Volume, bounded};
use crate::beneath::{Entry, Folder};
use crate::fuse::Mounted;
use crate::helper::Task;

/// For so long writers are held up where nobody says otherwise.
pub(crate) const FREEZE_LIMIT: Duration = Duration::from_secs(30);

/// A disk to be copied, open: it can be removed meanwhile.
#[derive(Debug)]
pub(super) struct Disk {
    file: File,
    /// Where it was, for people.
    path: PathBuf,
}

/// Where a copy is made: a file of a folder that has none of this name.
#[derive(Clone, Copy, Debug)]
pub(super) struct Target<'a> {
    pub(super) folder: &'a Folder,
    pub(super) name: &'a str,
}

impl Target<'_> {
    fn path(&self) -> PathBuf {
        self.folder.path().join(self.name)
    }
}

impl Disk {
    /// Opens one.
    ///
    /// # Errors
    /// One line.
    pub(super) fn open(entry: &Entry) -> Result<Self> {
        let path = entry.path().to_owned();
        let file = entry.open(false).with_context(|| format!("{}: cannot open it", path.display()))?;
        Ok(Disk { file, path })
    }

    /// Makes the file `to`, a copy of this disk, which nobody writes; its space is promised. As [`capture`].
    ///
    /// # Errors
    /// One line: no space, for one.
    pub(super) fn copy(&self, pool: &Pool, to: Target<'_>, progress: &dyn Progress) -> Result<How> {
        pool.admit(0, if self.shares_with(to) { 0 } else { self.space()? })?;
        progress.step("copying the disk");
        finish(self.fill(to, progress, &mut || Ok(())), to, progress)
    }

    /// Whether a copy at `to` can share its blocks.
    fn shares_with(&self, to: Target<'_>) -> bool {
        copy::can_reflink(&self.file, &to.folder.via())
    }

    /// What a copy takes, in bytes.
    fn space(&self) -> Result<u64> {
        let found = self.file.metadata();
        let found = found.with_context(|| format!("{}: cannot look at it", self.path.display()))?;
        Ok((found.blocks() * 512).min(found.len()))
    }

    fn fill(
        &self,
        to: Target<'_>,
        progress: &dyn Progress,
        go_on: &mut dyn FnMut() -> io::Result<()>,
    ) -> anyhow::Result<(File, How)> {
        let new = to.folder.create(to.name);
        let new = new.with_context(|| format!("{}: cannot make it", to.path().display()))?;
        let how = copy::fill(&self.file, &new, &mut |copied| {
            progress.bytes(copied.done, copied.total);
            go_on()
        });
        Ok((new, how.with_context(|| format!("{}: cannot copy it", self.path.display()))?))
    }
}

/// Makes the file `to`, a copy of the volume's disk; it is durable when this returns, its name is not. What cannot be
/// finished is removed. `promised` says that its space is counted already.
///
/// # Errors
/// One line: no space; a file system that cannot be frozen, or not for so long; a device in use that has none.
pub(super) fn capture(
    volume: &Volume<'_>,
    to: Target<'_>,
    promised: bool,
    limit: Duration,
    progress: &dyn Progress,
) -> Result<How> {
    let disk = Disk::open(&volume.own_disk()?)?;
    let shares = disk.shares_with(to);
    let takes = disk.space()?;
    volume.pool.admit(if promised { 0 } else { takes }, if shares { 0 } else { takes })?;
    let state = volume.state()?;
    let device = state.plane.filter(|plane| !plane.read_only).map(|plane| plane.device);
    let mounted = state.mounted.filter(|point| is_mounted(point));
    let mut frozen = match (&device, &mounted) {
        (Some(device), Some(point)) => {
            bounded::check(device)?;
            progress.step("freezing the file system");
            Some(Frozen::freeze(point, limit)?)
        }
        (Some(device), None) if !shares => {
            return Err(Error::InUse(format!(
                "volume `{}`: is in use as {}, which cannot be frozen (no file system, or mounted elsewhere), and its pool \
                 cannot share blocks (reflinks: xfs, btrfs); end that use first",
                volume.name,
                device.display()
            )));
        }
        _ => None,
    };
    progress.step("copying the disk");
    let mut still_frozen = || frozen.as_mut().map_or(Ok(()), Frozen::check).map_err(io::Error::other);
    let filled = device.map_or(Ok(()), |device| flush(&device));
    let filled = filled.and_then(|()| disk.fill(to, progress, &mut still_frozen));
    // First of all, whatever came of it.
    let thawed = frozen.map_or(Ok(()), Frozen::thaw);
    finish(filled.and_then(|new| thawed.map(|()| new)), to, progress)
}

/// All that was written to a device, in its image.
pub(super) fn flush(device: &Path) -> anyhow::Result<()> {
    Ok(bounded::done(device, &Task::Flush(device)).map(drop)?)
}

fn finish(filled: anyhow::Result<(File, How)>, to: Target<'_>, progress: &dyn Progress) -> Result<How> {
    let finished = filled.and_then(|(new, how)| {
        progress.step("making it durable");
        new.sync_all().with_context(|| format!("{}: cannot write it", to.path().display()))?;
        Ok(how)
    });
    if finished.is_err() {
        // The first error is the one to tell.
        let _ = to.folder.remove(to.name);
    }
    Ok(finished?)
}

/// Whether there is a file system at this very path.
pub(super) fn is_mounted(point: &Path) -> bool {
    Mounted::at(point).is_ok_and(|mounts| !mounts.is_empty())
}
