//! Answers that wait for the socket: a queue of segments, each sent whole before the next begins.
//!
//! A stream is one answer in several segments that nothing may come between: while one is open, all else waits in
//! a second queue.

use std::collections::VecDeque;
use std::io::{self, IoSlice};

use bridge::{Buffer, Charge, FileRange};
use bytes::Bytes;

use super::socket::Socket;

/// Segments gathered into one send at most.
const GATHER: usize = 32;

/// Sent in one go at most, so that one connection does not hold its worker for long.
const TURN_BYTES: usize = 2 << 20;

/// What a segment carries behind its head.
pub(super) enum Body {
    None,
    Bytes(Bytes),
    Buffer(Buffer),
    File(FileRange),
}

impl Body {
    fn len(&self) -> usize {
        match self {
            Body::None => 0,
            Body::Bytes(bytes) => bytes.len(),
            Body::Buffer(buffer) => buffer.len(),
            Body::File(range) => usize::try_from(range.len).unwrap_or(usize::MAX),
        }
    }

    fn bytes(&self) -> &[u8] {
        match self {
            Body::Bytes(bytes) => bytes,
            Body::Buffer(buffer) => buffer,
            Body::None | Body::File(_) => &[],
        }
    }
}

/// Bytes that leave in one piece: a chunk, an answer, or several of them.
pub(super) struct Segment {
    /// Headers.
    pub(super) head: Bytes,
    /// Payload.
    pub(super) body: Body,
    /// How many requests are answered when the last byte is out.
    pub(super) answers: u32,
    /// The memory it holds, given back when it is out.
    pub(super) _charge: Charge,
}

/// How far sending came.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Sent {
    /// All is out.
    All,
    /// The socket took no more.
    Blocked,
    /// There is room for more, but others should have their turn.
    Paused,
}

/// The queue of one connection.
#[derive(Default)]
pub(super) struct Output {
    queue: VecDeque<Segment>,
    /// What waits for the open stream to end.
    behind_stream: VecDeque<Segment>,
    streaming: bool,
    /// Bytes of the first segment that are out already.
    sent: usize,
    /// Bytes in the queue that are held in memory, sent or not.
    held: usize,
    /// Bytes that were sent from here, ever.
    total: u64,
}

impl Output {
    /// Whether whoever sends now would come between nothing.
    pub(super) fn is_empty(&self) -> bool {
        self.queue.is_empty() && !self.streaming
    }

    /// Whether there is something to send.
    pub(super) fn has_next(&self) -> bool {
        !self.queue.is_empty()
    }

    /// Bytes of memory that wait here.
    pub(super) fn held_bytes(&self) -> usize {
        self.held
    }

    /// Bytes that were sent from here since the beginning.
    pub(super) fn sent_bytes(&self) -> u64 {
        self.total
    }

    pub(super) fn push(&mut self, segment: Segment) {
        self.held += held_by(&segment);
        if self.streaming { &mut self.behind_stream } else { &mut self.queue }.push_back(segment);
    }

    /// Queues a part of a stream, which the first part opens and the last one closes.
    pub(super) fn push_stream(&mut self, segment: Segment, last: bool) {
        self.held += held_by(&segment);
        self.queue.push_back(segment);
        self.streaming = !last;
        if last {
            self.queue.append(&mut self.behind_stream);
        }
    }

    /// Forgets everything; returns how many answers are lost with it.
    pub(super) fn clear(&mut self) -> u32 {
        self.sent = 0;
        self.held = 0;
        self.streaming = false;
        self.queue.append(&mut self.behind_stream);
        self.queue.drain(..).map(|segment| segment.answers).sum()
    }

    /// Sends as much as the socket takes. `answered` counts requests whose answer is out.
    pub(super) fn send(&mut self, socket: &Socket, answered: &mut u32) -> io::Result<Sent> {
        let mut turn = 0;
        while let Some(first) = self.queue.front() {
            if turn >= TURN_BYTES {
                return Ok(Sent::Paused);
            }
            let in_head = self.sent < first.head.len();
            let sent = match &first.body {
                Body::File(range) if !in_head => {
                    let done = self.sent - first.head.len();
                    let left = first.body.len() - done;
                    match socket.send_file(&range.file, range.offset + done as u64, left.min(TURN_BYTES))? {
                        Some(0) if left > 0 => return Err(shrunk()),
                        sent => sent,
                    }
                }
                _ => self.send_gathered(socket)?,
            };
            match sent {
                Some(sent) => {
                    turn += sent;
                    self.total += sent as u64;
                    self.advance(sent, answered);
                }
                None => return Ok(Sent::Blocked),
            }
        }
        Ok(Sent::All)
    }

    /// One send of all that comes before the first file.
    fn send_gathered(&self, socket: &Socket) -> io::Result<Option<usize>> {
        let mut slices = [IoSlice::new(&[]); 2 * GATHER];
        let (mut count, mut skip, mut more) = (0, self.sent, false);
        for segment in self.queue.iter().take(GATHER) {
            for part in [&segment.head[..], segment.body.bytes()] {
                let done = skip.min(part.len());
                skip -= done;
                if done < part.len() {
                    slices[count] = IoSlice::new(&part[done..]);
                    count += 1;
                }
            }
            if matches!(segment.body, Body::File(_)) {
                more = true;
                break;
            }
        }
        socket.send_gathered(&slices[..count], more)
    }

    fn advance(&mut self, mut sent: usize, answered: &mut u32) {
        while let Some(first) = self.queue.front() {
            let left = first.head.len() + first.body.len() - self.sent;
            if sent < left {
                self.sent += sent;
                return;
            }
            sent -= left;
            self.sent = 0;
            self.held -= held_by(first);
            *answered += first.answers;
            self.queue.pop_front();
        }
    }
}

fn held_by(segment: &Segment) -> usize {
    segment.head.len() + segment.body.bytes().len()
}

fn shrunk() -> io::Error {
    io::Error::other("the image became shorter while a read of it was being sent")
}
