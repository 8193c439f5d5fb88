//! Requests on their way to the socket: headers and payloads, gathered without copying the payloads.

use std::collections::VecDeque;
use std::io::{self, IoSlice};

use nbd_proto::Request;

use super::socket::Socket;

/// Pieces in one call; the kernel takes 1024.
const MAX_PIECES: usize = 256;

/// Bytes of headers after which those that have been sent are dropped.
const MAX_HEADERS: usize = 64 << 10;

/// What was asked and not yet sent.
pub(super) struct Output {
    extended: bool,
    /// The headers of everything that is in `pieces`.
    headers: Vec<u8>,
    pieces: VecDeque<Piece>,
    /// Bytes of the first piece that have been sent.
    sent: usize,
}

#[derive(Clone, Copy)]
enum Piece {
    /// From here to there in `headers`.
    Headers { start: usize, end: usize },
    /// This buffer.
    Payload(usize),
}

impl Output {
    pub(super) fn new(extended: bool) -> Self {
        Output { extended, headers: Vec::new(), pieces: VecDeque::new(), sent: 0 }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// Adds a request, and the number of the buffer that holds its payload.
    pub(super) fn push(&mut self, request: &Request, payload: Option<usize>) {
        if self.headers.len() > MAX_HEADERS {
            self.compact();
        }
        let start = self.headers.len();
        request.encode(self.extended, &mut self.headers);
        let end = self.headers.len();
        match self.pieces.back_mut() {
            // Headers without payload between them are one piece.
            Some(Piece::Headers { end: last, .. }) if *last == start => *last = end,
            _ => self.pieces.push_back(Piece::Headers { start, end }),
        }
        self.pieces.extend(payload.map(Piece::Payload));
    }

    /// Sends what there is room for.
    pub(super) fn send(&mut self, socket: &Socket, payloads: &[Box<[u8]>]) -> io::Result<()> {
        while !self.pieces.is_empty() {
            let mut slices = [IoSlice::new(&[]); MAX_PIECES];
            let mut count = 0;
            for (slice, piece) in slices.iter_mut().zip(&self.pieces) {
                let skip = if count == 0 { self.sent } else { 0 };
                *slice = IoSlice::new(&bytes_of(*piece, &self.headers, payloads)[skip..]);
                count += 1;
            }
            let Some(sent) = socket.send(&slices[..count])? else {
                return Ok(());
            };
            self.advance(sent, payloads);
        }
        self.headers.clear();
        Ok(())
    }

    /// Drops the headers that have been sent. With a server that is always behind there is never nothing left.
    fn compact(&mut self) {
        if let Some(Piece::Headers { start, .. }) = self.pieces.front_mut() {
            *start += std::mem::take(&mut self.sent);
        }
        let first = self.pieces.iter().find_map(|piece| match piece {
            Piece::Headers { start, .. } => Some(*start),
            Piece::Payload(_) => None,
        });
        let done = first.unwrap_or(self.headers.len());
        self.headers.drain(..done);
        for piece in &mut self.pieces {
            if let Piece::Headers { start, end } = piece {
                *start -= done;
                *end -= done;
            }
        }
    }

    /// Forgets what has been sent.
    fn advance(&mut self, sent: usize, payloads: &[Box<[u8]>]) {
        self.sent += sent;
        while let Some(piece) = self.pieces.front() {
            let len = bytes_of(*piece, &self.headers, payloads).len();
            if self.sent < len {
                return;
            }
            self.sent -= len;
            self.pieces.pop_front();
        }
    }
}

fn bytes_of<'a>(piece: Piece, headers: &'a [u8], payloads: &'a [Box<[u8]>]) -> &'a [u8] {
    match piece {
        Piece::Headers { start, end } => &headers[start..end],
        Piece::Payload(buffer) => &payloads[buffer],
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixStream;

    use super::*;
    use nbd_proto::{Command, CommandFlags};

    fn request(command: Command, cookie: u64) -> Request {
        Request { flags: CommandFlags::empty(), command, cookie, offset: 0, length: 100_000 }
    }

    #[test]
    fn a_slow_reader_gets_every_byte() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let socket = Socket::new(OwnedFd::from(ours)).unwrap();
        let payloads: Vec<Box<[u8]>> = (0..3).map(|n| vec![n; 100_000].into()).collect();
        let mut output = Output::new(false);
        let mut expected = Vec::new();
        for n in 0..600 {
            let write = n % 3 != 0;
            let request = request(if write { Command::Write } else { Command::Read }, n);
            let buffer = usize::try_from(n % 3).unwrap();
            output.push(&request, write.then_some(buffer));
            request.encode(false, &mut expected);
            expected.extend_from_slice(if write { &payloads[buffer] } else { &[] });
        }
        let theirs = Socket::new(OwnedFd::from(theirs)).unwrap();
        let (mut received, mut buf) = (Vec::new(), vec![0; 70_000]);
        output.compact();
        while received.len() < expected.len() {
            output.send(&socket, &payloads).unwrap();
            let n = theirs.receive(&mut buf, true).unwrap().expect("more bytes");
            received.extend_from_slice(&buf[..n]);
            output.compact();
        }
        assert!(received == expected && output.is_empty() && output.headers.is_empty());
    }
}
