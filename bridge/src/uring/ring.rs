//! One io_uring and the operations that are on it: the only place that hands memory to the kernel.
#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::task::{Context, Poll, Waker};

use io_uring::{IoUring, Probe, opcode, squeue, types};
use rustix::io::Errno;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::op::{Call, Op, bounded};

/// Entries of the submission queue: what one system call hands over at most.
const ENTRIES: u32 = 256;

/// IORING_ENTER_GETEVENTS.
const GETEVENTS: u32 = 1;

/// Number of bytes moved, or the kernel's refusal.
pub(super) type Outcome = Result<usize, Errno>;

/// A ring, its operations, and those that wait for room on it.
///
/// An operation that the kernel has read stays in its slot, with its buffer and file, until the kernel's answer was read,
/// whatever becomes of the future that waits for it. One that the kernel has not read is given back only after `closed` is
/// set: from then on nothing is submitted, so that the kernel never reads what is left in the submission queue.
pub(super) struct Ring {
    uring: IoUring,
    slots: Vec<Slot>,
    free: Vec<usize>,
    /// Waits for room.
    queue: VecDeque<usize>,
    /// In the submission queue, which the kernel has not read.
    pushed: VecDeque<usize>,
    /// In the submission queue or with the kernel: no more than the completion queue holds.
    in_flight: usize,
    closed: bool,
}

enum Slot {
    Free,
    Busy { op: Op, waker: Option<Waker>, orphan: bool },
    Done { op: Op, outcome: Outcome },
}

/// What is to be done after a turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// Another turn.
    Again,
    /// Another turn after others had theirs: the kernel is short of memory.
    Later,
    /// Nothing, until an operation is added or completes.
    Wait,
}

impl Ring {
    /// A ring that has been seen to work.
    pub(super) fn new() -> std::io::Result<Self> {
        // Without the flag, a completion interrupts the thread wherever it is; with it (5.19), at its next call.
        let uring = match IoUring::builder().setup_coop_taskrun().dontfork().build(ENTRIES) {
            Err(error) if Errno::from_io_error(&error) == Some(Errno::INVAL) => {
                IoUring::builder().dontfork().build(ENTRIES)?
            }
            other => other?,
        };
        let mut probe = Probe::new();
        uring.submitter().register_probe(&mut probe)?;
        let needed = [opcode::Read::CODE, opcode::Write::CODE, opcode::Fsync::CODE, opcode::Fallocate::CODE];
        if !uring.params().is_feature_nodrop() || !needed.iter().all(|code| probe.is_supported(*code)) {
            return Err(Errno::NOSYS.into());
        }
        Ok(Self::over(uring))
    }

    /// A ring over one of the kernel's.
    fn over(uring: IoUring) -> Self {
        Ring {
            uring,
            slots: Vec::new(),
            free: Vec::new(),
            queue: VecDeque::new(),
            pushed: VecDeque::new(),
            in_flight: 0,
            closed: false,
        }
    }

    /// The ring in the eyes of the present runtime: readable while there are completions.
    pub(super) fn watch(&self) -> std::io::Result<AsyncFd<OwnedFd>> {
        // SAFETY: the ring has its descriptor open for as long as it lives.
        let descriptor = unsafe { BorrowedFd::borrow_raw(self.uring.as_raw_fd()) }.try_clone_to_owned()?;
        // SAFETY: the descriptor is owned by what watches it, and so open for as long.
        unsafe { AsyncFd::register_with_interest(descriptor, Interest::READABLE) }
            .map_err(|error| error.into_parts().1)
    }

    /// Takes an operation, to be submitted at the next turn; gives it back where the ring is closed.
    pub(super) fn add(&mut self, op: Op) -> Result<usize, Op> {
        if self.closed {
            return Err(op);
        }
        let slot = Slot::Busy { op, waker: None, orphan: false };
        let key = match self.free.pop() {
            Some(key) => {
                self.slots[key] = slot;
                key
            }
            None => {
                self.slots.push(slot);
                self.slots.len() - 1
            }
        };
        self.queue.push_back(key);
        Ok(key)
    }

    /// An operation and its outcome, once it is done; then the key is void.
    pub(super) fn poll(&mut self, key: usize, context: &Context<'_>) -> Poll<(Op, Outcome)> {
        if let Slot::Busy { waker, .. } = &mut self.slots[key] {
            match waker {
                Some(waker) => waker.clone_from(context.waker()),
                None => *waker = Some(context.waker().clone()),
            }
            return Poll::Pending;
        }
        match self.release(key) {
            Slot::Done { op, outcome } => Poll::Ready((op, outcome)),
            Slot::Free | Slot::Busy { .. } => unreachable!("a key is valid until its outcome was taken"),
        }
    }

    /// Nobody waits for this operation any more. The key is void.
    pub(super) fn abandon(&mut self, key: usize) {
        match &mut self.slots[key] {
            Slot::Busy { orphan, waker, .. } => {
                *orphan = true;
                *waker = None;
            }
            Slot::Free | Slot::Done { .. } => drop(self.release(key)),
        }
    }

    /// Reads completions, hands over what waits, and reads what completed at once. Wakers to be woken, once the
    /// ring is not borrowed any more, go to `wakers`.
    pub(super) fn turn(&mut self, wakers: &mut Vec<Waker>) -> Next {
        self.reap(wakers);
        self.fill();
        if self.pushed.is_empty() {
            return Next::Wait;
        }
        let submitted = self.uring.submit();
        self.forget_read();
        match submitted {
            Ok(_) => Next::Again,
            Err(error) => match Errno::from_io_error(&error) {
                Some(Errno::INTR) => Next::Again,
                Some(Errno::AGAIN | Errno::BUSY | Errno::NOMEM) => Next::Later,
                errno => {
                    tracing::error!(%error, "io_uring does not take operations");
                    self.close(errno.unwrap_or(Errno::IO), wakers);
                    Next::Again
                }
            },
        }
    }

    /// Ends what was not handed over, and waits for the kernel to end the rest.
    ///
    /// # Errors
    /// The kernel does not say that it has ended them: then the ring must never be dropped.
    pub(super) fn drain(&mut self, wakers: &mut Vec<Waker>) -> std::io::Result<()> {
        self.close(Errno::CANCELED, wakers);
        loop {
            self.reap(wakers);
            if self.in_flight == 0 {
                return Ok(());
            }
            match self.wait() {
                Err(error) if Errno::from_io_error(&error) != Some(Errno::INTR) => return Err(error),
                _ => {}
            }
        }
    }

    /// Waits for a completion, and submits nothing.
    fn wait(&self) -> std::io::Result<()> {
        // SAFETY: no argument is passed, and no entry is handed over: the kernel gets no memory by this call.
        unsafe { self.uring.submitter().enter::<libc::sigset_t>(0, 1, GETEVENTS, None) }.map(drop)
    }

    /// Takes the entries that the kernel has read off the list of the others. The queue's head tells, which the kernel
    /// moves; what a call returned does not in every case.
    fn forget_read(&mut self) {
        let unread = self.uring.submission().len();
        self.pushed.drain(..self.pushed.len().saturating_sub(unread));
    }

    /// Whether it takes no more operations.
    pub(super) fn closed(&self) -> bool {
        self.closed
    }

    fn reap(&mut self, wakers: &mut Vec<Waker>) {
        let next = |uring: &mut IoUring| uring.completion().next();
        while let Some(entry) = next(&mut self.uring) {
            self.in_flight -= 1;
            let key = usize::try_from(entry.user_data()).unwrap_or(usize::MAX);
            let outcome = match usize::try_from(entry.result()) {
                Ok(count) => Ok(count),
                Err(_) => Err(Errno::from_raw_os_error(-entry.result())),
            };
            self.complete(key, outcome, wakers);
        }
    }

    /// Moves waiting operations to the submission queue, as far as there is room.
    fn fill(&mut self) {
        let limit = self.uring.params().cq_entries() as usize;
        while self.in_flight < limit
            && self.pushed.len() < ENTRIES as usize
            && let Some(key) = self.queue.pop_front()
        {
            let Slot::Busy { op, orphan, .. } = &mut self.slots[key] else { continue };
            if *orphan {
                self.release(key);
                continue;
            }
            let entry = entry(op).user_data(key as u64);
            // SAFETY: the buffer and the descriptor that the entry points to belong to the slot's operation. The slot
            // gives it up in `complete` only: after the kernel's completion was read, or, for an entry that the kernel
            // has not read, in `close`, after which no call submits (`turn` finds nothing pushed and `fill` nothing
            // queued, `add` refuses, `drain` only waits). The driver has `drain` wait for what the kernel has read, or
            // leaks the ring, before the ring ends. A buffer's bytes are on the heap: they stay in place when slots
            // move, and nobody touches them meanwhile.
            let pushed = unsafe { self.uring.submission().push(&entry) };
            if pushed.is_err() {
                self.queue.push_front(key);
                return;
            }
            self.pushed.push_back(key);
            self.in_flight += 1;
        }
    }

    /// Takes and submits no more, and ends with `errno` what the kernel has not read.
    fn close(&mut self, errno: Errno, wakers: &mut Vec<Waker>) {
        self.closed = true;
        self.forget_read();
        self.in_flight -= self.pushed.len();
        let unread: Vec<usize> = self.pushed.drain(..).chain(self.queue.drain(..)).collect();
        for key in unread {
            self.complete(key, Err(errno), wakers);
        }
    }

    fn complete(&mut self, key: usize, outcome: Outcome, wakers: &mut Vec<Waker>) {
        match self.slots.get_mut(key).map(|slot| std::mem::replace(slot, Slot::Free)) {
            Some(Slot::Busy { op, waker, orphan: false }) => {
                self.slots[key] = Slot::Done { op, outcome };
                wakers.extend(waker);
            }
            Some(Slot::Busy { orphan: true, .. }) => self.free.push(key),
            Some(Slot::Free | Slot::Done { .. }) | None => {
                debug_assert!(false, "a completion for no operation");
            }
        }
    }

    fn release(&mut self, key: usize) -> Slot {
        self.free.push(key);
        std::mem::replace(&mut self.slots[key], Slot::Free)
    }
}

fn entry(op: &mut Op) -> squeue::Entry {
    let file = types::Fd(op.file.as_raw_fd());
    match &mut op.call {
        Call::Read { buf, part, offset } => {
            let part = &mut buf[bounded(part)];
            opcode::Read::new(file, part.as_mut_ptr(), length(part)).offset(*offset).build()
        }
        Call::Write { buf, part, offset, durable } => {
            let part = &buf[bounded(part)];
            let flags = if *durable { libc::RWF_DSYNC } else { 0 };
            opcode::Write::new(file, part.as_ptr(), length(part)).offset(*offset).rw_flags(flags).build()
        }
        Call::Sync => opcode::Fsync::new(file).flags(types::FsyncFlags::DATASYNC).build(),
        Call::Fallocate { mode, offset, len } => {
            opcode::Fallocate::new(file, *len).offset(*offset).mode(mode.bits().cast_signed()).build()
        }
    }
}

/// A length that [`bounded`] has made fit.
fn length(part: &[u8]) -> u32 {
    u32::try_from(part.len()).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests;
