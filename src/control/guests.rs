//! Who is connected to the control socket, and who has to go when others come: the one who has been there longest without
//! asking for anything, or with its answer. Nobody is sent away within [`GRACE`], or while what it asked for is being done.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::task::AbortHandle;
use tokio::time::Instant;

/// Clients at the same time, and one more that waits for a place.
const MOST: usize = 32;

/// A client has so long to ask before another may take its place.
const GRACE: Duration = Duration::from_millis(100);

/// What a client's own task knows of it.
#[derive(Clone, Debug, Default)]
pub(super) struct Progress(Arc<AtomicBool>);

impl Progress {
    /// All of the request is there: until it is answered, the client keeps its place.
    pub(super) fn begin(&self) {
        self.0.store(true, Relaxed);
    }

    /// The answer is on its way.
    pub(super) fn end(&self) {
        self.0.store(false, Relaxed);
    }

    fn is_busy(&self) -> bool {
        self.0.load(Relaxed)
    }
}

struct Guest {
    came: Instant,
    progress: Progress,
    task: AbortHandle,
}

/// All clients, the oldest first.
#[derive(Default)]
pub(super) struct Guests {
    guests: VecDeque<Guest>,
    /// One has left.
    left: Arc<Notify>,
}

impl Guests {
    /// Waits until there is a place, and sees to it that there will be one.
    pub(super) async fn make_room(&mut self) {
        loop {
            self.guests.retain(|guest| !guest.task.is_finished());
            if self.guests.len() < MOST {
                return;
            }
            let Some(idle) = self.guests.iter().position(|guest| !guest.progress.is_busy()) else {
                self.left.notified().await;
                continue;
            };
            let until = self.guests[idle].came + GRACE;
            if until <= Instant::now() {
                tracing::debug!("a client of the control socket asked for nothing, and made room");
                self.guests[idle].task.abort();
                self.guests.remove(idle);
                return;
            }
            tokio::select! {
                () = self.left.notified() => {}
                () = tokio::time::sleep_until(until) => {}
            }
        }
    }

    /// Lets a client in.
    pub(super) fn admit<T>(&mut self, serve: impl FnOnce(Progress) -> T)
    where
        T: Future<Output = ()> + Send + 'static,
    {
        let progress = Progress::default();
        let (served, left) = (serve(progress.clone()), self.left.clone());
        let task = tokio::spawn(async move {
            served.await;
            left.notify_one();
        });
        self.guests.push_back(Guest { came: Instant::now(), progress, task: task.abort_handle() });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(test: impl Future<Output = ()>) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
        runtime.unwrap().block_on(test);
    }

    /// A crowd of which each says whether it is busy, in the order in which it came.
    async fn full(busy: impl Fn(usize) -> bool) -> Guests {
        let mut guests = Guests::default();
        for n in 0..MOST {
            guests.make_room().await;
            guests.admit(|progress| {
                if busy(n) {
                    progress.begin();
                }
                std::future::pending()
            });
        }
        guests
    }

    #[test]
    fn the_oldest_that_asks_for_nothing_makes_room() {
        run(async {
            let mut guests = full(|n| n < 3).await;
            let begun = Instant::now();
            guests.make_room().await;
            assert!(begun.elapsed() >= GRACE && begun.elapsed() < 2 * GRACE, "{:?}", begun.elapsed());
            assert_eq!(guests.guests.len(), MOST - 1);
            assert_eq!(guests.guests.iter().filter(|guest| guest.progress.is_busy()).count(), 3);
        });
    }

    #[test]
    fn those_who_are_served_keep_their_places() {
        run(async {
            let mut guests = full(|_| true).await;
            let hour = Duration::from_secs(3600);
            assert!(tokio::time::timeout(hour, guests.make_room()).await.is_err());
            guests.guests[7].progress.end();
            // It is seen when somebody leaves, or has come to the end of its time.
            guests.left.notify_one();
            guests.make_room().await;
            assert_eq!(guests.guests.len(), MOST - 1);
        });
    }

    #[test]
    fn who_leaves_makes_room_at_once() {
        run(async {
            let mut guests = full(|_| true).await;
            guests.guests.pop_back();
            guests.admit(|progress| async move {
                progress.begin();
                tokio::time::sleep(GRACE / 2).await;
            });
            let begun = Instant::now();
            guests.make_room().await;
            assert!(begun.elapsed() < GRACE, "{:?}", begun.elapsed());
        });
    }
}
