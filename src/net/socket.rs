//! A connected socket, TCP or Unix, under tokio's event queue. Only the calls; who may send when is decided above.

#![allow(unsafe_code)] // a leaf: only to register the socket with the event queue

use std::cell::Cell;
use std::fs::File;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::task::{Context, Poll};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::net::{AddressFamily, RecvFlags, SendAncillaryBuffer, SendFlags, Shutdown, sockopt};
use rustix::pipe::SpliceFlags;
use tokio::io::Interest;
use tokio::io::unix::{AsyncFd, AsyncFdReadyGuard};

/// Room in a Unix socket for answers that the peer has not taken yet; the kernel doubles it for its own needs. The usual
/// 208 KiB hold less than one large read, so that both sides would wait for each other in turn (1 MiB reads: twice
/// as fast with this). TCP grows by itself.
const SEND_BUFFER_BYTES: usize = 1 << 20;

/// The socket of one connection.
pub(super) struct Socket {
    fd: AsyncFd<Arc<OwnedFd>>,
    /// Bytes since the beginning, counted once for each call.
    received: Cell<u64>,
    sent: Cell<u64>,
}

impl Socket {
    /// Takes a connected, non-blocking socket into the event queue of this thread's runtime.
    pub(super) fn new(fd: Arc<OwnedFd>) -> io::Result<Self> {
        if sockopt::socket_domain(&fd) == Ok(AddressFamily::UNIX) {
            // It gets what the system allows: a smaller buffer only means more waits for the peer.
            let _ = sockopt::set_socket_send_buffer_size(&fd, SEND_BUFFER_BYTES);
        }
        // For reading only: else a Unix socket would wake its worker each time the peer takes an answer.
        let fd = register(fd, Interest::READABLE)?;
        Ok(Socket { fd, received: Cell::new(0), sent: Cell::new(0) })
    }

    /// Ready when there may be something to receive. The guard must be cleared when there was not.
    pub(super) fn poll_readable<'a>(
        &'a self,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<AsyncFdReadyGuard<'a, Arc<OwnedFd>>>> {
        self.fd.poll_read_ready(cx)
    }

    /// Like `poll_readable`, as a future. Cancel-safe.
    pub(super) async fn readable(&self) -> io::Result<AsyncFdReadyGuard<'_, Arc<OwnedFd>>> {
        self.fd.readable().await
    }

    /// What tells when there is room to send again: for as long as somebody waits for that, and no longer.
    pub(super) fn send_room(&self) -> io::Result<SendRoom> {
        Ok(SendRoom(register(Arc::new(self.fd.get_ref().try_clone()?), Interest::WRITABLE)?))
    }

    /// Receives what is there; 0 at the peer's end, None when there is nothing yet.
    pub(super) fn receive(&self, buf: &mut [u8]) -> io::Result<Option<usize>> {
        let received =
            would_block(|| rustix::net::recv(&self.fd, &mut *buf, RecvFlags::DONTWAIT).map(|(n, _)| n));
        count(&self.received, received)
    }

    /// Sends what there is room for; None when there is none. `more` says that the rest follows at once.
    pub(super) fn send(&self, bytes: &[u8], more: bool) -> io::Result<Option<usize>> {
        count(&self.sent, would_block(|| rustix::net::send(&self.fd, bytes, send_flags(more))))
    }

    /// Sends from several places at once.
    pub(super) fn send_gathered(&self, slices: &[IoSlice<'_>], more: bool) -> io::Result<Option<usize>> {
        let sent = would_block(|| {
            rustix::net::sendmsg(&self.fd, slices, &mut SendAncillaryBuffer::default(), send_flags(more))
        });
        count(&self.sent, sent)
    }

    /// Sends from a file's pages without a copy. 0 means that the file has become shorter.
    pub(super) fn send_file(&self, file: &File, offset: u64, len: usize) -> io::Result<Option<usize>> {
        let sent = would_block(|| {
            let mut offset = offset;
            rustix::fs::sendfile(&self.fd, file.as_fd(), Some(&mut offset), len)
        });
        count(&self.sent, sent)
    }

    /// Moves what is there, up to `len` bytes, to a pipe that has room; like [`Socket::receive`].
    pub(super) fn splice(&self, pipe: &File, len: usize) -> io::Result<Option<usize>> {
        let flags = SpliceFlags::MOVE | SpliceFlags::NONBLOCK;
        let moved = would_block(|| rustix::pipe::splice(&self.fd, None, pipe, None, len, flags));
        count(&self.received, moved)
    }

    /// How many bytes could be received now; 0 where that is not known.
    pub(super) fn waiting(&self) -> usize {
        let waiting = rustix::io::ioctl_fionread(&self.fd).unwrap_or(0);
        usize::try_from(waiting).unwrap_or(0)
    }

    /// Bytes that were received and sent since the beginning.
    pub(super) fn traffic(&self) -> (u64, u64) {
        (self.received.get(), self.sent.get())
    }

    /// Whether the peer has hung up, as far as its kernel has told ours.
    pub(super) fn hang_up(&self) -> HangUp {
        hang_up(&self.fd)
    }

    /// Ends both directions: every later call fails or finds the end, the peer sees a close.
    pub(super) fn shut_down(&self) {
        // A peer that is gone already is no news.
        let _ = rustix::net::shutdown(&self.fd, Shutdown::Both);
    }
}

/// Tells when there may be room to send.
pub(super) struct SendRoom(AsyncFd<Arc<OwnedFd>>);

impl SendRoom {
    /// Waits until there may be room. The guard must be cleared when there was none. Cancel-safe.
    pub(super) async fn ready(&self) -> io::Result<AsyncFdReadyGuard<'_, Arc<OwnedFd>>> {
        self.0.writable().await
    }
}

fn register(fd: Arc<OwnedFd>, interest: Interest) -> io::Result<AsyncFd<Arc<OwnedFd>>> {
    // SAFETY: an OwnedFd keeps the one descriptor it owns open and unchanged for as long as it lives, and an Arc
    // keeps its OwnedFd, of which nobody has a mutable reference.
    let fd = unsafe { AsyncFd::register_with_interest(fd, interest) }?;
    Ok(fd)
}

/// Tells whether the peer of a socket has hung up, as far as its kernel has told ours.
pub(super) fn hang_up(socket: &impl AsFd) -> HangUp {
    let mut polled = [PollFd::new(socket, PollFlags::RDHUP)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    // An error is no proof: then sending finds out.
    let _ = rustix::event::poll(&mut polled, Some(&now));
    let events = polled[0].revents();
    if events.intersects(PollFlags::HUP | PollFlags::ERR) {
        HangUp::Full
    } else if events.contains(PollFlags::RDHUP) {
        HangUp::Half
    } else {
        HangUp::No
    }
}

/// What is known of a peer's leaving.
pub(super) enum HangUp {
    /// It is there.
    No,
    /// It sends no more.
    Half,
    /// It is gone.
    Full,
}

fn count(total: &Cell<u64>, moved: io::Result<Option<usize>>) -> io::Result<Option<usize>> {
    if let Ok(Some(n)) = moved {
        total.set(total.get() + n as u64);
    }
    moved
}

fn send_flags(more: bool) -> SendFlags {
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    if more { flags | SendFlags::MORE } else { flags }
}

fn would_block(mut call: impl FnMut() -> rustix::io::Result<usize>) -> io::Result<Option<usize>> {
    loop {
        return match call() {
            Ok(n) => Ok(Some(n)),
            Err(rustix::io::Errno::AGAIN) => Ok(None),
            Err(rustix::io::Errno::INTR) => continue,
            Err(error) => Err(error.into()),
        };
    }
}
