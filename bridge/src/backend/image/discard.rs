//! Trim and write-zeroes.
//!
//! | | clusters that lie wholly within the range | parts of clusters |
//! |---|---|---|
//! | trim | their space is given back, to the image and to its file system; they read as zeroes | nothing |
//! | zeroes, holes allowed | the same | a hole in the file, or zeroes over a backing image or compressed data |
//! | zeroes, NO_HOLE or `--discard ignore` | a flag in the L2 table; the space stays | the same, and the space stays |
//! | version 2 images | have no such flag: their space is zeroed in place | the same |
//!
//! The file is told first: what is zero there reads as zeroes whether or not a crash comes before the mapping is changed.
//! Reads and writes elsewhere go on meanwhile: only the range is locked, in steps, and allocations wait for part of one.
//!
//! Trims that wait together are one: neighbours are joined, so that many small ones (mkfs, fstrim) pass the gate
//! together, and the file is told once of what lies in one piece.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use tokio::sync::oneshot;

use super::engine::{Engine, Segment, index};
use super::host::{discard_to_backing, discard_to_zero, from_io};
use super::journal::Change;
use crate::backend::file::DiscardMode;
use crate::ranges::Mode;
use crate::{Error, ErrorKind, Flags, Result};

/// Bytes of the disk in one step.
const STEP: u64 = 64 << 20;

/// Zeroes are written in pieces of this many bytes.
const PIECE: u64 = 64 << 10;

/// Runs of clusters that are freed while allocations wait.
const RUNS_ALONE: usize = 64;

/// Trims that nobody carries out yet.
#[derive(Default)]
pub(super) struct Trims {
    waiting: RefCell<Vec<Trim>>,
    /// There is a task that does.
    busy: Cell<bool>,
}

/// A range of whole clusters, and those who wait for it.
struct Trim {
    start: u64,
    end: u64,
    answers: Vec<oneshot::Sender<Result<()>>>,
}

/// Ends with the task, however that ends.
struct Busy<'a>(&'a Cell<bool>);

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        self.0.set(false);
    }
}

/// Joins ranges that touch.
fn join(mut trims: Vec<Trim>) -> Vec<Trim> {
    trims.sort_unstable_by_key(|trim| trim.start);
    let mut joined: Vec<Trim> = Vec::new();
    for trim in trims {
        match joined.last_mut() {
            Some(last) if trim.start <= last.end => {
                last.end = last.end.max(trim.end);
                last.answers.extend(trim.answers);
            }
            _ => joined.push(trim),
        }
    }
    joined
}

/// What becomes of a cluster's space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Space {
    Free,
    Keep,
}

impl Engine {
    /// Gives the space of whole clusters back.
    pub(super) async fn trim(self: Rc<Self>, offset: u64, len: u64, flags: Flags) -> Result<()> {
        if self.options.discard == DiscardMode::Unmap && len > 0 {
            let (start, end) = self.whole_clusters(offset, len);
            if start < end {
                self.trim_with_others(start, end).await?;
            }
        }
        self.settle(flags).await
    }

    async fn trim_with_others(self: &Rc<Self>, start: u64, end: u64) -> Result<()> {
        let (answer, result) = oneshot::channel();
        self.trims.waiting.borrow_mut().push(Trim { start, end, answers: vec![answer] });
        if !self.trims.busy.replace(true) {
            let engine = self.clone();
            drop(tokio::task::spawn_local(async move { engine.carry_out_trims().await }));
        }
        result.await.unwrap_or_else(|_| Err(Error::new(ErrorKind::Io, "the trim was dropped")))
    }

    /// Carries trims out until none waits. Those that arrived with the first have their turn to join it.
    async fn carry_out_trims(&self) {
        let _busy = Busy(&self.trims.busy);
        loop {
            tokio::task::yield_now().await;
            let trims = self.trims.waiting.take();
            if trims.is_empty() {
                break;
            }
            for Trim { start, end, answers } in join(trims) {
                let result = self.in_steps(start, end, Space::Free).await;
                for answer in answers {
                    // Whoever has gone does not mind.
                    let _ = answer.send(result.clone());
                }
            }
        }
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
        let space = if keep { Space::Keep } else { Space::Free };
        let (start, end) = self.whole_clusters(offset, len);
        if start < end {
            self.zero_part(offset, start - offset, space).await?;
            self.in_steps(start, end, space).await?;
            self.zero_part(end, (offset + len).saturating_sub(end), space).await?;
        } else {
            self.zero_part(offset, len, space).await?;
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
            self.make_room().await;
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
        let mut alone = None;
        let mut runs = 0;
        while at < end {
            let (segment, count) = self.look(at, end - at).await?;
            // Backing images may have smaller clusters: what a cluster begins with says nothing of its rest. One part that
            // is not zero decides for all of its cluster.
            let stop = (at + count).next_multiple_of(self.cluster).min(end);
            let first = at - at % self.cluster;
            match segment {
                Segment::Zero { .. } => {
                    at += count;
                    continue;
                }
                Segment::File { .. } | Segment::Special if self.version >= 3 => {
                    if runs == RUNS_ALONE {
                        alone = None;
                        runs = 0;
                    }
                    if alone.is_none() {
                        alone = Some(self.gate.write().await);
                    }
                    runs += 1;
                    self.zero_by_mapping(first, stop - first, segment, space).await?;
                }
                Segment::File { file, offset, writable: true } => {
                    let held = self.hold(file, offset, count).await?;
                    self.file(file).write_zeroes(offset, count, Flags::NONE).await?;
                    drop(held);
                    if space == Space::Free && self.backing.is_none() {
                        let _alone = self.gate.write().await;
                        self.commit_before_change(first).await?;
                        self.set_dirty();
                        discard_to_backing(&self.image, first, stop - first)
                            .await
                            .map_err(|error| from_io(&error))?;
                        self.note(first, stop - first, Change::Unmap).await;
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

    /// Makes a range read as zeroes that becomes part of the disk, for whoever holds an exclusive lock on it: a longer
    /// backing image must not show there.
    pub(super) async fn hide(&self, start: u64, end: u64) -> Result<()> {
        let whole = start.next_multiple_of(self.cluster).min(end);
        if !self.is_zero(start, whole - start).await? {
            let mut at = start;
            while at < whole {
                let zeroes = vec![0; index((whole - at).min(PIECE))];
                self.write_exclusive(at, &zeroes).await?;
                at += zeroes.len() as u64;
            }
        }
        if whole == end {
            return Ok(());
        }
        let last = end.next_multiple_of(self.cluster).min(self.image.size());
        self.zero_clusters(whole, last, Space::Keep).await
    }

    async fn zero_by_mapping(&self, start: u64, len: u64, segment: Segment, space: Space) -> Result<()> {
        // The file first. A cluster that a snapshot shares, or that is a backing image's, is left alone.
        if let (Segment::File { file, offset, writable: true }, Space::Free) = (segment, space) {
            let _held = self.hold(file, offset, len).await?;
            self.file(file).trim(offset, len, Flags::NONE).await?;
        }
        self.commit_before_change(start).await?;
        self.set_dirty();
        let done = match space {
            Space::Free => discard_to_zero(&self.image, start, len).await,
            Space::Keep => self.image.write_zeroes(start, len).await,
        };
        done.map_err(|error| from_io(&error))?;
        let change = if space == Space::Free { Change::ZeroFree } else { Change::ZeroKeep };
        self.note(start, len, change).await;
        Ok(())
    }

    /// Commits, for whoever has passed the gate alone, where the journal has no room for the change, or where a new L2
    /// table would be made for a cluster and could come where something was that the file still names.
    async fn commit_before_change(&self, offset: u64) -> Result<()> {
        if self.is_journal_full() || self.has_freed() && !self.owns_table(offset).await? {
            self.commit_alone().await
        } else {
            Ok(())
        }
    }

    /// Whether the L2 table for a cluster is there, and nobody else's.
    async fn owns_table(&self, offset: u64) -> Result<bool> {
        let Some(entry) = self.top.places().and_then(|places| places.l1_entry(offset)) else {
            return Ok(true);
        };
        let bytes = self.top.read(entry, 8).await.map_err(|error| from_io(&error))?;
        // QCOW_OFLAG_COPIED
        Ok(bytes[0] & 0x80 != 0)
    }

    /// Makes parts of clusters read as zeroes: by holes in the file, where they have a place of their own there.
    async fn zero_part(&self, offset: u64, len: u64, space: Space) -> Result<()> {
        if len == 0 {
            return Ok(());
        }
        let end = offset + len;
        let _lock = self.ranges.lock(offset, end, Mode::Exclusive).await;
        let mut at = offset;
        while at < end {
            let (segment, count) = self.look(at, end - at).await?;
            match segment {
                Segment::Zero { .. } => at += count,
                Segment::File { file, offset: place, writable: true } => {
                    let _held = self.hold(file, place, count).await?;
                    let flags = if space == Space::Keep { Flags::NO_HOLE } else { Flags::NONE };
                    self.file(file).write_zeroes(place, count, flags).await?;
                    at += count;
                }
                Segment::File { .. } | Segment::Special => {
                    let zeroes = vec![0; index(count.min(PIECE))];
                    self.write_exclusive(at, &zeroes).await?;
                    at += zeroes.len() as u64;
                }
            }
        }
        Ok(())
    }

    async fn settle(&self, flags: Flags) -> Result<()> {
        let durable = flags.contains(Flags::FUA) || self.options.cache.every_write_durable();
        if durable { self.flush().await } else { self.commit_if_much().await }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_are_joined_and_nobody_is_lost() {
        let trim = |start, end| Trim { start, end, answers: vec![oneshot::channel().0] };
        let joined = join(vec![
            trim(8, 9),
            trim(0, 2),
            trim(4, 6),
            trim(2, 3),
            trim(5, 8),
            trim(20, 30),
            trim(21, 22),
        ]);
        let told: Vec<_> = joined.iter().map(|trim| (trim.start, trim.end, trim.answers.len())).collect();
        assert_eq!(told, [(0, 3, 2), (4, 9, 3), (20, 30, 2)]);
    }
}
