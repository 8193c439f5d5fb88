//! Whether a worker stays awake for a moment after it has answered, rather than sleep until the next request.
//!
//! A client with one request in flight sends the next as soon as it has the answer. To sleep until then and be woken
//! costs both sides: where a processor that falls idle must be fetched back from the hypervisor it costs more than
//! the wait itself, and most of the round trip. Elsewhere it is cheap, and staying awake would only burn time. So
//! both are tried in turn, and the processor time per request decides. Awake, it yields its core at each look: the client
//! may be waiting for it (one client on two cores: 39 k requests a second instead of 31 k).
//!
//! Pure policy: the time comes in as an argument, and the reader does the waiting.

use std::time::Duration;

/// How long the worker stays awake for one request at most.
pub(super) const LIMIT: Duration = Duration::from_micros(50);

/// Requests of one trial.
const TRIAL: u32 = 256;

/// Requests served as the trials have shown to be best, before they are repeated.
const HOLD: u32 = 8192;

/// Requests in a row that came after the answer to the last before a client counts as one that waits for each answer.
/// Clients with more in flight are served better in batches, which sleeping lets grow.
const SINGLES: u32 = 16;

/// Moments in a row that brought nothing: the client does something else.
const MISSES: u32 = 4;

/// Staying awake may cost so much more than sleeping, in percent, since it halves the client's wait.
const WORTH_PERCENT: u64 = 150;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Before the first request.
    New,
    /// What sleeping costs.
    TrySleeping,
    /// What staying awake costs, to be compared with this many nanoseconds a request.
    TryLingering(u64),
    /// What was found better.
    Hold(bool),
}

/// The choice of one connection.
#[derive(Debug)]
pub(super) struct Linger {
    phase: Phase,
    /// Requests of this phase, so far.
    requests: u32,
    /// Requests in a row that came alone.
    singles: u32,
    /// Moments in a row that brought nothing.
    misses: u32,
    /// The thread's processor time when the phase began.
    began: Duration,
}

impl Linger {
    pub(super) fn new() -> Self {
        Linger { phase: Phase::New, requests: 0, singles: 0, misses: 0, began: Duration::ZERO }
    }

    /// Whether to stay awake now. `requests` have been taken in since the last call, some of them before an earlier one
    /// was answered if they `overlapped`; `processor_time` is this thread's, and asked for only where a phase ends.
    pub(super) fn decide(
        &mut self,
        requests: u32,
        overlapped: bool,
        processor_time: impl FnOnce() -> Duration,
    ) -> bool {
        self.requests = self.requests.saturating_add(requests);
        self.singles = if overlapped { 0 } else { self.singles.saturating_add(requests) };
        let length = match self.phase {
            Phase::New => 1,
            Phase::TrySleeping | Phase::TryLingering(_) => TRIAL,
            Phase::Hold(_) => HOLD,
        };
        if self.requests >= length {
            let now = processor_time();
            let spent = u64::try_from(now.saturating_sub(self.began).as_nanos()).unwrap_or(u64::MAX);
            let cost = spent / u64::from(self.requests);
            let next = match self.phase {
                Phase::New | Phase::Hold(_) => Phase::TrySleeping,
                Phase::TrySleeping => Phase::TryLingering(cost),
                Phase::TryLingering(sleeping) => {
                    Phase::Hold(cost.saturating_mul(100) <= sleeping.saturating_mul(WORTH_PERCENT))
                }
            };
            self.enter(next, now);
        }
        self.is_awake()
    }

    /// Whether to stay awake in the middle of a request too: many clients send a payload apart from its header.
    pub(super) fn is_awake(&self) -> bool {
        self.singles >= SINGLES && matches!(self.phase, Phase::TryLingering(_) | Phase::Hold(true))
    }

    /// How a moment went that [`Linger::decide`] wanted.
    pub(super) fn ended(&mut self, found: bool) {
        self.misses = if found { 0 } else { self.misses + 1 };
        if self.misses >= MISSES {
            // When this phase began matters to none that follows.
            self.enter(Phase::Hold(false), Duration::ZERO);
        }
    }

    fn enter(&mut self, phase: Phase, now: Duration) {
        *self = Linger { phase, requests: 0, singles: self.singles, misses: 0, began: now };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Serves `count` single requests at these costs; how often it lingered.
    fn serve(linger: &mut Linger, clock: &mut u64, count: u32, sleeping: u64, lingering: u64) -> u32 {
        let mut lingered = 0;
        for _ in 0..count {
            let now = Duration::from_nanos(*clock);
            if linger.decide(1, false, || now) {
                linger.ended(true);
                lingered += 1;
                *clock += lingering;
            } else {
                *clock += sleeping;
            }
        }
        lingered
    }

    #[test]
    fn what_costs_less_is_kept() {
        for (sleeping, lingering, kept) in
            [(20_000, 21_000, true), (10_000, 16_000, false), (9000, 4000, true)]
        {
            let (mut linger, mut clock) = (Linger::new(), 5);
            serve(&mut linger, &mut clock, 1 + 2 * TRIAL, sleeping, lingering);
            let lingered = serve(&mut linger, &mut clock, HOLD - 1, sleeping, lingering);
            assert_eq!(lingered, if kept { HOLD - 1 } else { 0 }, "{sleeping} {lingering}");
        }
    }

    #[test]
    fn it_is_tried_again() {
        let (mut linger, mut clock) = (Linger::new(), 0);
        serve(&mut linger, &mut clock, 1 + 2 * TRIAL + HOLD, 10_000, 16_000);
        serve(&mut linger, &mut clock, 2 * TRIAL, 20_000, 16_000);
        assert_eq!(serve(&mut linger, &mut clock, 100, 20_000, 16_000), 100);
    }

    #[test]
    fn a_client_with_many_in_flight_is_slept_for() {
        let (mut linger, mut clock) = (Linger::new(), 0);
        serve(&mut linger, &mut clock, 1 + 2 * TRIAL, 20_000, 10_000);
        assert!(linger.decide(1, false, || Duration::ZERO));
        assert!(!linger.decide(2, true, || Duration::ZERO));
        assert!(!linger.decide(1, false, || Duration::ZERO));
        assert_eq!(serve(&mut linger, &mut clock, SINGLES, 20_000, 10_000), 2);
    }

    #[test]
    fn a_client_that_does_not_come_back_at_once_is_slept_for() {
        let mut linger = Linger::new();
        let (mut lingered, mut clock) = (0, 0);
        for _ in 0..TRIAL * 4 {
            clock += 10;
            if linger.decide(1, false, || Duration::from_micros(clock)) {
                linger.ended(false);
                lingered += 1;
            }
        }
        assert_eq!(lingered, MISSES);
    }
}
