//! What may wait for storage: each runs on a worker, which owns the answer. A worker that ends drops it, and the program
//! gets EIO.
//!
//! Sources whose smallest unit is a block get whole blocks: a read of parts reads more, a write of parts reads, changes
//! and writes, alone among this file's writes.

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use bridge::{
    Account, Buffer, Capabilities, Charge, Error, ErrorKind, Export, Flags, Operation, Reply, Request, Result,
};
use fuser::{Errno, ReplyAttr, ReplyData, ReplyEmpty, ReplyLseek, ReplyWrite};
use tokio::sync::RwLock;

use super::attributes::Change;
use super::file::{DiskFile, NO_TIME};
use super::length::Length;
use super::translate::{Space, errno};

/// Block status is asked for so many bytes at once, when looking for data or a hole.
const SEEK_STEP: u64 = 64 << 30;

impl DiskFile {
    /// A read of what there is of a range.
    pub(super) fn slow_read(&self, offset: u64, size: u32, reply: ReplyData, arrived: Instant) {
        let (export, account, length) = (self.export.clone(), self.account.clone(), self.length.clone());
        self.run(move || async move {
            let _charge = account.charge(size).await;
            let _steady = length.hold().await;
            let len = export.geometry().size.saturating_sub(offset).min(u64::from(size));
            if len == 0 {
                return reply.data(&[]);
            }
            let asked = Request::new(Operation::Read, offset, len);
            match read(&export, asked, arrived).await {
                Ok((data, part)) => reply.data(&data[part]),
                Err(error) => reply.error(errno(&error)),
            }
        });
    }

    /// A write; where `grow` says so, or the export may have shrunk, it is made long enough first. Waits for memory, where too much data waits for storage: the
    /// kernel keeps the rest.
    pub(super) fn slow_write(
        &self,
        asked: Request,
        data: &[u8],
        grow: bool,
        reply: ReplyWrite,
        arrived: Instant,
    ) {
        let charge = self.runtime.block_on(charge(&self.account, &asked));
        let data = Buffer::copy_of(data);
        let (export, blocks, length) = (self.export.clone(), self.blocks.clone(), self.length.clone());
        let grow = grow || length.can_shrink();
        self.run(move || async move {
            let _charge = charge;
            let _steady = length.hold().await;
            let stored = async {
                if grow {
                    export.grow_to(asked.offset + asked.len).await?;
                }
                write(&export, asked, data, &blocks, arrived).await
            };
            match stored.await {
                Ok(()) => reply.written(u32::try_from(asked.len).unwrap_or(0)),
                Err(error) => reply.error(errno(&error)),
            }
        });
    }

    /// A request that is answered with nothing.
    pub(super) fn slow_done(&self, asked: Request, reply: ReplyEmpty) {
        let (export, arrived) = (self.export.clone(), Instant::now());
        self.run(move || async move {
            answer(reply, export.execute(asked, None, arrived).await.map(drop));
        });
    }

    /// fallocate(2), from `offset` to `end`; the export grows with it, or keeps its size.
    pub(super) fn slow_space(&self, space: Space, offset: u64, end: u64, keep_size: bool, reply: ReplyEmpty) {
        let (export, blocks, length) = (self.export.clone(), self.blocks.clone(), self.length.clone());
        self.run(move || async move {
            let _steady = length.hold().await;
            let done = async {
                if !keep_size {
                    export.grow_to(end).await?;
                }
                // With its size kept, there is nothing to do past the end.
                let len = end.min(export.geometry().size).saturating_sub(offset);
                if len == 0 {
                    return Ok(());
                }
                match space {
                    Space::Allocate => export.allocate(offset, len).await,
                    Space::Punch => zero(&export, offset, len, punch_flags(&export), &blocks).await,
                    Space::Zero => zero(&export, offset, len, Flags::NO_HOLE, &blocks).await,
                }
            };
            answer(reply, done.await);
        });
    }

    /// lseek(2) for data, or for a hole.
    pub(super) fn slow_seek(&self, offset: u64, data: bool, reply: ReplyLseek) {
        let (export, length) = (self.export.clone(), self.length.clone());
        self.run(move || async move {
            let _steady = length.hold().await;
            match seek(&export, offset, data).await {
                Ok(Some(place)) => match i64::try_from(place) {
                    Ok(place) => reply.offset(place),
                    Err(_) => reply.error(Errno::EOVERFLOW),
                },
                Ok(None) => reply.error(Errno::ENXIO),
                Err(error) => reply.error(errno(&error)),
            }
        });
    }

    /// stat(2), where the space has to be counted.
    pub(super) fn slow_attributes(&self, reply: ReplyAttr) {
        self.slow_change(Change::default(), None, reply);
    }

    /// setattr that changes the size, or has to count the space.
    pub(super) fn slow_change(&self, change: Change, size: Option<u64>, reply: ReplyAttr) {
        let (export, attributes, length) =
            (self.export.clone(), self.attributes.clone(), self.length.clone());
        self.run(move || async move {
            if let Some(size) = size
                && let Err(error) = set_size(&export, size, &length).await
            {
                return reply.error(errno(&error));
            }
            attributes.change(change);
            let _steady = length.hold().await;
            let all = match attributes.now(&export) {
                Some(all) => all,
                None => attributes.count(&export).await,
            };
            reply.attr(&NO_TIME, &all);
        });
    }

    fn run<F, T>(&self, make: F)
    where
        F: FnOnce() -> T + Send + 'static,
        T: Future<Output = ()> + 'static,
    {
        self.workers.spawn(self.workers.next(), make);
    }
}

/// Makes the export longer or shorter, as far as it can be.
async fn set_size(export: &Export, size: u64, length: &Length) -> Result<()> {
    if let Some(_alone) = length.change().await {
        export.shrink_to(size).await?;
    }
    export.grow_to(size).await
}

fn answer(reply: ReplyEmpty, result: Result<()>) {
    match result {
        Ok(()) => reply.ok(),
        Err(error) => reply.error(errno(&error)),
    }
}

async fn charge(account: &Arc<Account>, asked: &Request) -> Charge {
    account.charge(u32::try_from(asked.len).unwrap_or(u32::MAX)).await
}

/// Reads, and tells which part of the buffer was asked for.
async fn read(export: &Export, asked: Request, arrived: Instant) -> Result<(Buffer, Range<usize>)> {
    let (start, end) = export.geometry().whole_blocks(asked.offset, asked.len);
    let wider = Request { offset: start, len: end - start, ..asked };
    let buf = Buffer::new(length(wider.len));
    match export.execute(wider, Some(buf), arrived).await? {
        Reply::Data(data) => {
            let from = length(asked.offset - start);
            Ok((data, from..from + length(asked.len)))
        }
        _ => Err(Error::new(ErrorKind::Io, "a read came back without its data")),
    }
}

async fn write(
    export: &Export,
    mut asked: Request,
    data: Buffer,
    blocks: &RwLock<()>,
    arrived: Instant,
) -> Result<()> {
    let caps = export.geometry().capabilities;
    let flush = asked.flags.contains(Flags::FUA) && !caps.contains(Capabilities::FUA);
    if flush {
        asked.flags = asked.flags.without(Flags::FUA);
    }
    let (start, end) = export.geometry().whole_blocks(asked.offset, asked.len);
    if (start, end - start) == (asked.offset, asked.len) {
        let _others = blocks.read().await;
        export.execute(asked, Some(data), arrived).await?;
    } else {
        let _alone = blocks.write().await;
        let around = Request::new(Operation::Read, start, end - start);
        let (mut whole, _) = read(export, around, arrived).await?;
        let from = length(asked.offset - start);
        whole[from..from + data.len()].copy_from_slice(&data);
        let wider = Request { offset: start, len: end - start, ..asked };
        export.execute(wider, Some(whole), arrived).await?;
    }
    if flush && caps.contains(Capabilities::FLUSH) {
        export.execute(Request::flush(), None, Instant::now()).await?;
    }
    Ok(())
}

/// Makes a range read as zeroes; parts of blocks at its edges are written.
async fn zero(export: &Export, offset: u64, len: u64, flags: Flags, blocks: &RwLock<()>) -> Result<()> {
    let arrived = Instant::now();
    let geometry = export.geometry();
    let block = u64::from(geometry.min_block);
    let end = offset + len;
    let inner_start = offset.next_multiple_of(block).min(end);
    let inner_end = if end == geometry.size { end } else { (end & !(block - 1)).max(inner_start) };
    if inner_start < inner_end {
        let asked = Request::new(Operation::WriteZeroes, inner_start, inner_end - inner_start);
        export.execute(asked.with_flags(flags), None, arrived).await?;
    }
    for (from, to) in [(offset, inner_start), (inner_end, end)] {
        if from < to {
            let mut zeroes = Buffer::new(length(to - from));
            zeroes.fill(0);
            let asked = Request::new(Operation::Write, from, to - from);
            write(export, asked, zeroes, blocks, arrived).await?;
        }
    }
    Ok(())
}

/// PUNCH_HOLE is refused, rather than made of written zeroes, where the source can tell.
fn punch_flags(export: &Export) -> Flags {
    match export.geometry().capabilities.contains(Capabilities::FAST_ZERO) {
        true => Flags::FAST_ZERO,
        false => Flags::NONE,
    }
}

/// The first place from `offset` on that holds data, or reads as zeroes without holding any; None where no data
/// follows, and past the end. The end of the file is a hole.
async fn seek(export: &Export, offset: u64, data: bool) -> Result<Option<u64>> {
    let size = export.geometry().size;
    if offset >= size {
        return Ok(None);
    }
    let mut place = offset;
    while place < size {
        let len = SEEK_STEP.min(size - place);
        let extents = export.extents(place, len, Flags::REQ_ONE, Instant::now()).await?;
        let before = place;
        for extent in extents {
            let end = place + extent.len;
            if extent.kind.reads_as_zeroes() != data {
                return Ok(Some(place));
            }
            place = end;
        }
        if place == before {
            return Err(Error::new(ErrorKind::Io, "block status told nothing"));
        }
        tokio::task::yield_now().await;
    }
    Ok((!data).then_some(size))
}

/// A length that is no longer than a request and two blocks.
fn length(len: u64) -> usize {
    usize::try_from(len).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests;
