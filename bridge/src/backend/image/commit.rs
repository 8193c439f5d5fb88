//! Metadata on its way to the file: in steps, each durable before the next begins, so that a crash at any moment leaves
//! an image that is consistent. At worst clusters stay allocated that nobody uses.
//!
//! | step | what | why then |
//! |---|---|---|
//! | 1 | refcounts, each the larger of old and new; tables in new places | nothing on disk points to them yet; the data goes before them |
//! | 2 | the refcount table, where it changes | it makes the new refcounts count |
//! | 3 | L2 tables in place, the L1 table, the header | the clusters they name are allocated, and hold their data |
//! | 4 | refcounts as they are now | the clusters that they free are no longer named |
//!
//! imago on its own writes L1 and refcount table entries at once and the refcounts later, and syncs nothing in
//! between: killed at the wrong moment it leaves a table that is in use and counts as free.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::ops::Range;

use super::header::{self, Header};
use super::host::{BLOCK, BlockBytes, Blocks, Host, to_io};
use super::places::{L1_MASK, REFTABLE_MASK, each_entry, l1, reftable};
use crate::{Buffer, Flags};

/// Most bytes of one write.
const MAX_WRITE: usize = 1 << 20;

/// Blocks of 4 KiB, the least that a hole in a file has.
const HOLE_BLOCKS: u64 = 8;

/// Brings what is kept back to the file, and makes it durable together with all data that was written before.
///
/// # Errors
/// The file's. What was kept back still is: the next commit tries again.
pub(super) async fn commit(host: &Host, data_file: Option<&Host>) -> io::Result<()> {
    host.is_sound()?;
    let blocks = host.kept();
    if let Some(data_file) = data_file {
        data_file.file().flush().await.map_err(to_io)?;
    }
    if blocks.is_empty() {
        return host.file().flush().await.map_err(to_io);
    }
    let sorted = sort(host, &blocks).await?;
    let old_refcounts = read_blocks(host, sorted.refcounts.keys()).await?;
    let mut first = sorted.new;
    let mut last = Blocks::new();
    for (number, new) in sorted.refcounts {
        let Some(old) = old_refcounts.get(&number) else { continue };
        let larger = larger_refcounts(old, &new, sorted.refcount_order);
        if larger != new {
            last.insert(number, new);
        }
        first.insert(number, larger);
    }
    // Guests' data, too, is durable before anything names its place: the first sync comes whatever else does.
    write(host, &first).await?;
    host.file().flush().await.map_err(to_io)?;
    for step in [sorted.refcount_table, sorted.pointers] {
        if !step.is_empty() {
            write(host, &step).await?;
            host.file().flush().await.map_err(to_io)?;
        }
    }
    write(host, &last).await?;
    host.clear_kept();
    Ok(())
}

/// Blocks by what they are.
#[derive(Default)]
struct Sorted {
    new: Blocks,
    refcounts: Blocks,
    refcount_table: Blocks,
    pointers: Blocks,
    refcount_order: u32,
}

async fn sort(host: &Host, blocks: &Blocks) -> io::Result<Sorted> {
    // The first block holds all the numbers that are needed here.
    let old = parse(&host.read_file(0, index(BLOCK)).await?)?;
    let new = header_of(host).await?;
    let cluster = old.cluster_size();
    let dirty: BTreeSet<u64> = blocks.keys().map(|number| number * BLOCK / cluster * cluster).collect();
    let old_refcounts = named(host, reftable(&old), REFTABLE_MASK, &dirty).await?;
    let old_l2 = named(host, l1(&old), L1_MASK, &dirty).await?;
    let moved = old.reftable_offset != new.reftable_offset;
    let mut sorted = Sorted { refcount_order: old.refcount_order, ..Sorted::default() };
    for (number, block) in blocks {
        let at = number * BLOCK;
        let start = at / cluster * cluster;
        let class = if start == 0 {
            // A new refcount table takes effect with the header.
            if moved { &mut sorted.refcount_table } else { &mut sorted.pointers }
        } else if old_refcounts.contains(&start) {
            &mut sorted.refcounts
        } else if reftable(&old).contains(&at) {
            &mut sorted.refcount_table
        } else if l1(&old).contains(&at) || old_l2.contains(&start) {
            &mut sorted.pointers
        } else {
            &mut sorted.new
        };
        class.insert(*number, block.clone());
    }
    Ok(sorted)
}

/// Which of `clusters` a table in the file names.
async fn named(
    host: &Host,
    table: Range<u64>,
    mask: u64,
    clusters: &BTreeSet<u64>,
) -> io::Result<BTreeSet<u64>> {
    let mut found = BTreeSet::new();
    each_entry(host, table, mask, |_, offset| {
        if clusters.contains(&offset) {
            found.insert(offset);
        }
    })
    .await?;
    Ok(found)
}

/// The numbers of the header as it is now.
pub(super) async fn header_of(host: &Host) -> io::Result<Header> {
    parse(&host.read(0, index(BLOCK)).await?)
}

fn parse(block: &[u8]) -> io::Result<Header> {
    header::parse_numbers(block).map_err(|reason| io::Error::other(format!("the image {reason}")))
}

async fn read_blocks(host: &Host, numbers: impl Iterator<Item = &u64>) -> io::Result<Blocks> {
    let mut blocks = BTreeMap::new();
    for run in runs(numbers) {
        let bytes = host.read_file(run.start * BLOCK, index((run.end - run.start) * BLOCK)).await?;
        blocks.extend(run.zip(bytes.as_chunks().0.iter().map(|block| Box::new(*block))));
    }
    Ok(blocks)
}

/// Writes blocks to the file. Many that are zero become a hole there: of a new table most are.
pub(super) async fn write(host: &Host, blocks: &Blocks) -> io::Result<()> {
    for run in runs(blocks.keys()) {
        for (part, is_zero) in parts(blocks, &run) {
            let (start, len) = (part.start * BLOCK, (part.end - part.start) * BLOCK);
            if is_zero {
                host.file().write_zeroes(start, len, Flags::NONE).await.map_err(to_io)?;
                continue;
            }
            let mut buf = Buffer::new(index(len));
            for (part, block) in buf.chunks_mut(index(BLOCK)).zip(blocks.range(part).map(|(_, block)| block))
            {
                part.copy_from_slice(&block[..]);
            }
            host.file().write(start, buf, Flags::NONE).await.map_err(to_io)?;
        }
    }
    Ok(())
}

/// The parts of a run of blocks that are zero or not. The last block counts as not zero: it makes the file long enough.
fn parts(blocks: &Blocks, run: &Range<u64>) -> Vec<(Range<u64>, bool)> {
    let mut parts: Vec<(Range<u64>, bool)> = Vec::new();
    let mut at = run.start;
    while at < run.end {
        let end = (at - at % HOLE_BLOCKS + HOLE_BLOCKS).min(run.end);
        let is_zero = end < run.end
            && end - at == HOLE_BLOCKS
            && blocks.range(at..end).all(|(_, block)| block.iter().all(|byte| *byte == 0));
        match parts.last_mut() {
            Some((part, same)) if *same == is_zero => part.end = end,
            _ => parts.push((at..end, is_zero)),
        }
        at = end;
    }
    parts
}

/// Numbers in ascending order as runs, none longer than one write.
fn runs<'a>(numbers: impl Iterator<Item = &'a u64>) -> Vec<Range<u64>> {
    let most = MAX_WRITE as u64 / BLOCK;
    let mut runs: Vec<Range<u64>> = Vec::new();
    for number in numbers {
        match runs.last_mut() {
            Some(run) if run.end == *number && run.end - run.start < most => run.end += 1,
            _ => runs.push(*number..number + 1),
        }
    }
    runs
}

/// Refcounts, each the larger of two, in a block whose counters have 2^`order` bits.
fn larger_refcounts(old: &BlockBytes, new: &BlockBytes, order: u32) -> Box<BlockBytes> {
    let mut larger = Box::new(*new);
    if order < 3 {
        let width = 1_u32 << order;
        let mask = (1_u8 << width) - 1;
        for ((larger, old), new) in larger.iter_mut().zip(old).zip(new) {
            *larger = (0..8 / width).fold(0, |byte, n| {
                let counter = |byte: u8| byte >> (n * width) & mask;
                byte | counter(*old).max(counter(*new)) << (n * width)
            });
        }
        return larger;
    }
    // Big-endian numbers compare as their bytes do.
    let bytes = 1_usize << (order - 3);
    for ((larger, old), new) in larger.chunks_mut(bytes).zip(old.chunks(bytes)).zip(new.chunks(bytes)) {
        larger.copy_from_slice(old.max(new));
    }
    larger
}

fn index(number: u64) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_larger_refcount_is_found_at_every_width() {
        let mut old = [0_u8; 512];
        let mut new = [0_u8; 512];
        (old[0], new[0]) = (0b0110_0011, 0b1001_0101);
        (old[1], new[1]) = (1, 0);
        (old[2], new[2]) = (0, 1);
        (old[3], new[3]) = (255, 1);
        let first = |order| {
            let larger = larger_refcounts(&old, &new, order);
            [larger[0], larger[1], larger[2], larger[3]]
        };
        assert_eq!(first(0), [0b1111_0111, 1, 1, 255]);
        assert_eq!(first(1), [0b1010_0111, 1, 1, 255]);
        assert_eq!(first(2), [0b1001_0101, 1, 1, 255]);
        assert_eq!(first(3), [0b1001_0101, 1, 1, 255]);
        assert_eq!(first(4), [0b1001_0101, 0, 1, 1]);
        assert_eq!(first(5), [0b1001_0101, 0, 1, 1]);
    }

    #[test]
    fn zero_blocks_become_holes_but_for_the_last() {
        let content = |number: u64| Box::new([u8::from(number == 3 || number == 40); 512]);
        let blocks: Blocks = (0..64).map(|number| (number, content(number))).collect();
        let found = parts(&blocks, &(0..64));
        assert_eq!(found, [(0..8, false), (8..40, true), (40..48, false), (48..56, true), (56..64, false)]);
        assert_eq!(parts(&blocks, &(12..30)), [(12..16, false), (16..24, true), (24..30, false)]);
    }

    #[test]
    fn runs_are_bounded() {
        let numbers: Vec<u64> = (5..5 + 4096).chain([9000, 9001]).collect();
        let runs = runs(numbers.iter());
        assert_eq!(runs, [5..2053, 2053..4101, 9000..9002]);
    }
}
