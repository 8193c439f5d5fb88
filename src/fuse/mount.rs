//! Mounting a FUSE file system over one file: by ourselves where we may, else through fusermount3.

use std::ffi::{CString, OsStr};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use anyhow::{Context, Result, bail};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags};
use rustix::process::{getgid, getuid};

use super::helper;
use super::mounts::DOOR_TYPE;

/// The kernel's device for FUSE file systems.
const DEVICE: &str = "/dev/fuse";

/// How to mount.
#[derive(Debug)]
pub(super) struct Wish<'a> {
    /// What is mounted, for people.
    pub(super) source: &'a OsStr,
    /// Opens for writing answer EROFS.
    pub(super) read_only: bool,
    /// Other users may use the file, as far as its mode lets them.
    pub(super) allow_other: bool,
}

/// Mounts over the regular file at `path`, and returns the device through which requests come.
///
/// # Errors
/// One line that says what is missing.
pub(super) fn mount(path: &Path, wish: &Wish<'_>) -> Result<OwnedFd> {
    match mount_here(path, wish)? {
        Some(device) => Ok(device),
        None => helper::mount(path, wish),
    }
}

/// Takes a mount away; `lazily` also one that is in use: its users keep it until they are done.
///
/// # Errors
/// BUSY where it is in use, and others; fusermount3's as a plain message.
pub(crate) fn unmount(path: &Path, lazily: bool) -> Result<Unmounted> {
    let flags = if lazily { UnmountFlags::DETACH } else { UnmountFlags::empty() };
    match rustix::mount::unmount(path, flags | UnmountFlags::NOFOLLOW) {
        Ok(()) => Ok(Unmounted::Yes),
        Err(Errno::BUSY) => Ok(Unmounted::Busy),
        // Not mounted any more.
        Err(Errno::INVAL | Errno::NOENT) => Ok(Unmounted::Yes),
        Err(Errno::PERM | Errno::ACCESS) => match helper::unmount(path, lazily) {
            Ok(()) => Ok(Unmounted::Yes),
            Err(error) if format!("{error:#}").contains("busy") => Ok(Unmounted::Busy),
            Err(error) => Err(error),
        },
        Err(errno) => {
            Err(io::Error::from(errno)).with_context(|| format!("{}: cannot unmount it", path.display()))
        }
    }
}

/// How an attempt to unmount ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unmounted {
    /// It is gone.
    Yes,
    /// It is in use.
    Busy,
}

/// Whether a second reader of the same mount can be opened: /dev/fuse lets us in.
pub(super) fn can_open_device() -> bool {
    File::options().read(true).write(true).open(DEVICE).is_ok()
}

/// Mounts without help; None where we may not.
fn mount_here(path: &Path, wish: &Wish<'_>) -> Result<Option<OwnedFd>> {
    let device = match rustix::fs::open(DEVICE, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()) {
        Ok(device) => device,
        // fusermount3 may open it even so.
        Err(Errno::ACCESS | Errno::PERM) => return Ok(None),
        Err(Errno::NOENT | Errno::NODEV | Errno::NXIO) => {
            bail!(
                "there is no {DEVICE} here; load the kernel module (modprobe fuse), or give the container the device (--device {DEVICE})"
            )
        }
        Err(errno) => return Err(io::Error::from(errno)).context(format!("cannot open {DEVICE}")),
    };
    let mut options = format!(
        "fd={},rootmode={:o},user_id={},group_id={},default_permissions",
        device.as_raw_fd(),
        libc::S_IFREG,
        getuid().as_raw(),
        getgid().as_raw()
    );
    if wish.allow_other {
        options.push_str(",allow_other");
    }
    let options = CString::new(options).context("mount options")?;
    let mut flags = MountFlags::NOSUID | MountFlags::NODEV;
    if wish.read_only {
        flags |= MountFlags::RDONLY;
    }
    match rustix::mount::mount(wish.source, path, DOOR_TYPE, flags, &*options) {
        Ok(()) => Ok(Some(device)),
        Err(Errno::PERM) => Ok(None),
        Err(Errno::NODEV) => bail!("this kernel has no FUSE; load its module (modprobe fuse)"),
        Err(errno) => {
            Err(io::Error::from(errno)).with_context(|| format!("{}: cannot mount over it", path.display()))
        }
    }
}
