//! The fast path: page-cache I/O on the caller's thread that allocates nothing and does not wait for storage.
//!
//! What the kernel offers differs by file system, and shows only with real data (an empty write with RWF_NOWAIT
//! succeeds everywhere), so that it is learnt from the first request of each kind:
//!
//! | | reads | writes |
//! |---|---|---|
//! | tmpfs, ramfs | plain: nothing to wait for | plain, any size |
//! | xfs, btrfs | RWF_NOWAIT | RWF_NOWAIT |
//! | ext4, block devices | RWF_NOWAIT | EOPNOTSUPP: plain, up to 64 KiB, while they are quick |
//! | no RWF_NOWAIT reads (FUSE, some network file systems) | declined | as above |
//!
//! A plain write may still wait, for the inode's lock or for dirty pages to be written. One that took over a
//! millisecond sends the writes of this file to the slow path for a tenth of a second.

use std::io::{IoSlice, IoSliceMut};
use std::num::NonZeroU64;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use rustix::fs::SeekFrom;
use rustix::io::{Errno, ReadWriteFlags, retry_on_intr};

use super::slow::shrunken;
use super::{Disk, FileOptions, Kind};
use crate::{Error, ErrorKind, FileRange, Flags, RangeOrHole, Result, sys};

/// Largest plain write that is made on the caller's thread, in bytes; tmpfs has no such bound.
const INLINE_WRITE: usize = 64 << 10;

/// A plain write that took longer than this was not quick.
const SLOW_WRITE: Duration = Duration::from_millis(1);

/// For how long writes keep off the fast path then.
const KEEP_OFF: Duration = Duration::from_millis(100);

/// Holes within a file range that are shorter than this are sent as data.
const MIN_HOLE: u64 = 64 << 10;

/// Most lseek(2) calls for one file range.
const MAX_SEEKS: u32 = 16;

/// What is known about this file's fast path.
pub(super) struct Fast {
    /// Plain calls do not wait (tmpfs).
    plain: bool,
    reads: AtomicBool,
    writes: AtomicBool,
    nowait_writes: AtomicBool,
    ranges: AtomicBool,
    /// Until when writes keep off, in nanoseconds after `epoch`.
    keep_off_until: AtomicU64,
    epoch: Instant,
}

impl Fast {
    pub(super) fn new(kind: Kind, options: &FileOptions, direct: bool) -> Self {
        let plain = kind == Kind::Memory;
        Fast {
            plain,
            reads: AtomicBool::new(!direct),
            writes: AtomicBool::new(plain || !(direct || options.cache.every_write_durable())),
            nowait_writes: AtomicBool::new(true),
            ranges: AtomicBool::new(!direct && !matches!(kind, Kind::Device(_))),
            keep_off_until: AtomicU64::new(0),
            epoch: Instant::now(),
        }
    }

    fn now(&self) -> u64 {
        u64::try_from(self.epoch.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }
}

impl Disk {
    /// Reads the whole buffer from the page cache, or declines.
    #[inline]
    pub(super) fn try_read(&self, offset: u64, buf: &mut [u8]) -> Option<Result<()>> {
        if !self.fast.reads.load(Relaxed) {
            return None;
        }
        if self.fast.plain {
            return Some(self.read_plain(offset, buf));
        }
        let count = |buf: &mut [u8]| {
            rustix::io::preadv2(&*self.file, &mut [IoSliceMut::new(buf)], offset, ReadWriteFlags::NOWAIT)
        };
        match retry_on_intr(|| count(buf)) {
            Ok(count) if count == buf.len() => Some(Ok(())),
            // Short: the rest is not in memory, or the file has become shorter. The slow path finds out.
            Ok(_) | Err(Errno::AGAIN) => None,
            Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => {
                self.fast.reads.store(false, Relaxed);
                None
            }
            Err(errno) => Some(Err(Error::from_errno(errno, "read"))),
        }
    }

    /// Stores all of the data in the page cache, or declines.
    #[inline]
    pub(super) fn try_write(&self, offset: u64, data: &[u8], flags: Flags) -> Option<Result<()>> {
        if !self.fast.writes.load(Relaxed) || self.durable(flags) {
            return None;
        }
        if self.fast.plain {
            return Some(self.write_plain(offset, data));
        }
        if self.fast.nowait_writes.load(Relaxed) {
            let write =
                || rustix::io::pwritev2(&*self.file, &[IoSlice::new(data)], offset, ReadWriteFlags::NOWAIT);
            match retry_on_intr(write) {
                Ok(count) if count == data.len() => return Some(Ok(())),
                // A part was stored: the slow path stores it again with the rest.
                Ok(_) | Err(Errno::AGAIN) => return None,
                Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => {
                    self.fast.nowait_writes.store(false, Relaxed);
                }
                Err(errno) => return Some(Err(Error::from_errno(errno, "write"))),
            }
        }
        if data.len() > INLINE_WRITE {
            return None;
        }
        let begun = self.fast.now();
        if begun < self.fast.keep_off_until.load(Relaxed) {
            return None;
        }
        let result = self.write_plain(offset, data);
        let ended = self.fast.now();
        if u128::from(ended - begun) > SLOW_WRITE.as_nanos() {
            self.keep_off(ended);
        }
        Some(result)
    }

    /// The start of a range as part of the file, or as a hole, where that can be sent without waiting.
    ///
    /// cachestat(2) must find every page. On tmpfs, where it does not, lseek(2) tells data from holes. Elsewhere
    /// lseek waits for the file's inode lock, so that it is asked only where the range begins and ends with a zero
    /// and may be a hole whose zeroes are cached; and a one-byte read that may not wait must succeed at both ends,
    /// since cachestat counts pages that are still being read, too.
    pub(super) fn file_range(&self, offset: u64, len: u64) -> Option<RangeOrHole> {
        if len == 0 || !self.fast.ranges.load(Relaxed) {
            return None;
        }
        /// cachestat counts in pages; a larger page than this only makes the count look too small.
        const PAGE: u64 = 4096;
        let pages = (offset + len).div_ceil(PAGE) - offset / PAGE;
        let range = || Some(RangeOrHole::Range(FileRange { file: self.file.clone(), offset, len }));
        match sys::cachestat(&*self.file, offset, len) {
            // Asked first on tmpfs too: SEEK_HOLE reads on to the end of the file where there is no hole.
            Ok(stat) if stat.cached >= pages && self.fast.plain => return range(),
            Ok(_) if self.fast.plain => return self.seek_range(offset, len),
            Ok(stat) if stat.cached >= pages => {}
            Ok(_) => return None,
            // Where nobody tells, holes of a tmpfs are sent as the zeroes they read as.
            Err(_) if self.fast.plain => return range(),
            Err(_) => {
                self.fast.ranges.store(false, Relaxed);
                return None;
            }
        }
        let mut ends = [[0], [0]];
        for (place, byte) in [offset, offset + len - 1].into_iter().zip(&mut ends) {
            self.try_read(place, byte)?.ok()?;
        }
        // A hole may be cached too, as pages of zeroes.
        if ends == [[0], [0]] {
            return self.seek_range(offset, len);
        }
        range()
    }

    fn seek_range(&self, offset: u64, len: u64) -> Option<RangeOrHole> {
        let end = offset + len;
        let seek = |from| match rustix::fs::seek(&*self.file, from) {
            Ok(place) => Some(place.clamp(offset, end)),
            Err(Errno::NXIO) => Some(end),
            Err(_) => None,
        };
        let data = seek(SeekFrom::Data(offset))?;
        if data > offset {
            return Some(RangeOrHole::Hole(data - offset));
        }
        let mut hole = seek(SeekFrom::Hole(offset))?;
        for _ in 0..MAX_SEEKS / 2 {
            if hole >= end {
                break;
            }
            let next = seek(SeekFrom::Data(hole))?;
            if next >= hole.saturating_add(MIN_HOLE) {
                break;
            }
            hole = if next < end { seek(SeekFrom::Hole(next))?.max(next + 1) } else { end };
        }
        // The file may change while it is looked at.
        let len = NonZeroU64::new(hole.min(end).checked_sub(offset)?)?.get();
        Some(RangeOrHole::Range(FileRange { file: self.file.clone(), offset, len }))
    }

    fn read_plain(&self, mut offset: u64, mut buf: &mut [u8]) -> Result<()> {
        while !buf.is_empty() {
            match rustix::io::pread(&*self.file, &mut *buf, offset) {
                Ok(0) => return Err(shrunken()),
                Ok(count) => {
                    offset += count as u64;
                    buf = buf.split_at_mut(count).1;
                }
                Err(Errno::INTR) => {}
                Err(errno) => return Err(Error::from_errno(errno, "read")),
            }
        }
        Ok(())
    }

    fn write_plain(&self, mut offset: u64, mut data: &[u8]) -> Result<()> {
        while !data.is_empty() {
            match rustix::io::pwrite(&*self.file, data, offset) {
                Ok(0) => return Err(Error::new(ErrorKind::Io, "a write stored nothing")),
                Ok(count) => {
                    offset += count as u64;
                    data = &data[count..];
                }
                Err(Errno::INTR) => {}
                Err(errno) => return Err(Error::from_errno(errno, "write")),
            }
        }
        Ok(())
    }

    #[cold]
    fn keep_off(&self, now: u64) {
        let until = now.saturating_add(u64::try_from(KEEP_OFF.as_nanos()).unwrap_or(u64::MAX));
        self.fast.keep_off_until.store(until, Relaxed);
        tracing::debug!(path = %self.path.display(), "a write was slow: writes keep off the fast path");
    }
}
