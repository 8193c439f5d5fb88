//! Zeroes and trims: what they change, and that they change nothing else.

use bridge::{Capabilities, ErrorKind, Flags};

use super::{filled, ranges, span};
use crate::support::{Disk, Path, pattern};

pub async fn write_zeroes_with_all_flags(disk: Disk) {
    for set in 0..8_u8 {
        let mut flags = Flags::NONE;
        for (n, flag) in [Flags::NO_HOLE, Flags::FUA, Flags::FAST_ZERO].into_iter().enumerate() {
            if set >> n & 1 == 1 {
                flags |= flag;
            }
        }
        let mut image = filled(&disk).await;
        for (offset, len) in ranges(&disk) {
            match disk.zero(offset, len as u64, flags).await {
                Ok(()) => image[span(offset, len)].fill(0),
                // Then the data is untouched, which is what the image says.
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::NotSupported, "{flags:?} {offset} {len}: {error}");
                    assert!(flags.contains(Flags::FAST_ZERO), "only fast zeroes may be refused");
                }
            }
        }
        disk.assert_is(&image).await;
    }
}

pub async fn fast_zero_is_all_or_nothing(disk: Disk) {
    if !disk.export.geometry().capabilities.contains(Capabilities::FAST_ZERO) {
        return;
    }
    let image = filled(&disk).await;
    for (offset, len) in ranges(&disk) {
        let result = disk.zero(offset, len as u64, Flags::FAST_ZERO).await;
        let expected = if result.is_ok() { vec![0; len] } else { image[span(offset, len)].to_vec() };
        assert!(disk.read(Path::Fast, offset, len).await.unwrap() == expected, "{offset} {len} {result:?}");
        disk.write(Path::Fast, offset, &image[span(offset, len)], Flags::NONE).await.unwrap();
    }
}

pub async fn the_whole_disk_can_be_zeroed_and_used_again(disk: Disk) {
    let mut image = filled(&disk).await;
    disk.zero(0, disk.size(), Flags::NONE).await.unwrap();
    image.fill(0);
    disk.assert_is(&image).await;
    let image = filled(&disk).await;
    disk.zero(0, 0, Flags::NONE).await.unwrap();
    disk.assert_is(&image).await;
}

pub async fn trim_keeps_its_neighbours(disk: Disk) {
    for flags in [Flags::NONE, Flags::FUA] {
        let mut image = filled(&disk).await;
        for (offset, len) in ranges(&disk) {
            disk.trim(offset, len as u64, flags).await.unwrap();
            // What a trimmed range reads as is not defined, but it stays.
            let now = disk.read(Path::Slow, offset, len).await.unwrap();
            image[span(offset, len)].copy_from_slice(&now);
            disk.assert_is(&image).await;
        }
        for (offset, len) in ranges(&disk) {
            let data = pattern(offset + 5, len);
            disk.write(Path::Fast, offset, &data, Flags::NONE).await.unwrap();
            image[span(offset, len)].copy_from_slice(&data);
        }
        disk.assert_is(&image).await;
    }
}
