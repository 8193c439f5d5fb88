//! A mount that nobody else sees, for a moment: in a mount namespace of a thread of our own. However this process ends,
//! it goes with it.
//! A leaf file: the only `unsafe` is unshare(2).
#![allow(unsafe_code)]

use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

use anyhow::{Context, anyhow};
use rustix::mount::{MountPropagationFlags, UnmountFlags, mount_change, unmount};

use super::{Result, Volume};
use crate::attach::{backing_file, is_attachment};
use crate::fuse::Mounted;

/// Mounts the volume's device, does something in its root folder, and unmounts it again: all of it is durable then.
///
/// # Errors
/// The mount's, and what `work` gives.
pub(super) fn mounted(
    volume: &Volume<'_>,
    device: &Path,
    work: impl FnOnce(&Path) -> Result<()> + Send,
) -> Result<()> {
    let point = volume.pool.runtime().private_point();
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&point)
        .with_context(|| format!("{}: cannot make it", point.display()))?;
    apart(|| {
        volume.mount_at(device, &point, false)?;
        let worked = work(&point);
        let unmounted = unmount(&point, UnmountFlags::NOFOLLOW);
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
