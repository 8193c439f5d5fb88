//! Which blocks the overlay holds: two bits for each, and no lock on the way of a request.
//!
//! | fresh | mapped | |
//! |---|---|---|
//! | 0 | 0 | the base has it |
//! | 1 | 0 | in the overlay, since the last flush |
//! | 1 | 1 | in the overlay; a flush is writing this down |
//! | 0 | 1 | in the overlay, and the file's map says so durably |
//!
//! A block only ever goes down this table. Whoever marks blocks holds their lock; flushes run one at a time.

use std::ops::Range;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Blocks of one chunk: 4 GiB of disk, whose bits come into being with the first block that is written.
const CHUNK_BLOCKS: u64 = 1 << 16;
const WORDS: usize = (CHUNK_BLOCKS / 64) as usize;

/// The state of every block.
pub(super) struct Blocks {
    count: u64,
    chunks: Box<[OnceLock<Box<Chunk>>]>,
}

struct Chunk {
    fresh: [AtomicU64; WORDS],
    mapped: [AtomicU64; WORDS],
    /// There may be fresh blocks.
    dirty: AtomicBool,
}

impl Blocks {
    /// All in the base.
    pub(super) fn new(count: u64) -> Self {
        let chunks = (0..count.div_ceil(CHUNK_BLOCKS)).map(|_| OnceLock::new()).collect();
        Blocks { count, chunks }
    }

    pub(super) fn count(&self) -> u64 {
        self.count
    }

    /// Whether the overlay holds all of them.
    pub(super) fn all_present(&self, mut blocks: Range<u64>) -> bool {
        blocks.all(|block| self.present(block))
    }

    /// Whether the overlay holds all of them, and its map says so durably.
    pub(super) fn all_settled(&self, mut blocks: Range<u64>) -> bool {
        blocks.all(|block| {
            self.chunk(block).is_some_and(|chunk| {
                let (word, bit) = place(block);
                chunk.fresh[word].load(Ordering::Acquire) & bit == 0
                    && chunk.mapped[word].load(Ordering::Acquire) & bit != 0
            })
        })
    }

    /// Whether the overlay holds this block.
    pub(super) fn present(&self, block: u64) -> bool {
        self.chunk(block).is_some_and(|chunk| chunk.present(place(block).0) & place(block).1 != 0)
    }

    /// How far the state of the first of these blocks goes: where the run ends, and whether the overlay holds it.
    pub(super) fn run(&self, blocks: Range<u64>) -> (u64, bool) {
        let present = self.present(blocks.start);
        let mut at = blocks.start + 1;
        while at < blocks.end {
            // Whole words and chunks at once.
            let (step, word) = match self.chunk(at) {
                None => (CHUNK_BLOCKS - at % CHUNK_BLOCKS, 0),
                Some(chunk) if at.is_multiple_of(64) => (64, chunk.present(place(at).0)),
                Some(_) => (1, if self.present(at) { u64::MAX } else { 0 }),
            };
            let same = if present { word == u64::MAX } else { word == 0 };
            if same {
                at += step;
            } else if step == 1 {
                break;
            } else {
                // The word is mixed, or the other state.
                let differing = if present { !word } else { word };
                at += u64::from(differing.trailing_zeros());
                break;
            }
        }
        (at.min(blocks.end), present)
    }

    /// The overlay holds these from now on. Their lock must be held.
    pub(super) fn mark_fresh(&self, blocks: Range<u64>) {
        self.each_word(blocks, |chunk, word, mask| {
            let new = mask & !chunk.present(word);
            chunk.fresh[word].fetch_or(new, Ordering::AcqRel);
            if new != 0 {
                chunk.dirty.store(true, Ordering::Release);
            }
        });
    }

    /// The overlay holds these, as its file's map says: for loading.
    pub(super) fn mark_mapped(&self, blocks: Range<u64>) {
        self.each_word(blocks, |chunk, word, mask| {
            chunk.mapped[word].fetch_or(mask, Ordering::AcqRel);
        });
    }

    /// Begins a flush: the chunks that have fresh blocks, which belong to it from now on. Give each to
    /// [`Blocks::settle`] or [`Blocks::put_off`].
    pub(super) fn begin(&self) -> Vec<u64> {
        let mut dirty = Vec::new();
        for (index, chunk) in (0..).zip(&self.chunks) {
            let Some(chunk) = chunk.get() else { continue };
            if chunk.dirty.swap(false, Ordering::AcqRel) {
                for (fresh, mapped) in chunk.fresh.iter().zip(&chunk.mapped) {
                    mapped.fetch_or(fresh.load(Ordering::Acquire), Ordering::AcqRel);
                }
                dirty.push(index);
            }
        }
        dirty
    }

    /// The runs of blocks of a chunk that belong to the flush.
    pub(super) fn flushing(&self, chunk: u64) -> Vec<Range<u64>> {
        let mut runs: Vec<Range<u64>> = Vec::new();
        let Some(bits) = self.chunks.get(index(chunk)).and_then(OnceLock::get) else { return runs };
        for (word, first) in (0..WORDS).zip((chunk * CHUNK_BLOCKS..).step_by(64)) {
            let mut left = bits.flushing(word);
            while left != 0 {
                let start = first + u64::from(left.trailing_zeros());
                let len = u64::from((left >> (start - first)).trailing_ones());
                match runs.last_mut() {
                    Some(last) if last.end == start => last.end += len,
                    _ => runs.push(start..start + len),
                }
                left &= u64::MAX.checked_shl(u32::try_from(start - first + len).unwrap_or(64)).unwrap_or(0);
            }
        }
        runs
    }

    /// The flush has written down what belongs to it in this chunk.
    pub(super) fn settle(&self, chunk: u64) {
        if let Some(bits) = self.chunks.get(index(chunk)).and_then(OnceLock::get) {
            for word in 0..WORDS {
                bits.fresh[word].fetch_and(!bits.flushing(word), Ordering::AcqRel);
            }
        }
    }

    /// The flush has failed: the next one does it again.
    pub(super) fn put_off(&self, chunk: u64) {
        if let Some(bits) = self.chunks.get(index(chunk)).and_then(OnceLock::get) {
            bits.dirty.store(true, Ordering::Release);
        }
    }

    fn chunk(&self, block: u64) -> Option<&Chunk> {
        debug_assert!(block < self.count);
        self.chunks.get(index(block / CHUNK_BLOCKS))?.get().map(Box::as_ref)
    }

    fn each_word(&self, blocks: Range<u64>, mut act: impl FnMut(&Chunk, usize, u64)) {
        let mut at = blocks.start;
        while at < blocks.end {
            let len = (64 - at % 64).min(blocks.end - at);
            let Some(chunk) = self.chunks.get(index(at / CHUNK_BLOCKS)) else { return };
            let mask = if len == 64 { u64::MAX } else { ((1 << len) - 1) << (at % 64) };
            act(chunk.get_or_init(Box::default), place(at).0, mask);
            at += len;
        }
    }
}

impl Default for Chunk {
    fn default() -> Self {
        let zeroes = || [const { AtomicU64::new(0) }; WORDS];
        Chunk { fresh: zeroes(), mapped: zeroes(), dirty: AtomicBool::new(false) }
    }
}

impl Chunk {
    /// In this order: a block that is settled in between is mapped before it is no longer fresh.
    fn present(&self, word: usize) -> u64 {
        let fresh = self.fresh[word].load(Ordering::Acquire);
        fresh | self.mapped[word].load(Ordering::Acquire)
    }

    fn flushing(&self, word: usize) -> u64 {
        self.fresh[word].load(Ordering::Acquire) & self.mapped[word].load(Ordering::Acquire)
    }
}

/// A block's word in its chunk, and its bit there.
fn place(block: u64) -> (usize, u64) {
    (index(block % CHUNK_BLOCKS / 64), 1 << (block % 64))
}

/// A place in a table; one that does not fit is in none.
fn index(number: u64) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;

    #[test]
    fn marks_and_runs_agree_with_a_list() {
        let count = 3 * CHUNK_BLOCKS + 17;
        let blocks = Blocks::new(count);
        let mut list = vec![false; usize::try_from(count).unwrap()];
        let mut random = Random::new(1);
        for _ in 0..60 {
            let start = random.below(count);
            let end = start + 1 + random.below((count - start).min(3000));
            let end = end.min(count);
            blocks.mark_fresh(start..end);
            list[index(start)..index(end)].fill(true);
            let (mut at, mut seen) = (0, Vec::new());
            while at < count {
                let (end, present) = blocks.run(at..count);
                assert!(end > at && end <= count);
                seen.extend(std::iter::repeat_n(present, index(end - at)));
                at = end;
            }
            assert!(seen == list);
            let (end, _) = blocks.run(start..start + 1);
            assert_eq!(end, start + 1);
        }
    }

    #[test]
    fn a_flush_takes_what_was_there_when_it_began() {
        let blocks = Blocks::new(2 * CHUNK_BLOCKS);
        blocks.mark_fresh(60..130);
        blocks.mark_fresh(CHUNK_BLOCKS - 1..CHUNK_BLOCKS + 2);
        assert!(blocks.all_present(60..130) && !blocks.all_settled(60..61));
        assert_eq!(blocks.begin(), [0, 1]);
        blocks.mark_fresh(10..12);
        assert_eq!(blocks.flushing(0), [60..130, CHUNK_BLOCKS - 1..CHUNK_BLOCKS]);
        assert!(matches!(&blocks.flushing(1)[..], [only] if *only == (CHUNK_BLOCKS..CHUNK_BLOCKS + 2)));
        blocks.settle(0);
        blocks.put_off(1);
        assert!(blocks.all_settled(60..130) && blocks.present(10) && !blocks.all_settled(10..11));
        assert_eq!(blocks.begin(), [0, 1]);
        assert!(matches!(&blocks.flushing(0)[..], [only] if *only == (10..12)));
        assert!(matches!(&blocks.flushing(1)[..], [only] if *only == (CHUNK_BLOCKS..CHUNK_BLOCKS + 2)));
        blocks.settle(0);
        blocks.settle(1);
        assert!(blocks.begin().is_empty());
        assert!(blocks.all_settled(CHUNK_BLOCKS - 1..CHUNK_BLOCKS + 2));
        assert_eq!(blocks.run(0..200), (10, false));
        assert_eq!(blocks.run(60..200), (130, true));
    }
}
