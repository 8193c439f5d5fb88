//! The server's answers, parsed where they were received. Data is not copied: it is pointed at, and gone with
//! the next receive.

use std::io;
use std::ops::Range;

use anyhow::{Context, Result, bail};
use nbd_proto::{ChunkBody, ChunkHeader, ChunkType, NbdError, ReplyHeader, ReplyStyle};

use super::socket::Socket;

/// One receive. Holds a batch of small answers; larger than a core's cache it would cost more than it saves.
const BUFFER_BYTES: usize = 256 << 10;
/// The longest chunk without data: an error with an offset and its message.
const MAX_BODY: u64 = 4096 + 14;

/// What a part of an answer says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Event {
    /// Success or an error, and whether the answer ends with it.
    Answer { cookie: u64, error: Option<NbdError>, done: bool },
    /// Data of the export, found at [`Replies::bytes`].
    Piece { cookie: u64, offset: u64, range: Range<usize>, done: bool },
    /// Zeroes.
    Hole { cookie: u64, offset: u64, length: u32, done: bool },
}

/// The receiving half of a connection.
pub(super) struct Replies {
    style: ReplyStyle,
    buf: Box<[u8]>,
    /// What has been received and not been looked at.
    filled: Range<usize>,
    expect: Expect,
}

enum Expect {
    Header,
    /// The fixed part of a chunk.
    Body(ChunkHeader),
    Data {
        cookie: u64,
        offset: u64,
        left: u64,
        done: bool,
    },
}

impl Replies {
    pub(super) fn new(style: ReplyStyle) -> Self {
        Replies { style, buf: vec![0; BUFFER_BYTES].into(), filled: 0..0, expect: Expect::Header }
    }

    /// Whether the data of a read comes without a frame: see [`Replies::expect_data`].
    pub(super) fn are_simple(&self) -> bool {
        self.style == ReplyStyle::Simple
    }

    /// Receives once, as [`Socket::receive`]. To be called when [`Replies::next`] has no more.
    pub(super) fn receive(&mut self, socket: &Socket, wait: bool) -> io::Result<Option<usize>> {
        // A part of a header or of a short chunk.
        self.buf.copy_within(self.filled.clone(), 0);
        self.filled = 0..self.filled.len();
        let received = socket.receive(&mut self.buf[self.filled.end..], wait)?;
        self.filled.end += received.unwrap_or(0);
        Ok(received)
    }

    /// After the simple answer to a read: so much data follows.
    pub(super) fn expect_data(&mut self, cookie: u64, offset: u64, length: u32) {
        self.expect = Expect::Data { cookie, offset, left: length.into(), done: true };
    }

    /// The bytes of an [`Event::Piece`], until the next receive.
    pub(super) fn bytes(&self, range: Range<usize>) -> &[u8] {
        &self.buf[range]
    }

    /// What comes next; None when more must be received first.
    ///
    /// # Errors
    /// The server breaks the protocol.
    pub(super) fn next(&mut self) -> Result<Option<Event>> {
        loop {
            let bytes = &self.buf[self.filled.clone()];
            match self.expect {
                Expect::Header => {
                    let Some((header, used)) = ReplyHeader::parse(bytes, self.style).context("no reply")?
                    else {
                        return Ok(None);
                    };
                    self.filled.start += used;
                    match header {
                        ReplyHeader::Simple { cookie, error } => {
                            return Ok(Some(Event::Answer { cookie, error, done: true }));
                        }
                        ReplyHeader::Chunk(header) => self.expect = Expect::Body(check(header)?),
                    }
                }
                Expect::Body(ref header) if header.kind == ChunkType::OffsetData => {
                    let Some(offset) = bytes.first_chunk() else {
                        return Ok(None);
                    };
                    self.filled.start += offset.len();
                    self.expect = Expect::Data {
                        cookie: header.cookie,
                        offset: u64::from_be_bytes(*offset),
                        left: header.length - 8,
                        done: header.done(),
                    };
                }
                Expect::Body(ref header) => {
                    let length = usize::try_from(header.length).unwrap_or(usize::MAX);
                    let Some(payload) = bytes.get(..length) else {
                        return Ok(None);
                    };
                    let event = event(header, payload)?;
                    self.filled.start += length;
                    self.expect = Expect::Header;
                    return Ok(Some(event));
                }
                Expect::Data { cookie, ref mut offset, ref mut left, done } => {
                    let here = usize::try_from(*left).unwrap_or(usize::MAX).min(bytes.len());
                    if here == 0 {
                        return Ok(None);
                    }
                    let range = self.filled.start..self.filled.start + here;
                    let at = *offset;
                    self.filled.start = range.end;
                    *offset = offset.wrapping_add(here as u64);
                    *left -= here as u64;
                    let last = *left == 0;
                    if last {
                        self.expect = Expect::Header;
                    }
                    return Ok(Some(Event::Piece { cookie, offset: at, range, done: done && last }));
                }
            }
        }
    }
}

/// Refuses lengths that would be waited for in vain.
fn check(header: ChunkHeader) -> Result<ChunkHeader> {
    let fits = match header.kind {
        // No more than any request asks for; whether it is this one's is for others to see.
        ChunkType::OffsetData => {
            header.length > 8 && header.length - 8 <= nbd_proto::MAX_PAYLOAD_BYTES.into()
        }
        _ => header.length <= MAX_BODY,
    };
    if !fits {
        bail!("a chunk of type {:#x} with {} bytes makes no sense", header.kind.wire(), header.length);
    }
    Ok(header)
}

/// A chunk that is all there.
fn event(header: &ChunkHeader, payload: &[u8]) -> Result<Event> {
    let (cookie, done) = (header.cookie, header.done());
    Ok(match ChunkBody::parse(header, payload)? {
        ChunkBody::None => Event::Answer { cookie, error: None, done },
        ChunkBody::OffsetHole { offset, length } => Event::Hole { cookie, offset, length, done },
        ChunkBody::Error { error, .. } | ChunkBody::ErrorOffset { error, .. } => {
            Event::Answer { cookie, error: Some(error), done }
        }
        // An error of a later version of the protocol.
        ChunkBody::Unknown { .. } if header.kind.is_error() => {
            Event::Answer { cookie, error: Some(NbdError::Io), done }
        }
        ChunkBody::OffsetData { .. } | ChunkBody::BlockStatus { .. } | ChunkBody::Unknown { .. } => {
            bail!("a chunk of type {:#x} was not asked for", header.kind.wire())
        }
    })
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixStream;

    use super::*;
    use nbd_proto::{put_data_header, put_done, put_error, put_hole, simple_reply};

    /// Feeds `bytes` in pieces; every event, neighbouring pieces of data joined, and the data itself.
    fn play(style: ReplyStyle, bytes: &[u8], size: usize) -> Result<Vec<(Event, Vec<u8>)>> {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (ours, theirs) = (OwnedFd::from(ours), OwnedFd::from(theirs));
        let socket = Socket::new(ours).unwrap();
        let mut replies = Replies::new(style);
        let mut events: Vec<(Event, Vec<u8>)> = Vec::new();
        for piece in bytes.chunks(size) {
            rustix::io::write(&theirs, piece).unwrap();
            replies.receive(&socket, true).unwrap();
            while let Some(event) = replies.next()? {
                let Event::Piece { cookie, offset, range, done } = event.clone() else {
                    if let (Event::Answer { cookie: 7, error: None, .. }, true) =
                        (&event, replies.are_simple())
                    {
                        replies.expect_data(7, 4096, 600);
                    }
                    events.push((event, Vec::new()));
                    continue;
                };
                let data = replies.bytes(range).to_vec();
                match events.last_mut() {
                    Some((Event::Piece { offset: begin, done: end, .. }, joined))
                        if *begin + joined.len() as u64 == offset && !*end =>
                    {
                        *end = done;
                        joined.extend(data);
                    }
                    _ => events.push((Event::Piece { cookie, offset, range: 0..0, done }, data)),
                }
            }
        }
        Ok(events)
    }

    #[test]
    fn answers_in_any_cut() {
        let data: Vec<u8> = (0..600_u32).map(|n| n.to_le_bytes()[0]).collect();
        let ok = |cookie| (Event::Answer { cookie, error: None, done: true }, vec![]);
        let failed = |cookie, done| (Event::Answer { cookie, error: Some(NbdError::NoSpc), done }, vec![]);
        let piece = |done| (Event::Piece { cookie: 7, offset: 4096, range: 0..0, done }, data.clone());
        for style in [ReplyStyle::Structured, ReplyStyle::Extended] {
            let mut bytes = Vec::new();
            put_data_header(style, 7, 4096, 4096, 600, false, &mut bytes);
            bytes.extend(&data);
            put_hole(style, 7, 4096, 5000, 100, false, &mut bytes);
            put_done(style, 7, 4096, &mut bytes);
            put_error(style, 8, 0, NbdError::NoSpc, "full", &mut bytes);
            put_data_header(style, 7, 4096, 4096, 600, true, &mut bytes);
            bytes.extend(&data);
            let hole = (Event::Hole { cookie: 7, offset: 5000, length: 100, done: false }, vec![]);
            let expected = [piece(false), hole, ok(7), failed(8, true), piece(true)];
            for size in [1, 7, 64, bytes.len()] {
                assert_eq!(play(style, &bytes, size).unwrap(), expected);
            }
        }
        let bytes = [
            &simple_reply(7, None)[..],
            &data,
            &simple_reply(8, Some(NbdError::NoSpc)),
            &simple_reply(9, None),
        ]
        .concat();
        for size in [1, 7, bytes.len()] {
            let expected = [ok(7), piece(true), failed(8, true), ok(9)];
            assert_eq!(play(ReplyStyle::Simple, &bytes, size).unwrap(), expected);
        }
    }

    #[test]
    fn nonsense_is_refused() {
        let style = ReplyStyle::Extended;
        let chunk = |kind, length| {
            let mut bytes = Vec::new();
            ChunkHeader { flags: 1, kind, cookie: 1, offset: 0, length }.put(style, &mut bytes);
            bytes
        };
        for bytes in [
            b"not a reply".to_vec(),
            simple_reply(1, None).to_vec(),
            chunk(ChunkType::OffsetData, 8),
            chunk(ChunkType::OffsetData, u64::MAX),
            chunk(ChunkType::OffsetData, (32 << 20) + 9),
            chunk(ChunkType::Error, 5000),
            chunk(ChunkType::None, 1).into_iter().chain([0]).collect(),
            chunk(ChunkType::BlockStatusExt, 24).into_iter().chain([1; 24]).collect(),
            chunk(ChunkType::Unknown(77), 0),
        ] {
            assert!(play(style, &bytes, bytes.len()).is_err(), "{bytes:?}");
        }
    }
}
