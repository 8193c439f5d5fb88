//! Where requests wait for their throttle: one line for reads and one for writes, shared by all workers.
//!
//! The first in a line is charged at once and then sleeps for as long as the buckets were over their size. So
//! the two lines take turns in the order in which their heads were charged, neither starves, and nobody has to
//! look again after a sleep that came out long.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use super::bucket::{Cost, Direction, Limiter};
use super::config::ThrottleConfig;
use crate::Flags;
use crate::layer::SettingError;

/// The longest single sleep; who has to wait longer looks again then.
const MAX_SLEEP: Duration = Duration::from_secs(24 * 60 * 60);

/// The buckets of one throttle, and the lines before them.
pub(super) struct Gate {
    /// Whether nothing is limited: all that the fast path reads then.
    open: AtomicBool,
    state: Mutex<State>,
    /// Held by the first of each line. Fair: in the order of arrival.
    turns: [tokio::sync::Mutex<()>; 2],
    changed: tokio::sync::Notify,
    started: Instant,
}

struct State {
    config: ThrottleConfig,
    limiter: Limiter,
    /// Grows with each change of the limits: a charge made before it is void.
    generation: u64,
    /// Requests in each line.
    waiting: [usize; 2],
}

/// A charge that is taken back when it is dropped without having been used.
#[must_use]
pub(super) struct Pass<'a> {
    gate: &'a Gate,
    direction: Direction,
    cost: Cost,
    generation: u64,
    used: bool,
}

/// A place in a line; left when dropped.
struct Place<'a> {
    gate: &'a Gate,
    direction: Direction,
}

impl Gate {
    /// An open gate.
    pub(super) fn new() -> Self {
        let config = ThrottleConfig::default();
        let limiter = Limiter::new(&config, Duration::ZERO);
        Gate {
            open: AtomicBool::new(true),
            state: Mutex::new(State { config, limiter, generation: 0, waiting: [0; 2] }),
            turns: Default::default(),
            changed: tokio::sync::Notify::new(),
            started: Instant::now(),
        }
    }

    /// Replaces the limits; whoever waits starts anew with empty buckets.
    pub(super) fn set(&self, config: ThrottleConfig) -> Result<(), SettingError> {
        config.check()?;
        let mut state = self.state();
        state.config = config;
        state.limiter = Limiter::new(&config, self.started.elapsed());
        state.generation += 1;
        self.open.store(!config.is_limited(), Relaxed);
        drop(state);
        self.changed.notify_waiters();
        Ok(())
    }

    pub(super) fn config(&self) -> ThrottleConfig {
        self.state().config
    }

    /// Whether nothing is limited.
    pub(super) fn is_open(&self) -> bool {
        self.open.load(Relaxed)
    }

    /// Charges a request that may go now; None where it would have to wait, or others wait before it. A later
    /// piece of a request that has gone stands in no line for operations: it goes as soon as its bytes may.
    pub(super) fn try_pass(&self, direction: Direction, bytes: u64, flags: Flags) -> Option<Pass<'_>> {
        let mut state = self.state();
        let continued = flags.contains(Flags::CONTINUED);
        if state.waiting[direction as usize] > 0 && !continued {
            return None;
        }
        let cost = state.limiter.cost(bytes, continued);
        if !state.limiter.wait(self.started.elapsed(), direction, cost).is_zero() {
            return None;
        }
        Some(self.charge(&mut state, direction, cost))
    }

    /// Charges a request and waits until it may go. Cancel-safe: a dropped wait takes its charge back.
    pub(super) async fn pass(&self, direction: Direction, bytes: u64, flags: Flags) {
        if self.is_open() {
            return;
        }
        if let Some(pass) = self.try_pass(direction, bytes, flags) {
            return pass.use_up();
        }
        let _place = Place::take(self, direction);
        let _turn = self.turns[direction as usize].lock().await;
        loop {
            // Made before the limits are read, so that no change of them goes unnoticed.
            let changed = self.changed.notified();
            let (pass, wait) = {
                let mut state = self.state();
                let cost = state.limiter.cost(bytes, flags.contains(Flags::CONTINUED));
                let wait = state.limiter.wait(self.started.elapsed(), direction, cost);
                (self.charge(&mut state, direction, cost), wait)
            };
            if wait.is_zero() {
                return pass.use_up();
            }
            tokio::select! {
                () = tokio::time::sleep(wait.min(MAX_SLEEP)) => {
                    if wait <= MAX_SLEEP {
                        return pass.use_up();
                    }
                }
                () = changed => {}
            }
        }
    }

    fn charge(&self, state: &mut State, direction: Direction, cost: Cost) -> Pass<'_> {
        state.limiter.charge(direction, cost);
        Pass { gate: self, direction, cost, generation: state.generation, used: false }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing is left half-done under this lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Pass<'_> {
    /// The request has gone: the charge stays.
    pub(super) fn use_up(mut self) {
        self.used = true;
    }
}

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        if !self.used {
            let mut state = self.gate.state();
            if state.generation == self.generation {
                state.limiter.refund(self.direction, self.cost);
            }
        }
    }
}

impl<'a> Place<'a> {
    fn take(gate: &'a Gate, direction: Direction) -> Self {
        gate.state().waiting[direction as usize] += 1;
        Place { gate, direction }
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.gate.state().waiting[self.direction as usize] -= 1;
    }
}
