//! Refuses every change. A guard for exports that must not be written, whatever the backend could do.

use std::future::ready;
use std::sync::Arc;

use crate::{
    Backend, Buffer, Capabilities, Depth, Error, ErrorKind, Extent, Flags, Geometry, LocalFuture,
    RangeOrHole, Result,
};

/// A source that cannot be changed through this layer.
///
/// Capabilities: gains `READ_ONLY`, loses `TRIM`, `WRITE_ZEROES`, `FAST_ZERO`, `FUA`, `GROW`, `SHRINK` and `ALLOCATE`; keeps the rest. A
/// flush passes through: the source may hold changes that were made before.
pub struct ReadOnly {
    inner: Arc<dyn Backend>,
}

impl ReadOnly {
    /// `inner`, protected.
    pub fn new(inner: Box<dyn Backend>) -> Self {
        ReadOnly { inner: Arc::from(inner) }
    }

    /// A protected way to a source that others may change meanwhile.
    pub fn over(inner: Arc<dyn Backend>) -> Self {
        ReadOnly { inner }
    }
}

impl Backend for ReadOnly {
    fn geometry(&self) -> Geometry {
        let geometry = self.inner.geometry();
        let lost = Capabilities::TRIM
            | Capabilities::WRITE_ZEROES
            | Capabilities::FAST_ZERO
            | Capabilities::FUA
            | Capabilities::GROW
            | Capabilities::SHRINK
            | Capabilities::ALLOCATE;
        Geometry { capabilities: geometry.capabilities.without(lost) | Capabilities::READ_ONLY, ..geometry }
    }

    fn try_read(&self, offset: u64, buf: &mut [u8], flags: Flags) -> Option<Result<()>> {
        self.inner.try_read(offset, buf, flags)
    }

    fn try_write(&self, _offset: u64, _data: &[u8], _flags: Flags) -> Option<Result<()>> {
        Some(Err(refusal()))
    }

    fn file_range(&self, offset: u64, len: u64, flags: Flags) -> Option<RangeOrHole> {
        self.inner.file_range(offset, len, flags)
    }

    fn read(&self, offset: u64, buf: Buffer, flags: Flags) -> LocalFuture<'_, Result<Buffer>> {
        self.inner.read(offset, buf, flags)
    }

    fn write(&self, _offset: u64, _data: Buffer, _flags: Flags) -> LocalFuture<'_, Result<()>> {
        Box::pin(ready(Err(refusal())))
    }

    fn flush(&self) -> LocalFuture<'_, Result<()>> {
        self.inner.flush()
    }

    fn trim(&self, _offset: u64, _len: u64, _flags: Flags) -> LocalFuture<'_, Result<()>> {
        Box::pin(ready(Err(refusal())))
    }

    fn write_zeroes(&self, _offset: u64, _len: u64, _flags: Flags) -> LocalFuture<'_, Result<()>> {
        Box::pin(ready(Err(refusal())))
    }

    fn cache(&self, offset: u64, len: u64) -> LocalFuture<'_, Result<()>> {
        self.inner.cache(offset, len)
    }

    fn block_status(&self, offset: u64, len: u64, flags: Flags) -> LocalFuture<'_, Result<Vec<Extent>>> {
        self.inner.block_status(offset, len, flags)
    }

    fn allocation_depth(&self, offset: u64, len: u64, flags: Flags) -> LocalFuture<'_, Result<Vec<Depth>>> {
        self.inner.allocation_depth(offset, len, flags)
    }

    fn allocated(&self) -> Option<u64> {
        self.inner.allocated()
    }

    fn loss_after_crash(&self) -> Option<String> {
        self.inner.loss_after_crash()
    }
}

fn refusal() -> Error {
    Error::new(ErrorKind::ReadOnly, "the export is read-only")
}
