//! Reads within a pass: into the arena, or from the file's own pages; what neither can do goes the slow way.

use std::io;
use std::time::Instant;

use bridge::zero::is_zero;
use bridge::{Charge, Data, Flags, RangeOrHole, Request};
use nbd_proto::{
    ChunkHeader, ChunkType, CommandFlags, REPLY_FLAG_DONE, ReplyStyle, Request as WireRequest,
    SIMPLE_REPLY_LEN, put_data_header, put_hole, simple_reply,
};

use super::arena::Arena;
use super::input::Stop;
use super::output::Sent;
use super::pass::Step;
use super::reader::Reader;
use super::slow::{self, OVERHEAD_BYTES, PIECE_BYTES, small_piece};
use super::translate;

/// Reads up to this many bytes are answered from the arena.
const INLINE_READ_BYTES: u64 = 128 << 10;

/// Reads from this many bytes on are sent from the file's own pages where that is possible.
const SEND_FILE_BYTES: u64 = 32 << 10;

impl Reader {
    /// Answers a read, or hands it to the slow path.
    pub(super) fn read(
        &mut self,
        wire: &WireRequest,
        request: Request,
        arena: &mut Arena,
        arrived: Instant,
    ) -> io::Result<Step> {
        let style = self.connection.style;
        let whole = style == ReplyStyle::Simple || wire.flags.contains(CommandFlags::DF);
        if request.len >= SEND_FILE_BYTES
            && let Some(step) = self.read_file(wire, request, whole, arena, arrived)?
        {
            return Ok(step);
        }
        let head = read_head_len(style);
        // No longer than the largest payload.
        let wire_len = u32::try_from(request.len).unwrap_or(u32::MAX);
        let len = usize::try_from(request.len).unwrap_or(usize::MAX);
        if request.len <= INLINE_READ_BYTES && self.room_for(head + len, arena)? {
            let Some(tail) = arena.tail(head + len) else { return Ok(Step::Stop(Stop::Full)) };
            let data = &mut tail[head..];
            match self.connection.export.try_execute(&request, Data::Into(&mut *data), arrived) {
                Some(Ok(())) if len == 0 => {
                    let (cookie, offset) = (wire.cookie, wire.offset);
                    arena.put_head(|out| put_data_header(style, cookie, offset, offset, 0, true, out));
                    arena.count_answer();
                }
                Some(Ok(())) => {
                    // The head of a hole is longer than that of data, by less than four bytes of data.
                    let hole = len >= 4 && style != ReplyStyle::Simple && !whole && is_zero(data);
                    let head = put_read_head(style, wire, hole, wire_len, tail);
                    arena.commit(if hole { head } else { head + len });
                    arena.count_answer();
                }
                Some(Err(error)) => {
                    tracing::debug!(cookie = wire.cookie, offset = wire.offset, %error, "read failed");
                    self.answer_error(
                        wire.cookie,
                        wire.offset,
                        translate::error(&error),
                        &error.to_string(),
                        arena,
                    );
                }
                None => return Ok(self.slow_read(wire, request, whole, arrived)),
            }
            return Ok(Step::Used(0));
        }
        Ok(self.slow_read(wire, request, whole, arrived))
    }

    fn slow_read(&mut self, wire: &WireRequest, request: Request, whole: bool, arrived: Instant) -> Step {
        let len = u32::try_from(request.len).unwrap_or(u32::MAX);
        let wanted = if whole { len } else { len.min(PIECE_BYTES) };
        let small = wanted.min(small_piece(&self.connection));
        let (charge, piece) = match self.permit(wanted + OVERHEAD_BYTES) {
            Some(charge) => (charge, wanted),
            None if whole && wanted > small => match self.permit(small + OVERHEAD_BYTES) {
                Some(charge) => {
                    slow::read_stream(self.owe(wire), request, small, charge, arrived);
                    return Step::Used(0);
                }
                None => return Step::Stop(Stop::Charge(small + OVERHEAD_BYTES)),
            },
            None => match self.permit(small + OVERHEAD_BYTES) {
                Some(charge) => (charge, small),
                None => return Step::Stop(Stop::Charge(small + OVERHEAD_BYTES)),
            },
        };
        slow::read(self.owe(wire), request, piece, whole, charge, arrived);
        Step::Used(0)
    }

    /// Answers a read from the file's own pages; None where that is not possible.
    fn read_file(
        &mut self,
        wire: &WireRequest,
        request: Request,
        whole: bool,
        arena: &mut Arena,
        arrived: Instant,
    ) -> io::Result<Option<Step>> {
        let connection = self.connection.clone();
        let (style, mut rest) = (connection.style, request);
        if whole {
            rest.flags |= Flags::WHOLE;
        }
        let end = request.offset + request.len;
        while let Some(range) = connection.export.try_file_range(&rest, arrived) {
            let (len, file) = match range {
                RangeOrHole::Hole(len) => (len, None),
                RangeOrHole::Range(range) => (range.len, Some(range)),
            };
            let last = rest.offset + len == end;
            // No longer than the largest payload.
            let chunk = u32::try_from(len).unwrap_or(u32::MAX);
            let (cookie, asked, offset) = (wire.cookie, wire.offset, rest.offset);
            match file {
                Some(range) => {
                    arena.put_head(|out| put_data_header(style, cookie, asked, offset, chunk, last, out));
                    connection.send_arena(arena, true, &mut self.arena_charge)?;
                    connection.push_file(range, last);
                    if connection.send_queue()? != Sent::All {
                        connection.wake_writer();
                    }
                }
                None => {
                    arena.put_head(|out| put_hole(style, cookie, asked, offset, chunk, last, out));
                    if last {
                        arena.count_answer();
                    } else {
                        connection.send_arena(arena, true, &mut self.arena_charge)?;
                    }
                }
            }
            if last {
                return Ok(Some(Step::Used(0)));
            }
            rest.offset += len;
            rest.len -= len;
            rest.flags |= Flags::CONTINUED;
        }
        if rest.offset == request.offset {
            return Ok(None);
        }
        // The first chunks are on their way, so that the rest is owed: it waits for its memory in its own task.
        connection.send_arena(arena, false, &mut self.arena_charge)?;
        slow::read(self.owe(wire), rest, 0, false, Charge::default(), arrived);
        Ok(Some(Step::Used(0)))
    }
}

/// The head of a read's data, at the front of `place`; for a hole, instead of the data.
#[inline]
fn put_read_head(style: ReplyStyle, wire: &WireRequest, hole: bool, len: u32, place: &mut [u8]) -> usize {
    if style == ReplyStyle::Simple {
        let head = simple_reply(wire.cookie, None);
        place[..head.len()].copy_from_slice(&head);
        return head.len();
    }
    let (kind, length) =
        if hole { (ChunkType::OffsetHole, 12) } else { (ChunkType::OffsetData, 8 + u64::from(len)) };
    let (cookie, offset) = (wire.cookie, wire.offset);
    let at = ChunkHeader { flags: REPLY_FLAG_DONE, kind, cookie, offset, length }.write(style, place);
    place[at..at + 8].copy_from_slice(&offset.to_be_bytes());
    if hole {
        place[at + 8..at + 12].copy_from_slice(&len.to_be_bytes());
        return at + 12;
    }
    at + 8
}

/// How long the head of a read's data is.
#[inline]
fn read_head_len(style: ReplyStyle) -> usize {
    match style {
        ReplyStyle::Simple => SIMPLE_REPLY_LEN,
        _ => ChunkHeader::len(style) + 8,
    }
}
