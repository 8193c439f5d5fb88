//! A volume's disk as a file that nobody serves: how large it is, and larger.

use std::io;
use std::path::Path;

use anyhow::{Context, Result, anyhow};
use bridge::backend::file::FileOptions;
use bridge::backend::image::{ImageAccess, ImageFormat, describe};

use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;

use super::options::DiskFormat;
use crate::assemble;
use crate::beneath::Entry;
use crate::size::human;

/// The format by its name in `bridge`.
fn image_format(format: DiskFormat) -> ImageFormat {
    match format {
        DiskFormat::Raw => ImageFormat::Raw,
        DiskFormat::Qcow2 => ImageFormat::Qcow2,
    }
}

/// The size of the disk in bytes. It may be served meanwhile.
///
/// # Errors
/// One line: it cannot be read, or is no such image.
pub(super) fn size(disk: &Entry, format: DiskFormat) -> Result<u64> {
    let via = disk.via();
    let found = describe(&via, Some(image_format(format)), false);
    let found = found.map_err(|error| named(&error.into(), &via, disk.path()))?;
    Ok(found.size.unwrap_or(found.length))
}

/// An error that names a disk by its path, and not by the one that it was opened by.
pub(super) fn named(error: &anyhow::Error, via: &Path, path: &Path) -> anyhow::Error {
    anyhow!("{}", format!("{error:#}").replace(&via.display().to_string(), &path.display().to_string()))
}

/// Makes the disk `size` bytes long, and that durable; a larger one stays as it is. Nobody serves it meanwhile.
///
/// # Errors
/// One line: it is in use, there is no space.
pub(super) fn grow(disk: &Entry, format: DiskFormat, size: u64) -> Result<()> {
    let options = FileOptions { via: Some(disk.via()), ..FileOptions::default() };
    let format = Some(image_format(format));
    let image = assemble::open_image(disk.path(), format, options, ImageAccess::default())?;
    let grown = assemble::apart(|| async {
        if image.geometry().size < size {
            image.grow(size).await?;
        }
        image.flush().await
    })?;
    grown.with_context(|| format!("{}: cannot grow it", disk.path().display()))
}

/// Takes the space of what a raw disk grows by, and makes it so long. Whoever serves it does not notice yet.
///
/// # Errors
/// One line: there is no space; the disk keeps its size then.
pub(super) fn reserve(disk: &Entry, size: u64) -> Result<()> {
    let reserve = || -> io::Result<()> {
        let file = disk.open(true)?;
        let now = file.metadata()?.len();
        if now < size
            && let Err(errno) = fallocate(&file, FallocateFlags::empty(), now, size - now)
        {
            // It may have come to a part of it.
            file.set_len(now)?;
            return Err(errno.into());
        }
        file.sync_all()
    };
    reserve().with_context(|| format!("{}: cannot reserve {}", disk.path().display(), human(size)))
}

/// Takes all the space of a raw disk, makes it `size` bytes long, and that durable; no block stays shared where that can
/// be.
///
/// # Errors
/// One line: there is no space.
pub(super) fn reserve_all(disk: &Entry, size: u64) -> Result<()> {
    let reserve = || -> io::Result<()> {
        let file = disk.open(true)?;
        fallocate(&file, FallocateFlags::empty(), 0, size)?;
        match fallocate(&file, FallocateFlags::UNSHARE_RANGE, 0, size) {
            Err(errno) if errno != Errno::OPNOTSUPP => return Err(errno.into()),
            _ => {}
        }
        file.sync_all()
    };
    reserve().with_context(|| format!("{}: cannot reserve {}", disk.path().display(), human(size)))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use bridge::backend::image::{CreateOptions, create};

    use super::*;

    #[test]
    fn both_formats_grow_and_none_shrinks() {
        let folder = tempfile::tempdir().unwrap();
        let (raw, qcow2) = (folder.path().join("disk.raw"), folder.path().join("disk.qcow2"));
        std::fs::File::create(&raw).unwrap().set_len(1 << 20).unwrap();
        let options = CreateOptions {
            size: Some(1 << 20),
            cluster_size: 65536,
            backing: None,
            backing_format: None,
            any_backing: false,
        };
        create(&qcow2, &options).unwrap();
        let root = crate::beneath::Folder::root(folder.path()).unwrap();
        let image = raw.clone();
        let [raw, qcow2] = ["disk.raw", "disk.qcow2"].map(|name| root.file(name).unwrap());
        for (path, format) in [(&raw, DiskFormat::Raw), (&qcow2, DiskFormat::Qcow2)] {
            assert_eq!(size(path, format).unwrap(), 1 << 20);
            grow(path, format, 3 << 20).unwrap();
            assert_eq!(size(path, format).unwrap(), 3 << 20);
            grow(path, format, 2 << 20).unwrap();
            assert_eq!(size(path, format).unwrap(), 3 << 20);
        }
        reserve(&raw, 4 << 20).unwrap();
        reserve(&raw, 1 << 20).unwrap();
        assert_eq!(size(&raw, DiskFormat::Raw).unwrap(), 4 << 20);
        assert!(image.metadata().unwrap().blocks() * 512 >= 1 << 20, "the space is not reserved");
        let line = size(&raw, DiskFormat::Qcow2).unwrap_err().to_string();
        assert!(line.contains("disk.raw") && !line.contains("/proc/"), "{line}");
    }

    #[test]
    fn a_disk_that_names_another_file_is_not_grown() {
        let home = tempfile::tempdir().unwrap();
        std::fs::File::create(home.path().join("base")).unwrap().set_len(1 << 20).unwrap();
        let options = CreateOptions {
            size: None,
            cluster_size: 65536,
            backing: Some("base".into()),
            backing_format: None,
            any_backing: false,
        };
        create(&home.path().join("disk.qcow2"), &options).unwrap();
        let root = crate::beneath::Folder::root(home.path()).unwrap();
        let error = grow(&root.file("disk.qcow2").unwrap(), DiskFormat::Qcow2, 2 << 20).unwrap_err();
        assert!(error.to_string().contains("names another file"), "{error}");
    }
}
