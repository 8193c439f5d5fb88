//! What the conformance suite, the model and the crash tests do not see: which side a request goes to, what is refused
//! when a file is opened, and what the counters of `qemu:allocation-depth` are.

use std::sync::Mutex;

use tokio::runtime::{Builder, LocalOptions};

use super::*;
use crate::ExtentKind;
use crate::backend::memory::MemoryBackend;

const B: u64 = BLOCK_BYTES;
const BLOCK: usize = 64 << 10;
const SIZE: u64 = 10 * B + 77;

fn run<T>(future: impl Future<Output = T>) -> T {
    Builder::new_current_thread().enable_all().build_local(LocalOptions::default()).unwrap().block_on(future)
}

/// Lets others see and change what an overlay owns.
#[derive(Clone)]
struct Watched {
    disk: Arc<MemoryBackend>,
    /// What was read and written: (is a write, offset, length).
    seen: Arc<Mutex<Vec<(bool, u64, u64)>>>,
}

impl Watched {
    fn new(size: u64) -> Self {
        Watched { disk: Arc::new(MemoryBackend::new(size)), seen: Arc::default() }
    }

    /// The same content, watched anew.
    fn copy(&self) -> Self {
        let copy = Watched::new(self.disk.geometry().size);
        copy.put(0, &self.get(0, usize::try_from(copy.disk.geometry().size).unwrap()));
        copy
    }

    fn get(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.disk.try_read(offset, &mut bytes, Flags::NONE).unwrap().unwrap();
        bytes
    }

    fn put(&self, offset: u64, bytes: &[u8]) {
        self.disk.try_write(offset, bytes, Flags::NONE).unwrap().unwrap();
    }

    fn boxed(&self) -> Box<dyn Backend> {
        Box::new(self.clone())
    }

    fn note(&self, write: bool, offset: u64, len: usize) {
        self.seen.lock().unwrap().push((write, offset, len as u64));
    }

    fn take_seen(&self) -> Vec<(bool, u64, u64)> {
        std::mem::take(&mut self.seen.lock().unwrap())
    }
}

impl Backend for Watched {
    fn geometry(&self) -> Geometry {
        self.disk.geometry()
    }
    fn try_read(&self, offset: u64, buf: &mut [u8], flags: Flags) -> Option<Result<()>> {
        self.note(false, offset, buf.len());
        self.disk.try_read(offset, buf, flags)
    }
    fn try_write(&self, offset: u64, data: &[u8], flags: Flags) -> Option<Result<()>> {
        self.note(true, offset, data.len());
        self.disk.try_write(offset, data, flags)
    }
    fn read(&self, offset: u64, buf: Buffer, flags: Flags) -> LocalFuture<'_, Result<Buffer>> {
        self.note(false, offset, buf.len());
        self.disk.read(offset, buf, flags)
    }
    fn write(&self, offset: u64, data: Buffer, flags: Flags) -> LocalFuture<'_, Result<()>> {
        self.note(true, offset, data.len());
        self.disk.write(offset, data, flags)
    }
    fn flush(&self) -> LocalFuture<'_, Result<()>> {
        self.disk.flush()
    }
    fn trim(&self, offset: u64, len: u64, flags: Flags) -> LocalFuture<'_, Result<()>> {
        self.note(true, offset, usize::try_from(len).unwrap());
        self.disk.trim(offset, len, flags)
    }
    fn write_zeroes(&self, offset: u64, len: u64, flags: Flags) -> LocalFuture<'_, Result<()>> {
        self.note(true, offset, usize::try_from(len).unwrap());
        self.disk.write_zeroes(offset, len, flags)
    }
    fn cache(&self, offset: u64, len: u64) -> LocalFuture<'_, Result<()>> {
        self.disk.cache(offset, len)
    }
    fn block_status(&self, offset: u64, len: u64, flags: Flags) -> LocalFuture<'_, Result<Vec<Extent>>> {
        self.disk.block_status(offset, len, flags)
    }
}

fn base() -> Watched {
    let base = Watched::new(SIZE);
    let bytes: Vec<u8> = (1..=251).cycle().take(10 * BLOCK + 77).collect();
    base.put(0, &bytes);
    base
}

fn temporary() -> (Overlay, Watched, Watched) {
    let (base, store) = (base(), Watched::new(temporary_bytes(SIZE).unwrap()));
    (Overlay::temporary(base.boxed(), store.boxed()).unwrap(), base, store)
}

const BOOT: Option<BootId> = Some([7; 16]);

/// A kept overlay in which blocks 1 and 2 were written; flushed or not.
async fn kept(flush: bool) -> (Watched, Watched) {
    let (base, store) = (base(), Watched::new(kept_bytes(SIZE).unwrap()));
    let disk = Overlay::create(base.boxed(), store.boxed(), "/srv/base", "raw", BOOT).await.unwrap();
    disk.write(B + 5, Buffer::copy_of(&[9; 70_000]), Flags::NONE).await.unwrap();
    if flush {
        disk.flush().await.unwrap();
    }
    (base, store)
}

fn first_bytes(disk: &Overlay, offset: u64) -> u8 {
    let mut byte = [0];
    disk.try_read(offset, &mut byte, Flags::NONE).unwrap().unwrap();
    byte[0]
}

#[test]
fn requests_on_one_side_are_fast_and_the_base_is_never_written() {
    run(async {
        let (disk, base, store) = temporary();
        let mut buf = vec![0; 100];
        assert!(disk.try_read(3 * B, &mut buf, Flags::NONE).is_some());
        assert!(disk.try_write(3 * B + 1, &[1], Flags::NONE).is_none(), "needs the rest of its block");
        assert!(disk.try_write(3 * B, &vec![1; 2 * BLOCK], Flags::FUA).is_some(), "whole blocks");
        assert!(disk.try_write(3 * B + 1, &[2], Flags::FUA).is_some(), "in the overlay already");
        assert!(disk.try_write(10 * B, &[3; 77], Flags::NONE).is_some(), "the last block is short");
        assert!(disk.try_read(3 * B, &mut vec![0; 2 * BLOCK], Flags::NONE).is_some());
        assert!(disk.try_read(3 * B - 1, &mut [0; 2], Flags::NONE).is_none(), "some here, some there");
        base.take_seen();
        store.take_seen();
        disk.write(7 * B + 10, Buffer::copy_of(&[4; 20]), Flags::NONE).await.unwrap();
        assert_eq!(base.take_seen(), [(false, 7 * B, 10), (false, 7 * B + 30, B - 30)], "what is left of it");
        disk.write(7 * B + 11, Buffer::copy_of(&[4; 20]), Flags::NONE).await.unwrap();
        disk.trim(0, SIZE, Flags::NONE).await.unwrap();
        disk.write_zeroes(1, SIZE - 1, Flags::NONE).await.unwrap();
        assert_eq!(base.take_seen(), [(false, 0, 1)]);
        assert!(
            base.seen.lock().unwrap().is_empty() && first_bytes(&disk, 0) == 1 && first_bytes(&disk, 1) == 0
        );
    });
}

#[test]
fn zeroes_are_fast_where_nothing_is_copied() {
    run(async {
        let (disk, base, _) = temporary();
        let refused = disk.write_zeroes(1, 2 * B, Flags::FAST_ZERO).await.unwrap_err();
        assert_eq!(refused.kind(), crate::ErrorKind::NotSupported);
        disk.write_zeroes(B, SIZE - B, Flags::FAST_ZERO).await.unwrap();
        disk.write_zeroes(B + 1, 5, Flags::FAST_ZERO).await.unwrap();
        assert!(base.take_seen().is_empty());
        let extents = disk.block_status(0, SIZE, Flags::NONE).await.unwrap();
        let told: Vec<_> = extents.iter().map(|extent| (extent.len, extent.kind)).collect();
        assert_eq!(told, [(B, ExtentKind::Data), (SIZE - B, ExtentKind::Hole)]);
    });
}

#[test]
fn depths_count_the_layers() {
    run(async {
        let (disk, ..) = temporary();
        assert!(disk.try_write(B, &vec![1; BLOCK], Flags::NONE).is_some());
        let store = Watched::new(temporary_bytes(SIZE).unwrap());
        let upper = Overlay::temporary(Box::new(disk), store.boxed()).unwrap();
        assert!(upper.try_write(4 * B, &vec![1; BLOCK], Flags::NONE).is_some());
        let depths = upper.allocation_depth(0, SIZE, Flags::NONE).await.unwrap();
        let told: Vec<_> = depths.iter().map(|depth| (depth.len, depth.level)).collect();
        assert_eq!(told, [(B, 3), (B, 2), (2 * B, 3), (B, 1), (SIZE - 5 * B, 3)]);
    });
}

#[test]
fn what_was_answered_survives_the_process_and_what_was_flushed_the_host() {
    run(async {
        for (flush, boot, there) in [
            (true, BOOT, true),
            (true, Some([8; 16]), true),
            (true, None, true),
            (false, BOOT, true),
            (false, Some([8; 16]), false),
            (false, None, false),
        ] {
            let (base, store) = kept(flush).await;
            for read_only in [true, false] {
                let disk = Overlay::open(base.boxed(), store.boxed(), boot, read_only).await.unwrap();
                assert_eq!(first_bytes(&disk, B + 5) == 9, there, "{flush} {boot:?}");
                assert_eq!(first_bytes(&disk, B + 4), first_bytes(&disk, B + 4 - 251));
                assert_eq!(disk.geometry().read_only(), read_only);
            }
            // Forgotten for good, also where the number of the old boot comes back.
            let again = Overlay::open(base.boxed(), store.boxed(), BOOT, false).await.unwrap();
            assert_eq!(first_bytes(&again, B + 5) == 9, there);
        }
    });
}

#[test]
fn files_that_do_not_fit_are_refused() {
    run(async {
        let (base, store) = kept(true).await;
        let layout = image::Layout::new(SIZE);
        let open = async |base: &Watched, store: &Watched| {
            let error = Overlay::open(base.boxed(), store.boxed(), BOOT, false).await.err();
            error.map(|error| error.to_string()).unwrap_or_default()
        };
        assert_eq!(open(&base, &store).await, "");
        let longer = Watched::new(SIZE + 1);
        assert!(
            open(&longer, &store)
                .await
                .contains("belongs to a base of 655437 bytes, and this one has 655438")
        );
        let other = base.copy();
        other.put(0, &[0]);
        assert!(open(&other, &store).await.contains("another base"));
        for (at, bytes, words) in [
            (0, &[0][..], "no overlay of this program;"),
            (123, &[0xff], "a qcow2 image of another one"),
            (63, &[1], "by another program"),
            (79, &[1], "by another program"),
            (layout.l1 + 3, &[9], "by another program"),
            (layout.refcount_table + 5, &[9], "by another program"),
            (layout.l2 + 3 * 8 + 7, &[1], "by another program"),
            (layout.l2 + 8 + 5, &[0x77], "by another program"),
        ] {
            let damaged = store.copy();
            damaged.put(at, bytes);
            let line = open(&base, &damaged).await;
            assert!(line.contains(words), "{at}: {line}");
        }
        let short = Watched::new(layout.len - B);
        short.put(0, &store.get(0, usize::try_from(layout.len - B).unwrap()));
        assert!(open(&base, &short).await.contains("65536 bytes are missing"));
        let nothing = Watched::new(0);
        assert!(open(&base, &nothing).await.contains("no overlay"));
        assert!(kept_bytes(MAX_BYTES + 1).is_err() && temporary_bytes(MAX_BYTES).is_ok());
    });
}

/// Flushes at the same time: each of them covers what was answered before it, and they share passes.
#[test]
fn flushes_share_passes() {
    run(async {
        let (base, store) = (base(), Watched::new(kept_bytes(SIZE).unwrap()));
        let disk = Arc::new(Overlay::create(base.boxed(), store.boxed(), "b", "raw", BOOT).await.unwrap());
        let mut tasks = Vec::new();
        for n in 0..10 {
            let disk = disk.clone();
            tasks.push(tokio::task::spawn_local(async move {
                disk.write(n * B + 1, Buffer::copy_of(&[1]), Flags::NONE).await.unwrap();
                disk.flush().await.unwrap();
                assert!(disk.shared.blocks.all_settled(n..n + 1));
            }));
        }
        for task in tasks {
            task.await.unwrap();
        }
    });
}
