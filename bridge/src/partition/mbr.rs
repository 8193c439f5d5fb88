//! Master boot records, and the chain of extended boot records behind an extended partition.
//!
//! As the kernel has it (block/partitions/msdos.c): an entry counts by its length alone, so that one of type 0 is a
//! partition too (isohybrid images have such); there may be two extended partitions; a boot record may have several
//! partitions, or none; and a chain that leads past the end of the disk ends there.

use super::{BOOT_BYTES, Disk, MAX_PARTITIONS, Partition, Result, Scheme, Table, le};

const TABLE_AT: usize = 446;
const ENTRY_BYTES: usize = 16;
const SIGNATURE: [u8; 2] = [0x55, 0xaa];

/// Type of the entry that protects a GPT.
const PROTECTIVE: u8 = 0xee;
/// Types of extended partitions: CHS, LBA, Linux.
const EXTENDED: [u8; 3] = [0x05, 0x0f, 0x85];

/// Number of the first logical partition.
const FIRST_LOGICAL: u32 = 5;

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

    /// Whether it protects a GPT as the kernel asks for it (`pmbr_part_valid` in block/partitions/efi.c).
    pub(super) fn protects_the_header(&self) -> bool {
        self.is_protective() && self.start == 1
    }

    /// Whether it can be meant as an entry: active or not, nothing else.
    pub(super) fn is_sound(&self) -> bool {
        self.boot & 0x7f == 0
    }

    fn is_extended(&self) -> bool {
        EXTENDED.contains(&self.kind) && self.len > 0
    }

    fn is_used(&self) -> bool {
        self.len > 0 && !EXTENDED.contains(&self.kind)
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

/// Reads the partitions that count in sectors of this size.
pub(super) async fn read(disk: &Disk<'_>, primary: &[Entry; 4], sector_bytes: u32) -> Result<Table> {
    let sector = u64::from(sector_bytes);
    let numbered = || (1..).zip(primary);
    let mut partitions: Vec<Partition> = numbered()
        .filter(|(_, entry)| entry.is_used())
        .map(|(number, entry)| entry.partition(number, 0, sector))
        .collect();
    let extended: Vec<(u32, &Entry)> = numbered().filter(|(_, entry)| entry.is_extended()).collect();
    let mut flaw = None;
    let mut next = FIRST_LOGICAL;
    for (_, entry) in &extended {
        let ended = logical(disk, entry, sector, &mut next, &mut partitions).await?;
        flaw = flaw.or(ended);
    }
    let extended = extended.into_iter().map(|(number, _)| number).collect();
    Ok(Table { scheme: Scheme::Mbr, sector_bytes, partitions, extended, flaw })
}

/// Follows the chain: each record has its partitions, counted from itself, and the next record, counted from the first.
/// Returns what is wrong with the chain where it does not end as it should.
async fn logical(
    disk: &Disk<'_>,
    extended: &Entry,
    sector: u64,
    number: &mut u32,
    partitions: &mut Vec<Partition>,
) -> Result<Option<&'static str>> {
    let first = extended.start;
    let (mut here, mut len) = (first, extended.len);
    let mut seen = std::collections::HashSet::new();
    for _ in 0..MAX_PARTITIONS {
        if !seen.insert(here) {
            return Ok(Some("its logical partitions go in a circle"));
        }
        let at = here * sector;
        if at.checked_add(BOOT_BYTES).is_none_or(|end| end > disk.size) {
            return Ok(Some("the list of its logical partitions goes on past the end of the image"));
        }
        let record = disk.get(at, BOOT_BYTES).await?;
        // An extended partition without any record is empty.
        let Some(entries) = entries(&record) else { return Ok(None) };
        for (slot, entry) in entries.iter().enumerate().filter(|(_, entry)| entry.is_used()) {
            // The third and the fourth may hold garbage: they count where they lie within.
            let end = here + entry.start + entry.len;
            if slot >= 2 && (entry.start + entry.len > len || end > first + extended.len) {
                continue;
            }
            if *number >= FIRST_LOGICAL + MAX_PARTITIONS {
                return Ok(Some("it has more logical partitions than are read"));
            }
            partitions.push(entry.partition(*number, here, sector));
            *number += 1;
        }
        match entries.iter().find(|entry| entry.is_extended()) {
            Some(next) => (here, len) = (first + next.start, next.len),
            None => return Ok(None),
        }
    }
    Ok(Some("its list of logical partitions is longer than is read"))
}
