//! Large payloads from the socket to a plain file without a copy through this process: splice(2) into a pipe, and from
//! there into the file. Of the processor time of a 1 MiB write that saves a twentieth on tmpfs and a tenth on ext4, where the
//! client is slower than the server; a quarter in a probe that does nothing else.
//!
//! Where the bytes cannot go that way (another kind of source, a file that is slow just now) they are read from the pipe
//! and stored as usual, and splicing is left alone for a while.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::time::Instant;

use bridge::{Data, Flags, Operation, Piped, Request};
use rustix::pipe::{PipeFlags, fcntl_setpipe_size, pipe_with};

use super::input::Payload;
use super::reader::Reader;
use super::socket::Socket;
use super::write::{STORE_LEN, whole_pages};

/// Most bytes moved at once: what a file stores on the caller's thread.
const SPLICE_BYTES: usize = 256 << 10;

/// Bytes received before, that are put into the pipe first: the start of a page.
const MOST_KEPT: usize = 4096;

/// Room in a pipe; it is counted in pages, each of which may hold less.
const PIPE_BYTES: usize = 512 << 10;

/// A worker's pipe, empty between two calls.
pub(super) struct Pipe {
    read: File,
    write: File,
}

impl Pipe {
    fn new() -> io::Result<Self> {
        let (read, write) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        // Users have a quota. A smaller pipe moves less at a time.
        let _ = fcntl_setpipe_size(&write, PIPE_BYTES);
        Ok(Pipe { read: read.into(), write: write.into() })
    }

    /// Takes in `first`, and up to `wanted` bytes from the socket. How many it holds then.
    fn fill(&mut self, first: &[u8], socket: &Socket, wanted: usize) -> io::Result<usize> {
        self.write.write_all(first)?;
        Ok(first.len() + socket.splice(&self.write, wanted)?.unwrap_or(0))
    }
}

/// What became of a look at the socket.
pub(super) enum Spliced {
    /// Nothing: receive as usual.
    No,
    /// A part of the payload was stored, or dropped after an error.
    Stored,
    /// So many bytes are in the receive buffer, the kept ones first: process them as usual.
    Received(usize),
}

impl Reader {
    /// Moves what is there of a large payload to where it is stored.
    ///
    /// # Errors
    /// Bytes of the payload were lost on the way: the connection cannot go on.
    pub(super) fn splice(
        &mut self,
        worker_pipe: &mut Option<Pipe>,
        receive: &mut [u8],
    ) -> io::Result<Spliced> {
        let Some(wanted) = self.splice_bytes() else { return Ok(Spliced::No) };
        let Some(mut pipe) = worker_pipe.take().or_else(|| Pipe::new().ok()) else {
            self.splicing.found(false);
            return Ok(Spliced::No);
        };
        let kept = self.input.unprocessed();
        let available = match pipe.fill(kept, &self.connection.socket, wanted) {
            Ok(available) if available > kept.len() => available,
            // Nothing has left the socket. Why, a receive will tell.
            _ => {
                self.splicing.found(false);
                return Ok(Spliced::No);
            }
        };
        let Some(Payload::Store { left, offset, flags, job }) = self.input.payload.take() else {
            return Err(io::Error::other("a payload was spliced that is not to be stored"));
        };
        let geometry = self.connection.export.geometry();
        let piece = whole_pages(&geometry, offset, available, left);
        let request = Request::new(Operation::Write, offset, piece as u64).with_flags(flags);
        let data = Data::Piped(Piped { pipe: pipe.read.as_fd(), len: piece });
        // Without a complete block there is nothing to store yet.
        let export = (piece > 0).then_some(&self.connection.export);
        let stored = match export.and_then(|export| export.try_execute(&request, data, Instant::now())) {
            None => {
                self.splicing.found(false);
                self.input.payload = Some(Payload::Store { left, offset, flags, job });
                pipe.read.read_exact(&mut receive[..available])?;
                *worker_pipe = Some(pipe);
                return Ok(Spliced::Received(available));
            }
            Some(Ok(())) => {
                let rest = &mut receive[..available - piece];
                pipe.read.read_exact(rest)?;
                *worker_pipe = Some(pipe);
                self.input.keep_rest(rest, 0);
                piece as u64
            }
            // What is in the pipe is lost with it, and wanted by nobody.
            Some(Err(error)) => {
                job.fail(error);
                self.input.keep_rest(&[], 0);
                available as u64
            }
        };
        self.splicing.found(true);
        if stored == left {
            job.complete();
            self.input.expect_head();
        } else {
            let (left, offset, flags) = (left - stored, offset + stored, flags | Flags::CONTINUED);
            self.input.payload = Some(Payload::Store { left, offset, flags, job });
        }
        Ok(Spliced::Stored)
    }

    /// How many bytes to splice now, if any: small pieces are better gathered in memory.
    fn splice_bytes(&mut self) -> Option<usize> {
        let Some(Payload::Store { left, job, .. }) = &self.input.payload else { return None };
        let kept = self.input.unprocessed().len();
        let room = SPLICE_BYTES.checked_sub(kept).filter(|_| kept <= MOST_KEPT)?;
        let wanted = usize::try_from(*left).unwrap_or(usize::MAX).saturating_sub(kept).min(room);
        let worth_it = wanted >= STORE_LEN && !job.has_failed() && self.splicing.is_worth_it();
        (worth_it && self.connection.socket.waiting() >= STORE_LEN).then_some(wanted)
    }
}
