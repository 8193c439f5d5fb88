//! A mount that nobody else sees, for a moment: in a mount namespace of a thread of our own. However this process ends,
//! it goes with it.
//! A leaf file: the only `unsafe` is unshare(2).
#![allow(unsafe_code)]

use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use rustix::mount::{MountPropagationFlags, UnmountFlags, mount_change, unmount};

use super::{Result, Volume, bounded};
use crate::attach::{backing_file, is_attachment};
use crate::fuse::Mounted;
use crate::helper::Task;

/// So long is waited for others to close files that they never asked for.
const PATIENCE: Duration = Duration::from_secs(5);

/// Mounts the volume's device, does something in its root folder, and unmounts it again: all of it is durable then.
///
/// # Errors
/// The mount's, and what `work` gives.
pub(super) fn mounted(
    volume: &Volume<'_>,
    device: &Path,
    work: impl FnOnce(&Path) -> Result<()> + Send,
) -> Result<()> {
    apart(device, || {
        // Opened here: a descriptor from outside is of another namespace's mount.
        let folder = volume.pool.runtime().make_private_point()?;
        volume.mount_at(device, &folder, false)?;
        let point = folder.path().to_owned();
        // An open folder below a mount does not keep it, and is of no more use.
        drop(folder);
        let worked = work(&point);
        unmount_soon(device, &point)?;
        worked
    })?
}

/// Does something where no other volume of this host is mounted but that on `device`.
///
/// # Errors
/// One line: no mount namespace of its own.
pub(super) fn apart<T: Send>(device: &Path, work: impl FnOnce() -> T + Send) -> anyhow::Result<T> {
    let run = || {
        leave().context("no mount namespace of its own")?;
        let all = Mounted::all().unwrap_or_default();
        let others = |mounted: &&Mounted| is_volume(mounted) && Path::new(&mounted.source) != device;
        for mounted in all.iter().rev().filter(others) {
            // Where that fails, it stays for a moment.
            let _ = unmount(&mounted.point, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW);
        }
        Ok(work())
    };
    std::thread::scope(|scope| {
        scope.spawn(run).join().unwrap_or_else(|_| Err(anyhow!("a thread ended without its result")))
    })
}

/// Unmounts, as soon as it can be done: between fork and exec, a child of another thread has all files open that we had
/// open then.
fn unmount_soon(device: &Path, point: &Path) -> Result<()> {
    let until = Instant::now() + PATIENCE;
    let mounted = Mounted::at(point).context("cannot learn what is mounted")?;
    let number = mounted.last().map(|mounted| mounted.device.clone()).unwrap_or_default();
    loop {
        // The helper process has the mounts of this thread.
        let task = Task::Unmount { file: point, number: &number, lazily: false };
        match bounded::done(device, &task)?.as_slice() {
            b"busy" if Instant::now() < until => std::thread::sleep(Duration::from_millis(2)),
            b"busy" => return Err(anyhow!("{}: cannot unmount it: is in use", point.display()).into()),
            _ => return Ok(()),
        }
    }
}

/// Whether it is the mount of a data plane's loop device.
fn is_volume(mounted: &Mounted) -> bool {
    let file = backing_file(Path::new(&mounted.source));
    file.is_some_and(|file| file.parent().is_some_and(is_attachment))
}

/// Gives this thread mounts of its own; what is unmounted elsewhere goes here, too.
fn leave() -> io::Result<()> {
    // SAFETY: no memory is passed; what the thread shared with others (the present folder) is its own from now on.
    if unsafe { libc::unshare(libc::CLONE_FS | libc::CLONE_NEWNS) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(mount_change("/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC)?)
}
