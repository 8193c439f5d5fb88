//! Flushes that arrive while the metadata is being committed: each of them covers what was answered before it.

use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

use tokio::sync::Semaphore;

use super::crash::Run;
use super::*;
use crate::backend::crash::CrashBackend;

const CLUSTER: u64 = 4096;

/// A disk whose syncs wait for a permit each, after they have begun.
struct Held {
    disk: CrashBackend,
    permits: Semaphore,
    waiting: AtomicUsize,
}

impl Held {
    /// Waits until a sync is held back.
    async fn holds_one(&self) -> bool {
        for _ in 0..200 {
            if self.waiting.load(SeqCst) > 0 {
                return true;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        false
    }
}

impl Backend for Held {
    fn geometry(&self) -> Geometry {
        self.disk.geometry()
    }

    fn try_read(&self, offset: u64, buf: &mut [u8], flags: Flags) -> Option<Result<()>> {
        self.disk.try_read(offset, buf, flags)
    }

    fn try_write(&self, offset: u64, data: &[u8], flags: Flags) -> Option<Result<()>> {
        self.disk.try_write(offset, data, flags)
    }

    fn read(&self, offset: u64, buf: Buffer, flags: Flags) -> LocalFuture<'_, Result<Buffer>> {
        self.disk.read(offset, buf, flags)
    }

    fn write(&self, offset: u64, data: Buffer, flags: Flags) -> LocalFuture<'_, Result<()>> {
        self.disk.write(offset, data, flags)
    }

    fn flush(&self) -> LocalFuture<'_, Result<()>> {
        // What it covers is settled here.
        let flush = self.disk.flush();
        self.waiting.fetch_add(1, SeqCst);
        Box::pin(async move {
            if let Ok(permit) = self.permits.acquire().await {
                permit.forget();
            }
            self.waiting.fetch_sub(1, SeqCst);
            flush.await
        })
    }

    fn trim(&self, offset: u64, len: u64, flags: Flags) -> LocalFuture<'_, Result<()>> {
        self.disk.trim(offset, len, flags)
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: Flags) -> LocalFuture<'_, Result<()>> {
        self.disk.write_zeroes(offset, len, flags)
    }

    fn cache(&self, offset: u64, len: u64) -> LocalFuture<'_, Result<()>> {
        self.disk.cache(offset, len)
    }

    fn block_status(&self, offset: u64, len: u64, flags: Flags) -> LocalFuture<'_, Result<Vec<Extent>>> {
        self.disk.block_status(offset, len, flags)
    }
}

/// How a block is made durable.
#[derive(Clone, Copy, Debug)]
enum Way {
    Flush,
    Fua,
}

/// Commits with `before` syncs let through, holds the next one, writes in place meanwhile and makes that durable.
/// Gives whether a sync was held, and whether a loss of power afterwards can lose the write.
async fn write_during_commit(before: usize, way: Way) -> (bool, bool) {
    let mut held = None;
    let run = Run::with_file(CLUSTER, 1, |disk| {
        let disk = Arc::new(Held { disk, permits: Semaphore::new(0), waiting: AtomicUsize::new(0) });
        held = Some(disk.clone());
        disk
    })
    .await;
    let held = held.unwrap();
    let write = async |block: u64, value: u8, flags| {
        let data = Buffer::copy_of(&vec![value; usize::try_from(CLUSTER).unwrap()]);
        run.disk.write(block * CLUSTER, data, flags).await.unwrap();
    };
    held.permits.add_permits(100);
    write(0, 1, Flags::NONE).await;
    run.disk.flush().await.unwrap();
    // A new cluster, whose commit goes as far as it may.
    write(9, 9, Flags::NONE).await;
    held.permits.forget_permits(100);
    held.permits.add_permits(before);
    let disk = run.clone();
    let commit = tokio::task::spawn_local(async move { disk.disk.flush().await });
    while held.permits.available_permits() > 0 && !commit.is_finished() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let holds = held.holds_one().await;
    let disk = run.clone();
    let late = match way {
        Way::Flush => {
            let data = vec![2; usize::try_from(CLUSTER).unwrap()];
            run.disk.try_write(0, &data, Flags::NONE).unwrap().unwrap();
            tokio::task::spawn_local(async move { disk.disk.flush().await })
        }
        Way::Fua => {
            let data = Buffer::copy_of(&vec![2; usize::try_from(CLUSTER).unwrap()]);
            tokio::task::spawn_local(async move { disk.disk.write(0, data, Flags::FUA).await })
        }
    };
    // The late one has its time to join what is under way, rightly or not.
    tokio::time::sleep(Duration::from_millis(20)).await;
    held.permits.add_permits(100);
    commit.await.unwrap().unwrap();
    late.await.unwrap().unwrap();
    let lost = (0..4).any(|seed| run.converted(seed).is_none_or(|bytes| bytes[..4096] != [2; 4096]));
    (holds, lost)
}

#[test]
fn a_flush_during_a_commit_covers_what_was_answered_before_it() {
    if !has_qemu_img("a_flush_during_a_commit_covers_what_was_answered_before_it") {
        return;
    }
    for way in [Way::Flush, Way::Fua] {
        let mut before = 0;
        loop {
            let (holds, lost) = block_on(write_during_commit(before, way));
            assert!(!lost, "{way:?} during sync {before} of a commit");
            if !holds {
                break;
            }
            before += 1;
        }
        assert!(before >= 2, "a commit has {before} syncs");
    }
}
