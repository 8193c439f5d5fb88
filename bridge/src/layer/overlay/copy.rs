//! Changes that take blocks up from the base: writes, and zeroes.
//!
//! Under the exclusive lock of the blocks: what the request leaves of its first and last block is filled in from the
//! base, the request itself is stored, the blocks are noted as recent, and only then they are the overlay's. Where
//! something fails before that the base still has them, and what was stored is of no meaning.
//!
//! It runs as a task of its own: a write that the kernel has taken must not come in after the lock was given up.

use std::ops::Range;
use std::sync::Arc;

use crate::layer::overlay::{BLOCK_BYTES, Shared};
use crate::ranges::Mode;
use crate::transfer::{get, put_owned};
use crate::{Buffer, Error, ErrorKind, Flags, Result};

/// Stores data.
pub(super) async fn write(shared: &Arc<Shared>, offset: u64, data: Buffer, flags: Flags) -> Result<()> {
    let len = data.len() as u64;
    if shared.blocks.all_present(shared.span(offset, len)) && shared.is_settled(offset, len, flags) {
        return shared.store.write(shared.start + offset, data, shared.store_flags(flags)).await;
    }
    take(shared, offset, len, flags, async move |shared| {
        put_owned(&*shared.store, shared.start + offset, data).await
    })
    .await
}

/// Makes a range read as zeroes. One operation of the store covers all of it, so that a fast one is done or refused as
/// a whole.
pub(super) async fn write_zeroes(shared: &Arc<Shared>, offset: u64, len: u64, flags: Flags) -> Result<()> {
    let span = shared.span(offset, len);
    let present = shared.blocks.all_present(span);
    if present && shared.is_settled(offset, len, flags) {
        return shared.store.write_zeroes(shared.start + offset, len, shared.store_flags(flags)).await;
    }
    if flags.contains(Flags::FAST_ZERO) && !present && !shared.is_whole(offset, len) {
        return Err(Error::new(ErrorKind::NotSupported, "a part of the base would have to be copied"));
    }
    let inner = flags.without(Flags::FUA);
    take(shared, offset, len, flags, async move |shared| {
        shared.store.write_zeroes(shared.start + offset, len, inner).await
    })
    .await
}

/// Runs `store`, which changes the range in the overlay's file, as the change that makes its blocks the overlay's.
async fn take(
    shared: &Arc<Shared>,
    offset: u64,
    len: u64,
    flags: Flags,
    store: impl AsyncFnOnce(&Shared) -> Result<()> + 'static,
) -> Result<()> {
    let shared = shared.clone();
    let task = tokio::task::spawn_local(async move {
        {
            let _lock = shared.locks.lock(offset, offset + len, Mode::Exclusive).await;
            for edge in shared.edges(offset, len) {
                shared.fill(edge).await?;
            }
            store(&shared).await?;
            shared.take(shared.span(offset, len)).await?;
        }
        if flags.contains(Flags::FUA) { shared.flush().await } else { Ok(()) }
    });
    task.await.unwrap_or_else(|_| Err(Error::new(ErrorKind::ShuttingDown, "the worker is ending")))
}

impl Shared {
    /// What a change of this range leaves of blocks that are in the base: at most two pieces.
    fn edges(&self, offset: u64, len: u64) -> impl Iterator<Item = Range<u64>> {
        let end = offset + len;
        let (first, last) = (offset / BLOCK_BYTES, end / BLOCK_BYTES);
        let head = (first * BLOCK_BYTES..offset, first);
        let tail = (end..self.size.min((last + 1) * BLOCK_BYTES), last);
        // An aligned end belongs to no block of the range, and a request without bytes has no edges.
        [(head, true), (tail, !end.is_multiple_of(BLOCK_BYTES))].into_iter().filter_map(
            move |((edge, block), real)| {
                let real = real && len > 0 && !edge.is_empty();
                (real && !self.blocks.present(block)).then_some(edge)
            },
        )
    }

    /// Copies a part of a block from the base.
    async fn fill(&self, part: Range<u64>) -> Result<()> {
        let data = get(&*self.base, part.start, part.end - part.start).await?;
        put_owned(&*self.store, self.start + part.start, data).await
    }
}
