//! A disk that holds nothing: reads give zeroes, writes are discarded, and everything is answered inline. What
//! a door costs without storage behind it is measured here.

use std::future::ready;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{Acquire, Release};

use crate::{Backend, Buffer, Capabilities, Extent, ExtentKind, Flags, Geometry, LocalFuture, Result};

/// Reads zeroes, discards writes.
pub struct NullBackend {
    size: AtomicU64,
    version: AtomicU64,
}

impl NullBackend {
    /// A disk of `size` bytes.
    pub fn new(size: u64) -> Self {
        NullBackend { size: AtomicU64::new(size), version: AtomicU64::new(0) }
    }
}

impl Backend for NullBackend {
    fn geometry(&self) -> Geometry {
        Geometry {
            version: self.version.load(Acquire),
            size: self.size.load(Acquire),
            min_block: 1,
            preferred_block: 4096,
            capabilities: Capabilities::FLUSH
                | Capabilities::FUA
                | Capabilities::TRIM
                | Capabilities::WRITE_ZEROES
                | Capabilities::FAST_ZERO
                | Capabilities::CACHE
                | Capabilities::MULTI_CONN
                | Capabilities::GROW,
        }
    }

    fn try_read(&self, offset: u64, buf: &mut [u8], _flags: Flags) -> Option<Result<()>> {
        debug_assert!(offset + buf.len() as u64 <= self.size.load(Acquire));
        buf.fill(0);
        Some(Ok(()))
    }

    fn try_write(&self, offset: u64, data: &[u8], _flags: Flags) -> Option<Result<()>> {
        debug_assert!(offset + data.len() as u64 <= self.size.load(Acquire));
        Some(Ok(()))
    }

    fn read(&self, _offset: u64, mut buf: Buffer, _flags: Flags) -> LocalFuture<'_, Result<Buffer>> {
        buf.fill(0);
        Box::pin(ready(Ok(buf)))
    }

    fn write(&self, _offset: u64, _data: Buffer, _flags: Flags) -> LocalFuture<'_, Result<()>> {
        Box::pin(ready(Ok(())))
    }

    fn flush(&self) -> LocalFuture<'_, Result<()>> {
        Box::pin(ready(Ok(())))
    }

    fn trim(&self, _offset: u64, _len: u64, _flags: Flags) -> LocalFuture<'_, Result<()>> {
        Box::pin(ready(Ok(())))
    }

    fn write_zeroes(&self, _offset: u64, _len: u64, _flags: Flags) -> LocalFuture<'_, Result<()>> {
        Box::pin(ready(Ok(())))
    }

    fn cache(&self, _offset: u64, _len: u64) -> LocalFuture<'_, Result<()>> {
        Box::pin(ready(Ok(())))
    }

    fn block_status(&self, _offset: u64, len: u64, _flags: Flags) -> LocalFuture<'_, Result<Vec<Extent>>> {
        Box::pin(ready(Ok(vec![Extent { len, kind: ExtentKind::Hole }])))
    }

    fn grow(&self, size: u64) -> LocalFuture<'_, Result<()>> {
        debug_assert!(size > self.size.load(Acquire));
        self.size.store(size, Release);
        self.version.fetch_add(1, Release);
        Box::pin(ready(Ok(())))
    }
}
