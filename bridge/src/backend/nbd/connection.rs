//! The transmission phase of one connection: what is being sent, and how far the reply that arrives is understood.
//! Sending is in `send`, replies are in `receive`.

use std::collections::VecDeque;

use nbd_proto::{Command, Negotiated, ReplyStyle, Request};

use super::connect::Fresh;
use super::socket::Socket;
use super::translate::BASE_ALLOCATION;

/// Most bytes received at once, beside what goes straight into the buffer of a read.
const RECEIVE_BYTES: usize = 256 << 10;

/// The same while large reads are under way, whose data is to go where it belongs: what lies behind a header is copied.
const FEW_BYTES: usize = 4 << 10;

/// A connection, from its handshake to its loss.
pub(super) struct Connection {
    pub(super) socket: Socket,
    pub(super) style: ReplyStyle,
    /// The id of `base:allocation`, where the server has it.
    pub(super) context: Option<u32>,
    /// Requests that have left the queue and are not out, all of them. The first may be out in part.
    pub(super) sending: VecDeque<u64>,
    /// Bytes of the first one that are out.
    pub(super) sent: usize,
    /// Where headers are encoded.
    pub(super) heads: Vec<u8>,
    /// Requests whose answer is owed.
    pub(super) in_flight: u32,
    /// Reads among them of so many bytes that these are received where they belong.
    pub(super) large_reads: u32,
    /// Received bytes, of which those from `start` to `end` are not understood yet.
    pub(super) input: Box<[u8]>,
    pub(super) start: usize,
    pub(super) end: usize,
    pub(super) expect: Expect,
    /// The server has said that it is going away: it gets no more requests.
    pub(super) leaving: bool,
    /// It has answered a request.
    pub(super) answered: bool,
    pub(super) look: Look,
}

/// A guess whether one more look at the socket finds something, from how the last ones went. Replies that come one by
/// one are then gathered, instead of waking everybody for each.
#[derive(Default)]
pub(super) struct Look {
    eager: u8,
    declined: u8,
    /// A look is being taken.
    pub(super) taken: bool,
}

impl Look {
    /// Looks that may find nothing after one that found something.
    const EAGER: u8 = 4;
    /// One look in so many is taken in any case.
    const PROBE: u8 = 32;

    pub(super) fn is_worth_it(&mut self) -> bool {
        self.declined = if self.eager > 0 { 0 } else { (self.declined + 1) % Self::PROBE };
        self.eager > 0 || self.declined == 0
    }

    pub(super) fn found(&mut self, something: bool) {
        self.eager = if something { Self::EAGER } else { self.eager.saturating_sub(1) };
    }
}

/// What comes next.
#[derive(Clone, Copy, Debug)]
pub(super) enum Expect {
    /// A reply's header.
    Header,
    /// Bytes for the buffer of a read, from `at` on.
    Data { cookie: u64, at: usize, left: usize, last: bool },
    /// So many descriptors of a block status chunk; `wide` ones have 64 bits.
    Status { cookie: u64, left: u64, wide: bool, last: bool },
}

impl Connection {
    pub(super) fn new(fresh: Fresh) -> std::io::Result<Self> {
        let Fresh { fd, negotiated, early } = fresh;
        let mut input = vec![0; RECEIVE_BYTES.max(early.len())].into_boxed_slice();
        input[..early.len()].copy_from_slice(&early);
        Ok(Connection {
            socket: Socket::new(fd)?,
            style: negotiated.style,
            context: context(&negotiated),
            sending: VecDeque::new(),
            sent: 0,
            heads: Vec::new(),
            in_flight: 0,
            large_reads: 0,
            input,
            start: 0,
            end: early.len(),
            expect: Expect::Header,
            leaving: false,
            answered: false,
            look: Look::default(),
        })
    }

    /// How far the input is to be filled at once.
    pub(super) fn input_limit(&self) -> usize {
        if self.large_reads > 0 { (self.end + FEW_BYTES).min(self.input.len()) } else { self.input.len() }
    }

    /// Says goodbye, unless that would come in the middle of a request.
    pub(super) fn say_goodbye(&mut self) {
        if self.sent == 0 {
            self.heads.clear();
            let (flags, command) = (nbd_proto::CommandFlags::empty(), Command::Disconnect);
            Request { flags, command, cookie: 0, offset: 0, length: 0 }
                .encode(self.style.extended(), &mut self.heads);
            self.socket.send_goodbye(&self.heads);
        }
    }
}

fn context(negotiated: &Negotiated) -> Option<u32> {
    negotiated.contexts.iter().find(|context| context.name == BASE_ALLOCATION).map(|context| context.id)
}
