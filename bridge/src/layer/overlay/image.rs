//! The form of an overlay's file: a qcow2 image whose tables lie where simple arithmetic finds them. Pure
//! arithmetic and bytes, no I/O.
//!
//! ```text
//!   cluster 0      header (version 3), extensions: backing format, ours; the base's name
//!   l1             entry n = l2 + n * 64 KiB, all written when the file is made
//!   refcount table entry n = refcounts + n * 64 KiB, likewise
//!   refcounts      2 bytes for each cluster: 1 for the ones up to here and the l2 tables, 0 or 1 for data
//!   l2             8 bytes for each block: 0 (the base has it), or data + n * 64 KiB with the COPIED bit
//!   data           block n at n * 64 KiB; sparse
//!   recent         a cluster with the number of this boot, then a byte for each block: see `map`. To qcow2 it
//!                  is free space behind the last cluster
//! ```
//!
//! All numbers are big-endian, all clusters 64 KiB. Our extension says: version, size of the base in bytes, and a
//! checksum of samples of it.

use crate::Result;
use crate::layer::overlay::BLOCK_BYTES;
use crate::{Error, ErrorKind};

const CLUSTER: u64 = BLOCK_BYTES;
const CLUSTER_BITS: u32 = CLUSTER.trailing_zeros();

/// Entries of an L2 or L1 table in one cluster.
const ENTRIES: u64 = CLUSTER / 8;

/// Clusters that a cluster of refcounts counts.
const COUNTED: u64 = CLUSTER / 2;

/// "The refcount is exactly one": in L1 and L2 entries.
const COPIED: u64 = 1 << 63;

const MAGIC: u32 = 0x5146_49fb;
const HEADER_BYTES: u32 = 104;
const EXTENSION_BACKING_FORMAT: u32 = 0xe279_2aca;
/// "nbdb".
const EXTENSION_OURS: u32 = 0x6e62_6462;
const OUR_VERSION: u32 = 1;
const OUR_BYTES: usize = 24;

/// The longest name of a base that qcow2 takes, in bytes.
pub(super) const MAX_NAME: usize = 1023;

/// What is written at the beginning of the recent map, before the number of the boot.
pub(super) const RECENT_MAGIC: &[u8; 16] = b"nbdbridge-recent";

/// The base that an overlay belongs to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Identity {
    /// Bytes.
    pub(super) size: u64,
    /// Checksum of samples.
    pub(super) samples: u64,
}

/// Where everything lies, in bytes. Follows from the number of blocks alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    pub(super) blocks: u64,
    pub(super) l1: u64,
    pub(super) refcount_table: u64,
    pub(super) refcounts: u64,
    pub(super) l2: u64,
    pub(super) data: u64,
    /// The cluster with the number of the boot.
    pub(super) recent_header: u64,
    /// A byte for each block.
    pub(super) recent: u64,
    /// Of the file.
    pub(super) len: u64,
}

impl Layout {
    /// For a base of so many bytes, at most [`super::MAX_BYTES`].
    pub(super) fn new(size: u64) -> Self {
        let blocks = size.div_ceil(CLUSTER);
        let l2_tables = blocks.div_ceil(ENTRIES);
        let l1_clusters = l2_tables.div_ceil(ENTRIES).max(1);
        // The refcounts count themselves: a little more until it is enough.
        let mut refcount_clusters = 1;
        loop {
            let table_clusters = refcount_clusters_of_table(refcount_clusters);
            let all = 1 + l1_clusters + table_clusters + refcount_clusters + l2_tables + blocks;
            let needed = all.div_ceil(COUNTED);
            if needed <= refcount_clusters {
                break;
            }
            refcount_clusters = needed;
        }
        let l1 = CLUSTER;
        let refcount_table = l1 + l1_clusters * CLUSTER;
        let refcounts = refcount_table + refcount_clusters_of_table(refcount_clusters) * CLUSTER;
        let l2 = refcounts + refcount_clusters * CLUSTER;
        let data = l2 + l2_tables * CLUSTER;
        let recent_header = data + blocks * CLUSTER;
        let recent = recent_header + CLUSTER;
        let len = recent + blocks.next_multiple_of(CLUSTER);
        Layout { blocks, l1, refcount_table, refcounts, l2, data, recent_header, recent, len }
    }

    /// The L1 table.
    pub(super) fn l1_entries(&self) -> Vec<u8> {
        entries(self.l2, (self.data - self.l2) / CLUSTER, COPIED)
    }

    /// The refcount table.
    pub(super) fn refcount_entries(&self) -> Vec<u8> {
        entries(self.refcounts, (self.l2 - self.refcounts) / CLUSTER, 0)
    }

    /// Clusters before the data: in use from the beginning.
    pub(super) fn meta_clusters(&self) -> u64 {
        self.data / CLUSTER
    }

    /// Where the refcount of a block's cluster lies.
    pub(super) fn refcount_of(&self, block: u64) -> u64 {
        self.refcounts + (self.data / CLUSTER + block) * 2
    }

    /// The L2 entry of a block that the overlay holds.
    pub(super) fn l2_entry(&self, block: u64) -> u64 {
        (self.data + block * CLUSTER) | COPIED
    }

    /// The first cluster.
    ///
    /// # Errors
    /// A name that is too long.
    pub(super) fn header(&self, base: &Identity, name: &str, format: &str) -> Result<Vec<u8>> {
        if name.len() > MAX_NAME {
            return Err(Error::new(ErrorKind::InvalidInput, "the base's path is too long for an overlay"));
        }
        let mut extensions = Vec::new();
        let mut ours = Vec::with_capacity(OUR_BYTES);
        ours.extend(OUR_VERSION.to_be_bytes());
        ours.extend([0; 4]);
        ours.extend(base.size.to_be_bytes());
        ours.extend(base.samples.to_be_bytes());
        for (kind, data) in
            [(EXTENSION_BACKING_FORMAT, format.as_bytes()), (EXTENSION_OURS, &ours), (0, &[][..])]
        {
            extensions.extend(kind.to_be_bytes());
            extensions.extend(u32::try_from(data.len()).unwrap_or(0).to_be_bytes());
            extensions.extend(data);
            extensions.resize(extensions.len().next_multiple_of(8), 0);
        }
        let name_at = u64::from(HEADER_BYTES) + extensions.len() as u64;
        let mut header = self.fixed_header(base.size);
        header[8..16].copy_from_slice(&name_at.to_be_bytes());
        header[16..20].copy_from_slice(&u32::try_from(name.len()).unwrap_or(0).to_be_bytes());
        header.extend(extensions);
        header.extend(name.as_bytes());
        Ok(header)
    }

    /// The header's fields, but for the base's name. qcow2 counts in sectors: what a last, shorter one lacks reads
    /// as zeroes.
    fn fixed_header(&self, size: u64) -> Vec<u8> {
        let mut header = Vec::new();
        header.extend(MAGIC.to_be_bytes());
        header.extend(3_u32.to_be_bytes());
        header.extend([0; 12]);
        header.extend(CLUSTER_BITS.to_be_bytes());
        header.extend(size.next_multiple_of(512).to_be_bytes());
        header.extend([0; 4]);
        let l2_tables = u32::try_from((self.data - self.l2) / CLUSTER).unwrap_or(u32::MAX);
        header.extend(l2_tables.to_be_bytes());
        header.extend(self.l1.to_be_bytes());
        header.extend(self.refcount_table.to_be_bytes());
        let table = u32::try_from((self.refcounts - self.refcount_table) / CLUSTER).unwrap_or(u32::MAX);
        header.extend(table.to_be_bytes());
        // No snapshots, no features.
        header.extend([0; 4 + 8 + 3 * 8]);
        // Refcounts of 2^4 bits.
        header.extend(4_u32.to_be_bytes());
        header.extend(HEADER_BYTES.to_be_bytes());
        header
    }

    /// Whether a first cluster, with the base's name left aside, is as we wrote it.
    pub(super) fn is_untouched(&self, cluster: &[u8], size: u64) -> bool {
        let ours = self.fixed_header(size);
        let fixed = ours.len();
        cluster.len() > fixed && cluster[..8] == ours[..8] && cluster[20..fixed] == ours[20..]
    }
}

/// The base that a first cluster speaks of; None where it is no overlay of ours.
pub(super) fn identity(cluster: &[u8]) -> Option<Identity> {
    if u32_at(cluster, 0)? != MAGIC {
        return None;
    }
    let mut at = usize::try_from(u32_at(cluster, 100)?).ok()?;
    loop {
        let (kind, len) = (u32_at(cluster, at)?, usize::try_from(u32_at(cluster, at + 4)?).ok()?);
        let data = cluster.get(at + 8..)?.get(..len)?;
        if kind == EXTENSION_OURS {
            let version = u32_at(data, 0)?;
            return (version == OUR_VERSION)
                .then_some(Identity { size: u64_at(data, 8)?, samples: u64_at(data, 16)? });
        }
        if kind == 0 {
            return None;
        }
        // Cannot overflow: the data was found within the cluster.
        at += 8 + len.next_multiple_of(8);
    }
}

/// Whether this is a qcow2 image, of whomever.
pub(super) fn is_qcow2(cluster: &[u8]) -> bool {
    u32_at(cluster, 0) == Some(MAGIC)
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}

/// A big-endian number in a table.
pub(super) fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn refcount_clusters_of_table(refcount_clusters: u64) -> u64 {
    refcount_clusters.div_ceil(ENTRIES)
}

fn entries(first: u64, count: u64, flags: u64) -> Vec<u8> {
    (0..count).flat_map(|n| ((first + n * CLUSTER) | flags).to_be_bytes()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layer::overlay::MAX_BYTES;

    #[test]
    fn every_cluster_is_counted_and_nothing_overlaps() {
        for size in [1, CLUSTER, CLUSTER + 1, 512 << 20, (2 << 30) - CLUSTER, 2 << 30, 3 << 40, MAX_BYTES] {
            let layout = Layout::new(size);
            let Layout { l1, refcount_table, refcounts, l2, data, recent_header, recent, len, .. } = layout;
            let places = [0, l1, refcount_table, refcounts, l2, data, recent_header, recent, len];
            assert!(places.is_sorted() && places.iter().all(|place| place % CLUSTER == 0), "{layout:?}");
            assert!((l2 - refcounts) / 2 >= recent_header / CLUSTER, "{layout:?}");
            assert!((data - l2) / 8 >= layout.blocks && recent + layout.blocks <= len, "{layout:?}");
            assert!(layout.refcount_of(layout.blocks - 1) < l2);
            if size < 1 << 42 {
                assert!(layout.l1_entries().len() as u64 <= refcount_table - l1);
                assert!(layout.refcount_entries().len() as u64 <= refcounts - refcount_table);
            }
        }
    }

    #[test]
    fn headers_are_known_again_and_strange_ones_are_not() {
        let base = Identity { size: (6 << 20) + 77, samples: 0x1234_5678_9abc_def0 };
        let layout = Layout::new(base.size);
        let header = layout.header(&base, "/srv/base.img", "raw").unwrap();
        assert_eq!(identity(&header), Some(base.clone()));
        assert!(layout.is_untouched(&header, base.size) && is_qcow2(&header));
        assert!(!layout.is_untouched(&header, base.size + 512));
        assert!(header.ends_with(b"/srv/base.img"));
        assert!(layout.header(&base, &"x".repeat(MAX_NAME + 1), "raw").is_err());
        for cut in 0..header.len() {
            identity(&header[..cut]);
            layout.is_untouched(&header[..cut], base.size);
            for value in [0, 1, 0x7f, 0xff] {
                let mut other = header.clone();
                other[cut] = value;
                identity(&other);
            }
        }
    }
}
