use std::cell::RefCell;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use tokio::runtime::{Builder, LocalOptions};
use tokio::time::Instant;

use super::*;
use crate::backend::memory::MemoryBackend;
use crate::backend::null::NullBackend;
use crate::{Capabilities, RangeOrHole};

/// Runs on a paused clock: sleeps take no time, and are exact to the timer's millisecond.
fn paused<T>(future: impl Future<Output = T>) -> T {
    Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build_local(LocalOptions::default())
        .unwrap()
        .block_on(future)
}

fn throttle(text: &str) -> Rc<Throttle> {
    Rc::new(Throttle::new(Box::new(NullBackend::new(1 << 40)), text.parse().unwrap()).unwrap())
}

async fn write(throttle: &Throttle, bytes: usize) {
    throttle.write(0, Buffer::new(bytes), Flags::NONE).await.unwrap();
}

#[test]
fn without_limits_all_passes() {
    paused(async {
        let throttle = throttle("");
        for _ in 0..1000 {
            assert!(throttle.try_read(0, &mut [0; 4096], Flags::NONE).is_some());
            write(&throttle, 4096).await;
        }
    });
}

#[test]
fn the_fast_path_passes_until_the_bucket_is_full() {
    paused(async {
        let throttle = throttle("iops-total=100");
        let passed = (0..50).filter(|_| throttle.try_write(0, &[1], Flags::NONE).is_some()).count();
        assert_eq!(passed, 11, "a tenth of a second, and one that overfills it");
        assert!(throttle.try_read(0, &mut [0], Flags::NONE).is_none(), "shared with reads");
        tokio::time::sleep(Duration::from_millis(50)).await;
        let passed = (0..50).filter(|_| throttle.try_read(0, &mut [0], Flags::NONE).is_some()).count();
        assert_eq!(passed, 5);
    });
}

#[test]
fn waiters_go_in_the_order_they_came_at_the_set_rate() {
    paused(async {
        let throttle = throttle("bps-write=1M");
        let (start, order) = (Instant::now(), Rc::new(RefCell::new(Vec::new())));
        let tasks: Vec<_> = (0..100_u32)
            .map(|n| {
                let (throttle, order) = (throttle.clone(), order.clone());
                tokio::task::spawn_local(async move {
                    // Large and small: a large one must not be overtaken for ever.
                    write(&throttle, if n % 2 == 0 { 64 << 10 } else { 1 << 10 }).await;
                    order.borrow_mut().push(n);
                })
            })
            .collect();
        tokio::task::yield_now().await;
        assert!(throttle.try_write(0, &[1], Flags::NONE).is_none(), "others wait");
        assert!(throttle.try_read(0, &mut [1], Flags::NONE).is_some(), "reads are not limited");
        for task in tasks {
            task.await.unwrap();
        }
        assert!(order.borrow().is_sorted(), "{:?}", order.borrow());
        let (sum, elapsed) = (50.0 * 65.0 / 1024.0, start.elapsed().as_secs_f64());
        assert!((sum - 0.17..sum - 0.09).contains(&elapsed), "{elapsed} s for {sum} s of writes");
    });
}

#[test]
fn reads_and_writes_share_a_total_without_starving_each_other() {
    paused(async {
        let throttle = throttle("bps-total=1M");
        let read = Rc::new(AtomicU64::new(0));
        let reader = {
            let (throttle, read) = (throttle.clone(), read.clone());
            tokio::task::spawn_local(async move {
                loop {
                    throttle.read(0, Buffer::new(64 << 10), Flags::NONE).await.unwrap();
                    read.fetch_add(64 << 10, Relaxed);
                }
            })
        };
        let start = Instant::now();
        for _ in 0..100 {
            write(&throttle, 64 << 10).await;
        }
        reader.abort();
        let (written, read) = (100.0 / 16.0, read.load(Relaxed) as f64 / f64::from(1 << 20));
        assert!(read > 0.9 * written && read < 1.1 * written, "{read} MiB read, {written} MiB written");
        let elapsed = start.elapsed().as_secs_f64();
        assert!((read + written - elapsed).abs() < 0.3, "{} MiB in {elapsed} s", read + written);
    });
}

#[test]
fn a_long_line_of_reads_does_not_hold_up_a_write() {
    paused(async {
        let throttle = throttle("iops-total=100");
        for _ in 0..100 {
            let throttle = throttle.clone();
            tokio::task::spawn_local(async move { throttle.read(0, Buffer::new(1), Flags::NONE).await });
        }
        tokio::task::yield_now().await;
        let start = Instant::now();
        write(&throttle, 1).await;
        assert!(start.elapsed() < Duration::from_millis(40), "{:?}", start.elapsed());
    });
}

#[test]
fn new_limits_wake_those_who_wait() {
    paused(async {
        let throttle = throttle("iops-total=1");
        let handle = throttle.handle();
        let start = Instant::now();
        let tasks: Vec<_> = (0..1000)
            .map(|_| {
                let throttle = throttle.clone();
                tokio::task::spawn_local(async move { write(&throttle, 1).await })
            })
            .collect();
        tokio::time::sleep(Duration::from_millis(1500)).await;
        handle.set("iops-total=1000".parse().unwrap()).unwrap();
        tokio::time::sleep(Duration::from_millis(100)).await;
        handle.set(ThrottleConfig::default()).unwrap();
        for task in tasks {
            task.await.unwrap();
        }
        assert!(start.elapsed() < Duration::from_millis(1700), "{:?}", start.elapsed());
        let bad = ThrottleConfig { iops_size: 1, ..ThrottleConfig::default() };
        assert!(handle.set(bad).is_err());
        assert_eq!(handle.config(), ThrottleConfig::default());
    });
}

#[test]
fn nobody_overtakes_those_who_wait_but_later_pieces() {
    paused(async {
        let throttle = throttle("iops-write=10");
        let tasks: Vec<_> = (0..5)
            .map(|_| {
                let throttle = throttle.clone();
                tokio::task::spawn_local(async move { write(&throttle, 1).await })
            })
            .collect();
        tokio::task::yield_now().await;
        let start = Instant::now();
        assert!(throttle.try_write(0, &[1], Flags::CONTINUED).is_some());
        throttle.write(0, Buffer::new(1), Flags::CONTINUED).await.unwrap();
        assert_eq!(start.elapsed(), Duration::ZERO);
        // Empty buckets now, but those who wait have not been woken yet.
        throttle.handle().set("iops-write=20".parse().unwrap()).unwrap();
        assert!(throttle.try_write(0, &[1], Flags::NONE).is_none());
        for task in tasks {
            task.await.unwrap();
        }
    });
}

#[test]
fn a_dropped_wait_takes_its_charge_back() {
    paused(async {
        let throttle = throttle("bps-total=1M");
        write(&throttle, 1 << 20).await;
        for _ in 0..10 {
            let wait = tokio::time::timeout(Duration::from_millis(1), write(&throttle, 1 << 30));
            assert!(wait.await.is_err());
        }
        let start = Instant::now();
        write(&throttle, 1).await;
        assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
    });
}

#[test]
fn a_wait_of_years_is_no_trap() {
    paused(async {
        let throttle = throttle("bps-total=1");
        throttle.trim(0, 1 << 39, Flags::NONE).await.unwrap();
        let wait = tokio::time::timeout(Duration::from_secs(40 * 24 * 3600), write(&throttle, 1));
        assert!(wait.await.is_err());
    });
}

#[test]
fn what_each_operation_costs() {
    paused(async {
        let throttle = throttle("iops-write=1000,bps-write=1M,iops-read=1000,bps-read=1M");
        let seconds = async |bytes| {
            // Empties the buckets, does the operation twice, and tells how long the second had to wait.
            tokio::time::sleep(Duration::from_secs(60)).await;
            let start = Instant::now();
            match bytes {
                "trim" => throttle.trim(0, 1 << 20, Flags::NONE).await.unwrap(),
                "zeroes" => throttle.write_zeroes(0, 1 << 20, Flags::NONE).await.unwrap(),
                "cache" => throttle.cache(0, 1 << 20).await.unwrap(),
                "status" => {
                    throttle.block_status(0, 1 << 20, Flags::NONE).await.unwrap();
                }
                _ => throttle.flush().await.unwrap(),
            }
            write(&throttle, 1).await;
            let writes = start.elapsed();
            throttle.read(0, Buffer::new(1), Flags::NONE).await.unwrap();
            let reads = start.elapsed() - writes;
            (writes.as_secs_f64().round(), reads.as_secs_f64().round())
        };
        assert_eq!(seconds("trim").await, (1.0, 0.0));
        assert_eq!(seconds("zeroes").await, (1.0, 0.0));
        assert_eq!(seconds("cache").await, (0.0, 1.0));
        assert_eq!(seconds("status").await, (0.0, 0.0));
        assert_eq!(seconds("flush").await, (0.0, 0.0));
    });
}

/// Declines every fast request; answers file ranges.
struct Shy(MemoryBackend);

impl Backend for Shy {
    fn geometry(&self) -> Geometry {
        let geometry = self.0.geometry();
        Geometry { capabilities: geometry.capabilities | Capabilities::FILE_RANGE, ..geometry }
    }
    fn try_read(&self, _: u64, _: &mut [u8], _: Flags) -> Option<Result<()>> {
        None
    }
    fn try_write(&self, _: u64, _: &[u8], _: Flags) -> Option<Result<()>> {
        None
    }
    fn file_range(&self, _: u64, len: u64, _: Flags) -> Option<RangeOrHole> {
        Some(RangeOrHole::Hole(len / 2))
    }
    fn read(&self, offset: u64, buf: Buffer, flags: Flags) -> LocalFuture<'_, Result<Buffer>> {
        self.0.read(offset, buf, flags)
    }
    fn write(&self, offset: u64, data: Buffer, flags: Flags) -> LocalFuture<'_, Result<()>> {
        self.0.write(offset, data, flags)
    }
    fn flush(&self) -> LocalFuture<'_, Result<()>> {
        self.0.flush()
    }
    fn trim(&self, offset: u64, len: u64, flags: Flags) -> LocalFuture<'_, Result<()>> {
        self.0.trim(offset, len, flags)
    }
    fn write_zeroes(&self, offset: u64, len: u64, flags: Flags) -> LocalFuture<'_, Result<()>> {
        self.0.write_zeroes(offset, len, flags)
    }
    fn cache(&self, offset: u64, len: u64) -> LocalFuture<'_, Result<()>> {
        self.0.cache(offset, len)
    }
    fn block_status(&self, offset: u64, len: u64, flags: Flags) -> LocalFuture<'_, Result<Vec<Extent>>> {
        self.0.block_status(offset, len, flags)
    }
}

#[test]
fn a_request_is_charged_once_whatever_way_it_takes() {
    paused(async {
        let inner = Box::new(Shy(MemoryBackend::new(1 << 20)));
        let throttle = Throttle::new(inner, "iops-total=100".parse().unwrap()).unwrap();
        for _ in 0..11 {
            assert!(throttle.try_write(0, &[1], Flags::NONE).is_none());
            assert!(throttle.try_read(0, &mut [1], Flags::NONE).is_none());
        }
        let start = Instant::now();
        for _ in 0..11 {
            assert!(throttle.try_write(0, &[1], Flags::NONE).is_none());
            write(&throttle, 1).await;
        }
        assert_eq!(start.elapsed(), Duration::ZERO, "declined requests cost nothing");
        write(&throttle, 1).await;
        assert!(start.elapsed() > Duration::ZERO);
    });
}

#[test]
fn file_ranges_are_charged_and_later_pieces_are_no_operation() {
    paused(async {
        let inner = Box::new(Shy(MemoryBackend::new(1 << 20)));
        let throttle = Throttle::new(inner, "iops-read=10".parse().unwrap()).unwrap();
        let get = |flags| throttle.file_range(0, 8192, flags).is_some();
        assert!(get(Flags::NONE) && get(Flags::NONE) && !get(Flags::NONE));
        assert!((0..10).all(|_| get(Flags::CONTINUED)));
        throttle.handle().set("bps-read=40960".parse().unwrap()).unwrap();
        // 4 KiB are half of what was asked for, and what is answered: they fill the bucket, the next overfills.
        assert!(get(Flags::CONTINUED) && get(Flags::CONTINUED) && !get(Flags::CONTINUED));
    });
}
