//! The fast path: page-cache I/O on the caller's thread that allocates nothing and does not wait for storage.
//!
//! What the kernel offers differs by file system, and shows only with real data (an empty write with RWF_NOWAIT
//! succeeds everywhere), so that it is learnt from the first request of each kind:
//!
//! | | reads | writes |
//! |---|---|---|
//! | tmpfs, ramfs | plain: nothing to wait for | plain, any size |
//! | xfs, btrfs | RWF_NOWAIT | RWF_NOWAIT; once in a clock tick plain, for the time of change |
//! | ext4, block devices | RWF_NOWAIT | EOPNOTSUPP: plain, up to 256 KiB, while they are quick |
//! | no RWF_NOWAIT reads (FUSE, some network file systems) | declined | as above |
//!
//! A caller that is patient (`Flags::PATIENT`) has plain writes of any size made at once. A plain write of part of a page that is not in memory would read it first: it is declined. It may still wait, for
//! the inode's lock or for dirty pages to be written. Data that lie in a pipe are spliced where writes are plain. One that took over a millisecond (for each 64 KiB) sends the writes
//! of this file to the slow path for a tenth of a second.

use std::io::{IoSlice, IoSliceMut};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use rustix::fs::SeekFrom;
use rustix::io::{Errno, ReadWriteFlags, retry_on_intr};
use rustix::pipe::SpliceFlags;

use super::slow::shrunken;
use super::{Disk, FileOptions, Kind};
use crate::{Error, ErrorKind, FileRange, Flags, Piped, RangeOrHole, Result, sys};

/// Largest plain write that is made on the caller's thread, in bytes; tmpfs has no such bound. The NBD door stores large
/// payloads in pieces of this size: handed to other threads they cost twice the processor time (ext4, 1 MiB writes).
const INLINE_WRITE: usize = 256 << 10;

/// A plain write that took longer than this, for each [`INLINE_WRITE`] of it, was not quick.
const SLOW_WRITE: Duration = Duration::from_millis(1);

/// The shortest tick of the kernel's clock (CONFIG_HZ=1000), in nanoseconds.
const TICK_NS: u64 = 1_000_000;

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
    /// In bytes.
    page: u64,
    reads: AtomicBool,
    writes: AtomicBool,
    nowait_writes: AtomicBool,
    /// The file takes data from a pipe.
    splices: AtomicBool,
    ranges: AtomicBool,
    /// Until when writes keep off, in nanoseconds after `epoch`.
    keep_off_until: AtomicU64,
    /// When the last plain write was made, likewise; 0 before the first.
    plain_write_at: AtomicU64,
    epoch: Instant,
}

impl Fast {
    pub(super) fn new(kind: Kind, options: &FileOptions, direct: bool) -> Self {
        let plain = kind == Kind::Memory;
        Fast {
            plain,
            page: sys::page_size(),
            reads: AtomicBool::new(!direct),
            writes: AtomicBool::new(plain || !(direct || options.cache.every_write_durable())),
            nowait_writes: AtomicBool::new(true),
            splices: AtomicBool::new(!direct),
            ranges: AtomicBool::new(!direct && !matches!(kind, Kind::Device(_))),
            keep_off_until: AtomicU64::new(0),
            plain_write_at: AtomicU64::new(0),
            epoch: Instant::now(),
        }
    }

    fn now(&self) -> u64 {
        u64::try_from(self.epoch.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    /// Whether a write may have been refused only because the file's time of change is due: the kernel does not set
    /// it in a write that may not wait. A plain write sets it, for the rest of the clock's tick.
    fn time_may_be_due(&self) -> bool {
        let last = self.plain_write_at.load(Relaxed);
        last == 0 || self.now().saturating_sub(last) > TICK_NS
    }

    /// Keeps writes off from this moment, see [`Fast::now`].
    #[cold]
    fn keep_off(&self, now: u64) {
        let until = now.saturating_add(u64::try_from(KEEP_OFF.as_nanos()).unwrap_or(u64::MAX));
        self.keep_off_until.store(until, Relaxed);
        tracing::debug!("a write was slow: writes keep off the fast path");
    }

    #[cfg(test)]
    pub(super) fn keep_off_now(&self) {
        self.keep_off(self.now());
    }

    #[cfg(test)]
    pub(super) fn has_nowait_writes(&self) -> bool {
        !self.plain && self.nowait_writes.load(Relaxed)
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
                Ok(_) => return None,
                Err(Errno::AGAIN) if !self.fast.time_may_be_due() => return None,
                Err(Errno::AGAIN) => {}
                Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => {
                    self.fast.nowait_writes.store(false, Relaxed);
                }
                Err(errno) => return Some(Err(Error::from_errno(errno, "write"))),
            }
        }
        self.write_now(offset, data.len(), flags, || Some(self.write_plain(offset, data)))
    }

    /// The same with data in a pipe, for files with plain writes.
    pub(super) fn try_write_piped(&self, offset: u64, data: Piped<'_>, flags: Flags) -> Option<Result<()>> {
        let fast = &self.fast;
        if !fast.writes.load(Relaxed) || !fast.splices.load(Relaxed) || self.durable(flags) {
            return None;
        }
        if fast.plain {
            return self.splice(offset, data);
        }
        if fast.nowait_writes.load(Relaxed) {
            return None;
        }
        self.write_now(offset, data.len, flags, || self.splice(offset, data))
    }

    /// Makes a plain write of `len` bytes on this thread, unless it may take long.
    fn write_now(
        &self,
        offset: u64,
        len: usize,
        flags: Flags,
        write: impl FnOnce() -> Option<Result<()>>,
    ) -> Option<Result<()>> {
        let begun = self.fast.now();
        if len > INLINE_WRITE && !flags.contains(Flags::PATIENT)
            || begun < self.fast.keep_off_until.load(Relaxed)
            || !self.edges_in_memory(offset, len as u64)
        {
            return None;
        }
        let result = write()?;
        let ended = self.fast.now();
        self.fast.plain_write_at.store(ended, Relaxed);
        if u128::from(ended - begun) > SLOW_WRITE.as_nanos() * len.div_ceil(INLINE_WRITE) as u128 {
            self.fast.keep_off(ended);
        }
        Some(result)
    }

    /// Moves all of the data from the pipe; None where this file takes none, and nothing has been moved.
    fn splice(&self, mut offset: u64, data: Piped<'_>) -> Option<Result<()>> {
        let mut left = data.len;
        while left > 0 {
            let moved = rustix::pipe::splice(
                data.pipe,
                None,
                &*self.file,
                Some(&mut offset),
                left,
                SpliceFlags::MOVE,
            );
            match moved {
                Ok(0) => return Some(Err(Error::new(ErrorKind::Io, "a write stored nothing"))),
                Ok(count) => left -= count,
                Err(Errno::INTR) => {}
                Err(Errno::INVAL | Errno::OPNOTSUPP | Errno::NOSYS) if left == data.len => {
                    self.fast.splices.store(false, Relaxed);
                    return None;
                }
                Err(errno) => return Some(Err(Error::from_errno(errno, "write"))),
            }
        }
        Some(Ok(()))
    }

    /// The start of a range as part of the file, or as a hole, where that can be sent without waiting.
    ///
    /// Not by lseek(2) alone: on storage it may read the file system's metadata and waits for the inode's lock; on
    /// tmpfs it looks at every page up to the next hole, however far that is.
    pub(super) fn file_range(&self, offset: u64, len: u64, flags: Flags) -> Option<RangeOrHole> {
        if len == 0 || !self.fast.ranges.load(Relaxed) || (self.open_ended && !self.reaches(offset + len)) {
            return None;
        }
        match self.fast.plain {
            true if flags.contains(Flags::WHOLE) => Some(self.range(offset, len)),
            true => self.range_in_memory(offset, len),
            false => self.range_in_cache(offset, len),
        }
    }

    /// On storage: cachestat(2) must find every page, and a one-byte read that may not wait must succeed at both
    /// ends, since cachestat counts pages that are still being read, too. Holes are not looked for.
    fn range_in_cache(&self, offset: u64, len: u64) -> Option<RangeOrHole> {
        match sys::cachestat(&*self.file, offset, len) {
            Ok(stat) if stat.cached >= self.pages(offset, len) => {}
            Ok(_) => return None,
            Err(_) => {
                self.fast.ranges.store(false, Relaxed);
                return None;
            }
        }
        let both = self.in_memory(offset) && self.in_memory(offset + len - 1);
        both.then(|| self.range(offset, len))
    }

    /// On tmpfs nothing waits, and holes can be sent like data. Where cachestat(2) shows that there are some, they
    /// are looked for: the search ends within the range.
    fn range_in_memory(&self, offset: u64, len: u64) -> Option<RangeOrHole> {
        let end = offset + len;
        if !sys::cachestat(&*self.file, offset, len).is_ok_and(|stat| self.has_holes(stat, offset, end)) {
            return Some(self.range(offset, len));
        }
        let seek = |from| match rustix::fs::seek(&*self.file, from) {
            Ok(place) => Some(place.clamp(offset, end)),
            Err(Errno::NXIO) => Some(end),
            Err(_) => None,
        };
        let data = seek(SeekFrom::Data(offset))?;
        if data > offset {
            return Some(RangeOrHole::Hole(data - offset));
        }
        let mut hole = offset;
        for _ in 0..MAX_SEEKS / 2 {
            // Without a hole in the rest of the range, the search would go on behind it.
            if hole > offset
                && !sys::cachestat(&*self.file, hole, end - hole)
                    .is_ok_and(|stat| self.has_holes(stat, hole, end))
            {
                hole = end;
                break;
            }
            hole = seek(SeekFrom::Hole(hole))?;
            let next = if hole < end { seek(SeekFrom::Data(hole))? } else { end };
            if hole >= end || next >= hole.saturating_add(MIN_HOLE) {
                break;
            }
            hole = next;
        }
        // The file may change while it is looked at.
        (hole > offset).then(|| self.range(offset, hole - offset))
    }

    /// Returns true if a range of a file in memory has holes, by what was counted in it. Pages that were swapped out are missing
    /// too, but are no holes.
    fn has_holes(&self, stat: sys::CacheStat, start: u64, end: u64) -> bool {
        stat.cached < self.pages(start, end - start) && stat.evicted == 0
    }

    /// Whether the file is at least this long now.
    fn reaches(&self, end: u64) -> bool {
        self.file.metadata().is_ok_and(|metadata| metadata.len() >= end)
    }

    fn range(&self, offset: u64, len: u64) -> RangeOrHole {
        RangeOrHole::Range(FileRange { file: self.file.clone(), offset, len })
    }

    pub(super) fn pages(&self, offset: u64, len: u64) -> u64 {
        (offset + len).div_ceil(self.fast.page) - offset / self.fast.page
    }

    /// Whether the first and last page of a range are in memory, where they are no whole pages. What is past the
    /// end of the file needs no reading.
    fn edges_in_memory(&self, offset: u64, len: u64) -> bool {
        let end = offset + len;
        (offset.is_multiple_of(self.fast.page) || self.in_memory(offset))
            && (end.is_multiple_of(self.fast.page) || end == self.size() || self.in_memory(end - 1))
    }

    /// Whether a byte can be read without waiting.
    fn in_memory(&self, place: u64) -> bool {
        matches!(self.try_read(place, &mut [0]), Some(Ok(())))
    }

    fn read_plain(&self, mut offset: u64, mut buf: &mut [u8]) -> Result<()> {
        while !buf.is_empty() {
            match rustix::io::pread(&*self.file, &mut *buf, offset) {
                Ok(0) if self.open_ended => {
                    buf.fill(0);
                    return Ok(());
                }
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
}
