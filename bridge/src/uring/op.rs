//! One operation on a file, with everything the kernel may touch while it runs.

use std::fs::File;
use std::ops::Range;
use std::sync::Arc;

use rustix::fs::FallocateFlags;
use rustix::io::{Errno, ReadWriteFlags};
use std::io::{IoSlice, IoSliceMut};

use crate::Buffer;

/// Most bytes that one read or write moves: the kernel's own limit, MAX_RW_COUNT.
const MAX_BYTES: usize = 0x7fff_f000;

/// One operation. It owns its file and its buffer, so that it may outlive whoever asked for it.
#[derive(Debug)]
pub(crate) struct Op {
    /// The file to work on.
    pub(crate) file: Arc<File>,
    /// What to do.
    pub(crate) call: Call,
}

/// What an operation does.
#[derive(Debug)]
pub(crate) enum Call {
    /// Fills `buf[part]` from `offset`.
    Read {
        /// Where the bytes go.
        buf: Buffer,
        /// The part of the buffer to fill.
        part: Range<usize>,
        /// Place in the file, in bytes.
        offset: u64,
    },
    /// Stores `buf[part]` at `offset`.
    Write {
        /// Where the bytes are.
        buf: Buffer,
        /// The part of the buffer to store.
        part: Range<usize>,
        /// Place in the file, in bytes.
        offset: u64,
        /// Durable when done (`RWF_DSYNC`).
        durable: bool,
    },
    /// Makes the file's data durable (fdatasync(2)).
    Sync,
    /// fallocate(2).
    Fallocate {
        /// Its mode.
        mode: FallocateFlags,
        /// Place in the file, in bytes.
        offset: u64,
        /// Number of bytes, at least 1.
        len: u64,
    },
}

impl Op {
    /// Performs it on this thread, which may wait. Answers with the number of bytes moved, which may be fewer
    /// than asked.
    pub(crate) fn run(&mut self) -> Result<usize, Errno> {
        let file = &*self.file;
        let attempt = || match &mut self.call {
            Call::Read { buf, part, offset } => {
                let part = bounded(part);
                rustix::io::preadv(file, &mut [IoSliceMut::new(&mut buf[part])], *offset)
            }
            Call::Write { buf, part, offset, durable } => {
                let flags = if *durable { ReadWriteFlags::DSYNC } else { ReadWriteFlags::empty() };
                rustix::io::pwritev2(file, &[IoSlice::new(&buf[bounded(part)])], *offset, flags)
            }
            Call::Sync => rustix::fs::fdatasync(file).map(|()| 0),
            Call::Fallocate { mode, offset, len } => {
                rustix::fs::fallocate(file, *mode, *offset, *len).map(|()| 0)
            }
        };
        rustix::io::retry_on_intr(attempt)
    }

    /// The buffer of a read or write.
    pub(crate) fn into_buffer(self) -> Option<Buffer> {
        match self.call {
            Call::Read { buf, .. } | Call::Write { buf, .. } => Some(buf),
            Call::Sync | Call::Fallocate { .. } => None,
        }
    }
}

/// The part of a buffer that one call may move.
pub(super) fn bounded(part: &Range<usize>) -> Range<usize> {
    part.start..part.end.min(part.start.saturating_add(MAX_BYTES))
}
