//! Random requests, checked against a byte array: 64 in flight at once over ranges that do not overlap, on one
//! worker and on several, and one after the other over ranges that do. On every stack that stores.
//!
//! `NBDBRIDGE_SEED=n` repeats or varies a run.

#![allow(unreachable_pub, clippy::unwrap_used, reason = "a test program: exports nothing, may panic")]

mod support;

use std::rc::Rc;

use bridge::random::Random;
use bridge::worker::Workers;
use bridge::{ErrorKind, ExtentKind, Flags};

use support::disk::{PATHS, is_zero};
use support::stacks::STORES;
use support::{Disk, on_every_stack, seed};

/// Requests under way at once.
const IN_FLIGHT: u64 = 64;

/// A part of a disk, and what it must hold.
struct Model {
    disk: Disk,
    start: u64,
    bytes: Vec<u8>,
    random: Random,
}

impl Model {
    async fn new(disk: Disk, start: u64, len: u64, seed: u64) -> Self {
        let bytes = disk.read(PATHS[1], start, usize::try_from(len).unwrap()).await.unwrap();
        Model { disk, start, bytes, random: Random::new(seed) }
    }

    /// A range of the part; most are small, some are large, some aligned.
    fn range(&mut self) -> (usize, usize) {
        let len = self.bytes.len() as u64;
        let most = [1, 512, 4096, 70_000, len][usize::try_from(self.random.below(5)).unwrap()];
        let mut size = 1 + self.random.below(most.min(len));
        let mut from = self.random.below(len - size + 1);
        if self.random.chance(0.3) {
            from -= from % 4096;
            size = size.next_multiple_of(512).min(len - from);
        }
        (usize::try_from(from).unwrap(), usize::try_from(size).unwrap())
    }

    async fn step(&mut self) {
        let (from, len) = self.range();
        let (offset, place) = (self.start + from as u64, from..from + len);
        let path = PATHS[usize::try_from(self.random.below(2)).unwrap()];
        let mut flags = if self.random.chance(0.1) { Flags::FUA } else { Flags::NONE };
        match self.random.below(100) {
            0..40 => {
                let found = self.disk.read(path, offset, len).await.unwrap();
                assert!(found == self.bytes[place], "read of {len} bytes at {offset} ({path:?})");
            }
            40..75 => {
                let mut data = vec![0; len];
                if self.random.chance(0.9) {
                    self.random.fill(&mut data);
                }
                self.disk.write(path, offset, &data, flags).await.unwrap();
                self.bytes[place].copy_from_slice(&data);
            }
            75..85 => {
                for flag in [Flags::NO_HOLE, Flags::FAST_ZERO] {
                    if self.random.chance(0.5) {
                        flags |= flag;
                    }
                }
                match self.disk.zero(offset, len as u64, flags).await {
                    Ok(()) => self.bytes[place].fill(0),
                    Err(error) => {
                        assert!(flags.contains(Flags::FAST_ZERO) && error.kind() == ErrorKind::NotSupported);
                    }
                }
            }
            85..92 => {
                self.disk.trim(offset, len as u64, flags).await.unwrap();
                // Not defined, but from now on the same.
                let found = self.disk.read(path, offset, len).await.unwrap();
                self.bytes[place].copy_from_slice(&found);
            }
            92..96 => self.status(from, len).await,
            96..98 => self.disk.flush().await.unwrap(),
            _ => self.disk.cache(offset, len as u64).await.unwrap(),
        }
    }

    async fn status(&self, from: usize, len: usize) {
        let (mut at, end) = (from, from + len);
        for extent in self.disk.status(self.start + from as u64, len as u64, Flags::NONE).await.unwrap() {
            let next = at + usize::try_from(extent.len).unwrap();
            assert!(next <= end);
            assert!(extent.kind == ExtentKind::Data || is_zero(&self.bytes[at..next]), "{extent:?} at {at}");
            at = next;
        }
    }

    async fn run(&mut self, steps: u32) {
        for _ in 0..steps {
            self.step().await;
        }
        let found = self.disk.read(PATHS[0], self.start, self.bytes.len()).await.unwrap();
        assert!(found == self.bytes, "the part at {}", self.start);
    }
}

/// The length of each of the parts that the disk is cut into; the last bytes are nobody's.
fn part_len(disk: &Disk) -> u64 {
    disk.size() / IN_FLIGHT
}

#[test]
fn many_requests_in_flight_on_one_worker() {
    let seed = seed();
    on_every_stack(STORES, async |disk| {
        let len = part_len(&disk);
        let tasks: Vec<_> = (0..IN_FLIGHT)
            .map(|n| {
                let disk = disk.clone();
                tokio::task::spawn_local(async move {
                    Model::new(disk, n * len, len, seed + n).await.run(40).await;
                })
            })
            .collect();
        for task in tasks {
            task.await.unwrap();
        }
    });
}

#[test]
fn many_requests_in_flight_on_several_workers() {
    let seed = seed();
    on_every_stack(STORES, async |disk| {
        let workers = Rc::new(Workers::start(3).unwrap());
        let len = part_len(&disk);
        let tasks: Vec<_> = (0..IN_FLIGHT)
            .map(|n| {
                let (disk, workers) = (disk.clone(), workers.clone());
                let work = move || async move {
                    Model::new(disk, n * len, len, seed + n).await.run(40).await;
                };
                let worker = workers.next();
                tokio::task::spawn_local(async move { workers.run(worker, work).await })
            })
            .collect();
        for task in tasks {
            task.await.unwrap().expect("a worker's task ended well");
        }
    });
}

#[test]
fn one_request_after_the_other_anywhere() {
    let seed = seed();
    on_every_stack(STORES, async |disk| {
        let size = disk.size();
        Model::new(disk, 0, size, seed).await.run(300).await;
    });
}
