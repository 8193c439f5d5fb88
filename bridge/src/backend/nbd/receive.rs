//! Understanding replies: in the place where they were received, and with nothing taken on trust. Data goes to the
//! buffer of its read at once; of what a server may send in any length, nothing is kept but what was asked for.

use std::io::IoSliceMut;
use std::task::{Context, Poll, Waker};

use nbd_proto::{ChunkBody, ChunkHeader, ChunkType, Command, MAX_EXTENTS, NbdError, ReplyHeader, ReplyStyle};

use super::connection::{Connection, Expect};
use super::slots::{Data, Outcome, Slot, Slots};
use super::translate;
use crate::Error;
use crate::extent::push_extent;

/// Data of at least so many bytes is received straight into its buffer.
pub(super) const DIRECT_BYTES: usize = 16 << 10;

/// Longest payload of an error chunk: a number, a text with its length, an offset; and some room for what a later
/// version may add.
const MAX_ERROR_BYTES: u64 = 4096 + 14 + 64;

/// Most of a server's text that is passed on.
const MAX_TEXT_CHARS: usize = 200;

/// The connection is lost; the words say why.
type Broken = String;

impl Connection {
    /// Receives what is there and understands it; whether there was anything.
    pub(super) fn receive(
        &mut self,
        cx: &mut Context<'_>,
        slots: &mut Slots,
        woken: &mut Vec<Waker>,
    ) -> Result<bool, Broken> {
        if self.start > 0 {
            self.input.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        let direct: &mut [u8] = match self.expect {
            Expect::Data { cookie, at, left, .. } if left >= DIRECT_BYTES && self.end == 0 => {
                match slots.get_mut(cookie).map(|slot| &mut slot.data) {
                    Some(Data::Read(buffer)) => &mut buffer[at..at + left],
                    _ => &mut [],
                }
            }
            _ => &mut [],
        };
        let straight = direct.len();
        let limit = self.input_limit();
        let mut places = [IoSliceMut::new(direct), IoSliceMut::new(&mut self.input[self.end..limit])];
        let look = self.in_flight > 1 && self.look.is_worth_it();
        let looked = std::mem::replace(&mut self.look.taken, look);
        let polled = self.socket.poll_receive(cx, &mut places, look);
        if looked {
            self.look.found(polled.is_ready());
        }
        let received = match polled {
            Poll::Pending => {
                self.look.taken = false;
                return Ok(false);
            }
            Poll::Ready(Ok(0)) => return Err("the server closed the connection".into()),
            Poll::Ready(Ok(received)) => received,
            Poll::Ready(Err(error)) => return Err(format!("receiving failed: {error}")),
        };
        if straight > 0 {
            self.filled(received.min(straight), slots, woken)?;
        }
        self.end += received.saturating_sub(straight);
        self.understand(slots, woken)?;
        Ok(true)
    }

    /// Goes through the received bytes as far as they are complete.
    pub(super) fn understand(&mut self, slots: &mut Slots, woken: &mut Vec<Waker>) -> Result<(), Broken> {
        let input = std::mem::take(&mut self.input);
        let mut result = Ok(true);
        while let Ok(true) = result {
            result = self.step(&input[self.start..self.end], slots, woken);
        }
        self.input = input;
        result.map(drop)
    }

    /// One header or part of a payload. False where more bytes are needed.
    fn step(&mut self, bytes: &[u8], slots: &mut Slots, woken: &mut Vec<Waker>) -> Result<bool, Broken> {
        match self.expect {
            Expect::Data { cookie, at, left, .. } => {
                let part = &bytes[..left.min(bytes.len())];
                if let Some(Data::Read(buffer)) = slots.get_mut(cookie).map(|slot| &mut slot.data) {
                    buffer[at..at + part.len()].copy_from_slice(part);
                }
                self.start += part.len();
                self.filled(part.len(), slots, woken)?;
                Ok(!part.is_empty())
            }
            Expect::Status { .. } => self.status(bytes, slots, woken),
            Expect::Header => {
                let header = ReplyHeader::parse(bytes, self.style);
                let Some((header, used)) =
                    header.map_err(|error| format!("the server sent garbage: {error}"))?
                else {
                    return Ok(false);
                };
                let payload = match header {
                    ReplyHeader::Simple { cookie, error } => {
                        self.simple(cookie, error, slots, woken)?;
                        Some(0)
                    }
                    ReplyHeader::Chunk(header) => self.chunk(&header, &bytes[used..], slots, woken)?,
                };
                self.start += payload.map_or(0, |payload| used + payload);
                Ok(payload.is_some())
            }
        }
    }

    /// So many bytes of a read have come to their place.
    fn filled(&mut self, n: usize, slots: &mut Slots, woken: &mut Vec<Waker>) -> Result<(), Broken> {
        let Expect::Data { cookie, at, left, last } = self.expect else { return Ok(()) };
        if n < left {
            self.expect = Expect::Data { cookie, at: at + n, left: left - n, last };
            return Ok(());
        }
        self.expect = Expect::Header;
        if last { self.finish(cookie, slots, woken) } else { Ok(()) }
    }

    fn simple(
        &mut self,
        cookie: u64,
        error: Option<NbdError>,
        slots: &mut Slots,
        woken: &mut Vec<Waker>,
    ) -> Result<(), Broken> {
        let slot = find(slots, cookie)?;
        match (error, slot.ask.command) {
            (Some(error), _) => slot.error = Some(translate::error(error)),
            (None, Command::Read) if self.style == ReplyStyle::Simple => {
                let len = slot.read_len();
                if !slot.covered.add(0, len) {
                    return Err(twice());
                }
                self.expect = Expect::Data { cookie, at: 0, left: len, last: true };
                return Ok(());
            }
            (None, _) => {}
        }
        self.finish(cookie, slots, woken)
    }

    /// The fixed part of a chunk's payload; gives its length, or None where it is not there yet.
    fn chunk(
        &mut self,
        header: &ChunkHeader,
        bytes: &[u8],
        slots: &mut Slots,
        woken: &mut Vec<Waker>,
    ) -> Result<Option<usize>, Broken> {
        let cookie = header.cookie;
        let slot = find(slots, cookie)?;
        let command = slot.ask.command;
        match header.kind {
            ChunkType::OffsetData if command == Command::Read => {
                let Some(offset) = be64(bytes, 0) else { return Ok(None) };
                let len = header.length.checked_sub(8).filter(|len| *len > 0);
                let place = len.and_then(|len| slot.place(offset, len)).ok_or_else(outside)?;
                if !slot.covered.add(place.start, place.len()) {
                    return Err(twice());
                }
                let (at, left, last) = (place.start, place.len(), header.done());
                self.expect = Expect::Data { cookie, at, left, last };
                return Ok(Some(8));
            }
            ChunkType::OffsetHole if command == Command::Read && header.length == 12 => {
                let (Some(offset), Some(len)) = (be64(bytes, 0), be32(bytes, 8)) else { return Ok(None) };
                let place = slot.place(offset, len.into()).filter(|place| !place.is_empty());
                let place = place.ok_or_else(outside)?;
                if !slot.covered.add(place.start, place.len()) {
                    return Err(twice());
                }
                if let Data::Read(buffer) = &mut slot.data {
                    buffer[place].fill(0);
                }
            }
            ChunkType::BlockStatus | ChunkType::BlockStatusExt if command == Command::BlockStatus => {
                let wide = header.kind == ChunkType::BlockStatusExt;
                let (fixed, width): (usize, u64) = if wide { (8, 16) } else { (4, 8) };
                if bytes.len() < fixed {
                    return Ok(None);
                }
                let list = header.length.saturating_sub(fixed as u64);
                let told = matches!(&slot.data, Data::Status(extents) if !extents.is_empty());
                if list == 0
                    || !list.is_multiple_of(width)
                    || list / width > MAX_EXTENTS as u64
                    || wide != self.style.extended()
                    || be32(bytes, 0) != self.context
                    || told
                {
                    return Err("the server sent a malformed block status".into());
                }
                self.expect = Expect::Status { cookie, left: list / width, wide, last: header.done() };
                return Ok(Some(fixed));
            }
            ChunkType::None if header.length == 0 && header.done() => {}
            kind if kind.is_error() && header.length <= MAX_ERROR_BYTES => {
                // It is short, and so fits the input's buffer.
                let len = usize::try_from(header.length).unwrap_or(usize::MAX);
                let Some(payload) = bytes.get(..len) else { return Ok(None) };
                let body = ChunkBody::parse(header, payload)
                    .map_err(|error| format!("the server sent a {error}"))?;
                slot.error.get_or_insert(failure(&body));
                if header.done() {
                    self.finish(cookie, slots, woken)?;
                }
                return Ok(Some(len));
            }
            kind => {
                let len = header.length;
                return Err(format!("the server answered {command:?} with a chunk {kind:?} of {len} bytes"));
            }
        }
        if header.done() {
            self.finish(cookie, slots, woken)?;
        }
        // None of those that come here has a longer one.
        Ok(Some(usize::try_from(header.length).unwrap_or_default()))
    }

    /// Descriptors of block status, as many as are there. What goes beyond a sensible list is not kept.
    fn status(&mut self, bytes: &[u8], slots: &mut Slots, woken: &mut Vec<Waker>) -> Result<bool, Broken> {
        let Expect::Status { cookie, mut left, wide, last } = self.expect else { return Ok(false) };
        let width = if wide { 16 } else { 8 };
        let slot = find(slots, cookie)?;
        let most = slot.ask.len;
        let Data::Status(extents) = &mut slot.data else { return Ok(false) };
        let mut covered: u64 = extents.iter().map(|extent| extent.len).sum();
        let mut used = 0;
        for descriptor in bytes.chunks_exact(width) {
            if left == 0 {
                break;
            }
            let fields = if wide {
                be64(descriptor, 0).zip(be64(descriptor, 8))
            } else {
                be32(descriptor, 0).zip(be32(descriptor, 4)).map(|(len, state)| (len.into(), state.into()))
            };
            let Some((len, state)) = fields.filter(|(len, _)| *len > 0) else {
                return Err("the server sent an empty extent".into());
            };
            // The last one may be longer than what was asked about.
            let len = len.min(most - covered);
            if extents.len() < crate::extent::MAX_EXTENTS {
                push_extent(extents, len, translate::allocation(state));
                covered += len;
            }
            left -= 1;
            used += width;
        }
        self.start += used;
        self.expect = Expect::Status { cookie, left, wide, last };
        if left > 0 {
            return Ok(used > 0);
        }
        self.expect = Expect::Header;
        if last {
            self.finish(cookie, slots, woken)?;
        }
        Ok(true)
    }

    /// The last of a reply has come.
    fn finish(&mut self, cookie: u64, slots: &mut Slots, woken: &mut Vec<Waker>) -> Result<(), Broken> {
        let slot = find(slots, cookie)?;
        let outcome = match slot.error.take() {
            Some(error) if error.kind() == crate::ErrorKind::ShuttingDown => {
                self.leaving = true;
                Outcome::Lost
            }
            Some(error) => Outcome::Answered(Err(error)),
            None => {
                let whole = match &slot.data {
                    Data::Read(buffer) => slot.covered.is_whole(buffer.len()),
                    Data::Status(extents) => !extents.is_empty(),
                    Data::None | Data::Write(_) => true,
                };
                if !whole {
                    return Err(format!(
                        "the server answered {:?} without all of its data",
                        slot.ask.command
                    ));
                }
                Outcome::Answered(Ok(()))
            }
        };
        self.large_reads -= u32::from(slot.ask.is_large_read());
        self.in_flight -= 1;
        self.answered = true;
        slots.end(cookie, outcome, woken);
        Ok(())
    }
}

impl Slot {
    fn read_len(&self) -> usize {
        match &self.data {
            Data::Read(buffer) => buffer.len(),
            _ => 0,
        }
    }

    /// Where a chunk's bytes belong in the buffer of a read; None where they do not.
    fn place(&self, offset: u64, len: u64) -> Option<std::ops::Range<usize>> {
        let start = usize::try_from(offset.checked_sub(self.ask.offset)?).ok()?;
        let end = start.checked_add(usize::try_from(len).ok()?)?;
        (end <= self.read_len()).then_some(start..end)
    }
}

fn find(slots: &mut Slots, cookie: u64) -> Result<&mut Slot, Broken> {
    match slots.get_mut(cookie) {
        Some(slot) if matches!(slot.stage, super::slots::Stage::Sent) => Ok(slot),
        _ => Err(format!("the server answered a request that was not made (cookie {cookie:#x})")),
    }
}

fn failure(body: &ChunkBody<'_>) -> Error {
    let (ChunkBody::Error { error, message } | ChunkBody::ErrorOffset { error, message, .. }) = body else {
        return Error::new(crate::ErrorKind::Io, "the server answered with an error of an unknown type");
    };
    let plain = translate::error(*error);
    if message.is_empty() {
        return plain;
    }
    let text: String =
        message.chars().take(MAX_TEXT_CHARS).map(|c| if c.is_control() { ' ' } else { c }).collect();
    Error::new(plain.kind(), format!("{}: {text}", plain.context()))
}

fn outside() -> Broken {
    "the server sent data outside of what was asked for".into()
}

fn twice() -> Broken {
    "the server sent the same bytes of a read twice, or in too many pieces".into()
}

fn be64(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..)?.first_chunk().map(|field| u64::from_be_bytes(*field))
}

fn be32(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().map(|field| u32::from_be_bytes(*field))
}
