//! The arithmetic of throttling: leaky buckets as meters, with the meaning QEMU gives them (its
//! `docs/throttle.txt`). No clock and no waiting in here: the time is an argument.
//!
//! What was done goes into a bucket, which leaks at the average rate. While it holds no more than its size a
//! request may go; the request that overfills it goes too, and later ones pay for it. So over any window the
//! total is at most `avg * window + size + one request`.
//!
//! The size is a tenth of a second at the average rate where no burst is allowed (without any, every other
//! request would wait), else `max * max_length`. A burst longer than a second has a second bucket, which leaks
//! at the burst's own rate and keeps the burst to it.

use std::time::Duration;

use super::config::{Limit, Limits, ThrottleConfig};

/// Which queue and which buckets a request belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    Read = 0,
    Write = 1,
}

/// What one request puts into the buckets.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Cost {
    ops: f64,
    bytes: f64,
}

/// One limit and how much of it is used.
#[derive(Clone, Debug)]
struct Bucket {
    /// Units per second; 0 for no limit.
    avg: f64,
    /// Units per second in a burst; 0 for no burst.
    max: f64,
    /// Units that fit in.
    size: f64,
    /// Whether the burst has to be kept to its rate.
    long_burst: bool,
    level: f64,
    burst_level: f64,
}

/// All buckets of one throttle.
#[derive(Clone, Debug)]
pub(crate) struct Limiter {
    ops: Trio,
    bytes: Trio,
    iops_size: f64,
    leaked_at: Duration,
}

#[derive(Clone, Debug)]
struct Trio {
    total: Bucket,
    read: Bucket,
    write: Bucket,
}

impl Limiter {
    /// Empty buckets of these sizes, at the time `now`.
    pub(crate) fn new(config: &ThrottleConfig, now: Duration) -> Self {
        Limiter {
            ops: Trio::new(&config.iops),
            bytes: Trio::new(&config.bps),
            iops_size: to_f64(config.iops_size),
            leaked_at: now,
        }
    }

    /// What a request of `bytes` costs. A later piece of one counts no operation of its own; only where
    /// `iops-size` measures operations in bytes does it count its part.
    pub(crate) fn cost(&self, bytes: u64, continued: bool) -> Cost {
        let bytes = to_f64(bytes);
        let units = if self.iops_size > 0.0 { bytes / self.iops_size } else { 0.0 };
        Cost { ops: if continued { units } else { units.max(1.0) }, bytes }
    }

    /// How long a request has to wait from `now` on; zero if it may go. A time before the last one counts as
    /// the last one.
    pub(crate) fn wait(&mut self, now: Duration, direction: Direction, cost: Cost) -> Duration {
        let elapsed = now.saturating_sub(self.leaked_at).as_secs_f64();
        self.leaked_at = self.leaked_at.max(now);
        for trio in [&mut self.ops, &mut self.bytes] {
            for bucket in [&mut trio.total, &mut trio.read, &mut trio.write] {
                bucket.leak(elapsed);
            }
        }
        let seconds = [(&mut self.ops, cost.ops), (&mut self.bytes, cost.bytes)]
            .into_iter()
            .filter(|(_, units)| *units > 0.0)
            .flat_map(|(trio, _)| trio.of(direction))
            .map(|bucket| bucket.wait())
            .fold(0.0, f64::max);
        Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX)
    }

    /// Puts a request into its buckets.
    pub(crate) fn charge(&mut self, direction: Direction, cost: Cost) {
        self.add(direction, cost, 1.0);
    }

    /// Takes back what `charge` did: the levels become what they would be without it.
    pub(crate) fn refund(&mut self, direction: Direction, cost: Cost) {
        self.add(direction, cost, -1.0);
    }

    fn add(&mut self, direction: Direction, cost: Cost, sign: f64) {
        for (trio, units) in [(&mut self.ops, cost.ops), (&mut self.bytes, cost.bytes)] {
            for bucket in trio.of(direction) {
                bucket.add(sign * units);
            }
        }
    }
}

impl Trio {
    fn new(limits: &Limits) -> Self {
        Trio {
            total: Bucket::new(&limits.total),
            read: Bucket::new(&limits.read),
            write: Bucket::new(&limits.write),
        }
    }

    fn of(&mut self, direction: Direction) -> [&mut Bucket; 2] {
        match direction {
            Direction::Read => [&mut self.total, &mut self.read],
            Direction::Write => [&mut self.total, &mut self.write],
        }
    }
}

impl Bucket {
    fn new(limit: &Limit) -> Self {
        let (avg, max) = (to_f64(limit.avg), to_f64(limit.max));
        let size = if limit.max == 0 { avg / 10.0 } else { max * to_f64(limit.max_length) };
        let long_burst = limit.max > 0 && limit.max_length > 1;
        Bucket { avg, max, size, long_burst, level: 0.0, burst_level: 0.0 }
    }

    fn leak(&mut self, seconds: f64) {
        self.level = (self.level - self.avg * seconds).max(0.0);
        self.burst_level = (self.burst_level - self.max * seconds).max(0.0);
    }

    /// Seconds until a request may go.
    fn wait(&self) -> f64 {
        if self.avg == 0.0 {
            return 0.0;
        }
        let over = self.level - self.size;
        let burst_over = self.burst_level - self.max / 10.0;
        if over > 0.0 {
            over / self.avg
        } else if self.long_burst && burst_over > 0.0 {
            burst_over / self.max
        } else {
            0.0
        }
    }

    fn add(&mut self, units: f64) {
        if self.avg > 0.0 {
            self.level = (self.level + units).max(0.0);
            if self.long_burst {
                self.burst_level = (self.burst_level + units).max(0.0);
            }
        }
    }
}

/// Precise to 2^53, which is more than the largest limit.
fn to_f64(n: u64) -> f64 {
    n as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn limiter(text: &str) -> Limiter {
        Limiter::new(&text.parse().unwrap(), Duration::ZERO)
    }

    /// Sends requests one after the other, each as soon as it may go, and returns when each went.
    fn run(limiter: &mut Limiter, from: Duration, direction: Direction, sizes: &[u64]) -> Vec<Duration> {
        let mut now = from;
        sizes
            .iter()
            .map(|bytes| {
                let cost = limiter.cost(*bytes, false);
                now += limiter.wait(now, direction, cost);
                limiter.charge(direction, cost);
                now
            })
            .collect()
    }

    fn seconds(n: f64) -> Duration {
        Duration::from_secs_f64(n)
    }

    #[test]
    fn the_average_holds_after_a_tenth_of_a_second() {
        let mut limiter = limiter("iops-total=100");
        let went = run(&mut limiter, Duration::ZERO, Direction::Read, &[4096; 111]);
        // Ten fit and the eleventh overfills; then one each 10 ms.
        assert_eq!(went[10], Duration::ZERO);
        assert!((went[110].as_secs_f64() - 1.0).abs() < 1e-6, "{:?}", went[110]);
    }

    #[test]
    fn the_burst_of_qemu_s_own_example() {
        // 2000 per second for 60 seconds, and, as the bucket leaks meanwhile, a little over 3 seconds more.
        let mut limiter = limiter("iops-total=100,iops-total-max=2000,iops-total-max-length=60");
        let went = run(&mut limiter, Duration::ZERO, Direction::Write, &[1; 140_000]);
        let in_burst = went.iter().filter(|at| **at < seconds(63.0)).count();
        assert!((126_000..126_300).contains(&in_burst), "{in_burst}");
        let later = went.iter().filter(|at| (seconds(70.0)..seconds(80.0)).contains(at)).count();
        assert!((999..=1001).contains(&later), "{later}");
    }

    #[test]
    fn directions_have_their_own_buckets_and_share_the_total() {
        let mut own = limiter("bps-read=1000");
        assert_eq!(run(&mut own, Duration::ZERO, Direction::Write, &[5000; 9]).pop(), Some(Duration::ZERO));
        assert_eq!(run(&mut own, Duration::ZERO, Direction::Read, &[1100, 1]).pop(), Some(seconds(1.0)));
        let mut shared = limiter("bps-total=1000");
        assert_eq!(run(&mut shared, Duration::ZERO, Direction::Write, &[1100]).pop(), Some(Duration::ZERO));
        assert_eq!(run(&mut shared, Duration::ZERO, Direction::Read, &[1]).pop(), Some(seconds(1.0)));
    }

    #[test]
    fn iops_size_counts_large_requests_in_proportion() {
        let limiter = limiter("iops-total=10,iops-size=4K");
        let ops = |bytes, continued| limiter.cost(bytes, continued).ops;
        assert_eq!((ops(1, false), ops(8192, false), ops(6144, false)), (1.0, 2.0, 1.5));
        // The pieces of a request add up to what it would cost whole.
        assert_eq!(ops(8192, false) + ops(8192, true), ops(16_384, false));
    }

    #[test]
    fn a_later_piece_costs_bytes_and_waits_for_bytes_only() {
        let mut limiter = limiter("iops-total=10,bps-total=1M");
        let first = limiter.cost(4096, false);
        for _ in 0..3 {
            limiter.charge(Direction::Read, first);
        }
        assert!(limiter.wait(Duration::ZERO, Direction::Read, first) > Duration::ZERO);
        let piece = limiter.cost(1 << 20, true);
        assert_eq!(limiter.wait(Duration::ZERO, Direction::Read, piece), Duration::ZERO);
        limiter.charge(Direction::Read, piece);
        assert!(limiter.wait(Duration::ZERO, Direction::Read, piece) > seconds(0.9));
    }

    #[test]
    fn absurd_sizes_and_times_do_no_harm() {
        let mut limiter = limiter("bps-total=1");
        let cost = limiter.cost(u64::MAX, false);
        limiter.charge(Direction::Write, cost);
        let late = Duration::from_secs(u64::MAX / 2);
        let wait = limiter.wait(late, Direction::Write, cost);
        assert!(wait > Duration::ZERO);
        assert_eq!(limiter.wait(Duration::ZERO, Direction::Write, cost), wait, "time does not go back");
        assert_eq!(limiter.wait(Duration::MAX, Direction::Write, cost), Duration::ZERO);
    }

    proptest! {
        /// Over any window, whatever is asked: no more than the average, the burst and one request; and a
        /// refused request leaves no trace.
        #[test]
        fn the_rate_never_exceeds_average_and_burst(
            avg in 1_u64..10_000,
            burst in 0_u64..5,
            length in 1_u64..5,
            steps in proptest::collection::vec((1_u64..5_000, 0_u64..2_000, any::<bool>()), 1..200),
        ) {
            let limit = Limit { avg, max: avg * burst, max_length: if burst > 0 { length } else { 1 } };
            let limits = Limits { total: limit, ..Limits::default() };
            let mut limiter = Limiter::new(&ThrottleConfig { bps: limits, ..Default::default() }, Duration::ZERO);
            let size = limiter.bytes.total.size;
            let (mut now, mut went) = (Duration::ZERO, Vec::new());
            for (bytes, idle_ms, refused) in steps {
                now += Duration::from_millis(idle_ms);
                let cost = limiter.cost(bytes, false);
                now += limiter.wait(now, Direction::Read, cost);
                limiter.charge(Direction::Read, cost);
                if refused {
                    limiter.refund(Direction::Read, cost);
                } else {
                    went.push((now, bytes));
                }
            }
            for from in 0..went.len() {
                let mut sum = 0;
                for to in from..went.len() {
                    sum += went[to].1;
                    let window = (went[to].0 - went[from].0).as_secs_f64();
                    let most = to_f64(avg) * window + size + 5_000.0;
                    prop_assert!(to_f64(sum) <= most + 1.0, "{sum} bytes in {window} s, at most {most}");
                }
            }
        }
    }
}
