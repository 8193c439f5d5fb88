//! Trim, zeroes and block status, with what they leave behind on the disk.

use super::*;
use crate::ExtentKind::{self, Data, Hole};
use std::os::unix::fs::MetadataExt;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

/// What a 1 MiB image of data becomes.
struct Bench {
    _folder: tempfile::TempDir,
    path: PathBuf,
    backend: FileBackend,
}

impl Bench {
    fn new(folder: tempfile::TempDir, options: &FileOptions) -> Self {
        let path = folder.path().join("image");
        std::fs::write(&path, pattern(1 << 20)).unwrap();
        std::fs::File::open(&path).unwrap().sync_all().unwrap();
        let backend = open(&path, options);
        Bench { _folder: folder, path, backend }
    }

    fn allocated(&self) -> u64 {
        std::fs::metadata(&self.path).unwrap().blocks() * 512
    }

    async fn zeroes(&self, offset: u64, len: u64, flags: Flags) -> Result<()> {
        self.backend.write_zeroes(offset, len, flags).await
    }

    /// Exactly this range reads as zeroes.
    fn only_zero(&self, offset: u64, len: u64) {
        let mut expected = pattern(1 << 20);
        expected[usize::try_from(offset).unwrap()..][..usize::try_from(len).unwrap()].fill(0);
        assert!(std::fs::read(&self.path).unwrap() == expected);
    }

    async fn status(&self, offset: u64, len: u64) -> Vec<(u64, ExtentKind)> {
        let extents = self.backend.block_status(offset, len, Flags::NONE).await.unwrap();
        extents.into_iter().map(|extent| (extent.len, extent.kind)).collect()
    }
}

fn options() -> FileOptions {
    FileOptions::default()
}

#[test]
fn zeroes_punch_holes_unless_they_must_not() {
    for (folder, aio) in [(memory(), AioMode::Auto), (disk(), AioMode::Auto), (disk(), AioMode::Threads)] {
        let bench = Bench::new(folder, &FileOptions { aio, ..options() });
        block_on(async {
            let full = bench.allocated();
            // NO_HOLE: on tmpfs punched and allocated again.
            bench.zeroes(64 * KIB, 64 * KIB, Flags::NO_HOLE | Flags::FAST_ZERO).await.unwrap();
            bench.only_zero(64 * KIB, 64 * KIB);
            assert_eq!(bench.allocated(), full);
            bench.zeroes(64 * KIB, 128 * KIB, Flags::FUA).await.unwrap();
            bench.only_zero(64 * KIB, 128 * KIB);
            assert_eq!(bench.allocated(), full - 128 * KIB);
            assert_eq!(
                bench.status(0, MIB).await,
                [(64 * KIB, Data), (128 * KIB, Hole), (MIB - 192 * KIB, Data)]
            );
            assert_eq!(bench.status(100 * KIB, 200 * KIB).await, [(92 * KIB, Hole), (108 * KIB, Data)]);
            // Unaligned ends are zeroed, not more.
            bench.zeroes(64 * KIB - 3, 128 * KIB + 10, Flags::NONE).await.unwrap();
            bench.only_zero(64 * KIB - 3, 128 * KIB + 10);
            bench.zeroes(5, 0, Flags::NONE).await.unwrap();
            assert_eq!(std::fs::metadata(&bench.path).unwrap().len(), MIB);
        });
    }
}

#[test]
fn discard_ignore_keeps_the_space() {
    for folder in [memory(), disk()] {
        let bench = Bench::new(folder, &FileOptions { discard: DiscardMode::Ignore, ..options() });
        block_on(async {
            let full = bench.allocated();
            bench.backend.trim(0, MIB, Flags::FUA).await.unwrap();
            bench.only_zero(0, 0);
            bench.zeroes(8 * KIB, 64 * KIB, Flags::NONE).await.unwrap();
            bench.only_zero(8 * KIB, 64 * KIB);
            assert_eq!(bench.allocated(), full);
        });
    }
}

#[test]
fn trim_gives_the_space_back() {
    for folder in [memory(), disk()] {
        let bench = Bench::new(folder, &options());
        block_on(async {
            bench.backend.trim(4 * KIB, 256 * KIB, Flags::FUA).await.unwrap();
            assert_eq!(
                bench.status(0, 512 * KIB).await,
                [(4 * KIB, Data), (256 * KIB, Hole), (252 * KIB, Data)]
            );
            bench.backend.trim(0, MIB, Flags::NONE).await.unwrap();
            assert_eq!((bench.allocated(), bench.status(0, MIB).await), (0, vec![(MIB, Hole)]));
        });
    }
}

#[test]
fn where_nothing_is_supported_zeroes_are_written_or_refused_untouched() {
    let bench = Bench::new(memory(), &options());
    bench.backend.disk.refused.refuse_all();
    block_on(async {
        for flags in [Flags::FAST_ZERO, Flags::FAST_ZERO | Flags::NO_HOLE] {
            let error = bench.zeroes(0, MIB, flags).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::NotSupported);
        }
        bench.backend.trim(0, MIB, Flags::NONE).await.unwrap();
        bench.only_zero(0, 0);
        bench.zeroes(1, MIB - 2, Flags::FUA).await.unwrap();
        bench.only_zero(1, MIB - 2);
    });
}

#[test]
fn tmpfs_is_asked_for_zero_range_once() {
    let bench = Bench::new(memory(), &options());
    block_on(async {
        assert_eq!(bench.backend.disk.refused.bits(), 0);
        bench.zeroes(0, 4096, Flags::NO_HOLE).await.unwrap();
        assert_eq!(bench.backend.disk.refused.bits(), 2, "no ZERO_RANGE there");
    });
}

#[test]
fn lengths_over_four_gib_are_not_cut_short() {
    const SIZE: u64 = 9 << 30;
    for (folder, aio) in [(disk(), AioMode::Auto), (disk(), AioMode::Threads), (memory(), AioMode::Auto)] {
        let path = image(&folder, SIZE);
        let backend = open(&path, &FileOptions { aio, ..options() });
        block_on(async {
            for place in [0, (4 << 30) + 4096, SIZE - 4096] {
                store(&backend, place, &pattern(4096), Flags::NONE).await.unwrap();
            }
            assert_eq!(backend.block_status(0, SIZE, Flags::NONE).await.unwrap().len(), 5);
            backend.write_zeroes(4096, SIZE - 4096, Flags::NONE).await.unwrap();
            let extents = backend.block_status(0, SIZE, Flags::NONE).await.unwrap();
            assert_eq!(
                extents,
                [Extent { len: 4096, kind: Data }, Extent { len: SIZE - 4096, kind: Hole }],
                "{aio:?}"
            );
            backend.trim(0, SIZE, Flags::NONE).await.unwrap();
            assert_eq!(std::fs::metadata(&path).unwrap().blocks(), 0);
        });
    }
}

#[test]
fn block_status_is_bounded_and_moves_on() {
    for folder in [memory(), disk()] {
        let path = image(&folder, 80 << 20);
        let backend = open(&path, &options());
        block_on(async {
            // Holes and data in turn: more extents than one answer has.
            for n in 0..2500 {
                store(&backend, n * 32 * KIB + 8192, &[1; 4096], Flags::NONE).await.unwrap();
            }
            let one = backend.block_status(0, 80 << 20, Flags::REQ_ONE).await.unwrap();
            assert_eq!(one, [Extent { len: 8192, kind: Hole }]);
            let extents = backend.block_status(0, 80 << 20, Flags::NONE).await.unwrap();
            assert_eq!(extents.len(), crate::extent::MAX_EXTENTS);
            let described: u64 = extents.iter().map(|extent| extent.len).sum();
            assert_eq!(described, 2048 * 32 * KIB - 20 * KIB);
            let rest = backend.block_status(described, (80 << 20) - described, Flags::NONE).await.unwrap();
            let rest: u64 = rest.iter().map(|extent| extent.len).sum();
            assert_eq!(described + rest, 80 << 20);
        });
        // Shorter than it was: the rest is a hole, and nothing panics.
        std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(10).unwrap();
        block_on(async {
            let extents = backend.block_status(0, 80 << 20, Flags::NONE).await.unwrap();
            assert_eq!(extents.iter().map(|extent| extent.len).sum::<u64>(), 80 << 20);
        });
    }
}

#[test]
fn a_device_is_zeroed_and_trimmed_by_sectors() {
    let folder = disk();
    let path = folder.path().join("image");
    std::fs::write(&path, pattern(1 << 20)).unwrap();
    let Some(device) = Loop::over(&path, &["--sector-size", "4096"]) else { return };
    let backend = open(device.path(), &options());
    block_on(async {
        let mut expected = pattern(1 << 20);
        for (offset, len, flags) in [
            (8192, 65536, Flags::NONE),
            (100_001, 30_003, Flags::FUA),
            (200_001, 70_000, Flags::NO_HOLE),
            (300_000, 100, Flags::NONE),
            (400_000, 50_000, Flags::FAST_ZERO),
        ] {
            backend.write_zeroes(offset, len, flags).await.unwrap();
            expected[usize::try_from(offset).unwrap()..][..usize::try_from(len).unwrap()].fill(0);
            assert!(load(&backend, 0, 1 << 20).await == expected, "{offset} {len}");
        }
        for (offset, len, flags) in
            [(0, 65536, Flags::FAST_ZERO | Flags::NO_HOLE), (500_001, 100, Flags::FAST_ZERO)]
        {
            let error = backend.write_zeroes(offset, len, flags).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::NotSupported);
        }
        backend.trim(600_001, 100, Flags::NONE).await.unwrap();
        assert!(load(&backend, 0, 1 << 20).await == expected, "a trim of less than a sector does nothing");
        backend.trim(600_001, 100_000, Flags::FUA).await.unwrap();
        backend.flush().await.unwrap();
        let status = backend.block_status(5, 10_000, Flags::NONE).await.unwrap();
        assert_eq!(status, [Extent { len: 10_000, kind: Data }]);
    });
}
