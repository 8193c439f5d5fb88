//! Writing: in place where the cluster has its own place, else into a new one, which is then mapped.
//!
//! imago says where a new cluster lies and enters it when the data is there. The data itself goes to the file from
//! here, together with what a partly written cluster held before: imago's own copy would go the way of the metadata.

use std::ops::Range;

use super::engine::{Engine, Segment, index};
use super::host::from_io;
use super::journal::Change;
use super::map::Place;
use crate::backend::file::length;
use crate::ranges::Mode;
use crate::{Buffer, Flags, Result};

/// Bytes that are allocated at once, at most; more for larger clusters.
const PIECE: u64 = 1 << 20;

impl Engine {
    /// Stores the buffer, with FUA durably.
    pub(super) async fn write(&self, offset: u64, data: Buffer, flags: Flags) -> Result<()> {
        let durable = flags.contains(Flags::FUA) || self.options.cache.every_write_durable();
        let end = offset + data.len() as u64;
        {
            let _lock = self.ranges.lock(offset, end, Mode::Shared).await;
            if let Some(places) = self.in_place(offset, data.len()).await? {
                // A cluster may be new, and its mapping not durable yet.
                let commit = durable && self.dirty();
                let flags = if durable && !commit { Flags::FUA } else { Flags::NONE };
                self.store(data, places, flags).await?;
                return if commit { self.flush().await } else { Ok(()) };
            }
        }
        {
            let _lock = self.ranges.lock(offset, end, Mode::Exclusive).await;
            self.write_exclusive(offset, &data).await?;
        }
        if durable {
            return self.flush().await;
        }
        self.commit_if_much().await
    }

    /// The parts of the buffer and their places, if all of it has a place of its own.
    async fn in_place(&self, offset: u64, len: usize) -> Result<Option<Vec<(Range<usize>, u8, u64)>>> {
        let mut places = Vec::new();
        let mut at = 0;
        while at < len {
            let (segment, count) = self.resolve(offset + at as u64, (len - at) as u64).await?;
            let Segment::File { file, offset, writable: true } = segment else { return Ok(None) };
            places.push((at..at + index(count), file, offset));
            at += index(count);
        }
        Ok(Some(places))
    }

    async fn store(&self, data: Buffer, places: Vec<(Range<usize>, u8, u64)>, flags: Flags) -> Result<()> {
        if let [(_, file, offset)] = places[..] {
            return self.put(file, offset, data, flags).await;
        }
        for (part, file, offset) in places {
            self.put(file, offset, Buffer::copy_of(&data[part]), flags).await?;
        }
        Ok(())
    }

    /// Stores bytes in a place that was looked up.
    async fn put(&self, file: u8, offset: u64, data: Buffer, flags: Flags) -> Result<()> {
        let _held = self.hold(file, offset, data.len() as u64).await?;
        self.file(file).write(offset, data, flags).await
    }

    /// Stores bytes for whoever holds an exclusive lock on the range.
    pub(super) async fn write_exclusive(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.shared.map.forget(offset, bytes.len() as u64);
        let mut at = 0;
        while at < bytes.len() {
            let place = offset + at as u64;
            let (segment, count) = self.look(place, (bytes.len() - at) as u64).await?;
            let part = &bytes[at..at + index(count)];
            at += match segment {
                Segment::File { file, offset, writable: true } => {
                    self.put(file, offset, Buffer::copy_of(part), Flags::NONE).await?;
                    part.len()
                }
                Segment::Special | Segment::File { .. } | Segment::Zero { .. } => {
                    self.allocate(place, part).await?
                }
            };
        }
        Ok(())
    }

    /// Stores the start of `bytes` in new clusters, and says how many it stored.
    async fn allocate(&self, offset: u64, bytes: &[u8]) -> Result<usize> {
        let _permit = self.allocations.acquire().await;
        let first = offset - offset % self.cluster;
        let stop = (offset + bytes.len() as u64).min(first + PIECE.max(self.cluster));
        let last = stop.next_multiple_of(self.cluster).min(self.image.size());
        // Before imago locks the table: a compressed cluster is read under that lock, too.
        let head = self.before(first..offset).await?;
        let tail = self.before(stop..last).await?;

        let _table = self.l2_tables.lock(first, first + 1, Mode::Exclusive).await;
        let (pass, prepared) = loop {
            let pass = self.gate.read().await;
            let looking = self.freeing.read().await;
            if self.has_freed() || self.is_journal_full() {
                drop(looking);
                drop(pass);
                self.commit().await?;
                continue;
            }
            self.set_dirty();
            let prepared = self
                .image
                .prepare_data_mapping(first, last - first, true)
                .await
                .map_err(|error| from_io(&error))?;
            if !self.has_freed() {
                break (pass, prepared);
            }
            // This allocation itself, or a table that moved for it, has freed clusters: these may be among them.
            drop(prepared);
            drop(looking);
            drop(pass);
        };
        let (file, place) = (prepared.storage().number(), prepared.offset());
        let end = first + prepared.length();
        self.check_new_place(file, place, place + (end - first))?;
        if end == self.image.size() && !end.is_multiple_of(self.cluster) {
            // What imago has copied into the last cluster, to its end past the disk's, would go the way of metadata,
            // and overwrite what comes here.
            let (start, stop) = (place + (end - first) / self.cluster * self.cluster, place + (end - first));
            self.data().take_back(start, stop.next_multiple_of(self.cluster));
            self.zero_place(stop, stop.next_multiple_of(self.cluster) - stop).await?;
        }
        let stop = stop.min(end);
        // Cut short, it ends with a whole cluster.
        let tail = if end == last { tail } else { Before::Zeroes(stop..stop) };

        let bytes = &bytes[..index(stop - offset)];
        let at = |offset: u64| place + (offset - first);
        let (start, store) = match (head, tail) {
            (Before::Zeroes(head), Before::Zeroes(tail)) => {
                for range in [head, tail] {
                    self.zero_place(at(range.start), range.end - range.start).await?;
                }
                (offset, Buffer::copy_of(bytes))
            }
            (head, tail) => {
                let mut store = Buffer::new(index(end - first));
                let (front, rest) = store.split_at_mut(index(offset - first));
                let (middle, back) = rest.split_at_mut(bytes.len());
                head.copy_to(front);
                middle.copy_from_slice(bytes);
                tail.copy_to(back);
                (first, store)
            }
        };
        self.file(file).write(at(start), store, Flags::NONE).await?;
        {
            let _freeing = self.freeing.write().await;
            self.image.commit_data_mapping(prepared).await.map_err(|error| from_io(&error))?;
        }
        self.note(first, end - first, Change::Map(place)).await;
        self.publish(first, end - first, Place::File { file, offset: place, writable: true });
        drop(pass);
        Ok(bytes.len())
    }

    /// What a range holds before it is written.
    async fn before(&self, range: Range<u64>) -> Result<Before> {
        let len = range.end - range.start;
        if self.is_zero(range.start, len).await? {
            return Ok(Before::Zeroes(range));
        }
        self.read_locked(range.start, Buffer::new(index(len)), false).await.map(Before::Bytes)
    }

    /// Makes part of a new cluster read as zeroes; past the end of the file it does.
    async fn zero_place(&self, offset: u64, len: u64) -> Result<()> {
        let past_end = || {
            let plain = self.shared.data_descriptor.as_ref();
            plain.is_some_and(|file| length(file).is_ok_and(|length| length <= offset))
        };
        if len == 0 || past_end() {
            return Ok(());
        }
        self.data().file().write_zeroes(offset, len, Flags::NONE).await
    }
}

/// What was in the part of a cluster that is not written.
enum Before {
    Zeroes(Range<u64>),
    Bytes(Buffer),
}

impl Before {
    fn copy_to(&self, part: &mut [u8]) {
        match self {
            Before::Zeroes(_) => part.fill(0),
            Before::Bytes(bytes) => part.copy_from_slice(bytes),
        }
    }
}
