//! The partitions of a source: GPT and MBR, read through [`Backend`] and therefore from any source.
//!
//! Read only, and from disks that nobody vouches for. The crates for such tables allocate by the header's word or
//! panic on one that is wrong, which is why this is ours: at most [`MAX_PARTITIONS`] entries are looked at, every sum
//! is checked, and a table that makes no sense is an error in one line.
//!
//! Numbers are the kernel's (block/partitions/): GPT's by place in the table, MBR's 1 to 4, and logical ones from 5 on,
//! without a gap for a boot record that has none. Beyond what the kernel shows, and said where it is served: a GPT of a longer
//! disk, or with its protective entry elsewhere, or from its copy. An extended partition only holds others, and is not listed.
//!
//! Units are the logical sectors of the device that the table was made on. The table does not tell them, and neither
//! does the smallest request that a server takes: they are 512 bytes unless the caller knows better.

mod gpt;
mod mbr;
#[cfg(test)]
mod tests;

use crate::transfer::get;
use crate::{Backend, Buffer, Error};

/// Most entries of a table that are read, and most logical partitions.
pub const MAX_PARTITIONS: u32 = 4096;

/// Sizes of a sector that devices have, in bytes.
pub const SECTOR_SIZES: [u32; 4] = [512, 1024, 2048, 4096];

/// Why the kernel does not take a GPT that others do.
const UNPROTECTED: &str =
    "its protective entry is not at sector 1, and the kernel would show no partition of it";

/// Length of a boot sector, whatever the disk's sectors are, in bytes.
const BOOT_BYTES: u64 = 512;

/// A table of partitions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Table {
    /// How it is written down.
    pub scheme: Scheme,
    /// The sector that its numbers count in, in bytes.
    pub sector_bytes: u32,
    /// In the order of their numbers.
    pub partitions: Vec<Partition>,
    /// MBR's entries that only hold logical partitions.
    pub extended: Vec<u32>,
    /// Why there may be more than were found, or why the kernel would not show them, as the end of a line.
    pub flaw: Option<&'static str>,
}

/// The kinds of tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scheme {
    /// GUID partition table (UEFI specification, chapter 5).
    Gpt,
    /// Master boot record, with extended boot records for logical partitions.
    Mbr,
}

/// One partition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Partition {
    /// From 1 on.
    pub number: u32,
    /// First byte.
    pub start: u64,
    /// Length in bytes; it may go past the end of the source.
    pub len: u64,
    /// The type's GUID, or its number as in `0x83`.
    pub kind: String,
    /// GPT's name of it; may be empty.
    pub name: String,
}

/// Why there is no such partition. Each text is the end of a line that begins with the source's name.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum PartitionError {
    /// Neither GPT nor MBR.
    #[error("has no partition table (GPT or MBR)")]
    NoTable,
    /// The table makes no sense.
    #[error("has a broken {0} partition table: {1}")]
    Broken(&'static str, &'static str),
    /// The table has others.
    #[error("has no partition {wanted}; {there}")]
    NotThere {
        /// What was asked for.
        wanted: u32,
        /// Which there are.
        there: String,
    },
    /// The partition is not wholly within the source.
    #[error("ends before its partition {0} does: the image is cut short")]
    Outside(u32),
    /// The source cannot be read.
    #[error("cannot read the partition table: {0}")]
    Read(#[from] Error),
}

type Result<T> = std::result::Result<T, PartitionError>;

/// Reads the table of a source; None where there is none. A damaged GPT is replaced by its copy at the end of the disk.
/// Without a `sector` size in bytes, MBR counts in 512 bytes and GPT is looked for with each of [`SECTOR_SIZES`].
///
/// # Errors
/// `Broken`, `Read`.
pub async fn read(source: &dyn Backend, sector: Option<u32>) -> Result<Option<Table>> {
    let disk = Disk { source, size: source.geometry().size };
    if disk.size < BOOT_BYTES {
        return Ok(None);
    }
    let boot = disk.get(0, BOOT_BYTES).await?;
    let Some(entries) = mbr::entries(&boot) else { return Ok(None) };
    if entries.iter().any(|entry| entry.is_protective()) {
        let mut table = gpt::read(&disk, sector).await?;
        if !entries.iter().any(mbr::Entry::protects_the_header) {
            table.flaw = table.flaw.or(Some(UNPROTECTED));
        }
        return Ok(Some(table));
    }
    // A file system's boot sector has the same signature, and code where the entries would be.
    if !entries.iter().all(mbr::Entry::is_sound) {
        return Ok(None);
    }
    mbr::read(&disk, &entries, sector.unwrap_or(SECTOR_SIZES[0])).await.map(Some)
}

/// The partition with this number, which lies within the source.
///
/// # Errors
/// Those of [`read`], `NoTable`, `NotThere` and `Outside`.
pub async fn find(source: &dyn Backend, number: u32, sector: Option<u32>) -> Result<Partition> {
    let table = read(source, sector).await?.ok_or(PartitionError::NoTable)?;
    let Some(partition) = table.partitions.iter().find(|partition| partition.number == number) else {
        let mut there = numbers(&table.partitions);
        if table.extended.contains(&number) {
            there = format!("that is an extended one, which only holds others; {there}");
        }
        if let Some(flaw) = table.flaw {
            there = format!("{there}; {flaw}");
        }
        return Err(PartitionError::NotThere { wanted: number, there });
    };
    let end = partition.start.checked_add(partition.len);
    if end.is_none_or(|end| end > source.geometry().size) {
        return Err(PartitionError::Outside(number));
    }
    if let Some(flaw) = table.flaw {
        tracing::warn!("the partition table of the source is not in order: {flaw}");
    }
    Ok(partition.clone())
}

/// "there are 1, 2 and 5".
fn numbers(partitions: &[Partition]) -> String {
    /// More are not told one by one.
    const MOST: usize = 16;
    let told: Vec<String> = partitions.iter().take(MOST).map(|one| one.number.to_string()).collect();
    match (told.as_slice(), partitions.len()) {
        ([], _) => "its table is empty".to_owned(),
        ([only], _) => format!("there is only {only}"),
        (_, all) if all > MOST => format!("there are {}, and {} more", told.join(", "), all - MOST),
        ([first @ .., last], _) => format!("there are {} and {last}", first.join(", ")),
    }
}

/// A source to read tables from.
struct Disk<'a> {
    source: &'a dyn Backend,
    size: u64,
}

impl Disk<'_> {
    /// Reads a range that lies within the disk and need not be aligned.
    async fn get(&self, offset: u64, len: u64) -> Result<Buffer> {
        let block = u64::from(self.source.geometry().min_block).max(1);
        let start = offset - offset % block;
        let end = (offset + len).next_multiple_of(block).min(self.size);
        let mut bytes = get(self.source, start, end - start).await?;
        let skip = usize::try_from(offset - start).unwrap_or_default();
        if skip > 0 {
            bytes.copy_within(skip.., 0);
        }
        bytes.truncate(usize::try_from(len).unwrap_or_default());
        Ok(bytes)
    }
}

/// A little-endian number at a place in bytes.
fn le<const N: usize>(bytes: &[u8], at: usize) -> u64 {
    let mut number = [0; 8];
    if let Some(field) = bytes.get(at..).and_then(|rest| rest.first_chunk::<N>()) {
        number[..N].copy_from_slice(field);
    }
    u64::from_le_bytes(number)
}
