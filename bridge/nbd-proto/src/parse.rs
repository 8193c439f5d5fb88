//! The client's side of replies: decoding what [`crate::put_done`] and its siblings encode.

use bytes::BufMut;

use crate::chunk::{ChunkHeader, ChunkType, ReplyStyle};
use crate::consts::{REPLY_FLAG_DONE, SIMPLE_REPLY_LEN, SIMPLE_REPLY_MAGIC};
use crate::error::{BadMagic, BadReply, NbdError};
use crate::reply::simple_reply;
use crate::wire::{Reader, parse_string};

/// The header of either kind of reply, for clients that read bulk data straight into place.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ReplyHeader {
    /// A simple reply; a successful read's data follows, as long as the request asked for.
    Simple {
        /// The cookie of the request.
        cookie: u64,
        /// `None` for success.
        error: Option<NbdError>,
    },
    /// A chunk; [`ChunkHeader::length`] bytes of payload follow.
    Chunk(ChunkHeader),
}

impl ReplyHeader {
    /// Decodes the header at the front of `buf`, with its length; `None` means that more bytes are needed.
    ///
    /// With structured replies a server may still answer simply where there is no payload; with extended
    /// headers it may not.
    ///
    /// # Errors
    ///
    /// [`BadMagic`] if no reply of this style begins so.
    pub fn parse(buf: &[u8], style: ReplyStyle) -> Result<Option<(Self, usize)>, BadMagic> {
        let mut reader = Reader::new(buf);
        let Some(magic) = reader.u32() else {
            return Ok(None);
        };
        if magic != SIMPLE_REPLY_MAGIC || style.extended() {
            let header = ChunkHeader::parse(buf, style)?;
            return Ok(header.map(|header| (Self::Chunk(header), ChunkHeader::len(style))));
        }
        let (Some(error), Some(cookie)) = (reader.u32(), reader.u64()) else {
            return Ok(None);
        };
        Ok(Some((Self::Simple { cookie, error: NbdError::from_wire(error) }, SIMPLE_REPLY_LEN)))
    }
}

/// One whole message from the server.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reply<'a> {
    /// A simple reply. The data of a read is not part of it, since only the request tells its length.
    Simple {
        /// The cookie of the request.
        cookie: u64,
        /// `None` for success.
        error: Option<NbdError>,
    },
    /// A chunk of a structured or extended reply.
    Chunk {
        /// Reply flags, unknown bits included.
        flags: u16,
        /// The cookie of the request.
        cookie: u64,
        /// The offset of the request; 0 in a structured chunk, which does not have it.
        offset: u64,
        /// The payload.
        body: ChunkBody<'a>,
    },
}

impl<'a> Reply<'a> {
    /// Decodes the message at the front of `buf`, with its length in bytes; `None` means that more bytes are
    /// needed. `max_payload` bounds the bytes of data or extents; the few bytes of a chunk's fixed fields and
    /// error messages are always accepted.
    ///
    /// # Errors
    ///
    /// [`BadReply`]: drop the connection.
    pub fn parse(
        buf: &'a [u8],
        style: ReplyStyle,
        max_payload: u32,
    ) -> Result<Option<(Self, usize)>, BadReply> {
        let Some((header, used)) = ReplyHeader::parse(buf, style)? else {
            return Ok(None);
        };
        let header = match header {
            ReplyHeader::Simple { cookie, error } => {
                return Ok(Some((Self::Simple { cookie, error }, used)));
            }
            ReplyHeader::Chunk(header) => header,
        };
        // The longest fixed part is an error with an offset and its message.
        let max = u64::from(max_payload).max(4096) + 14;
        let too_long = BadReply::TooLong { length: header.length, max };
        if header.length > max {
            return Err(too_long);
        }
        let length = u32::try_from(header.length).map_err(|_| too_long)?;
        let Some(payload) = Reader::new(&buf[used..]).bytes(length) else {
            return Ok(None);
        };
        let body = ChunkBody::parse(&header, payload)?;
        let reply = Self::Chunk { flags: header.flags, cookie: header.cookie, offset: header.offset, body };
        Ok(Some((reply, used + payload.len())))
    }

    /// Whether no further message answers the same request.
    pub fn done(&self) -> bool {
        match self {
            Self::Simple { .. } => true,
            Self::Chunk { flags, .. } => flags & REPLY_FLAG_DONE != 0,
        }
    }

    /// The cookie of the request.
    pub fn cookie(&self) -> u64 {
        match self {
            Self::Simple { cookie, .. } | Self::Chunk { cookie, .. } => *cookie,
        }
    }

    /// Appends the message. Fields of an error chunk that this crate does not know are not kept.
    pub fn encode(&self, style: ReplyStyle, out: &mut Vec<u8>) {
        match *self {
            Self::Simple { cookie, error } => out.extend_from_slice(&simple_reply(cookie, error)),
            Self::Chunk { flags, cookie, offset, body } => {
                let mut payload = Vec::new();
                body.encode(&mut payload);
                // `usize` is at most 64 bits on every target there is.
                let length = u64::try_from(payload.len()).unwrap_or(u64::MAX);
                ChunkHeader { flags, kind: body.kind(), cookie, offset, length }.put(style, out);
                out.extend_from_slice(&payload);
            }
        }
    }
}

/// The payload of a chunk, checked against its type.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ChunkBody<'a> {
    /// `NBD_REPLY_TYPE_NONE`.
    None,
    /// `NBD_REPLY_TYPE_OFFSET_DATA`.
    OffsetData {
        /// Where in the export, in bytes.
        offset: u64,
        /// At least one byte.
        data: &'a [u8],
    },
    /// `NBD_REPLY_TYPE_OFFSET_HOLE`.
    OffsetHole {
        /// Where in the export, in bytes.
        offset: u64,
        /// Length in bytes; not 0.
        length: u32,
    },
    /// `NBD_REPLY_TYPE_BLOCK_STATUS` or `NBD_REPLY_TYPE_BLOCK_STATUS_EXT`.
    BlockStatus {
        /// The id given by `NBD_OPT_SET_META_CONTEXT`.
        context_id: u32,
        /// At least one, none empty.
        extents: Extents<'a>,
    },
    /// `NBD_REPLY_TYPE_ERROR`.
    Error {
        /// What went wrong.
        error: NbdError,
        /// For a human; may be empty.
        message: &'a str,
    },
    /// `NBD_REPLY_TYPE_ERROR_OFFSET`.
    ErrorOffset {
        /// What went wrong.
        error: NbdError,
        /// For a human; may be empty.
        message: &'a str,
        /// Where in the export, in bytes.
        offset: u64,
    },
    /// A type this crate does not know. Unless [`ChunkType::is_error`], the connection must be dropped.
    Unknown {
        /// The type on the wire.
        kind: u16,
        /// The payload as it came.
        payload: &'a [u8],
    },
}

impl<'a> ChunkBody<'a> {
    /// Checks and decodes the whole payload of a chunk.
    ///
    /// # Errors
    ///
    /// [`BadReply::Malformed`] if it is not laid out as its type demands: drop the connection.
    pub fn parse(header: &ChunkHeader, payload: &'a [u8]) -> Result<Self, BadReply> {
        Self::fields(header, payload).ok_or(BadReply::Malformed { kind: header.kind.wire() })
    }

    fn fields(header: &ChunkHeader, payload: &'a [u8]) -> Option<Self> {
        let mut reader = Reader::new(payload);
        let body = match header.kind {
            ChunkType::None if header.done() => Self::None,
            ChunkType::None => return None,
            ChunkType::OffsetData => {
                let offset = reader.u64()?;
                let data = reader.rest();
                return (!data.is_empty()).then_some(Self::OffsetData { offset, data });
            }
            ChunkType::OffsetHole => {
                let (offset, length) = (reader.u64()?, reader.u32()?);
                if length == 0 {
                    return None;
                }
                Self::OffsetHole { offset, length }
            }
            ChunkType::BlockStatus => {
                let context_id = reader.u32()?;
                let extents = Extents::parse(reader.rest(), false)?;
                return Some(Self::BlockStatus { context_id, extents });
            }
            ChunkType::BlockStatusExt => {
                let (context_id, count) = (reader.u32()?, reader.u32()?);
                let extents = Extents::parse(reader.rest(), true)?;
                // 0 leaves the number of descriptors to the length.
                let agrees = count == 0 || usize::try_from(count).is_ok_and(|count| count == extents.len());
                return agrees.then_some(Self::BlockStatus { context_id, extents });
            }
            ChunkType::Error => {
                let (error, message) = error_fields(&mut reader)?;
                // Whatever follows belongs to a later version of the protocol.
                return Some(Self::Error { error, message });
            }
            ChunkType::ErrorOffset => {
                let (error, message) = error_fields(&mut reader)?;
                return Some(Self::ErrorOffset { error, message, offset: reader.u64()? });
            }
            ChunkType::Unknown(kind) => return Some(Self::Unknown { kind, payload }),
        };
        reader.rest().is_empty().then_some(body)
    }

    /// The chunk type that carries this payload.
    pub fn kind(&self) -> ChunkType {
        match self {
            Self::None => ChunkType::None,
            Self::OffsetData { .. } => ChunkType::OffsetData,
            Self::OffsetHole { .. } => ChunkType::OffsetHole,
            Self::BlockStatus { extents, .. } if extents.wide => ChunkType::BlockStatusExt,
            Self::BlockStatus { .. } => ChunkType::BlockStatus,
            Self::Error { .. } => ChunkType::Error,
            Self::ErrorOffset { .. } => ChunkType::ErrorOffset,
            Self::Unknown { kind, .. } => ChunkType::from_wire(*kind),
        }
    }

    fn encode(&self, out: &mut Vec<u8>) {
        match *self {
            Self::None => {}
            Self::OffsetData { offset, data } => {
                out.put_u64(offset);
                out.extend_from_slice(data);
            }
            Self::OffsetHole { offset, length } => {
                out.put_u64(offset);
                out.put_u32(length);
            }
            Self::BlockStatus { context_id, extents } => {
                out.put_u32(context_id);
                if extents.wide {
                    let count = u32::try_from(extents.len()).unwrap_or(0);
                    out.put_u32(count);
                }
                out.extend_from_slice(extents.raw);
            }
            Self::Error { error, message } => put_error_fields(error, message, out),
            Self::ErrorOffset { error, message, offset } => {
                put_error_fields(error, message, out);
                out.put_u64(offset);
            }
            Self::Unknown { payload, .. } => out.extend_from_slice(payload),
        }
    }
}

fn error_fields<'a>(reader: &mut Reader<'a>) -> Option<(NbdError, &'a str)> {
    // Zero is no error, and the protocol forbids it here.
    let error = NbdError::from_wire(reader.u32()?)?;
    let length = reader.u16()?;
    Some((error, parse_string(reader.bytes(u32::from(length))?)?))
}

fn put_error_fields(error: NbdError, message: &str, out: &mut Vec<u8>) {
    out.put_u32(error.wire());
    out.put_u16(u16::try_from(message.len()).unwrap_or(0));
    out.extend_from_slice(message.as_bytes());
}

/// The descriptors of a block status chunk, still as they came: decoding them allocates nothing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Extents<'a> {
    raw: &'a [u8],
    wide: bool,
}

impl<'a> Extents<'a> {
    fn parse(raw: &'a [u8], wide: bool) -> Option<Self> {
        let extents = Self { raw, wide };
        let whole = raw.len().is_multiple_of(extents.width());
        (whole && !raw.is_empty() && extents.iter().all(|(length, _)| length != 0)).then_some(extents)
    }

    fn width(&self) -> usize {
        if self.wide { 16 } else { 8 }
    }

    /// How many there are; at least one.
    #[allow(clippy::len_without_is_empty, reason = "never empty")]
    pub fn len(&self) -> usize {
        self.raw.len() / self.width()
    }

    /// Each extent's length in bytes and status flags.
    pub fn iter(&self) -> impl Iterator<Item = (u64, u64)> + use<'a> {
        let wide = self.wide;
        self.raw.chunks_exact(self.width()).map_while(move |descriptor| {
            let mut reader = Reader::new(descriptor);
            Some(if wide {
                (reader.u64()?, reader.u64()?)
            } else {
                (u64::from(reader.u32()?), u64::from(reader.u32()?))
            })
        })
    }
}
