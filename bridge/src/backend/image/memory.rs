//! Bounds of the memory that the images of a process hold beside the buffers of requests: tables that stay loaded, cached
//! tables, and clusters that are being decompressed. The size of each is decided by the image, thus by a stranger.
//!
//! ```text
//!   open ──hold()──> bytes of L1 and refcount tables and of what is known of other tables; too many: not opened
//!   job ──room()──> a slot (so few jobs load tables at once), and the cache is dropped first if it is full
//!   imago loads or makes a table ──host──> Tables::note
//!   read of a compressed cluster ──decompress()──> permits for all bytes that this takes
//! ```
//!
//! imago caches up to 128 L2 tables and 32 refcount blocks of each image, of up to 2 MiB each, and has no setting
//! for it. What is counted here is what it loaded since its caches were dropped last.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use tokio::sync::{Semaphore, SemaphorePermit};

/// Unit of the permits, in bytes.
const UNIT: u64 = 4096;

/// Tables that every image may hold, whatever its share.
const MIN_TABLES: u64 = 4;

/// Bytes that L1 and refcount tables may take however small the share of images is.
const MIN_HELD: u64 = 1 << 20;

/// Permits of images that were opened without a limit of the process.
const DEFAULT_BYTES: u64 = 64 << 20;

/// The memory of all images that share it. Clones are the same memory.
#[derive(Clone, Debug)]
pub struct ImageMemory(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    /// Most bytes of tables that stay loaded.
    held_limit: u64,
    /// Bytes of tables that stay loaded.
    held: AtomicU64,
    /// Bytes of all cached tables.
    tables: u64,
    /// Number of images that share them.
    images: AtomicU64,
    /// One permit for each unit of the bytes that decompression takes.
    decompression: Semaphore,
    units: u32,
}

impl ImageMemory {
    /// Memory of about twice so many bytes: one half for tables that stay loaded, one quarter for cached tables, one for
    /// decompression.
    pub fn new(bytes: u64) -> Self {
        let units = u32::try_from(bytes / 2 / UNIT).unwrap_or(u32::MAX >> 4).clamp(1, u32::MAX >> 4);
        ImageMemory(Arc::new(Shared {
            held_limit: bytes.max(MIN_HELD),
            held: AtomicU64::new(0),
            tables: bytes / 2,
            images: AtomicU64::new(0),
            decompression: Semaphore::new(usize::try_from(units).unwrap_or(Semaphore::MAX_PERMITS)),
            units,
        }))
    }

    /// Bytes of changed metadata that one image may keep back.
    pub(super) fn kept_bytes(&self) -> u64 {
        self.0.tables / 2
    }

    /// Waits for permission to hold so many bytes; more than all of them count as all.
    pub(super) async fn decompress(&self, bytes: u64) -> Option<SemaphorePermit<'_>> {
        let units = u32::try_from(bytes.div_ceil(UNIT)).unwrap_or(u32::MAX).min(self.0.units);
        // The semaphore is never closed.
        self.0.decompression.acquire_many(units).await.ok()
    }

    /// The count of one image whose layers' tables have `table` bytes together.
    pub(super) fn image(&self, table: u64) -> Tables {
        self.0.images.fetch_add(1, Relaxed);
        let slots = (self.0.tables / table.max(1)).clamp(MIN_TABLES, 1 << 16);
        Tables(Arc::new(ImageTables {
            memory: self.clone(),
            table,
            loaded: AtomicU64::new(0),
            held: AtomicU64::new(0),
            slots: Semaphore::new(usize::try_from(slots).unwrap_or(1)),
        }))
    }
}

impl Default for ImageMemory {
    fn default() -> Self {
        ImageMemory::new(DEFAULT_BYTES)
    }
}

/// The cached tables of one image. Clones are the same count.
#[derive(Clone, Debug)]
pub(super) struct Tables(Arc<ImageTables>);

#[derive(Debug)]
struct ImageTables {
    memory: ImageMemory,
    /// Bytes of one table of each layer.
    table: u64,
    /// Bytes that were loaded since the caches were dropped.
    loaded: AtomicU64,
    /// Bytes of tables that stay loaded.
    held: AtomicU64,
    /// Jobs that may load tables at once.
    slots: Semaphore,
}

impl Tables {
    /// Counts a table that comes into a cache.
    pub(super) fn note(&self, bytes: u64) {
        self.0.loaded.fetch_add(bytes, Relaxed);
    }

    /// Counts `bytes` that stay in memory for as long as the image is open.
    ///
    /// # Errors
    /// The end of a line: all images together may not hold so many. Then nothing is counted.
    pub(super) fn hold(&self, bytes: u64) -> Result<(), String> {
        let shared = &self.0.memory.0;
        let grow = |held: u64| held.checked_add(bytes).filter(|sum| *sum <= shared.held_limit);
        match shared.held.fetch_update(Relaxed, Relaxed, grow) {
            Ok(_) => {
                self.0.held.fetch_add(bytes, Relaxed);
                Ok(())
            }
            Err(held) => Err(format!(
                "its L1 and refcount tables need {} KiB of memory, and {} of the {} KiB for such tables of all images \
                 are left (a quarter of --memory-budget); raise --memory-budget, or make larger clusters with \
                 `qemu-img convert -O qcow2`",
                bytes.div_ceil(1024),
                shared.held_limit.saturating_sub(held) >> 10,
                shared.held_limit >> 10
            )),
        }
    }

    /// Counts `bytes` that an open image has come to hold, though they are too many.
    pub(super) fn hold_more(&self, bytes: u64) {
        self.0.memory.0.held.fetch_add(bytes, Relaxed);
        self.0.held.fetch_add(bytes, Relaxed);
    }

    /// Returns whether the caches hold more than this image's share.
    pub(super) fn are_full(&self) -> bool {
        let share = self.0.memory.0.tables / self.0.memory.0.images.load(Relaxed).max(1);
        self.0.loaded.load(Relaxed) > share.max(MIN_TABLES * self.0.table)
    }

    /// Starts to count anew: the caches are being dropped.
    pub(super) fn reset(&self) {
        self.0.loaded.store(0, Relaxed);
    }

    /// Waits until one more job may load tables.
    pub(super) async fn slot(&self) -> Option<SemaphorePermit<'_>> {
        // The semaphore is never closed.
        self.0.slots.acquire().await.ok()
    }

    pub(super) fn memory(&self) -> &ImageMemory {
        &self.0.memory
    }
}

impl Drop for ImageTables {
    fn drop(&mut self) {
        self.memory.0.images.fetch_sub(1, Relaxed);
        self.memory.0.held.fetch_sub(*self.held.get_mut(), Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_share_the_bytes_of_tables() {
        let memory = ImageMemory::new(64 << 20);
        let one = memory.image(2 << 20);
        one.note(30 << 20);
        assert!(!one.are_full());
        let two = memory.image(1 << 16);
        assert!(one.are_full() && !two.are_full(), "half of it each");
        two.note(17 << 20);
        assert!(two.are_full());
        drop(two);
        assert!(!one.are_full());
        one.note(4 << 20);
        assert!(one.are_full());
        one.reset();
        assert!(!one.are_full());
        assert_eq!(
            (one.0.slots.available_permits(), memory.image(1 << 16).0.slots.available_permits()),
            (16, 512)
        );
    }

    #[test]
    fn what_stays_loaded_is_bounded_over_all_images() {
        let memory = ImageMemory::new(8 << 20);
        let (one, two) = (memory.image(4096), memory.image(4096));
        one.hold(5 << 20).unwrap();
        let line = two.hold(4 << 20).unwrap_err();
        assert!(line.contains("need 4096 KiB") && line.contains("3072 of the 8192 KiB"), "{line}");
        two.hold(3 << 20).unwrap();
        two.hold(1).unwrap_err();
        two.hold(u64::MAX).unwrap_err();
        drop(one);
        two.hold_more(9 << 20);
        two.hold(0).unwrap_err();
        drop(two);
        memory.image(4096).hold(8 << 20).unwrap();
    }

    #[tokio::test]
    async fn decompression_waits_for_bytes() {
        let memory = ImageMemory::new(32 << 20);
        let all = memory.decompress(u64::MAX).await;
        assert_eq!(memory.0.decompression.available_permits(), 0);
        drop(all);
        let some = memory.decompress(10 << 20).await;
        assert_eq!(memory.0.decompression.available_permits(), (6 << 20) / 4096);
        drop(some);
    }
}
