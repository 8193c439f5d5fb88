//! A queue's channel to the kernel: libublk's `UblkQueue` with the ring of its thread, on which answers go out and requests
//! come in. It knows tags and bytes; what a request means is `translate`'s business, and where its data is `data`'s.
//!
//! Libublk maps the descriptors, builds the commands and has the ring; waiting and taking completions is ours. Its own loop
//! ends a queue at the first aborted tag, although answers are still to be given, and its executor costs 3 to 4 percent.
//!
//! Beside the usual way of data, a kernel with `SUPPORT_ZERO_COPY` moves it between request and file by itself, on this
//! ring: [`Channel::fill`].
//! A leaf file: entries that name memory and files go to the kernel here.
#![allow(unsafe_code)]

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use bridge::FileRange;
use io_uring::squeue::{Entry, Flags};
use io_uring::{IoUring, opcode, types};
use libublk::io::{BufDescList, UblkDev, UblkIOCtx, UblkQueue};
use libublk::{UblkError, UblkIORes, sys, ublk_init_task_ring, with_task_io_ring, with_task_io_ring_mut};
use rustix::io::Errno;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::abi::{Described, Features};
use super::data::Data;
use super::plain::Plain;

/// Entries of one round for each tag at most: a refused fill's release and answer, and the next request's pages and read.
/// Libublk panics where a full ring cannot be submitted.
const ENTRIES: u32 = 4;

/// A queue, as the thread sees it that fetches its requests: all calls must come from that thread.
pub(super) struct Channel<'d> {
    /// Before `data`, whose memory its commands name.
    queue: UblkQueue<'d>,
    pub(super) data: Data<'d>,
    depth: u16,
    /// The kernel moves data between requests and files.
    moves: bool,
    encoded: bool,
    /// Entries that are not submitted.
    waiting: usize,
    /// Completions that are not taken: what each is about, and its result.
    arrived: VecDeque<(u64, i32)>,
}

/// What has come from the kernel for a tag.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Event {
    /// The tag itself, and why: 0 for a request.
    Tag(u16, i32),
    /// What became of [`Channel::fill`]: bytes, or a negative errno.
    Filled(u16, i32),
}

/// Our own entries, as libublk's user data names the operation of a target.
const FILLED: u32 = 1;
const BUFFER: u32 = 2;

impl<'d> Channel<'d> {
    /// The channel of queue `queue` of a device. A fetch of every tag waits to be submitted.
    pub(super) fn new(device: &'d UblkDev, queue: u16) -> io::Result<Self> {
        let (info, depth) = (&device.dev_info, device.dev_info.queue_depth);
        ublk_init_task_ring(|place| {
            let entries = (u32::from(depth) * ENTRIES).next_power_of_two();
            // Without the flag, a request interrupts the thread wherever it is; with it (5.19), at its next call.
            let mut builder = IoUring::builder();
            builder.setup_coop_taskrun().dontfork().setup_cqsize(entries);
            let ring = RefCell::new(builder.build(entries)?);
            place.set(ring).map_err(|_| UblkError::OtherError(-libc::EEXIST))
        })
        .map_err(io_error)?;
        // SAFETY: the device has its descriptor open for as long as it lives.
        let character = unsafe { BorrowedFd::borrow_raw(device.tgt.fds[0]) };
        let mut data = Data::new(character, info, queue);
        let queue = UblkQueue::new(queue, device).map_err(io_error)?;
        let queue =
            queue.submit_fetch_commands_unified(BufDescList::Slices(data.buffers())).map_err(io_error)?;
        data.gone(usize::from(depth));
        let features = info.features();
        // A place for each tag's pages.
        let moves = features.contains(Features::SUPPORT_ZERO_COPY.with(Features::USER_COPY))
            && with_task_io_ring(|ring| ring.submitter().register_buffers_sparse(u32::from(depth))).is_ok();
        let encoded = features.contains(Features::CMD_IOCTL_ENCODE);
        let (waiting, arrived) = (usize::from(depth), VecDeque::with_capacity(usize::from(depth)));
        Ok(Channel { queue, data, depth, moves, encoded, waiting, arrived })
    }

    pub(super) fn depth(&self) -> u16 {
        self.depth
    }

    /// The ring in the eyes of the present runtime: readable while requests wait to be taken.
    pub(super) fn watch(&self) -> io::Result<AsyncFd<OwnedFd>> {
        // SAFETY: the thread has its ring open for as long as it lives.
        let descriptor = unsafe { BorrowedFd::borrow_raw(self.queue.as_raw_fd()) }.try_clone_to_owned()?;
        // SAFETY: the descriptor is owned by what watches it, and so open for as long.
        unsafe { AsyncFd::register_with_interest(descriptor, Interest::READABLE) }
            .map_err(|error| error.into_parts().1)
    }

    /// Answers a tag's request, with bytes moved or a negative errno, and asks for its next one.
    pub(super) fn commit(&mut self, tag: u16, result: i32) -> io::Result<()> {
        self.make_room()?;
        let named = self.data.named_by(tag);
        let done = self.queue.complete_io_cmd_unified(tag, named, Ok(UblkIORes::Result(result)));
        done.map_err(io_error)?;
        self.data.gone(1);
        self.waiting += 1;
        Ok(())
    }

    /// Whether the kernel can move data between requests and files.
    pub(super) fn moves(&self) -> bool {
        self.moves
    }

    /// Fills a read's pages from a file, without a copy of ours. [`Event::Filled`] tells its end: until then the tag is
    /// not to be answered, and the file stays open.
    pub(super) fn fill(&mut self, tag: u16, from: &FileRange) -> io::Result<()> {
        let len = u32::try_from(from.len).map_err(|_| Errno::INVAL)?;
        self.push_buffer(sys::UBLK_U_IO_REGISTER_IO_BUF, tag)?;
        // Where the first was refused this one is, too: there are no such pages then.
        let fd = types::Fd(from.file.as_raw_fd());
        let read = opcode::ReadFixed::new(fd, std::ptr::null_mut(), len, tag).offset(from.offset);
        self.push(read.build(), tag, FILLED)
    }

    /// Gives the pages back, before the tag is answered.
    pub(super) fn release(&mut self, tag: u16) -> io::Result<()> {
        self.push_buffer(sys::UBLK_U_IO_UNREGISTER_IO_BUF, tag)
    }

    /// The pages of a tag's request, as buffer number `tag` of the ring. Only a refusal is heard of.
    fn push_buffer(&mut self, op: u32, tag: u16) -> io::Result<()> {
        let command =
            sys::ublksrv_io_cmd { q_id: self.queue.get_qid(), tag, result: 0, addr: u64::from(tag) };
        let mut words = [0; 16];
        words.copy_from_slice(command.bytes());
        let op = if self.encoded { op } else { op & 0xff };
        // The queue's first file is the device.
        let entry = opcode::UringCmd16::new(types::Fixed(0), op).cmd(words).build();
        self.push(entry.flags(Flags::SKIP_SUCCESS), tag, BUFFER)
    }

    fn push(&mut self, entry: Entry, tag: u16, about: u32) -> io::Result<()> {
        self.make_room()?;
        let entry = entry.user_data(UblkIOCtx::build_user_data(tag, about, 0, true));
        self.queue.ublk_submit_sqe_sync(entry).map_err(io_error)?;
        self.waiting += 1;
        Ok(())
    }

    /// Hands entries over where the ring has no room for another one.
    fn make_room(&mut self) -> io::Result<()> {
        if self.waiting < usize::from(self.depth) * ENTRIES as usize {
            return Ok(());
        }
        self.submit()?;
        if self.waiting < usize::from(self.depth) * ENTRIES as usize {
            Ok(())
        } else {
            Err(Errno::BUSY.into())
        }
    }

    /// Hands over all answers since the last call; one system call, and none where there are none.
    pub(super) fn submit(&mut self) -> io::Result<()> {
        if self.waiting == 0 {
            return Ok(());
        }
        let (done, left) = with_task_io_ring_mut(|ring| (ring.submit(), ring.submission().len()));
        self.waiting = left;
        match done {
            Ok(_) => Ok(()),
            Err(error) if Errno::from_io_error(&error) == Some(Errno::INTR) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Whether answers wait to be handed over.
    pub(super) fn has_answers(&self) -> bool {
        self.waiting > 0
    }

    /// What has come next from the kernel.
    pub(super) fn next(&mut self) -> Option<Event> {
        loop {
            if self.arrived.is_empty() {
                let found = &mut self.arrived;
                with_task_io_ring_mut(|ring| {
                    found.extend(ring.completion().map(|entry| (entry.user_data(), entry.result())));
                });
            }
            let (about, result) = self.arrived.pop_front()?;
            // Tags are what was put there.
            let tag = u16::try_from(UblkIOCtx::user_data_to_tag(about)).unwrap_or(u16::MAX);
            if about & libublk::UblkUringData::Target as u64 == 0 {
                self.data.back();
                return Some(Event::Tag(tag, result));
            }
            if UblkIOCtx::user_data_to_op(about) == FILLED {
                return Some(Event::Filled(tag, result));
            }
            tracing::debug!(tag, errno = -result, "the kernel refused a request's pages");
        }
    }

    /// The request that a tag has come with.
    pub(super) fn descriptor(&self, tag: u16) -> sys::ublksrv_io_desc {
        // The kernel has written it before it completed the tag's command, and leaves it alone until the tag is committed.
        *self.queue.get_iod(tag)
    }
}

/// An error of libublk as that of the system call.
fn io_error(error: UblkError) -> io::Error {
    match error {
        UblkError::IOError(error) => error,
        UblkError::UringIOError(errno) | UblkError::OtherError(errno) => io::Error::from_raw_os_error(-errno),
        other => io::Error::other(other.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn completions_tell_what_they_are_about() {
        let target = libublk::UblkUringData::Target as u64;
        for (about, ours) in [(FILLED, true), (BUFFER, true), (sys::UBLK_U_IO_COMMIT_AND_FETCH_REQ, false)] {
            let data = UblkIOCtx::build_user_data(4095, about, 0, ours);
            assert_eq!((UblkIOCtx::user_data_to_tag(data), data & target != 0), (4095, ours));
            assert_eq!(UblkIOCtx::user_data_to_op(data), about & 0xff);
        }
    }

    #[test]
    fn errors_keep_their_number() {
        assert_eq!(io_error(UblkError::OtherError(-libc::ENOTSUP)).raw_os_error(), Some(libc::ENOTSUP));
        assert_eq!(io_error(UblkError::IOError(Errno::NOMEM.into())).raw_os_error(), Some(libc::ENOMEM));
    }
}
