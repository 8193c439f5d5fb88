//! What a connection keeps of its input between passes: unprocessed bytes, and a payload that is still arriving.

use std::rc::Rc;

use bridge::{Charge, Flags};
use bytes::{Buf, BytesMut};
use nbd_proto::NbdError;

use super::arena::{RECEIVE_BYTES, RECEIVE_CHARGE, SMALL_BYTES};
use super::connection::Connection;
use super::gather::Gather;
use super::slow::WriteJob;

/// Bytes to receive where a request like the last is expected, whose payload need not be copied.
const HEAD_WINDOW: usize = 512;

/// A payload whose request has been taken in, and whose bytes are still arriving.
pub(super) enum Payload {
    /// Nobody wants it; then the request is refused.
    Skip { left: u64, cookie: u64, offset: u64, error: NbdError },
    /// Stored piece by piece.
    Store { left: u64, offset: u64, flags: Flags, job: Rc<WriteJob> },
    /// Gathered into pieces of whole blocks, which may be longer than what a connection keeps of its input.
    Gather(Gather),
}

/// Why a pass ended.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Stop {
    /// All complete requests are processed: receive more.
    NeedMore,
    /// Too much is in flight, or waits for the socket.
    Full,
    /// This many bytes of memory are needed first.
    Charge(u32),
    /// Others should have their turn.
    Yield,
    /// The peer said goodbye.
    End,
}

/// The input side of a connection.
#[derive(Default)]
pub(super) struct Input {
    /// Unprocessed bytes.
    kept: BytesMut,
    /// Pays for the bytes kept beyond what the reserve covers.
    charge: Option<Charge>,
    /// The last receive filled its buffer: there is more than a small one holds.
    wants_more: bool,
    /// The next bytes are a request's head, and its payload is likely to be a large one.
    head_next: bool,
    /// A payload still arriving.
    pub(super) payload: Option<Payload>,
    /// A charge that was waited for on behalf of the request that comes first.
    pub(super) granted: Option<(u32, Charge)>,
}

impl Input {
    pub(super) fn new(first: BytesMut) -> Self {
        Input { kept: first, ..Input::default() }
    }

    /// Bytes kept from earlier passes.
    pub(super) fn unprocessed(&self) -> &[u8] {
        &self.kept
    }

    /// Whether the peer is in the middle of a request, so that it must go on sending.
    pub(super) fn is_midway(&self) -> bool {
        self.payload.is_some() || !self.kept.is_empty()
    }

    /// Whether more may be kept than the reserve covers.
    pub(super) fn is_charged(&self) -> bool {
        self.charge.is_some()
    }

    /// How many bytes the next pass may hold at once: many only where they are paid for.
    pub(super) fn window(&mut self, connection: &Connection) -> usize {
        if std::mem::take(&mut self.head_next) {
            return HEAD_WINDOW;
        }
        if self.wants_more && self.charge.is_none() {
            self.charge = connection.account.try_window(RECEIVE_CHARGE);
        }
        if self.charge.is_some() { RECEIVE_BYTES } else { SMALL_BYTES.max(self.unprocessed().len()) }
    }

    /// Has little received next, so that the payload behind it can be spliced.
    pub(super) fn expect_head(&mut self) {
        self.head_next = true;
    }

    /// Notes how a receive went: `received` of `room` bytes.
    pub(super) fn received(&mut self, received: usize, room: usize) {
        if received == room {
            self.wants_more = true;
        } else if received < SMALL_BYTES / 2 {
            self.wants_more = false;
        }
    }

    /// `bytes` were offered to a pass, which processed `used` of them; they begin with the kept ones.
    pub(super) fn keep_rest(&mut self, bytes: &[u8], used: usize) {
        self.kept.clear();
        self.kept.extend_from_slice(&bytes[used..]);
        self.settle();
    }

    /// A pass over the kept bytes themselves processed `used` of them.
    pub(super) fn skip(&mut self, used: usize) {
        self.kept.advance(used);
        self.settle();
    }

    /// Gives memory back that is needed no more.
    fn settle(&mut self) {
        if self.kept.len() > SMALL_BYTES {
            return;
        }
        // What was advanced over is no part of the capacity, but of the memory: a charge tells of it, too.
        if self.charge.take().is_some() || self.kept.capacity() > SMALL_BYTES {
            self.kept = BytesMut::from(&self.kept[..]);
        }
    }
}
