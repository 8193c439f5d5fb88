//! What was counted: by each thread for itself, and added up at the end.

use nbd_proto::NbdError;

use super::histogram::Histogram;

/// What a request does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Kind {
    Read,
    Write,
    Flush,
}

impl Kind {
    pub(super) const ALL: [Kind; 3] = [Kind::Read, Kind::Write, Kind::Flush];

    pub(super) fn name(self) -> &'static str {
        match self {
            Kind::Read => "read",
            Kind::Write => "write",
            Kind::Flush => "flush",
        }
    }
}

/// The errors of the protocol, each of which is counted.
pub(super) const ERRORS: [NbdError; 8] = [
    NbdError::Perm,
    NbdError::Io,
    NbdError::NoMem,
    NbdError::Inval,
    NbdError::NoSpc,
    NbdError::Overflow,
    NbdError::NotSup,
    NbdError::Shutdown,
];

/// The counters of one thread, or of all.
#[derive(Clone)]
pub(super) struct Tally {
    /// Latencies of what was answered, errors included; one for each [`Kind`].
    pub(super) latency: [Histogram; 3],
    /// Bytes of requests that succeeded; one for each [`Kind`].
    pub(super) bytes: [u64; 3],
    /// One for each of [`ERRORS`].
    pub(super) errors: [u64; 8],
    /// Blocks that were read and are right.
    pub(super) verified: u64,
    /// Blocks that were read and carry no pattern to check.
    pub(super) unknown: u64,
    /// Blocks that are wrong.
    pub(super) mismatches: u64,
    /// The first of them, in words.
    pub(super) first_mismatch: Option<String>,
    /// Processor time of the threads, in nanoseconds.
    pub(super) cpu_ns: u64,
    /// From the first request to the last answer, in nanoseconds.
    pub(super) elapsed_ns: u64,
}

impl Tally {
    pub(super) fn new() -> Self {
        Tally {
            latency: std::array::from_fn(|_| Histogram::new()),
            bytes: [0; 3],
            errors: [0; 8],
            verified: 0,
            unknown: 0,
            mismatches: 0,
            first_mismatch: None,
            cpu_ns: 0,
            elapsed_ns: 0,
        }
    }

    #[inline]
    pub(super) fn done(&mut self, kind: Kind, bytes: u64, latency_ns: u64) {
        self.latency[kind as usize].record(latency_ns);
        self.bytes[kind as usize] += bytes;
    }

    pub(super) fn failed(&mut self, kind: Kind, error: NbdError, latency_ns: u64) {
        self.latency[kind as usize].record(latency_ns);
        if let Some(n) = ERRORS.iter().position(|known| *known == error) {
            self.errors[n] += 1;
        }
    }

    /// A block that is wrong.
    pub(super) fn mismatch(&mut self, words: impl FnOnce() -> String) {
        self.mismatches += 1;
        self.first_mismatch.get_or_insert_with(words);
    }

    pub(super) fn add(&mut self, other: Tally) {
        for (mine, theirs) in self.latency.iter_mut().zip(&other.latency) {
            mine.add(theirs);
        }
        for (mine, theirs) in self.bytes.iter_mut().zip(other.bytes) {
            *mine += theirs;
        }
        for (mine, theirs) in self.errors.iter_mut().zip(other.errors) {
            *mine += theirs;
        }
        self.verified += other.verified;
        self.unknown += other.unknown;
        self.mismatches += other.mismatches;
        self.first_mismatch = self.first_mismatch.take().or(other.first_mismatch);
        self.cpu_ns += other.cpu_ns;
        self.elapsed_ns = self.elapsed_ns.max(other.elapsed_ns);
    }

    /// Adds what reading back has shown; its speed is no part of the measurement.
    pub(super) fn add_check(&mut self, check: Tally) {
        let latency = std::array::from_fn(|_| Histogram::new());
        self.add(Tally { latency, bytes: [0; 3], ..check });
    }

    /// Requests that were answered.
    pub(super) fn requests(&self) -> u64 {
        self.latency.iter().map(Histogram::count).sum()
    }

    /// Requests that failed.
    pub(super) fn failures(&self) -> u64 {
        self.errors.iter().sum()
    }
}
