//! Seeded pseudo-random numbers (SplitMix64) for faults, crashes and tests: the same seed gives the same
//! numbers on every machine and in every version. Not for secrets.

/// A stream of numbers.
#[derive(Clone, Debug)]
pub struct Random {
    state: u64,
}

impl Random {
    /// The stream of this seed.
    pub fn new(seed: u64) -> Self {
        Random { state: seed }
    }

    /// A seed that differs from run to run.
    pub fn any_seed() -> u64 {
        use std::hash::BuildHasher;
        std::hash::RandomState::new().hash_one(0)
    }

    /// The next number.
    pub fn number(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `end`; 0 where `end` is 0.
    pub fn below(&mut self, end: u64) -> u64 {
        self.number().checked_rem(end).unwrap_or(0)
    }

    /// True in `share` (0 to 1) of all calls.
    pub fn chance(&mut self, share: f64) -> bool {
        // 53 bits, as many as an f64 holds; strictly less than 1.
        ((self.number() >> 11) as f64) < share * (1_u64 << 53) as f64
    }

    /// Fills a buffer.
    pub fn fill(&mut self, buf: &mut [u8]) {
        for part in buf.chunks_mut(8) {
            part.copy_from_slice(&self.number().to_le_bytes()[..part.len()]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stream_is_that_of_splitmix64() {
        // The first numbers of seed 1234567, as the algorithm's reference implementation gives them.
        let mut random = Random::new(1_234_567);
        assert_eq!(random.number(), 6_457_827_717_110_365_317);
        assert_eq!(random.number(), 3_203_168_211_198_807_973);
    }

    #[test]
    fn chances() {
        let mut random = Random::new(1);
        assert!((0..1000).all(|_| random.chance(1.0) && !random.chance(0.0) && random.below(3) < 3));
        let hits = (0..10_000).filter(|_| random.chance(0.25)).count();
        assert!((2300..2700).contains(&hits), "{hits}");
    }
}
