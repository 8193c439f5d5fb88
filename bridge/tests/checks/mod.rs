//! The checks of the conformance suite, by theme. Each runs on a new disk.

pub mod data;
pub mod limits;
pub mod paths;
pub mod size;
pub mod status;
pub mod zeroes;

use bridge::Flags;

use crate::support::disk::PATHS;
use crate::support::{Disk, Kind, pattern};

/// What a new disk of this kind holds.
pub fn fresh(disk: &Disk) -> Vec<u8> {
    let len = usize::try_from(disk.size()).unwrap();
    match disk.kind {
        Kind::ReadOnly | Kind::Filled => pattern(0, len),
        Kind::Stores | Kind::Discards => vec![0; len],
    }
}

/// Fills the disk with the pattern and returns what it holds then.
pub async fn filled(disk: &Disk) -> Vec<u8> {
    let image = pattern(0, usize::try_from(disk.size()).unwrap());
    for (n, part) in image.chunks(1 << 20).enumerate() {
        disk.write(PATHS[n % 2], (n << 20) as u64, part, Flags::NONE).await.unwrap();
    }
    image
}

/// Ranges (offset, length) of all sizes, aligned and not, at the beginning, in the middle and at the end.
pub fn ranges(disk: &Disk) -> Vec<(u64, usize)> {
    let size = disk.size();
    let mut ranges = vec![
        (0, 1),
        (1, 1),
        (511, 2),
        (512, 512),
        (4095, 4098),
        (4096, 4096),
        (65_535, 2),
        (65_536, 65_536),
        (65_537, 131_072),
        (100_001, 99_999),
        (1_048_575, 1_048_578),
        (3, 5 << 20),
    ];
    ranges.extend([1, 511, 513, 65_535].map(|len: u16| (size - u64::from(len), usize::from(len))));
    ranges
}

/// A range of an image.
pub fn span(offset: u64, len: usize) -> std::ops::Range<usize> {
    let offset = usize::try_from(offset).unwrap();
    offset..offset + len
}
