//! Block status: complete, bounded, and true.

use bridge::extent::MAX_EXTENTS;
use bridge::{ExtentKind, Flags};

use super::{filled, ranges};
use crate::support::disk::is_zero;
use crate::support::{Disk, Path, pattern};

pub async fn block_status_agrees_with_the_data(disk: Disk) {
    check(&disk).await;
    disk.write(Path::Fast, 100_000, &pattern(0, 1), Flags::NONE).await.unwrap();
    disk.write(Path::Fast, 1_000_000, &pattern(0, 300_000), Flags::NONE).await.unwrap();
    check(&disk).await;
    filled(&disk).await;
    check(&disk).await;
    for (offset, len) in [(3, 1), (70_000, 70_000), (2 << 20, 1 << 20), (disk.size() - 99_999, 99_999)] {
        disk.trim(offset, len, Flags::NONE).await.unwrap();
        check(&disk).await;
        disk.zero(offset + len / 2, len - len / 2, Flags::NO_HOLE).await.unwrap();
        check(&disk).await;
    }
    for n in 0..45 {
        disk.zero(n * 131_072, 65_536, if n % 2 == 0 { Flags::NONE } else { Flags::NO_HOLE }).await.unwrap();
    }
    check(&disk).await;
    disk.zero(0, disk.size(), Flags::NONE).await.unwrap();
    check(&disk).await;
}

pub async fn block_status_is_told_in_full(disk: Disk) {
    check(&disk).await;
}

/// Walks over ranges of the disk: each answer covers a part from its start, and what is said to be zero is.
async fn check(disk: &Disk) {
    let mut walks = ranges(disk);
    walks.push((0, usize::try_from(disk.size()).unwrap()));
    for (offset, len) in walks {
        for flags in [Flags::NONE, Flags::REQ_ONE] {
            let (mut at, end) = (offset, offset + len as u64);
            while at < end {
                let extents = disk.status(at, end - at, flags).await.unwrap();
                assert!(!extents.is_empty() && extents.len() <= MAX_EXTENTS, "{} extents", extents.len());
                for extent in &extents {
                    assert!(
                        extent.len > 0 && extent.len <= end - at,
                        "{extent:?} at {at} of {offset}, {len}"
                    );
                    if extent.kind != ExtentKind::Data {
                        let data =
                            disk.read(Path::Fast, at, usize::try_from(extent.len).unwrap()).await.unwrap();
                        assert!(is_zero(&data), "{extent:?} at {at} holds data");
                    }
                    at += extent.len;
                }
            }
        }
    }
}
