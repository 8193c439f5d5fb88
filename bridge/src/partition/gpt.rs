//! GUID partition tables (UEFI specification 2.10, section 5.3), with sectors of 512 to 4096 bytes.
//!
//! | header, offset | bytes | |
//! |---|---|---|
//! | 0 | 8 | "EFI PART" |
//! | 12, 16 | 4, 4 | header's length; CRC-32 of it, with this field as zero |
//! | 24 | 8 | the header's own sector |
//! | 40, 48 | 8, 8 | first and last sector that partitions may use |
//! | 72, 80, 84 | 8, 4, 4 | first sector of the entries, their number, the length of each |
//! | 88 | 4 | CRC-32 of the entries |

use super::{Disk, MAX_PARTITIONS, Partition, PartitionError, Result, SECTOR_SIZES, Scheme, Table, le};

const SIGNATURE: &[u8; 8] = b"EFI PART";
const MIN_HEADER: u64 = 92;
const MIN_ENTRY: u64 = 128;
const MAX_ENTRY: u64 = 4096;
const NAME_AT: usize = 56;
const NAME_UNITS: usize = 36;

/// The kernel takes no such table. The partitions that lie within the image are whole all the same.
const CUT_SHORT: &str =
    "the image is shorter than the disk of its GPT, and the kernel would show no partition of it";

fn broken(reason: &'static str) -> PartitionError {
    PartitionError::Broken("GPT", reason)
}

/// Reads the table that counts in sectors of this size, or of any that devices have.
pub(super) async fn read(disk: &Disk<'_>, sector: Option<u32>) -> Result<Table> {
    let mut first_error = None;
    let sectors = SECTOR_SIZES.into_iter().filter(|bytes| sector.is_none_or(|sector| sector == *bytes));
    for sector_bytes in sectors {
        let sector = u64::from(sector_bytes);
        let last = (disk.size / sector).saturating_sub(1);
        for place in [1, last] {
            match read_at(disk, place, sector_bytes).await {
                Ok(Some(table)) => {
                    if place != 1 {
                        let error = first_error.unwrap_or_else(missing);
                        tracing::warn!("the source {error}; using the copy at the end of the disk");
                    }
                    return Ok(table);
                }
                Ok(None) => {}
                Err(error) => first_error = first_error.or(Some(error)),
            }
        }
    }
    Err(first_error.unwrap_or_else(missing))
}

fn missing() -> PartitionError {
    broken("its header is missing")
}

/// The table whose header is in this sector; None where there is none.
async fn read_at(disk: &Disk<'_>, place: u64, sector_bytes: u32) -> Result<Option<Table>> {
    let sector = u64::from(sector_bytes);
    if place == 0
        || place.checked_add(1).and_then(|end| end.checked_mul(sector)).is_none_or(|end| end > disk.size)
    {
        return Ok(None);
    }
    let mut header = disk.get(place * sector, sector).await?;
    if !header.starts_with(SIGNATURE) {
        return Ok(None);
    }
    let (len, sum) = (le::<4>(&header, 12), le::<4>(&header, 16));
    if !(MIN_HEADER..=sector).contains(&len) {
        return Err(broken("its header has no sensible length"));
    }
    header[16..20].fill(0);
    // Within the sector, as was just seen.
    if crc32(&header[..usize::try_from(len).unwrap_or(0)]) != sum {
        return Err(broken("its header's checksum is wrong"));
    }
    if le::<8>(&header, 24) != place {
        return Err(broken("its header belongs elsewhere"));
    }
    let (first_usable, last_usable) = (le::<8>(&header, 40), le::<8>(&header, 48));
    if first_usable > last_usable {
        return Err(broken("its usable sectors make no sense"));
    }
    let (count, entry) = (le::<4>(&header, 80), le::<4>(&header, 84));
    if count > u64::from(MAX_PARTITIONS)
        || !(MIN_ENTRY..=MAX_ENTRY).contains(&entry)
        || !entry.is_power_of_two()
    {
        return Err(broken("its number or length of entries makes no sense"));
    }
    let start = le::<8>(&header, 72).checked_mul(sector);
    let end = start.and_then(|start| start.checked_add(count * entry)).filter(|end| *end <= disk.size);
    let (Some(start), Some(_)) = (start, end) else {
        return Err(broken("its entries lie past the end of the disk"));
    };
    let entries = disk.get(start, count * entry).await?;
    if crc32(&entries) != le::<4>(&header, 88) {
        return Err(broken("its entries' checksum is wrong"));
    }
    let mut partitions = Vec::new();
    for (number, entry) in (1..).zip(entries.chunks_exact(usize::try_from(entry).unwrap_or(usize::MAX))) {
        if entry[..16] != [0; 16] {
            // An entry that makes no sense is passed over, as the kernel does; the checksum says that it was meant.
            partitions.extend(partition(number, entry, sector));
        }
    }
    let flaw = (last_usable > disk.size / sector - 1).then_some(CUT_SHORT);
    Ok(Some(Table { scheme: Scheme::Gpt, sector_bytes, partitions, extended: Vec::new(), flaw }))
}

/// Reads an entry; None for one that ends before it begins, or beyond all bounds.
fn partition(number: u32, entry: &[u8], sector: u64) -> Option<Partition> {
    let (first, last) = (le::<8>(entry, 32), le::<8>(entry, 40));
    let sectors = last.checked_sub(first).and_then(|len| len.checked_add(1));
    let (start, len) = first.checked_mul(sector).zip(sectors?.checked_mul(sector))?;
    let units: Vec<u16> = (0..NAME_UNITS)
        .map(|n| u16::from_le_bytes([entry[NAME_AT + 2 * n], entry[NAME_AT + 2 * n + 1]]))
        .take_while(|unit| *unit != 0)
        .collect();
    // It is printed: nothing in it may act on a terminal.
    let name = String::from_utf16_lossy(&units).chars().filter(|c| !c.is_control()).collect();
    (len > 0).then(|| Partition { number, start, len, kind: guid(entry), name })
}

/// A GUID as text; its first three fields are little-endian.
fn guid(bytes: &[u8]) -> String {
    let rest = bytes[8..16].iter().fold(0, |number: u64, byte| number << 8 | u64::from(*byte));
    format!(
        "{:08x}-{:04x}-{:04x}-{:04x}-{:012x}",
        le::<4>(bytes, 0),
        le::<2>(bytes, 4),
        le::<2>(bytes, 6),
        rest >> 48,
        rest & 0xffff_ffff_ffff
    )
}

/// CRC-32 as IEEE 802.3 has it, bit by bit: tables are short.
pub(super) fn crc32(bytes: &[u8]) -> u64 {
    let step = |crc: u32, _| if crc & 1 == 1 { crc >> 1 ^ 0xedb8_8320 } else { crc >> 1 };
    let crc = bytes.iter().fold(u32::MAX, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), step));
    u64::from(!crc)
}
