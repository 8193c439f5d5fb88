//! The way that the requests' data takes between the kernel and this process.
//!
//! With `USER_COPY` (6.5) it is copied by pread(2) and pwrite(2) on /dev/ublkcN, when it is wanted and where it is wanted, at
//! the places that libublk computes. Before, the kernel copies it to and from an `IoBuf` of each tag, when the tag comes and
//! when it is answered.
//! A leaf file: memory is shared with the kernel here.
#![allow(unsafe_code)]

use std::os::fd::BorrowedFd;

use libublk::helpers::IoBuf;
use libublk::io::{BufDesc, UblkIOCtx};
use rustix::io::{Errno, pread, pwrite};

use super::abi::{Described, DeviceInfo, Features};

/// The data of a queue's requests.
pub(super) struct Data<'d> {
    /// /dev/ublkcN.
    device: BorrowedFd<'d>,
    queue: u16,
    place: Place,
    /// Commands that the kernel has, or will have: each can name a part of `place`.
    outstanding: usize,
}

enum Place {
    /// In the kernel; this is the place it is copied to and from, for one request at a time.
    Copied(IoBuf<u8>),
    /// In a buffer for each tag, of which so many bytes have been written to.
    Shared(Vec<IoBuf<u8>>, Vec<usize>),
}

impl Drop for Data<'_> {
    fn drop(&mut self) {
        // The end of a ring cancels its commands later, and the kernel can still copy for one of them: the memory that
        // they name stays until the process ends.
        if self.outstanding > 0
            && let Place::Shared(buffers, _) = &mut self.place
        {
            std::mem::forget(std::mem::take(buffers));
        }
    }
}

impl<'d> Data<'d> {
    /// The place for the data of a queue of this device.
    pub(super) fn new(device: BorrowedFd<'d>, info: &DeviceInfo, queue: u16) -> Self {
        let io_size = usize::try_from(info.max_io_buf_bytes).unwrap_or(usize::MAX);
        let buffer = |now: bool| {
            let mut buffer = IoBuf::new(io_size);
            // Memory is there once it has been written to.
            if now {
                buffer.zero_buf();
            }
            buffer
        };
        let place = if info.features().contains(Features::USER_COPY) {
            Place::Copied(buffer(true))
        } else {
            // A user's memory is not locked: there is no use in taking it now.
            let now = !info.features().contains(Features::UNPRIVILEGED_DEV);
            let depth = usize::from(info.queue_depth);
            let written = if now { io_size } else { 0 };
            Place::Shared((0..depth).map(|_| buffer(now)).collect(), vec![written; depth])
        };
        Data { device, queue, place, outstanding: 0 }
    }

    /// Returns the buffers of all tags, where the kernel is to copy.
    pub(super) fn buffers(&self) -> Option<&Vec<IoBuf<u8>>> {
        match &self.place {
            Place::Copied(_) => None,
            Place::Shared(buffers, _) => Some(buffers),
        }
    }

    /// Returns what a tag's command names.
    pub(super) fn named_by(&self, tag: u16) -> BufDesc<'_> {
        match &self.place {
            Place::Copied(_) => BufDesc::Slice(&[]),
            Place::Shared(buffers, _) => BufDesc::RawAddress(buffers[usize::from(tag)].as_ptr()),
        }
    }

    /// Counts commands that go to the kernel.
    pub(super) fn gone(&mut self, commands: usize) {
        self.outstanding += commands;
    }

    /// Counts a command that has come back.
    pub(super) fn back(&mut self) {
        self.outstanding -= 1;
    }

    /// Returns the data of a write.
    pub(super) fn incoming(&mut self, tag: u16, len: usize) -> Result<&[u8], Errno> {
        match &mut self.place {
            Place::Copied(buffer) => {
                let part = buffer.as_mut_slice().get_mut(..len).ok_or(Errno::INVAL)?;
                copy_in(self.device, self.queue, tag, part)?;
                Ok(part)
            }
            // The kernel has written so many bytes.
            Place::Shared(buffers, written) => Ok(part(buffers, written, tag, len, true)?),
        }
    }

    /// Copies the data of a write into a buffer.
    pub(super) fn incoming_into(&mut self, tag: u16, into: &mut [u8]) -> Result<(), Errno> {
        match &mut self.place {
            Place::Copied(_) => copy_in(self.device, self.queue, tag, into),
            Place::Shared(buffers, written) => {
                into.copy_from_slice(part(buffers, written, tag, into.len(), true)?);
                Ok(())
            }
        }
    }

    /// Returns the place to fill for a read; then comes [`Data::filled`].
    pub(super) fn outgoing(&mut self, tag: u16, len: usize) -> Result<&mut [u8], Errno> {
        match &mut self.place {
            Place::Copied(buffer) => buffer.as_mut_slice().get_mut(..len).ok_or(Errno::INVAL),
            Place::Shared(buffers, written) => part(buffers, written, tag, len, false),
        }
    }

    /// Hands over what was put into [`Data::outgoing`].
    pub(super) fn filled(&mut self, tag: u16, len: usize) -> Result<(), Errno> {
        match &self.place {
            Place::Copied(buffer) => copy_out(self.device, self.queue, tag, buffer.subslice(..len)),
            Place::Shared(..) => Ok(()),
        }
    }

    /// Hands over what a read found, from a buffer.
    pub(super) fn outgoing_from(&mut self, tag: u16, from: &[u8]) -> Result<(), Errno> {
        match &mut self.place {
            Place::Copied(_) => copy_out(self.device, self.queue, tag, from),
            Place::Shared(buffers, written) => {
                part(buffers, written, tag, from.len(), false)?.copy_from_slice(from);
                Ok(())
            }
        }
    }
}

/// The first `len` bytes of a tag's buffer. The kernel touches the buffer only while the tag's command is its own, and
/// callers ask for it between completion and commit; `by_kernel` tells that it has written these bytes.
fn part<'b>(
    buffers: &'b mut [IoBuf<u8>],
    written: &mut [usize],
    tag: u16,
    len: usize,
    by_kernel: bool,
) -> Result<&'b mut [u8], Errno> {
    let buffer = buffers.get_mut(usize::from(tag)).ok_or(Errno::INVAL)?;
    let written = &mut written[usize::from(tag)];
    if len > buffer.len() {
        return Err(Errno::INVAL);
    }
    if len > *written {
        if !by_kernel {
            // SAFETY: inside the buffer, as checked.
            unsafe { buffer.as_mut_ptr().add(*written).write_bytes(0, len - *written) };
        }
        *written = len;
    }
    // SAFETY: inside the buffer, and every byte has been written to.
    Ok(unsafe { std::slice::from_raw_parts_mut(buffer.as_mut_ptr(), len) })
}

fn place(queue: u16, tag: u16, at: usize) -> Result<u64, Errno> {
    let at = u32::try_from(at).map_err(|_| Errno::INVAL)?;
    Ok(UblkIOCtx::ublk_user_copy_pos(queue, tag, at))
}

fn copy_in(device: BorrowedFd<'_>, queue: u16, tag: u16, into: &mut [u8]) -> Result<(), Errno> {
    let mut done = 0;
    while done < into.len() {
        match pread(device, &mut into[done..], place(queue, tag, done)?)? {
            0 => return Err(Errno::IO),
            count => done += count,
        }
    }
    Ok(())
}

fn copy_out(device: BorrowedFd<'_>, queue: u16, tag: u16, from: &[u8]) -> Result<(), Errno> {
    let mut done = 0;
    while done < from.len() {
        match pwrite(device, &from[done..], place(queue, tag, done)?)? {
            0 => return Err(Errno::IO),
            count => done += count,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn places_do_not_overlap() {
        let place = |queue, tag, at| place(queue, tag, at).unwrap();
        assert_eq!(place(0, 0, 0), 0x8000_0000);
        assert_eq!(place(0, 1, 0) - place(0, 0, 0), 32 << 20);
        assert!(place(0, 4095, (32 << 20) - 1) < place(1, 0, 0));
    }

    const INFO: DeviceInfo = DeviceInfo {
        queue_depth: 4,
        max_io_buf_bytes: 1 << 20,
        nr_hw_queues: 1,
        state: 0,
        pad0: 0,
        dev_id: 0,
        ublksrv_pid: 0,
        pad1: 0,
        flags: 0,
        ublksrv_flags: 0,
        owner_uid: 0,
        owner_gid: 0,
        reserved1: 0,
        reserved2: 0,
    };

    /// Returns whether an address is mapped, by /proc/self/maps.
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
        let file = tempfile::tempfile().unwrap();
        let mut data = Data::new(file.as_fd(), &INFO, 0);
        data.outgoing(3, 8192).unwrap().fill(7);
        let kept = data.buffers().unwrap()[3].as_ptr();
        data.gone(4);
        drop(data);
        assert!(is_mapped(kept as usize));
        // SAFETY: it was not freed.
        assert_eq!(unsafe { kept.read_volatile() }, 7);
    }

    #[test]
    fn parts_of_tags_are_whole_and_apart() {
        let file = tempfile::tempfile().unwrap();
        for flags in [0, Features::UNPRIVILEGED_DEV.0] {
            let mut data = Data::new(file.as_fd(), &DeviceInfo { flags, ..INFO }, 0);
            for tag in 0..4_u8 {
                let part = data.outgoing(u16::from(tag), 8192).unwrap();
                assert!(part.iter().all(|byte| *byte == 0));
                part.fill(tag);
            }
            for tag in 0..4_u8 {
                assert!(data.incoming(u16::from(tag), 8192).unwrap().iter().all(|byte| *byte == tag));
            }
            assert_eq!(data.outgoing(0, (1 << 20) + 1).err(), Some(Errno::INVAL));
            assert_eq!(data.outgoing(0, 1 << 20).map(|part| part.len()), Ok(1 << 20));
            let BufDesc::RawAddress(named) = data.named_by(2) else {
                panic!("a command names the tag's buffer")
            };
            assert_eq!(named, data.buffers().unwrap()[2].as_ptr());
        }
    }

    #[test]
    fn copies_go_through_the_device() {
        let file = tempfile::tempfile().unwrap();
        let mut data = Data::new(file.as_fd(), &DeviceInfo { flags: Features::USER_COPY.0, ..INFO }, 0);
        data.outgoing(2, 3).unwrap().copy_from_slice(b"abc");
        data.filled(2, 3).unwrap();
        data.outgoing_from(1, b"defg").unwrap();
        assert_eq!(data.incoming(2, 3), Ok(b"abc".as_slice()));
        let mut into = [0; 4];
        data.incoming_into(1, &mut into).unwrap();
        assert_eq!(&into, b"defg");
        // Nothing is there of a tag without a request.
        assert_eq!(data.incoming(3, 4), Err(Errno::IO));
        assert!(data.buffers().is_none() && matches!(data.named_by(2), BufDesc::Slice([])));
    }
}
