//! A part of a source, as a source of its own: what `--offset`, `--size` and `--partition` serve.
//!
//! Capabilities are the source's, but for growing and shrinking: a part has its place. Every operation passes through, moved; nothing
//! outside the part can be reached, since the range is checked against this layer's size.

use crate::{
    Backend, Buffer, Capabilities, Depth, Extent, Flags, Geometry, LocalFuture, Piped, RangeOrHole, Result,
};

/// A part of another backend.
pub struct Slice {
    inner: Box<dyn Backend>,
    start: u64,
    len: u64,
}

impl Slice {
    /// `len` bytes of `inner` from `start` on; cut where `inner` ends.
    pub fn new(inner: Box<dyn Backend>, start: u64, len: u64) -> Self {
        let size = inner.geometry().size;
        let start = start.min(size);
        Slice { inner, start, len: len.min(size - start) }
    }
}

impl Backend for Slice {
    fn geometry(&self) -> Geometry {
        let geometry = self.inner.geometry();
        Geometry {
            size: self.len,
            capabilities: geometry.capabilities.without(Capabilities::GROW | Capabilities::SHRINK),
            ..geometry
        }
    }

    fn try_read(&self, offset: u64, buf: &mut [u8], flags: Flags) -> Option<Result<()>> {
        self.inner.try_read(self.start + offset, buf, flags)
    }

    fn try_write(&self, offset: u64, data: &[u8], flags: Flags) -> Option<Result<()>> {
        self.inner.try_write(self.start + offset, data, flags)
    }

    fn try_write_piped(&self, offset: u64, data: Piped<'_>, flags: Flags) -> Option<Result<()>> {
        self.inner.try_write_piped(self.start + offset, data, flags)
    }

    fn file_range(&self, offset: u64, len: u64, flags: Flags) -> Option<RangeOrHole> {
        self.inner.file_range(self.start + offset, len, flags)
    }

    fn read(&self, offset: u64, buf: Buffer, flags: Flags) -> LocalFuture<'_, Result<Buffer>> {
        self.inner.read(self.start + offset, buf, flags)
    }

    fn write(&self, offset: u64, data: Buffer, flags: Flags) -> LocalFuture<'_, Result<()>> {
        self.inner.write(self.start + offset, data, flags)
    }

    fn flush(&self) -> LocalFuture<'_, Result<()>> {
        self.inner.flush()
    }

    fn trim(&self, offset: u64, len: u64, flags: Flags) -> LocalFuture<'_, Result<()>> {
        self.inner.trim(self.start + offset, len, flags)
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: Flags) -> LocalFuture<'_, Result<()>> {
        self.inner.write_zeroes(self.start + offset, len, flags)
    }

    fn cache(&self, offset: u64, len: u64) -> LocalFuture<'_, Result<()>> {
        self.inner.cache(self.start + offset, len)
    }

    fn block_status(&self, offset: u64, len: u64, flags: Flags) -> LocalFuture<'_, Result<Vec<Extent>>> {
        self.inner.block_status(self.start + offset, len, flags)
    }

    fn allocation_depth(&self, offset: u64, len: u64, flags: Flags) -> LocalFuture<'_, Result<Vec<Depth>>> {
        self.inner.allocation_depth(self.start + offset, len, flags)
    }

    fn allocate(&self, offset: u64, len: u64) -> LocalFuture<'_, Result<()>> {
        self.inner.allocate(self.start + offset, len)
    }

    fn loss_after_crash(&self) -> Option<String> {
        self.inner.loss_after_crash()
    }
}
