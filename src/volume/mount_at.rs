//! The mount itself: options as the kernel takes them, and why it refuses.

use std::ffi::CString;
use std::fmt;
use std::path::Path;

use anyhow::{Context, anyhow};
use rustix::io::Errno;
use rustix::mount::MountFlags;

use super::{Error, FsKind, Result, Volume};
use crate::size;

/// A pool with less than that may be why a file system cannot be made or mounted.
const SCANT: u64 = 64 << 20;

impl Volume<'_> {
    /// Mounts the device with the volume's options.
    pub(super) fn mount_at(&self, device: &Path, point: &Path, read_only: bool) -> Result<()> {
        let (mut flags, mut data) = split(&self.record.options.mount);
        if read_only {
            flags |= MountFlags::RDONLY;
        }
        if self.record.fs == FsKind::Xfs {
            // Copies of a volume have its file system's id.
            data.push("nouuid");
        }
        let data = CString::new(data.join(",")).context("mount options")?;
        let fs = self.record.fs.to_string();
        let mounted = rustix::mount::mount(device, point, fs.as_str(), flags, Some(data.as_c_str()));
        mounted.map_err(|errno| self.explain(errno, &fs))
    }

    fn explain(&self, errno: Errno, fs: &str) -> Error {
        let (name, options) = (&self.name, &self.record.options.mount);
        match errno {
            Errno::INVAL if !options.is_empty() => Error::Refused(format!(
                "volume `{name}`: the kernel cannot mount it with mount-options={options}, or its {fs} is damaged \
                 (nbdbridge volume fsck {name})"
            )),
            Errno::NODEV => Error::Other(anyhow!("volume `{name}`: this kernel has no {fs} (modprobe {fs})")),
            errno => Error::Broken(format!(
                "volume `{name}`: its {fs} cannot be mounted: {errno}; nbdbridge volume fsck {name} looks at it"
            )),
        }
    }

    /// Tells of a full pool, where that can be why: a disk without room fails like a broken one.
    pub(super) fn blame(&self, error: Error) -> Error {
        let Some(space) = self.pool.space().ok().filter(|space| space.free < SCANT) else { return error };
        let told =
            |line: &dyn fmt::Display| format!("{line} (its pool has {} left)", size::human(space.free));
        match error {
            Error::Broken(line) => Error::Broken(told(&line)),
            Error::Other(error) => Error::Other(anyhow!(told(&format_args!("{error:#}")))),
            error => error,
        }
    }
}

/// Mount options as the kernel takes them: some are flags, and the file system's own are text.
fn split(options: &str) -> (MountFlags, Vec<&str>) {
    let (mut flags, mut data) = (MountFlags::empty(), Vec::new());
    for option in options.split(',').map(str::trim).filter(|option| !option.is_empty()) {
        match option {
            "defaults" | "rw" => {}
            "ro" => flags |= MountFlags::RDONLY,
            "nosuid" => flags |= MountFlags::NOSUID,
            "nodev" => flags |= MountFlags::NODEV,
            "noexec" => flags |= MountFlags::NOEXEC,
            "sync" => flags |= MountFlags::SYNCHRONOUS,
            "dirsync" => flags |= MountFlags::DIRSYNC,
            "noatime" => flags |= MountFlags::NOATIME,
            "nodiratime" => flags |= MountFlags::NODIRATIME,
            "relatime" => flags |= MountFlags::RELATIME,
            "strictatime" => flags |= MountFlags::STRICTATIME,
            "lazytime" => flags |= MountFlags::LAZYTIME,
            other => data.push(other),
        }
    }
    (flags, data)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_and_text() {
        assert_eq!(split(""), (MountFlags::empty(), vec![]));
        assert_eq!(
            split("noatime, discard,ro,,data=ordered,defaults"),
            (MountFlags::NOATIME | MountFlags::RDONLY, vec!["discard", "data=ordered"])
        );
    }
}
