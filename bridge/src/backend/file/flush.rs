//! The flush gate: fsyncs that several flushes share ([`crate::passes`]), and failures that are not forgotten.
//!
//! A failed sync latches: the kernel tells of lost pages once, so that a later sync may succeed although they are
//! gone; every later flush and durable write answers EIO until the file is opened again.
//!
//! A sync runs as a task of its own, so that its outcome is heard even where nobody waits for it any more.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;
use tokio::runtime::Handle;

use super::{CacheMode, Disk, Kind};
use crate::passes::{Pass, Passes};
use crate::uring::{Call, Op};
use crate::{Error, Result};

impl Disk {
    /// Makes every write that was answered before this call durable.
    pub(super) async fn flush(&self) -> Result<()> {
        if self.kind == Kind::Memory || self.options.cache == CacheMode::Unsafe || self.opened.read_only() {
            return Ok(());
        }
        let (file, aio) = (self.file.clone(), self.options.aio);
        self.gate
            .flush(move || async move {
                loop {
                    let op = Op { file: file.clone(), call: Call::Sync };
                    match super::aio::run(aio, op).await.map_err(|_| Errno::IO)?.1 {
                        Err(Errno::INTR) => {}
                        outcome => return outcome.map(drop),
                    }
                }
            })
            .await
    }
}

/// The syncs of one open file.
pub(super) struct FlushGate {
    /// For the log.
    path: PathBuf,
    passes: Passes,
    /// The first failure.
    failed: Mutex<Option<Errno>>,
    no_dsync: AtomicBool,
}

impl FlushGate {
    pub(super) fn new(path: &Path) -> Arc<Self> {
        Arc::new(FlushGate {
            path: path.to_owned(),
            passes: Passes::default(),
            failed: Mutex::default(),
            no_dsync: AtomicBool::new(false),
        })
    }

    /// Waits until a sync that began after this call has succeeded. `sync` performs one if it falls to this
    /// flush to do so. Cancel-safe: whoever still waits goes on.
    ///
    /// # Errors
    /// The failure of that sync, or of any before it.
    pub(super) async fn flush<F>(self: &Arc<Self>, sync: impl FnOnce() -> F) -> Result<()>
    where
        F: Future<Output = std::result::Result<(), Errno>> + Send + 'static,
    {
        let turn = self.passes.join().await;
        self.check()?;
        let Some(turn) = turn else { return Ok(()) };
        let running = Running { gate: self.clone(), outcome: Err(Errno::IO), pass: Some(turn.begin()) };
        let sync = sync();
        let task = async move {
            let mut running = running;
            running.outcome = sync.await;
        };
        match Handle::try_current() {
            // A task that was lost has latched its failure.
            Ok(handle) => drop(handle.spawn(task).await),
            Err(_) => task.await,
        }
        self.check()
    }

    /// EIO if a failure was latched.
    pub(super) fn check(&self) -> Result<()> {
        match *self.failed() {
            Some(errno) => Err(latched(errno)),
            None => Ok(()),
        }
    }

    /// Latches a failure.
    pub(super) fn fail(&self, errno: Errno) {
        let mut failed = self.failed();
        if failed.is_none() {
            tracing::error!(path = %self.path.display(), %errno, "a sync failed: flushes and durable writes answer EIO from now on");
            *failed = Some(errno);
        }
    }

    /// Whether `RWF_DSYNC` is worth trying.
    pub(super) fn dsync(&self) -> bool {
        !self.no_dsync.load(Relaxed)
    }

    /// Remembers that this file has no `RWF_DSYNC`.
    pub(super) fn forget_dsync(&self) {
        self.no_dsync.store(true, Relaxed);
    }

    fn failed(&self) -> MutexGuard<'_, Option<Errno>> {
        self.failed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A sync under way. Dropped unfinished, with its runtime, it has failed as far as anybody can tell.
struct Running {
    gate: Arc<FlushGate>,
    outcome: std::result::Result<(), Errno>,
    pass: Option<Pass>,
}

impl Drop for Running {
    fn drop(&mut self) {
        match (self.outcome, self.pass.take()) {
            (Ok(()), Some(pass)) => pass.succeed(),
            // The failure is latched before the pass, which is still held here, lets the next flush go on.
            (outcome, _pass) => self.gate.fail(outcome.err().unwrap_or(Errno::IO)),
        }
    }
}

/// What a flush says after a failure: always EIO, whatever the first errno was.
fn latched(first: Errno) -> Error {
    Error::from_errno(Errno::IO, format!("an earlier sync failed ({first}): open the file again"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;
    use std::rc::Rc;
    use std::task::{Context, Waker};
    use tokio::sync::oneshot;

    type Fake = oneshot::Sender<std::result::Result<(), Errno>>;

    /// A gate whose syncs begin when they are polled and end when the test says so.
    #[derive(Clone)]
    struct Bench {
        gate: Arc<FlushGate>,
        begun: Rc<RefCell<Vec<Fake>>>,
    }

    impl Bench {
        fn new() -> Self {
            Bench { gate: FlushGate::new(Path::new("test")), begun: Rc::default() }
        }

        fn flush(&self) -> tokio::task::JoinHandle<Result<()>> {
            let Bench { gate, begun } = self.clone();
            tokio::task::spawn_local(async move { Bench { gate, begun }.wait().await })
        }

        async fn wait(&self) -> Result<()> {
            self.gate
                .flush(|| {
                    let (end, ended) = oneshot::channel();
                    self.begun.borrow_mut().push(end);
                    async move { ended.await.unwrap_or(Err(Errno::IO)) }
                })
                .await
        }

        fn end(&self, outcome: std::result::Result<(), Errno>) {
            self.begun.borrow_mut().remove(0).send(outcome).unwrap();
        }

        fn under_way(&self) -> usize {
            self.begun.borrow().len()
        }
    }

    async fn settle() {
        for _ in 0..10 {
            tokio::task::yield_now().await;
        }
    }

    fn local(test: impl Future<Output = ()> + 'static) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        tokio::task::LocalSet::new().block_on(&runtime, test);
    }

    #[test]
    fn a_flush_during_a_sync_waits_for_the_next_and_shares_it() {
        local(async {
            let bench = Bench::new();
            let first = bench.flush();
            settle().await;
            let second = bench.flush();
            let third = bench.flush();
            settle().await;
            assert_eq!(bench.under_way(), 1);
            bench.end(Ok(()));
            settle().await;
            assert!(first.is_finished() && !second.is_finished() && !third.is_finished());
            assert_eq!(bench.under_way(), 1, "one sync for both");
            bench.end(Ok(()));
            settle().await;
            first.await.unwrap().unwrap();
            second.await.unwrap().unwrap();
            third.await.unwrap().unwrap();
            assert_eq!(bench.gate.passes.begun(), 2);
        });
    }

    #[test]
    fn a_failure_latches() {
        local(async {
            let bench = Bench::new();
            let first = bench.flush();
            settle().await;
            let second = bench.flush();
            settle().await;
            bench.end(Err(Errno::NOSPC));
            for flush in [first, second] {
                let error = flush.await.unwrap().unwrap_err();
                assert_eq!(error.errno(), Some(libc::EIO), "{error}");
            }
            assert!(bench.wait().await.is_err() && bench.gate.check().is_err());
            assert_eq!(bench.under_way(), 0, "no sync is tried after a failure");
        });
    }

    #[test]
    fn a_dropped_leader_neither_wedges_nor_hides() {
        local(async {
            let bench = Bench::new();
            let leader = bench.flush();
            settle().await;
            let follower = bench.flush();
            settle().await;
            leader.abort();
            settle().await;
            assert_eq!(bench.under_way(), 1, "its sync goes on");
            bench.end(Ok(()));
            settle().await;
            bench.end(Ok(()));
            follower.await.unwrap().unwrap();

            let leader = bench.flush();
            settle().await;
            leader.abort();
            settle().await;
            bench.end(Err(Errno::IO));
            settle().await;
            assert!(bench.gate.check().is_err(), "the failure nobody waited for is kept");
        });
    }

    #[test]
    fn a_dropped_follower_whose_turn_has_come_leaves_it_to_another() {
        local(async {
            let bench = Bench::new();
            let first = bench.flush();
            settle().await;
            let second = bench.flush();
            let third = bench.flush();
            settle().await;
            bench.end(Ok(()));
            second.abort();
            settle().await;
            assert_eq!(bench.under_way(), 1);
            bench.end(Ok(()));
            first.await.unwrap().unwrap();
            third.await.unwrap().unwrap();
        });
    }

    #[test]
    fn a_sync_that_is_lost_with_its_runtime_counts_as_failed() {
        let gate = FlushGate::new(Path::new("test"));
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let mut flush = Box::pin(gate.flush(std::future::pending::<std::result::Result<(), Errno>>));
            assert!(flush.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
        });
        drop(runtime);
        assert!(gate.check().is_err());
    }
}
