//! Locks on ranges of a disk: a block that is read, modified and written (with O_DIRECT), or copied up into an
//! overlay, must see no other write in between.
//!
//! Shared locks (aligned writes) overlap freely; an exclusive one (read-modify-write) overlaps with nothing.
//! First come, first served: who overlaps with an earlier one that still waits, waits too. Waiters may be on any
//! worker.

use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

/// Whether a range may be held together with others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    Shared,
    Exclusive,
}

/// The locks of one disk.
pub(crate) struct RangeLocks {
    unit: u64,
    claims: Mutex<Claims>,
}

#[derive(Default)]
struct Claims {
    next: u64,
    /// In the order of their arrival.
    list: Vec<Claim>,
}

struct Claim {
    id: u64,
    start: u64,
    end: u64,
    mode: Mode,
    /// Some while it waits.
    wake: Option<oneshot::Sender<()>>,
}

/// A held range; given back when dropped. While it is still waited for, dropping it leaves the queue.
pub(crate) struct RangeLock<'a> {
    locks: &'a RangeLocks,
    id: u64,
}

impl RangeLocks {
    /// Locks whose ranges are rounded out to multiples of `unit` bytes, a power of two.
    pub(crate) fn new(unit: u64) -> Self {
        RangeLocks { unit, claims: Mutex::default() }
    }

    /// Waits for a range to be free and takes it. Cancel-safe.
    pub(crate) async fn lock(&self, start: u64, end: u64, mode: Mode) -> RangeLock<'_> {
        let (lock, granted) = {
            let mut claims = self.claims();
            let mut claim = self.claim(&claims, start, end, mode);
            let granted = claims.list.iter().any(|earlier| earlier.conflicts(&claim)).then(|| {
                let (wake, granted) = oneshot::channel();
                claim.wake = Some(wake);
                granted
            });
            (claims.enter(self, claim), granted)
        };
        if let Some(granted) = granted {
            // The sender goes only by being sent to: the lock, which removes the claim, is still here.
            let _ = granted.await;
        }
        lock
    }

    /// Takes a range if it is free now.
    pub(crate) fn try_lock(&self, start: u64, end: u64, mode: Mode) -> Option<RangeLock<'_>> {
        let mut claims = self.claims();
        let claim = self.claim(&claims, start, end, mode);
        let free = !claims.list.iter().any(|earlier| earlier.conflicts(&claim));
        free.then(|| claims.enter(self, claim))
    }

    fn claim(&self, claims: &Claims, start: u64, end: u64, mode: Mode) -> Claim {
        let start = start & !(self.unit - 1);
        let end = end.checked_next_multiple_of(self.unit).unwrap_or(u64::MAX);
        Claim { id: claims.next, start, end, mode, wake: None }
    }

    fn claims(&self) -> MutexGuard<'_, Claims> {
        self.claims.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Claims {
    fn enter<'a>(&mut self, locks: &'a RangeLocks, claim: Claim) -> RangeLock<'a> {
        let id = claim.id;
        self.next += 1;
        self.list.push(claim);
        RangeLock { locks, id }
    }
}

impl Drop for RangeLock<'_> {
    fn drop(&mut self) {
        let mut claims = self.locks.claims();
        let Some(index) = claims.list.iter().position(|claim| claim.id == self.id) else { return };
        let gone = claims.list.remove(index);
        for index in index..claims.list.len() {
            let (earlier, later) = claims.list.split_at_mut(index);
            let claim = &mut later[0];
            if claim.wake.is_some()
                && claim.conflicts(&gone)
                && !earlier.iter().any(|earlier| earlier.conflicts(claim))
                && let Some(wake) = claim.wake.take()
            {
                // A receiver that is gone is about to drop its claim.
                let _ = wake.send(());
            }
        }
    }
}

impl Claim {
    fn conflicts(&self, other: &Claim) -> bool {
        self.start < other.end
            && other.start < self.end
            && (self.mode == Mode::Exclusive || other.mode == Mode::Exclusive)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::pin::pin;
    use std::task::{Context, Poll, Waker};

    fn poll<F: Future + Unpin>(future: &mut F) -> Poll<F::Output> {
        std::pin::Pin::new(future).poll(&mut Context::from_waker(Waker::noop()))
    }

    #[test]
    fn shared_ranges_overlap_and_exclusive_ones_wait_in_line() {
        let locks = RangeLocks::new(4096);
        let mut one = pin!(locks.lock(0, 4096, Mode::Shared));
        let mut two = pin!(locks.lock(0, 8192, Mode::Shared));
        let Poll::Ready(one) = poll(&mut one) else { panic!() };
        let Poll::Ready(two) = poll(&mut two) else { panic!() };
        let mut modify = pin!(locks.lock(10, 20, Mode::Exclusive));
        assert!(poll(&mut modify).is_pending());
        let mut behind = pin!(locks.lock(0, 4096, Mode::Shared));
        assert!(poll(&mut behind).is_pending(), "behind the exclusive one, although a shared one is held");
        let mut elsewhere = pin!(locks.lock(8192, 9000, Mode::Exclusive));
        assert!(poll(&mut elsewhere).is_ready());
        drop(one);
        assert!(poll(&mut modify).is_pending());
        drop(two);
        let Poll::Ready(modify) = poll(&mut modify) else { panic!() };
        assert!(poll(&mut behind).is_pending());
        drop(modify);
        assert!(poll(&mut behind).is_ready());
    }

    #[test]
    fn what_is_not_free_now_is_not_waited_for() {
        let locks = RangeLocks::new(4096);
        let first = locks.try_lock(0, 100, Mode::Exclusive);
        assert!(first.is_some() && locks.try_lock(4095, 5000, Mode::Shared).is_none());
        assert!(locks.try_lock(4096, 5000, Mode::Exclusive).is_some());
        drop(first);
        assert!(locks.try_lock(4095, 5000, Mode::Shared).is_some() && locks.claims().list.is_empty());
    }

    #[test]
    fn a_dropped_wait_leaves_the_line() {
        let locks = RangeLocks::new(512);
        let mut first = pin!(locks.lock(0, 512, Mode::Shared));
        let Poll::Ready(_first) = poll(&mut first) else { panic!() };
        let mut waiting = Box::pin(locks.lock(0, 512, Mode::Exclusive));
        assert!(poll(&mut waiting).is_pending());
        let mut behind = pin!(locks.lock(100, 200, Mode::Shared));
        assert!(poll(&mut behind).is_pending());
        drop(waiting);
        assert!(poll(&mut behind).is_ready());
        let mut granted = Box::pin(locks.lock(512, 1024, Mode::Exclusive));
        assert!(poll(&mut granted).is_ready());
        drop(granted);
        assert_eq!(locks.claims().list.len(), 1, "only the first is held");
    }
}
