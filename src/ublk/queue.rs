//! A queue's thread: takes the requests of one hardware queue, answers at once what the export can do at once, and lets
//! the rest run as tasks beside it.
//!
//! ```text
//!   ring ──tags──> take ─┬─ try_execute ─────────────────────────────┬─> commit ──one submit for the batch──> kernel
//!                        ├─ large, in a file: the kernel fills it ───┤
//!                        └─ task: execute (awaits) ──> Finished ─────┘
//! ```
//!
//! The thread's runtime waits for the ring and for everything that tasks and backends wait for. A request whose answer was
//! given early (a time-out, or the end) goes on with the buffer it owns, and its tag's generation tells its late result
//! from that of the tag's next request.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};
use std::time::Instant;

use bridge::{Buffer, Data, Error, ErrorKind, FileRange, Flags, Operation, RangeOrHole, Request};
use libublk::sys;
use rustix::io::Errno;
use rustix::thread::{CapabilitySet, capabilities, set_capabilities};
use tokio::io::unix::AsyncFd;

use super::channel::{Channel, Event};
use super::task::{Common, Finished, Job, Outcome, buffer_len, run};
use super::translate;

/// Rounds in one poll: after these, the thread's tasks have their turn.
const ROUNDS: usize = 8;

/// Reads from this size on are filled by the kernel where it can do that; smaller ones cost less when they are copied.
const FILL_FROM: u64 = 64 << 10;

/// Bytes that the tasks of one queue may hold. Requests over it wait in the kernel, with their data.
const MAX_TASK_BYTES: usize = 16 << 20;

/// Buffers that are there from the start, so that writing out memory needs none: their size and number.
const RESERVE: [(usize, usize); 3] = [(4 << 10, 64), (64 << 10, 16), (512 << 10, 4)];

/// Serves the queue until the kernel wants no more of it. `ready` is called once every tag is fetched. `quiet` keeps
/// kernels without NO_AUTO_PART_SCAN from reading the partition table.
pub(super) async fn serve(
    mut channel: Channel<'_>,
    common: Arc<Common>,
    quiet: bool,
    ready: impl FnOnce() -> bool,
) -> io::Result<()> {
    let mut reserve: Vec<Buffer> =
        RESERVE.iter().flat_map(|(size, count)| (0..*count).map(|_| Buffer::new(*size))).collect();
    // Memory is there once it has been written to. Given back, the buffers wait in this thread's store.
    reserve.iter_mut().for_each(|buffer| buffer.fill(1));
    drop(reserve);
    let depth = channel.depth();
    if quiet {
        without_sys_admin(|| channel.submit())?
    } else {
        channel.submit()?
    }
    if let Some(Event::Tag(tag, result)) = channel.next() {
        // Nothing is asked of a device that has not started: the kernel has refused a fetch.
        tracing::debug!(tag, result, "fetch refused");
        return Err(Errno::from_raw_os_error(-result).into());
    }
    if !ready() {
        return Ok(());
    }
    let finished = Rc::new(Finished::default());
    let mut gave_up = common.give_up.subscribe();
    let waker = finished.clone();
    let watcher = tokio::task::spawn_local(async move {
        let _ = gave_up.wait_for(|now| *now).await;
        waker.give_up();
        std::future::pending::<()>().await;
    });
    let mut queue = Queue {
        watch: channel.watch()?,
        tags: (0..depth).map(|_| Tag::default()).collect(),
        fetched: usize::from(depth),
        tasks: 0,
        task_bytes: 0,
        waiting: VecDeque::new(),
        finished,
        channel,
        common,
        giving_up: false,
        fills: 0,
    };
    let ended = poll_fn(|cx| queue.poll(cx)).await;
    watcher.abort();
    if queue.fills > 0 {
        tracing::info!("{} reads were filled by the kernel", queue.fills);
    }
    ended
}

/// A tag's place in the queue.
#[derive(Default)]
struct Tag {
    /// Grows with each request that got its answer early.
    generation: u32,
    /// A task works for it, or will.
    busy: bool,
    /// What the kernel fills its request from.
    filling: Option<(Request, FileRange, Instant)>,
}

struct Queue<'d> {
    channel: Channel<'d>,
    watch: AsyncFd<OwnedFd>,
    tags: Box<[Tag]>,
    /// Tags that have not been aborted.
    fetched: usize,
    /// Tasks that have not given their answer.
    tasks: usize,
    task_bytes: usize,
    /// Tags whose requests wait for bytes.
    waiting: VecDeque<u16>,
    finished: Rc<Finished>,
    common: Arc<Common>,
    giving_up: bool,
    /// Reads that the kernel has filled.
    fills: u64,
}

impl Queue<'_> {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        for _ in 0..ROUNDS {
            match self.round() {
                Ok(true) => return Poll::Ready(Ok(())),
                Ok(false) => {}
                // The kernel is short of memory: another turn, later.
                Err(error)
                    if matches!(
                        Errno::from_io_error(&error),
                        Some(Errno::AGAIN | Errno::BUSY | Errno::NOMEM)
                    ) =>
                {
                    break;
                }
                Err(error) => return Poll::Ready(Err(error)),
            }
            self.finished.queue.set(Some(cx.waker().clone()));
            // The readiness is cleared before the next round reads completions: one that comes in between sets it again.
            match self.watch.poll_read_ready(cx) {
                Poll::Ready(Ok(mut ready)) => ready.clear_ready(),
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Pending => return Poll::Pending,
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// Answers what is done, takes what has come, and hands the answers over. True at the end.
    fn round(&mut self) -> io::Result<bool> {
        if self.finished.give_up.get() && !self.giving_up {
            self.give_up()?;
        }
        loop {
            let outcomes = std::mem::take(&mut *self.finished.results.borrow_mut());
            for outcome in outcomes {
                self.finish(outcome)?;
            }
            // One look at the clock for the batch: they have come by now.
            let mut arrived = None;
            while let Some(event) = self.channel.next() {
                match event {
                    Event::Tag(tag, result) => {
                        self.take(tag, result, *arrived.get_or_insert_with(Instant::now))?;
                    }
                    Event::Filled(tag, result) => self.filled(tag, result)?,
                }
            }
            if !self.channel.has_answers() {
                return Ok(self.fetched == 0 && self.tasks == 0);
            }
            self.channel.submit()?;
        }
    }

    /// A tag has come back from the kernel.
    fn take(&mut self, tag: u16, result: i32, arrived: Instant) -> io::Result<()> {
        match result {
            0 => self.begin(tag, arrived),
            sys::UBLK_IO_RES_ABORT => {
                self.fetched -= 1;
                Ok(())
            }
            refused => {
                tracing::error!(tag, errno = -refused, "the kernel refused an answer");
                self.fetched -= 1;
                Ok(())
            }
        }
    }

    /// Answers a request now if that is possible; makes a task of it otherwise.
    fn begin(&mut self, tag: u16, arrived: Instant) -> io::Result<()> {
        let Some(request) = translate::request(&self.channel.descriptor(tag)) else {
            return self.channel.commit(tag, -libc::EOPNOTSUPP);
        };
        if self.refuses(&request) {
            return self.channel.commit(tag, -libc::EIO);
        }
        if self.fill(tag, &request, arrived)? {
            return Ok(());
        }
        match self.at_once(tag, &request, arrived) {
            Some(result) => self.channel.commit(tag, result),
            None => self.make_task(tag, request, arrived),
        }
    }

    /// Lets the kernel fill a large read from the file that holds its bytes, where there is one.
    fn fill(&mut self, tag: u16, request: &Request, arrived: Instant) -> io::Result<bool> {
        if request.operation != Operation::Read || request.len < FILL_FROM || !self.channel.moves() {
            return Ok(false);
        }
        let whole = request.with_flags(request.flags | Flags::WHOLE);
        let Some(RangeOrHole::Range(range)) = self.common.export.try_file_range(&whole, arrived) else {
            return Ok(false);
        };
        self.channel.fill(tag, &range)?;
        self.tags[usize::from(tag)].filling = Some((*request, range, arrived));
        Ok(true)
    }

    /// The kernel has filled a read; where it could not, another way is gone.
    fn filled(&mut self, tag: u16, result: i32) -> io::Result<()> {
        let Some((request, _, arrived)) = self.tags[usize::from(tag)].filling.take() else { return Ok(()) };
        self.channel.release(tag)?;
        if u64::try_from(result) == Ok(request.len) {
            self.fills += 1;
            return self.channel.commit(tag, translate::success(&request));
        }
        if self.giving_up {
            return self.channel.commit(tag, -libc::EIO);
        }
        tracing::debug!(tag, result, "a read was not filled by the kernel");
        // It has been counted.
        self.make_task(tag, request.with_flags(request.flags | Flags::CONTINUED), arrived)
    }

    /// Makes a task of a request, or lets it wait for bytes.
    fn make_task(&mut self, tag: u16, request: Request, arrived: Instant) -> io::Result<()> {
        self.tags[usize::from(tag)].busy = true;
        if self.task_bytes > 0 && self.task_bytes + buffer_len(&request) > MAX_TASK_BYTES {
            self.waiting.push_back(tag);
            return Ok(());
        }
        self.start(tag, request, arrived)
    }

    /// Whether a request fails before it begins.
    fn refuses(&self, request: &Request) -> bool {
        // A change that was answered with EIO may still reach the source: a newer one must not be overtaken by it.
        let late = request.operation.changes_data() && self.common.late_changes.load(Ordering::Acquire) > 0;
        self.giving_up || late
    }

    fn at_once(&mut self, tag: u16, request: &Request, arrived: Instant) -> Option<i32> {
        let len = buffer_len(request);
        let done = match request.operation {
            Operation::Read => {
                let buffer = match self.channel.data.outgoing(tag, len) {
                    Ok(buffer) => buffer,
                    Err(errno) => return Some(-errno.raw_os_error()),
                };
                let done = self.common.export.try_execute(request, Data::Into(buffer), arrived)?;
                done.map(|()| self.channel.data.filled(tag, len))
            }
            Operation::Write => match self.channel.data.incoming(tag, len) {
                Ok(data) => self.common.export.try_execute(request, Data::From(data), arrived)?.map(Ok),
                Err(errno) => Ok(Err(errno)),
            },
            _ => return None,
        };
        Some(match done {
            Ok(Ok(())) => translate::success(request),
            Ok(Err(errno)) => -errno.raw_os_error(),
            Err(error) => failure(request, &error),
        })
    }

    /// Starts a task for a request; its tag is busy.
    fn start(&mut self, tag: u16, request: Request, arrived: Instant) -> io::Result<()> {
        let bytes = buffer_len(&request);
        let data = match request.operation {
            Operation::Read => Some(Buffer::new(bytes)),
            Operation::Write => {
                let mut data = Buffer::new(bytes);
                if let Err(errno) = self.channel.data.incoming_into(tag, &mut data) {
                    self.tags[usize::from(tag)].busy = false;
                    return self.channel.commit(tag, -errno.raw_os_error());
                }
                Some(data)
            }
            _ => None,
        };
        self.tasks += 1;
        self.task_bytes += bytes;
        let generation = self.tags[usize::from(tag)].generation;
        let (common, finished) = (self.common.clone(), self.finished.clone());
        tokio::task::spawn_local(run(
            Job { tag, generation, request, data, bytes, arrived },
            common,
            finished,
        ));
        Ok(())
    }

    fn finish(&mut self, outcome: Outcome) -> io::Result<()> {
        match outcome {
            Outcome::Answer { tag, generation, request, result, bytes } => {
                self.task_bytes -= bytes;
                if self.settle(tag, generation) {
                    let answer = match result {
                        Ok(found) => self.hand_over(tag, &request, found),
                        Err(error) => failure(&request, &error),
                    };
                    self.channel.commit(tag, answer)?;
                }
            }
            Outcome::TimedOut { tag, generation } => {
                if self.settle(tag, generation) {
                    self.tags[usize::from(tag)].generation += 1;
                    self.channel.commit(tag, -libc::EIO)?;
                }
            }
            Outcome::Over { bytes } => self.task_bytes -= bytes,
        }
        while let Some(tag) = self.waiting.front().copied() {
            let Some(request) = translate::request(&self.channel.descriptor(tag)) else { break };
            if self.task_bytes > 0 && self.task_bytes + buffer_len(&request) > MAX_TASK_BYTES {
                break;
            }
            self.waiting.pop_front();
            self.start(tag, request, Instant::now())?;
        }
        Ok(())
    }

    /// Whether this result is the one that the tag waits for; then it waits no more.
    fn settle(&mut self, tag: u16, generation: u32) -> bool {
        let place = &mut self.tags[usize::from(tag)];
        let awaited = place.busy && place.generation == generation;
        if awaited {
            place.busy = false;
            self.tasks -= 1;
        }
        awaited
    }

    fn hand_over(&mut self, tag: u16, request: &Request, found: Option<Buffer>) -> i32 {
        match found.map(|data| self.channel.data.outgoing_from(tag, &data)) {
            None | Some(Ok(())) => translate::success(request),
            Some(Err(errno)) => -errno.raw_os_error(),
        }
    }

    /// Answers every request in flight with EIO.
    fn give_up(&mut self) -> io::Result<()> {
        self.giving_up = true;
        for tag in std::mem::take(&mut self.waiting) {
            self.tags[usize::from(tag)].busy = false;
            self.channel.commit(tag, -libc::EIO)?;
        }
        for tag in 0..self.channel.depth() {
            let Tag { busy, generation, .. } = self.tags[usize::from(tag)];
            if busy && self.settle(tag, generation) {
                self.tags[usize::from(tag)].generation += 1;
                self.channel.commit(tag, -libc::EIO)?;
            }
        }
        Ok(())
    }
}

/// Runs `work` on this thread without CAP_SYS_ADMIN: the kernel trusts no partition table of a device whose queues were
/// fetched without it.
fn without_sys_admin<T>(work: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    let before = capabilities(None)?;
    let mut less = before;
    less.effective.remove(CapabilitySet::SYS_ADMIN);
    set_capabilities(None, less)?;
    let done = work();
    set_capabilities(None, before)?;
    done
}

fn failure(request: &Request, error: &Error) -> i32 {
    let answer = translate::error(error);
    // What the source cannot do or does not allow is no news.
    if !matches!(error.kind(), ErrorKind::NotSupported | ErrorKind::ReadOnly) {
        let (operation, offset, len) = (request.operation.name(), request.offset, request.len);
        tracing::debug!(operation, offset, len, %error, "request failed");
    }
    answer
}
