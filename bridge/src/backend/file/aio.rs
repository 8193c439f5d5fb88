//! Runs operations off the worker's thread: on its io_uring, or on its runtime's pool of threads.

use rustix::io::Errno;
use tokio::runtime::Handle;

use super::{AioMode, Disk, Kind};
use crate::uring::{self, Op};
use crate::{Error, ErrorKind, Result};

/// Runs an operation to its end, and hands it back with the outcome. When the future is dropped, an operation
/// that has begun goes on and keeps what it owns.
///
/// # Errors
/// `ShuttingDown` where the runtime is ending.
pub(super) async fn run(aio: AioMode, op: Op) -> Result<(Op, std::result::Result<usize, Errno>)> {
    let op = match aio {
        AioMode::Threads => op,
        AioMode::Auto | AioMode::IoUring => match uring::submit(op) {
            Ok(completion) => return Ok(completion.await),
            Err(_) if aio == AioMode::IoUring => return Err(no_ring()),
            Err(op) => op,
        },
    };
    in_pool(move || {
        let mut op = op;
        let outcome = op.run();
        (op, outcome)
    })
    .await
}

impl Disk {
    /// Runs a read or write. On tmpfs right here: it waits for nothing, and io_uring would hand it to a thread.
    pub(super) async fn transfer(&self, mut op: Op) -> Result<(Op, std::result::Result<usize, Errno>)> {
        if self.kind == Kind::Memory {
            let outcome = op.run();
            return Ok((op, outcome));
        }
        run(self.options.aio, op).await
    }
}

/// Runs a function on the pool of this worker. Outside of any runtime it runs right here.
///
/// # Errors
/// `ShuttingDown` where the runtime is ending.
pub(super) async fn in_pool<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T> {
    match Handle::try_current() {
        Ok(handle) => handle.spawn_blocking(work).await.map_err(|_| ended()),
        Err(_) => Ok(work()),
    }
}

/// Runs a future to its end even where the caller stops waiting for it.
///
/// # Errors
/// Its own; `ShuttingDown` where the runtime ends first.
pub(super) async fn to_the_end<T: Send + 'static>(
    future: impl Future<Output = Result<T>> + Send + 'static,
) -> Result<T> {
    match Handle::try_current() {
        Ok(handle) => handle.spawn(future).await.unwrap_or_else(|_| Err(ended())),
        Err(_) => future.await,
    }
}

/// Some thread of a process that may make rings could make none.
fn no_ring() -> Error {
    Error::new(ErrorKind::NoMemory, "no io_uring on this worker, and --aio io_uring asks for one")
}

fn ended() -> Error {
    Error::new(ErrorKind::ShuttingDown, "the worker is ending")
}
