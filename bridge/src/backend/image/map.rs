//! Where guest clusters lie, for the fast path: what the engine has resolved, kept for every worker to look up.
//!
//! ```text
//!   worker:  enter(cluster) ──read lock──> entry ──> I/O at once, under the lock
//!   engine:  publish(run), forget(range) ──write lock: waits for those who are in──>
//! ```
//!
//! A fixed number of slots, each with the entries of one slice of the disk: no header decides how much memory this takes.
//! The lock of a slot is held during the I/O itself, which does not wait for storage; so when `forget` returns,
//! nobody uses the range's entries any more and nobody will. The engine publishes only what it holds a lock on
//! ([`super::engine`]), so that nothing comes back while a cluster is moved or freed.

use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

/// Clusters of one slice: 32 KiB of entries.
const SLICE_CLUSTERS: u64 = 4096;

/// Slots at most: 8 MiB of entries.
const MAX_SLOTS: u64 = 256;

/// Where a cluster's content is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// At `offset` of file number `file`; `writable` in place.
    File { file: u8, offset: u64, writable: bool },
    /// Nowhere: it reads as zeroes.
    Zero,
}

/// Place of a cluster in 64 bits: 0 for not known; bit 63 known, bit 62 writable, 6 bits of file, 56 of offset.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
struct Entry(u64);

const KNOWN: u64 = 1 << 63;
const WRITABLE: u64 = 1 << 62;
const FILE_SHIFT: u32 = 56;
const OFFSET_MASK: u64 = (1 << FILE_SHIFT) - 1;
const ZERO_FILE: u8 = 63;

/// Files that the map can tell apart.
pub(super) const MAX_FILES: usize = ZERO_FILE as usize;

impl Entry {
    fn of(place: Place) -> Entry {
        match place {
            Place::Zero => Entry(KNOWN | u64::from(ZERO_FILE) << FILE_SHIFT),
            // What does not fit stays unknown; qcow2 has no such offsets.
            Place::File { file, offset, .. } if file >= ZERO_FILE || offset > OFFSET_MASK => Entry(0),
            Place::File { file, offset, writable } => {
                Entry(KNOWN | if writable { WRITABLE } else { 0 } | u64::from(file) << FILE_SHIFT | offset)
            }
        }
    }

    fn place(self) -> Option<Place> {
        if self.0 & KNOWN == 0 {
            return None;
        }
        let file = (self.0 >> FILE_SHIFT & u64::from(ZERO_FILE)).to_le_bytes()[0];
        if file == ZERO_FILE {
            return Some(Place::Zero);
        }
        Some(Place::File { file, offset: self.0 & OFFSET_MASK, writable: self.0 & WRITABLE != 0 })
    }
}

/// The map of one disk.
pub(super) struct Map {
    cluster_bits: u32,
    slots: Box<[RwLock<Slot>]>,
}

#[derive(Default)]
struct Slot {
    /// Number of the slice that the entries belong to.
    slice: u64,
    /// Empty, or one for each of the slice's clusters.
    entries: Box<[Entry]>,
}

/// A part of the disk whose entries stay as they are for as long as this is held. Not to be held across waits.
pub(super) struct Inside<'a> {
    slot: RwLockReadGuard<'a, Slot>,
    cluster_bits: u32,
}

impl Map {
    /// A map for a disk of `size` bytes, with nothing known.
    pub(super) fn new(cluster_bits: u32, size: u64) -> Self {
        let slices = (size >> cluster_bits).div_ceil(SLICE_CLUSTERS);
        let slots = slices.clamp(1, MAX_SLOTS);
        Map { cluster_bits, slots: (0..slots).map(|_| RwLock::default()).collect() }
    }

    /// Holds what is known of a range; None where that is nothing, the range spans slices, or the engine is changing it.
    #[inline]
    pub(super) fn enter(&self, offset: u64, len: u64) -> Option<Inside<'_>> {
        let slice = self.slice(offset);
        if len == 0 || self.slice(offset + len - 1) != slice {
            return None;
        }
        let slot = self.slot(slice).try_read().ok()?;
        if slot.slice != slice || slot.entries.is_empty() {
            return None;
        }
        Some(Inside { slot, cluster_bits: self.cluster_bits })
    }

    /// Enters a run of whole clusters that lie one after the other at `place`.
    pub(super) fn publish(&self, offset: u64, len: u64, place: Place) {
        let cluster = 1 << self.cluster_bits;
        let mut at = offset;
        while at < offset + len {
            let slice = self.slice(at);
            let mut slot = self.write(slice);
            if slot.slice != slice || slot.entries.is_empty() {
                slot.slice = slice;
                if slot.entries.is_empty() {
                    slot.entries = vec![Entry::default(); index(SLICE_CLUSTERS)].into_boxed_slice();
                } else {
                    slot.entries.fill(Entry::default());
                }
            }
            while at < offset + len && self.slice(at) == slice {
                let place = match place {
                    Place::File { file, offset: start, writable } => {
                        Place::File { file, offset: start + (at - offset), writable }
                    }
                    Place::Zero => Place::Zero,
                };
                slot.entries[entry_index(at, self.cluster_bits)] = Entry::of(place);
                at += cluster;
            }
        }
    }

    /// Forgets every cluster that the range touches, and waits until nobody uses what was known.
    pub(super) fn forget(&self, offset: u64, len: u64) {
        if len == 0 {
            return;
        }
        let (first, last) = (offset >> self.cluster_bits, (offset + len - 1) >> self.cluster_bits);
        let slices = first / SLICE_CLUSTERS..=last / SLICE_CLUSTERS;
        // Of a long range, the slots are fewer than the slices.
        let count = (slices.end() - slices.start()).min(self.slots.len() as u64 - 1);
        for slice in *slices.start()..=slices.start() + count {
            let mut slot = self.write(slice);
            if slot.entries.is_empty() || !slices.contains(&slot.slice) {
                continue;
            }
            let base = slot.slice * SLICE_CLUSTERS;
            let from = first.max(base) - base;
            let to = last.min(base + SLICE_CLUSTERS - 1) - base;
            slot.entries[index(from)..=index(to)].fill(Entry::default());
        }
    }

    /// Forgets every cluster that lies at one of these places of a file (sorted), and waits until nobody uses it.
    pub(super) fn forget_places(&self, file: u8, places: &[u64]) {
        let (Some(first), Some(last)) = (places.first(), places.last()) else { return };
        for slot in &self.slots {
            let mut slot = slot.write().unwrap_or_else(PoisonError::into_inner);
            for entry in &mut slot.entries {
                if let Some(Place::File { file: in_file, offset, .. }) = entry.place()
                    && in_file == file
                    && (*first..=*last).contains(&offset)
                    && places.binary_search(&offset).is_ok()
                {
                    *entry = Entry::default();
                }
            }
        }
    }

    fn slice(&self, offset: u64) -> u64 {
        (offset >> self.cluster_bits) / SLICE_CLUSTERS
    }

    fn slot_index(&self, slice: u64) -> usize {
        index(slice % self.slots.len() as u64)
    }

    fn slot(&self, slice: u64) -> &RwLock<Slot> {
        &self.slots[self.slot_index(slice)]
    }

    fn write(&self, slice: u64) -> RwLockWriteGuard<'_, Slot> {
        self.slot(slice).write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inside<'_> {
    /// Where the range begins, and for how many bytes of it that holds; None where it is not known.
    #[inline]
    pub(super) fn run(&self, offset: u64, len: u64) -> Option<(Place, u64)> {
        let cluster = 1_u64 << self.cluster_bits;
        let within = offset & (cluster - 1);
        let first = self.place(offset)?;
        let mut count = cluster - within;
        while count < len {
            let next = match first {
                Place::File { file, offset: start, writable } => {
                    Place::File { file, offset: start + within + count, writable }
                }
                Place::Zero => Place::Zero,
            };
            if self.place(offset + count) != Some(next) {
                break;
            }
            count += cluster;
        }
        let place = match first {
            Place::File { file, offset, writable } => Place::File { file, offset: offset + within, writable },
            Place::Zero => Place::Zero,
        };
        Some((place, count.min(len)))
    }

    #[inline]
    fn place(&self, offset: u64) -> Option<Place> {
        self.slot.entries[entry_index(offset, self.cluster_bits)].place()
    }
}

#[inline]
fn entry_index(offset: u64, cluster_bits: u32) -> usize {
    index((offset >> cluster_bits) % SLICE_CLUSTERS)
}

#[inline]
fn index(number: u64) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const C: u64 = 65536;

    fn at(offset: u64) -> Place {
        Place::File { file: 3, offset, writable: true }
    }

    #[test]
    fn runs_are_joined_where_they_continue() {
        let map = Map::new(16, 1 << 40);
        assert!(map.enter(0, 1).is_none());
        map.publish(C, 2 * C, at(10 * C));
        map.publish(3 * C, C, at(12 * C));
        map.publish(4 * C, C, at(99 * C));
        map.publish(5 * C, 2 * C, Place::Zero);
        let inside = map.enter(C + 7, 6 * C).unwrap();
        assert_eq!(inside.run(C + 7, 6 * C), Some((at(10 * C + 7), 3 * C - 7)));
        assert_eq!(inside.run(4 * C, 6 * C), Some((at(99 * C), C)));
        assert_eq!(inside.run(5 * C + 1, 2 * C), Some((Place::Zero, 2 * C - 1)));
        assert_eq!(inside.run(5 * C + 1, 2), Some((Place::Zero, 2)));
        assert_eq!(inside.run(0, C), None);
        assert_eq!(inside.run(7 * C, C), None);
    }

    #[test]
    fn what_is_forgotten_is_gone_and_nothing_else() {
        let map = Map::new(16, 1 << 50);
        let slice = SLICE_CLUSTERS * C;
        map.publish(slice - 4 * C, 8 * C, at(0));
        map.forget(slice - C - 1, 2 + C);
        let known = |offset| map.enter(offset, 1).is_some_and(|inside| inside.run(offset, 1).is_some());
        assert!(known(slice - 3 * C) && !known(slice - 2 * C) && !known(slice - C));
        assert!(!known(slice) && known(slice + C));
        assert!(map.enter(slice - 1, 2).is_none(), "it spans slices");
        map.forget(0, 1 << 50);
        assert!(!known(slice + C) && !known(slice - 4 * C));
    }

    #[test]
    fn what_lies_at_a_place_is_forgotten() {
        let map = Map::new(16, 1 << 40);
        map.publish(0, 8 * C, at(0));
        map.publish(5 << 28, C, at(5 * C));
        map.publish(9 * C, C, Place::File { file: 2, offset: 5 * C, writable: true });
        map.forget_places(3, &[2 * C, 5 * C, 99 * C]);
        let known = |offset| map.enter(offset, 1).is_some_and(|inside| inside.run(offset, 1).is_some());
        let left: Vec<u64> = (0..10).filter(|n| known(n * C)).collect();
        assert_eq!(left, [0, 1, 3, 4, 6, 7, 9]);
        assert!(!known(5 << 28));
    }

    #[test]
    fn a_slot_serves_one_slice_at_a_time() {
        let map = Map::new(9, u64::MAX);
        let far = SLICE_CLUSTERS * MAX_SLOTS * 512;
        map.publish(0, 512, at(512));
        map.publish(far, 512, at(1024));
        assert!(map.enter(0, 1).is_none());
        assert_eq!(map.enter(far, 1).unwrap().run(far, 1), Some((at(1024), 1)));
        map.publish(0, 512, at(1 << 60));
        assert_eq!(map.enter(0, 1).unwrap().run(0, 1), None, "an offset that does not fit is not known");
    }

    #[test]
    fn nobody_gets_in_while_the_engine_changes_it() {
        let map = Map::new(16, C);
        map.publish(0, C, at(0));
        let guard = map.write(0);
        assert!(map.enter(0, 1).is_none());
        drop(guard);
        assert!(map.enter(0, 1).is_some());
    }
}
