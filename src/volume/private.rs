//! A mount that nobody else sees, for a moment: in a mount namespace of a thread of our own. However this process ends,
//! it goes with it.
//! A leaf file: the only `unsafe` is unshare(2).
#![allow(unsafe_code)]

use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use rustix::io::Errno;
use rustix::mount::{MountPropagationFlags, UnmountFlags, mount_change, unmount};

use super::{Result, Volume};
use crate::attach::{backing_file, is_attachment};
use crate::fuse::Mounted;

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
    apart(|| {
        // Opened here: a descriptor from outside is of another namespace's mount.
        let folder = volume.pool.runtime().make_private_point()?;
        volume.mount_at(device, &folder, false)?;
        let point = folder.path().to_owned();
        // An open folder below a mount does not keep it, and is of no more use.
        drop(folder);
        let worked = work(&point);
        let unmounted = unmount_soon(&point);
        unmounted.with_context(|| format!("{}: cannot unmount it", point.display()))?;
        worked
    })?
}

/// Does something where no other volume of this host is mounted.
///
/// # Errors
/// One line: no mount namespace of its own.
pub(super) fn apart<T: Send>(work: impl FnOnce() -> T + Send) -> anyhow::Result<T> {
    let run = || {
        leave().context("no mount namespace of its own")?;
        for mounted in Mounted::all().unwrap_or_default().iter().rev().filter(|mounted| is_volume(mounted)) {
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
fn unmount_soon(point: &Path) -> rustix::io::Result<()> {
    let until = Instant::now() + PATIENCE;
    loop {
        match unmount(point, UnmountFlags::NOFOLLOW) {
            Err(Errno::BUSY) if Instant::now() < until => std::thread::sleep(Duration::from_millis(2)),
            other => return other,
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
