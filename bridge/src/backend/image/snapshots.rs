//! Where the structures of internal snapshots lie. Snapshots are kept, not served: this is all that is known of them.
//!
//! Source: QEMU, docs/interop/qcow2.txt, "Snapshots"; the limits are QEMU's own (block/qcow2.h).

use std::io;
use std::ops::Range;

use super::header::Header;
use super::host::Host;

const MAX_SNAPSHOTS: u32 = 65_536;
const MAX_TABLE_BYTES: u64 = 64 << 20;

/// An entry without what is of variable length.
const ENTRY_BYTES: u64 = 40;

/// The snapshot table and the L1 tables of all snapshots, in order. None where the table makes no sense.
///
/// # Errors
/// The file's.
pub(super) async fn structures(host: &Host, header: &Header) -> io::Result<Option<Vec<Range<u64>>>> {
    if header.snapshots == 0 {
        return Ok(Some(Vec::new()));
    }
    let start = header.snapshots_offset;
    if header.snapshots > MAX_SNAPSHOTS || start == 0 || !start.is_multiple_of(header.cluster_size()) {
        return Ok(None);
    }
    let mut ranges = Vec::new();
    let mut at = start;
    for _ in 0..header.snapshots {
        if at - start > MAX_TABLE_BYTES || at > 1 << 56 {
            return Ok(None);
        }
        let entry = host.read_file(at, 40).await?;
        let number = |from: usize, len: usize| {
            entry[from..from + len].iter().fold(0_u64, |number, byte| number << 8 | u64::from(*byte))
        };
        let (l1, entries) = (number(0, 8), number(8, 4));
        let Some(end) = l1.checked_add(entries * 8).filter(|end| *end <= 1 << 56) else { return Ok(None) };
        if end > l1 {
            ranges.push(l1..end);
        }
        let (id, name, extra) = (number(12, 2), number(14, 2), number(36, 4));
        at += (ENTRY_BYTES + extra + id + name).next_multiple_of(8);
    }
    ranges.push(start..at);
    ranges.sort_unstable_by_key(|range| range.start);
    Ok(Some(ranges))
}
