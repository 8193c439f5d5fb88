//! Block status by lseek(2), and reading ahead.
//!
//! What lseek calls a hole reads as zeroes; it may have its space all the same (unwritten extents).

use std::fs::File;
use std::num::NonZeroU64;
use std::sync::Arc;

use rustix::fs::{Advice, SeekFrom};
use rustix::io::Errno;

use super::aio::in_pool;
use super::{Disk, Kind};
use crate::extent::{Extent, ExtentKind, MAX_EXTENTS, push_extent};
use crate::{Error, Flags, Result, sys};

/// Most bytes that one request reads ahead.
const READ_AHEAD: u64 = 256 << 20;

/// Bytes of a file in memory that one system call looks at: at first, and after pieces without a hole.
const FIRST_PIECE: u64 = 256 << 10;
const LAST_PIECE: u64 = 64 << 20;

impl Disk {
    /// See [`crate::Backend::block_status`].
    pub(super) async fn block_status(
        this: &Arc<Self>,
        offset: u64,
        len: u64,
        flags: Flags,
    ) -> Result<Vec<Extent>> {
        let limit = if flags.contains(Flags::REQ_ONE) { 1 } else { MAX_EXTENTS };
        match this.kind {
            // The kernel keeps no map of a device.
            Kind::Device(_) => Ok(vec![Extent { len, kind: ExtentKind::Data }]),
            Kind::Memory => {
                let disk = this.clone();
                in_pool(move || disk.memory_extents(offset, len, limit)).await?
            }
            Kind::Regular => {
                let file = this.file.clone();
                in_pool(move || extents(&file, offset, len, limit)).await?
            }
        }
    }

    /// See [`crate::Backend::cache`].
    pub(super) async fn cache(this: &Arc<Self>, offset: u64, len: u64) -> Result<()> {
        let Some(len) = NonZeroU64::new(len.min(READ_AHEAD)) else { return Ok(()) };
        if this.direct.is_some() || this.kind == Kind::Memory {
            return Ok(());
        }
        let file = this.file.clone();
        // It is advice: what does not take it loses nothing.
        in_pool(move || rustix::fs::fadvise(&*file, offset, Some(len), Advice::WillNeed)).await.map(drop)
    }
}

impl Disk {
    /// Describes a range of a file in memory. There SEEK_HOLE looks at every page up to the next hole, however far behind
    /// the range it is. So cachestat(2) looks at a piece first, and SEEK_HOLE is used only if pages are missing in the
    /// piece: each system call ends with its piece.
    fn memory_extents(&self, offset: u64, len: u64, limit: usize) -> Result<Vec<Extent>> {
        let (mut place, end, mut piece) = (offset, offset + len, FIRST_PIECE);
        let mut found = Vec::new();
        while place < end && found.len() <= limit {
            let count = (end - place).min(piece);
            let (run, kind) = match sys::cachestat(&*self.file, place, count) {
                // Evicted pages of such a file are in swap.
                Ok(stat) if stat.cached.saturating_add(stat.evicted) >= self.pages(place, count) => {
                    piece = (piece * 2).min(LAST_PIECE);
                    (count, ExtentKind::Data)
                }
                Ok(_) => {
                    piece = FIRST_PIECE;
                    let extent = first_extent(&self.file, place, end)?;
                    (extent.len, extent.kind)
                }
                Err(_) => return extents(&self.file, offset, len, limit),
            };
            push_extent(&mut found, run, kind);
            place += run;
        }
        found.truncate(limit);
        Ok(found)
    }
}

/// Describes a range of a file, in at most `limit` extents. Each step moves on even if the file changes meanwhile.
pub(super) fn extents(file: &File, offset: u64, len: u64, limit: usize) -> Result<Vec<Extent>> {
    let end = offset + len;
    let mut place = offset;
    let mut extents = Vec::new();
    while place < end && extents.len() < limit {
        let extent = first_extent(file, place, end)?;
        push_extent(&mut extents, extent.len, extent.kind);
        place += extent.len;
    }
    Ok(extents)
}

/// Returns the extent that begins at `place`, which is before `end`. What the file system cannot tell is data.
fn first_extent(file: &File, place: u64, end: u64) -> Result<Extent> {
    let data = match rustix::fs::seek(file, SeekFrom::Data(place)) {
        Ok(data) => data.clamp(place, end),
        Err(Errno::NXIO) => end,
        Err(Errno::INVAL | Errno::OPNOTSUPP) => place,
        Err(errno) => return Err(Error::from_errno(errno, "lseek")),
    };
    if data > place {
        return Ok(Extent { len: data - place, kind: ExtentKind::Hole });
    }
    let hole = match rustix::fs::seek(file, SeekFrom::Hole(place)) {
        Ok(hole) if hole > place => hole.min(end),
        Ok(_) | Err(Errno::NXIO) => (place + 1).min(end),
        Err(Errno::INVAL | Errno::OPNOTSUPP) => end,
        Err(errno) => return Err(Error::from_errno(errno, "lseek")),
    };
    Ok(Extent { len: hole - place, kind: ExtentKind::Data })
}
