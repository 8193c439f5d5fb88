//! What is asked about a disk without reading it: which parts are data, zeroes or holes, and at which depth of the chain
//! they lie. Bringing data closer, too.

use imago::ShallowMapping;

use super::engine::{Engine, Segment, malformed};
use super::host::from_io;
use crate::extent::{MAX_EXTENTS, push_depth, push_extent};
use crate::ranges::Mode;
use crate::{Depth, Extent, ExtentKind, Flags, Result};

/// Mappings that one request looks at, at most.
const STEPS: usize = 64 << 10;

/// After so many of them the thread's other tasks have their turn.
const STEPS_IN_A_ROW: usize = 256;

/// The smallest part of a disk that can have a place of its own, in bytes.
const SECTOR: u64 = 512;

/// Most bytes that one request brings closer.
const READ_AHEAD: u64 = 256 << 20;

impl Engine {
    /// What the disk's parts are. Where a file has holes beneath, these count: a sparse base, or an image whose clusters
    /// were reserved and never written.
    pub(super) async fn block_status(&self, offset: u64, len: u64, flags: Flags) -> Result<Vec<Extent>> {
        let limit = if flags.contains(Flags::REQ_ONE) { 1 } else { MAX_EXTENTS };
        let mut sparse = vec![None; self.shared.files.len()];
        let mut extents = Vec::new();
        let mut at = 0;
        for step in 1..=STEPS {
            let (segment, count) = match self.look_before_damage(offset + at, len - at).await {
                // What lies before a damaged entry is known all the same.
                Err(_) if !extents.is_empty() => break,
                found => found?,
            };
            let found = match segment {
                Segment::File { file, offset, .. }
                    if *sparse[usize::from(file)].get_or_insert_with(|| self.is_sparse(file)) =>
                {
                    match self.file(file).block_status(offset, count, flags).await {
                        Err(_) if !extents.is_empty() => break,
                        found => found?,
                    }
                }
                Segment::File { .. } | Segment::Special => {
                    vec![Extent { len: count, kind: ExtentKind::Data }]
                }
                Segment::Zero { explicit: true } => vec![Extent { len: count, kind: ExtentKind::Zero }],
                Segment::Zero { explicit: false } => vec![Extent { len: count, kind: ExtentKind::Hole }],
            };
            for extent in found {
                push_extent(&mut extents, extent.len, extent.kind);
                at += extent.len;
            }
            if extents.len() > limit {
                extents.truncate(limit);
                break;
            }
            if at >= len {
                break;
            }
            self.make_room().await;
            if step.is_multiple_of(STEPS_IN_A_ROW) {
                tokio::task::yield_now().await;
            }
        }
        Ok(extents)
    }

    /// Returns what a range begins with although an entry of a table further on may be damaged.
    async fn look_before_damage(&self, offset: u64, len: u64) -> Result<(Segment, u64)> {
        before_damage(len, async |len| self.look(offset, len).await).await
    }

    /// Whether a file takes up clearly less space than its length: one that is asked for its holes.
    fn is_sparse(&self, file: u8) -> bool {
        let length = match self.shared.written.contains(&file) {
            true => self.look_at_length(),
            false => self.file(file).geometry().size,
        };
        self.file(file).allocated().is_none_or(|bytes| bytes < length - length / 8)
    }

    /// Which image of the chain holds what: 1 for this one, 0 where none does. As qemu has it, what lies past the end
    /// of a short one is that one's.
    pub(super) async fn allocation_depth(&self, offset: u64, len: u64) -> Result<Vec<Depth>> {
        let mut depths = Vec::new();
        let mut at = 0;
        for step in 1..=STEPS {
            let found = before_damage(len - at, async |len| self.depth(offset + at, len).await);
            let (level, count) = match found.await {
                Err(_) if !depths.is_empty() => break,
                found => found?,
            };
            push_depth(&mut depths, count, level);
            if depths.len() > MAX_EXTENTS {
                depths.truncate(MAX_EXTENTS);
                break;
            }
            at += count;
            if at >= len {
                break;
            }
            self.make_room().await;
            if step.is_multiple_of(STEPS_IN_A_ROW) {
                tokio::task::yield_now().await;
            }
        }
        Ok(depths)
    }

    /// Returns the depth that a range begins with, and for how many bytes.
    async fn depth(&self, mut offset: u64, mut len: u64) -> Result<(u32, u64)> {
        let mut layer = &self.image;
        let mut level = 1;
        loop {
            let found = layer.get_shallow_mapping(offset, len).await;
            let (mapping, count) = found.map_err(|error| from_io(&error))?;
            match mapping {
                ShallowMapping::Indirect { layer: below, offset: place, .. } => {
                    (layer, offset, len) = (below, place, count);
                    level += 1;
                }
                ShallowMapping::Eof { .. } if level > 1 => return Ok((level, len)),
                _ if count == 0 => return Err(malformed("it ends before its size")),
                ShallowMapping::Zero { explicit: false, .. } => return Ok((0, count)),
                ShallowMapping::Raw { storage, offset, .. } => {
                    self.check_place(storage, offset, count)?;
                    return Ok((level, count));
                }
                _ => return Ok((level, count)),
            }
        }
    }

    /// Brings data closer, and what says where it is.
    pub(super) async fn cache(&self, offset: u64, len: u64) -> Result<()> {
        let len = len.min(READ_AHEAD);
        let _lock = self.ranges.lock(offset, offset + len, Mode::Shared).await;
        let mut at = 0;
        while at < len {
            let (segment, count) = self.resolve(offset + at, len - at).await?;
            if let Segment::File { file, offset, .. } = segment {
                self.file(file).cache(offset, count).await?;
            }
            at += count;
        }
        Ok(())
    }
}

/// Looks up a range; if that fails, a shorter one with the same start, down to one sector. Runs of clusters are looked up
/// together, so one damaged entry fails all of them.
async fn before_damage<T>(len: u64, look: impl AsyncFn(u64) -> Result<T>) -> Result<T> {
    let mut failed = match look(len).await {
        Err(error) => error,
        found => return found,
    };
    let mut len = len;
    while len > SECTOR {
        len = (len / 2).next_multiple_of(SECTOR);
        match look(len).await {
            Err(error) => failed = error,
            found => return found,
        }
    }
    Err(failed)
}
