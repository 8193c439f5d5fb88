//! Counters of one export: per operation its count, bytes, errors and a latency histogram.
//!
//! Counters are kept per worker and added up when somebody looks, so that workers do not fight over a cache line.

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use crate::Operation;

/// Buckets of the latency histogram: bucket n counts latencies of less than 2^n microseconds that no lower
/// bucket counts; the last takes all the rest (2^22 us is about 4 s).
pub const LATENCY_BUCKETS: usize = 24;

/// Shards; threads beyond this number share.
const SHARDS: usize = 16;

/// The live counters of an export; clones are the same counters.
#[derive(Clone)]
pub struct Stats {
    shards: Arc<[Shard]>,
}

/// One operation's figures, added up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OperationStats {
    /// Requests that were answered, errors included.
    pub count: u64,
    /// Bytes of those that succeeded.
    pub bytes: u64,
    /// Requests that were answered with an error.
    pub errors: u64,
    /// Latencies; see [`LATENCY_BUCKETS`].
    pub latency: [u64; LATENCY_BUCKETS],
}

impl Stats {
    /// Counters at zero.
    pub fn new() -> Self {
        Stats { shards: (0..SHARDS).map(|_| Shard::default()).collect() }
    }

    /// Counts one answered request (or, with `counted` false, a later piece of one: its bytes and errors only).
    #[inline]
    pub fn record(&self, operation: Operation, bytes: u64, ok: bool, counted: bool, latency: Duration) {
        let cell = &self.shards[shard_of_this_thread()].cells[operation as usize];
        if ok {
            cell.bytes.fetch_add(bytes, Relaxed);
        } else {
            cell.errors.fetch_add(1, Relaxed);
        }
        if counted {
            cell.count.fetch_add(1, Relaxed);
            cell.latency[bucket_of(latency)].fetch_add(1, Relaxed);
        }
    }

    /// How many requests of one operation were answered up to now.
    pub fn count(&self, operation: Operation) -> u64 {
        self.shards.iter().map(|shard| shard.cells[operation as usize].count.load(Relaxed)).sum()
    }

    /// One operation's figures up to now.
    pub fn of(&self, operation: Operation) -> OperationStats {
        let mut sum = OperationStats::default();
        for shard in self.shards.iter() {
            let cell = &shard.cells[operation as usize];
            sum.count += cell.count.load(Relaxed);
            sum.bytes += cell.bytes.load(Relaxed);
            sum.errors += cell.errors.load(Relaxed);
            for (total, bucket) in sum.latency.iter_mut().zip(&cell.latency) {
                *total += bucket.load(Relaxed);
            }
        }
        sum
    }
}

impl Default for Stats {
    fn default() -> Self {
        Stats::new()
    }
}

impl OperationStats {
    /// An upper bound in microseconds of the latency that the share `share` (0 to 1) of requests stayed under;
    /// None before the first request.
    pub fn latency_us(&self, share: f64) -> Option<u64> {
        let total: u64 = self.latency.iter().sum();
        let mut seen = 0;
        for (n, bucket) in self.latency.iter().enumerate() {
            seen += bucket;
            if *bucket > 0 && seen as f64 >= share * total as f64 {
                return Some(1 << n);
            }
        }
        None
    }
}

fn bucket_of(latency: Duration) -> usize {
    let us = u64::try_from(latency.as_micros()).unwrap_or(u64::MAX);
    ((u64::BITS - us.leading_zeros()) as usize).min(LATENCY_BUCKETS - 1)
}

fn shard_of_this_thread() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    thread_local! {
        static MINE: Cell<usize> = Cell::new(NEXT.fetch_add(1, Relaxed) % SHARDS);
    }
    MINE.get()
}

/// Aligned so that no two shards share a cache line (128: the adjacent-line prefetcher works in pairs).
#[derive(Default)]
#[repr(align(128))]
struct Shard {
    cells: [Cells; Operation::COUNT],
}

#[derive(Default)]
struct Cells {
    count: AtomicU64,
    bytes: AtomicU64,
    errors: AtomicU64,
    latency: [AtomicU64; LATENCY_BUCKETS],
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_add_up_over_threads() {
        let stats = Stats::new();
        std::thread::scope(|scope| {
            for _ in 0..20 {
                scope.spawn(|| {
                    for n in 0..1000_u64 {
                        stats.record(Operation::Read, 512, n % 10 != 0, true, Duration::from_micros(n));
                    }
                });
            }
        });
        let read = stats.of(Operation::Read);
        assert_eq!((read.count, read.errors, read.bytes), (20_000, 2_000, 18_000 * 512));
        assert_eq!(read.latency.iter().sum::<u64>(), 20_000);
        assert_eq!(stats.of(Operation::Write), OperationStats::default());
        assert_eq!((stats.count(Operation::Read), stats.count(Operation::Write)), (20_000, 0));
    }

    #[test]
    fn later_pieces_cost_bytes_only() {
        let stats = Stats::new();
        stats.record(Operation::Write, 10, true, true, Duration::ZERO);
        stats.record(Operation::Write, 10, true, false, Duration::ZERO);
        let write = stats.of(Operation::Write);
        assert_eq!((write.count, write.bytes), (1, 20));
    }

    #[test]
    fn buckets_and_percentiles() {
        assert_eq!(bucket_of(Duration::ZERO), 0);
        assert_eq!(bucket_of(Duration::from_micros(1)), 1);
        assert_eq!(bucket_of(Duration::from_micros(3)), 2);
        assert_eq!(bucket_of(Duration::MAX), LATENCY_BUCKETS - 1);
        let stats = Stats::new();
        assert_eq!(stats.of(Operation::Read).latency_us(0.5), None);
        for us in [3, 3, 3, 100] {
            stats.record(Operation::Read, 1, true, true, Duration::from_micros(us));
        }
        let read = stats.of(Operation::Read);
        assert_eq!((read.latency_us(0.5), read.latency_us(0.99)), (Some(4), Some(128)));
    }
}
