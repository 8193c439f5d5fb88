//! Master boot records, and the chain of extended boot records behind an extended partition.
//!
//! Sectors are those of the source's minimum block, else 512 bytes: the table itself does not tell.

use super::{BOOT_BYTES, Disk, MAX_PARTITIONS, Partition, PartitionError, Result, Scheme, Table, le};

const TABLE_AT: usize = 446;
const ENTRY_BYTES: usize = 16;
const SIGNATURE: [u8; 2] = [0x55, 0xaa];

/// Type of the entry that protects a GPT.
const PROTECTIVE: u8 = 0xee;
/// Types of extended partitions: CHS, LBA, Linux.
const EXTENDED: [u8; 3] = [0x05, 0x0f, 0x85];

/// One entry, in sectors.
#[derive(Clone, Copy)]
pub(super) struct Entry {
    boot: u8,
    kind: u8,
    start: u64,
    len: u64,
}

impl Entry {
    pub(super) fn is_protective(&self) -> bool {
        self.kind == PROTECTIVE
    }

    /// Whether it can be meant as an entry: active or not, nothing else.
    pub(super) fn is_sound(&self) -> bool {
        self.boot & 0x7f == 0
    }

    fn is_extended(&self) -> bool {
        EXTENDED.contains(&self.kind) && self.len > 0
    }

    fn is_used(&self) -> bool {
        self.kind != 0 && self.len > 0 && !EXTENDED.contains(&self.kind)
    }

    /// `base` in sectors: what its start counts from.
    fn partition(&self, number: u32, base: u64, sector: u64) -> Partition {
        // 32-bit numbers of sectors: no product or sum can overflow.
        Partition {
            number,
            start: (base + self.start) * sector,
            len: self.len * sector,
            kind: format!("{:#04x}", self.kind),
            name: String::new(),
        }
    }
}

/// The four entries of a boot record; None without its signature.
pub(super) fn entries(boot: &[u8]) -> Option<[Entry; 4]> {
    if boot.get(510..512)? != SIGNATURE {
        return None;
    }
    Some([0, 1, 2, 3].map(|n| {
        let at = TABLE_AT + n * ENTRY_BYTES;
        Entry {
            boot: boot[at],
            kind: boot[at + 4],
            start: le::<4>(boot, at + 8),
            len: le::<4>(boot, at + 12),
        }
    }))
}

pub(super) async fn read(disk: &Disk<'_>, primary: &[Entry; 4]) -> Result<Table> {
    let sector_bytes = disk.source.geometry().min_block.max(512);
    let sector = u64::from(sector_bytes);
    let mut partitions: Vec<Partition> = (1..)
        .zip(primary)
        .filter(|(_, entry)| entry.is_used())
        .map(|(number, entry)| entry.partition(number, 0, sector))
        .collect();
    if let Some(extended) = primary.iter().find(|entry| entry.is_extended()) {
        logical(disk, extended.start, sector, &mut partitions).await?;
    }
    Ok(Table { scheme: Scheme::Mbr, sector_bytes, partitions })
}

/// Follows the chain: each record has one partition, counted from itself, and the next record, counted from the first.
async fn logical(disk: &Disk<'_>, first: u64, sector: u64, partitions: &mut Vec<Partition>) -> Result<()> {
    let mut here = first;
    let mut seen = std::collections::HashSet::new();
    for number in 5..5 + MAX_PARTITIONS {
        if !seen.insert(here) {
            return Err(PartitionError::Broken("MBR", "its logical partitions go in a circle"));
        }
        let at = here * sector;
        if at.checked_add(BOOT_BYTES).is_none_or(|end| end > disk.size) {
            return Err(PartitionError::Broken("MBR", "a logical partition lies past the end of the disk"));
        }
        let record = disk.get(at, BOOT_BYTES).await?;
        // An extended partition without any record is empty.
        let Some(entries) = entries(&record) else { return Ok(()) };
        if let Some(entry) = entries.iter().find(|entry| entry.is_used()) {
            partitions.push(entry.partition(number, here, sector));
        }
        match entries.iter().find(|entry| entry.is_extended()) {
            Some(next) => here = first + next.start,
            None => return Ok(()),
        }
    }
    Err(PartitionError::Broken("MBR", "it has too many logical partitions"))
}
