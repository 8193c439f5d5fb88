//! A copy-on-write overlay: the base is only ever read, what is written goes to a file beside it.
//!
//! ```text
//!   block (64 KiB)   in the base       ── read ──> base
//!                                      ── write ─> lock the block, fill it up from the base, store it, mark it
//!                    in the overlay    ── read, write, zero, trim ──> data + n * 64 KiB of the overlay's file
//! ```
//!
//! A block goes from the base to the overlay once and never back, so that reading needs no lock, and what lies wholly
//! on one side has the fast paths of that side. Copying up holds the lock of those blocks alone. Memory: two bits for
//! each block (`blocks`).
//!
//! Two forms. A temporary overlay is a sparse file with nothing but data; its flush has nothing to promise. One that
//! is kept is a qcow2 image with the base as its backing file (`image` draws it): so it needs no tool of ours to be
//! looked into, committed, rebased or converted. Of all that qcow2 can be it is one shape, in which block n lies at
//! a place that follows from n; this is what keeps the memory at two bits. Where another program has changed
//! that shape it is not opened here; it is an image like any other then.
//!
//! What is kept, and in which order (`map`):
//!
//! - A flush makes data and refcounts durable, then writes the map entries of new blocks and makes those durable. So
//!   after a crash of the host a block is in the map with all of its data, or not at all; a cluster that is counted
//!   but not in the map is a leak to `qemu-img check`, and no more.
//! - What was answered and not flushed survives a crash of this process: the `recent` bytes say which blocks
//!   are newer than the map. They hold only as long as the host has not been booted anew, since the kernel may have
//!   written them before the data.
//! - A file is opened over the base it was made for: same size, same samples of its content.

mod blocks;
mod copy;
mod image;
mod map;
mod open;
#[cfg(test)]
mod tests;

use std::future::ready;
use std::ops::Range;
use std::sync::Arc;

use crate::extent::{Depth, MAX_EXTENTS, push_depth, push_extent};
use crate::ranges::{Mode, RangeLocks};
use crate::{Backend, Buffer, Capabilities, Extent, Flags, Geometry, LocalFuture, RangeOrHole, Result};
use blocks::Blocks;
use map::Map;

pub use open::{BootId, OverlayError, boot_id, kept_bytes, temporary_bytes};

/// The unit that is copied up, in bytes.
pub const BLOCK_BYTES: u64 = 64 << 10;

/// The largest base, in bytes: what qcow2's tables reach with clusters of this size.
pub const MAX_BYTES: u64 = 1 << 50;

/// Most runs of blocks that one `cache` request goes through.
const MAX_CACHE_RUNS: usize = 64;

/// A source that is not written, and the file that takes the changes.
///
/// Capabilities: those of a store (flush, FUA, trim, zeroes, fast zeroes), whatever the base has; `READ_ONLY` where it
/// was opened so. `FILE_RANGE` and `CACHE` where either side has it, `MULTI_CONN` where both have it. Size and
/// minimum block are the base's.
///
/// Trim gives space of the overlay back, and leaves alone what lies in the base. An overlay does not grow: it is one of
/// this base.
pub struct Overlay {
    shared: Arc<Shared>,
}

/// What copying up, which goes on when nobody waits for it any more, needs.
struct Shared {
    base: Box<dyn Backend>,
    store: Box<dyn Backend>,
    /// Where block 0 lies in the store.
    start: u64,
    /// Of the base when it was opened.
    size: u64,
    read_only: bool,
    blocks: Blocks,
    locks: RangeLocks,
    /// None for a temporary one.
    map: Option<Map>,
}

impl Shared {
    fn new(base: Box<dyn Backend>, store: Box<dyn Backend>, start: u64, map: Option<Map>) -> Self {
        let size = base.geometry().size;
        Shared {
            base,
            store,
            start,
            size,
            read_only: false,
            blocks: Blocks::new(size.div_ceil(BLOCK_BYTES)),
            locks: RangeLocks::new(BLOCK_BYTES),
            map,
        }
    }

    /// The blocks that a range touches.
    fn span(&self, offset: u64, len: u64) -> Range<u64> {
        debug_assert!(offset.checked_add(len).is_some_and(|end| end <= self.size), "the range was checked");
        let first = offset / BLOCK_BYTES;
        if len == 0 { first..first } else { first..(offset + len).div_ceil(BLOCK_BYTES) }
    }

    /// Whether a range covers all blocks that it touches.
    fn is_whole(&self, offset: u64, len: u64) -> bool {
        let end = offset + len;
        offset.is_multiple_of(BLOCK_BYTES) && (end.is_multiple_of(BLOCK_BYTES) || end == self.size)
    }

    /// The first part of a range that is all on one side: its length, and whether that is the overlay.
    fn run(&self, offset: u64, len: u64) -> (u64, bool) {
        let (end, present) = self.blocks.run(self.span(offset, len));
        ((end * BLOCK_BYTES).min(offset + len) - offset, present)
    }

    /// What the store has to be told: a temporary file has nothing to make durable.
    fn store_flags(&self, flags: Flags) -> Flags {
        if self.map.is_some() { flags } else { flags.without(Flags::FUA) }
    }

    /// Whether a change of blocks that are in the overlay is durable as soon as its data is.
    fn is_settled(&self, offset: u64, len: u64, flags: Flags) -> bool {
        self.map.is_none() || !flags.contains(Flags::FUA) || self.blocks.all_settled(self.span(offset, len))
    }

    /// The side that a run lies on, and its place there.
    fn side(&self, present: bool, offset: u64) -> (&dyn Backend, u64) {
        if present { (&*self.store, self.start + offset) } else { (&*self.base, offset) }
    }

    async fn read(&self, offset: u64, mut buf: Buffer, flags: Flags) -> Result<Buffer> {
        let len = buf.len() as u64;
        let (run, present) = if len == 0 { (0, false) } else { self.run(offset, len) };
        if run == len {
            let (side, place) = self.side(present, offset);
            return side.read(place, buf, flags).await;
        }
        let mut done = 0;
        while done < buf.len() {
            let (run, present) = self.run(offset + done as u64, (buf.len() - done) as u64);
            let (side, place) = self.side(present, offset + done as u64);
            // A run is part of the buffer.
            let part = &mut buf[done..][..usize::try_from(run).unwrap_or_default()];
            match side.try_read(place, part, flags) {
                Some(result) => result?,
                None => part.copy_from_slice(&side.read(place, Buffer::new(part.len()), flags).await?),
            }
            done += part.len();
        }
        Ok(buf)
    }

    async fn trim(&self, offset: u64, len: u64, flags: Flags) -> Result<()> {
        let mut at = offset;
        while at < offset + len {
            let (run, present) = self.run(at, offset + len - at);
            if present {
                self.store.trim(self.start + at, run, self.store_flags(flags)).await?;
            }
            at += run;
        }
        if self.is_settled(offset, len, flags) { Ok(()) } else { self.flush().await }
    }

    async fn cache(&self, offset: u64, len: u64) -> Result<()> {
        let mut at = offset;
        for _ in 0..MAX_CACHE_RUNS {
            if at >= offset + len {
                break;
            }
            let (run, present) = self.run(at, offset + len - at);
            let (side, place) = self.side(present, at);
            if side.geometry().capabilities.contains(Capabilities::CACHE) {
                side.cache(place, run).await?;
            }
            at += run;
        }
        Ok(())
    }

    async fn block_status(&self, offset: u64, len: u64, flags: Flags) -> Result<Vec<Extent>> {
        let most = if flags.contains(Flags::REQ_ONE) { 1 } else { MAX_EXTENTS };
        let (mut at, end, mut extents) = (offset, offset + len, Vec::new());
        while at < end && extents.len() <= most {
            let (run, present) = self.run(at, end - at);
            let (side, place) = self.side(present, at);
            let mut told = 0;
            for extent in side.block_status(place, run, flags).await? {
                push_extent(&mut extents, extent.len, extent.kind);
                told += extent.len;
            }
            at += told;
            if told < run {
                break;
            }
        }
        extents.truncate(most);
        Ok(extents)
    }

    async fn allocation_depth(&self, offset: u64, len: u64, flags: Flags) -> Result<Vec<Depth>> {
        let (mut at, end, mut depths) = (offset, offset + len, Vec::new());
        while at < end && depths.len() <= MAX_EXTENTS {
            let (run, present) = self.run(at, end - at);
            if present {
                push_depth(&mut depths, run, 1);
                at += run;
                continue;
            }
            let mut told = 0;
            for depth in self.base.allocation_depth(at, run, flags).await? {
                // What nobody holds is nowhere, however many layers there are.
                let level = if depth.level == 0 { 0 } else { depth.level + 1 };
                push_depth(&mut depths, depth.len, level);
                told += depth.len;
            }
            at += told;
            if told < run {
                break;
            }
        }
        depths.truncate(MAX_EXTENTS);
        Ok(depths)
    }
}

impl Backend for Overlay {
    fn geometry(&self) -> Geometry {
        let (base, store) = (self.shared.base.geometry(), self.shared.store.geometry());
        let (of_base, of_store) = (base.capabilities, store.capabilities);
        let mut capabilities = Capabilities::FLUSH;
        for either in [Capabilities::FILE_RANGE, Capabilities::CACHE, Capabilities::ROTATIONAL] {
            if of_base.contains(either) || of_store.contains(either) {
                capabilities = capabilities | either;
            }
        }
        if of_base.contains(Capabilities::MULTI_CONN) && of_store.contains(Capabilities::MULTI_CONN) {
            capabilities = capabilities | Capabilities::MULTI_CONN;
        }
        if self.shared.map.is_none() {
            capabilities = capabilities | Capabilities::VOLATILE;
        }
        capabilities = if self.shared.read_only {
            capabilities | Capabilities::READ_ONLY
        } else {
            capabilities
                | Capabilities::FUA
                | Capabilities::TRIM
                | Capabilities::WRITE_ZEROES
                | Capabilities::FAST_ZERO
        };
        Geometry {
            version: base.version,
            size: self.shared.size,
            min_block: base.min_block,
            preferred_block: base.preferred_block.max(store.preferred_block),
            capabilities,
        }
    }

    fn try_read(&self, offset: u64, buf: &mut [u8], flags: Flags) -> Option<Result<()>> {
        let len = buf.len() as u64;
        if len == 0 {
            return Some(Ok(()));
        }
        let (run, present) = self.shared.run(offset, len);
        if run < len {
            return None;
        }
        let (side, place) = self.shared.side(present, offset);
        side.try_read(place, buf, flags)
    }

    fn try_write(&self, offset: u64, data: &[u8], flags: Flags) -> Option<Result<()>> {
        let shared = &*self.shared;
        let len = data.len() as u64;
        let span = shared.span(offset, len);
        if shared.blocks.all_present(span.clone()) {
            if !shared.is_settled(offset, len, flags) {
                return None;
            }
            return shared.store.try_write(shared.start + offset, data, shared.store_flags(flags));
        }
        // Whole blocks need nothing of the base.
        if flags.contains(Flags::FUA) && shared.map.is_some() || !shared.is_whole(offset, len) {
            return None;
        }
        let _lock = shared.locks.try_lock(offset, offset + len, Mode::Exclusive)?;
        match shared.store.try_write(shared.start + offset, data, Flags::NONE)? {
            Ok(()) => shared.try_take(span).map(Ok),
            Err(error) => Some(Err(error)),
        }
    }

    fn file_range(&self, offset: u64, len: u64, flags: Flags) -> Option<RangeOrHole> {
        if len == 0 {
            return None;
        }
        let (run, present) = self.shared.run(offset, len);
        if run < len && flags.contains(Flags::WHOLE) {
            return None;
        }
        let (side, place) = self.shared.side(present, offset);
        side.file_range(place, run, flags)
    }

    fn read(&self, offset: u64, buf: Buffer, flags: Flags) -> LocalFuture<'_, Result<Buffer>> {
        Box::pin(self.shared.read(offset, buf, flags))
    }

    /// A block that is being copied up goes on being so when this is dropped.
    fn write(&self, offset: u64, data: Buffer, flags: Flags) -> LocalFuture<'_, Result<()>> {
        Box::pin(copy::write(&self.shared, offset, data, flags))
    }

    fn flush(&self) -> LocalFuture<'_, Result<()>> {
        Box::pin(self.shared.flush())
    }

    fn trim(&self, offset: u64, len: u64, flags: Flags) -> LocalFuture<'_, Result<()>> {
        Box::pin(self.shared.trim(offset, len, flags))
    }

    /// Fast where nothing of the base has to be copied for it.
    fn write_zeroes(&self, offset: u64, len: u64, flags: Flags) -> LocalFuture<'_, Result<()>> {
        Box::pin(copy::write_zeroes(&self.shared, offset, len, flags))
    }

    fn cache(&self, offset: u64, len: u64) -> LocalFuture<'_, Result<()>> {
        if len == 0 {
            return Box::pin(ready(Ok(())));
        }
        Box::pin(self.shared.cache(offset, len))
    }

    fn block_status(&self, offset: u64, len: u64, flags: Flags) -> LocalFuture<'_, Result<Vec<Extent>>> {
        Box::pin(self.shared.block_status(offset, len, flags))
    }

    fn loss_after_crash(&self) -> Option<String> {
        let temporary = self.shared.map.is_none();
        temporary.then(|| "changes go to a temporary overlay, which ends with its process".to_owned())
    }

    fn allocation_depth(&self, offset: u64, len: u64, flags: Flags) -> LocalFuture<'_, Result<Vec<Depth>>> {
        Box::pin(self.shared.allocation_depth(offset, len, flags))
    }
}
