//! A file system as large as its device has become.
//!
//! | | mounted | not mounted |
//! |---|---|---|
//! | ext4 | resize2fs (needs CAP_SYS_RESOURCE) | e2fsck, resize2fs |
//! | xfs | xfs_growfs | by mounting it |
//! | btrfs | btrfs filesystem resize | by mounting it |
//!
//! Growing one that is large enough already changes nothing.

use std::ffi::OsStr;
use std::path::Path;

use super::filesystem::{Check, find, run, said};
use super::{Error, FsKind, Result};

impl FsKind {
    /// The program that grows it, and its package; None where nothing grows.
    fn grower(self) -> Option<(&'static str, &'static str)> {
        match self {
            FsKind::Ext4 => Some(("resize2fs", "e2fsprogs")),
            FsKind::Xfs => Some(("xfs_growfs", "xfsprogs")),
            FsKind::Btrfs => Some(("btrfs", "btrfs-progs")),
            FsKind::None => None,
        }
    }

    /// Sees to it that it can be grown here.
    ///
    /// # Errors
    /// A line that names the missing program and its package.
    pub(super) fn check_grower(self) -> Result<()> {
        self.grower().map_or(Ok(()), |(program, package)| find(program, package))
    }

    /// Whether it can be grown, and only then, while it is not mounted.
    pub(super) fn grows_unmounted(self) -> bool {
        self == FsKind::Ext4
    }

    /// Grows one that is mounted.
    ///
    /// # Errors
    /// What the program says.
    pub(super) fn grow_mounted(self, device: &Path, point: &Path) -> Result<()> {
        match self {
            FsKind::Btrfs => self
                .grow(device, &["filesystem".as_ref(), "resize".as_ref(), "max".as_ref(), point.as_os_str()]),
            FsKind::Xfs => self.grow(device, &[point.as_os_str()]),
            FsKind::Ext4 | FsKind::None => self.grow(device, &[device.as_os_str()]),
        }
    }

    /// Grows an ext4 that is not mounted.
    ///
    /// # Errors
    /// What the program says; that it is damaged.
    pub(super) fn grow_unmounted(self, device: &Path) -> Result<()> {
        // resize2fs insists on a check since the last mount.
        self.check(device, Check::Thorough)?;
        let grown = self.grow(device, &[device.as_os_str()]);
        if grown.is_err() {
            // It may have come half way.
            self.check(device, Check::Thorough)?;
        }
        grown
    }

    fn grow(self, device: &Path, words: &[&OsStr]) -> Result<()> {
        let Some((program, package)) = self.grower() else { return Ok(()) };
        let output = run(program, package, device, |command| command.args(words))?;
        if output.status.success() {
            return Ok(());
        }
        Err(Error::Other(anyhow::anyhow!("{program}: {}", said(&output))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_program_is_named_with_its_package() {
        let line = find("nbdbridge-grows-no-such-fs", "no-such-package").unwrap_err().to_string();
        assert!(
            line.contains("nbdbridge-grows-no-such-fs") && line.contains("install no-such-package"),
            "{line}"
        );
        find("sh", "dash").unwrap();
    }

    #[test]
    fn nothing_needs_no_program() {
        FsKind::None.check_grower().unwrap();
        FsKind::None.grow_mounted(Path::new("/dev/null"), Path::new("/")).unwrap();
    }

    #[test]
    fn what_the_program_says_is_told() {
        if find("resize2fs", "e2fsprogs").is_err() {
            eprintln!("SKIP: what_the_program_says_is_told: no resize2fs here");
            return;
        }
        let nowhere = Path::new("/no/such/device");
        let error = FsKind::Ext4.grow_mounted(nowhere, Path::new("/")).unwrap_err();
        assert!(error.to_string().contains("resize2fs") && error.to_string().lines().count() == 1, "{error}");
    }
}
