//! Makes requests fail, be torn, come late or hang, by rules and a seed: for tests, and for seeing how the users
//! of an export bear it. What goes wrong and when is in `rule`.
//!
//! Deterministic: which of the requests in their order of arrival are hit follows from the seed alone.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use rustix::io::Errno;

use crate::{
    Backend, Buffer, Depth, Error, Extent, Flags, Geometry, LocalFuture, Operation, RangeOrHole, Request,
    Result,
};

mod rule;

pub use rule::{Effect, FaultConfig, Rule, When};

/// A source whose requests go wrong.
///
/// Capabilities: those of the inner backend, unchanged. The fast path declines whatever a rule could hit.
pub struct Fault {
    inner: Box<dyn Backend>,
    shared: Arc<Shared>,
}

/// Watches and steers a [`Fault`]; clones are the same handle.
#[derive(Clone)]
pub struct FaultHandle {
    shared: Arc<Shared>,
}

struct Shared {
    config: FaultConfig,
    /// Requests that each rule matched.
    matched: Box<[AtomicU64]>,
    enabled: AtomicBool,
    injected: AtomicU64,
    hanging: AtomicUsize,
    released: tokio::sync::Notify,
}

/// What was decided about one request, once it may go on.
enum Verdict {
    Execute,
    Tear(Errno),
}

impl Fault {
    /// `inner` with these faults. The seed is logged.
    pub fn new(inner: Box<dyn Backend>, config: FaultConfig) -> Self {
        tracing::info!(seed = config.seed, rules = config.rules.len(), "injecting faults");
        let matched = config.rules.iter().map(|_| AtomicU64::new(0)).collect();
        let shared = Shared {
            config,
            matched,
            enabled: AtomicBool::new(true),
            injected: AtomicU64::new(0),
            hanging: AtomicUsize::new(0),
            released: tokio::sync::Notify::new(),
        };
        Fault { inner, shared: Arc::new(shared) }
    }

    /// The handle that watches and steers it.
    pub fn handle(&self) -> FaultHandle {
        FaultHandle { shared: self.shared.clone() }
    }

    /// Whether a rule could hit a request like this.
    fn may_hit(&self, operation: Operation, offset: u64, len: u64) -> bool {
        let request = Request::new(operation, offset, len);
        self.shared.enabled.load(Relaxed)
            && self.shared.config.rules.iter().any(|rule| rule.matches(&request))
    }

    /// Decides about a request, and waits as long as it has to be late.
    async fn decide(&self, operation: Operation, offset: u64, len: u64) -> Result<Verdict> {
        let shared = &*self.shared;
        if !shared.enabled.load(Relaxed) {
            return Ok(Verdict::Execute);
        }
        let request = Request::new(operation, offset, len);
        let (mut delay, mut hang, mut tear, mut fail) = (Duration::ZERO, false, None, None);
        for (index, (rule, matched)) in shared.config.rules.iter().zip(&shared.matched).enumerate() {
            if !rule.matches(&request) {
                continue;
            }
            let number = matched.fetch_add(1, Relaxed) + 1;
            if !rule.hits(shared.config.seed.wrapping_add(index as u64), number) {
                continue;
            }
            shared.injected.fetch_add(1, Relaxed);
            match rule.effect {
                Effect::Delay(more) => delay = delay.saturating_add(more),
                Effect::Hang => hang = true,
                Effect::Short(errno) => tear = Some(errno),
                Effect::Error(errno) => fail = Some(errno),
            }
        }
        if !delay.is_zero() {
            tokio::time::sleep(delay).await;
        }
        if hang {
            shared.hang().await;
        }
        match (fail, tear) {
            (Some(errno), _) => Err(injected(errno)),
            (None, Some(errno)) if operation.changes_data() => Ok(Verdict::Tear(errno)),
            (None, Some(errno)) => Err(injected(errno)),
            (None, None) => Ok(Verdict::Execute),
        }
    }

    /// Half of a length, in blocks that the inner backend takes.
    fn half(&self, len: u64) -> u64 {
        let half = len / 2;
        half - half % u64::from(self.inner.geometry().min_block)
    }
}

impl FaultHandle {
    /// Switches the faults off or on again; they start switched on. Those under way are not affected.
    pub fn set_enabled(&self, enabled: bool) {
        self.shared.enabled.store(enabled, Relaxed);
    }

    /// Lets every request go on that hangs now.
    pub fn release(&self) {
        self.shared.released.notify_waiters();
    }

    /// Requests that hang now.
    pub fn hanging(&self) -> usize {
        self.shared.hanging.load(Relaxed)
    }

    /// Hits up to now, of all rules together.
    pub fn injected(&self) -> u64 {
        self.shared.injected.load(Relaxed)
    }

    /// The seed.
    pub fn seed(&self) -> u64 {
        self.shared.config.seed
    }
}

impl Shared {
    async fn hang(&self) {
        struct Count<'a>(&'a AtomicUsize);
        impl Drop for Count<'_> {
            fn drop(&mut self) {
                self.0.fetch_sub(1, Relaxed);
            }
        }
        // Made before it is counted: whoever sees the count can release it.
        let released = self.released.notified();
        self.hanging.fetch_add(1, Relaxed);
        let _count = Count(&self.hanging);
        released.await;
    }
}

impl Backend for Fault {
    fn geometry(&self) -> Geometry {
        self.inner.geometry()
    }

    fn try_read(&self, offset: u64, buf: &mut [u8], flags: Flags) -> Option<Result<()>> {
        if self.may_hit(Operation::Read, offset, buf.len() as u64) {
            return None;
        }
        self.inner.try_read(offset, buf, flags)
    }

    fn try_write(&self, offset: u64, data: &[u8], flags: Flags) -> Option<Result<()>> {
        if self.may_hit(Operation::Write, offset, data.len() as u64) {
            return None;
        }
        self.inner.try_write(offset, data, flags)
    }

    fn file_range(&self, offset: u64, len: u64, flags: Flags) -> Option<RangeOrHole> {
        if self.may_hit(Operation::Read, offset, len) {
            return None;
        }
        self.inner.file_range(offset, len, flags)
    }

    fn read(&self, offset: u64, buf: Buffer, flags: Flags) -> LocalFuture<'_, Result<Buffer>> {
        Box::pin(async move {
            self.decide(Operation::Read, offset, buf.len() as u64).await?;
            self.inner.read(offset, buf, flags).await
        })
    }

    fn write(&self, offset: u64, mut data: Buffer, flags: Flags) -> LocalFuture<'_, Result<()>> {
        Box::pin(async move {
            match self.decide(Operation::Write, offset, data.len() as u64).await? {
                Verdict::Execute => self.inner.write(offset, data, flags).await,
                Verdict::Tear(errno) => {
                    data.truncate(usize::try_from(self.half(data.len() as u64)).unwrap_or(0));
                    self.inner.write(offset, data, flags).await?;
                    Err(injected(errno))
                }
            }
        })
    }

    fn flush(&self) -> LocalFuture<'_, Result<()>> {
        Box::pin(async move {
            self.decide(Operation::Flush, 0, 0).await?;
            self.inner.flush().await
        })
    }

    fn trim(&self, offset: u64, len: u64, flags: Flags) -> LocalFuture<'_, Result<()>> {
        Box::pin(async move {
            match self.decide(Operation::Trim, offset, len).await? {
                Verdict::Execute => self.inner.trim(offset, len, flags).await,
                Verdict::Tear(errno) => {
                    self.inner.trim(offset, self.half(len), flags).await?;
                    Err(injected(errno))
                }
            }
        })
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: Flags) -> LocalFuture<'_, Result<()>> {
        Box::pin(async move {
            match self.decide(Operation::WriteZeroes, offset, len).await? {
                Verdict::Execute => self.inner.write_zeroes(offset, len, flags).await,
                Verdict::Tear(errno) => {
                    self.inner.write_zeroes(offset, self.half(len), flags).await?;
                    Err(injected(errno))
                }
            }
        })
    }

    fn cache(&self, offset: u64, len: u64) -> LocalFuture<'_, Result<()>> {
        Box::pin(async move {
            self.decide(Operation::Cache, offset, len).await?;
            self.inner.cache(offset, len).await
        })
    }

    fn block_status(&self, offset: u64, len: u64, flags: Flags) -> LocalFuture<'_, Result<Vec<Extent>>> {
        Box::pin(async move {
            self.decide(Operation::BlockStatus, offset, len).await?;
            self.inner.block_status(offset, len, flags).await
        })
    }

    fn allocation_depth(&self, offset: u64, len: u64, flags: Flags) -> LocalFuture<'_, Result<Vec<Depth>>> {
        Box::pin(async move {
            self.decide(Operation::BlockStatus, offset, len).await?;
            self.inner.allocation_depth(offset, len, flags).await
        })
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

fn injected(errno: Errno) -> Error {
    Error::from_errno(errno, "injected fault")
}

#[cfg(test)]
mod tests;
