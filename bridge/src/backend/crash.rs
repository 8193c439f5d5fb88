//! A disk that can lose power, for tests: what was not flushed may be lost, whole or in part.
//!
//! ```text
//!   write ──> in flight ──answer──> log ──flush──> durable image
//!                            └────> volatile image (what reads see)
//! ```
//!
//! It promises the least that a disk may: a flush makes durable exactly the writes that were answered before
//! it was asked for, a write with FUA that write alone. After a crash each sector of each other write, answered
//! or in flight, is there or not, as the seed says. It keeps two copies of the disk, and all that is written
//! between flushes; it is meant for disks of some MiB.

use std::collections::{BTreeMap, VecDeque};
use std::future::ready;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::random::Random;
use crate::{
    Backend, Buffer, Capabilities, Error, ErrorKind, Extent, ExtentKind, Flags, Geometry, LocalFuture, Result,
};

/// What a crash leaves whole or not at all, in bytes.
pub const SECTOR_BYTES: usize = 512;

/// Writes without FUA up to this number of bytes are answered on the fast path, so that both paths are used.
const INLINE_BYTES: usize = 4096;

/// A disk that can lose power.
pub struct CrashBackend {
    shared: Arc<Mutex<State>>,
    size: usize,
}

/// Crashes a [`CrashBackend`], in thought: the disk goes on. Clones are the same handle.
#[derive(Clone)]
pub struct CrashHandle {
    shared: Arc<Mutex<State>>,
}

struct State {
    volatile: Vec<u8>,
    durable: Vec<u8>,
    /// Answered and not yet in `durable`, in the order of their answers.
    log: VecDeque<Change>,
    /// Number of changes that have left the log.
    logged_before: u64,
    in_flight: BTreeMap<u64, Change>,
    next_id: u64,
    random: Random,
}

struct Change {
    offset: usize,
    bytes: Vec<u8>,
    /// Written with FUA: survives as soon as it is answered.
    forced: bool,
}

/// A change that is under way; it is done when this is dropped, as it would be in a disk that has taken the
/// command, whoever has stopped waiting for it.
struct InFlight<'a> {
    backend: &'a CrashBackend,
    id: u64,
}

impl CrashBackend {
    /// A disk that holds `image`, all of it durable. The seed varies how long operations take.
    pub fn new(image: Vec<u8>, seed: u64) -> Self {
        let size = image.len();
        let state = State {
            volatile: image.clone(),
            durable: image,
            log: VecDeque::new(),
            logged_before: 0,
            in_flight: BTreeMap::new(),
            next_id: 0,
            random: Random::new(seed),
        };
        CrashBackend { shared: Arc::new(Mutex::new(state)), size }
    }

    /// The handle that crashes it.
    pub fn handle(&self) -> CrashHandle {
        CrashHandle { shared: self.shared.clone() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.shared)
    }

    /// Takes some turns of the scheduler, so that others get in between.
    async fn dawdle(&self) {
        let turns = self.state().random.below(4);
        for _ in 0..turns {
            tokio::task::yield_now().await;
        }
    }

    async fn change(&self, offset: u64, bytes: Vec<u8>, flags: Flags) -> Result<()> {
        let change = Change { offset: index(offset)?, bytes, forced: flags.contains(Flags::FUA) };
        let in_flight = {
            let mut state = self.state();
            let id = state.next_id;
            state.next_id += 1;
            state.in_flight.insert(id, change);
            InFlight { backend: self, id }
        };
        self.dawdle().await;
        drop(in_flight);
        Ok(())
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let offset = index(offset)?;
        buf.copy_from_slice(&self.state().volatile[offset..][..buf.len()]);
        Ok(())
    }
}

impl CrashHandle {
    /// What the disk holds after a loss of power right now. The same seed and history give the same image.
    pub fn crash(&self, seed: u64) -> Vec<u8> {
        let mut random = Random::new(seed);
        let state = lock(&self.shared);
        let mut image = state.durable.clone();
        for change in &state.log {
            change.apply_sectors(&mut image, |_| change.forced || random.chance(0.5));
        }
        for change in state.in_flight.values() {
            change.apply_sectors(&mut image, |_| random.chance(0.5));
        }
        image
    }

    /// What reads see now.
    pub fn volatile(&self) -> Vec<u8> {
        lock(&self.shared).volatile.clone()
    }

    /// What survives a loss of power now in any case, writes with FUA excepted.
    pub fn durable(&self) -> Vec<u8> {
        lock(&self.shared).durable.clone()
    }
}

impl State {
    /// Answers a change: reads see it from now on.
    fn answer(&mut self, change: Change) {
        change.apply(&mut self.volatile);
        self.log.push_back(change);
    }

    /// Makes the changes durable that were answered when `answered` had been.
    fn flush_to(&mut self, answered: u64) {
        while self.logged_before < answered {
            let Some(change) = self.log.pop_front() else { return };
            change.apply(&mut self.durable);
            self.logged_before += 1;
        }
    }
}

impl Change {
    fn apply(&self, image: &mut [u8]) {
        image[self.offset..][..self.bytes.len()].copy_from_slice(&self.bytes);
    }

    /// Applies those sectors of which `keep` says so.
    fn apply_sectors(&self, image: &mut [u8], mut keep: impl FnMut(usize) -> bool) {
        let mut at = 0;
        while at < self.bytes.len() {
            let place = self.offset + at;
            let len = (SECTOR_BYTES - place % SECTOR_BYTES).min(self.bytes.len() - at);
            if keep(place / SECTOR_BYTES) {
                image[place..][..len].copy_from_slice(&self.bytes[at..][..len]);
            }
            at += len;
        }
    }
}

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        let mut state = self.backend.state();
        if let Some(change) = state.in_flight.remove(&self.id) {
            state.answer(change);
        }
    }
}

impl Backend for CrashBackend {
    fn geometry(&self) -> Geometry {
        Geometry {
            version: 0,
            size: self.size as u64,
            min_block: 1,
            preferred_block: 4096,
            capabilities: Capabilities::FLUSH
                | Capabilities::FUA
                | Capabilities::TRIM
                | Capabilities::WRITE_ZEROES
                | Capabilities::FAST_ZERO
                | Capabilities::CACHE
                | Capabilities::MULTI_CONN,
        }
    }

    fn try_read(&self, offset: u64, buf: &mut [u8], _flags: Flags) -> Option<Result<()>> {
        Some(self.read_at(offset, buf))
    }

    fn try_write(&self, offset: u64, data: &[u8], flags: Flags) -> Option<Result<()>> {
        if flags.contains(Flags::FUA) || data.len() > INLINE_BYTES {
            return None;
        }
        Some(index(offset).map(|offset| {
            self.state().answer(Change { offset, bytes: data.to_vec(), forced: false });
        }))
    }

    fn read(&self, offset: u64, mut buf: Buffer, _flags: Flags) -> LocalFuture<'_, Result<Buffer>> {
        Box::pin(async move {
            self.dawdle().await;
            self.read_at(offset, &mut buf)?;
            Ok(buf)
        })
    }

    fn write(&self, offset: u64, data: Buffer, flags: Flags) -> LocalFuture<'_, Result<()>> {
        Box::pin(async move { self.change(offset, data.to_vec(), flags).await })
    }

    fn flush(&self) -> LocalFuture<'_, Result<()>> {
        let answered = {
            let state = self.state();
            state.logged_before + state.log.len() as u64
        };
        Box::pin(async move {
            self.dawdle().await;
            self.state().flush_to(answered);
            Ok(())
        })
    }

    /// Zeroes the range, so that a test can tell whether a trim was lost.
    fn trim(&self, offset: u64, len: u64, flags: Flags) -> LocalFuture<'_, Result<()>> {
        Box::pin(async move { self.change(offset, vec![0; index(len)?], flags).await })
    }

    /// Never fast: writes the zeroes.
    fn write_zeroes(&self, offset: u64, len: u64, flags: Flags) -> LocalFuture<'_, Result<()>> {
        Box::pin(async move {
            if flags.contains(Flags::FAST_ZERO) {
                return Err(Error::new(ErrorKind::NotSupported, "zeroes are written here"));
            }
            self.change(offset, vec![0; index(len)?], flags).await
        })
    }

    fn cache(&self, _offset: u64, _len: u64) -> LocalFuture<'_, Result<()>> {
        Box::pin(ready(Ok(())))
    }

    fn block_status(&self, _offset: u64, len: u64, _flags: Flags) -> LocalFuture<'_, Result<Vec<Extent>>> {
        Box::pin(ready(Ok(vec![Extent { len, kind: ExtentKind::Data }])))
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A place in an image in memory.
fn index(offset: u64) -> Result<usize> {
    usize::try_from(offset).map_err(|_| Error::new(ErrorKind::InvalidInput, "the range goes past the end"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::runtime::{Builder, LocalOptions};

    fn run<T>(future: impl Future<Output = T>) -> T {
        Builder::new_current_thread().build_local(LocalOptions::default()).unwrap().block_on(future)
    }

    async fn write(disk: &CrashBackend, sector: u64, value: u8, flags: Flags) {
        disk.write(sector * 512, Buffer::copy_of(&[value; 512]), flags).await.unwrap();
    }

    /// Whether any of many crashes leaves this value in a sector.
    fn seen(disk: &CrashBackend, sector: usize, value: u8) -> bool {
        (0..64).any(|seed| disk.handle().crash(seed)[sector * 512] == value)
    }

    #[test]
    fn what_is_not_flushed_may_be_lost_and_what_is_flushed_may_not() {
        run(async {
            let disk = CrashBackend::new(vec![0; 8192], 1);
            write(&disk, 1, 1, Flags::NONE).await;
            assert!(seen(&disk, 1, 0) && seen(&disk, 1, 1));
            disk.flush().await.unwrap();
            assert!(!seen(&disk, 1, 0));
            write(&disk, 1, 2, Flags::NONE).await;
            assert!(!seen(&disk, 1, 0) && seen(&disk, 1, 1) && seen(&disk, 1, 2));
            write(&disk, 1, 3, Flags::FUA).await;
            assert!(!seen(&disk, 1, 1) && !seen(&disk, 1, 2));
            write(&disk, 2, 4, Flags::NONE).await;
            write(&disk, 1, 5, Flags::FUA).await;
            assert!(seen(&disk, 2, 0), "FUA makes no other write durable");
            disk.trim(512, 512, Flags::FUA).await.unwrap();
            assert!(!seen(&disk, 1, 5));
        });
    }

    #[test]
    fn a_flush_covers_what_was_answered_before_it_and_no_more() {
        run(async {
            let disk = CrashBackend::new(vec![0; 8192], 1);
            write(&disk, 1, 1, Flags::NONE).await;
            let flush = disk.flush();
            write(&disk, 2, 1, Flags::NONE).await;
            flush.await.unwrap();
            assert!(!seen(&disk, 1, 0) && seen(&disk, 2, 0));
        });
    }

    #[test]
    fn a_large_write_is_torn_by_sectors_and_reads_see_it_whole() {
        run(async {
            let disk = CrashBackend::new(vec![0; 8192], 1);
            disk.write(100, Buffer::copy_of(&[1; 8000]), Flags::NONE).await.unwrap();
            let image = disk.handle().crash(3);
            let kept = image.chunks(512).filter(|sector| sector.contains(&1)).count();
            assert!((2..15).contains(&kept), "{kept}");
            assert_eq!(image, disk.handle().crash(3));
            assert!(disk.handle().volatile()[100..8100].iter().all(|byte| *byte == 1));
            disk.flush().await.unwrap();
            assert_eq!(disk.handle().durable(), disk.handle().volatile());
        });
    }
}
