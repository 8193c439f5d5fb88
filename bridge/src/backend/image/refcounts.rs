//! A look at the refcounts before an image is written: clusters that hold its own structures must not count as free.
//! imago believes them, and would give the header away as a place for data.

use std::io;

use super::header::Header;
use super::host::{BLOCK, Host};

/// What is wrong, if something is: a structure of the image whose clusters count as free.
///
/// # Errors
/// The file's.
pub(super) async fn find_fault(
    host: &Host,
    header: &Header,
    clusters: impl Iterator<Item = u64>,
) -> io::Result<Option<String>> {
    let mut known = (None, Vec::new());
    for at in clusters {
        let (block, place, counter) = place_of(header, at);
        // Several clusters have their counters in one block.
        if known.0 != Some((block, place)) {
            let bytes = match block_offset(host, header, block).await? {
                Some(offset) => host.read_file(offset + place, index(BLOCK)).await?.to_vec(),
                None => Vec::new(),
            };
            known = (Some((block, place)), bytes);
        }
        if refcount(&known.1, counter, header.refcount_order) == 0 {
            return Ok(Some(format!("has broken refcounts: its own cluster at {at:#x} counts as free")));
        }
    }
    Ok(None)
}

/// Where the refcount of the cluster at `offset` is: the number of its refcount block, the part of the block in bytes,
/// and the counter in that part.
pub(super) fn place_of(header: &Header, offset: u64) -> (u64, u64, u64) {
    let bits = 1 << header.refcount_order;
    let per_block = header.cluster_size() * 8 / bits;
    let number = offset / header.cluster_size();
    let (block, counter) = (number / per_block, number % per_block);
    let per_part = BLOCK * 8 / bits;
    (block, counter / per_part * BLOCK, counter % per_part)
}

/// Where a refcount block lies; None where there is none.
async fn block_offset(host: &Host, header: &Header, block: u64) -> io::Result<Option<u64>> {
    let entries = u64::from(header.reftable_clusters) * header.cluster_size() / 8;
    if block >= entries {
        return Ok(None);
    }
    let bytes = host.read_file(header.reftable_offset.saturating_add(block * 8), 8).await?;
    let offset = bytes.iter().fold(0_u64, |number, byte| number << 8 | u64::from(*byte)) & !(BLOCK - 1);
    Ok((offset != 0 && offset < 1 << 56).then_some(offset))
}

/// A counter of 2^`order` bits; 0 where there are no bytes for it.
pub(super) fn refcount(bytes: &[u8], counter: u64, order: u32) -> u64 {
    if order < 3 {
        let per_byte = 8_u64 >> order;
        let byte = bytes.get(index(counter / per_byte)).copied().unwrap_or(0);
        let shift = (counter % per_byte) << order;
        return u64::from(byte) >> shift & ((1 << (1_u32 << order)) - 1);
    }
    let width = 1_usize << (order - 3);
    let start = index(counter) * width;
    bytes
        .get(start..start + width)
        .map_or(0, |bytes| bytes.iter().fold(0, |n, byte| n << 8 | u64::from(*byte)))
}

/// Sets a counter of 2^`order` bits to `value`, which fits; nothing where there are no bytes for it.
pub(super) fn set_refcount(bytes: &mut [u8], counter: u64, order: u32, value: u64) {
    if order < 3 {
        let per_byte = 8_u64 >> order;
        let shift = (counter % per_byte) << order;
        let mask = ((1_u8 << (1_u32 << order)) - 1) << shift;
        if let Some(byte) = bytes.get_mut(index(counter / per_byte)) {
            *byte = *byte & !mask | value.to_le_bytes()[0] << shift & mask;
        }
        return;
    }
    let width = 1_usize << (order - 3);
    let start = index(counter) * width;
    if let Some(bytes) = bytes.get_mut(start..start + width) {
        bytes.copy_from_slice(&value.to_be_bytes()[8 - width..]);
    }
}

fn index(number: u64) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_of_every_width() {
        let bytes = [0b1000_0010, 0x01, 0x02, 0x03, 0, 0, 0, 9];
        assert_eq!((refcount(&bytes, 0, 0), refcount(&bytes, 1, 0), refcount(&bytes, 7, 0)), (0, 1, 1));
        assert_eq!((refcount(&bytes, 0, 1), refcount(&bytes, 3, 1)), (2, 2));
        assert_eq!((refcount(&bytes, 1, 2), refcount(&bytes, 2, 2)), (8, 1));
        assert_eq!((refcount(&bytes, 2, 3), refcount(&bytes, 1, 4), refcount(&bytes, 1, 5)), (2, 0x203, 9));
        assert_eq!((refcount(&bytes, 0, 6), refcount(&bytes, 1, 6)), (0x8201_0203_0000_0009, 0));
    }

    #[test]
    fn a_counter_is_set_and_its_neighbours_stay() {
        for order in 0..=6 {
            let most = if order < 6 { (1_u64 << (1 << order)) - 1 } else { u64::MAX };
            for start in [0x00, 0xff] {
                let mut bytes = [start; 64];
                let old = |n| refcount(&[start; 64], n, order);
                set_refcount(&mut bytes, 3, order, most - old(3));
                for n in 0..8 {
                    assert_eq!(refcount(&bytes, n, order), if n == 3 { most - old(3) } else { old(n) });
                }
            }
        }
    }

    #[test]
    fn places_of_counters() {
        let header = Header { cluster_bits: 16, refcount_order: 4, ..Header::default() };
        assert_eq!(place_of(&header, 0), (0, 0, 0));
        assert_eq!(place_of(&header, 300 << 16), (0, 512, 44));
        assert_eq!(place_of(&header, 32769 << 16), (1, 0, 1));
    }
}
