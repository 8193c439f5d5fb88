//! What is written is read.

use bridge::Flags;
use std::rc::Rc;

use bridge::worker::Workers;

use super::{fresh, ranges, span};
use crate::support::disk::PATHS;
use crate::support::{Disk, Kind, Path, pattern};

pub async fn a_new_disk_holds_what_it_should(disk: Disk) {
    disk.assert_is(&fresh(&disk)).await;
    let image = fresh(&disk);
    for (offset, len) in ranges(&disk) {
        for path in PATHS {
            assert!(
                disk.read(path, offset, len).await.unwrap() == image[span(offset, len)],
                "{offset} {len}"
            );
        }
    }
}

pub async fn read_after_write(disk: Disk) {
    let mut image = fresh(&disk);
    for (n, (offset, len)) in ranges(&disk).into_iter().enumerate() {
        // Each has other bytes, so that one that went missing shows.
        let data = pattern(offset * 7 + n as u64, len);
        disk.write(PATHS[n % 2], offset, &data, Flags::NONE).await.unwrap();
        image[span(offset, len)].copy_from_slice(&data);
        for path in PATHS {
            assert!(disk.read(path, offset, len).await.unwrap() == data, "{offset} {len} {path:?}");
        }
    }
    disk.assert_is(&image).await;
}

pub async fn zeroes_overwrite_data(disk: Disk) {
    // A sparse backend may treat them apart.
    let mut image = super::filled(&disk).await;
    for (offset, len) in ranges(&disk) {
        disk.write(Path::Fast, offset, &vec![0; len], Flags::NONE).await.unwrap();
        image[span(offset, len)].fill(0);
    }
    disk.assert_is(&image).await;
}

pub async fn empty_requests_do_nothing(disk: Disk) {
    let image = fresh(&disk);
    for offset in [0, 1, disk.size() - 1, disk.size()] {
        for path in PATHS {
            assert!(disk.read(path, offset, 0).await.unwrap().is_empty());
            if disk.kind != Kind::ReadOnly {
                disk.write(path, offset, &[], Flags::NONE).await.unwrap();
                disk.trim(offset, 0, Flags::NONE).await.unwrap();
                disk.zero(offset, 0, Flags::NONE).await.unwrap();
            }
            disk.cache(offset, 0).await.unwrap();
        }
    }
    disk.assert_is(&image).await;
}

pub async fn flush_and_fua_change_no_data(disk: Disk) {
    let mut image = fresh(&disk);
    disk.flush().await.unwrap();
    for (n, (offset, len)) in ranges(&disk).into_iter().enumerate() {
        let data = pattern(n as u64, len);
        disk.write(PATHS[n % 2], offset, &data, Flags::FUA).await.unwrap();
        image[span(offset, len)].copy_from_slice(&data);
        disk.flush().await.unwrap();
    }
    disk.zero(1000, 70_000, Flags::FUA).await.unwrap();
    image[1000..71_000].fill(0);
    disk.assert_is(&image).await;
    disk.trim(1000, 70_000, Flags::FUA).await.unwrap();
    disk.cache(0, disk.size()).await.unwrap();
    image[1000..71_000].copy_from_slice(&disk.read(Path::Slow, 1000, 70_000).await.unwrap());
    disk.assert_is(&image).await;
}

pub async fn workers_share_a_disk(disk: Disk) {
    let workers = Rc::new(Workers::start(3).unwrap());
    let part = 300_000;
    let mut tasks = Vec::new();
    for n in 0..16_usize {
        let (disk, workers) = (disk.clone(), workers.clone());
        let work = move || async move {
            let start = (n * part) as u64;
            for round in 0..8_u64 {
                let data = pattern(round * 1_000_003 + start, part);
                // Pieces that share no bytes, but blocks with the neighbour's.
                for (piece, bytes) in data.chunks(part / 5).enumerate() {
                    let offset = start + (piece * (part / 5)) as u64;
                    disk.write(PATHS[piece % 2], offset, bytes, Flags::NONE).await.unwrap();
                }
                if round % 4 == 3 {
                    disk.flush().await.unwrap();
                }
                assert!(
                    disk.read(PATHS[n % 2], start, part).await.unwrap() == data,
                    "part {n}, round {round}"
                );
            }
        };
        tasks.push(tokio::task::spawn_local(async move { workers.run(n, work).await }));
    }
    for task in tasks {
        task.await.unwrap().expect("a worker's task ended well");
    }
}
