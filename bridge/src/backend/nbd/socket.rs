//! A connected socket to a server, under the event queue of the thread that drives it. Only the calls.

#![allow(unsafe_code)] // a leaf: only to register the socket with the event queue

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::OwnedFd;
use std::task::{Context, Poll};

use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvFlags, SendAncillaryBuffer, SendFlags};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// The socket of one connection.
pub(super) struct Socket {
    /// For reading only: else a Unix socket would wake its thread each time the server takes a request.
    fd: AsyncFd<OwnedFd>,
    /// Tells when there is room to send again; there for as long as that is waited for.
    room: Option<AsyncFd<OwnedFd>>,
}

impl Socket {
    /// Takes a connected, non-blocking socket into the event queue of this thread's runtime.
    pub(super) fn new(fd: OwnedFd) -> io::Result<Self> {
        Ok(Socket { fd: register(fd, Interest::READABLE)?, room: None })
    }

    /// Receives what is there into these places; 0 at the server's end. Pending: the task is woken when there may
    /// be more. With `look`, the next call looks for itself even where this one seems to have taken all.
    pub(super) fn poll_receive(
        &self,
        cx: &mut Context<'_>,
        places: &mut [IoSliceMut<'_>],
        look: bool,
    ) -> Poll<io::Result<usize>> {
        let wanted: usize = places.iter().map(|place| place.len()).sum();
        loop {
            let mut guard = std::task::ready!(self.fd.poll_read_ready(cx))?;
            let received = would_block(|| {
                let mut no_control = RecvAncillaryBuffer::default();
                rustix::net::recvmsg(&self.fd, places, &mut no_control, RecvFlags::DONTWAIT)
                    .map(|message| message.bytes)
            })?;
            // Its next bytes raise a new event.
            if received.is_none_or(|n| n > 0 && n < wanted && !look) {
                guard.clear_ready();
            }
            if let Some(n) = received {
                return Poll::Ready(Ok(n));
            }
        }
    }

    /// Sends what there is room for. Pending: the task is woken when there may be more room.
    pub(super) fn poll_send(
        &mut self,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        loop {
            if let Some(room) = &self.room {
                let mut guard = std::task::ready!(room.poll_write_ready(cx))?;
                // Should it be full again, the descriptor is made anew.
                guard.clear_ready();
                drop(guard);
                self.room = None;
            }
            let sent = would_block(|| {
                let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
                rustix::net::sendmsg(&self.fd, slices, &mut SendAncillaryBuffer::default(), flags)
            })?;
            match sent {
                Some(n) => return Poll::Ready(Ok(n)),
                None => self.room = Some(register(self.fd.get_ref().try_clone()?, Interest::WRITABLE)?),
            }
        }
    }

    /// Whether sending waits for room.
    pub(super) fn is_blocked(&self) -> bool {
        self.room.is_some()
    }

    /// Sends, if there is room for all of it now; nobody minds if not.
    pub(super) fn send_goodbye(&self, bytes: &[u8]) {
        let _ = rustix::net::send(&self.fd, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
    }
}

fn register(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd keeps the one descriptor it owns open and unchanged for as long as it lives.
    let fd = unsafe { AsyncFd::register_with_interest(fd, interest) }?;
    Ok(fd)
}

fn would_block<T>(mut call: impl FnMut() -> rustix::io::Result<T>) -> io::Result<Option<T>> {
    loop {
        return match call() {
            Ok(value) => Ok(Some(value)),
            Err(Errno::AGAIN) => Ok(None),
            Err(Errno::INTR) => continue,
            Err(error) => Err(error.into()),
        };
    }
}
