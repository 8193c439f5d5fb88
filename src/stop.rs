//! The signals that end a server: SIGTERM, SIGINT, and SIGHUP unless whoever started us ignores it.
//!
//! A wrapper that passes a signal on, and a group that gets it as well, make two of one. A signal within [`REPEAT`] of the
//! one that counted before does not count.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use tokio::signal::unix::{Signal, SignalKind, signal};

/// A stop signal that comes so soon after another one is the same.
pub(crate) const REPEAT: Duration = Duration::from_secs(2);

/// A program that wants a second signal to count sends it so long after the first.
pub(crate) const SECOND_AFTER: Duration = Duration::from_millis(2200);

/// The stop signals, handled from the moment this is made.
pub(crate) struct Stop {
    terminate: Signal,
    interrupt: Signal,
    /// None where whoever started us wants it ignored, as nohup does.
    hangup: Option<Signal>,
    /// When the last one came that counted.
    last: Option<Instant>,
}

impl Stop {
    /// Takes the signals. To be called within a runtime.
    ///
    /// # Errors
    /// The operating system's.
    pub(crate) fn new() -> Result<Self> {
        let handle = |kind| signal(kind).context("cannot handle signals");
        Ok(Stop {
            terminate: handle(SignalKind::terminate())?,
            interrupt: handle(SignalKind::interrupt())?,
            hangup: (!hangup_is_ignored()).then(|| handle(SignalKind::hangup())).transpose()?,
            last: None,
        })
    }

    /// Returns whether one has counted so far.
    pub(crate) fn has_come(&self) -> bool {
        self.last.is_some()
    }

    /// Waits for the next one that counts. Cancel-safe.
    pub(crate) async fn wait(&mut self) {
        loop {
            self.next().await;
            let now = Instant::now();
            if self.last.is_none_or(|last| now.duration_since(last) >= REPEAT) {
                self.last = Some(now);
                return;
            }
            tracing::debug!("a stop signal within {REPEAT:?} of the one before: the same");
        }
    }

    /// Waits for the second one that counts. Cancel-safe.
    pub(crate) async fn second(&mut self) {
        if !self.has_come() {
            self.wait().await;
        }
        self.wait().await;
    }

    /// Takes a signal that has come already, and waits for none. Returns whether one has counted so far.
    pub(crate) async fn look(&mut self) -> bool {
        // The event loop hears of signals when it has nothing else to do.
        for _ in 0..2 {
            tokio::task::yield_now().await;
        }
        tokio::select! {
            biased;
            () = self.wait() => {}
            () = std::future::ready(()) => {}
        }
        self.has_come()
    }

    async fn next(&mut self) {
        let hangup = async {
            match &mut self.hangup {
                Some(hangup) => _ = hangup.recv().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
            () = hangup => {}
        }
    }
}

fn hangup_is_ignored() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    // Signal 1 has the lowest bit.
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).is_some_and(|mask| mask & 1 != 0)
}
