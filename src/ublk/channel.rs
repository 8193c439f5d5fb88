//! A queue's channel to the kernel: the requests' descriptors, the ring on which answers go out and requests come in,
//! and the way their data takes. It knows tags and bytes; what a request means is `translate`'s business.
//!
//! Data takes one of two ways. With `USER_COPY` (6.5) it is copied by pread(2) and pwrite(2) on /dev/ublkcN, when it is
//! wanted and where it is wanted; before, the kernel copies it to and from a part of memory that each tag owns. Beside the
//! first, a kernel with `SUPPORT_ZERO_COPY` moves it between request and file by itself, on this ring: [`Channel::fill`].
//! A leaf file: memory is shared with the kernel here.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;

use bridge::FileRange;
use io_uring::squeue::{Entry, Flags};
use io_uring::{IoUring, opcode, types};
use rustix::io::{Errno, pread, pwrite};
use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::abi::{self, Command, DeviceInfo, Features, IoDescriptor};

/// A queue, as the thread sees it that fetches its requests: all calls must come from that thread.
pub(super) struct Channel {
    ring: IoUring,
    descriptors: Map,
    /// /dev/ublkcN.
    device: Arc<File>,
    queue: u16,
    depth: u16,
    encoded: bool,
    data: Data,
    /// The kernel moves data between requests and files.
    moves: bool,
    /// Commands of tags that the kernel has, or will have: each can name a part of `data`.
    outstanding: usize,
}

impl Drop for Channel {
    fn drop(&mut self) {
        // The end of a ring cancels its commands later, and the kernel can still copy for one of them: the memory that
        // they name stays until the process ends.
        if self.outstanding > 0 {
            std::mem::forget(std::mem::replace(&mut self.data, Data::Copied(Box::default())));
        }
    }
}

/// What has come from the kernel for a tag.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Event {
    /// The tag itself, and why: 0 for a request.
    Tag(u16, i32),
    /// What became of [`Channel::fill`]: bytes, or a negative errno.
    Filled(u16, i32),
}

/// What a completion is about, beside its tag.
const FILLED: u64 = 1 << 16;
const BUFFER: u64 = 2 << 16;

/// Where the data of requests is.
enum Data {
    /// In the kernel; this is the place it is copied to and from, for one request at a time.
    Copied(Box<[u8]>),
    /// In a part of this memory for each tag, of so many bytes.
    Shared(Map, usize),
}

impl Channel {
    /// The channel of queue `queue`. Its requests come after [`Channel::fetch`] of each tag.
    pub(super) fn new(device: Arc<File>, info: &DeviceInfo, queue: u16) -> io::Result<Self> {
        let depth = info.queue_depth;
        // Without the flag, a request interrupts the thread wherever it is; with it (5.19), at its next call.
        let mut builder = IoUring::builder();
        builder.setup_coop_taskrun().dontfork().setup_cqsize(u32::from(depth).next_power_of_two() * 2);
        let ring = builder.build(u32::from(depth).next_power_of_two())?;
        let page = rustix::param::page_size();
        let size = |depth: u16| (usize::from(depth) * size_of::<IoDescriptor>()).next_multiple_of(page);
        let offset = u64::from(queue) * size(abi::MAX_QUEUE_DEPTH) as u64;
        let descriptors = Map::of_device(&device, size(depth), offset)?;
        let io_size = usize::try_from(info.max_io_buf_bytes).unwrap_or(usize::MAX);
        let data = if info.features().contains(Features::USER_COPY) {
            // Not zeroes: the allocator would leave them to the first use.
            Data::Copied(vec![1; io_size].into_boxed_slice())
        } else {
            // A user's memory is not locked: there is no use in taking it now.
            let now = !info.features().contains(Features::UNPRIVILEGED_DEV);
            Data::Shared(Map::anonymous(io_size * usize::from(depth), now)?, io_size)
        };
        let encoded = info.features().contains(Features::CMD_IOCTL_ENCODE);
        // A place for each tag's pages.
        let moves = info.features().contains(Features::SUPPORT_ZERO_COPY.with(Features::USER_COPY))
            && ring.submitter().register_buffers_sparse(u32::from(depth)).is_ok();
        Ok(Channel { ring, descriptors, device, queue, depth, encoded, data, moves, outstanding: 0 })
    }

    pub(super) fn depth(&self) -> u16 {
        self.depth
    }

    /// The ring in the eyes of the present runtime: readable while requests wait to be taken.
    pub(super) fn watch(&self) -> io::Result<AsyncFd<OwnedFd>> {
        // SAFETY: the ring has its descriptor open for as long as it lives.
        let descriptor = unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) }.try_clone_to_owned()?;
        // SAFETY: the descriptor is owned by what watches it, and so open for as long.
        unsafe { AsyncFd::register_with_interest(descriptor, Interest::READABLE) }
            .map_err(|error| error.into_parts().1)
    }

    /// Asks for a tag's first request.
    pub(super) fn fetch(&mut self, tag: u16) -> io::Result<()> {
        self.push(abi::FETCH_REQ, tag, -1)
    }

    /// Answers a tag's request, with bytes moved or a negative errno, and asks for its next one.
    pub(super) fn commit(&mut self, tag: u16, result: i32) -> io::Result<()> {
        self.push(abi::COMMIT_AND_FETCH_REQ, tag, result)
    }

    /// Whether the kernel can move data between requests and files.
    pub(super) fn moves(&self) -> bool {
        self.moves
    }

    /// Fills a read's pages from a file, without a copy of ours. [`Event::Filled`] tells its end: until then the tag is
    /// not to be answered, and the file stays open.
    pub(super) fn fill(&mut self, tag: u16, from: &FileRange) -> io::Result<()> {
        let len = u32::try_from(from.len).map_err(|_| Errno::INVAL)?;
        self.push_buffer(abi::REGISTER_IO_BUF, tag)?;
        // Where the first was refused this one is, too: there are no such pages then.
        let fd = types::Fd(from.file.as_raw_fd());
        let read = opcode::ReadFixed::new(fd, std::ptr::null_mut(), len, tag).offset(from.offset);
        self.push_entry(&read.build().user_data(FILLED | u64::from(tag)))
    }

    /// Gives the pages back, before the tag is answered.
    pub(super) fn release(&mut self, tag: u16) -> io::Result<()> {
        self.push_buffer(abi::UNREGISTER_IO_BUF, tag)
    }

    fn push(&mut self, command: Command, tag: u16, result: i32) -> io::Result<()> {
        let address = match &self.data {
            Data::Copied(_) => 0,
            Data::Shared(map, size) => map.address() as u64 + u64::from(tag) * *size as u64,
        };
        let entry = self.entry(command, tag, result, address);
        self.push_entry(&entry.user_data(u64::from(tag)))?;
        self.outstanding += 1;
        Ok(())
    }

    /// The pages of a tag's request, as buffer number `tag` of the ring. Only a refusal is heard of.
    fn push_buffer(&mut self, command: Command, tag: u16) -> io::Result<()> {
        let entry = self.entry(command, tag, 0, u64::from(tag)).flags(Flags::SKIP_SUCCESS);
        self.push_entry(&entry.user_data(BUFFER | u64::from(tag)))
    }

    fn entry(&self, command: Command, tag: u16, result: i32, address: u64) -> Entry {
        // struct ublksrv_io_cmd
        let mut words = [0; 16];
        words[0..2].copy_from_slice(&self.queue.to_ne_bytes());
        words[2..4].copy_from_slice(&tag.to_ne_bytes());
        words[4..8].copy_from_slice(&result.to_ne_bytes());
        words[8..16].copy_from_slice(&address.to_ne_bytes());
        let fd = types::Fd(self.device.as_raw_fd());
        opcode::UringCmd16::new(fd, command.op(self.encoded)).cmd(words).build()
    }

    fn push_entry(&mut self, entry: &Entry) -> io::Result<()> {
        loop {
            // SAFETY: the kernel writes, at most, into the part of `data` that belongs to the entry's tag, or into the
            // pages of the request, which are its own. That part is not touched while the command is the kernel's, and
            // `data` is unmapped only when every such command has come back (`outstanding` is 0); otherwise it is
            // leaked. Descriptors are looked up when the entry is submitted; the device is open for as long as the
            // channel lives, and the file of `fill` until its end, by its contract. At worst a command or read fails.
            if unsafe { self.ring.submission().push(entry) }.is_ok() {
                return Ok(());
            }
            self.submit()?;
        }
    }

    /// Hands over all answers since the last call; one system call, and none where there are none.
    pub(super) fn submit(&mut self) -> io::Result<()> {
        if self.ring.submission().is_empty() {
            return Ok(());
        }
        match self.ring.submit() {
            Err(error) if Errno::from_io_error(&error) == Some(Errno::INTR) => Ok(()),
            other => other.map(drop),
        }
    }

    /// Whether answers wait to be handed over.
    pub(super) fn has_answers(&mut self) -> bool {
        !self.ring.submission().is_empty()
    }

    /// What has come next from the kernel.
    pub(super) fn next(&mut self) -> Option<Event> {
        loop {
            let completion = self.ring.completion().next()?;
            let (about, result) = (completion.user_data(), completion.result());
            // Tags are what was put there.
            let tag = u16::try_from(about & 0xffff).unwrap_or(u16::MAX);
            match about & !0xffff {
                FILLED => return Some(Event::Filled(tag, result)),
                BUFFER => tracing::debug!(tag, errno = -result, "the kernel refused a request's pages"),
                _ => {
                    self.outstanding -= 1;
                    return Some(Event::Tag(tag, result));
                }
            }
        }
    }

    /// The request that a tag has come with.
    pub(super) fn descriptor(&self, tag: u16) -> IoDescriptor {
        assert!(tag < self.depth);
        // SAFETY: the map holds `depth` descriptors. The kernel has written this one before it completed the tag's
        // command, and leaves it alone until the tag is committed.
        unsafe { self.descriptors.address().cast::<IoDescriptor>().add(usize::from(tag)).read_volatile() }
    }

    /// The data of a write.
    pub(super) fn incoming(&mut self, tag: u16, len: usize) -> Result<&[u8], Errno> {
        let (device, queue) = (&self.device, self.queue);
        match &mut self.data {
            Data::Copied(buffer) => {
                let part = buffer.get_mut(..len).ok_or(Errno::INVAL)?;
                copy_in(device, queue, tag, part)?;
                Ok(part)
            }
            Data::Shared(map, size) => Ok(map.part(tag, *size).get(..len).ok_or(Errno::INVAL)?),
        }
    }

    /// The same, into a buffer.
    pub(super) fn incoming_into(&mut self, tag: u16, into: &mut [u8]) -> Result<(), Errno> {
        match &mut self.data {
            Data::Copied(_) => copy_in(&self.device, self.queue, tag, into),
            Data::Shared(map, size) => {
                into.copy_from_slice(map.part(tag, *size).get(..into.len()).ok_or(Errno::INVAL)?);
                Ok(())
            }
        }
    }

    /// The place to fill for a read; then comes [`Channel::filled`].
    pub(super) fn outgoing(&mut self, tag: u16, len: usize) -> Result<&mut [u8], Errno> {
        match &mut self.data {
            Data::Copied(buffer) => buffer.get_mut(..len).ok_or(Errno::INVAL),
            Data::Shared(map, size) => map.part(tag, *size).get_mut(..len).ok_or(Errno::INVAL),
        }
    }

    /// Hands over what was put into [`Channel::outgoing`].
    pub(super) fn filled(&mut self, tag: u16, len: usize) -> Result<(), Errno> {
        match &self.data {
            Data::Copied(buffer) => copy_out(&self.device, self.queue, tag, &buffer[..len]),
            Data::Shared(..) => Ok(()),
        }
    }

    /// Hands over what a read found, from a buffer.
    pub(super) fn outgoing_from(&mut self, tag: u16, from: &[u8]) -> Result<(), Errno> {
        match &mut self.data {
            Data::Copied(_) => copy_out(&self.device, self.queue, tag, from),
            Data::Shared(map, size) => {
                map.part(tag, *size).get_mut(..from.len()).ok_or(Errno::INVAL)?.copy_from_slice(from);
                Ok(())
            }
        }
    }
}

fn place(queue: u16, tag: u16, at: usize) -> u64 {
    abi::IO_BUF_OFFSET
        + (u64::from(queue) << abi::QUEUE_SHIFT)
        + (u64::from(tag) << abi::TAG_SHIFT)
        + at as u64
}

fn copy_in(device: &File, queue: u16, tag: u16, into: &mut [u8]) -> Result<(), Errno> {
    let mut done = 0;
    while done < into.len() {
        match pread(device, &mut into[done..], place(queue, tag, done))? {
            0 => return Err(Errno::IO),
            count => done += count,
        }
    }
    Ok(())
}

fn copy_out(device: &File, queue: u16, tag: u16, from: &[u8]) -> Result<(), Errno> {
    let mut done = 0;
    while done < from.len() {
        match pwrite(device, &from[done..], place(queue, tag, done))? {
            0 => return Err(Errno::IO),
            count => done += count,
        }
    }
    Ok(())
}

/// A mapping, unmapped when dropped.
struct Map {
    address: NonNull<u8>,
    len: usize,
}

impl Map {
    /// The descriptors of a queue: the kernel writes, we read.
    fn of_device(device: &File, len: usize, offset: u64) -> Result<Self, Errno> {
        // SAFETY: a new mapping, at an address of the kernel's choice, disturbs no other.
        let address = unsafe {
            mmap(
                std::ptr::null_mut(),
                len,
                ProtFlags::READ,
                MapFlags::SHARED | MapFlags::POPULATE,
                device,
                offset,
            )?
        };
        Ok(Map { address: NonNull::new(address.cast()).ok_or(Errno::NOMEM)?, len })
    }

    /// Memory of our own, which is there `now` or when it is touched.
    fn anonymous(len: usize, now: bool) -> Result<Self, Errno> {
        let flags = if now { MapFlags::PRIVATE | MapFlags::POPULATE } else { MapFlags::PRIVATE };
        // SAFETY: as above.
        let address =
            unsafe { mmap_anonymous(std::ptr::null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, flags)? };
        Ok(Map { address: NonNull::new(address.cast()).ok_or(Errno::NOMEM)?, len })
    }

    fn address(&self) -> *mut u8 {
        self.address.as_ptr()
    }

    /// The part of a tag, in a mapping of [`Map::anonymous`] whose parts have `size` bytes.
    fn part(&mut self, tag: u16, size: usize) -> &mut [u8] {
        let start = usize::from(tag) * size;
        assert!(start + size <= self.len);
        // SAFETY: inside the mapping, as asserted; the kernel touches the part of a tag only while the tag's command
        // is its own, and callers ask for it between completion and commit.
        unsafe { std::slice::from_raw_parts_mut(self.address().add(start), size) }
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: mapped once, by this value, with this length; no reference into it outlives the value, and the kernel
        // has no command that names it (`Channel`). The descriptors are written by the kernel through a mapping of its
        // own.
        let _ = unsafe { munmap(self.address.as_ptr().cast(), self.len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_do_not_overlap() {
        assert_eq!(place(0, 0, 0), 0x8000_0000);
        assert_eq!(place(0, 1, 0) - place(0, 0, 0), 32 << 20);
        assert!(place(0, 4095, (32 << 20) - 1) < place(1, 0, 0));
    }

    /// A channel on a plain file, which refuses every command, with memory shared between the tags.
    fn on_a_file() -> Option<Channel> {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        let info = DeviceInfo { queue_depth: 4, max_io_buf_bytes: 8192, ..DeviceInfo::default() };
        match Channel::new(Arc::new(file), &info, 0) {
            Ok(channel) => Some(channel),
            Err(error) => {
                eprintln!("SKIP: ublk::channel: no io_uring: {error}");
                None
            }
        }
    }

    fn address(channel: &Channel) -> usize {
        match &channel.data {
            Data::Shared(map, _) => map.address() as usize,
            Data::Copied(_) => panic!("the memory is not shared"),
        }
    }

    /// Whether an address is mapped, by /proc/self/maps.
    fn is_mapped(address: usize) -> bool {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        maps.lines().any(|line| {
            let (from, rest) = line.split_once('-').unwrap();
            let to = rest.split_once(' ').unwrap().0;
            let number = |text| usize::from_str_radix(text, 16).unwrap();
            (number(from)..number(to)).contains(&address)
        })
    }

    #[test]
    fn memory_that_commands_name_outlives_the_channel() {
        let Some(mut channel) = on_a_file() else { return };
        let memory = address(&channel);
        (0..4).for_each(|tag| channel.fetch(tag).unwrap());
        drop(channel);
        assert!(is_mapped(memory));
        // And nothing is kept that no command names.
        let Some(mut channel) = on_a_file() else { return };
        (0..4).for_each(|tag| channel.fetch(tag).unwrap());
        channel.submit().unwrap();
        let mut back = 0;
        while back < 4 {
            let event = channel.next();
            back += usize::from(matches!(event, Some(Event::Tag(_, result)) if result < 0));
        }
        assert_eq!(channel.outstanding, 0);
    }

    #[test]
    fn parts_of_tags() {
        let mut map = Map::anonymous(4 * 8192, false).unwrap();
        for tag in 0..4_u8 {
            map.part(u16::from(tag), 8192).fill(tag);
        }
        assert!((0..4_u8).all(|tag| map.part(u16::from(tag), 8192) == [tag; 8192]));
    }
}
