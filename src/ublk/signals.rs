//! Signals for a process without threads that waits for another one: blocked, and taken one by one. And none at all, for
//! who must not be interrupted.
//! A leaf file: the only `unsafe` is the C library's signal sets.
#![allow(unsafe_code)]

use std::io;
use std::time::Duration;

/// What a supervisor hears.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Heard {
    /// It is to end.
    Stop,
    /// A child has ended.
    Child,
    /// Nothing, for so long.
    Nothing,
}

/// The signals of a supervisor, blocked.
pub(super) struct Signals {
    set: libc::sigset_t,
    before: libc::sigset_t,
}

impl Signals {
    /// Blocks SIGTERM, SIGINT and SIGCHLD on this thread.
    pub(super) fn block() -> io::Result<Self> {
        // SAFETY: sigset_t is a plain C structure, for which all zeroes is a value; each call writes into one of ours.
        unsafe {
            let mut set: libc::sigset_t = std::mem::zeroed();
            let mut before: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&raw mut set);
            for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGCHLD] {
                libc::sigaddset(&raw mut set, signal);
            }
            if libc::sigprocmask(libc::SIG_BLOCK, &raw const set, &raw mut before) != 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(Signals { set, before })
        }
    }

    /// The next one.
    pub(super) fn wait(&self, limit: Duration) -> Heard {
        let limit = libc::timespec {
            tv_sec: libc::time_t::try_from(limit.as_secs()).unwrap_or(libc::time_t::MAX),
            tv_nsec: libc::c_long::from(limit.subsec_nanos().cast_signed()),
        };
        // SAFETY: the set and the time are read; no information is asked for.
        match unsafe { libc::sigtimedwait(&raw const self.set, std::ptr::null_mut(), &raw const limit) } {
            libc::SIGTERM | libc::SIGINT => Heard::Stop,
            libc::SIGCHLD => Heard::Child,
            _ => Heard::Nothing,
        }
    }

    /// As they were before: for a child.
    pub(super) fn restore(&self) {
        // SAFETY: the set is read.
        unsafe { libc::sigprocmask(libc::SIG_SETMASK, &raw const self.before, std::ptr::null_mut()) };
    }
}

/// Blocks every signal on this thread that can be blocked.
pub(super) fn block_all() {
    // SAFETY: sigset_t is a plain C structure, for which all zeroes is a value; the calls write into ours.
    unsafe {
        let mut all: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&raw mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, std::ptr::null_mut());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_wait_until_they_are_taken() {
        let signals = Signals::block().unwrap();
        assert_eq!(signals.wait(Duration::from_millis(1)), Heard::Nothing);
        // SAFETY: to this thread, on which the signal is blocked.
        unsafe { libc::pthread_kill(libc::pthread_self(), libc::SIGTERM) };
        assert_eq!(signals.wait(Duration::from_secs(10)), Heard::Stop);
        signals.restore();
    }
}
