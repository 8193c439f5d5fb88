//! Requests that have to wait for something: what a task works on, what it tells its queue, and what the queues of a
//! device share. A task outlives its answer where that was given early.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::Waker;
use std::time::{Duration, Instant};

use bridge::{Buffer, Export, Operation, Reply, Request, Result};
use tokio::sync::watch;

/// What the queues of a device share.
pub(super) struct Common {
    pub(super) export: Arc<Export>,
    /// A request that takes longer is answered with EIO.
    pub(super) io_timeout: Option<Duration>,
    /// Changes that were answered with EIO and still go on.
    pub(super) late_changes: AtomicUsize,
    /// Set once everything is to be answered with EIO, and nothing new begun.
    pub(super) give_up: watch::Sender<bool>,
}

impl Common {
    pub(super) fn new(export: Arc<Export>, io_timeout: Option<Duration>) -> Self {
        Common { export, io_timeout, late_changes: AtomicUsize::new(0), give_up: watch::Sender::new(false) }
    }

    /// Lets every request fail from now on, those in flight too.
    pub(super) fn give_up(&self) {
        self.give_up.send_replace(true);
    }
}

/// What a task works on.
pub(super) struct Job {
    pub(super) tag: u16,
    pub(super) generation: u32,
    pub(super) request: Request,
    pub(super) data: Option<Buffer>,
    pub(super) bytes: usize,
    pub(super) arrived: Instant,
}

/// A request that has to wait for something.
pub(super) async fn run(job: Job, common: Arc<Common>, finished: Rc<Finished>) {
    let Job { tag, generation, request, data, bytes, arrived } = job;
    let mut work = std::pin::pin!(common.export.execute(request, data, arrived));
    let done = match common.io_timeout {
        None => Some(work.as_mut().await),
        Some(limit) => tokio::time::timeout(limit, work.as_mut()).await.ok(),
    };
    if let Some(done) = done {
        let result = done.map(|reply| match reply {
            Reply::Data(data) => Some(data),
            Reply::Done | Reply::Extents(_) => None,
        });
        finished.put(Outcome::Answer { tag, generation, request, result, bytes });
        return;
    }
    tracing::error!(
        operation = request.operation.name(),
        offset = request.offset,
        len = request.len,
        "no answer in time (--io-timeout): the device says EIO"
    );
    let changes = request.operation.changes_data();
    if changes {
        common.late_changes.fetch_add(1, Ordering::AcqRel);
    }
    finished.put(Outcome::TimedOut { tag, generation });
    let _ = work.await;
    if changes {
        common.late_changes.fetch_sub(1, Ordering::AcqRel);
    }
    finished.put(Outcome::Over { bytes });
}

/// What the tasks have for the queue.
#[derive(Default)]
pub(super) struct Finished {
    pub(super) results: RefCell<Vec<Outcome>>,
    pub(super) give_up: Cell<bool>,
    pub(super) queue: Cell<Option<Waker>>,
}

pub(super) enum Outcome {
    /// A task's answer.
    Answer { tag: u16, generation: u32, request: Request, result: Result<Option<Buffer>>, bytes: usize },
    /// A task was answered for with EIO, and goes on.
    TimedOut { tag: u16, generation: u32 },
    /// Such a task is over, and gives back its bytes.
    Over { bytes: usize },
}

impl Finished {
    fn put(&self, outcome: Outcome) {
        self.results.borrow_mut().push(outcome);
        self.wake();
    }

    pub(super) fn give_up(&self) {
        self.give_up.set(true);
        self.wake();
    }

    fn wake(&self) {
        if let Some(queue) = self.queue.take() {
            queue.wake();
        }
    }
}

/// Bytes of memory that a request needs.
pub(super) fn buffer_len(request: &Request) -> usize {
    match request.operation {
        Operation::Read | Operation::Write => usize::try_from(request.len).unwrap_or(usize::MAX),
        _ => 0,
    }
}
