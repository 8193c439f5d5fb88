//! An editor of a qcow2 image's L1, L2 and refcount tables, for changes whose data is in the file already.
//!
//! It works on blocks of 512 bytes in memory. [`Tables::finish`] keeps the changed ones back in [`Host`], from where a
//! commit brings them to the file in the order that no crash can turn into corruption. New tables come behind
//! everything else in the file: no space is used that anything could still name.

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use super::header::Header;
use super::host::{BLOCK, BlockBytes, Host};
use super::journal::Change;
use super::places::{L1_MASK, REFTABLE_MASK};
use super::refcounts;

/// QCOW_OFLAG_COPIED, QCOW_OFLAG_COMPRESSED, QCOW_OFLAG_ZERO.
const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
const ZERO: u64 = 1;

/// Largest refcount table in bytes (QCOW_MAX_REFTABLE_SIZE).
const MAX_REFTABLE_BYTES: u64 = 8 << 20;

/// The tables of one image.
pub(super) struct Tables<'a> {
    host: &'a Host,
    header: Header,
    blocks: BTreeMap<u64, Box<BlockBytes>>,
    changed: BTreeSet<u64>,
    /// Where the next new table comes.
    end: u64,
    /// New clusters that no refcount counts yet.
    uncounted: Vec<u64>,
}

impl<'a> Tables<'a> {
    /// An editor that puts new tables behind `end` and behind every cluster that is in use.
    ///
    /// # Errors
    /// The file's.
    pub(super) async fn load(host: &'a Host, header: Header, end: u64) -> io::Result<Self> {
        let end = end.next_multiple_of(header.cluster_size());
        let (blocks, changed, uncounted) = (BTreeMap::new(), BTreeSet::new(), Vec::new());
        let mut tables = Tables { host, header, blocks, changed, end, uncounted };
        tables.end = end.max(tables.end_of_use().await?);
        Ok(tables)
    }

    /// The end of the last cluster with a refcount.
    async fn end_of_use(&mut self) -> io::Result<u64> {
        let (cluster, order) = (self.header.cluster_size(), self.header.refcount_order);
        let per_part = (BLOCK * 8) >> order;
        for number in (0..self.refcount_blocks()).rev() {
            let Some(block) = self.refcount_block(number).await? else { continue };
            for part in (0..cluster / BLOCK).rev() {
                let bytes = self.block(block + part * BLOCK).await?;
                let last =
                    (0..per_part).rev().find(|counter| refcounts::refcount(bytes, *counter, order) > 0);
                if let Some(counter) = last {
                    let counters = number * (cluster / BLOCK) + part;
                    return Ok((counters * per_part + counter + 1) * cluster);
                }
            }
        }
        Ok(0)
    }

    /// Changes the mapping of a guest cluster; for [`Change::Map`] to the place that is given there.
    ///
    /// # Errors
    /// The file's, or that a table names a place where none can be.
    pub(super) async fn change(&mut self, guest: u64, change: Change) -> io::Result<()> {
        let per_table = self.header.cluster_size() / 8;
        let index = guest / per_table;
        if index >= u64::from(self.header.l1_entries) {
            return Err(malformed("a change past the end of the disk"));
        }
        let pointer = self.header.l1_offset + index * 8;
        let Some(table) = self.own_table(pointer, change).await? else { return Ok(()) };
        let at = table + guest % per_table * 8;
        let old = self.word(at).await?;
        let plain = old & COMPRESSED == 0;
        let new = match change {
            Change::Map(place) => place | COPIED,
            Change::ZeroFree => ZERO,
            Change::ZeroKeep if plain => old | ZERO,
            Change::ZeroKeep => ZERO,
            Change::Unmap => 0,
        };
        self.set_word(at, new).await?;
        if self.header.external_data() {
            return Ok(());
        }
        if let Change::Map(place) = change {
            self.count(place).await?;
        }
        let kept = if new & COMPRESSED == 0 { new & L1_MASK } else { 0 };
        for cluster in self.clusters_of(old) {
            if cluster != kept {
                self.release(cluster).await?;
            }
        }
        Ok(())
    }

    /// The L2 table behind a pointer, as one that belongs to the active disk alone; None where the change needs none.
    async fn own_table(&mut self, pointer: u64, change: Change) -> io::Result<Option<u64>> {
        let old = self.word(pointer).await?;
        let table = old & L1_MASK;
        if table != 0 && old & COPIED != 0 {
            return Ok(Some(table));
        }
        if table == 0 && change == Change::Unmap {
            return Ok(None);
        }
        let new = self.append(1);
        for part in (0..self.header.cluster_size()).step_by(index(BLOCK)) {
            let content = if table == 0 { [0; 512] } else { *self.block(table + part).await? };
            self.put_block(new + part, content);
        }
        self.set_word(pointer, new | COPIED).await?;
        if table != 0 {
            self.release(table).await?;
        }
        Ok(Some(new))
    }

    /// The clusters that an L2 entry keeps.
    fn clusters_of(&self, entry: u64) -> Vec<u64> {
        let cluster = self.header.cluster_size();
        if entry & COMPRESSED == 0 {
            let place = entry & L1_MASK;
            return if place == 0 { Vec::new() } else { vec![place] };
        }
        // The number of sectors besides the first one comes above the offset.
        let shift = 62 - (self.header.cluster_bits - 8);
        let place = entry & ((1 << shift) - 1);
        let sectors = (entry & !(COPIED | COMPRESSED)) >> shift;
        let end = (place / 512 + sectors + 1) * 512;
        (place / cluster * cluster..end).step_by(index(cluster)).collect()
    }

    /// The refcount of a cluster.
    ///
    /// # Errors
    /// The file's.
    pub(super) async fn refcount(&mut self, cluster: u64) -> io::Result<u64> {
        let (number, place, counter) = refcounts::place_of(&self.header, cluster);
        let Some(block) = self.refcount_block(number).await? else { return Ok(0) };
        let order = self.header.refcount_order;
        Ok(refcounts::refcount(&self.block(block + place).await?[..], counter, order))
    }

    /// Has a cluster counted once, if it is not counted.
    async fn count(&mut self, cluster: u64) -> io::Result<()> {
        if self.refcount(cluster).await? == 0 {
            let (number, ..) = refcounts::place_of(&self.header, cluster);
            if number >= self.refcount_blocks() {
                self.grow_refcount_table(number + 1).await?;
            }
            if self.refcount_block(number).await?.is_none() {
                let new = self.append(1);
                for part in (0..self.header.cluster_size()).step_by(index(BLOCK)) {
                    self.put_block(new + part, [0; 512]);
                }
                self.set_word(self.header.reftable_offset + number * 8, new).await?;
            }
            self.set_refcount(cluster, 1).await?;
        }
        Ok(())
    }

    /// Has a cluster counted once less.
    async fn release(&mut self, cluster: u64) -> io::Result<()> {
        match self.refcount(cluster).await? {
            0 => Ok(()),
            count => self.set_refcount(cluster, count - 1).await,
        }
    }

    async fn set_refcount(&mut self, cluster: u64, count: u64) -> io::Result<()> {
        let (number, place, counter) = refcounts::place_of(&self.header, cluster);
        let Some(block) = self.refcount_block(number).await? else {
            return Err(malformed("no refcount block where there was one"));
        };
        let order = self.header.refcount_order;
        let mut bytes = *self.block(block + place).await?;
        refcounts::set_refcount(&mut bytes[..], counter, order, count);
        self.put_block(block + place, bytes);
        Ok(())
    }

    fn refcount_blocks(&self) -> u64 {
        u64::from(self.header.reftable_clusters) * self.header.cluster_size() / 8
    }

    async fn refcount_block(&mut self, number: u64) -> io::Result<Option<u64>> {
        if number >= self.refcount_blocks() {
            return Ok(None);
        }
        let block = self.word(self.header.reftable_offset + number * 8).await? & REFTABLE_MASK;
        Ok((block != 0).then_some(block))
    }

    /// Moves the refcount table to a place where it has `blocks` entries at least.
    async fn grow_refcount_table(&mut self, blocks: u64) -> io::Result<()> {
        let cluster = self.header.cluster_size();
        let old = (self.header.reftable_offset, u64::from(self.header.reftable_clusters));
        // Twice as much as before, so that this is done seldom.
        let clusters = (blocks * 8).div_ceil(cluster).max(old.1 * 2);
        let number = u32::try_from(clusters).ok().filter(|_| clusters * cluster <= MAX_REFTABLE_BYTES);
        let number = number.ok_or_else(|| malformed("a refcount table that cannot grow"))?;
        let new = self.append(clusters);
        for part in (0..clusters * cluster).step_by(index(BLOCK)) {
            let inside = part < old.1 * cluster;
            let content = if inside { *self.block(old.0 + part).await? } else { [0; 512] };
            self.put_block(new + part, content);
        }
        self.set_word(48, new).await?;
        let rest = self.word(56).await? & u64::from(u32::MAX);
        self.set_word(56, u64::from(number) << 32 | rest).await?;
        (self.header.reftable_offset, self.header.reftable_clusters) = (new, number);
        for n in 0..old.1 {
            self.release(old.0 + n * cluster).await?;
        }
        Ok(())
    }

    /// Takes new clusters behind everything else.
    fn append(&mut self, clusters: u64) -> u64 {
        let at = self.end;
        let cluster = self.header.cluster_size();
        self.end += clusters * cluster;
        self.uncounted.extend((0..clusters).map(|n| at + n * cluster));
        at
    }

    /// Keeps all changes back in the host.
    ///
    /// # Errors
    /// The file's.
    pub(super) async fn finish(mut self) -> io::Result<()> {
        // Counting a new cluster may need new ones.
        while let Some(cluster) = self.uncounted.pop() {
            self.count(cluster).await?;
        }
        self.blocks.retain(|number, _| self.changed.contains(number));
        self.host.keep_blocks(self.blocks, self.end);
        Ok(())
    }

    async fn word(&mut self, at: u64) -> io::Result<u64> {
        let within = index(at % BLOCK);
        let block = self.block(at - at % BLOCK).await?;
        let bytes = block.get(within..within + 8).and_then(|bytes| bytes.try_into().ok());
        bytes.map(u64::from_be_bytes).ok_or_else(|| malformed("an entry that is not aligned"))
    }

    async fn set_word(&mut self, at: u64, word: u64) -> io::Result<()> {
        let within = index(at % BLOCK);
        let mut block = *self.block(at - at % BLOCK).await?;
        block[within..within + 8].copy_from_slice(&word.to_be_bytes());
        self.put_block(at - at % BLOCK, block);
        Ok(())
    }

    async fn block(&mut self, at: u64) -> io::Result<&BlockBytes> {
        let number = at / BLOCK;
        if !at.is_multiple_of(BLOCK) || at >= 1 << 56 {
            return Err(malformed("a table where none can be"));
        }
        if !self.blocks.contains_key(&number) {
            let bytes = self.host.read(at, index(BLOCK)).await?;
            let block = Box::new(<BlockBytes>::try_from(&bytes[..]).map_err(io::Error::other)?);
            self.blocks.insert(number, block);
        }
        self.blocks.get(&number).map(|block| &**block).ok_or_else(|| malformed("no block"))
    }

    fn put_block(&mut self, at: u64, block: BlockBytes) {
        self.blocks.insert(at / BLOCK, Box::new(block));
        self.changed.insert(at / BLOCK);
    }
}

fn malformed(what: &str) -> io::Error {
    io::Error::other(format!("the image is malformed: {what}"))
}

fn index(number: u64) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}
