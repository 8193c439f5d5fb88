//! Encoders for replies. Each appends one whole message, or the part of it that precedes bulk data, to a
//! buffer; none allocates apart from growing that buffer.

use bytes::BufMut;

use crate::chunk::{ChunkHeader, ChunkType, ReplyStyle};
use crate::consts::{MAX_EXTENTS, REPLY_FLAG_DONE, SIMPLE_REPLY_LEN, SIMPLE_REPLY_MAGIC};
use crate::error::NbdError;
use crate::wire::bounded_text;

/// Longest extent put in a 32-bit descriptor: the largest multiple of every legal minimum block size (at most
/// 64 KiB) below 4 GiB, so that cutting there leaves the rest aligned.
const MAX_NARROW_EXTENT: u32 = u32::MAX - 0xffff;

/// A simple reply (section "Simple reply message"): magic, error, cookie. The data of a successful read
/// follows it.
#[inline]
pub fn simple_reply(cookie: u64, error: Option<NbdError>) -> [u8; SIMPLE_REPLY_LEN] {
    let mut reply = [0; SIMPLE_REPLY_LEN];
    let mut place = &mut reply[..];
    place.put_u32(SIMPLE_REPLY_MAGIC);
    place.put_u32(error.map_or(0, NbdError::wire));
    place.put_u64(cookie);
    reply
}

/// Success of a command other than READ that has nothing to hand over: an `NBD_REPLY_TYPE_NONE` chunk with extended
/// headers, else a simple reply. Structured replies allow one where there is no payload (section "Simple reply
/// message"), and it saves clients a receive: they take 16 bytes first, to see which of the two it is.
#[inline]
pub fn put_done(style: ReplyStyle, cookie: u64, request_offset: u64, out: &mut Vec<u8>) {
    if style.extended() {
        put_chunk(style, ChunkType::None, cookie, request_offset, 0, true, out);
    } else {
        out.extend_from_slice(&simple_reply(cookie, None));
    }
}

/// Failure, ending the reply: a simple reply, or an `NBD_REPLY_TYPE_ERROR` chunk with `message`.
///
/// The message is cut between characters at [`MAX_NAME_BYTES`](crate::MAX_NAME_BYTES) bytes; a simple reply
/// has no room for it at all.
#[inline]
pub fn put_error(
    style: ReplyStyle,
    cookie: u64,
    request_offset: u64,
    error: NbdError,
    message: &str,
    out: &mut Vec<u8>,
) {
    if style == ReplyStyle::Simple {
        out.extend_from_slice(&simple_reply(cookie, Some(error)));
    } else {
        put_error_chunk(style, cookie, request_offset, error, message, true, out);
    }
}

fn put_error_chunk(
    style: ReplyStyle,
    cookie: u64,
    request_offset: u64,
    error: NbdError,
    message: &str,
    done: bool,
    out: &mut Vec<u8>,
) {
    let message = bounded_text(message).as_bytes();
    let message_len = u16::try_from(message.len()).unwrap_or(u16::MAX);
    put_chunk(style, ChunkType::Error, cookie, request_offset, 6 + u64::from(message_len), done, out);
    out.put_u32(error.wire());
    out.put_u16(message_len);
    out.extend_from_slice(message);
}

/// What precedes `data_len` bytes of a successful read: an `NBD_REPLY_TYPE_OFFSET_DATA` chunk up to and with
/// its offset, or the simple reply, in which case the data must be the whole read. The caller sends the data.
///
/// `data_offset` is the place of the data in the export. No data chunk may be empty: with `data_len` 0 this puts an
/// `NBD_REPLY_TYPE_NONE` chunk if `done`, and otherwise nothing.
#[inline]
pub fn put_data_header(
    style: ReplyStyle,
    cookie: u64,
    request_offset: u64,
    data_offset: u64,
    data_len: u32,
    done: bool,
    out: &mut Vec<u8>,
) {
    if style == ReplyStyle::Simple {
        out.extend_from_slice(&simple_reply(cookie, None));
    } else if data_len == 0 {
        if done {
            put_chunk(style, ChunkType::None, cookie, request_offset, 0, true, out);
        }
    } else {
        let length = 8 + u64::from(data_len);
        put_chunk(style, ChunkType::OffsetData, cookie, request_offset, length, done, out);
        out.put_u64(data_offset);
    }
}

/// A run of zeroes in a read: an `NBD_REPLY_TYPE_OFFSET_HOLE` chunk.
///
/// Simple replies cannot say this: [`ReplyStyle::Simple`] gets the simple reply header, and the caller owes
/// `hole_len` zero bytes as data. `hole_len` 0 is treated as in [`put_data_header`].
#[inline]
pub fn put_hole(
    style: ReplyStyle,
    cookie: u64,
    request_offset: u64,
    hole_offset: u64,
    hole_len: u32,
    done: bool,
    out: &mut Vec<u8>,
) {
    if style == ReplyStyle::Simple || hole_len == 0 {
        put_data_header(style, cookie, request_offset, hole_offset, 0, done, out);
    } else {
        put_chunk(style, ChunkType::OffsetHole, cookie, request_offset, 12, done, out);
        out.put_u64(hole_offset);
        out.put_u32(hole_len);
    }
}

/// The extents of one context: an `NBD_REPLY_TYPE_BLOCK_STATUS` chunk, or with extended headers an
/// `NBD_REPLY_TYPE_BLOCK_STATUS_EXT` chunk. `extents` are (length in bytes, status flags), consecutive from
/// the offset of the request.
///
/// | bytes | `BLOCK_STATUS` | `BLOCK_STATUS_EXT` |
/// |---|---|---|
/// | 4 | context id | context id |
/// | 4 | (absent) | number of descriptors |
/// | then for each | 4 length, 4 flags | 8 length, 8 flags |
///
/// The answer may describe less than was asked, and this makes use of it: an extent too long for a 32-bit
/// descriptor is shortened and ends the chunk, so that what is sent stays consecutive; so do
/// [`MAX_EXTENTS`] descriptors. Empty extents are left out.
///
/// The protocol wants at least one extent. Without any, and for [`ReplyStyle::Simple`], which cannot carry
/// extents, an error is sent instead.
#[inline]
pub fn put_block_status(
    style: ReplyStyle,
    cookie: u64,
    request_offset: u64,
    context_id: u32,
    extents: &[(u64, u32)],
    done: bool,
    out: &mut Vec<u8>,
) {
    let start = out.len();
    let (kind, prefix, width) = match style {
        ReplyStyle::Simple => return put_error(style, cookie, request_offset, NbdError::Inval, "", out),
        ReplyStyle::Structured => (ChunkType::BlockStatus, 4, 8),
        ReplyStyle::Extended => (ChunkType::BlockStatusExt, 8, 16),
    };
    // How many are sent is known only after they are: the header is written twice.
    put_chunk(style, kind, cookie, request_offset, 0, done, out);
    out.put_u32(context_id);
    if style.extended() {
        out.put_u32(0);
    }
    let mut count = 0_u32;
    for &(length, flags) in extents.iter().filter(|extent| extent.0 != 0).take(MAX_EXTENTS) {
        count += 1;
        if style.extended() {
            out.put_u64(length);
            out.put_u64(u64::from(flags));
            continue;
        }
        let narrow = u32::try_from(length).ok();
        out.put_u32(narrow.unwrap_or(MAX_NARROW_EXTENT));
        out.put_u32(flags);
        if narrow.is_none() {
            break;
        }
    }
    if count == 0 {
        debug_assert!(false, "a block status needs an extent");
        out.truncate(start);
        return put_error_chunk(style, cookie, request_offset, NbdError::Io, "no extent", done, out);
    }
    let header = ChunkHeader {
        flags: if done { REPLY_FLAG_DONE } else { 0 },
        kind,
        cookie,
        offset: request_offset,
        length: prefix + u64::from(count) * width,
    };
    let end = header.write(style, &mut out[start..]);
    if style.extended() {
        (&mut out[start + end + 4..]).put_u32(count);
    }
}

#[inline]
fn put_chunk(
    style: ReplyStyle,
    kind: ChunkType,
    cookie: u64,
    request_offset: u64,
    length: u64,
    done: bool,
    out: &mut Vec<u8>,
) {
    let flags = if done { REPLY_FLAG_DONE } else { 0 };
    ChunkHeader { flags, kind, cookie, offset: request_offset, length }.put(style, out);
}

#[cfg(test)]
mod tests;
