//! Raw image files and block devices.
//!
//! ```text
//!   try_read / try_write / file_range ──> fast    page cache, on the caller's thread, never waiting for storage
//!   read / write ──> slow ──┬── direct            O_DIRECT: read, modify, write under a range lock
//!                           └── aio               io_uring of this thread, or a pool of threads
//!   flush ──> flush (the gate: shared fsyncs, latched failures)
//!   trim / write_zeroes ──> zero        block_status / cache ──> status        grow / shrink / allocate ──> space
//! ```
//!
//! Knows no image format: offset n of the source is offset n of the file.

mod aio;
mod direct;
mod fast;
mod flush;
mod lock;
mod open;
mod slow;
mod space;
mod status;
#[cfg(test)]
mod tests;
mod zero;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Acquire};

use crate::ranges::RangeLocks;
use crate::{
    Backend, Buffer, Capabilities, Extent, Flags, Geometry, LocalFuture, OpenError, Piped, RangeOrHole,
    Result,
};

pub use open::{create, logical_sector};
pub(super) use space::length;

/// How a file is opened and used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileOptions {
    /// Open for reading only; changes are refused above.
    pub read_only: bool,
    /// What stands between a write and the disk.
    pub cache: CacheMode,
    /// How operations that may wait for storage are run.
    pub aio: AioMode,
    /// What a trim does.
    pub discard: DiscardMode,
    /// Take part in qemu's image locking. Without it nothing keeps two writers apart.
    pub lock: bool,
    /// A path that the file is opened by in place of its own, which is for messages then: `/proc/self/fd/N` of a file that
    /// the caller has found and checked, and keeps open meanwhile. An image so opened may name no other file.
    pub via: Option<PathBuf>,
}

impl Default for FileOptions {
    fn default() -> Self {
        FileOptions {
            read_only: false,
            cache: CacheMode::Writeback,
            aio: AioMode::Auto,
            discard: DiscardMode::Unmap,
            lock: true,
            via: None,
        }
    }
}

/// Cache modes, with qemu's names and meanings.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CacheMode {
    /// Through the page cache; durable on flush.
    #[default]
    Writeback,
    /// O_DIRECT; durable on flush.
    None,
    /// O_DIRECT, and every write durable before its answer.
    DirectSync,
    /// Through the page cache, and every write durable before its answer.
    WriteThrough,
    /// Through the page cache; flush and FUA are ignored. A crash of the host loses data.
    Unsafe,
}

impl CacheMode {
    fn direct(self) -> bool {
        matches!(self, CacheMode::None | CacheMode::DirectSync)
    }

    pub(super) fn every_write_durable(self) -> bool {
        matches!(self, CacheMode::DirectSync | CacheMode::WriteThrough)
    }
}

/// How operations that may wait for storage are run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AioMode {
    /// By io_uring where it is allowed, else by threads.
    #[default]
    Auto,
    /// By io_uring, or the file does not open.
    IoUring,
    /// By a pool of threads.
    Threads,
}

/// What a trim does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DiscardMode {
    /// Gives the space back; writing zeroes may do so too.
    #[default]
    Unmap,
    /// Nothing, successfully; zeroes keep their space.
    Ignore,
}

/// An open file or block device. The image lock is held until it is dropped and its last operation has ended.
pub struct FileBackend {
    disk: Arc<Disk>,
}

impl FileBackend {
    /// Opens an image file or a block device. It may wait for storage, as every open may. The slow path needs a
    /// tokio runtime with its I/O driver enabled, as workers have.
    ///
    /// # Errors
    /// One line for a person, see [`OpenError`].
    pub fn open(path: impl AsRef<Path>, options: &FileOptions) -> std::result::Result<Self, OpenError> {
        let disk = open::open(path.as_ref(), options, open::Extent::Fixed)?;
        Ok(FileBackend { disk: Arc::new(disk) })
    }

    /// Opens a file that holds an image of another format, and grows with it: a write past its end makes it longer,
    /// and what lies there reads as zeroes. Its geometry's size is what a file may be at most.
    ///
    /// # Errors
    /// As [`FileBackend::open`].
    pub(super) fn open_container(path: &Path, options: &FileOptions) -> std::result::Result<Self, OpenError> {
        let disk = open::open(path, options, open::Extent::Open)?;
        Ok(FileBackend { disk: Arc::new(disk) })
    }

    /// The descriptor that its I/O goes through.
    pub(super) fn file(&self) -> &Arc<File> {
        &self.disk.file
    }
}

impl std::fmt::Debug for FileBackend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FileBackend").field("file", &self.disk.file).finish_non_exhaustive()
    }
}

/// What the operations of an open file share.
struct Disk {
    options: FileOptions,
    /// The descriptor of all I/O. It holds the image locks.
    file: Arc<File>,
    /// With O_DIRECT, a second descriptor that goes through the page cache: for the last, partial block.
    cached: Option<Arc<File>>,
    /// The descriptor of durable writes, see [`Disk::writer`]; None where there are none.
    durable: Option<Arc<File>>,
    kind: Kind,
    /// Past the end of the file lie zeroes, and writes make it longer.
    open_ended: bool,
    /// The length of an open-ended file in bytes, as it was seen last. It never becomes shorter.
    seen_length: AtomicU64,
    /// As it was opened; see [`Disk::geometry`].
    opened: Geometry,
    size: AtomicU64,
    /// How often it has changed.
    version: AtomicU64,
    /// With O_DIRECT, what offsets and lengths must be multiples of.
    direct: Option<u64>,
    fast: fast::Fast,
    gate: Arc<flush::FlushGate>,
    ranges: RangeLocks,
    refused: zero::Refused,
}

/// What kind of thing the path led to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// A plain file on storage.
    Regular,
    /// A plain file on tmpfs or ramfs: nothing waits for storage there, and nothing is durable.
    Memory,
    /// A block device with this logical sector size in bytes.
    Device(u32),
}

impl Disk {
    /// The present shape.
    #[inline]
    fn geometry(&self) -> Geometry {
        // In this order the size is at least as new as the version.
        let version = self.version.load(Acquire);
        Geometry { version, size: self.size(), ..self.opened }
    }

    #[inline]
    fn size(&self) -> u64 {
        self.size.load(Acquire)
    }

    /// Whether a write with these flags must be durable before its answer.
    fn durable(&self, flags: Flags) -> bool {
        self.kind != Kind::Memory
            && self.options.cache != CacheMode::Unsafe
            && (flags.contains(Flags::FUA) || self.options.cache.every_write_durable())
    }

    fn check_range(&self, offset: u64, len: u64) {
        debug_assert!(
            offset.checked_add(len).is_some_and(|end| end <= self.size()),
            "the caller has checked the range"
        );
    }

    fn check_change(&self, offset: u64, len: u64) {
        self.check_range(offset, len);
        debug_assert!(
            !self.opened.capabilities.contains(Capabilities::READ_ONLY),
            "the caller has checked that the source is writable"
        );
    }
}

impl Backend for FileBackend {
    #[inline]
    fn geometry(&self) -> Geometry {
        self.disk.geometry()
    }

    #[inline]
    fn try_read(&self, offset: u64, buf: &mut [u8], _flags: Flags) -> Option<Result<()>> {
        self.disk.check_range(offset, buf.len() as u64);
        self.disk.try_read(offset, buf)
    }

    /// A storage that takes part of the data at once and would make the rest wait is answered with None; the
    /// part is stored then, which shows only to a caller that does not carry on with [`Backend::write`].
    #[inline]
    fn try_write(&self, offset: u64, data: &[u8], flags: Flags) -> Option<Result<()>> {
        self.disk.check_change(offset, data.len() as u64);
        self.disk.try_write(offset, data, flags)
    }

    fn try_write_piped(&self, offset: u64, data: Piped<'_>, flags: Flags) -> Option<Result<()>> {
        self.disk.check_change(offset, data.len as u64);
        self.disk.try_write_piped(offset, data, flags)
    }

    fn file_range(&self, offset: u64, len: u64, flags: Flags) -> Option<RangeOrHole> {
        self.disk.check_range(offset, len);
        self.disk.file_range(offset, len, flags)
    }

    /// Cancel-safe: the kernel's part goes on with its own buffer.
    fn read(&self, offset: u64, buf: Buffer, _flags: Flags) -> LocalFuture<'_, Result<Buffer>> {
        self.disk.check_range(offset, buf.len() as u64);
        Box::pin(self.disk.read(offset, buf))
    }

    /// A dropped write may or may not still reach the file, also after a later write to the same place: drain
    /// writes rather than drop them.
    fn write(&self, offset: u64, data: Buffer, flags: Flags) -> LocalFuture<'_, Result<()>> {
        self.disk.check_change(offset, data.len() as u64);
        Box::pin(Disk::write(&self.disk, offset, data, flags))
    }

    /// Cancel-safe: an fsync that has begun goes on, and its failure is not lost.
    fn flush(&self) -> LocalFuture<'_, Result<()>> {
        Box::pin(self.disk.flush())
    }

    fn trim(&self, offset: u64, len: u64, flags: Flags) -> LocalFuture<'_, Result<()>> {
        self.disk.check_change(offset, len);
        Box::pin(Disk::trim(&self.disk, offset, len, flags))
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: Flags) -> LocalFuture<'_, Result<()>> {
        self.disk.check_change(offset, len);
        Box::pin(Disk::write_zeroes(&self.disk, offset, len, flags))
    }

    /// Reads ahead, at most 256 MiB of the range.
    fn cache(&self, offset: u64, len: u64) -> LocalFuture<'_, Result<()>> {
        self.disk.check_range(offset, len);
        Box::pin(Disk::cache(&self.disk, offset, len))
    }

    fn block_status(&self, offset: u64, len: u64, flags: Flags) -> LocalFuture<'_, Result<Vec<Extent>>> {
        self.disk.check_range(offset, len);
        Box::pin(Disk::block_status(&self.disk, offset, len, flags))
    }

    fn grow(&self, size: u64) -> LocalFuture<'_, Result<()>> {
        Box::pin(Disk::grow(&self.disk, size))
    }

    fn shrink(&self, size: u64) -> LocalFuture<'_, Result<()>> {
        Box::pin(Disk::shrink(&self.disk, size))
    }

    fn allocate(&self, offset: u64, len: u64) -> LocalFuture<'_, Result<()>> {
        self.disk.check_change(offset, len);
        Box::pin(self.disk.allocate(offset, len))
    }

    fn allocated(&self) -> Option<u64> {
        self.disk.allocated()
    }
}
