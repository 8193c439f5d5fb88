//! A way to the server: the requests that go by one connection, whether it is there or not. Any thread may hand a
//! request over; the thread that did so first drives the connection (`driver`), with all that has been handed over
//! meanwhile in one go.

use std::collections::VecDeque;
use std::future::Future;
use std::mem::replace;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use nbd_proto::uri::Uri;
use tokio::runtime::Handle;
use tokio::sync::Notify;

use super::connect::Fresh;
use super::connection::Connection;
use super::coverage::Coverage;
use super::driver;
use super::options::NbdOptions;
use super::slots::{Ask, Data, Outcome, Slot, Slots, Stage};
use super::translate::Shape;
use crate::{Error, ErrorKind};

/// What all links of a source have in common.
pub(super) struct Config {
    pub(super) uri: Uri,
    /// The same for people.
    pub(super) name: String,
    pub(super) options: NbdOptions,
    pub(super) shape: Shape,
}

/// One way to the server.
pub(super) struct Link {
    pub(super) config: Arc<Config>,
    /// The primary link waits for a lost server to come back; a further one hands its requests back to whoever waits
    /// for them, who then take the primary.
    pub(super) primary: bool,
    up: AtomicBool,
    /// Tells the driver, while there is no connection, that something has changed.
    pub(super) nudge: Notify,
    inner: Mutex<Inner>,
}

pub(super) struct Inner {
    pub(super) slots: Slots,
    /// Requests that are not sent yet. Some may have been given up.
    pub(super) queue: VecDeque<u64>,
    pub(super) connection: Option<Connection>,
    /// A connection that nobody drives yet.
    pub(super) fresh: Option<Fresh>,
    /// There is a driver.
    pub(super) driven: bool,
    /// Wakes the driver where it waits on the connection; None while it is awake.
    pub(super) driver: Option<Waker>,
    /// Since when the server is away.
    pub(super) down_since: Option<Instant>,
    /// A further link is not tried again before.
    pub(super) retry_at: Option<Instant>,
    /// What was wrong last, for errors and the log.
    pub(super) reason: String,
    /// The source can never be used again, for that reason.
    pub(super) failed: bool,
    pub(super) closing: bool,
}

impl Link {
    pub(super) fn new(config: &Arc<Config>, fresh: Option<Fresh>) -> Arc<Self> {
        Arc::new(Link {
            config: config.clone(),
            primary: fresh.is_some(),
            up: AtomicBool::new(fresh.is_some()),
            nudge: Notify::new(),
            inner: Mutex::new(Inner {
                slots: Slots::default(),
                queue: VecDeque::new(),
                connection: None,
                fresh,
                driven: false,
                driver: None,
                down_since: None,
                retry_at: None,
                reason: String::new(),
                failed: false,
                closing: false,
            }),
        })
    }

    /// Nobody holds it for longer than a system call that does not wait.
    pub(super) fn lock(&self) -> MutexGuard<'_, Inner> {
        // A thread that panicked in between has left a connection that the server then contradicts.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a further link has its connection. It may be lost before a request arrives.
    pub(super) fn is_up(&self) -> bool {
        self.up.load(Relaxed)
    }

    pub(super) fn set_up(&self, up: bool) {
        self.up.store(up, Relaxed);
    }

    /// Has a further link connect, driven by this thread, unless it is at that, or has failed a moment ago.
    pub(super) fn bring_up(self: &Arc<Self>) {
        let mut inner = self.lock();
        if inner.driven || inner.closing || inner.retry_at.is_some_and(|at| Instant::now() < at) {
            return;
        }
        if let Ok(runtime) = Handle::try_current() {
            inner.driven = true;
            drop(inner);
            runtime.spawn(driver::drive(self.clone()));
        }
    }

    /// Ends the link with a goodbye. Requests are answered with an error.
    pub(super) fn close(&self) {
        let mut inner = self.lock();
        inner.closing = true;
        if let Some(connection) = &mut inner.connection {
            connection.say_goodbye();
        }
        let waker = inner.driver.take();
        drop(inner);
        self.nudge.notify_one();
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Hands a request over, and waits for its outcome. `deadline` is when it fails if there is no connection then.
    /// Dropped before, the request goes on with what it owns, or, where it is not on the wire yet, never begins.
    pub(super) fn call(self: &Arc<Self>, ask: Ask, data: Data, deadline: Option<Instant>) -> Call<'_> {
        Call { link: self, ask, deadline, state: CallState::New(data) }
    }

    fn submit(
        self: &Arc<Self>,
        ask: Ask,
        data: Data,
        deadline: Option<Instant>,
        waker: &Waker,
    ) -> Result<u64, (Outcome, Data)> {
        let mut inner = self.lock();
        if inner.failed || inner.closing {
            return Err((Outcome::Answered(Err(inner.failure(&self.config.name))), data));
        }
        let away = inner.connection.is_none() && inner.fresh.is_none();
        if away && !self.primary {
            return Err((Outcome::Lost, data));
        }
        let mut slot = Slot {
            ask,
            data,
            stage: Stage::Queued,
            waker: Some(waker.clone()),
            sent_at: None,
            deadline,
            last_chance: false,
            covered: Coverage::default(),
            error: None,
        };
        if away && deadline.is_none() {
            let (options, now) = (&self.config.options, Instant::now());
            let end = inner.down_since.unwrap_or(now) + options.reconnect_timeout;
            slot.last_chance = end <= now;
            slot.deadline = Some(if slot.last_chance { now + options.connect_timeout } else { end });
        }
        if !inner.driven {
            let Ok(runtime) = Handle::try_current() else {
                let error = Error::new(ErrorKind::Io, "no event loop on this thread");
                return Err((Outcome::Answered(Err(error)), slot.data));
            };
            inner.driven = true;
            runtime.spawn(driver::drive(self.clone()));
        }
        let cookie = inner.slots.insert(slot);
        inner.queue.push_back(cookie);
        let driver = inner.driver.take();
        drop(inner);
        if let Some(driver) = driver {
            driver.wake();
        }
        if away {
            self.nudge.notify_one();
        }
        Ok(cookie)
    }

    fn fetch(&self, cookie: u64, waker: &Waker) -> Poll<(Outcome, Data)> {
        let mut inner = self.lock();
        let Some(slot) = inner.slots.get_mut(cookie) else {
            let error = Error::new(ErrorKind::Io, "the request is gone");
            return Poll::Ready((Outcome::Answered(Err(error)), Data::None));
        };
        match replace(&mut slot.stage, Stage::Queued) {
            Stage::Over(outcome) => {
                let data = inner.slots.remove(cookie).map_or(Data::None, |slot| slot.data);
                Poll::Ready((outcome, data))
            }
            stage => {
                slot.stage = stage;
                if slot.waker.as_ref().is_none_or(|known| !known.will_wake(waker)) {
                    slot.waker = Some(waker.clone());
                }
                Poll::Pending
            }
        }
    }

    fn give_up(&self, cookie: u64) {
        let mut inner = self.lock();
        match inner.slots.get_mut(cookie) {
            // Its answer will find nobody, and its buffer stays until then.
            Some(slot) if slot.is_on_the_wire() => slot.waker = None,
            _ => drop(inner.slots.remove(cookie)),
        }
    }
}

impl Inner {
    /// The error of a request that cannot be asked any more.
    pub(super) fn failure(&self, name: &str) -> Error {
        if self.failed {
            Error::new(ErrorKind::Io, format!("{name}: {}; start again to use it", self.reason))
        } else {
            Error::new(ErrorKind::ShuttingDown, "the source is closed")
        }
    }

    /// The connection is gone, or its driver is. What was on the wire is handed back; so is, with `all`, what waits.
    pub(super) fn lose(&mut self, reason: String, all: bool, woken: &mut Vec<Waker>) {
        self.connection = None;
        self.fresh = None;
        self.driver = None;
        self.reason = reason;
        let now = Instant::now();
        self.down_since.get_or_insert(now);
        for cookie in self.slots.cookies() {
            let Some(slot) = self.slots.get(cookie) else { continue };
            if slot.is_on_the_wire() || all && matches!(slot.stage, Stage::Queued) {
                self.slots.end(cookie, Outcome::Lost, woken);
            }
        }
        if all {
            self.queue.clear();
        }
    }

    /// Gives requests that wait for a connection their deadline.
    pub(super) fn set_deadlines(&mut self, timeout: Duration) {
        let deadline = self.down_since.unwrap_or_else(Instant::now) + timeout;
        for cookie in &self.queue {
            if let Some(slot) = self.slots.get_mut(*cookie) {
                slot.deadline.get_or_insert(deadline);
            }
        }
    }

    /// Fails the requests that have waited long enough, or, with `all`, every one that waits.
    pub(super) fn expire(&mut self, late: impl Fn(&Slot) -> bool, error: &Error, woken: &mut Vec<Waker>) {
        let slots = &mut self.slots;
        self.queue.retain(|cookie| match slots.get(*cookie) {
            Some(slot) if late(slot) => {
                slots.end(*cookie, Outcome::Answered(Err(error.clone())), woken);
                false
            }
            slot => slot.is_some(),
        });
    }

    /// The requests that wait.
    pub(super) fn waiting(&self) -> impl Iterator<Item = &Slot> {
        self.queue.iter().filter_map(|cookie| self.slots.get(*cookie))
    }
}

/// A request on its way.
pub(super) struct Call<'a> {
    link: &'a Arc<Link>,
    ask: Ask,
    deadline: Option<Instant>,
    state: CallState,
}

enum CallState {
    New(Data),
    Waiting(u64),
    Over,
}

impl Future for Call<'_> {
    type Output = (Outcome, Data);

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match replace(&mut self.state, CallState::Over) {
            CallState::New(data) => match self.link.submit(self.ask, data, self.deadline, cx.waker()) {
                Ok(cookie) => {
                    self.state = CallState::Waiting(cookie);
                    Poll::Pending
                }
                Err(ended) => Poll::Ready(ended),
            },
            CallState::Waiting(cookie) => {
                let polled = self.link.fetch(cookie, cx.waker());
                if polled.is_pending() {
                    self.state = CallState::Waiting(cookie);
                }
                polled
            }
            CallState::Over => panic!("polled after it was ready"),
        }
    }
}

impl Drop for Call<'_> {
    fn drop(&mut self) {
        if let CallState::Waiting(cookie) = self.state {
            self.link.give_up(cookie);
        }
    }
}
