//! Reads and writes that may wait, with owned buffers.

use std::fs::File;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use rustix::io::Errno;

use super::Disk;
use super::aio::to_the_end;
use super::space::length;
use crate::uring::{Call, Op};
use crate::{Buffer, Error, ErrorKind, Flags, Result};

impl Disk {
    /// Fills the buffer from `offset`.
    pub(super) async fn read(&self, offset: u64, mut buf: Buffer) -> Result<Buffer> {
        let inside = self.inside(offset, buf.len());
        match self.direct {
            _ if buf.is_empty() => Ok(buf),
            // It reads whole blocks.
            Some(align) => {
                let mut buf = self.read_direct(align, offset, buf).await?;
                buf[inside..].fill(0);
                Ok(buf)
            }
            None => {
                buf[inside..].fill(0);
                self.read_part(&self.file, buf, 0..inside, offset).await
            }
        }
    }

    /// Returns how many bytes of a range lie before the end of the file. A read must not cross it: on a FUSE file with
    /// direct I/O, io_uring (Linux 6.18) fills the rest with what comes before the end, again and again.
    fn inside(&self, offset: u64, len: usize) -> usize {
        let end = offset.saturating_add(len as u64);
        if !self.open_ended || end <= self.seen_length.load(Relaxed) {
            return len;
        }
        let Ok(found) = length(&self.file) else { return len };
        let seen = found.max(self.seen_length.fetch_max(found, Relaxed));
        usize::try_from(seen.saturating_sub(offset)).unwrap_or(len).min(len)
    }

    /// Stores the buffer at `offset`, durably where flags or cache mode say so.
    pub(super) async fn write(this: &Arc<Self>, offset: u64, data: Buffer, flags: Flags) -> Result<()> {
        if data.is_empty() {
            return Ok(());
        }
        let durable = this.durable(flags);
        if durable {
            this.gate.check()?;
        }
        let result = match this.direct {
            // It must end what it began: a block that was read to be modified must be written before its lock is
            // given up.
            Some(align) => {
                let disk = this.clone();
                to_the_end(async move { disk.write_direct(align, offset, data, durable).await }).await
            }
            None => {
                let all = 0..data.len();
                this.write_part(this.writer(durable), data, all, offset, durable).await
            }
        };
        result.map(drop)
    }

    /// Fills `buf[part]` from `offset` of this descriptor, in as many steps as it takes.
    ///
    /// # Errors
    /// `Io` where the file ends before that: it was made shorter by somebody else.
    pub(super) async fn read_part(
        &self,
        file: &Arc<File>,
        mut buf: Buffer,
        mut part: Range<usize>,
        mut offset: u64,
    ) -> Result<Buffer> {
        while !part.is_empty() {
            let call = Call::Read { buf, part: part.clone(), offset };
            let (op, outcome) = self.transfer(Op { file: file.clone(), call }).await?;
            buf = take_buffer(op)?;
            match outcome {
                Ok(0) if self.open_ended => {
                    buf[part].fill(0);
                    break;
                }
                Ok(0) => return Err(shrunken()),
                // With O_DIRECT only the end of the file gives a part of a block, and no read can begin there.
                Ok(count) if self.open_ended && self.ends_within_block(count) => {
                    buf[part.start + count..part.end].fill(0);
                    break;
                }
                Ok(count) => advance(&mut part, &mut offset, count),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(Error::from_errno(errno, "read")),
            }
        }
        Ok(buf)
    }

    fn ends_within_block(&self, count: usize) -> bool {
        self.direct.is_some_and(|align| !(count as u64).is_multiple_of(align))
    }

    /// Returns the descriptor for writes of whole blocks. Durable writes have one of their own: the kernel tells each
    /// descriptor once of a lost page, and what a durable write hears must not be missing from the next flush.
    pub(super) fn writer(&self, durable: bool) -> &Arc<File> {
        self.durable.as_ref().filter(|_| durable).unwrap_or(&self.file)
    }

    /// Stores `buf[part]` at `offset` of this descriptor, in as many steps as it takes. `file` is the result of
    /// [`Disk::writer`], or of [`Disk::tail`].
    ///
    /// # Errors
    /// The errno of the write or of its own sync. Only a failed flush latches the gate.
    pub(super) async fn write_part(
        &self,
        file: &Arc<File>,
        mut buf: Buffer,
        mut part: Range<usize>,
        mut offset: u64,
        durable: bool,
    ) -> Result<Buffer> {
        let mut dsync = durable && self.gate.dsync();
        while !part.is_empty() {
            let call = Call::Write { buf, part: part.clone(), offset, durable: dsync };
            let (op, outcome) = self.transfer(Op { file: file.clone(), call }).await?;
            buf = take_buffer(op)?;
            match outcome {
                Ok(0) => return Err(Error::new(ErrorKind::Io, "a write stored nothing")),
                Ok(count) => advance(&mut part, &mut offset, count),
                Err(Errno::INTR) => {}
                Err(Errno::OPNOTSUPP) if dsync => {
                    self.gate.forget_dsync();
                    dsync = false;
                }
                Err(errno) => return Err(Error::from_errno(errno, "write")),
            }
        }
        if durable && !dsync {
            self.flush().await?;
        }
        Ok(buf)
    }
}

/// What a read says of a file that ends before its recorded size.
pub(super) fn shrunken() -> Error {
    Error::new(ErrorKind::Io, "the file is shorter than when it was opened")
}

fn take_buffer(op: Op) -> Result<Buffer> {
    op.into_buffer().ok_or_else(|| Error::new(ErrorKind::Io, "a transfer came back without its buffer"))
}

fn advance(part: &mut Range<usize>, offset: &mut u64, count: usize) {
    part.start = part.end.min(part.start + count);
    *offset += count as u64;
}
