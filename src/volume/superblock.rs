//! File systems that name a second device: an ext4 with its journal elsewhere, a btrfs of several devices. The kernel and
//! the check programs would look for that device on the whole host, and write to it. A volume is one device, so that a
//! superblock which says so comes from somebody else.

use std::path::Path;

use anyhow::Context;

use super::{Error, FsKind, Result, Volume, bounded};
use crate::helper::Task;

/// Where the superblock of ext4 is, and its fields in it (fs/ext4/ext4.h).
mod ext4 {
    pub(super) const AT: u64 = 1024;
    pub(super) const MAGIC: (usize, &[u8]) = (0x38, &[0x53, 0xef]);
    pub(super) const COMPATIBLE: usize = 0x5c;
    pub(super) const HAS_JOURNAL: u32 = 0x4;
    pub(super) const JOURNAL_INODE: usize = 0xe0;
    pub(super) const JOURNAL_DEVICE: usize = 0xe4;
}

/// The same of btrfs (include/uapi/linux/btrfs_tree.h).
mod btrfs {
    pub(super) const AT: u64 = 0x1_0000;
    pub(super) const MAGIC: (usize, &[u8]) = (0x40, b"_BHRfS_M");
    pub(super) const DEVICES: usize = 0x88;
}

/// Bytes of a superblock that are looked at.
const LEN: usize = 512;

impl Volume<'_> {
    /// Refuses a file system that names a device beside its own.
    ///
    /// # Errors
    /// [`Error::Refused`]; the device cannot be read.
    pub(super) fn refuse_other_devices(&self, device: &Path) -> Result<()> {
        let at = match self.record.fs {
            FsKind::Ext4 => ext4::AT,
            FsKind::Btrfs => btrfs::AT,
            // Without an option that names it, the kernel refuses an xfs with a log elsewhere.
            FsKind::Xfs | FsKind::None => return Ok(()),
        };
        let read = bounded::run(device, &Task::Read { file: device, offset: at, len: LEN })?;
        let superblock = read.ok().and_then(|bytes| <[u8; LEN]>::try_from(bytes).ok());
        let superblock =
            superblock.with_context(|| format!("{}: cannot read its superblock", device.display()))?;
        match other_device(self.record.fs, &superblock) {
            None => Ok(()),
            Some(what) => Err(Error::Refused(format!(
                "volume `{}`: its {} {what}: another device of this host would be written to; make the file system anew \
                 on one device",
                self.name, self.record.fs
            ))),
        }
    }
}

/// Words for the second device that a superblock names.
fn other_device(fs: FsKind, superblock: &[u8; LEN]) -> Option<&'static str> {
    let number = |at: usize| {
        let bytes = superblock.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
        bytes.map_or(0, u32::from_le_bytes)
    };
    let has = |(at, magic): (usize, &[u8])| superblock.get(at..at + magic.len()) == Some(magic);
    match fs {
        // Neither the kernel nor a check goes by a superblock without this.
        FsKind::Ext4 if !has(ext4::MAGIC) => None,
        FsKind::Btrfs if !has(btrfs::MAGIC) => None,
        FsKind::Ext4 => {
            let no_inode =
                number(ext4::COMPATIBLE) & ext4::HAS_JOURNAL != 0 && number(ext4::JOURNAL_INODE) == 0;
            (no_inode || number(ext4::JOURNAL_DEVICE) != 0).then_some("has its journal on another device")
        }
        FsKind::Btrfs => {
            let one = number(btrfs::DEVICES) == 1 && number(btrfs::DEVICES + 4) == 0;
            (!one).then_some("spreads over several devices")
        }
        FsKind::Xfs | FsKind::None => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn superblocks_with_one_device_and_with_more() {
        let with = |fields: &[(usize, u32)]| {
            let mut superblock = [0; LEN];
            superblock[0x38..0x3a].copy_from_slice(&[0x53, 0xef]);
            superblock[0x40..0x48].copy_from_slice(b"_BHRfS_M");
            for (at, value) in fields {
                superblock[*at..*at + 4].copy_from_slice(&value.to_le_bytes());
            }
            superblock
        };
        for (fs, fields, is_one) in [
            (FsKind::Ext4, &[(0x5c, 0x4), (0xe0, 8)][..], true),
            (FsKind::Ext4, &[], true),
            (FsKind::Ext4, &[(0x5c, 0x4)], false),
            (FsKind::Ext4, &[(0x5c, 0x4), (0xe0, 8), (0xe4, 0x801)], false),
            (FsKind::Btrfs, &[(0x88, 1)], true),
            (FsKind::Btrfs, &[(0x88, 2)], false),
            (FsKind::Btrfs, &[(0x88, 1), (0x8c, 1)], false),
            (FsKind::Xfs, &[], true),
        ] {
            assert_eq!(other_device(fs, &with(fields)).is_none(), is_one, "{fs} {fields:x?}");
        }
        assert!(other_device(FsKind::Btrfs, &[0; LEN]).is_none(), "no superblock at all");
    }
}
