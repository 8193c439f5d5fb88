//! O_DIRECT: requests of any alignment over a file that takes only aligned ones.
//!
//! What is not aligned goes through a second buffer; a write reads its first and last block, puts its bytes in
//! and writes them back, under an exclusive lock on the range ([`crate::ranges`]). The last block of a file whose size is
//! no multiple of the alignment cannot be written whole without making the file longer: it is read and written
//! through a descriptor that uses the page cache, which the kernel keeps in step with O_DIRECT as long as the
//! two do not run at the same time; the range lock sees to that.

use std::sync::Arc;

use super::Disk;
use crate::ranges::Mode;
use crate::{Buffer, Result};

/// Where an aligned request's blocks lie: all of the file but the last, partial block.
struct Blocks {
    align: u64,
    /// End of the last whole block.
    whole: u64,
}

impl Blocks {
    fn down(&self, offset: u64) -> u64 {
        offset & !(self.align - 1)
    }

    /// Rounded up, but not into the partial block.
    fn up(&self, offset: u64) -> u64 {
        offset.next_multiple_of(self.align).min(self.whole)
    }

    fn aligned(&self, offset: u64, len: usize) -> bool {
        let end = offset + len as u64;
        self.down(offset) == offset && self.down(end) == end && end <= self.whole
    }
}

impl Disk {
    fn blocks(&self, align: u64) -> Blocks {
        Blocks { align, whole: self.size() & !(align - 1) }
    }

    pub(super) async fn read_direct(&self, align: u64, offset: u64, mut buf: Buffer) -> Result<Buffer> {
        let blocks = self.blocks(align);
        if blocks.aligned(offset, buf.len()) {
            let all = 0..buf.len();
            return self.read_part(&self.file, buf, all, offset).await;
        }
        let (start, end) = (blocks.down(offset), blocks.up(offset + buf.len() as u64));
        let mut filled = 0;
        if start < end {
            let bounce = Buffer::new(length(end - start));
            let all = 0..bounce.len();
            let bounce = self.read_part(&self.file, bounce, all, start).await?;
            let from = length(offset - start);
            filled = buf.len().min(bounce.len() - from);
            buf[..filled].copy_from_slice(&bounce[from..from + filled]);
        }
        let rest = filled..buf.len();
        self.read_part(self.tail(), buf, rest, offset + filled as u64).await
    }

    /// To be run to its end, see [`super::aio::to_the_end`].
    pub(super) async fn write_direct(
        &self,
        align: u64,
        offset: u64,
        data: Buffer,
        durable: bool,
    ) -> Result<Buffer> {
        let blocks = self.blocks(align);
        let end = offset + data.len() as u64;
        if blocks.aligned(offset, data.len()) {
            let _lock = self.ranges.lock(offset, end, Mode::Shared).await;
            let all = 0..data.len();
            return self.write_part(self.writer(durable), data, all, offset, durable).await;
        }
        let _lock = self.ranges.lock(offset, end, Mode::Exclusive).await;
        let (start, stop) = (blocks.down(offset), blocks.up(end));
        let mut stored = 0;
        if start < stop {
            let mut bounce = Buffer::new(length(stop - start));
            let block = length(align);
            let from = length(offset - start);
            let last = bounce.len() - block;
            if from > 0 {
                bounce = self.read_part(&self.file, bounce, 0..block, start).await?;
            }
            if end < stop && (last > 0 || from == 0) {
                let part = last..bounce.len();
                bounce = self.read_part(&self.file, bounce, part, start + last as u64).await?;
            }
            stored = data.len().min(bounce.len() - from);
            bounce[from..from + stored].copy_from_slice(&data[..stored]);
            let all = 0..bounce.len();
            self.write_part(self.writer(durable), bounce, all, start, durable).await?;
        }
        let rest = stored..data.len();
        self.write_part(self.tail(), data, rest, offset + stored as u64, durable).await
    }

    /// Returns the descriptor for the last, partial block. Flushes do not use it, so that durable writes need no other.
    fn tail(&self) -> &Arc<std::fs::File> {
        self.cached.as_ref().unwrap_or(&self.file)
    }
}

/// A length that is no longer than a buffer and two blocks.
fn length(len: u64) -> usize {
    usize::try_from(len).unwrap_or(usize::MAX)
}
