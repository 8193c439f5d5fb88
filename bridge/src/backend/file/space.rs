//! The size of a plain file, and the space that it takes. Block devices have the size they have.

use std::fs::File;
use std::os::unix::fs::FileTypeExt;
use std::sync::Arc;
use std::sync::atomic::Ordering::Release;

use rustix::io::Errno;

use super::aio::in_pool;
use super::{Disk, Kind};
use crate::{Error, ErrorKind, Result, sys};

/// The length of a plain file or the size of a block device, in bytes. For a device stat(2) says 0.
///
/// # Errors
/// That of fstat(2), or of the device.
pub(in crate::backend) fn length(file: &File) -> std::io::Result<u64> {
    let metadata = file.metadata()?;
    if metadata.file_type().is_block_device() { Ok(sys::device_size(file)?) } else { Ok(metadata.len()) }
}

impl Disk {
    /// See [`crate::Backend::grow`]. Never makes the file shorter, whatever somebody else has done to it.
    pub(super) async fn grow(this: &Arc<Self>, size: u64) -> Result<()> {
        if matches!(this.kind, Kind::Device(_)) {
            return Err(Error::new(ErrorKind::NotSupported, "a block device cannot grow"));
        }
        let disk = this.clone();
        in_pool(move || {
            let found = rustix::fs::fstat(&*disk.file).map_err(|errno| Error::from_errno(errno, "fstat"))?;
            if u64::try_from(found.st_size).unwrap_or(0) < size {
                rustix::fs::ftruncate(&*disk.file, size).map_err(grow_error)?;
            }
            disk.size.store(size, Release);
            disk.version.fetch_add(1, Release);
            Ok(())
        })
        .await?
    }

    /// See [`crate::Backend::shrink`].
    pub(super) async fn shrink(this: &Arc<Self>, size: u64) -> Result<()> {
        let disk = this.clone();
        in_pool(move || {
            rustix::fs::ftruncate(&*disk.file, size)
                .map_err(|errno| Error::from_errno(errno, "ftruncate"))?;
            disk.size.store(size, Release);
            disk.version.fetch_add(1, Release);
            Ok(())
        })
        .await?
    }

    /// See [`crate::Backend::allocate`].
    pub(super) async fn allocate(&self, offset: u64, len: u64) -> Result<()> {
        if self.reserve(offset, len).await? {
            return Ok(());
        }
        Err(Error::new(ErrorKind::NotSupported, "the file system cannot reserve space"))
    }

    /// See [`crate::Backend::allocated`].
    pub(super) fn allocated(&self) -> Option<u64> {
        if matches!(self.kind, Kind::Device(_)) {
            return None;
        }
        let found = rustix::fs::fstat(&*self.file).ok()?;
        u64::try_from(found.st_blocks).ok()?.checked_mul(512)
    }
}

fn grow_error(errno: Errno) -> Error {
    match errno {
        // What the file system cannot hold is no mistake of the request.
        Errno::INVAL => Error::from_errno(Errno::FBIG, "ftruncate"),
        errno => Error::from_errno(errno, "ftruncate"),
    }
}
