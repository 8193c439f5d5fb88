//! A connected socket, TCP or Unix: the calls, and nothing else.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendFlags};

/// The longest wait in one call: after it somebody looks at the clock.
pub(super) const TICK: Duration = Duration::from_millis(50);

pub(super) struct Socket(OwnedFd);

impl Socket {
    /// Takes a connected socket that blocks.
    pub(super) fn new(fd: OwnedFd) -> io::Result<Self> {
        set_socket_timeout(&fd, Timeout::Recv, Some(TICK))?;
        Ok(Socket(fd))
    }

    /// Receives what is there; 0 at the peer's end, None when there is nothing, with `wait` after a [`TICK`].
    pub(super) fn receive(&self, buf: &mut [u8], wait: bool) -> io::Result<Option<usize>> {
        let flags = if wait { RecvFlags::empty() } else { RecvFlags::DONTWAIT };
        none_yet(rustix::net::recv(&self.0, buf, flags).map(|(received, _)| received))
    }

    /// Sends what there is room for; None when there is none.
    pub(super) fn send(&self, slices: &[IoSlice<'_>]) -> io::Result<Option<usize>> {
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        none_yet(rustix::net::sendmsg(&self.0, slices, &mut SendAncillaryBuffer::default(), flags))
    }

    /// Sends all of it, or gives up at the deadline.
    pub(super) fn send_all(&self, mut bytes: &[u8], deadline: Instant) -> io::Result<()> {
        while !bytes.is_empty() {
            match self.send(&[IoSlice::new(bytes)])? {
                Some(sent) => bytes = &bytes[sent..],
                None if Instant::now() > deadline => return Err(io::ErrorKind::TimedOut.into()),
                None => self.wait(PollFlags::OUT)?,
            }
        }
        Ok(())
    }

    /// Waits for one of these events, or a [`TICK`].
    pub(super) fn wait(&self, events: PollFlags) -> io::Result<()> {
        let tick = Timespec { tv_sec: 0, tv_nsec: TICK.subsec_nanos().into() };
        match rustix::event::poll(&mut [PollFd::new(&self.0, events)], Some(&tick)) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn none_yet(result: Result<usize, Errno>) -> io::Result<Option<usize>> {
    match result {
        Ok(moved) => Ok(Some(moved)),
        Err(Errno::AGAIN | Errno::INTR) => Ok(None),
        Err(error) => Err(error.into()),
    }
}
