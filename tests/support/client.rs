//! A client in its transmission phase. It sends what it is told to, right or wrong; what comes back must keep the
//! rules: known cookies, the negotiated style, chunks that cover a read without gap or overlap.

use std::collections::HashMap;
use std::io::{ErrorKind, Read, Write};

use nbd_proto::{ChunkBody, Command, CommandFlags, NbdError, Reply, ReplyStyle, Request, TransmissionFlags};

use super::Stream;

pub(crate) const STYLES: [ReplyStyle; 3] = [ReplyStyle::Simple, ReplyStyle::Structured, ReplyStyle::Extended];
pub(crate) const NO_FLAGS: CommandFlags = CommandFlags::empty();

pub(crate) struct Client {
    pub(crate) stream: Stream,
    pub(crate) style: ReplyStyle,
    pub(crate) size: u64,
    pub(crate) flags: TransmissionFlags,
    incoming: Vec<u8>,
    /// Requests that are not answered yet, with what has come of their answers.
    asked: HashMap<u64, (Request, Answer)>,
    last_cookie: u64,
}

/// A whole answer.
#[derive(Debug, Default)]
pub(crate) struct Answer {
    pub(crate) cookie: u64,
    pub(crate) error: Option<NbdError>,
    /// Of a read; holes as zeroes.
    pub(crate) data: Vec<u8>,
    /// How the data came: offset, length, whether as a hole.
    pub(crate) pieces: Vec<(u64, u64, bool)>,
    /// Of block status: each length and its flags.
    pub(crate) extents: Vec<(u64, u64)>,
}

impl Client {
    pub(crate) fn new(
        stream: Stream,
        incoming: Vec<u8>,
        style: ReplyStyle,
        size: u64,
        flags: TransmissionFlags,
    ) -> Client {
        let last_cookie = 0x5eed_0000_0000_0000;
        Client { stream, style, size, flags, incoming, asked: HashMap::new(), last_cookie }
    }

    /// Notes a request whose bytes the caller sends, and gives those of its header.
    pub(crate) fn prepare(&mut self, request: Request) -> Vec<u8> {
        let mut bytes = Vec::new();
        request.encode(self.style.extended(), &mut bytes);
        let answer = Answer { cookie: request.cookie, ..Answer::default() };
        let before = self.asked.insert(request.cookie, (request, answer));
        assert!(before.is_none(), "a cookie twice");
        bytes
    }

    /// A request with a cookie of its own. A write with extended headers announces its payload.
    pub(crate) fn request(
        &mut self,
        command: Command,
        flags: CommandFlags,
        offset: u64,
        length: u64,
    ) -> Request {
        self.last_cookie += 1;
        let announced = self.style.extended() && command == Command::Write;
        let flags = if announced { flags | CommandFlags::PAYLOAD_LEN } else { flags };
        Request { flags, command, cookie: self.last_cookie, offset, length }
    }

    /// Sends a request, and gives its cookie.
    pub(crate) fn ask(&mut self, command: Command, flags: CommandFlags, offset: u64, length: u64) -> u64 {
        let request = self.request(command, flags, offset, length);
        self.post(request, &[])
    }

    /// Sends a write.
    pub(crate) fn ask_write(&mut self, flags: CommandFlags, offset: u64, data: &[u8]) -> u64 {
        let request = self.request(Command::Write, flags, offset, data.len() as u64);
        self.post(request, data)
    }

    pub(crate) fn post(&mut self, request: Request, payload: &[u8]) -> u64 {
        let mut bytes = self.prepare(request);
        bytes.extend_from_slice(payload);
        self.stream.write_all(&bytes).expect("the request is sent");
        request.cookie
    }

    /// Sends a request and takes its answer, which must be the next.
    pub(crate) fn call(&mut self, command: Command, flags: CommandFlags, offset: u64, length: u64) -> Answer {
        let cookie = self.ask(command, flags, offset, length);
        let answer = self.answer();
        assert_eq!(answer.cookie, cookie);
        answer
    }

    /// Sends a write and takes its answer.
    pub(crate) fn call_write(&mut self, flags: CommandFlags, offset: u64, data: &[u8]) -> Answer {
        let cookie = self.ask_write(flags, offset, data);
        let answer = self.answer();
        assert_eq!(answer.cookie, cookie);
        answer
    }

    /// Reads what must be readable.
    pub(crate) fn read(&mut self, offset: u64, length: u64) -> Vec<u8> {
        let answer = self.call(Command::Read, NO_FLAGS, offset, length);
        assert_eq!(answer.error, None);
        answer.data
    }

    /// Writes what must be writable.
    pub(crate) fn write(&mut self, offset: u64, data: &[u8]) {
        assert_eq!(self.call_write(NO_FLAGS, offset, data).error, None);
    }

    pub(crate) fn flush(&mut self) {
        assert_eq!(self.call(Command::Flush, NO_FLAGS, 0, 0).error, None);
    }

    /// Says goodbye.
    pub(crate) fn disconnect(&mut self) {
        let mut bytes = Vec::new();
        let request = self.request(Command::Disconnect, NO_FLAGS, 0, 0);
        request.encode(self.style.extended(), &mut bytes);
        self.stream.write_all(&bytes).unwrap();
    }

    /// The next answer that is complete.
    pub(crate) fn answer(&mut self) -> Answer {
        self.answer_or_end().expect("an answer, but the server hung up")
    }

    /// The next answer that is complete; None where the server hung up.
    pub(crate) fn answer_or_end(&mut self) -> Option<Answer> {
        loop {
            if let Some(answer) = self.take_message() {
                return Some(answer);
            }
            if !self.receive() {
                return None;
            }
        }
    }

    /// Whether a whole answer comes before the socket's limit is over: see [`Stream::limit`].
    pub(crate) fn has_answer(&mut self) -> bool {
        let mut buf = vec![0; 1 << 18];
        match self.stream.read(&mut buf) {
            Ok(n) => {
                self.incoming.extend_from_slice(&buf[..n]);
                n > 0
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => false,
            Err(error) => panic!("waiting for an answer: {error}"),
        }
    }

    /// Processes messages until one completes an answer, or more bytes are needed.
    fn take_message(&mut self) -> Option<Answer> {
        let mut used = 0;
        let mut complete = None;
        while complete.is_none() {
            let rest = &self.incoming[used..];
            // With some room for what a server may put around the largest read.
            let parsed = Reply::parse(rest, self.style, 33 << 20).expect("a reply of this style");
            let Some((reply, length)) = parsed else { break };
            let (request, answer) = self.asked.get_mut(&reply.cookie()).expect("a cookie that was sent");
            let after = answer.take(request, self.style, &reply, &rest[length..]);
            let Some(after) = after else { break };
            used += length + after;
            if reply.done() {
                let (request, answer) = self.asked.remove(&reply.cookie()).unwrap();
                answer.check(&request, self.style);
                complete = Some(answer);
            }
        }
        self.incoming.drain(..used);
        complete
    }

    fn receive(&mut self) -> bool {
        let start = self.incoming.len();
        self.incoming.resize(start + (1 << 18), 0);
        let received = self.stream.read(&mut self.incoming[start..]);
        let count = match received {
            Ok(count) => count,
            Err(error) if error.kind() == ErrorKind::ConnectionReset => 0,
            Err(error) => panic!("waiting for one of {} answers: {error}", self.asked.len()),
        };
        self.incoming.truncate(start + count);
        count > 0
    }
}

impl Answer {
    /// Takes in a message; `rest` are the bytes behind it. Gives how many of those belong to it, None where they
    /// have not all come.
    fn take(
        &mut self,
        request: &Request,
        style: ReplyStyle,
        reply: &Reply<'_>,
        rest: &[u8],
    ) -> Option<usize> {
        let is_read = request.command == Command::Read;
        let body = match reply {
            Reply::Simple { error, .. } => {
                assert!(style == ReplyStyle::Simple || !is_read, "a read is answered simply");
                self.error = *error;
                if !is_read || error.is_some() {
                    return Some(0);
                }
                let length = usize::try_from(request.length).unwrap();
                self.data = rest.get(..length)?.to_vec();
                return Some(length);
            }
            Reply::Chunk { flags, offset, body, .. } => {
                assert_eq!(flags & !1, 0, "unknown reply flags");
                assert_eq!(*offset, if style.extended() { request.offset } else { 0 });
                body
            }
        };
        match *body {
            ChunkBody::None => {}
            ChunkBody::Error { error, .. } | ChunkBody::ErrorOffset { error, .. } => self.error = Some(error),
            ChunkBody::OffsetData { offset, data } if is_read => {
                self.pieces.push((offset, data.len() as u64, false));
                self.place(request, offset, data.len()).copy_from_slice(data);
            }
            ChunkBody::OffsetHole { offset, length } if is_read => {
                self.pieces.push((offset, length.into(), true));
                self.place(request, offset, usize::try_from(length).unwrap());
            }
            ChunkBody::BlockStatus { extents, .. } if request.command == Command::BlockStatus => {
                assert!(self.extents.is_empty(), "a context twice");
                self.extents = extents.iter().collect();
            }
            ref other => panic!("{other:?} answers {request:?}"),
        }
        Some(0)
    }

    fn place(&mut self, request: &Request, offset: u64, length: usize) -> &mut [u8] {
        self.data.resize(usize::try_from(request.length).unwrap(), 0);
        let start = usize::try_from(offset.checked_sub(request.offset).expect("a chunk before the request"));
        let start = start.unwrap();
        self.data.get_mut(start..start + length).expect("a chunk behind the request")
    }

    /// The rules for whole answers.
    fn check(&self, request: &Request, style: ReplyStyle) {
        if self.error.is_some() {
            return;
        }
        if request.command == Command::Read && style != ReplyStyle::Simple {
            let mut pieces = self.pieces.clone();
            pieces.sort_unstable();
            let mut at = request.offset;
            for (offset, length, _) in pieces {
                assert_eq!(offset, at, "chunks leave a gap or overlap: {:?}", self.pieces);
                at += length;
            }
            assert_eq!(at, request.offset + request.length, "chunks end early: {:?}", self.pieces);
            let whole = request.flags.contains(CommandFlags::DF);
            assert!(!whole || self.pieces.len() <= 1, "DF, but {} chunks", self.pieces.len());
        }
        if request.command == Command::BlockStatus {
            assert!(!self.extents.is_empty(), "no extent");
            let lengths: Vec<u64> = self.extents.iter().map(|extent| extent.0).collect();
            assert!(lengths.iter().all(|length| *length > 0), "an empty extent");
            let all_but_last: u64 = lengths[..lengths.len() - 1].iter().sum();
            assert!(all_but_last < request.length, "an extent behind the request: {lengths:?}");
            if request.flags.contains(CommandFlags::REQ_ONE) {
                assert_eq!(lengths.len(), 1);
                assert!(lengths[0] <= request.length, "longer than asked: {lengths:?}");
            }
        }
    }
}
