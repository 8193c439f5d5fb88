//! Trim and write-zeroes, by whatever the file system or device has.
//!
//! | | may punch holes | space stays allocated (NO_HOLE, or discard=ignore) |
//! |---|---|---|
//! | file | PUNCH_HOLE, else ZERO_RANGE | ZERO_RANGE, else PUNCH_HOLE and allocate again (tmpfs) |
//! | block device | PUNCH_HOLE: the device's own zeroing | ZERO_RANGE, in which the kernel may write zeroes itself |
//! | neither | zeroes are written, in pieces | same |
//!
//! FAST_ZERO stops before anything is written. What was refused once is not tried again.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering::Relaxed};

use rustix::fs::FallocateFlags;
use rustix::io::Errno;

use super::aio::{in_pool, run};

use super::{DiscardMode, Disk, Kind};
use crate::ranges::Mode;
use crate::uring::{Call, Op};
use crate::{Buffer, Error, ErrorKind, Flags, Result, sys};

/// Zeroes are written in pieces of this many bytes. Nobody is charged for them, so that they are small.
const PIECE: u64 = 64 << 10;

const PUNCH: FallocateFlags = FallocateFlags::PUNCH_HOLE.union(FallocateFlags::KEEP_SIZE);
const ZERO: FallocateFlags = FallocateFlags::ZERO_RANGE.union(FallocateFlags::KEEP_SIZE);
const ALLOCATE: FallocateFlags = FallocateFlags::KEEP_SIZE;

/// What this file or device has refused as not supported.
#[derive(Default)]
pub(super) struct Refused(AtomicU8);

#[derive(Clone, Copy)]
enum Way {
    Punch = 1,
    Zero = 2,
    Allocate = 4,
    Discard = 8,
}

impl Way {
    fn mode(self) -> FallocateFlags {
        match self {
            Way::Punch => PUNCH,
            Way::Zero => ZERO,
            Way::Allocate | Way::Discard => ALLOCATE,
        }
    }
}

/// Whether a way was gone, or is not there.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Done {
    Yes,
    NotSupported,
}

impl Disk {
    /// Gives the range's space back where that is possible; what cannot be given back is no error.
    pub(super) async fn trim(this: &Arc<Self>, offset: u64, len: u64, flags: Flags) -> Result<()> {
        if this.options.discard == DiscardMode::Unmap && len > 0 {
            let (start, end) = this.whole_sectors(offset, len);
            if start < end
                && this.fallocate(Way::Punch, start, end - start).await? == Done::NotSupported
                && matches!(this.kind, Kind::Device(_))
            {
                Disk::discard(this, start, end - start).await?;
            }
        }
        this.settle(flags).await
    }

    /// Makes the range read as zeroes.
    ///
    /// # Errors
    /// `NotSupported`, with nothing changed, for FAST_ZERO where zeroes would have to be written.
    pub(super) async fn write_zeroes(this: &Arc<Self>, offset: u64, len: u64, flags: Flags) -> Result<()> {
        if len == 0 {
            return Ok(());
        }
        let keep = flags.contains(Flags::NO_HOLE) || this.options.discard == DiscardMode::Ignore;
        let fast = flags.contains(Flags::FAST_ZERO);
        let (start, end) = this.whole_sectors(offset, len);
        let done = match this.kind {
            _ if start >= end => Done::NotSupported,
            Kind::Regular | Kind::Memory => this.zero_file(offset, len, keep).await?,
            // What the kernel does for ZERO_RANGE it does not tell: it may be writing zeroes.
            Kind::Device(_) if keep && fast => Done::NotSupported,
            Kind::Device(_) => {
                let way = if keep { Way::Zero } else { Way::Punch };
                this.fallocate(way, start, end - start).await?
            }
        };
        match done {
            Done::Yes => {
                this.store_zeroes(offset, start - offset).await?;
                this.store_zeroes(end, offset + len - end).await?;
            }
            Done::NotSupported if fast => {
                return Err(Error::new(ErrorKind::NotSupported, "zeroes would have to be written here"));
            }
            Done::NotSupported => this.store_zeroes(offset, len).await?,
        }
        this.settle(flags).await
    }

    async fn zero_file(&self, offset: u64, len: u64, keep: bool) -> Result<Done> {
        if !keep && self.fallocate(Way::Punch, offset, len).await? == Done::Yes {
            return Ok(Done::Yes);
        }
        if self.fallocate(Way::Zero, offset, len).await? == Done::Yes {
            return Ok(Done::Yes);
        }
        // Allocating changes no data: so it is known to work before the old data goes.
        if keep
            && self.fallocate(Way::Allocate, offset, 1).await? == Done::Yes
            && self.fallocate(Way::Punch, offset, len).await? == Done::Yes
        {
            return self.fallocate(Way::Allocate, offset, len).await;
        }
        Ok(Done::NotSupported)
    }

    /// One fallocate(2), unless it was refused before.
    async fn fallocate(&self, way: Way, offset: u64, len: u64) -> Result<Done> {
        if self.refused.has(way) {
            return Ok(Done::NotSupported);
        }
        // With O_DIRECT it must not run between the halves of a read-modify-write.
        let _lock = match self.direct {
            Some(_) => Some(self.ranges.lock(offset, offset + len, Mode::Shared).await),
            None => None,
        };
        loop {
            let call = Call::Fallocate { mode: way.mode(), offset, len };
            let (_, outcome) = run(self.options.aio, Op { file: self.file.clone(), call }).await?;
            match outcome {
                Ok(_) => return Ok(Done::Yes),
                Err(Errno::INTR) => {}
                Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::NODEV) => {
                    self.refused.add(way);
                    return Ok(Done::NotSupported);
                }
                Err(errno) => return Err(Error::from_errno(errno, "fallocate")),
            }
        }
    }

    /// Reserves space; false where that is not supported.
    pub(super) async fn reserve(&self, offset: u64, len: u64) -> Result<bool> {
        Ok(self.fallocate(Way::Allocate, offset, len).await? == Done::Yes)
    }

    async fn discard(this: &Arc<Self>, offset: u64, len: u64) -> Result<()> {
        if this.refused.has(Way::Discard) {
            return Ok(());
        }
        let file = this.file.clone();
        match in_pool(move || sys::device_discard(&*file, offset, len)).await? {
            Ok(()) => Ok(()),
            Err(Errno::OPNOTSUPP | Errno::INVAL) => {
                this.refused.add(Way::Discard);
                Ok(())
            }
            Err(errno) => Err(Error::from_errno(errno, "discard")),
        }
    }

    /// The part of a range that fallocate takes: on a block device whole sectors only, else all of it. Where it
    /// is empty the answer is (start, start).
    fn whole_sectors(&self, offset: u64, len: u64) -> (u64, u64) {
        let end = offset + len;
        match self.kind {
            Kind::Regular | Kind::Memory => (offset, end),
            Kind::Device(sector) => {
                let sector = u64::from(sector);
                let start = offset.checked_next_multiple_of(sector).unwrap_or(end);
                (start.min(end), (end & !(sector - 1)).max(start.min(end)))
            }
        }
    }

    /// Writes zeroes, piece by piece; other requests of this worker go on in between.
    async fn store_zeroes(self: &Arc<Self>, mut offset: u64, mut len: u64) -> Result<()> {
        while len > 0 {
            let count = len.min(PIECE);
            let mut zeroes = Buffer::new(usize::try_from(count).unwrap_or(0));
            zeroes.fill(0);
            Disk::write(self, offset, zeroes, Flags::NONE).await?;
            offset += count;
            len -= count;
        }
        Ok(())
    }

    /// What is durable before the answer: all of it with FUA.
    async fn settle(&self, flags: Flags) -> Result<()> {
        if self.durable(flags) { self.flush().await } else { Ok(()) }
    }
}

impl Refused {
    fn has(&self, way: Way) -> bool {
        self.0.load(Relaxed) & way as u8 != 0
    }

    fn add(&self, way: Way) {
        self.0.fetch_or(way as u8, Relaxed);
    }

    #[cfg(test)]
    pub(super) fn bits(&self) -> u8 {
        self.0.load(Relaxed)
    }

    #[cfg(test)]
    pub(super) fn refuse_all(&self) {
        self.0.store(u8::MAX, Relaxed);
    }
}
