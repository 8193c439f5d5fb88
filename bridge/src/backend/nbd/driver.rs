//! The task that keeps a link going: it sends and receives while there is a connection, and while there is none
//! looks for a new one. It runs on the thread that used the link first. Should that thread end, the next request
//! starts another driver on its own.
//!
//! ```text
//!              ┌────────────── primary: back-off, connect, compare ───────────┐
//!              v                                                               │
//!   start ─> converse: send what waits, receive, understand ─> lost: requests are handed back, and asked again
//!                                                        └──> closing, or a further link: end
//! ```

use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use tokio::time::{Sleep, sleep_until};

use super::connect::{Fresh, connect};
use super::connection::Connection;
use super::link::{Inner, Link};
use super::slots::Slot;
use crate::{Error, ErrorKind};

/// Rounds of sending and receiving in one poll: after these, the thread's other tasks have their turn.
const ROUNDS: usize = 8;

/// Pauses between attempts to connect: the first, and the longest.
const FIRST_PAUSE: Duration = Duration::from_millis(20);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// A further connection that failed is not tried again for so long.
const RETRY_PAUSE: Duration = Duration::from_secs(1);

/// How a conversation ended.
enum End {
    Lost(String),
    Closing,
}

/// Drives a link until it is closed, or for a further link until its connection is lost.
pub(super) async fn drive(link: Arc<Link>) {
    let _driving = Driving(link.clone());
    let mut pause = Duration::ZERO;
    loop {
        let fresh = link.lock().fresh.take();
        let fresh = match fresh {
            Some(fresh) => fresh,
            None => match link.reach(&mut pause).await {
                Some(fresh) => fresh,
                None => return,
            },
        };
        match link.converse(fresh, &mut pause).await {
            End::Closing => return,
            End::Lost(reason) => {
                link.lose(reason);
                if !link.primary {
                    return;
                }
            }
        }
    }
}

/// Says that there is a driver. Dropped where its thread ends, it hands everything back, so that another takes over.
struct Driving(Arc<Link>);

impl Drop for Driving {
    fn drop(&mut self) {
        let mut woken = Vec::new();
        self.0.set_up(false);
        {
            let mut inner = self.0.lock();
            inner.driven = false;
            let reason = std::mem::take(&mut inner.reason);
            inner.lose(reason, true, &mut woken);
        }
        wake_all(&mut woken);
    }
}

impl Link {
    /// Looks for a connection: the primary link until there is one, a further one once. None: the link is closed, or
    /// cannot be used.
    async fn reach(&self, pause: &mut Duration) -> Option<Fresh> {
        let config = &self.config;
        let mut attempt_at = Instant::now() + *pause;
        loop {
            if self.primary {
                self.wait_for_turn(attempt_at).await;
            }
            if self.lock().closing {
                return None;
            }
            let attempt = self.while_waiting(connect(&config.uri, config.options.connect_timeout)).await?;
            let failure = match attempt {
                Ok(fresh) => match config.shape.difference(&fresh.negotiated) {
                    None => return Some(fresh),
                    Some(difference) if self.primary => {
                        self.fail(format!("the export is another one: {difference}"));
                        return None;
                    }
                    Some(difference) => difference,
                },
                Err(failure) => failure,
            };
            tracing::debug!(source = config.name, failure, "no connection");
            self.lock().reason = failure;
            if !self.primary {
                self.lock().retry_at = Some(Instant::now() + RETRY_PAUSE);
                return None;
            }
            self.expire(true);
            *pause = (*pause * 2).clamp(FIRST_PAUSE, LONGEST_PAUSE);
            attempt_at = Instant::now() + *pause;
        }
    }

    /// Waits until it is time for an attempt, or a request has nothing else to hope for; fails those whose time is up.
    async fn wait_for_turn(&self, attempt_at: Instant) {
        // However many ask for an attempt: not one after the other without a pause.
        let soonest = Instant::now() + FIRST_PAUSE.min(attempt_at - Instant::now());
        loop {
            self.expire(false);
            let (eager, closing, deadline) = {
                let inner = self.lock();
                (inner.waiting().any(|slot| slot.last_chance), inner.closing, next_deadline(&inner))
            };
            let until = if eager { soonest } else { attempt_at };
            let now = Instant::now();
            if closing || now >= until {
                return;
            }
            let wake_at = deadline.map_or(until, |deadline| deadline.min(until));
            tokio::select! {
                () = sleep_until(wake_at.into()) => {}
                () = self.nudge.notified() => {}
            }
        }
    }

    /// Runs an attempt to connect, and fails meanwhile the requests whose time is up. None: the link was closed.
    async fn while_waiting<T>(&self, attempt: impl Future<Output = T>) -> Option<T> {
        let mut attempt = pin!(attempt);
        loop {
            let deadline = next_deadline(&self.lock());
            let expiry = async {
                match deadline {
                    Some(deadline) => sleep_until(deadline.into()).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                result = &mut attempt => return Some(result),
                () = expiry => self.expire(false),
                () = self.nudge.notified() => {
                    if self.lock().closing {
                        return None;
                    }
                }
            }
        }
    }

    /// Fails the requests whose time is up; after an attempt also those that had only that one.
    fn expire(&self, after_attempt: bool) {
        let now = Instant::now();
        let late = |slot: &Slot| {
            slot.deadline.is_some_and(|deadline| deadline <= now) || after_attempt && slot.last_chance
        };
        let mut woken = Vec::new();
        {
            let mut inner = self.lock();
            if !inner.waiting().any(late) {
                return;
            }
            let error = no_connection(&self.config.name, &inner.reason);
            inner.expire(late, &error, &mut woken);
        }
        wake_all(&mut woken);
    }

    /// The source is of no use any more.
    fn fail(&self, reason: String) {
        tracing::error!(source = self.config.name, "{reason}; every request fails from now on");
        let mut woken = Vec::new();
        {
            let mut inner = self.lock();
            inner.reason = reason;
            inner.failed = true;
            let error = inner.failure(&self.config.name);
            inner.expire(|_| true, &error, &mut woken);
        }
        wake_all(&mut woken);
    }

    fn lose(&self, reason: String) {
        let name = &self.config.name;
        if self.primary {
            tracing::warn!(
                source = name,
                "connection lost: {reason}; requests wait for the server to come back"
            );
        } else {
            tracing::info!(source = name, "one of several connections lost: {reason}");
        }
        self.set_up(false);
        let mut woken = Vec::new();
        {
            let mut inner = self.lock();
            inner.retry_at = Some(Instant::now() + RETRY_PAUSE);
            inner.lose(reason, !self.primary, &mut woken);
            inner.set_deadlines(self.config.options.reconnect_timeout);
        }
        wake_all(&mut woken);
    }

    /// Sends and receives until the connection is lost or the link is closed.
    async fn converse(&self, fresh: Fresh, pause: &mut Duration) -> End {
        let style = fresh.negotiated.style;
        let connection = match Connection::new(fresh) {
            Ok(connection) => connection,
            Err(error) => return End::Lost(format!("the event queue refuses the socket: {error}")),
        };
        {
            let mut inner = self.lock();
            inner.connection = Some(connection);
            let away = inner.down_since.take().map(|since| since.elapsed());
            if let (Some(away), true) = (away, self.primary) {
                tracing::warn!(source = self.config.name, "connected again after {away:.1?}");
            }
        }
        self.set_up(true);
        tracing::debug!(source = self.config.name, ?style, primary = self.primary, "connected");
        let (mut woken, mut alarm) = (Vec::new(), None);
        let end = poll_fn(|cx| {
            let polled = {
                let mut inner = self.lock();
                match inner.turn(cx, self.config.options.requests, &mut woken) {
                    Poll::Pending => self.watch(&inner, &mut alarm, cx),
                    ended => ended,
                }
            };
            wake_all(&mut woken);
            polled
        })
        .await;
        // A server that answers and then breaks is tried again at once; one that never answers is not.
        let answered = self.lock().connection.as_ref().is_some_and(|connection| connection.answered);
        *pause = if answered { Duration::ZERO } else { (*pause * 2).clamp(FIRST_PAUSE, LONGEST_PAUSE) };
        end
    }

    /// Gives the connection up where a request has waited for its answer for too long.
    fn watch(&self, inner: &Inner, alarm: &mut Option<Pin<Box<Sleep>>>, cx: &mut Context<'_>) -> Poll<End> {
        let Some(limit) = self.config.options.request_timeout else { return Poll::Pending };
        loop {
            let in_flight = inner.connection.as_ref().is_some_and(|connection| connection.in_flight > 0);
            match alarm {
                None if in_flight => {
                    *alarm = Some(Box::pin(sleep_until((Instant::now() + limit).into())));
                }
                None => return Poll::Pending,
                Some(sleep) => {
                    std::task::ready!(sleep.as_mut().poll(cx));
                    match inner.slots.oldest_sent() {
                        None => *alarm = None,
                        Some(sent) if sent.elapsed() >= limit => {
                            return Poll::Ready(End::Lost(format!("no answer for {limit:?}")));
                        }
                        Some(sent) => sleep.as_mut().reset((sent + limit).into()),
                    }
                }
            }
        }
    }
}

impl Inner {
    /// Sends what is there to be sent, and understands what has come.
    fn turn(&mut self, cx: &mut Context<'_>, limit: u32, woken: &mut Vec<Waker>) -> Poll<End> {
        if self.driver.as_ref().is_none_or(|known| !known.will_wake(cx.waker())) {
            self.driver = Some(cx.waker().clone());
        }
        if self.closing {
            return Poll::Ready(End::Closing);
        }
        let Some(connection) = &mut self.connection else { return Poll::Ready(End::Closing) };
        for _ in 0..ROUNDS {
            let round = connection.round(cx, &mut self.slots, &mut self.queue, limit, woken);
            match round {
                Ok(true) => {}
                Ok(false) => return Poll::Pending,
                Err(reason) => return Poll::Ready(End::Lost(reason)),
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}

impl Connection {
    /// Whether there was anything to do.
    fn round(
        &mut self,
        cx: &mut Context<'_>,
        slots: &mut super::slots::Slots,
        queue: &mut std::collections::VecDeque<u64>,
        limit: u32,
        woken: &mut Vec<Waker>,
    ) -> Result<bool, String> {
        // What came behind the handshake is looked at first.
        self.understand(slots, woken)?;
        let sent = self.send(cx, slots, queue, limit)?;
        let received = self.receive(cx, slots, woken)?;
        if self.leaving && self.in_flight == 0 {
            return Err("the server is shutting down".into());
        }
        Ok(sent && !self.socket.is_blocked() || received)
    }
}

fn next_deadline(inner: &Inner) -> Option<Instant> {
    inner.waiting().filter_map(|slot| slot.deadline).min()
}

/// What a request is answered with that has waited in vain.
pub(super) fn no_connection(name: &str, reason: &str) -> Error {
    Error::new(ErrorKind::Io, format!("{name}: no connection: {reason}"))
}

/// Outside of the lock, so that whoever is woken finds it free.
fn wake_all(woken: &mut Vec<Waker>) {
    woken.drain(..).for_each(Waker::wake);
}
