//! Metadata that is kept back in memory, in blocks of 512 bytes, until a commit brings it to the file.
#![deny(unsafe_code)]

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Mutex, MutexGuard, PoisonError};

#[cfg(test)]
use super::to_io;
use super::{BLOCK, BlockBytes, Blocks, Host, header, index};
use crate::Buffer;
#[cfg(test)]
use crate::Flags;

impl Host {
    /// A copy of what is kept back.
    pub(in crate::backend::image) fn kept(&self) -> Blocks {
        self.blocks().map(|blocks| blocks.clone()).unwrap_or_default()
    }

    /// Bytes that are kept back, and will be committed.
    pub(in crate::backend::image) fn kept_bytes(&self) -> u64 {
        if !self.0.writable {
            return 0;
        }
        self.blocks().map_or(0, |blocks| blocks.len() as u64 * BLOCK)
    }

    /// Returns true if, since the last commit, a cluster may have been freed to which the tables on disk still point.
    pub(in crate::backend::image) fn has_freed(&self) -> bool {
        self.0.freed.load(Relaxed) || self.0.moved.load(Relaxed)
    }

    /// The file names nothing that counts as free: a commit has ended.
    pub(in crate::backend::image) fn clear_freed(&self) {
        self.0.freed.store(false, Relaxed);
    }

    /// Forgets what is kept back: it is in the file now.
    pub(in crate::backend::image) fn clear_kept(&self) {
        self.0.moved.store(false, Relaxed);
        if let Some(mut blocks) = self.blocks() {
            blocks.clear();
        }
        if let Some(mut places) = self.places() {
            places.settle();
        }
    }

    /// Drops what is kept back for a range of whole blocks: what belongs there goes to the file as data.
    pub(in crate::backend::image) fn take_back(&self, start: u64, end: u64) {
        if let Some(mut blocks) = self.blocks() {
            let numbers: Vec<u64> =
                blocks.range(start / BLOCK..end / BLOCK).map(|(number, _)| *number).collect();
            for number in numbers {
                blocks.remove(&number);
            }
        }
    }

    pub(super) fn blocks(&self) -> Option<MutexGuard<'_, Blocks>> {
        let kept =
            if self.0.writable { Some(self.0.kept.get_or_init(Mutex::default)) } else { self.0.kept.get() };
        kept.map(|kept| kept.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Keeps whole blocks back, of a file that ends at `end` or later with them; also of a file that is only read, where
    /// they are never committed.
    pub(in crate::backend::image) fn keep_blocks(&self, blocks: Blocks, end: u64) {
        self.0.size.fetch_max(end, Relaxed);
        let kept = self.0.kept.get_or_init(Mutex::default);
        kept.lock().unwrap_or_else(PoisonError::into_inner).extend(blocks);
    }

    /// Fills a buffer from the file with what is kept back in it; zeroes past its end.
    pub(in crate::backend::image) async fn read(&self, offset: u64, len: usize) -> io::Result<Buffer> {
        // First what is kept: a commit meanwhile moves it to the file and forgets it here.
        let end = offset + len as u64;
        let kept: Vec<(u64, Box<BlockBytes>)> = match self.blocks() {
            Some(blocks) => blocks
                .range(offset / BLOCK..end.div_ceil(BLOCK))
                .map(|(number, block)| (*number, block.clone()))
                .collect(),
            None => Vec::new(),
        };
        let mut buf = self.read_file(offset, len).await?;
        for (number, block) in kept {
            let start = number * BLOCK;
            let (from, to) = (start.max(offset), (start + BLOCK).min(end));
            buf[index(from - offset)..index(to - offset)]
                .copy_from_slice(&block[index(from - start)..index(to - start)]);
        }
        Ok(buf)
    }

    /// Keeps bytes back, to be committed.
    pub(super) async fn keep(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        if !self.0.writable {
            return Err(io::Error::from_raw_os_error(libc::EROFS));
        }
        let end = offset
            .checked_add(bytes.len() as u64)
            .filter(|end| *end <= self.0.file.geometry().size)
            .ok_or_else(|| io::Error::other("a table past the end of all files"))?;
        if self.device_end().is_some_and(|size| end > size) {
            return Err(io::Error::from_raw_os_error(libc::ENOSPC));
        }
        self.is_sound()?;
        let _filling = self.0.filling.lock().await;
        self.note(offset, bytes).await?;
        if offset < BLOCK {
            self.0.moved.store(true, Relaxed);
        }
        let first = offset / BLOCK * BLOCK;
        let mut whole = Vec::new();
        let whole: &[u8] = if first == offset && end.is_multiple_of(BLOCK) {
            bytes
        } else {
            let stop = end.next_multiple_of(BLOCK);
            whole.extend_from_slice(&self.read(first, index(stop - first)).await?);
            whole[index(offset - first)..][..bytes.len()].copy_from_slice(bytes);
            &whole
        };
        #[cfg(test)]
        if self.0.at_once.load(Relaxed) {
            let write = self.0.file.write(first, Buffer::copy_of(whole), Flags::NONE);
            return write.await.map_err(to_io);
        }
        if let Some(mut blocks) = self.blocks() {
            blocks.extend((first / BLOCK..).zip(whole.as_chunks().0.iter().map(|block| Box::new(*block))));
            if self.0.in_use.load(Relaxed)
                && let Some(first) = blocks.get_mut(&0)
            {
                header::mark_in_use(&mut first[..], true);
            }
        }
        if offset < BLOCK { self.note_header().await } else { Ok(()) }
    }

    /// Keeps back the size of the disk, in bytes, as the header is to say it.
    pub(in crate::backend::image) async fn keep_size(&self, size: u64) -> io::Result<()> {
        self.keep(header::SIZE_OFFSET, &size.to_be_bytes()).await
    }

    /// Keeps back the name of the backing file, in the place of one of the same length.
    pub(in crate::backend::image) async fn keep_backing_name(&self, name: &OsStr) -> io::Result<()> {
        let header = self.read(0, index(BLOCK)).await?;
        let at = header.get(8..16).and_then(|bytes| bytes.try_into().ok()).map_or(0, u64::from_be_bytes);
        self.keep(at, name.as_bytes()).await
    }

    /// Has new tables guarded, before the pointer to them is kept back.
    async fn note(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let end = offset + bytes.len() as u64;
        if self.places().is_none_or(|places| !places.has_pointers(offset, end)) {
            return Ok(());
        }
        let old = self.read(offset, bytes.len()).await?;
        if let Some(damage) = self.0.damage.get() {
            damage.note(offset, &old, bytes);
        }
        let noted = self.places().map_or(Ok(()), |mut places| places.note(offset, &old, bytes));
        self.count_known_anyway();
        noted.map_err(|taken| {
            let what = format!("its refcounts give a table's place away, at {taken:#x}");
            self.give_up(&what);
            io::Error::other(what)
        })
    }

    /// Has tables guarded that have moved as a whole.
    async fn note_header(&self) -> io::Result<()> {
        if self.places().is_none() {
            return Ok(());
        }
        let block = self.read(0, index(BLOCK)).await?;
        let Ok(header) = header::parse_numbers(&block) else { return Ok(()) };
        if let Some(damage) = self.0.damage.get() {
            damage.note_header(&header);
        }
        let moved = self.places().map_or(Vec::new(), |mut places| places.note_header(header));
        for (table, mask) in moved {
            // Bounded by what a header may say.
            let bytes = self.read(table.start, index(table.end - table.start)).await?;
            if let Some(mut places) = self.places() {
                places.adopt(&bytes, mask);
            }
        }
        Ok(())
    }
}
