//! Growing, and reserving space.

use bridge::{Capabilities, ErrorKind, Flags};

use super::{fresh, span};
use crate::support::disk::PATHS;
use crate::support::{Disk, Kind, pattern};

pub async fn a_disk_that_can_grow_does(disk: Disk) {
    let before = disk.export.geometry();
    let mut image = fresh(&disk);
    let mut sizes = disk.export.watch_size();
    // What it has already is no change, and less is refused.
    let same = disk.export.resize(before.size).await;
    let less = disk.export.resize(before.size - 1).await.unwrap_err().kind();
    assert_eq!(same.is_ok(), disk.kind != Kind::ReadOnly);
    assert_eq!(less, ErrorKind::InvalidInput);
    assert_eq!(disk.export.geometry(), before);
    if !before.capabilities.contains(Capabilities::GROW) {
        let refused = disk.export.resize(before.size + 4096).await.unwrap_err().kind();
        let expected =
            if disk.kind == Kind::ReadOnly { ErrorKind::ReadOnly } else { ErrorKind::NotSupported };
        assert_eq!(refused, expected);
        assert_eq!(disk.export.geometry(), before, "nothing has happened");
        return disk.assert_is(&image).await;
    }
    // The last byte, so that the old end lies amid data.
    let last = before.size - 1;
    disk.write(PATHS[0], last, &[7], Flags::NONE).await.unwrap();
    // A disk that discards reads as zeroes for ever.
    let keeps = disk.kind != Kind::Discards;
    image[usize::try_from(last).unwrap()] = if keeps { 7 } else { 0 };
    for step in [1, 4095, 1 << 20, 77] {
        let size = disk.size() + step;
        disk.export.resize(size).await.unwrap();
        assert_eq!(disk.size(), size);
        assert!(sizes.has_changed().unwrap() && *sizes.borrow_and_update() == size);
        image.resize(usize::try_from(size).unwrap(), 0);
        disk.assert_is(&image).await;
        for (n, path) in PATHS.into_iter().enumerate() {
            let offset = size - step.min(3000) + n as u64;
            let data = pattern(offset, usize::try_from(size - offset).unwrap());
            disk.write(path, offset, &data, Flags::NONE).await.unwrap();
            if keeps {
                image[span(offset, data.len())].copy_from_slice(&data);
            }
        }
    }
    disk.assert_is(&image).await;
    assert!(disk.export.geometry().version > before.version);
    // At least this size: it is more already.
    disk.export.grow_to(before.size).await.unwrap();
    disk.assert_is(&image).await;
}

pub async fn a_disk_that_can_shrink_does(disk: Disk) {
    let before = disk.export.geometry();
    let mut image = fresh(&disk);
    if !before.capabilities.contains(Capabilities::SHRINK) {
        let refused = disk.export.shrink_to(before.size - 1).await.unwrap_err().kind();
        let expected =
            if disk.kind == Kind::ReadOnly { ErrorKind::ReadOnly } else { ErrorKind::NotSupported };
        assert_eq!(refused, expected);
        assert_eq!(disk.export.geometry(), before, "nothing has happened");
        return disk.assert_is(&image).await;
    }
    let mut sizes = disk.export.watch_size();
    disk.export.shrink_to(before.size).await.unwrap();
    assert_eq!(disk.export.geometry(), before, "it has that size");
    for size in [before.size - 1, before.size / 2 + 77, 4096, 100, 0] {
        for path in PATHS {
            let data = pattern(7, 1000.min(image.len()));
            let offset = image.len() - data.len();
            disk.write(path, offset as u64, &data, Flags::NONE).await.unwrap();
            image[offset..].copy_from_slice(&data);
        }
        disk.export.shrink_to(size).await.unwrap();
        image.truncate(usize::try_from(size).unwrap());
        assert!(sizes.has_changed().unwrap() && *sizes.borrow_and_update() == size);
        disk.assert_is(&image).await;
        // What was cut off does not come back.
        disk.export.resize(size + 3000).await.unwrap();
        image.resize(image.len() + 3000, 0);
        disk.assert_is(&image).await;
    }
    assert!(disk.export.geometry().version > before.version);
}

pub async fn space_can_be_reserved(disk: Disk) {
    let geometry = disk.export.geometry();
    let can = geometry.capabilities.contains(Capabilities::ALLOCATE);
    let image = fresh(&disk);
    for (offset, len) in [(0, 1), (100_001, 1 << 20), (geometry.size - 1, 1), (5, 0)] {
        match disk.export.allocate(offset, len).await {
            Ok(()) => assert!(can),
            // A file system may not have it.
            Err(error) if disk.kind == Kind::ReadOnly => assert_eq!(error.kind(), ErrorKind::ReadOnly),
            Err(error) => assert_eq!(error.kind(), ErrorKind::NotSupported),
        }
    }
    if can {
        let past = disk.export.allocate(geometry.size - 1, 2).await.unwrap_err();
        assert_eq!(past.kind(), ErrorKind::InvalidInput);
        if let Some(allocated) = disk.export.allocated() {
            assert!(allocated >= 1 << 20, "{allocated}");
        }
    }
    disk.assert_is(&image).await;
}
