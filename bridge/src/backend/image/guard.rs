//! The first sector of an image that was taken for raw only because it looked like it.
//!
//! A client could write another format's header there, naming any file of the host as its backing file: whoever opens the
//! image next without saying its format would then give that file to the client. QEMU's rule holds here too: such
//! a write is refused. With `-f raw` nothing is refused.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use tokio::sync::{Mutex, MutexGuard};

use super::probe::{Guess, ImageFormat, PROBE_BYTES, guess};
use crate::backend::file::FileBackend;
use crate::{
    Backend, Buffer, Error, ErrorKind, Extent, Flags, Geometry, LocalFuture, Piped, RangeOrHole, Result,
};

const SECTOR: u64 = PROBE_BYTES as u64;

/// A raw image whose first sector is watched.
pub(super) struct Guard {
    inner: FileBackend,
    path: PathBuf,
    /// Held while the first sector is written, so that two writes cannot do together what neither may.
    writing: Mutex<()>,
    /// A write to the first sector was given up while it was under way: what that sector holds is not certain.
    uncertain: AtomicBool,
}

impl Guard {
    pub(super) fn new(inner: FileBackend, path: &Path) -> Self {
        Guard { inner, path: path.to_owned(), writing: Mutex::default(), uncertain: AtomicBool::new(false) }
    }

    /// Runs a change of the first sector, if it may: `edit` does the same to a copy.
    async fn change(
        &self,
        edit: impl FnOnce(&mut Vec<u8>),
        change: impl Future<Output = Result<()>>,
        _alone: MutexGuard<'_, ()>,
    ) -> Result<()> {
        if self.uncertain.load(Relaxed) {
            return Err(self.refusal("whatever an unfinished write left"));
        }
        let size = usize::try_from(self.inner.geometry().size.min(SECTOR)).unwrap_or(0);
        let mut sector = self.inner.read(0, Buffer::new(size), Flags::NONE).await?.to_vec();
        edit(&mut sector);
        let as_it_is = guess(&sector);
        // Whenever a short image grows, zeroes follow.
        sector.resize(PROBE_BYTES, 0);
        for look in [as_it_is, guess(&sector)] {
            if look != Guess::Known(ImageFormat::Raw) {
                return Err(self.refusal(look.name()));
            }
        }
        // It stays set where this is dropped before the end.
        self.uncertain.store(true, Relaxed);
        let result = change.await;
        self.uncertain.store(false, Relaxed);
        result
    }

    async fn write_first(&self, offset: u64, data: Buffer, flags: Flags) -> Result<()> {
        let alone = self.writing.lock().await;
        let first = data[..data.len().min(PROBE_BYTES)].to_vec();
        let edit = |sector: &mut Vec<u8>| put(sector, offset, &first);
        self.change(edit, self.inner.write(offset, data, flags), alone).await
    }

    /// A trim, too: what is trimmed mostly reads as zeroes.
    async fn zero_first(&self, offset: u64, len: u64, change: LocalFuture<'_, Result<()>>) -> Result<()> {
        let alone = self.writing.lock().await;
        let count = usize::try_from(len.min(SECTOR)).unwrap_or(PROBE_BYTES);
        self.change(|sector| put(sector, offset, &[0; PROBE_BYTES][..count]), change, alone).await
    }

    async fn shorten(&self, size: usize) -> Result<()> {
        let alone = self.writing.lock().await;
        self.change(|sector| sector.truncate(size), self.inner.shrink(size as u64), alone).await
    }

    fn refusal(&self, what: &str) -> Error {
        tracing::warn!(
            path = %self.path.display(),
            "a write that would make the first sector look like {what} was refused: the image was taken for raw; -f raw allows it"
        );
        Error::new(
            ErrorKind::ReadOnly,
            "the image was probed as raw, and may not be made into another format",
        )
    }
}

/// Puts what there is room for of `bytes` at `offset`.
fn put(sector: &mut [u8], offset: u64, bytes: &[u8]) {
    let from = usize::try_from(offset).unwrap_or(sector.len()).min(sector.len());
    let count = bytes.len().min(sector.len() - from);
    sector[from..from + count].copy_from_slice(&bytes[..count]);
}

impl Backend for Guard {
    fn geometry(&self) -> Geometry {
        self.inner.geometry()
    }

    #[inline]
    fn try_read(&self, offset: u64, buf: &mut [u8], flags: Flags) -> Option<Result<()>> {
        self.inner.try_read(offset, buf, flags)
    }

    #[inline]
    fn try_write(&self, offset: u64, data: &[u8], flags: Flags) -> Option<Result<()>> {
        if offset < SECTOR { None } else { self.inner.try_write(offset, data, flags) }
    }

    fn try_write_piped(&self, offset: u64, data: Piped<'_>, flags: Flags) -> Option<Result<()>> {
        if offset < SECTOR { None } else { self.inner.try_write_piped(offset, data, flags) }
    }

    fn file_range(&self, offset: u64, len: u64, flags: Flags) -> Option<RangeOrHole> {
        self.inner.file_range(offset, len, flags)
    }

    fn read(&self, offset: u64, buf: Buffer, flags: Flags) -> LocalFuture<'_, Result<Buffer>> {
        self.inner.read(offset, buf, flags)
    }

    fn write(&self, offset: u64, data: Buffer, flags: Flags) -> LocalFuture<'_, Result<()>> {
        if offset < SECTOR && !data.is_empty() {
            return Box::pin(self.write_first(offset, data, flags));
        }
        self.inner.write(offset, data, flags)
    }

    fn flush(&self) -> LocalFuture<'_, Result<()>> {
        self.inner.flush()
    }

    fn trim(&self, offset: u64, len: u64, flags: Flags) -> LocalFuture<'_, Result<()>> {
        let change = self.inner.trim(offset, len, flags);
        if offset < SECTOR { Box::pin(self.zero_first(offset, len, change)) } else { change }
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: Flags) -> LocalFuture<'_, Result<()>> {
        let change = self.inner.write_zeroes(offset, len, flags);
        if offset < SECTOR { Box::pin(self.zero_first(offset, len, change)) } else { change }
    }

    fn cache(&self, offset: u64, len: u64) -> LocalFuture<'_, Result<()>> {
        self.inner.cache(offset, len)
    }

    fn block_status(&self, offset: u64, len: u64, flags: Flags) -> LocalFuture<'_, Result<Vec<Extent>>> {
        self.inner.block_status(offset, len, flags)
    }

    fn grow(&self, size: u64) -> LocalFuture<'_, Result<()>> {
        self.inner.grow(size)
    }

    fn shrink(&self, size: u64) -> LocalFuture<'_, Result<()>> {
        match usize::try_from(size) {
            Ok(size) if size < PROBE_BYTES => Box::pin(self.shorten(size)),
            _ => self.inner.shrink(size),
        }
    }

    fn allocate(&self, offset: u64, len: u64) -> LocalFuture<'_, Result<()>> {
        self.inner.allocate(offset, len)
    }

    fn allocated(&self) -> Option<u64> {
        self.inner.allocated()
    }
}
