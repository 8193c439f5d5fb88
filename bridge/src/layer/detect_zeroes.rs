//! Turns writes of nothing but zeroes into write-zeroes, as QEMU's `detect-zeroes` does: for guests that cannot say
//! it themselves, and for copying onto a thin disk.
//!
//! A request is looked at as a whole, as QEMU does. One that is not aligned to [`UNIT_BYTES`] passes as it is: no space
//! could be given back, and storing a few zeroes is quicker than any operation of the file system.

use std::future::ready;

use crate::zero::is_zero;
use crate::{
    Backend, Buffer, Capabilities, Depth, Extent, Flags, Geometry, LocalFuture, RangeOrHole, Result,
};

/// Alignment and smallest length of what is converted, in bytes; the last bytes of the disk may be fewer.
pub const UNIT_BYTES: u64 = 4096;

/// What becomes of zeroes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ZeroMode {
    /// They are zeroes whose space stays allocated.
    On,
    /// Their space is given back, where the source can.
    Unmap,
}

/// A source that sees zeroes as such.
///
/// Capabilities: those of the inner backend, unchanged. Without `WRITE_ZEROES` nothing is converted. What is not
/// zeroes has the fast path of the inner backend; what is takes the slow one.
pub struct DetectZeroes {
    inner: Box<dyn Backend>,
    mode: ZeroMode,
}

impl DetectZeroes {
    /// `inner`, with its writes looked through.
    pub fn new(inner: Box<dyn Backend>, mode: ZeroMode) -> Self {
        DetectZeroes { inner, mode }
    }

    fn converts(&self, offset: u64, data: &[u8]) -> bool {
        let end = offset + data.len() as u64;
        if data.is_empty() || !offset.is_multiple_of(UNIT_BYTES) || !is_zero(data) {
            return false;
        }
        let geometry = self.inner.geometry();
        (end.is_multiple_of(UNIT_BYTES) || end == geometry.size)
            && geometry.capabilities.contains(Capabilities::WRITE_ZEROES)
    }
}

impl Backend for DetectZeroes {
    fn geometry(&self) -> Geometry {
        self.inner.geometry()
    }

    fn try_read(&self, offset: u64, buf: &mut [u8], flags: Flags) -> Option<Result<()>> {
        self.inner.try_read(offset, buf, flags)
    }

    fn try_write(&self, offset: u64, data: &[u8], flags: Flags) -> Option<Result<()>> {
        if self.converts(offset, data) {
            return None;
        }
        self.inner.try_write(offset, data, flags)
    }

    fn file_range(&self, offset: u64, len: u64, flags: Flags) -> Option<RangeOrHole> {
        self.inner.file_range(offset, len, flags)
    }

    fn read(&self, offset: u64, buf: Buffer, flags: Flags) -> LocalFuture<'_, Result<Buffer>> {
        self.inner.read(offset, buf, flags)
    }

    fn write(&self, offset: u64, data: Buffer, flags: Flags) -> LocalFuture<'_, Result<()>> {
        if data.is_empty() {
            return Box::pin(ready(Ok(())));
        }
        if !self.converts(offset, &data) {
            return self.inner.write(offset, data, flags);
        }
        let flags = match self.mode {
            ZeroMode::On => flags | Flags::NO_HOLE,
            ZeroMode::Unmap => flags,
        };
        self.inner.write_zeroes(offset, data.len() as u64, flags)
    }

    fn flush(&self) -> LocalFuture<'_, Result<()>> {
        self.inner.flush()
    }

    fn trim(&self, offset: u64, len: u64, flags: Flags) -> LocalFuture<'_, Result<()>> {
        self.inner.trim(offset, len, flags)
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: Flags) -> LocalFuture<'_, Result<()>> {
        self.inner.write_zeroes(offset, len, flags)
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

    fn grow(&self, size: u64) -> LocalFuture<'_, Result<()>> {
        self.inner.grow(size)
    }

    fn shrink(&self, size: u64) -> LocalFuture<'_, Result<()>> {
        self.inner.shrink(size)
    }

    fn allocate(&self, offset: u64, len: u64) -> LocalFuture<'_, Result<()>> {
        self.inner.allocate(offset, len)
    }

    fn allocated(&self) -> Option<u64> {
        self.inner.allocated()
    }

    fn loss_after_crash(&self) -> Option<String> {
        self.inner.loss_after_crash()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ExtentKind;
    use crate::backend::memory::{CHUNK_BYTES, MemoryBackend};
    use tokio::runtime::{Builder, LocalOptions};

    const CHUNK: usize = 64 << 10;
    const _: () = assert!(CHUNK as u64 == CHUNK_BYTES);

    fn kinds(mode: ZeroMode, offset: u64, data: &[u8]) -> Vec<ExtentKind> {
        let disk = DetectZeroes::new(Box::new(MemoryBackend::new(2 * CHUNK_BYTES + 5)), mode);
        let runtime = Builder::new_current_thread().build_local(LocalOptions::default()).unwrap();
        runtime.block_on(async {
            disk.try_write(0, &[1; 2 * CHUNK + 5], Flags::NONE).unwrap().unwrap();
            if disk.try_write(offset, data, Flags::NONE).is_none() {
                disk.write(offset, Buffer::copy_of(data), Flags::NONE).await.unwrap();
            }
            let mut now = vec![7; data.len()];
            disk.try_read(offset, &mut now, Flags::NONE).unwrap().unwrap();
            assert!(now == data);
            let extents = disk.block_status(0, 2 * CHUNK_BYTES + 5, Flags::NONE).await.unwrap();
            extents.iter().map(|extent| extent.kind).collect()
        })
    }

    #[test]
    fn whole_requests_of_zeroes_are_converted_where_they_are_aligned() {
        use ExtentKind::{Data, Hole, Zero};
        let chunk = vec![0; CHUNK];
        assert_eq!(kinds(ZeroMode::On, 0, &chunk), [Zero, Data]);
        assert_eq!(kinds(ZeroMode::Unmap, CHUNK_BYTES, &chunk), [Data, Hole, Data]);
        assert_eq!(kinds(ZeroMode::Unmap, 2 * CHUNK_BYTES, &[0; 5]), [Data, Hole], "the end of the disk");
        assert_eq!(kinds(ZeroMode::Unmap, 1, &chunk), [Data], "not aligned");
        assert_eq!(kinds(ZeroMode::Unmap, 0, &chunk[1..]), [Data], "no whole units");
        let mut one = chunk.clone();
        one[CHUNK - 1] = 1;
        assert_eq!(kinds(ZeroMode::Unmap, 0, &one), [Data], "one byte is not zero");
        assert_eq!(kinds(ZeroMode::Unmap, 4096, &[]), [Data]);
    }
}
