//! A copy of a volume's disk at one moment, also while the volume is in use: its file system is frozen as long as that
//! takes, or, where it has none, the blocks are shared at one stroke.
//!
//! Formats are kept: a qcow2 disk is copied as the file it is. Once its file system is frozen and its device flushed,
//! all that its data plane knows is in the file.

use std::fs::File;
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::Duration;

use anyhow::Context;

use super::copy::{self, How};
use super::freeze::Frozen;
use super::{Error, Progress, Result, Volume};
use crate::fuse::Mounted;

/// For so long writers are held up where nobody says otherwise.
pub(crate) const FREEZE_LIMIT: Duration = Duration::from_secs(30);

/// Makes the file `to`, a copy of the volume's disk; it is durable when this returns, its name is not. What cannot be
/// finished is removed. `promised` says that its space is counted already.
///
/// # Errors
/// One line: no space; a file system that cannot be frozen, or not for so long; a device in use that has none.
pub(super) fn capture(
    volume: &Volume<'_>,
    to: &Path,
    promised: bool,
    limit: Duration,
    progress: &dyn Progress,
) -> Result<How> {
    let disk = volume.own_disk()?;
    let folder = to.parent().unwrap_or(Path::new("/"));
    let shares = copy::can_reflink(&disk, folder);
    let takes = space_of(&disk)?;
    volume.pool.admit(if promised { 0 } else { takes }, if shares { 0 } else { takes })?;
    let state = volume.state()?;
    let device = state.plane.filter(|plane| !plane.read_only).map(|plane| plane.device);
    let mounted = state.mounted.filter(|point| is_mounted(point));
    let mut frozen = match (&device, &mounted) {
        (Some(_), Some(point)) => {
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
    let filled = filled.and_then(|()| fill(&disk, to, progress, &mut still_frozen));
    // First of all, whatever came of it.
    let thawed = frozen.map_or(Ok(()), Frozen::thaw);
    finish(filled.and_then(|new| thawed.map(|()| new)), to, progress)
}

/// Makes the file `to`, a copy of a disk that nobody writes, such as a snapshot's; its space is promised. As [`capture`].
///
/// # Errors
/// One line: no space, for one.
pub(super) fn copy_file(volume: &Volume<'_>, from: &Path, to: &Path, progress: &dyn Progress) -> Result<How> {
    let shares = copy::can_reflink(from, to.parent().unwrap_or(Path::new("/")));
    volume.pool.admit(0, if shares { 0 } else { space_of(from)? })?;
    progress.step("copying the disk");
    finish(fill(from, to, progress, &mut || Ok(())), to, progress)
}

/// What a copy of a disk takes, in bytes.
fn space_of(disk: &Path) -> Result<u64> {
    let found = disk.metadata().with_context(|| format!("{}: cannot look at it", disk.display()))?;
    Ok((found.blocks() * 512).min(found.len()))
}

/// All that was written to a device, in its image.
pub(super) fn flush(device: &Path) -> anyhow::Result<()> {
    let flushed = File::open(device).and_then(|device| device.sync_all());
    flushed.with_context(|| format!("{}: cannot flush it", device.display()))
}

fn fill(
    from: &Path,
    to: &Path,
    progress: &dyn Progress,
    go_on: &mut dyn FnMut() -> io::Result<()>,
) -> anyhow::Result<(File, How)> {
    let cannot = || format!("{}: cannot copy it", from.display());
    let from = File::open(from).with_context(cannot)?;
    let new = File::options().read(true).write(true).create_new(true).mode(0o600).open(to);
    let new = new.with_context(|| format!("{}: cannot make it", to.display()))?;
    let how = copy::fill(&from, &new, &mut |copied| {
        progress.bytes(copied.done, copied.total);
        go_on()
    });
    Ok((new, how.with_context(cannot)?))
}

fn finish(filled: anyhow::Result<(File, How)>, to: &Path, progress: &dyn Progress) -> Result<How> {
    let finished = filled.and_then(|(new, how)| {
        progress.step("making it durable");
        new.sync_all().with_context(|| format!("{}: cannot write it", to.display()))?;
        Ok(how)
    });
    if finished.is_err() {
        // The first error is the one to tell.
        let _ = std::fs::remove_file(to);
    }
    Ok(finished?)
}

/// Whether there is a file system at this very path.
pub(super) fn is_mounted(point: &Path) -> bool {
    Mounted::at(point).is_ok_and(|mounts| !mounts.is_empty())
}
