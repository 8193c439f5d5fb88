//! Numbered passes: what several flushes share without any of them trusting a sync that began too early.
//!
//! ```text
//!   flush ──> join: notes how many passes have begun ──> waits for its turn
//!                ├── a pass that began after that has ended well ──> None: covered
//!                └── else ──> Some(Turn): begin a pass, sync, end it
//! ```
//!
//! A flush covers every write that was answered before the flush arrived. A sync that was under way when the flush
//! arrived may have begun before such a write, so that it proves nothing. Files, images and overlays all join their
//! syncs here, and nowhere else.
//!
//! A failed pass covers nobody: each flush that waits for it runs a pass of its own and reports the outcome of that.
//! Where an error must be kept for later flushes ([`crate::backend::file`]), the owner keeps it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::{Mutex, OwnedMutexGuard};

/// The passes of one thing that is flushed.
#[derive(Default)]
pub(crate) struct Passes {
    /// Number of passes that have begun.
    begun: AtomicU64,
    /// The number of the last pass that ended well; locked during a pass.
    done: Arc<Mutex<u64>>,
}

impl Passes {
    /// Waits until a pass that began after this call has ended well, which gives None, or until it is the caller's
    /// turn to run one. Cancel-safe: a caller that leaves gives its turn to the next one.
    pub(crate) async fn join(&self) -> Option<Turn<'_>> {
        // A read-modify-write, so that the pass which counts on from here sees all that this caller has stored.
        let begun = self.begun.fetch_add(0, Ordering::AcqRel);
        let done = self.done.clone().lock_owned().await;
        (*done <= begun).then_some(Turn { passes: self, done })
    }

    #[cfg(test)]
    pub(crate) fn begun(&self) -> u64 {
        self.begun.load(Ordering::Acquire)
    }
}

/// The right to run the next pass. While it is held, no other pass begins.
pub(crate) struct Turn<'a> {
    passes: &'a Passes,
    done: OwnedMutexGuard<u64>,
}

impl Turn<'_> {
    /// Begins the pass: it covers who has called [`Passes::join`] up to now. No sync that counts may begin earlier.
    pub(crate) fn begin(self) -> Pass {
        let number = self.passes.begun.fetch_add(1, Ordering::AcqRel) + 1;
        Pass { number, done: self.done }
    }
}

/// A pass under way. Dropped without [`Pass::succeed`], it has failed.
pub(crate) struct Pass {
    number: u64,
    done: OwnedMutexGuard<u64>,
}

impl Pass {
    /// Ends the pass: everything it was to make durable is.
    pub(crate) fn succeed(mut self) {
        *self.done = self.number;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::pin::{Pin, pin};
    use std::task::{Context, Poll, Waker};

    fn poll<F: Future>(future: Pin<&mut F>) -> Poll<F::Output> {
        future.poll(&mut Context::from_waker(Waker::noop()))
    }

    fn turn<'a>(passes: &'a Passes) -> Turn<'a> {
        match poll(pin!(passes.join())) {
            Poll::Ready(Some(turn)) => turn,
            _ => panic!("no turn"),
        }
    }

    #[test]
    fn a_pass_covers_who_came_before_it_began_and_nobody_else() {
        let passes = Passes::default();
        let first = turn(&passes);
        let mut early = pin!(passes.join());
        assert!(poll(early.as_mut()).is_pending());
        let first = first.begin();
        let mut late = pin!(passes.join());
        assert!(poll(late.as_mut()).is_pending());
        first.succeed();
        assert!(matches!(poll(early), Poll::Ready(None)), "it came before the pass began");
        let Poll::Ready(Some(second)) = poll(late) else {
            panic!("the pass that it found does not cover it")
        };
        second.begin().succeed();
        assert_eq!(passes.begun(), 2);
    }

    #[test]
    fn a_failed_pass_covers_nobody_and_who_leaves_passes_the_turn_on() {
        let passes = Passes::default();
        let first = turn(&passes);
        let mut waiting = pin!(passes.join());
        let mut leaving = Box::pin(passes.join());
        assert!(poll(leaving.as_mut()).is_pending() && poll(waiting.as_mut()).is_pending());
        drop(first.begin());
        drop(leaving);
        assert!(matches!(poll(waiting), Poll::Ready(Some(_))));
        drop(turn(&passes));
    }
}
