//! Entries of tables that cannot be right. imago refuses a whole table for one of them, so it reads a substitute in its
//! place, which names a cluster that no file has. The engine answers that cluster with EIO, and no other.
//!
//! ```text
//!   file ──read by imago──> substitute ──> engine: a place from DAMAGED on is an error
//!   file <──written by imago── original
//! ```
//!
//! No entry that is let through names a place from [`DAMAGED`] on, so a substitute stands for one original wherever the
//! table is written, also where a copy of it begins to belong to the active disk.

use std::collections::{BTreeSet, HashMap};
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::header::Header;
use super::places::{L1_MASK, l1, structures};
use crate::random::Random;

/// Substitutes name places from here on, in bytes: no file is that long.
pub(super) const DAMAGED: u64 = 1 << 55;

/// QCOW_OFLAG_COPIED, QCOW_OFLAG_COMPRESSED, QCOW_OFLAG_ZERO.
const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
const ZERO: u64 = 1;

/// Bits that entries of the two tables have not.
const L1_RESERVED: u64 = 0x7f00_0000_0000_01ff;
const L2_RESERVED: u64 = 0x3f00_0000_0000_01fe;

/// The place that an entry names.
const OFFSET: u64 = L1_MASK;

/// Bytes of memory for each L2 table in a set, and for each original, at most.
const BYTES_OF_TABLE: u64 = 24;
const BYTES_OF_ORIGINAL: u64 = 48;

/// Bits of a substitute that number the originals. Tables with more of these than fit are refused as a whole.
const NUMBER_BITS: u32 = 16;

/// The damaged entries of one image that were met.
#[derive(Debug)]
pub(super) struct Damage {
    cluster_bits: u32,
    version: u32,
    external_data: bool,
    /// Length of the file in bytes as it was opened. Tables lie within it.
    length: u64,
    /// The end of the last cluster of the file in bytes. Compressed clusters lie within it.
    end: u64,
    tables: Mutex<Tables>,
}

#[derive(Debug)]
struct Tables {
    l1: Range<u64>,
    /// Byte ranges of the structures that the header points to. No L2 table can lie in one of them.
    structures: [Range<u64>; 3],
    /// Places of the L2 tables.
    l2: BTreeSet<u64>,
    originals: Vec<u64>,
    numbers: HashMap<u64, u64>,
    /// Random bits above the number in each substitute, so that no other entry of the file looks like a substitute.
    nonce: u64,
}

impl Damage {
    /// An image that imago is about to open, whose file ends at `end`.
    pub(super) fn new(header: &Header, end: u64) -> Self {
        Damage {
            cluster_bits: header.cluster_bits,
            version: header.version,
            external_data: header.external_data(),
            length: end,
            end: end.checked_next_multiple_of(header.cluster_size()).unwrap_or(end),
            tables: Mutex::new(Tables {
                l1: l1(header),
                structures: structures(header),
                l2: BTreeSet::new(),
                originals: Vec::new(),
                numbers: HashMap::new(),
                nonce: Random::any_seed(),
            }),
        }
    }

    /// Returns the bytes of memory that the tables take which an L1 table, read at `offset`, names; None for other bytes.
    pub(super) fn cost(&self, offset: u64, bytes: &[u8]) -> Option<u64> {
        let l1 = self.tables().l1.clone();
        if offset >= l1.end || l1.start >= offset.saturating_add(bytes.len() as u64) {
            return None;
        }
        let named = bytes.as_chunks().0.iter().filter(|word| u64::from_be_bytes(**word) & OFFSET != 0);
        Some(named.count() as u64 * BYTES_OF_TABLE)
    }

    /// Returns the bytes of memory that this takes.
    pub(super) fn bytes(&self) -> u64 {
        let tables = self.tables();
        tables.l2.len() as u64 * BYTES_OF_TABLE + tables.originals.len() as u64 * BYTES_OF_ORIGINAL
    }

    /// Changes what imago has read at `offset` so that it accepts it. Entries that the file ends before are damaged as
    /// well. In an L1 table of an image that is `written` nothing is changed: such an image has been refused.
    pub(super) fn sanitise(&self, offset: u64, bytes: &mut [u8], written: bool) {
        let mut tables = self.tables();
        let end = offset.saturating_add(bytes.len() as u64);
        if offset < tables.l1.end && tables.l1.start < end {
            for (at, word) in (offset..).step_by(8).zip(bytes.as_chunks_mut().0) {
                if !tables.l1.contains(&at) {
                    continue;
                }
                let entry = u64::from_be_bytes(*word);
                if !written && (self.is_cut_off(at) || !self.is_l1_entry(entry) || tables.is_taken(entry)) {
                    *word = (COPIED | DAMAGED).to_be_bytes();
                } else if entry & OFFSET != 0 {
                    tables.l2.insert(entry & OFFSET);
                }
            }
        } else if self.is_cluster(offset, bytes) && tables.l2.contains(&offset) {
            for (at, word) in (offset..).step_by(8).zip(bytes.as_chunks_mut().0) {
                let entry = u64::from_be_bytes(*word);
                if !written && self.is_cut_off(at) {
                    *word = (COPIED | DAMAGED).to_be_bytes();
                } else if !self.is_l2_entry(entry)
                    && let Some(number) = tables.number(entry)
                {
                    *word = (COPIED | self.place(tables.nonce, number)).to_be_bytes();
                }
            }
        }
    }

    /// Puts the originals back into what imago writes at `offset`.
    pub(super) fn restore(&self, offset: u64, bytes: &mut [u8]) {
        let tables = self.tables();
        if tables.originals.is_empty() || !self.is_cluster(offset, bytes) {
            return;
        }
        for word in bytes.as_chunks_mut().0 {
            let entry = u64::from_be_bytes(*word);
            // imago takes the flag away from a table that it copies.
            let place = entry & !COPIED;
            let number = place >> self.cluster_bits & ((1 << NUMBER_BITS) - 1);
            if place == self.place(tables.nonce, number)
                && let Some(original) = usize::try_from(number).ok().and_then(|n| tables.originals.get(n))
            {
                *word = original.to_be_bytes();
            }
        }
    }

    /// Notes that bytes change at `offset`: the pointers to L2 tables among them.
    pub(super) fn note(&self, offset: u64, old: &[u8], new: &[u8]) {
        let mut tables = self.tables();
        let entries = old.as_chunks().0.iter().zip(new.as_chunks().0);
        for (at, (old, new)) in (offset..).step_by(8).zip(entries) {
            if tables.l1.contains(&at) {
                tables.l2.remove(&(u64::from_be_bytes(*old) & OFFSET));
                let new = u64::from_be_bytes(*new) & OFFSET;
                if new != 0 {
                    tables.l2.insert(new);
                }
            }
        }
    }

    /// Notes that the header has changed.
    pub(super) fn note_header(&self, header: &Header) {
        let mut tables = self.tables();
        tables.l1 = l1(header);
        tables.structures = structures(header);
    }

    fn tables(&self) -> MutexGuard<'_, Tables> {
        self.tables.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells whether these bytes are a whole cluster, as all of imago's reads and writes of L2 tables are.
    fn is_cluster(&self, offset: u64, bytes: &[u8]) -> bool {
        bytes.len() as u64 == 1 << self.cluster_bits && self.is_aligned(offset)
    }

    fn is_aligned(&self, offset: u64) -> bool {
        offset.trailing_zeros() >= self.cluster_bits
    }

    /// Returns true for an entry at `at` that the file ends before.
    fn is_cut_off(&self, at: u64) -> bool {
        at.saturating_add(8) > self.length
    }

    fn is_l1_entry(&self, entry: u64) -> bool {
        let place = entry & OFFSET;
        entry & L1_RESERVED == 0 && self.is_aligned(place) && place < self.end.min(DAMAGED)
    }

    fn is_l2_entry(&self, entry: u64) -> bool {
        if entry & COMPRESSED != 0 {
            return self.is_compressed_entry(entry);
        }
        let place = entry & OFFSET;
        entry & L2_RESERVED == 0
            && self.is_aligned(place)
            && place < DAMAGED
            // Version 2 has no such flag.
            && (entry & ZERO == 0 || self.version >= 3)
    }

    fn is_compressed_entry(&self, entry: u64) -> bool {
        // The number of sectors besides the first one comes above the offset.
        let shift = 62 - (self.cluster_bits - 8);
        let place = entry & ((1 << shift) - 1);
        let sectors = (entry & !(COPIED | COMPRESSED)) >> shift;
        let end = (place / 512 + sectors + 1) * 512;
        entry & COPIED == 0 && !self.external_data && place < self.end && end <= self.end
    }

    /// The place that the substitute of an original names.
    fn place(&self, nonce: u64, number: u64) -> u64 {
        DAMAGED | (nonce << NUMBER_BITS | number) << self.cluster_bits & (DAMAGED - 1)
    }
}

impl Tables {
    /// Returns true for a pointer to a place that the header names for something else.
    fn is_taken(&self, entry: u64) -> bool {
        let place = entry & OFFSET;
        // A pointer to nothing has the header's place.
        place != 0 && self.structures.iter().any(|range| range.contains(&place))
    }

    /// The number of an original; None where there are too many.
    fn number(&mut self, original: u64) -> Option<u64> {
        if let Some(number) = self.numbers.get(&original) {
            return Some(*number);
        }
        let number = self.originals.len() as u64;
        if number >> NUMBER_BITS != 0 {
            return None;
        }
        self.originals.push(original);
        self.numbers.insert(original, number);
        Some(number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const C: u64 = 65536;

    /// An L1 table at 1 with L2 tables at 2 and 3, of a file of 10 clusters.
    fn damage(version: u32) -> Damage {
        let header = Header {
            version,
            cluster_bits: 16,
            l1_offset: C,
            l1_entries: 8,
            reftable_offset: 8 * C,
            reftable_clusters: 1,
            ..Header::default()
        };
        let damage = Damage::new(&header, 10 * C - 1000);
        damage.sanitise(C, &mut words(&[COPIED | (2 * C), COPIED | (3 * C), 0]), true);
        damage
    }

    fn words(words: &[u64]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_be_bytes()).collect()
    }

    fn table(entries: &[u64]) -> Vec<u8> {
        let mut bytes = words(entries);
        bytes.resize(65536, 0);
        bytes
    }

    fn word(bytes: &[u8], n: usize) -> u64 {
        u64::from_be_bytes(*bytes[n * 8..].first_chunk().unwrap())
    }

    #[test]
    fn bad_entries_are_substituted_and_come_back() {
        let damage = damage(3);
        let shift = 54;
        let good = [
            0,
            COPIED | (5 * C),
            5 * C,
            COPIED | (5 * C) | ZERO,
            ZERO,
            COMPRESSED | (5 * C + 77) | (3 << shift),
        ];
        let bad = [
            COPIED | (5 * C + 512),
            (5 * C) | (1 << 56),
            (5 * C) | 2,
            (5 * C + 512) | ZERO,
            DAMAGED,
            COPIED | COMPRESSED | (5 * C),
            COMPRESSED | (10 * C),
            COMPRESSED | (10 * C - 512) | (1 << shift),
            u64::MAX,
            // Once more.
            COPIED | (5 * C + 512),
        ];
        let original = table(&[&good[..], &bad].concat());
        let mut bytes = original.clone();
        damage.sanitise(2 * C, &mut bytes, true);
        assert_eq!(bytes[..good.len() * 8], original[..good.len() * 8]);
        for n in good.len()..good.len() + bad.len() {
            let found = word(&bytes, n);
            assert!(found & OFFSET >= DAMAGED && found & L2_RESERVED == 0, "{n}: {found:#x}");
            assert!(found & COMPRESSED == 0 && (found & OFFSET).is_multiple_of(C), "{n}: {found:#x}");
        }
        let mut copy = bytes.clone();
        for n in 0..copy.len() / 8 {
            let without = word(&copy, n) & !COPIED;
            copy[n * 8..][..8].copy_from_slice(&without.to_be_bytes());
        }
        damage.restore(2 * C, &mut bytes);
        assert!(bytes == original);
        damage.restore(7 * C, &mut copy);
        assert!(copy[good.len() * 8..] == original[good.len() * 8..], "in a copy of the table as well");
    }

    #[test]
    fn only_tables_are_changed() {
        let damage = damage(3);
        let original = table(&[1 << 60; 20]);
        let mut bytes = original.clone();
        damage.sanitise(4 * C, &mut bytes, true);
        damage.sanitise(2 * C, &mut bytes[..4096], true);
        assert!(bytes == original);
        // A table that has moved, and one that is new.
        damage.note(C, &words(&[COPIED | (2 * C), 0, 0]), &words(&[COPIED | (4 * C), 0, COPIED | (6 * C)]));
        damage.sanitise(2 * C, &mut bytes, true);
        assert!(bytes == original);
        for at in [4 * C, 6 * C] {
            let mut bytes = original.clone();
            damage.sanitise(at, &mut bytes, true);
            assert!(bytes != original);
        }
    }

    #[test]
    fn zero_flags_of_version_2_are_damage() {
        for (version, same) in [(2, false), (3, true)] {
            let mut bytes = table(&[(5 * C) | ZERO]);
            damage(version).sanitise(2 * C, &mut bytes, true);
            assert_eq!(bytes == table(&[(5 * C) | ZERO]), same);
        }
    }

    #[test]
    fn pointers_to_tables_are_substituted_in_images_that_are_read() {
        let bad = [
            COPIED | (2 * C + 512),
            (2 * C) | (1 << 57),
            (2 * C) | 1,
            COPIED | (10 * C),
            COPIED | (8 * C),
            C,
        ];
        let mut bytes = words(&[&[COPIED | (9 * C)][..], &bad].concat());
        damage(3).sanitise(C, &mut bytes, true);
        assert_eq!(bytes, words(&[&[COPIED | (9 * C)][..], &bad].concat()));
        damage(3).sanitise(C, &mut bytes, false);
        assert_eq!(bytes, words(&[&[COPIED | (9 * C)][..], &[COPIED | DAMAGED; 6]].concat()));
    }

    #[test]
    fn entries_past_the_end_of_the_file_are_damage() {
        let damage = damage(3);
        damage.note(C, &words(&[0]), &words(&[9 * C]));
        let original = table(&[5 * C; 4]);
        let mut bytes = original.clone();
        damage.sanitise(9 * C, &mut bytes, true);
        assert!(bytes == original);
        damage.sanitise(9 * C, &mut bytes, false);
        let kept = 65536 - 1000;
        assert!(bytes[..kept] == original[..kept]);
        assert!(bytes[kept..].chunks(8).all(|word| word == (COPIED | DAMAGED).to_be_bytes()));
    }

    #[test]
    fn the_number_of_originals_is_bounded() {
        let damage = damage(3);
        for part in 0..10 {
            let mut bytes = words(&(0..8192).map(|n| ((part * 8192 + n) << 16) | 2).collect::<Vec<_>>());
            let original = bytes.clone();
            damage.sanitise(2 * C, &mut bytes, true);
            assert_eq!(bytes == original, part >= 8);
        }
    }
}
