//! A process that serves its own host's disk must not wait for that disk: neither for memory, which the kernel may try
//! to free by writing to it, nor for file systems on it, which the end of a process can unmount.
//! A leaf file: the only `unsafe` is mlockall(2) and unshare(2).
#![allow(unsafe_code)]

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use rustix::mount::{MountPropagationFlags, UnmountFlags, mount_change, unmount};
use rustix::process::{Resource, getrlimit};
use rustix::thread::{CapabilitySet, capabilities};

use crate::io_flusher;

/// What is there and what will be, once it has been touched.
const LOCK: libc::c_int = libc::MCL_CURRENT | libc::MCL_FUTURE | libc::MCL_ONFAULT;

/// File systems that cannot be on a disk of ours, and that a process needs.
const KEPT: [&str; 14] = [
    "tmpfs",
    "ramfs",
    "proc",
    "sysfs",
    "devtmpfs",
    "devpts",
    "cgroup",
    "cgroup2",
    "mqueue",
    "hugetlbfs",
    "securityfs",
    "configfs",
    "debugfs",
    "tracefs",
];

/// Tells the kernel that this process is needed to free memory: what it allocates is never waited for by writing to
/// disks, and what it has touched stays in memory. To be called before threads are made, which inherit the first. What
/// is denied is said `aloud` by the server, and by no process beside it.
pub(super) fn serve_reclaim(aloud: bool) {
    if let Err(error) = io_flusher::mark()
        && aloud
    {
        tracing::warn!(%error, "not marked as I/O flusher (CAP_SYS_RESOURCE): when memory is short, the device can hang");
    }
    // Under a limit, the lock would make the next thread's stack fail.
    let limited = getrlimit(Resource::Memlock).current.is_some() && !may_lock();
    // SAFETY: no memory is passed.
    let locked = !limited && unsafe { libc::mlockall(LOCK) } == 0;
    if !locked && aloud {
        tracing::warn!(
            "memory is not locked (CAP_IPC_LOCK, or ulimit -l unlimited): do not swap to the device"
        );
    }
}

/// Whether limits on locked memory are for others.
fn may_lock() -> bool {
    capabilities(None).is_ok_and(|sets| sets.effective.contains(CapabilitySet::IPC_LOCK))
}

/// Gives this thread, and the threads that it starts, mounts of their own, without the file systems that can be on a
/// disk of ours: the last process of a mount namespace unmounts what is mounted there, and one that serves the disk
/// below would wait for itself. Files that are open stay so; where `needed` is, its file systems are kept.
pub(super) fn leave_mounts(needed: &[PathBuf]) {
    // SAFETY: no memory is passed; what the thread shared with others (the present folder) is its own from now on.
    if unsafe { libc::unshare(libc::CLONE_FS | libc::CLONE_NEWNS) } != 0 {
        let error = io::Error::last_os_error();
        tracing::info!(%error, "no mount namespace of its own (CAP_SYS_ADMIN)");
        return;
    }
    if let Err(error) = mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC) {
        // Detaching would reach everybody.
        tracing::warn!(%error, "mounts cannot be made private");
        return;
    }
    let mounts = std::fs::read("/proc/self/mountinfo").unwrap_or_default();
    for path in not_kept(&mounts, needed).into_iter().rev() {
        if let Err(error) = unmount(&path, UnmountFlags::DETACH) {
            tracing::debug!(%error, path = %path.display(), "not detached");
        }
    }
}

/// Where the file systems are mounted that are not needed, in the order of mountinfo (proc_pid_mountinfo(5)).
fn not_kept(mountinfo: &[u8], needed: &[PathBuf]) -> Vec<PathBuf> {
    mountinfo
        .split(|byte| *byte == b'\n')
        .filter_map(|line| {
            // 36 35 98:0 /root /mount/point options - type source options
            let mut fields = line.split(|byte| *byte == b' ');
            let point = unescape(fields.nth(4)?);
            let kind = fields.skip_while(|field| *field != b"-").nth(1)?;
            let kept = KEPT.iter().any(|kept| kept.as_bytes() == kind)
                || point == Path::new("/")
                || needed.iter().any(|path| path.starts_with(&point));
            (!kept).then_some(point)
        })
        .collect()
}

/// A path in the files of /proc, where blanks are written as `\040`.
pub(super) fn unescape(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, tail)) = rest.split_first() {
        let octal =
            tail.get(..3).filter(|_| *first == b'\\').and_then(|digits| std::str::from_utf8(digits).ok());
        match octal.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) => {
                bytes.push(byte);
                rest = &tail[3..];
            }
            None => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    PathBuf::from(OsString::from_vec(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_are_left_and_the_kernels_own_file_systems_kept() {
        let mounts = b"21 1 254:0 / / rw - ext4 /dev/vda rw\n\
            22 21 0:5 / /dev rw shared:2 - devtmpfs udev rw\n\
            30 21 259:1 / /srv/my\\040disk rw shared:9 - ext4 /dev/ublkb0 rw\n\
            31 21 0:50 / /data rw - btrfs /dev/ublkb1 rw\n\
            32 21 0:6 / /run rw - tmpfs tmpfs rw\n";
        assert_eq!(not_kept(mounts, &[]), [PathBuf::from("/srv/my disk"), PathBuf::from("/data")]);
        let needed = ["/data/disk.sock", "/srv/my", "/run/pid"].map(PathBuf::from);
        assert_eq!(not_kept(mounts, &needed), [PathBuf::from("/srv/my disk")]);
        assert_eq!(unescape(b"a\\0401\\x\\"), PathBuf::from("a 1\\x\\"));
    }
}
