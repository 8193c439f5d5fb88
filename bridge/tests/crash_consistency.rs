//! What was flushed, or written with FUA, survives a loss of power at any moment, with many requests in flight,
//! through every layer. (And the check itself notices a flush that did not happen.)
//!
//! Each sector that is written holds a stamp of its own. The model keeps the stamps that a sector was given, in
//! order, and which of them is the oldest that may still be there after a crash.

#![allow(unreachable_pub, clippy::unwrap_used, reason = "a test program: exports nothing, may panic")]

mod support;

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use bridge::backend::crash::{CrashBackend, CrashHandle, SECTOR_BYTES};
use bridge::backend::memory::MemoryBackend;
use bridge::layer::overlay::{self, BootId, Overlay};
use bridge::random::Random;
use bridge::{Backend, Export, Flags};

use support::disk::PATHS;
use support::stacks::{fault, memory, throttle};
use support::{Disk, Kind, for_seeds, run, seed};

const TASKS: u64 = 32;
const SECTORS_PER_TASK: u64 = 48;
const STEPS_PER_TASK: usize = 60;

const DISK_BYTES: u64 = TASKS * SECTORS_PER_TASK * SECTOR_BYTES as u64;

/// What stands between the requests and the disk that crashes.
struct Stack {
    name: &'static str,
    /// What the disk that crashes holds at first.
    image: fn() -> Vec<u8>,
    wrap: fn(Box<dyn Backend>) -> Box<dyn Backend>,
    /// What is seen through the stack of what a crash left: of the host, which boots anew, or of the process.
    view: fn(Vec<u8>, Crash) -> Vec<u8>,
}

#[derive(Clone, Copy, PartialEq)]
enum Crash {
    Host,
    Process,
}

const fn plain(name: &'static str, wrap: fn(Box<dyn Backend>) -> Box<dyn Backend>) -> Stack {
    Stack { name, image: || vec![0; usize::try_from(DISK_BYTES).unwrap()], wrap, view: |image, _| image }
}

const fn over(name: &'static str, wrap: fn(Box<dyn Backend>) -> Box<dyn Backend>) -> Stack {
    Stack { name, image: new_overlay, wrap, view: through_overlay }
}

#[rustfmt::skip]
const STACKS: &[Stack] = &[
    plain("the disk alone", |disk| disk),
    plain("throttle, often full", |disk| throttle(disk, "iops-total=20000")),
    plain("throttle, idle", |disk| throttle(disk, "")),
    plain("fault, late", |disk| fault(disk, "seed=3,delay-ms=1,delay-rate=0.1")),
    plain("fault over throttle", |disk| fault(throttle(disk, "bps-write=500M"), "seed=3,delay-ms=1,delay-rate=0.1,op=flush")),
    over("kept overlay", |disk| Box::new(open_overlay(disk, BOOTS[0]))),
    over("fault over kept overlay", |disk| fault(Box::new(open_overlay(disk, BOOTS[0])), "seed=5,delay-ms=1,delay-rate=0.05")),
    over("kept overlay in a store that is late", |disk| Box::new(open_overlay(fault(disk, "seed=6,delay-ms=1,delay-rate=0.05,op=write"), BOOTS[0]))),
];

/// Before a crash of the host, and after it.
const BOOTS: [BootId; 2] = [[1; 16], [2; 16]];

/// The file of a new overlay over a base of zeroes.
fn new_overlay() -> Vec<u8> {
    let len = overlay::kept_bytes(DISK_BYTES).unwrap();
    let store = CrashBackend::new(vec![0; usize::try_from(len).unwrap()], 1);
    let handle = store.handle();
    let make = || run(Overlay::create(memory(DISK_BYTES), Box::new(store), "base", "raw", Some(BOOTS[0])));
    // The caller is on a runtime already.
    std::thread::scope(|scope| scope.spawn(|| drop(make().unwrap())).join().unwrap());
    handle.durable()
}

fn open_overlay(store: Box<dyn Backend>, boot: BootId) -> Overlay {
    now(Overlay::open(memory(DISK_BYTES), store, Some(boot), false)).unwrap()
}

fn through_overlay(image: Vec<u8>, crash: Crash) -> Vec<u8> {
    let store = MemoryBackend::new(image.len() as u64);
    store.try_write(0, &image, Flags::NONE).unwrap().unwrap();
    let disk = open_overlay(Box::new(store), BOOTS[usize::from(crash == Crash::Host)]);
    let bytes = bridge::Buffer::new(usize::try_from(DISK_BYTES).unwrap());
    now(disk.read(0, bytes, Flags::NONE)).unwrap().to_vec()
}

/// The outcome of a future that waits for nothing: neither do disks in memory, nor reads of one that crashes.
fn now<T>(future: impl Future<Output = T>) -> T {
    match std::pin::pin!(future).poll(&mut std::task::Context::from_waker(std::task::Waker::noop())) {
        std::task::Poll::Ready(value) => value,
        std::task::Poll::Pending => panic!("it waits"),
    }
}

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
    stack: &'static Stack,
    disk: Disk,
    handle: CrashHandle,
    sectors: RefCell<Vec<Sector>>,
    next_stamp: Cell<u64>,
    /// Claims that flushes happen, and does none: to see that the check notices.
    skips_flushes: bool,
}

impl Run {
    fn new(stack: &'static Stack, seed: u64, skips_flushes: bool) -> Rc<Self> {
        let count = usize::try_from(TASKS * SECTORS_PER_TASK).unwrap();
        let crash = CrashBackend::new((stack.image)(), seed);
        let handle = crash.handle();
        let export = Export::new("crash", None, (stack.wrap)(Box::new(crash)));
        let sector = Sector { stamps: vec![0], answered: 1, oldest: 0 };
        Rc::new(Run {
            stack,
            disk: Disk::new(export, Kind::Stores),
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

    /// Crashes, and counts the sectors that hold what they must not: after a crash of the host something older than
    /// what was flushed, after one of the process something older than what was answered.
    fn violations(&self, seed: u64) -> usize {
        let sectors = self.sectors.borrow();
        let wrong = |crash: Crash, image: Vec<u8>| {
            let image = (self.stack.view)(image, crash);
            let wrong = |(bytes, sector): &(&[u8], &Sector)| {
                let stamp = u64::from_le_bytes(bytes[..8].try_into().unwrap());
                let oldest = if crash == Crash::Host { sector.oldest } else { sector.answered - 1 };
                // All parts are alike where each is as the one after it.
                let torn = bytes[..SECTOR_BYTES - 8] != bytes[8..];
                torn || !sector.stamps[oldest..].contains(&stamp)
            };
            image.chunks(SECTOR_BYTES).zip(sectors.iter()).filter(wrong).count()
        };
        let host = wrong(Crash::Host, self.handle.crash(seed));
        host + wrong(Crash::Process, self.handle.volatile())
    }
}

/// Runs all tasks, crashing (in thought) again and again, and returns the violations.
async fn exercise(stack: &'static Stack, seed: u64, skips_flushes: bool) -> usize {
    let run = Run::new(stack, seed, skips_flushes);
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
        let [crash, now] =
            [run.handle.crash(seed), run.handle.volatile()].map(|image| (stack.view)(image, Crash::Host));
        assert!(crash == now, "after a last flush nothing is at risk");
    }
    violations.get() + run.violations(seed)
}

#[test]
fn nothing_flushed_or_written_with_fua_is_lost() {
    for_seeds(Duration::from_secs(8), |seed| {
        for stack in STACKS {
            assert_eq!(run(exercise(stack, seed, false)), 0, "{}, seed {seed}", stack.name);
        }
    });
}

#[test]
fn a_flush_that_did_not_happen_is_noticed() {
    let seed = seed();
    for stack in STACKS {
        assert!(run(exercise(stack, seed, true)) > 0, "{}", stack.name);
    }
}
