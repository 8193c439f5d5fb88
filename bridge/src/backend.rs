//! The trait that every block source and every layer implements.
//!
//! Two paths: `try_read` and `try_write` run on the caller's thread, allocate nothing and must not sleep for
//! storage; None means "take the slow path". The other operations are futures, polled on the worker that made
//! them and therefore not `Send`; what the kernel works on, they own.
//!
//! Callers have checked range, read-only and flags (`Export::check`): implementations only assert them. No
//! operation that changes data has a default body, so that each layer must consider each one. (The default of those
//! that change only the space or the size is to refuse, and that of `try_write_piped` to decline, which no layer can get wrong.)

use std::fs::File;
use std::future::{Future, ready};
use std::os::fd::BorrowedFd;
use std::pin::Pin;
use std::sync::Arc;

use crate::{Buffer, Depth, Error, ErrorKind, Extent, Flags, Geometry, Result};

pub mod crash;
pub mod file;
pub mod image;
pub mod memory;
pub mod nbd;
pub mod null;

/// A boxed future that stays on its worker.
pub type LocalFuture<'a, T> = Pin<Box<dyn Future<Output = T> + 'a>>;

/// A part of a plain file that holds exactly the bytes a read asks for, and is in memory now: a door that sends
/// plain text may use sendfile(2). The pages are shared: a later overlapping write can still reach the reader.
#[derive(Clone, Debug)]
pub struct FileRange {
    /// The file to send from.
    pub file: Arc<File>,
    /// First byte within that file.
    pub offset: u64,
    /// Number of bytes.
    pub len: u64,
}

/// What a write stores, where it lies in a pipe: splice(2) takes it from there to a file without a copy through this process.
#[derive(Clone, Copy, Debug)]
pub struct Piped<'a> {
    /// The end to read from.
    pub pipe: BorrowedFd<'a>,
    /// Number of bytes, at most what the pipe holds now.
    pub len: usize,
}

/// A block source, or a layer that owns another one.
pub trait Backend: Send + Sync + 'static {
    /// The present shape. Cheap: called for every request.
    fn geometry(&self) -> Geometry;

    /// Fills `buf` from `offset` now, or declines with None. After an error the buffer's content is undefined.
    fn try_read(&self, offset: u64, buf: &mut [u8], flags: Flags) -> Option<Result<()>>;

    /// Stores `data` at `offset` now, or declines with None; then some of it may be stored already, and the caller goes on with
    /// `write` of the whole.
    fn try_write(&self, offset: u64, data: &[u8], flags: Flags) -> Option<Result<()>>;

    /// Like `try_write`, with data in a pipe. After None they are all still there; after an error nobody knows how many are. Who
    /// does not pass this on to a plain file loses only speed.
    fn try_write_piped(&self, _offset: u64, _data: Piped<'_>, _flags: Flags) -> Option<Result<()>> {
        None
    }

    /// The range as part of a file that can be sent without waiting for storage, or None. It may be shorter than
    /// asked (never empty), where the rest is something else; `Hole` says that it reads as zeroes. With
    /// `Flags::WHOLE` it is all of the range, and no hole.
    fn file_range(&self, _offset: u64, _len: u64, _flags: Flags) -> Option<RangeOrHole> {
        None
    }

    /// Fills the buffer from `offset`.
    fn read(&self, offset: u64, buf: Buffer, flags: Flags) -> LocalFuture<'_, Result<Buffer>>;

    /// Stores the buffer at `offset`; with `Flags::FUA` durably.
    fn write(&self, offset: u64, data: Buffer, flags: Flags) -> LocalFuture<'_, Result<()>>;

    /// Makes every write that was answered before this call durable.
    fn flush(&self) -> LocalFuture<'_, Result<()>>;

    /// Drops the content of a range; what it reads as afterwards is not defined.
    fn trim(&self, offset: u64, len: u64, flags: Flags) -> LocalFuture<'_, Result<()>>;

    /// Makes a range read as zeroes.
    fn write_zeroes(&self, offset: u64, len: u64, flags: Flags) -> LocalFuture<'_, Result<()>>;

    /// Brings a range closer.
    fn cache(&self, offset: u64, len: u64) -> LocalFuture<'_, Result<()>>;

    /// Describes the range from its start: at least one extent; together no longer than `len`, and shorter where
    /// the list would become too long. With `Flags::REQ_ONE` one extent is enough.
    fn block_status(&self, offset: u64, len: u64, flags: Flags) -> LocalFuture<'_, Result<Vec<Extent>>>;

    /// Tells how deep in a chain of overlays the bytes of a range lie, as `block_status` tells what they are. A source
    /// that has nothing below it holds all of its bytes itself, holes too; who owns another one must pass this on.
    fn allocation_depth(&self, _offset: u64, len: u64, _flags: Flags) -> LocalFuture<'_, Result<Vec<Depth>>> {
        Box::pin(ready(Ok(vec![Depth { len, level: 1 }])))
    }

    /// Makes the source `size` bytes long, more than it is; what is new reads as zeroes. When this returns, `geometry`
    /// tells the new size, with a higher version. Called once at a time. Refused without `Capabilities::GROW`.
    fn grow(&self, _size: u64) -> LocalFuture<'_, Result<()>> {
        Box::pin(ready(Err(Error::new(ErrorKind::NotSupported, "the source cannot grow"))))
    }

    /// Makes the source `size` bytes long, less than it is; what lies past that is gone. When this returns, `geometry`
    /// tells the new size, with a higher version. Called alone, with no other request in flight. Refused without
    /// `Capabilities::SHRINK`.
    fn shrink(&self, _size: u64) -> LocalFuture<'_, Result<()>> {
        Box::pin(ready(Err(Error::new(ErrorKind::NotSupported, "the source cannot shrink"))))
    }

    /// Reserves the space of a range, and changes no data: later writes there find room. Refused without
    /// `Capabilities::ALLOCATE`.
    fn allocate(&self, _offset: u64, _len: u64) -> LocalFuture<'_, Result<()>> {
        Box::pin(ready(Err(Error::new(ErrorKind::NotSupported, "the source cannot reserve space"))))
    }

    /// Returns why writes that were answered and not flushed do not survive a crash of this process, in words. Asked
    /// only where the geometry says so (`Capabilities::VOLATILE`).
    fn loss_after_crash(&self) -> Option<String> {
        None
    }

    /// Bytes of storage that the source takes up now, where that is cheap to tell; else block status is the way.
    fn allocated(&self) -> Option<u64> {
        None
    }
}

/// What `Backend::file_range` answers with.
#[derive(Clone, Debug)]
pub enum RangeOrHole {
    /// Bytes in a file.
    Range(FileRange),
    /// This many bytes that read as zeroes.
    Hole(u64),
}
