//! What the integration tests share: the table of stacks, a client of an export, and the seed.

#![allow(dead_code, unused_imports, reason = "each test program uses its part")]

pub mod disk;
pub mod nbd;
pub mod stacks;

use std::io::Write;
use std::time::{Duration, Instant};

use bridge::Export;
use tokio::runtime::{Builder, LocalOptions};

pub use disk::{Disk, Path, pattern};
pub use stacks::{Kind, STACKS};

/// Long enough for the slowest check on the slowest stack under a busy machine; a check that hangs fails.
const PATIENCE: Duration = Duration::from_secs(60);

/// The seed of a test's random numbers: 1, or NBDBRIDGE_SEED. Printed, so that a failure can be repeated.
pub fn seed() -> u64 {
    let seed = match std::env::var("NBDBRIDGE_SEED") {
        Ok(text) => text.parse().expect("NBDBRIDGE_SEED is a number"),
        Err(_) => 1,
    };
    println!("NBDBRIDGE_SEED={seed}");
    seed
}

/// Runs a test with one seed after the other, each printed, until the time is up: NBDBRIDGE_SEED alone where it is set, else 1,
/// 2 and so on, two of them at least.
pub fn for_seeds(budget: Duration, mut test: impl FnMut(u64)) {
    let begun = Instant::now();
    let first = seed();
    test(first);
    if std::env::var_os("NBDBRIDGE_SEED").is_some() {
        return;
    }
    for seed in first + 1.. {
        println!("NBDBRIDGE_SEED={seed}");
        test(seed);
        if begun.elapsed() >= budget {
            return;
        }
    }
}

/// Runs a future on a worker's kind of runtime.
pub fn run<T>(future: impl Future<Output = T>) -> T {
    let runtime = Builder::new_current_thread().enable_all().build_local(LocalOptions::default()).unwrap();
    runtime.block_on(async { tokio::time::timeout(PATIENCE, future).await.expect("it hangs") })
}

/// Runs a check on a new disk of every stack of these kinds. What cannot be had here is skipped aloud.
pub fn on_every_stack(kinds: &[Kind], check: impl AsyncFn(Disk)) {
    for stack in STACKS.iter().filter(|stack| kinds.contains(&stack.kind)) {
        println!("stack: {}", stack.name);
        run(async {
            match (stack.make)(stacks::DISK_BYTES) {
                Ok((backend, keep)) => {
                    check(Disk::new(Export::new("test", None, backend), stack.kind)).await;
                    drop(keep);
                }
                // Not by `eprintln`, which the test harness keeps to itself where a test passes.
                Err(reason) => {
                    let line = format!("SKIPPED on {}: {reason}\n", stack.name);
                    #[allow(clippy::disallowed_methods)] // a test's own stderr
                    let _ = std::io::stderr().write_all(line.as_bytes());
                }
            }
        });
    }
}
