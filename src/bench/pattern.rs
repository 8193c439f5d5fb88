//! What `--verify` writes, and how it knows it again.
//!
//! ```text
//!   8 bytes  the seed, mixed          all little-endian
//!   8        offset of the block
//!   8        generation: how many times this run has written the block
//!   8        checksum of the three
//!   n        numbers that follow from the checksum
//! ```
//!
//! Any change of a block shows. That a block is an older one than it should be shows by the generation, which
//! [`Blocks`] remembers; that it belongs elsewhere, by the offset.

use std::sync::atomic::{AtomicU32, Ordering};

/// Bytes before the numbers.
const HEAD: usize = 32;

/// Writes the pattern all over `block`, whose length is a multiple of 8 and at least 64.
pub(super) fn fill(block: &mut [u8], seed: u64, offset: u64, generation: u32) {
    let head = [mix(seed), offset, u64::from(generation), checksum(seed, offset, u64::from(generation))];
    let words = head.into_iter().chain(numbers(head[3]));
    for (place, word) in block.chunks_exact_mut(8).zip(words) {
        place.copy_from_slice(&word.to_le_bytes());
    }
}

/// What a block turned out to be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Found {
    /// The pattern, whole.
    Pattern {
        /// Of the run that wrote it.
        generation: u64,
    },
    /// The pattern of another place.
    Elsewhere {
        /// Where it belongs.
        offset: u64,
    },
    /// A pattern of this seed that was changed.
    Broken {
        /// First byte within the block that is wrong.
        at: usize,
    },
    /// Nothing of this seed.
    Foreign,
}

/// Looks at a block that was read from `offset`.
pub(super) fn examine(block: &[u8], seed: u64, offset: u64) -> Found {
    let mut head = [0_u64; 4];
    for (word, bytes) in head.iter_mut().zip(block.chunks_exact(8)) {
        *word = le(bytes);
    }
    let [tag, place, generation, sum] = head;
    let sealed = sum == checksum(seed, place, generation);
    if tag != mix(seed) {
        // Its own checksum shows that a part was changed, and not the whole.
        return if sealed { Found::Broken { at: 0 } } else { Found::Foreign };
    }
    if !sealed {
        return Found::Broken { at: 8 };
    }
    let wrong = block[HEAD..].chunks_exact(8).zip(numbers(sum)).position(|(bytes, word)| le(bytes) != word);
    match wrong {
        Some(n) => Found::Broken { at: HEAD + 8 * n },
        None if place != offset => Found::Elsewhere { offset: place },
        None => Found::Pattern { generation },
    }
}

fn checksum(seed: u64, offset: u64, generation: u64) -> u64 {
    mix(mix(mix(seed) ^ offset) ^ generation.rotate_left(32))
}

fn numbers(start: u64) -> impl Iterator<Item = u64> {
    (1_u64..).map(move |n| mix(start.wrapping_add(n)))
}

/// Every bit of the input changes about half of the output's (the finalizer of SplitMix64).
fn mix(number: u64) -> u64 {
    bridge::random::Random::new(number).number()
}

fn le(bytes: &[u8]) -> u64 {
    bytes.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes))
}

/// Which blocks this run has written how often, and which are in use: a block has one request at a time, since
/// of a read beside a write nobody knows what it must give. Shared by all threads.
pub(super) struct Blocks(Box<[AtomicU32]>);

/// In use.
const BUSY: u32 = 1 << 31;

impl Blocks {
    pub(super) fn new(count: usize) -> Self {
        Blocks((0..count).map(|_| AtomicU32::new(0)).collect())
    }

    /// Takes a block into use, if nobody else has it; its generation, 0 for one whose content is not known.
    pub(super) fn claim(&self, block: u64) -> Option<u32> {
        let before = self.cell(block)?.fetch_or(BUSY, Ordering::AcqRel);
        (before & BUSY == 0).then_some(before)
    }

    /// Gives it back with the generation it has now.
    pub(super) fn release(&self, block: u64, generation: u32) {
        if let Some(cell) = self.cell(block) {
            cell.store(generation & !BUSY, Ordering::Release);
        }
    }

    fn cell(&self, block: u64) -> Option<&AtomicU32> {
        self.0.get(usize::try_from(block).ok()?)
    }

    /// The generation after this one.
    pub(super) fn next(generation: u32) -> u32 {
        // It starts again after 2^31 writes of one block, without the 0.
        if generation >= BUSY - 1 { 1 } else { generation + 1 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_block_has_one_user() {
        let blocks = Blocks::new(2);
        assert_eq!(blocks.claim(1), Some(0));
        assert_eq!((blocks.claim(1), blocks.claim(0), blocks.claim(2)), (None, Some(0), None));
        blocks.release(1, Blocks::next(0));
        assert_eq!(blocks.claim(1), Some(1));
        assert_eq!(Blocks::next(BUSY - 1), 1);
    }

    proptest! {
        #[test]
        fn what_was_written_is_known_again(seed: u64, offset: u64, generation: u32, words in 8..100_usize) {
            let mut block = vec![0xaa; words * 8];
            fill(&mut block, seed, offset, generation);
            let generation = u64::from(generation);
            prop_assert_eq!(examine(&block, seed, offset), Found::Pattern { generation });
            prop_assert_eq!(examine(&block, seed, !offset), Found::Elsewhere { offset });
            prop_assert_eq!(examine(&block, !seed, offset), Found::Foreign);
        }

        #[test]
        fn any_changed_bit_shows(seed: u64, offset: u64, bit in 0..64 * 8_usize) {
            let mut block = [0; 64];
            fill(&mut block, seed, offset, 7);
            block[bit / 8] ^= 1 << (bit % 8);
            let found = examine(&block, seed, offset);
            prop_assert!(matches!(found, Found::Broken { .. }), "{:?}", found);
        }
    }
}
