//! The fast path: when it answers, when it declines, and file ranges.

use super::*;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

fn options() -> FileOptions {
    FileOptions::default()
}

/// Drops a file's clean pages from the cache.
fn evict(path: &Path) {
    let file = File::open(path).unwrap();
    file.sync_all().unwrap();
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
}

#[test]
fn a_cold_read_declines_and_a_warm_one_answers() {
    let folder = disk();
    let path = folder.path().join("image");
    std::fs::write(&path, pattern(1 << 20)).unwrap();
    evict(&path);
    let backend = open(&path, &options());
    let mut buf = [0; 8192];
    if backend.try_read(500_000, &mut buf, Flags::NONE).is_some() {
        eprintln!("SKIP cold reads: this file system keeps its pages");
        return;
    }
    assert!(backend.file_range(0, 1 << 20, Flags::NONE).is_none(), "not in memory");
    block_on(async {
        assert!(load(&backend, 0, 1 << 20).await == pattern(1 << 20));
        backend.try_read(500_000, &mut buf, Flags::NONE).unwrap().unwrap();
        assert_eq!(buf, pattern(1 << 20)[500_000..508_192]);
        evict(&path);
        backend.cache(0, 1 << 20).await.unwrap();
    });
    soon(|| backend.try_read(0, &mut buf, Flags::NONE)).unwrap();
}

#[test]
fn a_file_that_became_shorter_is_an_error_on_both_paths() {
    for folder in [memory(), disk()] {
        for aio in [AioMode::Auto, AioMode::Threads] {
            let path = folder.path().join(format!("{aio:?}"));
            std::fs::write(&path, pattern(10_000)).unwrap();
            let backend = open(&path, &FileOptions { aio, ..options() });
            std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(5000).unwrap();
            let mut buf = [0; 8000];
            match backend.try_read(0, &mut buf, Flags::NONE) {
                None => {}
                Some(result) => assert_eq!(result.unwrap_err().kind(), ErrorKind::Io),
            }
            block_on(async {
                for (offset, len) in [(0, 8000), (5000, 100), (9000, 1000)] {
                    let error = backend.read(offset, Buffer::new(len), Flags::NONE).await.unwrap_err();
                    assert_eq!(error.kind(), ErrorKind::Io);
                }
            });
        }
    }
}

#[test]
fn what_must_be_durable_or_direct_declines() {
    let folder = disk();
    let path = folder.path().join("image");
    std::fs::write(&path, pattern(1 << 20)).unwrap();
    let decline = |cache, flags| {
        let backend = open(&path, &FileOptions { cache, ..options() });
        backend.try_write(0, &[1; 4096], flags).is_none()
    };
    assert!(!decline(CacheMode::Writeback, Flags::NONE));
    assert!(decline(CacheMode::Writeback, Flags::FUA));
    assert!(decline(CacheMode::WriteThrough, Flags::NONE));
    assert!(decline(CacheMode::None, Flags::NONE));
    assert!(decline(CacheMode::DirectSync, Flags::NONE));
    assert!(!decline(CacheMode::Unsafe, Flags::FUA));
}

#[test]
fn a_slow_write_sends_the_next_ones_the_other_way_for_a_while() {
    let folder = disk();
    let path = folder.path().join("image");
    std::fs::write(&path, pattern(1 << 20)).unwrap();
    let backend = open(&path, &options());
    let write = |len: usize| backend.try_write(0, &vec![1; len], Flags::NONE);
    soon(|| write(4096)).unwrap();
    if backend.disk.fast.has_nowait_writes() {
        eprintln!("SKIP slow writes: this file system has writes that do not wait");
        return;
    }
    soon(|| write(256 << 10)).unwrap();
    assert!(write((256 << 10) + 1).is_none(), "too large for the caller's thread");
    backend.disk.fast.keep_off_now();
    assert!(write(512).is_none());
    soon(|| write(512)).unwrap();
}

#[test]
fn data_in_a_pipe_are_stored_or_stay_there() {
    let data = pattern(50_000);
    let (mut read, mut write) = std::io::pipe().unwrap();
    for (folder, cache, taken) in [
        (memory(), CacheMode::Writeback, true),
        (disk(), CacheMode::Writeback, true),
        (disk(), CacheMode::WriteThrough, false),
    ] {
        let path = image(&folder, 1 << 20);
        let backend = open(&path, &FileOptions { cache, ..options() });
        // What kind of writes the file has is learnt from the first.
        let _ = backend.try_write(0, &[0; 4096], Flags::NONE);
        let taken = taken && !backend.disk.fast.has_nowait_writes();
        write.write_all(&data).unwrap();
        let piped = Piped { pipe: read.as_fd(), len: data.len() };
        let stored = soon(|| match backend.try_write_piped(4096, piped, Flags::NONE) {
            None if taken => None,
            other => Some(other),
        });
        assert_eq!(stored.is_some(), taken, "{cache:?}");
        let mut seen = vec![0; data.len()];
        match stored {
            Some(result) => {
                result.unwrap();
                File::open(&path).unwrap().read_exact_at(&mut seen, 4096).unwrap();
            }
            None => read.read_exact(&mut seen).unwrap(),
        }
        assert!(seen == data, "{cache:?}");
    }
}

#[test]
fn a_full_file_system_is_no_space_on_both_paths() {
    let folder = memory();
    let place = folder.path().to_str().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            if !mount(&["-t", "tmpfs", "-o", "size=1m", "none", place]) {
                return;
            }
            let path = image(&folder, 8 << 20);
            let backend = open(&path, &options());
            let data = pattern(4 << 20);
            let error = backend.try_write(0, &data, Flags::NONE).unwrap().unwrap_err();
            assert_eq!((error.kind(), error.errno()), (ErrorKind::NoSpace, Some(libc::ENOSPC)));
            block_on(async {
                for flags in [Flags::NONE, Flags::FUA] {
                    let error = store(&backend, 4 << 20, &data, flags).await.unwrap_err();
                    assert_eq!(error.kind(), ErrorKind::NoSpace);
                }
                let error = backend.write_zeroes(0, 8 << 20, Flags::NO_HOLE).await.unwrap_err();
                assert_eq!(error.kind(), ErrorKind::NoSpace);
                backend.flush().await.unwrap();
            });
        });
    });
}

fn range(backend: &FileBackend, offset: u64, len: u64) -> (u64, bool) {
    match backend.file_range(offset, len, Flags::NONE) {
        Some(RangeOrHole::Hole(len)) => (len, false),
        Some(RangeOrHole::Range(range)) => {
            assert_eq!(range.offset, offset);
            let mut byte = [0];
            range.file.read_exact_at(&mut byte, offset).unwrap();
            (range.len, true)
        }
        None => (0, false),
    }
}

#[test]
fn file_ranges_of_tmpfs_are_whole_and_know_holes() {
    const KIB: u64 = 1 << 10;
    let folder = memory();
    let path = image(&folder, 10 << 20);
    let backend = open(&path, &options());
    let data = |offset, len: usize| backend.try_write(offset, &vec![1; len], Flags::NONE).unwrap().unwrap();
    data(64 * KIB, 64 << 10);
    data(140 * KIB, 4 << 10);
    data(1024 * KIB, 1 << 20);
    assert_eq!(range(&backend, 0, 10 << 20), (64 * KIB, false), "a hole at the start");
    assert_eq!(range(&backend, 0, 10), (10, false));
    assert_eq!(range(&backend, 64 * KIB, 10 << 19), (80 * KIB, true), "a short hole is sent as zeroes");
    assert_eq!(range(&backend, 66 * KIB, 4096), (4096, true));
    assert_eq!(range(&backend, 2048 * KIB - 1, 2), (2, true), "a hole that short is not left out");
    assert_eq!(range(&backend, 1500 * KIB, 2 << 20), (548 * KIB, true));
    assert_eq!(range(&backend, 3 << 20, 7 << 20), (7 << 20, false), "to the end");
    assert_eq!(range(&backend, 10 << 20, 0), (0, false));
}

#[test]
fn file_ranges_of_storage_are_what_is_in_memory() {
    let folder = disk();
    let path = folder.path().join("image");
    std::fs::write(&path, pattern(1 << 20)).unwrap();
    let backend = open(&path, &options());
    if crate::sys::cachestat(&*backend.disk.file, 0, 4096).is_err() {
        eprintln!("SKIP cachestat: not in this kernel, or not allowed");
        return;
    }
    assert_eq!(range(&backend, 0, 1 << 20), (1 << 20, true));
    assert_eq!(range(&backend, 4095, 2), (2, true));
    assert_eq!(range(&backend, 1000, 500_000), (500_000, true));
}
