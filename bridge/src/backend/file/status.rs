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
use crate::{Error, Flags, Result};

/// Most bytes that one request reads ahead.
const READ_AHEAD: u64 = 256 << 20;

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
            Kind::Memory => extents(&this.file, offset, len, limit),
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

/// Describes a range of a file, in at most `limit` extents. What the file system cannot tell is data. Each step
/// moves on even where the file changes while it is looked at.
fn extents(file: &File, offset: u64, len: u64, limit: usize) -> Result<Vec<Extent>> {
    let end = offset + len;
    let mut place = offset;
    let mut extents = Vec::new();
    while place < end && extents.len() < limit {
        let data = match rustix::fs::seek(file, SeekFrom::Data(place)) {
            Ok(data) => data.clamp(place, end),
            Err(Errno::NXIO) => end,
            Err(Errno::INVAL | Errno::OPNOTSUPP) => place,
            Err(errno) => return Err(Error::from_errno(errno, "lseek")),
        };
        if data > place {
            push_extent(&mut extents, data - place, ExtentKind::Hole);
            place = data;
            continue;
        }
        let hole = match rustix::fs::seek(file, SeekFrom::Hole(place)) {
            Ok(hole) if hole > place => hole.min(end),
            Ok(_) | Err(Errno::NXIO) => (place + 1).min(end),
            Err(Errno::INVAL | Errno::OPNOTSUPP) => end,
            Err(errno) => return Err(Error::from_errno(errno, "lseek")),
        };
        push_extent(&mut extents, hole - place, ExtentKind::Data);
        place = hole;
    }
    Ok(extents)
}
