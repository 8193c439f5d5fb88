//! What may wait for storage: each runs on a worker, which owns the answer. A worker that ends drops it, and the program
//! gets EIO.
//!
//! Sources whose smallest unit is a block get whole blocks: a read of parts reads more, a write of parts reads, changes
//! and writes, alone among this file's writes.

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use bridge::{
    Account, Buffer, Capabilities, Charge, Error, ErrorKind, Export, ExtentKind, Flags, Operation, Reply,
    Request, Result,
};
use fuser::{Errno, ReplyAttr, ReplyData, ReplyEmpty, ReplyLseek, ReplyWrite};
use tokio::sync::RwLock;

use super::attributes::Change;
use super::file::{DiskFile, NO_TIME};
use super::translate::{Space, errno};

/// Block status is asked for so many bytes at once, when looking for data or a hole.
const SEEK_STEP: u64 = 64 << 30;

impl DiskFile {
    /// A read of `asked`, which lies within the export.
    pub(super) fn slow_read(&self, asked: Request, reply: ReplyData, arrived: Instant) {
        let (export, account) = (self.export.clone(), self.account.clone());
        self.run(move || async move {
            let _charge = charge(&account, &asked).await;
            match read(&export, asked, arrived).await {
                Ok((data, part)) => reply.data(&data[part]),
                Err(error) => reply.error(errno(&error)),
            }
        });
    }

    /// A write; `grow` makes the export long enough first. Waits for memory, where too much data waits for storage: the
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
        let (export, blocks) = (self.export.clone(), self.blocks.clone());
        self.run(move || async move {
            let _charge = charge;
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

    /// fallocate(2), within the export once it has grown.
    pub(super) fn slow_space(
        &self,
        space: Space,
        offset: u64,
        len: u64,
        grow_to: Option<u64>,
        reply: ReplyEmpty,
    ) {
        let export = self.export.clone();
        let blocks = self.blocks.clone();
        self.run(move || async move {
            let done = async {
                if let Some(size) = grow_to {
                    export.grow_to(size).await?;
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

    /// lseek(2) for data, or for a hole: from `offset`, which lies within the export.
    pub(super) fn slow_seek(&self, offset: u64, data: bool, reply: ReplyLseek) {
        let export = self.export.clone();
        self.run(move || async move {
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

    /// setattr that makes the export longer, or has to count its space.
    pub(super) fn slow_change(&self, change: Change, grow_to: Option<u64>, reply: ReplyAttr) {
        let (export, attributes) = (self.export.clone(), self.attributes.clone());
        self.run(move || async move {
            if let Some(size) = grow_to
                && let Err(error) = export.grow_to(size).await
            {
                return reply.error(errno(&error));
            }
            attributes.change(change);
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
    let (start, end) = whole_blocks(export, asked.offset, asked.len);
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
    let (start, end) = whole_blocks(export, asked.offset, asked.len);
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
/// follows. The end of the file is a hole.
async fn seek(export: &Export, offset: u64, data: bool) -> Result<Option<u64>> {
    let size = export.geometry().size;
    let (mut place, _) = whole_blocks(export, offset, 1);
    while place < size {
        let len = SEEK_STEP.min(size - place);
        let asked = Request::new(Operation::BlockStatus, place, len).with_flags(Flags::REQ_ONE);
        let Reply::Extents(extents) = export.execute(asked, None, Instant::now()).await? else { break };
        let before = place;
        for extent in extents {
            let end = place + extent.len;
            if (extent.kind == ExtentKind::Data) == data && end > offset {
                return Ok(Some(place.max(offset)));
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

/// A range, widened to whole blocks of the source.
fn whole_blocks(export: &Export, offset: u64, len: u64) -> (u64, u64) {
    let geometry = export.geometry();
    let mask = u64::from(geometry.min_block) - 1;
    let end = offset + len;
    let up = end.checked_add(mask).map_or(u64::MAX, |end| end & !mask);
    // The last block may be a shorter one.
    (offset & !mask, up.min(geometry.size.max(end)))
}

/// A length that is no longer than a request and two blocks.
fn length(len: u64) -> usize {
    usize::try_from(len).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests;
