//! Trim and write-zeroes.
//!
//! | | clusters that lie wholly within the range | parts of clusters |
//! |---|---|---|
//! | trim | their space is given back, to the image and to its file system; they read as zeroes | nothing |
//! | zeroes, holes allowed | the same | zeroes are written, where it does not read so already |
//! | zeroes, NO_HOLE or `--discard ignore` | a flag in the L2 table; the space stays | the same |
//! | version 2 images | have no such flag: their space is zeroed in place | the same |
//!
//! The file is told first: what is zero there reads as zeroes whether or not a crash comes before the mapping is changed.
//! Reads and writes elsewhere go on meanwhile: only the range is locked, in steps, and allocations wait for a step.

use super::engine::{Engine, Segment, index};
use super::host::{discard_to_backing, discard_to_zero, from_io};
use crate::backend::file::DiscardMode;
use crate::ranges::Mode;
use crate::{Buffer, Error, ErrorKind, Flags, Result};

/// Bytes of the disk in one step.
const STEP: u64 = 64 << 20;

/// Zeroes are written in pieces of this many bytes.
const PIECE: u64 = 64 << 10;

/// What becomes of a cluster's space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Space {
    Free,
    Keep,
}

impl Engine {
    /// Gives the space of whole clusters back.
    pub(super) async fn trim(&self, offset: u64, len: u64, flags: Flags) -> Result<()> {
        if self.options.discard == DiscardMode::Unmap && len > 0 {
            let (start, end) = self.whole_clusters(offset, len);
            self.in_steps(start, end, Space::Free).await?;
        }
        self.settle(flags).await
    }

    /// Makes the range read as zeroes.
    ///
    /// # Errors
    /// `NotSupported`, with nothing changed, for FAST_ZERO on version 2 images.
    pub(super) async fn write_zeroes(&self, offset: u64, len: u64, flags: Flags) -> Result<()> {
        if len == 0 {
            return Ok(());
        }
        if flags.contains(Flags::FAST_ZERO) && self.version < 3 {
            return Err(Error::new(ErrorKind::NotSupported, "zeroes would have to be written here"));
        }
        let keep = flags.contains(Flags::NO_HOLE) || self.options.discard == DiscardMode::Ignore;
        let (start, end) = self.whole_clusters(offset, len);
        if start < end {
            self.store_zeroes(offset, start - offset).await?;
            self.in_steps(start, end, if keep { Space::Keep } else { Space::Free }).await?;
            self.store_zeroes(end, (offset + len).saturating_sub(end)).await?;
        } else {
            self.store_zeroes(offset, len).await?;
        }
        self.settle(flags).await
    }

    /// The clusters that lie wholly within a range; the last one of the disk may be shorter.
    fn whole_clusters(&self, offset: u64, len: u64) -> (u64, u64) {
        let start = offset.next_multiple_of(self.cluster);
        let end = offset + len;
        let end = if end >= self.size() { self.image.size() } else { end - end % self.cluster };
        (start, end.max(start))
    }

    async fn in_steps(&self, start: u64, end: u64, space: Space) -> Result<()> {
        let mut at = start;
        while at < end {
            let stop = end.min(at - at % STEP + STEP);
            let _lock = self.ranges.lock(at, stop, Mode::Exclusive).await;
            self.shared.map.forget(at, stop - at);
            self.zero_clusters(at, stop, space).await?;
            at = stop;
        }
        Ok(())
    }

    /// Makes whole clusters read as zeroes, for whoever holds an exclusive lock on them.
    async fn zero_clusters(&self, start: u64, end: u64, space: Space) -> Result<()> {
        let mut at = start;
        while at < end {
            let (segment, count) = self.look(at, end - at).await?;
            // Backing images may have smaller clusters.
            let stop = (at + count).next_multiple_of(self.cluster).min(end);
            let first = at - at % self.cluster;
            match segment {
                Segment::Zero { .. } => {}
                Segment::File { .. } | Segment::Special if self.version >= 3 => {
                    let _alone = self.gate.write().await;
                    self.zero_by_mapping(first, stop - first, segment, space).await?;
                }
                Segment::File { file, offset, writable: true } => {
                    self.file(file).write_zeroes(offset, count, Flags::NONE).await?;
                    if space == Space::Free && self.backing.is_none() {
                        let _alone = self.gate.write().await;
                        self.set_dirty();
                        self.freed.set(true);
                        discard_to_backing(&self.image, first, stop - first)
                            .await
                            .map_err(|error| from_io(&error))?;
                    }
                }
                Segment::File { .. } | Segment::Special => {
                    let mut place = first;
                    while place < stop {
                        let zeroes = vec![0; index((stop - place).min(PIECE))];
                        self.write_exclusive(place, &zeroes).await?;
                        place += zeroes.len() as u64;
                    }
                }
            }
            at = stop;
        }
        Ok(())
    }

    async fn zero_by_mapping(&self, start: u64, len: u64, segment: Segment, space: Space) -> Result<()> {
        // The file first. A cluster that a snapshot shares, or that is a backing image's, is left alone.
        if let (Segment::File { file, offset, writable: true }, Space::Free) = (segment, space) {
            self.file(file).trim(offset, len, Flags::NONE).await?;
        }
        self.set_dirty();
        self.freed.set(self.freed.get() || space == Space::Free || segment == Segment::Special);
        let done = match space {
            Space::Free => discard_to_zero(&self.image, start, len).await,
            Space::Keep => self.image.write_zeroes(start, len).await,
        };
        done.map_err(|error| from_io(&error))
    }

    /// Writes zeroes over part of a cluster, unless it reads so already.
    async fn store_zeroes(&self, mut offset: u64, mut len: u64) -> Result<()> {
        while len > 0 {
            let count = len.min(PIECE);
            let _lock = self.ranges.lock(offset, offset + count, Mode::Exclusive).await;
            if !self.is_zero(offset, count).await? {
                let mut zeroes = Buffer::new(index(count));
                zeroes.fill(0);
                self.write_exclusive(offset, &zeroes).await?;
            }
            offset += count;
            len -= count;
        }
        Ok(())
    }

    async fn settle(&self, flags: Flags) -> Result<()> {
        let durable = flags.contains(Flags::FUA) || self.options.cache.every_write_durable();
        if durable { self.flush().await } else { self.commit_if_much().await }
    }
}
