//! Image locks by qemu's scheme, so that its programs and ours keep off each other's images.
//!
//! A user of an image holds READ locks, of the open-file-description kind, on byte 100+p of the file for each
//! permission p that it uses, and on byte 200+p for each that it lets nobody else use. Then it asks whether
//! somebody else holds 200+p for a permission it uses, or 100+p for one it does not share. (The asking is for a
//! WRITE lock, which any READ lock of others denies.) Taking first and asking afterwards, two users that
//! come at the same time may both be refused, but never both be let in. Locks end with the descriptor.
//!
//! Where the bytes and permissions come from: QEMU, block/file-posix.c (`RAW_LOCK_PERM_BASE`,
//! `RAW_LOCK_SHARED_BASE`) and include/block/block-common.h (`BLK_PERM_*`).

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::io::Errno;

use crate::OpenError;
use crate::sys::{self, LockKind};

const PERMISSION_BASE: u64 = 100;
const UNSHARED_BASE: u64 = 200;

/// A permission, by its bit's number.
#[derive(Clone, Copy)]
struct Permission {
    bit: u64,
    name: &'static str,
}

const CONSISTENT_READ: Permission = Permission { bit: 0, name: "consistent read" };
const WRITE: Permission = Permission { bit: 1, name: "write" };
const RESIZE: Permission = Permission { bit: 3, name: "resize" };

/// What both kinds of user keep others from: who reads expects nobody to write beside it.
const UNSHARED: [Permission; 2] = [WRITE, RESIZE];

/// How long a refusal is not believed: a process that was killed with requests in the kernel keeps its locks until
/// those have ended, and its successor may start before.
const PATIENCE: Duration = Duration::from_secs(1);
const PAUSE: Duration = Duration::from_millis(20);

/// Locks an image that was opened for reading, or for writing too.
///
/// # Errors
/// `Locked` where another user is in the way, for longer than a moment. A file system without such locks: a warning, and success.
pub(super) fn lock_image(fd: impl AsFd, path: &Path, read_only: bool) -> Result<(), OpenError> {
    let uses: &[Permission] = if read_only { &[CONSISTENT_READ] } else { &[CONSISTENT_READ, WRITE] };
    let mut outcome = try_lock(&fd, uses);
    let begun = Instant::now();
    while matches!(outcome, Ok(Some(_))) && begun.elapsed() < PATIENCE {
        std::thread::sleep(PAUSE);
        outcome = try_lock(&fd, uses);
    }
    match outcome {
        Ok(None) => Ok(()),
        Ok(Some(_)) if is_locked_here(fd.as_fd()) => Err(OpenError::Twice(path.to_owned())),
        Ok(Some(lock)) => Err(OpenError::Locked {
            path: path.to_owned(),
            lock,
            // A reader is refused only by a writer; what a writer is refused by may let readers in.
            way_out: if read_only { "--no-lock at your own risk" } else { "--read-only" },
        }),
        Err(errno) => {
            tracing::warn!(path = %path.display(), %errno, "no image locks on this file system: nothing keeps other writers away");
            Ok(())
        }
    }
}

/// Whether another descriptor of this process holds a lock on the same file. The kernel does not tell whose a lock is, but
/// what each descriptor has.
fn is_locked_here(fd: BorrowedFd<'_>) -> bool {
    let identity = |fd: BorrowedFd<'_>| rustix::fs::fstat(fd).map(|stat| (stat.st_dev, stat.st_ino)).ok();
    let Ok(list) = std::fs::read_dir("/proc/self/fd") else { return false };
    let others =
        list.flatten().filter(|entry| entry.file_name().to_str() != Some(&fd.as_raw_fd().to_string()));
    let mut same = others.filter(|entry| {
        let stat = std::fs::metadata(entry.path()).ok();
        stat.map(|stat| (stat.dev(), stat.ino())) == identity(fd)
    });
    same.any(|entry| {
        let info = Path::new("/proc/self/fdinfo").join(entry.file_name());
        std::fs::read_to_string(info).is_ok_and(|info| info.contains("OFDLCK"))
    })
}

/// None when locked; else the name of what was refused.
fn try_lock(fd: impl AsFd, uses: &[Permission]) -> Result<Option<&'static str>, Errno> {
    let mine = uses.iter().map(|p| (PERMISSION_BASE, p)).chain(UNSHARED.iter().map(|p| (UNSHARED_BASE, p)));
    for (base, permission) in mine {
        match sys::lock_byte(&fd, base + permission.bit, LockKind::Read) {
            Ok(()) => {}
            Err(Errno::AGAIN | Errno::ACCESS) => return Ok(Some(permission.name)),
            Err(errno) => return Err(errno),
        }
    }
    let theirs = uses.iter().map(|p| (UNSHARED_BASE, p)).chain(UNSHARED.iter().map(|p| (PERMISSION_BASE, p)));
    for (base, permission) in theirs {
        if !sys::could_lock_byte(&fd, base + permission.bit, LockKind::Write)? {
            return Ok(Some(permission.name));
        }
    }
    Ok(None)
}
