//! A latency histogram fine enough to compare servers by: 32 steps for each power of two, so that a percentile
//! is right to 3 %. (Those of `bridge::stats`, which every request of a server pays for, have one step.)

/// Steps for each power of two.
const STEPS_LOG2: u32 = 5;
const STEPS: usize = 1 << STEPS_LOG2;
/// Latencies of up to 2^40 ns, 18 minutes; the last bucket takes all the rest.
const BUCKETS: usize = (40 - STEPS_LOG2 as usize) * STEPS;

/// Latencies in nanoseconds.
#[derive(Clone, Debug)]
pub(super) struct Histogram {
    buckets: Box<[u64]>,
    count: u64,
    sum_ns: u64,
    max_ns: u64,
}

impl Histogram {
    pub(super) fn new() -> Self {
        Histogram { buckets: vec![0; BUCKETS].into(), count: 0, sum_ns: 0, max_ns: 0 }
    }

    #[inline]
    pub(super) fn record(&mut self, ns: u64) {
        self.buckets[bucket_of(ns)] += 1;
        self.count += 1;
        self.sum_ns = self.sum_ns.saturating_add(ns);
        self.max_ns = self.max_ns.max(ns);
    }

    pub(super) fn add(&mut self, other: &Histogram) {
        for (mine, theirs) in self.buckets.iter_mut().zip(&other.buckets) {
            *mine += theirs;
        }
        self.count += other.count;
        self.sum_ns = self.sum_ns.saturating_add(other.sum_ns);
        self.max_ns = self.max_ns.max(other.max_ns);
    }

    pub(super) fn count(&self) -> u64 {
        self.count
    }

    pub(super) fn mean_ns(&self) -> u64 {
        self.sum_ns.checked_div(self.count).unwrap_or(0)
    }

    pub(super) fn max_ns(&self) -> u64 {
        self.max_ns
    }

    /// What the share `per_mille` of all latencies stayed under, to one step.
    pub(super) fn percentile_ns(&self, per_mille: u64) -> u64 {
        let wanted = u128::from(self.count) * u128::from(per_mille);
        let mut seen = 0;
        for (n, bucket) in self.buckets.iter().enumerate() {
            seen += u128::from(*bucket);
            if *bucket > 0 && seen * 1000 >= wanted {
                return end_of(n).min(self.max_ns);
            }
        }
        self.max_ns
    }
}

/// Values below [`STEPS`] have a bucket each; above, the highest bits choose.
#[inline]
fn bucket_of(ns: u64) -> usize {
    let shift = (u64::BITS - ns.leading_zeros()).saturating_sub(STEPS_LOG2 + 1);
    // Below 2 * STEPS, for all bits above are shifted out.
    let step = usize::try_from(ns >> shift).unwrap_or(0);
    (shift as usize * STEPS + step).min(BUCKETS - 1)
}

/// The largest value of a bucket.
fn end_of(bucket: usize) -> u64 {
    let shift = (bucket / STEPS).saturating_sub(1);
    let step = (bucket - shift * STEPS) as u64;
    ((step + 1) << shift) - 1
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn buckets_follow_each_other() {
        for ns in (0..5000).chain((1..39).flat_map(|n| [(1 << n) - 1, 1 << n, (1 << n) + 1])) {
            let bucket = bucket_of(ns);
            assert!(ns <= end_of(bucket), "{ns}");
            assert!(bucket == 0 || ns > end_of(bucket - 1), "{ns}");
        }
        for ns in 1..5000 {
            let (before, bucket) = (bucket_of(ns - 1), bucket_of(ns));
            assert!(bucket == before || bucket == before + 1, "{ns}");
        }
        assert_eq!(bucket_of(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn figures_of_known_latencies() {
        let mut histogram = Histogram::new();
        assert_eq!((histogram.mean_ns(), histogram.percentile_ns(999)), (0, 0));
        for ns in 1..=1000 {
            histogram.record(ns * 1000);
        }
        let mut twice = histogram.clone();
        twice.add(&histogram);
        for histogram in [histogram, twice] {
            assert_eq!((histogram.mean_ns(), histogram.max_ns()), (500_500, 1_000_000));
            for (per_mille, ns) in [(500, 500_000), (990, 990_000), (999, 999_000), (1000, 1_000_000)] {
                let found = histogram.percentile_ns(per_mille);
                assert!(found >= ns && found - ns <= ns / 32, "{per_mille}: {found}");
            }
        }
    }

    proptest! {
        #[test]
        fn a_percentile_is_right_to_a_step(ns in 0..1_u64 << 39) {
            let mut histogram = Histogram::new();
            histogram.record(ns);
            histogram.record(u64::MAX);
            let found = histogram.percentile_ns(500);
            prop_assert!(found >= ns && found - ns <= ns / 32);
        }
    }
}
