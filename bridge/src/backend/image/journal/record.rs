//! One record of the journal: a change of the mapping of whole guest clusters.
//!
//! ```text
//!   0   u64  kind (bits 63 to 56), first guest cluster (bits 55 to 0)
//!   8   u64  number of clusters
//!   16  u64  place of the first cluster in the file with the data, in bytes; the others follow it
//!   24  u64  checksum
//! ```
//!
//! All numbers are little-endian: a journal never leaves its host.

/// Size of a record in bytes.
pub(super) const RECORD: usize = 32;
pub(super) const RECORD_BYTES: u64 = RECORD as u64;

const KIND_SHIFT: u32 = 56;
const CLUSTER_MASK: u64 = (1 << KIND_SHIFT) - 1;

/// What happens to the mapping of guest clusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::backend::image) enum Change {
    /// They lie at this offset of the file with the data.
    Map(u64),
    /// They read as zeroes, and their space is free.
    ZeroFree,
    /// They read as zeroes, and their space stays theirs.
    ZeroKeep,
    /// They have no mapping, and their space is free.
    Unmap,
}

/// A change of the mapping of `count` guest clusters from number `first` on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::backend::image) struct Record {
    pub(in crate::backend::image) first: u64,
    pub(in crate::backend::image) count: u64,
    pub(in crate::backend::image) change: Change,
}

/// What binds a record to its place: records of other journals, generations and indexes do not count.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stamp {
    pub(super) nonce: u64,
    pub(super) generation: u64,
    pub(super) index: u64,
}

impl Record {
    /// The record's bytes; None where a number does not fit.
    pub(super) fn encode(self, stamp: Stamp) -> Option<[u8; RECORD]> {
        let (kind, place) = match self.change {
            Change::Map(place) => (1_u64, place),
            Change::ZeroFree => (2, 0),
            Change::ZeroKeep => (3, 0),
            Change::Unmap => (4, 0),
        };
        if self.first > CLUSTER_MASK {
            return None;
        }
        let words = [kind << KIND_SHIFT | self.first, self.count, place];
        let mut bytes = [0; RECORD];
        for (part, word) in bytes.chunks_mut(8).zip(words.into_iter().chain([stamp.checksum(words)])) {
            part.copy_from_slice(&word.to_le_bytes());
        }
        Some(bytes)
    }

    /// The record in these bytes; None where none with this stamp is there.
    pub(super) fn decode(bytes: &[u8], stamp: Stamp) -> Option<Record> {
        let mut words = bytes.as_chunks().0.iter().map(|word| u64::from_le_bytes(*word));
        let body = [words.next()?, words.next()?, words.next()?];
        if words.next()? != stamp.checksum(body) {
            return None;
        }
        let change = match body[0] >> KIND_SHIFT {
            1 => Change::Map(body[2]),
            2 => Change::ZeroFree,
            3 => Change::ZeroKeep,
            4 => Change::Unmap,
            _ => return None,
        };
        Some(Record { first: body[0] & CLUSTER_MASK, count: body[1], change })
    }
}

impl Stamp {
    fn checksum(self, words: [u64; 3]) -> u64 {
        checksum([self.nonce, self.generation, self.index].into_iter().chain(words))
    }
}

/// A checksum of words, against torn and stale bytes; each step is the finalizer of SplitMix64.
pub(super) fn checksum(words: impl Iterator<Item = u64>) -> u64 {
    words.fold(0x9e37_79b9_7f4a_7c15, |sum, word| {
        let mut mixed = sum.rotate_left(23) ^ word;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const STAMP: Stamp = Stamp { nonce: 7, generation: 3, index: 9 };

    #[test]
    fn records_survive_their_bytes() {
        for change in [Change::Map(5 << 20), Change::ZeroFree, Change::ZeroKeep, Change::Unmap] {
            let record = Record { first: CLUSTER_MASK, count: u64::MAX, change };
            let bytes = record.encode(STAMP).unwrap();
            assert_eq!(Record::decode(&bytes, STAMP), Some(record));
        }
        let record = Record { first: CLUSTER_MASK + 1, count: 1, change: Change::Unmap };
        assert_eq!(record.encode(STAMP), None);
    }

    #[test]
    fn damaged_and_stale_records_do_not_count() {
        let record = Record { first: 1, count: 2, change: Change::Map(65536) };
        let bytes = record.encode(STAMP).unwrap();
        for bit in 0..bytes.len() * 8 {
            let mut damaged = bytes;
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(Record::decode(&damaged, STAMP), None, "bit {bit}");
        }
        for len in 0..bytes.len() {
            assert_eq!(Record::decode(&bytes[..len], STAMP), None);
            let mut torn = [0; 32];
            torn[..len].copy_from_slice(&bytes[..len]);
            assert!(torn == bytes || Record::decode(&torn, STAMP).is_none(), "{len} bytes");
        }
        for stale in
            [Stamp { nonce: 8, ..STAMP }, Stamp { generation: 2, ..STAMP }, Stamp { index: 8, ..STAMP }]
        {
            assert_eq!(Record::decode(&bytes, stale), None);
        }
        assert_eq!(Record::decode(&[0; 32], STAMP), None);
    }
}
