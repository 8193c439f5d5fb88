//! What was flushed, or written with FUA, survives a loss of power at any moment, with many requests in flight,
//! through every layer. (And the check itself notices a flush that did not happen.)
//!
//! Each sector that is written holds a stamp of its own. The model keeps the stamps that a sector was given, in
//! order, and which of them is the oldest that may still be there after a crash.

#![allow(unreachable_pub, clippy::unwrap_used, reason = "a test program: exports nothing, may panic")]

mod support;

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use bridge::backend::crash::{CrashBackend, CrashHandle, SECTOR_BYTES};
use bridge::random::Random;
use bridge::{Backend, Export, Flags};

use support::disk::PATHS;
use support::stacks::{fault, throttle};
use support::{Disk, Kind, run, seed};

const TASKS: u64 = 32;
const SECTORS_PER_TASK: u64 = 48;
const STEPS_PER_TASK: usize = 60;

type Wrap = fn(Box<dyn Backend>) -> Box<dyn Backend>;

/// What stands between the requests and the disk that crashes.
#[rustfmt::skip]
const STACKS: &[(&str, Wrap)] = &[
    ("the disk alone", |disk| disk),
    ("throttle, often full", |disk| throttle(disk, "iops-total=20000")),
    ("throttle, idle", |disk| throttle(disk, "")),
    ("fault, late", |disk| fault(disk, "seed=3,delay-ms=1,delay-rate=0.1")),
    ("fault over throttle", |disk| fault(throttle(disk, "bps-write=500M"), "seed=3,delay-ms=1,delay-rate=0.1,op=flush")),
];

#[derive(Clone)]
struct Sector {
    /// Every stamp it was given, answered or not; zeroes are stamp 0.
    stamps: Vec<u64>,
    /// How many of them were answered.
    answered: usize,
    /// The oldest one that a crash may leave, as an index.
    oldest: usize,
}

struct Run {
    disk: Disk,
    handle: CrashHandle,
    sectors: RefCell<Vec<Sector>>,
    next_stamp: Cell<u64>,
    /// Claims that flushes happen, and does none: to see that the check notices.
    skips_flushes: bool,
}

impl Run {
    fn new(wrap: Wrap, seed: u64, skips_flushes: bool) -> Rc<Self> {
        let count = usize::try_from(TASKS * SECTORS_PER_TASK).unwrap();
        let crash = CrashBackend::new(vec![0; count * SECTOR_BYTES], seed);
        let handle = crash.handle();
        let export = Export::new("crash", None, wrap(Box::new(crash)));
        let sector = Sector { stamps: vec![0], answered: 1, oldest: 0 };
        Rc::new(Run {
            disk: Disk { export, kind: Kind::Stores },
            handle,
            sectors: RefCell::new(vec![sector; count]),
            next_stamp: Cell::new(1),
            skips_flushes,
        })
    }

    /// Writes or zeroes some sectors of a task's own.
    async fn change(&self, random: &mut Random, first: u64) {
        let count = 1 + random.below(10);
        let start = first + random.below(SECTORS_PER_TASK - count + 1);
        let fua = random.chance(0.2);
        let flags = if fua { Flags::FUA } else { Flags::NONE };
        let zero = random.chance(0.2);
        let mut data = Vec::new();
        let range = usize::try_from(start).unwrap()..usize::try_from(start + count).unwrap();
        for sector in range.clone() {
            let stamp = if zero { 0 } else { self.next_stamp.replace(self.next_stamp.get() + 1) };
            data.extend(stamp.to_le_bytes().repeat(SECTOR_BYTES / 8));
            self.sectors.borrow_mut()[sector].stamps.push(stamp);
        }
        let (offset, len) = (start * SECTOR_BYTES as u64, count * SECTOR_BYTES as u64);
        if !zero {
            let path = PATHS[usize::try_from(random.below(2)).unwrap()];
            self.disk.write(path, offset, &data, flags).await.unwrap();
        } else if random.chance(0.5) {
            self.disk.zero(offset, len, flags).await.unwrap();
        } else {
            self.disk.trim(offset, len, flags).await.unwrap();
        }
        for sector in &mut self.sectors.borrow_mut()[range] {
            sector.answered = sector.stamps.len();
            if fua {
                sector.oldest = sector.answered - 1;
            }
        }
    }

    async fn flush(&self) {
        let answered: Vec<usize> = self.sectors.borrow().iter().map(|sector| sector.answered).collect();
        if !self.skips_flushes {
            self.disk.flush().await.unwrap();
        }
        for (sector, answered) in self.sectors.borrow_mut().iter_mut().zip(answered) {
            sector.oldest = sector.oldest.max(answered - 1);
        }
    }

    /// Crashes, and counts the sectors that hold what they must not.
    fn violations(&self, seed: u64) -> usize {
        let image = self.handle.crash(seed);
        let sectors = self.sectors.borrow();
        let wrong = |(bytes, sector): &(&[u8], &Sector)| {
            let stamp = u64::from_le_bytes(bytes[..8].try_into().unwrap());
            // All parts are alike where each is as the one after it.
            let torn = bytes[..SECTOR_BYTES - 8] != bytes[8..];
            torn || !sector.stamps[sector.oldest..].contains(&stamp)
        };
        image.chunks(SECTOR_BYTES).zip(sectors.iter()).filter(wrong).count()
    }
}

/// Runs all tasks, crashing (in thought) again and again, and returns the violations.
async fn exercise(wrap: Wrap, seed: u64, skips_flushes: bool) -> usize {
    let run = Run::new(wrap, seed, skips_flushes);
    let violations = Rc::new(Cell::new(0));
    let tasks: Vec<_> = (0..TASKS)
        .map(|n| {
            let (run, violations) = (run.clone(), violations.clone());
            tokio::task::spawn_local(async move {
                let mut random = Random::new(seed * 1000 + n);
                for _ in 0..STEPS_PER_TASK {
                    match random.below(20) {
                        0 => run.flush().await,
                        1 => violations.set(violations.get() + run.violations(random.number())),
                        _ => run.change(&mut random, n * SECTORS_PER_TASK).await,
                    }
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    run.flush().await;
    if !skips_flushes {
        assert_eq!(run.handle.crash(seed), run.handle.volatile(), "after a last flush nothing is at risk");
    }
    violations.get() + run.violations(seed)
}

#[test]
fn nothing_flushed_or_written_with_fua_is_lost() {
    let seed = seed();
    for (name, wrap) in STACKS {
        println!("stack: {name}");
        for round in 0..4 {
            assert_eq!(run(exercise(*wrap, seed * 10 + round, false)), 0, "{name}, round {round}");
        }
    }
}

#[test]
fn a_flush_that_did_not_happen_is_noticed() {
    let seed = seed();
    for (name, wrap) in STACKS {
        assert!(run(exercise(*wrap, seed, true)) > 0, "{name}");
    }
}
