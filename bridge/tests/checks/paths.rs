//! The fast path, the slow path and the file range give the same; every request is counted once.

use std::os::unix::fs::FileExt;
use std::time::Instant;

use bridge::random::Random;
use bridge::{Data, Flags, Operation, RangeOrHole, Request};

use super::{fresh, ranges};
use crate::support::disk::PATHS;
use crate::support::{Disk, Kind, Path, pattern};

pub async fn both_paths_give_the_same(disk: Disk) {
    for (n, (offset, len)) in ranges(&disk).into_iter().enumerate() {
        for write_path in PATHS {
            if disk.kind != Kind::ReadOnly {
                disk.write(write_path, offset, &pattern(n as u64, len), Flags::NONE).await.unwrap();
            }
            let fast = disk.read(Path::Fast, offset, len).await.unwrap();
            assert!(
                fast == disk.read(Path::Slow, offset, len).await.unwrap(),
                "{offset} {len} {write_path:?}"
            );
        }
    }
    for (offset, len) in [(disk.size(), 1), (u64::MAX, 2)] {
        let kinds = [
            disk.read(Path::Fast, offset, len).await.map_err(|error| error.kind()),
            disk.read(Path::Slow, offset, len).await.map_err(|error| error.kind()),
        ];
        assert_eq!(kinds[0], kinds[1]);
    }
}

pub async fn file_ranges_hold_what_reads_give(disk: Disk) {
    if disk.kind == Kind::Stores {
        disk.write(Path::Slow, 1 << 20, &pattern(1, 3 << 20), Flags::NONE).await.unwrap();
    }
    for (offset, len) in ranges(&disk) {
        let request = Request::new(Operation::Read, offset, len as u64);
        let Some(range) = disk.export.try_file_range(&request, Instant::now()) else { continue };
        let bytes = match range {
            RangeOrHole::Hole(hole) => vec![0; usize::try_from(hole).unwrap()],
            RangeOrHole::Range(range) => {
                let mut bytes = vec![0; usize::try_from(range.len).unwrap()];
                range.file.read_exact_at(&mut bytes, range.offset).unwrap();
                bytes
            }
        };
        assert!(!bytes.is_empty() && bytes.len() <= len);
        assert!(bytes == disk.read(Path::Slow, offset, bytes.len()).await.unwrap(), "{offset} {len}");
    }
}

pub async fn every_request_is_counted_once(disk: Disk) {
    if disk.has_blocks() {
        // One that is not aligned becomes several.
        return;
    }
    let mut random = Random::new(7);
    let mut expected = [(0_u64, 0_u64, 0_u64); Operation::COUNT];
    for n in 0..400 {
        let operation = Operation::ALL[usize::try_from(random.below(7)).unwrap()];
        let (offset, len) = if operation == Operation::Flush {
            (0, 0)
        } else {
            // Some of them go past the end.
            (random.below(disk.size() + 4096), 1 + random.below(9000))
        };
        let continued = n % 5 == 0;
        let flags = if continued { Flags::CONTINUED } else { Flags::NONE };
        let size = usize::try_from(len).unwrap();
        let path = PATHS[usize::try_from(random.below(2)).unwrap()];
        let ok = match operation {
            Operation::Read => disk.read_with(path, offset, size, flags).await.is_ok(),
            Operation::Write => disk.write(path, offset, &pattern(offset, size), flags).await.is_ok(),
            _ => disk.execute(Request::new(operation, offset, len).with_flags(flags), None).await.is_ok(),
        };
        let (count, bytes, errors) = &mut expected[operation as usize];
        *count += u64::from(!continued);
        *if ok { bytes } else { errors } += if ok { len } else { 1 };
    }
    for operation in Operation::ALL {
        let found = disk.export.stats().of(operation);
        let figures = (found.count, found.bytes, found.errors);
        assert_eq!(figures, expected[operation as usize], "{operation:?}");
        assert_eq!(found.latency.iter().sum::<u64>(), found.count);
    }
}

pub async fn a_declined_request_has_done_and_counted_nothing(disk: Disk) {
    let mut image = fresh(&disk);
    let len = 5000_usize.next_multiple_of(usize::try_from(disk.export.geometry().min_block).unwrap());
    let step = if disk.has_blocks() { 65_536 } else { 40_000 };
    for n in 0..140 * 40_000 / step {
        let (offset, data) = (n * step, pattern(n, len));
        let before = disk.export.stats().of(Operation::Write);
        let request = Request::new(Operation::Write, offset, len as u64);
        let result = disk.export.try_execute(&request, Data::From(&data), Instant::now());
        let counted = disk.export.stats().of(Operation::Write).count - before.count;
        assert_eq!(counted, u64::from(result.is_some()));
        if let Some(result) = result {
            result.unwrap();
            let at = super::span(offset, len);
            image[at].copy_from_slice(&data);
        }
    }
    disk.assert_is(&image).await;
}
