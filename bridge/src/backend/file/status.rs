//! Block status by lseek(2), and reading ahead.
//!
//! What lseek calls a hole reads as zeroes; it may have its space all the same (unwritten extents).

use std::fs::File;
use std::num::NonZeroU64;
use std::sync::{Arc, Mutex, PoisonError};

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

/// Extents that one step over a file in memory finds at most.
const STEP_EXTENTS: usize = 1024;

/// Held by the step that runs. By a thread of the pool, and not by a request, which might not be polled for a while.
static STEP: Mutex<()> = Mutex::new(());

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
            Kind::Memory => Self::memory_extents(this, offset, len, limit).await,
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

/// A walk over a range of a file in memory.
struct Walk {
    place: u64,
    end: u64,
    /// Bytes that the next system call looks at.
    piece: u64,
    found: Vec<Extent>,
    limit: usize,
}

impl Walk {
    fn is_over(&self) -> bool {
        self.place >= self.end || self.found.len() > self.limit
    }
}

impl Disk {
    /// Describes a range of a file in memory, step by step. The kernel keeps a core busy with a step, so that one step runs
    /// at a time in the process, and requests take turns: the workers keep their cores.
    async fn memory_extents(this: &Arc<Self>, offset: u64, len: u64, limit: usize) -> Result<Vec<Extent>> {
        let (end, found) = (offset + len, Vec::new());
        let mut walk = Walk { place: offset, end, piece: FIRST_PIECE, found, limit };
        while !walk.is_over() {
            let disk = this.clone();
            walk = in_pool(move || disk.step(walk)).await??;
        }
        walk.found.truncate(limit);
        Ok(walk.found)
    }

    /// Goes on with a walk, for [`LAST_PIECE`] bytes or [`STEP_EXTENTS`] extents. SEEK_HOLE looks at every page up to the next
    /// hole, however far behind the range it is. So cachestat(2) looks at a piece first, and SEEK_HOLE is used only if pages
    /// are missing in the piece: each system call ends with its piece.
    fn step(&self, mut walk: Walk) -> Result<Walk> {
        let _turn = STEP.lock().unwrap_or_else(PoisonError::into_inner);
        let (start, mut pieces) = (walk.place, 0);
        while !walk.is_over() && walk.place - start < LAST_PIECE && pieces < STEP_EXTENTS {
            let count = (walk.end - walk.place).min(walk.piece);
            let (run, kind) = match sys::cachestat(&*self.file, walk.place, count) {
                // Evicted pages of such a file are in swap.
                Ok(stat) if stat.cached.saturating_add(stat.evicted) >= self.pages(walk.place, count) => {
                    walk.piece = (walk.piece * 2).min(LAST_PIECE);
                    (count, ExtentKind::Data)
                }
                // There is no cachestat before 6.5.
                Ok(_) | Err(_) => {
                    walk.piece = FIRST_PIECE;
                    let extent = first_extent(&self.file, walk.place, walk.end)?;
                    (extent.len, extent.kind)
                }
            };
            push_extent(&mut walk.found, run, kind);
            walk.place += run;
            pieces += 1;
        }
        Ok(walk)
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
