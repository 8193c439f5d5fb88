//! Limits what passes per second, in operations and bytes, with QEMU's meaning and key names.
//!
//! ```text
//!   try_read, try_write ──> gate: does the bucket allow it? ──no──> None (the slow path is the way)
//!   read, write, trim, ─── > gate: wait in line, one line for reads and one for writes
//! ```
//!
//! The arithmetic is in `bucket`, the waiting in `gate`, the settings in `config`. Here is what each operation
//! counts as: trim and zeroes are writes of their full length, cache is a read of its full length (as QEMU has
//! it); flush, block status and what is about space or size pass.

use std::sync::Arc;

use bucket::Direction;
use gate::Gate;

use crate::layer::SettingError;
use crate::{Backend, Buffer, Depth, Extent, Flags, Geometry, LocalFuture, Piped, RangeOrHole, Result};

mod bucket;
mod config;
mod gate;

pub use config::{Limit, Limits, MAX_RATE, ThrottleConfig};

/// A source behind limits, which can be changed at run time through a [`ThrottleHandle`].
///
/// Capabilities: those of the inner backend, unchanged.
///
/// Each request is charged once, when it goes. Without a limit the fast path costs one relaxed load.
pub struct Throttle {
    inner: Box<dyn Backend>,
    gate: Arc<Gate>,
}

/// Reads and changes the limits of a [`Throttle`], or of all of its group; clones are the same handle.
#[derive(Clone)]
pub struct ThrottleHandle {
    gate: Arc<Gate>,
}

impl Throttle {
    /// `inner` behind these limits.
    ///
    /// # Errors
    /// Those of [`ThrottleConfig::check`].
    pub fn new(inner: Box<dyn Backend>, config: ThrottleConfig) -> std::result::Result<Self, SettingError> {
        Ok(Throttle::join(inner, &ThrottleHandle::new(config)?))
    }

    /// `inner` in the group of another throttle: they share limits, buckets and lines, and are changed together. So no
    /// member starves, and what one leaves the others may use.
    pub fn join(inner: Box<dyn Backend>, group: &ThrottleHandle) -> Self {
        Throttle { inner, gate: group.gate.clone() }
    }

    /// The handle that changes the limits.
    pub fn handle(&self) -> ThrottleHandle {
        ThrottleHandle { gate: self.gate.clone() }
    }
}

impl ThrottleHandle {
    /// The limits of a group, for [`Throttle::join`].
    ///
    /// # Errors
    /// Those of [`ThrottleConfig::check`].
    pub fn new(config: ThrottleConfig) -> std::result::Result<Self, SettingError> {
        let gate = Arc::new(Gate::new());
        gate.set(config)?;
        Ok(ThrottleHandle { gate })
    }

    /// Replaces the limits at once, with empty buckets (as QEMU does), and lets those who wait start anew.
    ///
    /// # Errors
    /// Those of [`ThrottleConfig::check`]; then the old limits stay.
    pub fn set(&self, config: ThrottleConfig) -> std::result::Result<(), SettingError> {
        self.gate.set(config)
    }

    /// The present limits.
    pub fn config(&self) -> ThrottleConfig {
        self.gate.config()
    }
}

impl Backend for Throttle {
    fn geometry(&self) -> Geometry {
        self.inner.geometry()
    }

    fn try_read(&self, offset: u64, buf: &mut [u8], flags: Flags) -> Option<Result<()>> {
        if self.gate.is_open() {
            return self.inner.try_read(offset, buf, flags);
        }
        let pass = self.gate.try_pass(Direction::Read, buf.len() as u64, flags)?;
        // Where the inner backend declines, the pass is dropped unused and takes its charge back.
        let result = self.inner.try_read(offset, buf, flags)?;
        pass.use_up();
        Some(result)
    }

    fn try_write(&self, offset: u64, data: &[u8], flags: Flags) -> Option<Result<()>> {
        if self.gate.is_open() {
            return self.inner.try_write(offset, data, flags);
        }
        let pass = self.gate.try_pass(Direction::Write, data.len() as u64, flags)?;
        let result = self.inner.try_write(offset, data, flags)?;
        pass.use_up();
        Some(result)
    }

    fn try_write_piped(&self, offset: u64, data: Piped<'_>, flags: Flags) -> Option<Result<()>> {
        if self.gate.is_open() {
            return self.inner.try_write_piped(offset, data, flags);
        }
        let pass = self.gate.try_pass(Direction::Write, data.len as u64, flags)?;
        let result = self.inner.try_write_piped(offset, data, flags)?;
        pass.use_up();
        Some(result)
    }

    fn file_range(&self, offset: u64, len: u64, flags: Flags) -> Option<RangeOrHole> {
        let range = self.inner.file_range(offset, len, flags)?;
        if !self.gate.is_open() {
            let len = match &range {
                RangeOrHole::Range(range) => range.len,
                RangeOrHole::Hole(len) => *len,
            };
            self.gate.try_pass(Direction::Read, len, flags)?.use_up();
        }
        Some(range)
    }

    fn read(&self, offset: u64, buf: Buffer, flags: Flags) -> LocalFuture<'_, Result<Buffer>> {
        Box::pin(async move {
            self.gate.pass(Direction::Read, buf.len() as u64, flags).await;
            self.inner.read(offset, buf, flags).await
        })
    }

    fn write(&self, offset: u64, data: Buffer, flags: Flags) -> LocalFuture<'_, Result<()>> {
        Box::pin(async move {
            self.gate.pass(Direction::Write, data.len() as u64, flags).await;
            self.inner.write(offset, data, flags).await
        })
    }

    fn flush(&self) -> LocalFuture<'_, Result<()>> {
        self.inner.flush()
    }

    fn trim(&self, offset: u64, len: u64, flags: Flags) -> LocalFuture<'_, Result<()>> {
        Box::pin(async move {
            self.gate.pass(Direction::Write, len, flags).await;
            self.inner.trim(offset, len, flags).await
        })
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: Flags) -> LocalFuture<'_, Result<()>> {
        Box::pin(async move {
            self.gate.pass(Direction::Write, len, flags).await;
            self.inner.write_zeroes(offset, len, flags).await
        })
    }

    fn cache(&self, offset: u64, len: u64) -> LocalFuture<'_, Result<()>> {
        Box::pin(async move {
            self.gate.pass(Direction::Read, len, Flags::NONE).await;
            self.inner.cache(offset, len).await
        })
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
mod tests;
