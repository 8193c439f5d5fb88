//! Owned, page-aligned buffers for operations that outlive a poll: what the kernel fills or reads belongs to the
//! operation until it is done. Freed ones wait in a small store of their thread, so that a busy slow path does
//! not go to the allocator.

use std::cell::RefCell;
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// Alignment of every buffer's first byte: enough for O_DIRECT everywhere.
pub const ALIGNMENT: usize = 4096;

/// Smallest and largest size class that is kept, as powers of two: 4 KiB to 1 MiB.
const MIN_CLASS: u32 = 12;
const MAX_CLASS: u32 = 20;

/// Bytes that each thread may keep for reuse.
const KEEP_BYTES: usize = 4 << 20;

/// Bytes that threads may keep beyond that, all together: large requests come to few of them, and new memory for each
/// would cost more than copying its data does.
const SHARED_BYTES: usize = 12 << 20;

/// How much of that is taken.
static SHARED_TAKEN: AtomicUsize = AtomicUsize::new(0);

/// An owned buffer whose content starts page-aligned.
///
/// A new one holds zeroes or the bytes of an earlier request: whoever reads into it must fill all of it.
pub struct Buffer {
    store: Box<[u8]>,
    start: usize,
    len: usize,
}

impl Buffer {
    /// A buffer of `len` bytes.
    pub fn new(len: usize) -> Self {
        let class = class_of(len);
        let store = class
            .and_then(|class| STORE.try_with(|store| store.borrow_mut().take(class)).ok().flatten())
            .unwrap_or_else(|| {
                let capacity = class.map_or(len, |class| 1 << class);
                vec![0; capacity + ALIGNMENT].into_boxed_slice()
            });
        let start = store.as_ptr().align_offset(ALIGNMENT);
        Buffer { store, start, len }
    }

    /// A buffer with a copy of `bytes`.
    pub fn copy_of(bytes: &[u8]) -> Self {
        let mut buffer = Buffer::new(bytes.len());
        buffer.copy_from_slice(bytes);
        buffer
    }

    /// Makes the buffer shorter; a longer length changes nothing.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.store[self.start..self.start + self.len]
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.store[self.start..self.start + self.len]
    }
}

impl std::fmt::Debug for Buffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Buffer({} bytes)", self.len)
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let capacity = self.store.len() - ALIGNMENT.min(self.store.len());
        if let Some(class) = class_of(capacity) {
            let store = std::mem::take(&mut self.store);
            // The thread may be ending: then the buffer is simply freed.
            let _ = STORE.try_with(|keep| keep.borrow_mut().put(class, store));
        }
    }
}

/// The class whose buffers hold `len` bytes; None for a length that is not kept.
fn class_of(len: usize) -> Option<u32> {
    let class = len.max(1).next_power_of_two().trailing_zeros().max(MIN_CLASS);
    (class <= MAX_CLASS).then_some(class)
}

thread_local! {
    static STORE: RefCell<Store> = RefCell::default();
}

#[derive(Default)]
struct Store {
    classes: [Vec<Box<[u8]>>; (MAX_CLASS - MIN_CLASS + 1) as usize],
    bytes: usize,
    /// Bytes of what threads share that this one has taken.
    shared: usize,
}

impl Store {
    fn take(&mut self, class: u32) -> Option<Box<[u8]>> {
        let store = self.classes[(class - MIN_CLASS) as usize].pop()?;
        self.bytes -= 1 << class;
        if self.shared > 0 {
            let spare = self.shared - self.bytes.saturating_sub(KEEP_BYTES);
            self.shared -= spare;
            SHARED_TAKEN.fetch_sub(spare, Relaxed);
        }
        Some(store)
    }

    fn put(&mut self, class: u32, store: Box<[u8]>) {
        let bytes = self.bytes + (1 << class);
        let more = bytes.saturating_sub(KEEP_BYTES + self.shared);
        if more > 0 {
            if SHARED_TAKEN.fetch_add(more, Relaxed) + more > SHARED_BYTES {
                SHARED_TAKEN.fetch_sub(more, Relaxed);
                return;
            }
            self.shared += more;
        }
        self.bytes = bytes;
        self.classes[(class - MIN_CLASS) as usize].push(store);
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        SHARED_TAKEN.fetch_sub(self.shared, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_and_reused() {
        for len in [0, 1, 4096, 4097, 1 << 20, (1 << 20) + 1, 5 << 20] {
            let mut buffer = Buffer::new(len);
            assert_eq!(buffer.len(), len);
            assert_eq!(buffer.as_ptr().addr() % ALIGNMENT, 0);
            buffer.fill(7);
        }
        let first = Buffer::new(8192);
        let place = first.as_ptr();
        drop(first);
        assert_eq!(Buffer::new(5000).as_ptr(), place);
    }

    #[test]
    fn the_store_is_bounded() {
        let fill = || {
            drop((0..64).map(|_| Buffer::new(1 << 20)).collect::<Vec<_>>());
            let (bytes, shared) = STORE.with_borrow(|store| (store.bytes, store.shared));
            assert!(bytes >= KEEP_BYTES && bytes == KEEP_BYTES + shared);
            assert!(SHARED_TAKEN.load(Relaxed) <= SHARED_BYTES);
            shared
        };
        let threads: Vec<_> = (0..4).map(|_| std::thread::spawn(fill)).collect();
        threads.into_iter().for_each(|thread| assert!(thread.join().unwrap() <= SHARED_BYTES));
        // What they had is there again for others.
        let mut shared = fill();
        let begun = std::time::Instant::now();
        while shared == 0 && begun.elapsed().as_secs() < 10 {
            shared = fill();
        }
        assert!(shared > 0);
        STORE.with_borrow_mut(|store| while store.take(MAX_CLASS).is_some() {});
        STORE.with_borrow(|store| assert_eq!((store.bytes, store.shared), (0, 0)));
    }
}
