//! A disk in memory: sparse, gone when the process ends.
//!
//! Space is taken in chunks, at the first write that is not all zeroes, so that a disk of 1 TiB costs nothing
//! until it is written. Every operation is answered inline, whatever its size; locks are held for the copy of
//! one chunk, so a request over several chunks is not atomic towards another one that overlaps it (no block
//! device promises that).

use std::collections::BTreeMap;
use std::future::ready;
use std::sync::atomic::{AtomicU64, Ordering::Acquire, Ordering::Release};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use crate::extent::{MAX_EXTENTS, push_extent};
use crate::zero::is_zero;
use crate::{
    Backend, Buffer, Capabilities, Error, ErrorKind, Extent, ExtentKind, Flags, Geometry, LocalFuture, Result,
};

/// The unit of allocation and of block status, in bytes.
pub const CHUNK_BYTES: u64 = 64 << 10;

/// Locks; neighbouring chunks have different ones.
const SHARDS: u64 = 64;

/// A sparse disk in memory.
pub struct MemoryBackend {
    size: AtomicU64,
    /// How often it has grown.
    version: AtomicU64,
    min_block: u32,
    /// What it does not let on that it can do.
    lacks: Capabilities,
    shards: Box<[Shard]>,
}

type Chunks = BTreeMap<u64, Chunk>;

/// Aligned so that no two locks share a cache line.
#[derive(Default)]
#[repr(align(64))]
struct Shard(RwLock<Chunks>);

/// One allocated chunk.
struct Chunk {
    bytes: Box<[u8]>,
    /// Known to hold nothing but zeroes: it was zeroed whole, and its space was to be kept.
    zero: bool,
}

impl MemoryBackend {
    /// A disk of `size` bytes, all holes.
    pub fn new(size: u64) -> Self {
        MemoryBackend {
            size: AtomicU64::new(size),
            version: AtomicU64::new(0),
            min_block: 1,
            lacks: Capabilities::NONE,
            shards: (0..SHARDS).map(|_| Shard::default()).collect(),
        }
    }

    /// The same as a source that takes only whole blocks of this size, and lacks some capabilities, as remote disks do.
    #[must_use]
    pub fn posing_as(self, min_block: u32, lacks: Capabilities) -> Self {
        MemoryBackend { min_block, lacks, ..self }
    }

    /// Bytes that are allocated now, in whole chunks.
    pub fn allocated_bytes(&self) -> u64 {
        self.shards.iter().map(|shard| shard.read().len() as u64 * CHUNK_BYTES).sum()
    }

    fn size(&self) -> u64 {
        self.size.load(Acquire)
    }

    fn shard(&self, index: u64) -> &Shard {
        &self.shards[(index % SHARDS) as usize]
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) {
        debug_assert!(offset + buf.len() as u64 <= self.size());
        let mut rest = buf;
        for piece in pieces(offset, rest.len() as u64) {
            let (part, after) = rest.split_at_mut(piece.len);
            match self.shard(piece.index).read().get(&piece.index) {
                Some(chunk) => part.copy_from_slice(&chunk.bytes[piece.start..][..piece.len]),
                None => part.fill(0),
            }
            rest = after;
        }
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> Result<()> {
        debug_assert!(offset + data.len() as u64 <= self.size());
        let mut rest = data;
        for piece in pieces(offset, rest.len() as u64) {
            let (part, after) = rest.split_at(piece.len);
            let mut chunks = self.shard(piece.index).write();
            match chunks.get_mut(&piece.index) {
                Some(chunk) => {
                    chunk.bytes[piece.start..][..piece.len].copy_from_slice(part);
                    chunk.zero = false;
                }
                None if is_zero(part) => {}
                None => {
                    chunks.insert(piece.index, Chunk { bytes: new_chunk(piece.start, part)?, zero: false });
                }
            }
            rest = after;
        }
        Ok(())
    }

    /// Makes the range read as zeroes. Whole chunks are freed, unless `keep` asks for their space to stay.
    fn clear(&self, offset: u64, len: u64, keep: bool) {
        debug_assert!(offset + len <= self.size());
        for (index, _) in self.allocated(offset, len) {
            let chunk_start = index * CHUNK_BYTES;
            let from = offset.max(chunk_start) - chunk_start;
            let mut chunks = self.shard(index).write();
            // The last chunk of the disk is whole where the disk ends. That is looked up under the lock: once the
            // disk has grown, the rest of the chunk can hold data.
            let chunk_end = CHUNK_BYTES.min(self.size() - chunk_start);
            let to = (offset + len - chunk_start).min(chunk_end);
            let whole = from == 0 && to == chunk_end;
            if whole && !keep {
                chunks.remove(&index);
            } else if let Some(chunk) = chunks.get_mut(&index) {
                let range = (from % CHUNK_BYTES) as usize..within_chunk(to);
                chunk.bytes[range].fill(0);
                chunk.zero |= whole;
            }
        }
    }

    /// The allocated chunks that the range touches, in order, and whether each is known to hold only zeroes.
    fn allocated(&self, offset: u64, len: u64) -> Vec<(u64, bool)> {
        let range = offset / CHUNK_BYTES..(offset + len).div_ceil(CHUNK_BYTES);
        let mut found = Vec::new();
        if range.end - range.start < SHARDS {
            found.extend(
                range.filter_map(|index| {
                    self.shard(index).read().get(&index).map(|chunk| (index, chunk.zero))
                }),
            );
        } else {
            for shard in &self.shards {
                found.extend(shard.read().range(range.clone()).map(|(index, chunk)| (*index, chunk.zero)));
            }
            found.sort_unstable();
        }
        found
    }

    fn status(&self, offset: u64, len: u64, most: usize) -> Vec<Extent> {
        let end = offset + len;
        let (mut at, mut extents) = (offset, Vec::new());
        for (index, zero) in self.allocated(offset, len) {
            let start = at.max(index * CHUNK_BYTES);
            push_extent(&mut extents, start - at, ExtentKind::Hole);
            // Not multiplied: the end of the last chunk can lie beyond 2^64.
            at = start.saturating_add(CHUNK_BYTES - start % CHUNK_BYTES).min(end);
            push_extent(&mut extents, at - start, if zero { ExtentKind::Zero } else { ExtentKind::Data });
            if extents.len() > most {
                extents.truncate(most);
                return extents;
            }
        }
        push_extent(&mut extents, end - at, ExtentKind::Hole);
        extents.truncate(most);
        extents
    }
}

impl Backend for MemoryBackend {
    fn geometry(&self) -> Geometry {
        Geometry {
            version: self.version.load(Acquire),
            size: self.size(),
            min_block: self.min_block,
            preferred_block: 4096,
            capabilities: (Capabilities::FLUSH
                | Capabilities::FUA
                | Capabilities::TRIM
                | Capabilities::WRITE_ZEROES
                | Capabilities::FAST_ZERO
                | Capabilities::CACHE
                | Capabilities::MULTI_CONN
                | Capabilities::GROW)
                .without(self.lacks),
        }
    }

    fn try_read(&self, offset: u64, buf: &mut [u8], _flags: Flags) -> Option<Result<()>> {
        self.read_at(offset, buf);
        Some(Ok(()))
    }

    fn try_write(&self, offset: u64, data: &[u8], _flags: Flags) -> Option<Result<()>> {
        Some(self.write_at(offset, data))
    }

    fn read(&self, offset: u64, mut buf: Buffer, _flags: Flags) -> LocalFuture<'_, Result<Buffer>> {
        self.read_at(offset, &mut buf);
        Box::pin(ready(Ok(buf)))
    }

    fn write(&self, offset: u64, data: Buffer, _flags: Flags) -> LocalFuture<'_, Result<()>> {
        Box::pin(ready(self.write_at(offset, &data)))
    }

    fn flush(&self) -> LocalFuture<'_, Result<()>> {
        Box::pin(ready(Ok(())))
    }

    fn trim(&self, offset: u64, len: u64, _flags: Flags) -> LocalFuture<'_, Result<()>> {
        self.clear(offset, len, false);
        Box::pin(ready(Ok(())))
    }

    /// `NO_HOLE` keeps what is allocated, but allocates nothing: a hole stays one.
    fn write_zeroes(&self, offset: u64, len: u64, flags: Flags) -> LocalFuture<'_, Result<()>> {
        self.clear(offset, len, flags.contains(Flags::NO_HOLE));
        Box::pin(ready(Ok(())))
    }

    fn cache(&self, _offset: u64, _len: u64) -> LocalFuture<'_, Result<()>> {
        Box::pin(ready(Ok(())))
    }

    fn block_status(&self, offset: u64, len: u64, flags: Flags) -> LocalFuture<'_, Result<Vec<Extent>>> {
        let most = if flags.contains(Flags::REQ_ONE) { 1 } else { MAX_EXTENTS };
        Box::pin(ready(Ok(self.status(offset, len, most))))
    }

    /// Past the old end there is nothing but zeroes, also in the last chunk.
    fn grow(&self, size: u64) -> LocalFuture<'_, Result<()>> {
        debug_assert!(size > self.size());
        self.size.store(size, Release);
        self.version.fetch_add(1, Release);
        Box::pin(ready(Ok(())))
    }

    fn allocated(&self) -> Option<u64> {
        Some(self.allocated_bytes())
    }
}

impl Shard {
    // A thread that panics while it copies leaves nothing half-done that matters: poison is ignored.

    fn read(&self) -> RwLockReadGuard<'_, Chunks> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Chunks> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The part of a range that lies in one chunk.
struct Piece {
    index: u64,
    start: usize,
    len: usize,
}

fn pieces(offset: u64, len: u64) -> impl Iterator<Item = Piece> {
    let (mut at, mut left) = (offset, len);
    std::iter::from_fn(move || {
        if left == 0 {
            return None;
        }
        let start = at % CHUNK_BYTES;
        let len = left.min(CHUNK_BYTES - start);
        let piece = Piece { index: at / CHUNK_BYTES, start: within_chunk(start), len: within_chunk(len) };
        at += len;
        left -= len;
        Some(piece)
    })
}

/// A number of bytes that is at most a chunk, as an index.
fn within_chunk(bytes: u64) -> usize {
    debug_assert!(bytes <= CHUNK_BYTES);
    (bytes % (CHUNK_BYTES + 1)) as usize
}

/// A chunk that holds `part` at `start`, and zeroes around it.
fn new_chunk(start: usize, part: &[u8]) -> Result<Box<[u8]>> {
    let len = within_chunk(CHUNK_BYTES);
    let mut bytes = Vec::new();
    bytes.try_reserve_exact(len).map_err(|_| Error::new(ErrorKind::NoMemory, "no memory for a new chunk"))?;
    bytes.resize(start, 0);
    bytes.extend_from_slice(part);
    bytes.resize(len, 0);
    Ok(bytes.into_boxed_slice())
}

#[cfg(test)]
mod tests {
    use super::*;

    const C: u64 = CHUNK_BYTES;

    fn write(disk: &MemoryBackend, offset: u64, data: &[u8]) {
        disk.try_write(offset, data, Flags::NONE).unwrap().unwrap();
    }

    fn extents(disk: &MemoryBackend, offset: u64, len: u64) -> Vec<(u64, ExtentKind)> {
        disk.status(offset, len, MAX_EXTENTS).iter().map(|extent| (extent.len, extent.kind)).collect()
    }

    #[test]
    fn space_is_taken_by_data_and_given_back() {
        let disk = MemoryBackend::new(1 << 40);
        assert_eq!(disk.allocated_bytes(), 0);
        write(&disk, 5 * C - 1, &[0; 100]);
        assert_eq!(disk.allocated_bytes(), 0, "zeroes need no space");
        write(&disk, 5 * C - 1, &[1, 2]);
        write(&disk, (1 << 40) - 1, &[3]);
        assert_eq!(disk.allocated_bytes(), 3 * C);
        disk.clear(0, 1 << 40, true);
        assert_eq!(disk.allocated_bytes(), 3 * C);
        assert_eq!(extents(&disk, 0, 6 * C), [(4 * C, ExtentKind::Hole), (2 * C, ExtentKind::Zero)]);
        write(&disk, 5 * C, &[9]);
        disk.clear(4 * C + 1, C, false);
        assert_eq!(disk.allocated_bytes(), 3 * C, "no whole chunk in it");
        let mut byte = [7];
        disk.read_at(5 * C, &mut byte);
        assert_eq!(byte, [0]);
        disk.clear(4 * C, C, false);
        assert_eq!(
            extents(&disk, 10, 6 * C),
            [(5 * C - 10, ExtentKind::Hole), (C, ExtentKind::Data), (10, ExtentKind::Hole)]
        );
        disk.clear(0, 1 << 40, false);
        assert_eq!(disk.allocated_bytes(), 0);
    }

    #[test]
    fn the_last_chunk_is_whole_where_the_disk_ends() {
        let disk = MemoryBackend::new(C + 100);
        write(&disk, C + 99, &[1]);
        disk.clear(C, 100, false);
        assert_eq!(disk.allocated_bytes(), 0);
        let largest = MemoryBackend::new(u64::MAX);
        write(&largest, u64::MAX - 1, &[1]);
        assert_eq!(extents(&largest, u64::MAX - 10, 10), [(10, ExtentKind::Data)]);
        assert_eq!(extents(&largest, 0, u64::MAX).len(), 2);
        largest.clear(0, u64::MAX, false);
        assert_eq!(largest.allocated_bytes(), 0);
    }

    #[test]
    fn what_grows_has_zeroes_there() {
        let disk = MemoryBackend::new(C + 100);
        write(&disk, C, &[1; 100]);
        drop(disk.grow(3 * C));
        assert_eq!((disk.geometry().size, disk.geometry().version), (3 * C, 1));
        let mut bytes = [7; 200];
        disk.read_at(C, &mut bytes);
        assert_eq!((&bytes[..100], &bytes[100..]), (&[1; 100][..], &[0; 100][..]));
        // The chunk is no longer whole where the disk ended.
        write(&disk, C + 100, &[2]);
        disk.clear(C, 100, false);
        disk.read_at(C + 99, &mut bytes);
        assert_eq!(bytes[..3], [0, 2, 0]);
    }

    #[test]
    fn the_list_of_extents_is_bounded() {
        let disk = MemoryBackend::new(C * 20_000);
        for n in 0..MAX_EXTENTS as u64 {
            write(&disk, 2 * n * C, &[1]);
        }
        let all = disk.status(0, C * 20_000, MAX_EXTENTS);
        assert_eq!(all.len(), MAX_EXTENTS);
        assert_eq!(disk.status(C, C * 20_000 - C, 1), [Extent { len: C, kind: ExtentKind::Hole }]);
    }
}
