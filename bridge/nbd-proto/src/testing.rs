//! Helpers of the unit tests.

use proptest::test_runner::{Config, RngSeed};

/// Few cases and a fixed seed: every run tries the same values, and leaves no file behind. The fuzz targets
/// are for the others.
pub(crate) fn quick(seed: u64) -> Config {
    Config { cases: 256, rng_seed: RngSeed::Fixed(seed), failure_persistence: None, ..Config::default() }
}
