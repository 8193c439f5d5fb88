//! The task that moves a ring along: it submits what came in since its last turn, and wakes whose operation is done.

use std::future::poll_fn;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use tokio::io::unix::AsyncFd;
use tokio::runtime::Handle;

use super::op::Op;
use super::ring::{Next, Outcome, Ring};

/// Turns in one poll: after these, the thread's other tasks have theirs.
const TURNS: usize = 8;

/// A ring, shared by its driver and the futures that wait. The mutex is for those that end on another thread;
/// nobody holds it for longer than a system call that does not wait.
pub(super) struct Shared {
    inner: Mutex<Inner>,
}

struct Inner {
    ring: Ring,
    /// Wakes the driver; None while it is awake, or about to be.
    driver: Option<Waker>,
}

/// Makes a ring and starts its driver on this runtime.
pub(super) fn start(handle: &Handle) -> std::io::Result<Arc<Shared>> {
    let ring = Ring::new()?;
    let descriptor = ring.watch()?;
    let shared = Arc::new(Shared { inner: Mutex::new(Inner { ring, driver: None }) });
    let driver = Driver { descriptor, shared: shared.clone() };
    handle.spawn(async move {
        let mut driver = driver;
        poll_fn(|context| driver.poll(context)).await;
    });
    Ok(shared)
}

/// Waits for an operation. Dropped before, the operation goes on with what it owns, or, where the kernel has not
/// heard of it, never begins.
pub(crate) struct Completion {
    shared: Arc<Shared>,
    key: Option<usize>,
}

impl Shared {
    pub(super) fn submit(self: Arc<Self>, op: Op) -> Result<Completion, Op> {
        let (key, driver) = {
            let mut inner = self.lock();
            (inner.ring.add(op)?, inner.driver.take())
        };
        if let Some(driver) = driver {
            driver.wake();
        }
        Ok(Completion { shared: self, key: Some(key) })
    }

    pub(super) fn open(&self) -> bool {
        !self.lock().ring.closed()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Future for Completion {
    type Output = (Op, Outcome);

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let key = self.key.expect("not polled again after it was ready");
        let polled = self.shared.lock().ring.poll(key, context);
        if polled.is_ready() {
            self.key = None;
        }
        polled
    }
}

impl Drop for Completion {
    fn drop(&mut self) {
        if let Some(key) = self.key {
            self.shared.lock().ring.abandon(key);
        }
    }
}

/// Owns the ring's life: when it is dropped, with its runtime, what the kernel still has is waited for.
struct Driver {
    descriptor: AsyncFd<OwnedFd>,
    shared: Arc<Shared>,
}

impl Driver {
    /// Ready when the runtime has taken the descriptor away: it is ending.
    fn poll(&mut self, context: &mut Context<'_>) -> Poll<()> {
        let mut wakers = Vec::new();
        for _ in 0..TURNS {
            let next = {
                let mut inner = self.shared.lock();
                let next = inner.ring.turn(&mut wakers);
                if next == Next::Wait {
                    inner.driver = Some(context.waker().clone());
                }
                next
            };
            wakers.drain(..).for_each(Waker::wake);
            match next {
                Next::Again => continue,
                Next::Later => break,
                Next::Wait => {}
            }
            // The readiness is cleared before the next turn reads completions: one that comes in between sets
            // it again.
            match self.descriptor.poll_read_ready(context) {
                Poll::Ready(Ok(mut ready)) => ready.clear_ready(),
                Poll::Ready(Err(_)) => return Poll::Ready(()),
                Poll::Pending => return Poll::Pending,
            }
        }
        context.waker().wake_by_ref();
        Poll::Pending
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        let mut wakers = Vec::new();
        if let Err(error) = self.shared.lock().ring.drain(&mut wakers) {
            tracing::error!(%error, "io_uring does not end its operations: their memory stays theirs");
            std::mem::forget(self.shared.clone());
        }
        wakers.into_iter().for_each(Waker::wake);
    }
}
