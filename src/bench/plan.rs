//! What is asked of the server, once it is known what the server has: the range, and which block comes next.

use anyhow::{Result, bail};
use bridge::random::Random;
use nbd_proto::{Negotiated, TransmissionFlags};

use super::pattern::Blocks;
use crate::cli::BenchArgs;
use crate::size;

/// The most blocks that are remembered: 4 bytes each.
const MAX_BLOCKS: u64 = 1 << 28;

/// Settled for all connections.
pub(super) struct Plan {
    pub(super) block_size: u32,
    /// First byte of the range.
    offset: u64,
    /// Whole blocks in the range; at least one.
    blocks: u64,
    pub(super) read_percent: u8,
    pub(super) flush_every: u64,
    pub(super) sequential: bool,
    pub(super) verify: bool,
    pub(super) seed: u64,
    pub(super) extended: bool,
    /// Where this run both writes and checks.
    pub(super) written: Option<Blocks>,
}

impl Plan {
    /// Holds what is wanted against what the export can do.
    ///
    /// # Errors
    /// One line that names the flag to change.
    pub(super) fn new(args: &BenchArgs, export: &Negotiated) -> Result<Plan> {
        let (info, block_size) = (&export.info, u64::from(args.block_size));
        let exact = |bytes: u32| size::exact(u64::from(bytes));
        if args.writes() && info.flags.contains(TransmissionFlags::READ_ONLY) {
            bail!("the export is read-only; leave out --write");
        }
        if args.flush_every.is_some() && !info.flags.contains(TransmissionFlags::SEND_FLUSH) {
            bail!("the server knows no flush; leave out --flush-every");
        }
        if !args.block_size.is_multiple_of(info.min_block) {
            bail!("the server wants multiples of {}; change --block-size", exact(info.min_block));
        }
        if args.block_size > info.max_payload {
            bail!("the server takes at most {} in a request; change --block-size", exact(info.max_payload));
        }
        if !args.offset.is_multiple_of(u64::from(info.min_block)) {
            bail!("the server wants multiples of {}; change --offset", exact(info.min_block));
        }
        let Some(room) = info.size.checked_sub(args.offset) else {
            bail!("--offset is past the export's end at {} bytes", info.size);
        };
        let length = args.size.unwrap_or(room);
        if length > room {
            bail!("--size goes past the export's end at {} bytes", info.size);
        }
        let blocks = length / block_size;
        if blocks == 0 {
            bail!("no block of {} fits into the range", exact(args.block_size));
        }
        let written = if args.verify && args.writes() { Some(memory(args, export, blocks)?) } else { None };
        Ok(Plan {
            block_size: args.block_size,
            offset: args.offset,
            blocks,
            read_percent: args.read_percent,
            flush_every: args.flush_every.map_or(u64::MAX, Into::into),
            sequential: args.sequential,
            verify: args.verify,
            seed: args.seed,
            extended: export.style.extended(),
            written,
        })
    }

    /// Where a block begins.
    pub(super) fn offset_of(&self, block: u64) -> u64 {
        self.offset + block * u64::from(self.block_size)
    }

    /// The part of the range that connection `index` of `count` has to itself, when it goes in order.
    pub(super) fn part(&self, index: u64, count: u64) -> (u64, u64) {
        // Below 2^63 blocks and 2^16 connections: 128 bits hold the product.
        let at = |n: u64| u128::from(self.blocks) * u128::from(n) / u128::from(count);
        let bound = |n| u64::try_from(at(n)).unwrap_or(self.blocks);
        (bound(index), bound(index + 1))
    }

    /// Bytes of the range that are used.
    pub(super) fn bytes(&self) -> u64 {
        self.blocks * u64::from(self.block_size)
    }
}

/// Remembers the blocks of a run that checks what it writes.
fn memory(args: &BenchArgs, export: &Negotiated, blocks: u64) -> Result<Blocks> {
    if args.connections > 1 && !export.info.flags.contains(TransmissionFlags::CAN_MULTI_CONN) {
        bail!(
            "the server does not promise that connections see each other's writes: --verify takes one of them"
        );
    }
    if blocks > MAX_BLOCKS {
        bail!(
            "--verify remembers up to {MAX_BLOCKS} blocks, and the range has {blocks}; limit it with --size"
        );
    }
    // A block has one request at a time, and every request needs one.
    let needed = 2 * u64::from(args.depth) * u64::from(args.connections);
    if blocks < needed {
        bail!(
            "--verify needs {needed} blocks for so many requests, and the range has {blocks}; lower --depth"
        );
    }
    Ok(Blocks::new(usize::try_from(blocks)?))
}

/// Chooses the blocks of one connection.
pub(super) struct Picker {
    random: Random,
    /// Its part of the range, and where in it it is.
    part: (u64, u64),
    next: u64,
}

impl Picker {
    pub(super) fn new(plan: &Plan, index: u64, count: u64) -> Self {
        let (first, end) = plan.part(index, count);
        // A part can be empty where there are more connections than blocks: then it has them all.
        let part = if first < end { (first, end) } else { (0, plan.blocks) };
        let random = Random::new(plan.seed.wrapping_add(index.wrapping_mul(0x9e37_79b9_7f4a_7c15)));
        Picker { random, part, next: part.0 }
    }

    /// The next block.
    #[inline]
    pub(super) fn block(&mut self, plan: &Plan) -> u64 {
        if plan.sequential {
            return self.step().unwrap_or_else(|| self.rewind());
        }
        // Cheaper than a division, and no less even for any number of blocks there is.
        let product = u128::from(self.random.number()) * u128::from(plan.blocks);
        u64::try_from(product >> 64).unwrap_or(0)
    }

    /// Takes a block into use, the next one or one behind it; with its generation.
    pub(super) fn claim(&mut self, plan: &Plan, written: &Blocks) -> Option<(u64, u32)> {
        let first = self.block(plan);
        // There are twice as many blocks as requests, so it is never far.
        (first..plan.blocks).chain(0..first).find_map(|block| Some((block, written.claim(block)?)))
    }

    /// Random bytes.
    pub(super) fn fill(&mut self, buf: &mut [u8]) {
        self.random.fill(buf);
    }

    /// The next block of the part in order; None at its end.
    pub(super) fn step(&mut self) -> Option<u64> {
        let block = self.next;
        (block < self.part.1).then(|| {
            self.next += 1;
            block
        })
    }

    /// Back to the first block of the part, which is taken.
    fn rewind(&mut self) -> u64 {
        self.next = self.part.0 + 1;
        self.part.0
    }

    /// The part again from its beginning, for reading back.
    pub(super) fn restart(&mut self) {
        self.next = self.part.0;
    }

    /// Whether the next request is a read.
    #[inline]
    pub(super) fn reads(&mut self, plan: &Plan) -> bool {
        match plan.read_percent {
            100 => true,
            0 => false,
            percent => self.random.below(100) < u64::from(percent),
        }
    }
}
