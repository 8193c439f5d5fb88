//! Where the structures of a qcow2 image lie: no guest's data may go there, whatever the image's tables say.
//!
//! ```text
//!   open for writing ──> load: header, L1 and refcount table (ranges), what these name (tables); all of it plausible?
//!   imago writes a pointer into one of the two tables ──host──> note: the new table counts from then on
//!   engine: every place is looked at before it is learned or written ──> meets
//!   commit: fresh tables ──> the map forgets data that it had there, writes to it end ──> then the table goes to the file
//! ```
//!
//! Memory: 8 bytes for each table that the file names, so that the file has to be as large as the claim.

use std::collections::BTreeSet;
use std::io;
use std::ops::Range;

use imago::Storage;

use super::header::Header;
use super::host::Host;
use super::{refcounts, snapshots};

/// The offset in an entry of an L1 table, and of a refcount table.
pub(super) const L1_MASK: u64 = 0x00ff_ffff_ffff_fe00;
pub(super) const REFTABLE_MASK: u64 = u64::MAX << 9;

/// Bytes of memory for each table that came later, at most.
const BYTES_OF_ADDED: u64 = 32;

/// Most bytes of a table that are read at once.
const MAX_READ: u64 = 1 << 20;

/// The places of one image's structures.
#[derive(Debug)]
pub(super) struct Places {
    cluster: u64,
    /// Where the header, the L1 table and the refcount table are; after a move, where they were as well, until that is
    /// in the file.
    headers: Vec<Header>,
    /// L2 tables and refcount blocks, as they were when the image was opened: offsets in order.
    tables: Vec<u64>,
    /// What belongs to internal snapshots: ranges of whole clusters, in order.
    snapshots: Vec<Range<u64>>,
    /// Those that came later.
    added: BTreeSet<u64>,
    /// Of these, the ones that are not in the file yet.
    fresh: Vec<u64>,
}

impl Places {
    /// Reads the tables of an image that is to be written. The inner error says what is wrong with them.
    ///
    /// # Errors
    /// The file's.
    pub(super) async fn load(host: &Host, header: &Header) -> io::Result<Result<Places, String>> {
        let cluster = header.cluster_size();
        let mut tables = Vec::new();
        for (table, mask) in [(l1(header), L1_MASK), (reftable(header), REFTABLE_MASK)] {
            each_entry(host, table, mask, |_, offset| tables.push(offset)).await?;
        }
        tables.shrink_to_fit();
        tables.sort_unstable();
        let Some(mut snapshots) = snapshots::structures(host, header).await? else {
            return Ok(Err("has a snapshot table that makes no sense".into()));
        };
        widen(&mut snapshots, cluster);
        let places = Places {
            cluster,
            headers: vec![header.clone()],
            tables,
            snapshots,
            added: BTreeSet::new(),
            fresh: Vec::new(),
        };
        let length = host.size()?;
        Ok(match places.fault(length) {
            Some(fault) => Err(fault),
            None => match refcounts::find_fault(host, header, places.clusters()).await? {
                Some(fault) => Err(fault),
                None => Ok(places),
            },
        })
    }

    /// A table where none can be.
    fn fault(&self, length: u64) -> Option<String> {
        let fixed = structures(&self.headers[0]);
        for (n, one) in fixed.iter().enumerate() {
            if one.end > length {
                return Some(format!(
                    "has a table at {:#x}, which the file ends before or within",
                    one.start
                ));
            }
            if fixed[..n].iter().any(|other| one.start < other.end && other.start < one.end) {
                return Some(format!("has two tables in one place, at {:#x}", one.start));
            }
        }
        let over = |at: u64| fixed.iter().any(|range| at < range.end && range.start < at + self.cluster);
        let mut before = None;
        for &at in &self.tables {
            if !at.is_multiple_of(self.cluster) || at >= length {
                return Some(format!("has a table at {at:#x}, where none can be"));
            }
            if before == Some(at) || over(at) {
                return Some(format!("has two tables in one place, at {at:#x}"));
            }
            if at.saturating_add(self.cluster) > length {
                return Some(format!("has a table at {at:#x}, which the file ends within"));
            }
            before = Some(at);
        }
        None
    }

    /// Returns the bytes of memory that this takes.
    pub(super) fn bytes(&self) -> u64 {
        let ranges = self.snapshots.len() * 2;
        (self.tables.capacity() + ranges) as u64 * 8 + self.added.len() as u64 * BYTES_OF_ADDED
    }

    /// All clusters, roughly in order.
    fn clusters(&self) -> impl Iterator<Item = u64> {
        let cluster = index(self.cluster);
        structures(&self.headers[0])
            .into_iter()
            .flat_map(move |range| range.step_by(cluster))
            .chain(self.tables.iter().copied())
    }

    /// Whether there is a structure in a range of the file, or in the same clusters.
    pub(super) fn meets(&self, start: u64, end: u64) -> bool {
        let start = start - start % self.cluster;
        let end = end.checked_next_multiple_of(self.cluster).unwrap_or(u64::MAX);
        let next = self.tables.partition_point(|at| *at < start);
        self.tables.get(next).is_some_and(|at| *at < end)
            || self.added.range(start..end).next().is_some()
            || self.meets_snapshots(start, end)
            || self
                .headers
                .iter()
                .any(|header| structures(header).iter().any(|range| start < range.end && range.start < end))
    }

    fn meets_snapshots(&self, start: u64, end: u64) -> bool {
        let next = self.snapshots.partition_point(|range| range.end <= start);
        self.snapshots.get(next).is_some_and(|range| range.start < end)
    }

    /// Whether a range of the file has pointers to tables in it.
    pub(super) fn has_pointers(&self, start: u64, end: u64) -> bool {
        self.headers.iter().any(|header| {
            [l1(header), reftable(header)].iter().any(|table| start < table.end && table.start < end)
        })
    }

    /// Notes that bytes of the file change.
    ///
    /// # Errors
    /// The place of a structure to which a second pointer would lead.
    pub(super) fn note(&mut self, start: u64, old: &[u8], new: &[u8]) -> Result<(), u64> {
        let Some(header) = self.headers.last() else { return Ok(()) };
        for (table, mask) in [(l1(header), L1_MASK), (reftable(header), REFTABLE_MASK)] {
            let entries = old.as_chunks().0.iter().zip(new.as_chunks().0);
            for (at, (old, new)) in (start..).step_by(8).zip(entries) {
                let (old, new) = (u64::from_be_bytes(*old) & mask, u64::from_be_bytes(*new) & mask);
                if !table.contains(&at) || new == old || new == 0 {
                    continue;
                }
                if self.meets(new, new + self.cluster) {
                    return Err(new);
                }
                self.added.insert(new);
                self.fresh.push(new);
            }
        }
        Ok(())
    }

    /// The header has changed. Gives the tables that have moved, whose pointers are to be adopted.
    pub(super) fn note_header(&mut self, header: Header) -> Vec<(Range<u64>, u64)> {
        let Some(last) = self.headers.last() else { return Vec::new() };
        let mut moved = vec![(l1(&header), L1_MASK), (reftable(&header), REFTABLE_MASK)];
        moved.retain(|(table, _)| *table != l1(last) && *table != reftable(last));
        if !moved.is_empty() {
            self.headers.push(header);
        }
        moved
    }

    /// Notes all that a table which has moved leads to.
    pub(super) fn adopt(&mut self, table: &[u8], mask: u64) {
        for entry in table.as_chunks().0 {
            let offset = u64::from_be_bytes(*entry) & mask;
            if offset != 0 && !self.meets(offset, offset + self.cluster) {
                self.added.insert(offset);
                self.fresh.push(offset);
            }
        }
    }

    /// Where the pointer to the L2 table for a guest's byte is.
    pub(super) fn l1_entry(&self, offset: u64) -> Option<u64> {
        let header = self.headers.last()?;
        let entry = l1(header).start + offset / (self.cluster * (self.cluster / 8)) * 8;
        l1(header).contains(&entry).then_some(entry)
    }

    /// The tables that came since this was asked last.
    pub(super) fn take_fresh(&mut self) -> Vec<u64> {
        std::mem::take(&mut self.fresh)
    }

    /// What had been written is in the file.
    pub(super) fn settle(&mut self) {
        self.headers.drain(..self.headers.len() - 1);
    }
}

/// Makes ranges, which are in the order of their starts, ones of whole clusters that do not overlap.
fn widen(ranges: &mut Vec<Range<u64>>, cluster: u64) {
    for range in ranges.iter_mut() {
        *range = range.start - range.start % cluster..range.end.next_multiple_of(cluster);
    }
    ranges.dedup_by(|next, last| {
        let joins = next.start <= last.end;
        if joins {
            last.end = last.end.max(next.end);
        }
        joins
    });
}

/// Where the parts of an image lie that its header names.
pub(super) fn structures(header: &Header) -> [Range<u64>; 3] {
    [0..header.cluster_size(), l1(header), reftable(header)]
}

pub(super) fn l1(header: &Header) -> Range<u64> {
    header.l1_offset..header.l1_offset + u64::from(header.l1_entries) * 8
}

pub(super) fn reftable(header: &Header) -> Range<u64> {
    let bytes = u64::from(header.reftable_clusters) * header.cluster_size();
    header.reftable_offset..header.reftable_offset + bytes
}

/// Goes through a table as it is in the file: the number of each entry that leads somewhere, and where.
pub(super) async fn each_entry(
    host: &Host,
    table: Range<u64>,
    mask: u64,
    mut found: impl FnMut(u64, u64),
) -> io::Result<()> {
    let mut at = table.start;
    while at < table.end {
        let bytes = host.read_file(at, index((table.end - at).min(MAX_READ))).await?;
        for (n, entry) in ((at - table.start) / 8..).zip(bytes.as_chunks().0) {
            let offset = u64::from_be_bytes(*entry) & mask;
            if offset != 0 {
                found(n, offset);
            }
        }
        at += bytes.len() as u64;
    }
    Ok(())
}

fn index(number: u64) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const C: u64 = 65536;

    /// Header, refcount table, L1 table, then tables at 4 and 6.
    fn places() -> Places {
        let header = Header {
            cluster_bits: 16,
            reftable_offset: C,
            reftable_clusters: 1,
            l1_offset: 2 * C,
            l1_entries: 4,
            ..Header::default()
        };
        Places {
            cluster: C,
            headers: vec![header],
            tables: vec![4 * C, 6 * C],
            snapshots: vec![20 * C..22 * C, 30 * C..31 * C],
            added: BTreeSet::new(),
            fresh: Vec::new(),
        }
    }

    fn entry(offset: u64) -> [u8; 8] {
        (1 << 63 | offset).to_be_bytes()
    }

    #[test]
    fn every_structure_is_met() {
        let places = places();
        let met: Vec<u64> = (0..9).filter(|n| places.meets(n * C, (n + 1) * C)).collect();
        assert_eq!(met, [0, 1, 2, 4, 6]);
        assert!(
            places.meets(5 * C - 1, 5 * C) && places.meets(3 * C, 4 * C + 1) && !places.meets(5 * C, 6 * C)
        );
        let met: Vec<u64> = (15..35).filter(|n| places.meets(n * C, n * C + 1)).collect();
        assert_eq!(met, [20, 21, 30]);
        assert!(places.meets(2 * C + 32, 3 * C), "the L1 table ends before, and its cluster does not");
    }

    #[test]
    fn new_tables_count_from_the_moment_that_a_pointer_is_written() {
        let mut places = places();
        assert_eq!(places.note(2 * C + 8, &[0; 8], &entry(7 * C)), Ok(()));
        assert!(places.meets(7 * C, 8 * C));
        assert_eq!(places.take_fresh(), [7 * C]);
        assert_eq!(places.note(2 * C + 8, &entry(7 * C), &(7 * C).to_be_bytes()), Ok(()), "a flag alone");
        assert_eq!(places.note(3 * C, &[0; 8], &entry(8 * C)), Ok(()), "no table is there");
        assert!(places.take_fresh().is_empty());
        for taken in [0, 2 * C, 4 * C, 7 * C].into_iter().skip(1) {
            assert_eq!(places.note(C, &[0; 8], &taken.to_be_bytes()), Err(taken));
        }
    }

    #[test]
    fn a_moved_table_guards_both_places_until_it_is_in_the_file() {
        let mut places = places();
        assert!(places.note_header(places.headers[0].clone()).is_empty());
        let moved = places.note_header(Header { l1_offset: 10 * C, ..places.headers[0].clone() });
        assert_eq!(moved, [(10 * C..10 * C + 32, L1_MASK)]);
        places.adopt(&[entry(4 * C), entry(13 * C)].concat(), L1_MASK);
        assert_eq!(places.take_fresh(), [13 * C]);
        assert!(places.meets(2 * C, 3 * C) && places.meets(10 * C, 11 * C));
        assert_eq!(places.note(10 * C, &[0; 8], &entry(12 * C)), Ok(()));
        places.settle();
        assert!(!places.meets(2 * C, 3 * C) && places.meets(10 * C, 11 * C) && places.meets(12 * C, 13 * C));
    }

    #[test]
    fn ranges_are_widened_and_joined() {
        let mut ranges = vec![
            3 * C..3 * C + 8,
            3 * C + 512..3 * C + 520,
            4 * C..6 * C,
            5 * C..5 * C + 8,
            9 * C..9 * C + 1,
        ];
        widen(&mut ranges, C);
        assert_eq!(ranges, [3 * C..6 * C, 9 * C..10 * C]);
    }

    #[test]
    fn tables_where_none_can_be_are_told() {
        let fault = |tables: &[u64]| Places { tables: tables.to_vec(), ..places() }.fault(9 * C - 1);
        assert_eq!(fault(&[4 * C, 7 * C]), None);
        for (tables, word) in [
            (&[4 * C, 4 * C][..], "two tables"),
            (&[2 * C], "two tables"),
            (&[4 * C + 512], "where none"),
            (&[9 * C], "where none"),
            (&[8 * C], "ends within"),
        ] {
            assert!(fault(tables).unwrap().contains(word), "{tables:?}");
        }
    }
}
