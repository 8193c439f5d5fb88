//! The map of a kept overlay: when entries are written, and the recent bytes for what they do not say yet.
//!
//! ```text
//!   block stored ──> recent byte ──> answered
//!   flush:  refcounts, sync (data too), map entries, sync, recent bytes cleared
//! ```
//!
//! Entries follow from the block's number, so that writing one twice, or late, does no harm.

use std::ops::Range;

use super::blocks::Blocks;
use super::image::Layout;
use crate::Result;
use crate::layer::overlay::Shared;
use crate::passes::Passes;
use crate::transfer::put;

/// Blocks whose entries are written at once.
const PIECE: u64 = 8192;

/// Blocks that a write on the fast path may take.
const INLINE_BLOCKS: usize = 1024;

/// What a kept overlay has beside its blocks.
pub(super) struct Map {
    pub(super) layout: Layout,
    passes: Passes,
}

impl Map {
    pub(super) fn new(layout: Layout) -> Self {
        Map { layout, passes: Passes::default() }
    }
}

impl Shared {
    /// Makes every change that was answered before this call durable, together with the map. A flush that arrives
    /// during a pass waits for the next one, and shares it.
    pub(super) async fn flush(&self) -> Result<()> {
        let Some(map) = &self.map else { return Ok(()) };
        if self.read_only {
            return Ok(());
        }
        let Some(turn) = map.passes.join().await else { return Ok(()) };
        let pass = turn.begin();
        self.pass(&map.layout).await?;
        pass.succeed();
        Ok(())
    }

    async fn pass(&self, layout: &Layout) -> Result<()> {
        let mut pass = Pass { blocks: &self.blocks, chunks: self.blocks.begin() };
        if pass.chunks.is_empty() {
            return self.store.flush().await;
        }
        self.each_piece(&pass, async |blocks| {
            let ones: Vec<u8> = blocks.clone().flat_map(|_| 1_u16.to_be_bytes()).collect();
            put(&*self.store, layout.refcount_of(blocks.start), &ones).await
        })
        .await?;
        self.store.flush().await?;
        self.each_piece(&pass, async |blocks| {
            let entries: Vec<u8> =
                blocks.clone().flat_map(|block| layout.l2_entry(block).to_be_bytes()).collect();
            put(&*self.store, layout.l2 + blocks.start * 8, &entries).await
        })
        .await?;
        self.store.flush().await?;
        self.each_piece(&pass, async |blocks| {
            let zeroes = vec![0; usize::try_from(blocks.end - blocks.start).unwrap_or_default()];
            put(&*self.store, layout.recent + blocks.start, &zeroes).await
        })
        .await
        // They say nothing that the map does not.
        .unwrap_or_else(|error| tracing::debug!(%error, "recent bytes not cleared"));
        for chunk in pass.chunks.drain(..) {
            self.blocks.settle(chunk);
        }
        Ok(())
    }

    async fn each_piece(&self, pass: &Pass<'_>, act: impl AsyncFn(Range<u64>) -> Result<()>) -> Result<()> {
        for chunk in &pass.chunks {
            for run in self.blocks.flushing(*chunk) {
                let mut at = run.start;
                while at < run.end {
                    let end = run.end.min(at + PIECE);
                    act(at..end).await?;
                    at = end;
                    // There may be thousands of them, each done at once.
                    tokio::task::yield_now().await;
                }
            }
        }
        Ok(())
    }

    /// The blocks are stored: notes them as recent, and makes them the overlay's. Their lock must be held.
    pub(super) async fn take(&self, blocks: Range<u64>) -> Result<()> {
        if let Some(map) = self.map.as_ref().filter(|_| !self.blocks.all_present(blocks.clone())) {
            let mut at = blocks.start;
            while at < blocks.end {
                let end = blocks.end.min(at + PIECE);
                let ones = vec![1; usize::try_from(end - at).unwrap_or_default()];
                put(&*self.store, map.layout.recent + at, &ones).await?;
                at = end;
                if at < blocks.end {
                    tokio::task::yield_now().await;
                }
            }
        }
        self.blocks.mark_fresh(blocks);
        Ok(())
    }

    /// The same without waiting; None where that is not possible.
    pub(super) fn try_take(&self, blocks: Range<u64>) -> Option<()> {
        const ONES: [u8; INLINE_BLOCKS] = [1; INLINE_BLOCKS];
        if let Some(map) = &self.map {
            let ones = ONES.get(..usize::try_from(blocks.end - blocks.start).ok()?)?;
            let noted = self.store.try_write(map.layout.recent + blocks.start, ones, crate::Flags::NONE)?;
            noted.ok()?;
        }
        self.blocks.mark_fresh(blocks);
        Some(())
    }
}

/// A pass under way: what it has not settled when it ends, the next one does again.
struct Pass<'a> {
    blocks: &'a Blocks,
    chunks: Vec<u64>,
}

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        for chunk in &self.chunks {
            self.blocks.put_off(*chunk);
        }
    }
}
