//! Reads, writes, trims and zeroes.

use super::*;
use crate::ExtentKind;

const MODES: [AioMode; 2] = [AioMode::Auto, AioMode::Threads];

#[test]
fn both_paths_see_each_other_on_every_file_system() {
    for folder in [memory(), disk()] {
        for aio in MODES {
            let path = folder.path().join(format!("{aio:?}"));
            create(&path, 1_000_003).unwrap();
            let backend = open(&path, &FileOptions { aio, ..FileOptions::default() });
            assert_eq!(backend.geometry().size, 1_000_003);
            block_on(async {
                let data: Vec<u8> = (0..=u8::MAX).cycle().take(70_001).collect();
                store(&backend, 929_999, &data, Flags::NONE).await.unwrap();
                let mut fast = vec![0; data.len()];
                backend.try_read(929_999, &mut fast, Flags::NONE).unwrap().unwrap();
                assert!(fast == data, "in the cache after a write");
                if backend.try_write(7, &data[..30_000], Flags::NONE).is_none() {
                    store(&backend, 7, &data[..30_000], Flags::NONE).await.unwrap();
                }
                assert!(load(&backend, 7, 30_000).await == data[..30_000]);
                assert_eq!(load(&backend, 0, 7).await, [0; 7]);
                backend.flush().await.unwrap();
                let status = backend.block_status(500_000, 100_000, Flags::NONE).await.unwrap();
                assert_eq!(status, [Extent { len: 100_000, kind: ExtentKind::Hole }]);
            });
        }
    }
}

#[test]
fn every_cache_mode_stores_and_flushes() {
    for folder in [memory(), disk()] {
        let path = image(&folder, 100_000);
        for cache in [
            CacheMode::Writeback,
            CacheMode::None,
            CacheMode::DirectSync,
            CacheMode::WriteThrough,
            CacheMode::Unsafe,
        ] {
            for aio in MODES {
                let backend = open(&path, &FileOptions { cache, aio, ..FileOptions::default() });
                block_on(async {
                    for (n, flags) in [Flags::NONE, Flags::FUA].into_iter().enumerate() {
                        let data = pattern(5000 + n);
                        store(&backend, 3000, &data, flags).await.unwrap();
                        assert!(load(&backend, 3000, data.len()).await == data);
                        backend.flush().await.unwrap();
                    }
                    store(&backend, 7, &[], Flags::FUA).await.unwrap();
                    assert!(load(&backend, 100_000, 0).await.is_empty());
                });
            }
        }
    }
}

#[test]
fn a_thousand_requests_in_flight_and_some_that_nobody_waits_for() {
    for aio in MODES {
        let folder = disk();
        let path = image(&folder, 1000 * 4096);
        let backend = std::rc::Rc::new(open(&path, &FileOptions { aio, ..FileOptions::default() }));
        block_on(async {
            let run = |index: u16| {
                let backend = backend.clone();
                tokio::task::spawn_local(async move {
                    let place = u64::from(index) * 4096;
                    let data = index.to_le_bytes().repeat(2048);
                    store(&backend, place, &data, Flags::NONE).await.unwrap();
                    assert!(load(&backend, place, 4096).await == data);
                })
            };
            let tasks: Vec<_> = (0..1000).map(run).collect();
            for (n, task) in tasks.into_iter().enumerate() {
                if n % 7 == 3 {
                    task.abort();
                } else {
                    task.await.unwrap();
                }
            }
            // Reads that are dropped at each stage.
            for turns in 0..20 {
                let mut read = backend.read(4096, Buffer::new(4096), Flags::NONE);
                for _ in 0..turns {
                    let poll =
                        std::future::poll_fn(|context| std::task::Poll::Ready(read.as_mut().poll(context)));
                    if poll.await.is_ready() {
                        break;
                    }
                    tokio::task::yield_now().await;
                }
            }
            backend.flush().await.unwrap();
            assert_eq!(load(&backend, 999 * 4096, 2).await, 999_u16.to_le_bytes());
        });
        assert_eq!(Arc::strong_count(&backend.disk.file), 1, "nothing holds the file any more");
    }
}

#[test]
fn without_io_uring_threads_do_the_work() {
    let folder = disk();
    let path = image(&folder, 1 << 20);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            crate::sys::deny_on_this_thread(libc::SYS_io_uring_setup).unwrap();
            let backend = open(&path, &FileOptions::default());
            block_on(async {
                store(&backend, 4000, &pattern(10_000), Flags::FUA).await.unwrap();
                assert!(load(&backend, 4000, 10_000).await == pattern(10_000));
                backend.flush().await.unwrap();
            });
        });
    });
}

#[test]
fn after_a_failed_sync_flushes_and_durable_writes_fail_and_others_do_not() {
    let folder = disk();
    let path = image(&folder, 1 << 20);
    let backend = open(&path, &FileOptions::default());
    block_on(async {
        backend.disk.gate.fail(rustix::io::Errno::IO);
        for error in [
            backend.flush().await.unwrap_err(),
            store(&backend, 0, &[1; 512], Flags::FUA).await.unwrap_err(),
            backend.trim(0, 4096, Flags::FUA).await.unwrap_err(),
            backend.write_zeroes(0, 4096, Flags::FUA).await.unwrap_err(),
        ] {
            assert_eq!((error.kind(), error.errno()), (ErrorKind::Io, Some(libc::EIO)));
        }
        store(&backend, 0, &[1; 512], Flags::NONE).await.unwrap();
        assert_eq!(load(&backend, 0, 512).await, [1; 512]);
    });
    drop(backend);
    let backend = open(&path, &FileOptions::default());
    block_on(async { backend.flush().await.unwrap() });
}

#[test]
fn a_device_that_loses_writes_fails_the_flush_and_all_later_ones() {
    let folder = memory();
    let place = folder.path().to_str().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // A device of 8 MiB over a file system of one.
            if !mount(&["-t", "tmpfs", "-o", "size=1m", "none", place]) {
                return;
            }
            let path = image(&folder, 8 << 20);
            let Some(device) = Loop::over(&path, &[]) else { return };
            let backend = open(device.path(), &FileOptions::default());
            block_on(async {
                store(&backend, 0, &pattern(4 << 20), Flags::NONE).await.unwrap();
                for _ in 0..2 {
                    assert_eq!(backend.flush().await.unwrap_err().errno(), Some(libc::EIO));
                }
                assert!(store(&backend, 0, &pattern(512), Flags::FUA).await.is_err());
            });
            drop(backend);
            let backend = open(device.path(), &FileOptions::default());
            block_on(async {
                backend.flush().await.unwrap();
                // Now by a durable write, which hears of it first.
                assert!(store(&backend, 4 << 20, &pattern(2 << 20), Flags::FUA).await.is_err());
                println!("a durable write latches: {}", backend.flush().await.is_err());
            });
        });
    });
}

#[test]
fn flushes_of_several_workers_share_their_syncs() {
    let folder = disk();
    let path = image(&folder, 1 << 20);
    let backend = open(&path, &FileOptions::default());
    std::thread::scope(|scope| {
        for worker in 0..4_u64 {
            let backend = &backend;
            scope.spawn(move || {
                block_on(async {
                    for n in 0..20 {
                        let place = worker * 65536 + n * 512;
                        store(backend, place, &pattern(512), Flags::NONE).await.unwrap();
                        backend.flush().await.unwrap();
                    }
                });
            });
        }
    });
}

/// Block status of a file in memory against a model, and its time against one lseek(2) over all of the data.
#[test]
fn block_status_in_memory_looks_at_the_range_alone() {
    use crate::{Extent, ExtentKind};
    use std::os::unix::fs::FileExt;
    const PAGE: u64 = 4096;
    let folder = memory();
    let path = image(&folder, 160 << 20);
    let backend = open(&path, &FileOptions::default());
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    let data = vec![7; 32 << 20];
    for (start, len) in
        [(0, 1), (3, 1), (5, 64), (70, 1), (128, 700), (1024, 8192), (20_480, 1), (32_768, 8192)]
    {
        file.write_all_at(&data[..usize::try_from(len * PAGE).unwrap()], start * PAGE).unwrap();
    }
    let all =
        |offset: u64, len: u64, limit| super::super::status::extents(&file, offset, len, limit).unwrap();
    let status = |offset, len, flags| block_on(backend.block_status(offset, len, flags)).unwrap();
    for (offset, len) in
        [(0, 160 << 20), (1, 160 << 20), (4096, 5), (PAGE * 128 - 1, 2), (PAGE * 33_000, 9 << 20)]
    {
        let len = len.min((160 << 20) - offset);
        assert_eq!(
            status(offset, len, Flags::NONE),
            all(offset, len, crate::extent::MAX_EXTENTS),
            "{offset} {len}"
        );
        assert_eq!(status(offset, len, Flags::REQ_ONE), all(offset, len, 1), "{offset} {len}");
    }
    // The last stretch is dense to its end: a search for a hole walks over 32 MiB each time.
    let place = 32_768 * PAGE;
    let begun = std::time::Instant::now();
    for _ in 0..50 {
        assert_eq!(all(place, 512, 1), [Extent { len: 512, kind: ExtentKind::Data }]);
    }
    let walks = begun.elapsed();
    let begun = std::time::Instant::now();
    block_on(async {
        for _ in 0..50 {
            let found = backend.block_status(place, 512, Flags::REQ_ONE).await.unwrap();
            assert_eq!(found, [Extent { len: 512, kind: ExtentKind::Data }]);
        }
    });
    assert!(begun.elapsed() < walks, "{:?}, and {walks:?} for walks to the next hole", begun.elapsed());
}

/// Block status of a dense file in memory, many times at once: the thread that asks goes on, and the pool has room for others
/// between the steps of one request.
#[test]
fn block_status_in_memory_holds_nobody_up() {
    const SIZE: u64 = 160 << 20;
    let folder = memory();
    let path = image(&folder, SIZE);
    std::fs::write(&path, vec![7; usize::try_from(SIZE).unwrap()]).unwrap();
    let backend = open(&path, &FileOptions::default());
    // A pool of one thread, which is busy.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .max_blocking_threads(1)
        .build_local(tokio::runtime::LocalOptions::default())
        .unwrap();
    runtime.block_on(async {
        let (release, busy) = std::sync::mpsc::channel::<()>();
        let busy = tokio::task::spawn_blocking(move || busy.recv());
        let ask = || backend.block_status(0, SIZE, Flags::NONE);
        let mut all: Vec<_> = (0..128).map(|_| ask()).collect();
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        for asked in &mut all {
            assert!(asked.as_mut().poll(&mut context).is_pending(), "it is done by this thread");
        }
        // Others are answered, though none of these is.
        assert_eq!(load(&backend, SIZE - 512, 512).await, [7; 512]);
        assert!(matches!(backend.try_read(0, &mut [0; 512], Flags::NONE), Some(Ok(()))));
        drop(release);
        assert!(busy.await.unwrap().is_err());
        for asked in all {
            assert_eq!(asked.await.unwrap(), [Extent { len: SIZE, kind: ExtentKind::Data }]);
        }
        // A small request does not wait for the end of a large one that came before: they take turns on the one thread.
        let mut large = ask();
        assert!(large.as_mut().poll(&mut context).is_pending());
        let small = backend.block_status(0, 512, Flags::REQ_ONE).await.unwrap();
        assert_eq!(small, [Extent { len: 512, kind: ExtentKind::Data }]);
        assert!(large.as_mut().poll(&mut context).is_pending(), "it is not done in one step");
        assert_eq!(large.await.unwrap(), [Extent { len: SIZE, kind: ExtentKind::Data }]);
    });
}
