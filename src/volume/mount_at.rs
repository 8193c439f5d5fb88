//! The mount itself: options as the kernel takes them, and why it refuses.

use std::fmt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::{Context, anyhow};
use rustix::io::Errno;
use rustix::mount::MountFlags;

use super::space::Privilege;
use super::{Error, FsKind, Pool, Result, Volume, bounded};
use crate::beneath::Folder;
use crate::helper::{Failure, Task};
use crate::size;

/// A pool with less than that may be why a file system cannot be made or mounted.
const SCANT: u64 = 64 << 20;

impl Volume<'_> {
    /// Mounts the device with the volume's options on a folder, whatever has become of its name.
    pub(super) fn mount_at(&self, device: &Path, point: &Folder, read_only: bool) -> Result<()> {
        self.check_recorded_options()?;
        self.refuse_other_devices(device)?;
        let (mut flags, mut data) = split(&self.record.options.mount);
        if read_only {
            flags |= MountFlags::RDONLY;
        }
        if self.record.fs == FsKind::Xfs {
            // Copies of a volume have its file system's id.
            data.push("nouuid");
        }
        // The last option of its kind overrules those before it, and what the superblock says.
        data.extend(self.record.fs.on_error());
        let fs = self.record.fs.to_string();
        let found = point.handle().metadata().with_context(|| point.path().display().to_string())?;
        let task = Task::Mount {
            device,
            folder: point.path(),
            identity: (found.dev(), found.ino()),
            fs: &fs,
            flags: flags.bits(),
            data: &data.join(","),
        };
        match bounded::run(device, &task)? {
            Ok(_) => Ok(()),
            Err(Failure::Refused(Some(errno), _)) => Err(self.explain(errno, &fs)),
            Err(failure) => {
                Err(Error::Other(anyhow!("volume `{}`: its {fs} cannot be mounted: {failure}", self.name)))
            }
        }
    }

    /// Checks the mount options that the volume was made with: they may have come with a copied folder, or from a version
    /// that allowed more.
    ///
    /// # Errors
    /// [`Error::Refused`] with the way out.
    pub(super) fn check_recorded_options(&self) -> Result<()> {
        let checked = self.pool.check_mount_options(self.record.fs, &self.record.options.mount);
        checked.map_err(|error| {
            Error::Refused(format!(
                "volume `{0}`: {error}; to change what is recorded: nbdbridge volume set {0} -o mount-options=OPTIONS",
                self.name
            ))
        })
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

impl Pool {
    /// Checks the mount options of a volume with this file system.
    ///
    /// # Errors
    /// [`Error::Refused`]: one is not on the file system's list, or needs the pool's consent.
    pub(super) fn check_mount_options(&self, fs: FsKind, options: &str) -> Result<()> {
        fs.check_mount_options(options)?;
        let (flags, _) = split(options);
        let allowed = if flags.contains(SAFE) { Vec::new() } else { self.settings()?.allow };
        for (flag, privilege) in [(MountFlags::NOSUID, Privilege::Suid), (MountFlags::NODEV, Privilege::Dev)]
        {
            if !flags.contains(flag) && !allowed.contains(&privilege) {
                return Err(Error::Refused(format!(
                    "option mount-options={options}: this pool mounts its volumes with no{privilege}; where you trust \
                     whoever makes them: nbdbridge volume pool --allow {privilege}"
                )));
            }
        }
        Ok(())
    }
}

/// Flags that every volume is mounted with, unless its options and its pool say otherwise: what is in a volume is no
/// reason to get more rights on the host.
const SAFE: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV);

/// Mount options as the kernel takes them: some are flags, and the file system's own are text.
fn split(options: &str) -> (MountFlags, Vec<&str>) {
    let (mut flags, mut data) = (SAFE, Vec::new());
    for option in options.split(',').map(str::trim).filter(|option| !option.is_empty()) {
        match option {
            "defaults" | "rw" => {}
            "ro" => flags |= MountFlags::RDONLY,
            "nosuid" => flags |= MountFlags::NOSUID,
            "suid" => flags -= MountFlags::NOSUID,
            "nodev" => flags |= MountFlags::NODEV,
            "dev" => flags -= MountFlags::NODEV,
            "noexec" => flags |= MountFlags::NOEXEC,
            "exec" => flags -= MountFlags::NOEXEC,
            "sync" => flags |= MountFlags::SYNCHRONOUS,
            "async" => flags -= MountFlags::SYNCHRONOUS,
            "dirsync" => flags |= MountFlags::DIRSYNC,
            "noatime" => flags |= MountFlags::NOATIME,
            "atime" => flags -= MountFlags::NOATIME,
            "nodiratime" => flags |= MountFlags::NODIRATIME,
            "diratime" => flags -= MountFlags::NODIRATIME,
            "relatime" => flags |= MountFlags::RELATIME,
            "norelatime" => flags -= MountFlags::RELATIME,
            "strictatime" => flags |= MountFlags::STRICTATIME,
            "nostrictatime" => flags -= MountFlags::STRICTATIME,
            "lazytime" => flags |= MountFlags::LAZYTIME,
            "nolazytime" => flags -= MountFlags::LAZYTIME,
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
        assert_eq!(split(""), (SAFE, vec![]));
        assert_eq!(
            split("noatime, discard,ro,,data=ordered,defaults"),
            (SAFE | MountFlags::NOATIME | MountFlags::RDONLY, vec!["discard", "data=ordered"])
        );
        assert_eq!(split("dev,suid,nosuid,noatime,atime"), (MountFlags::NOSUID, vec![]));
    }
}
