//! Reply chunk headers, structured and extended.

use bytes::BufMut;

use crate::consts::{EXTENDED_REPLY_MAGIC, REPLY_FLAG_DONE, STRUCTURED_REPLY_MAGIC};
use crate::error::BadMagic;
use crate::wire::Reader;

/// Which messages a server answers with; settled by the handshake and the same for the whole connection.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum ReplyStyle {
    /// Simple replies only: nothing was negotiated.
    #[default]
    Simple,
    /// `NBD_OPT_STRUCTURED_REPLY` was negotiated: compact requests, 20-byte chunk headers.
    Structured,
    /// `NBD_OPT_EXTENDED_HEADERS` was negotiated: extended requests, 32-byte chunk headers.
    Extended,
}

impl ReplyStyle {
    /// Whether requests have the extended, 32-byte header.
    #[inline]
    pub const fn extended(self) -> bool {
        matches!(self, Self::Extended)
    }
}

/// The type of a reply chunk (section "Structured reply types").
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum ChunkType {
    /// `NBD_REPLY_TYPE_NONE` (0): no payload, always the last chunk.
    None,
    /// `NBD_REPLY_TYPE_OFFSET_DATA` (1): an offset and data.
    OffsetData,
    /// `NBD_REPLY_TYPE_OFFSET_HOLE` (2): an offset and the length of a run of zeroes.
    OffsetHole,
    /// `NBD_REPLY_TYPE_BLOCK_STATUS` (5): a context and 32-bit extents.
    BlockStatus,
    /// `NBD_REPLY_TYPE_BLOCK_STATUS_EXT` (6): a context and 64-bit extents.
    BlockStatusExt,
    /// `NBD_REPLY_TYPE_ERROR` (2^15 + 1).
    Error,
    /// `NBD_REPLY_TYPE_ERROR_OFFSET` (2^15 + 2).
    ErrorOffset,
    /// Any other number.
    Unknown(u16),
}

impl ChunkType {
    /// The type a number on the wire stands for.
    #[inline]
    pub const fn from_wire(number: u16) -> Self {
        match number {
            0 => Self::None,
            1 => Self::OffsetData,
            2 => Self::OffsetHole,
            5 => Self::BlockStatus,
            6 => Self::BlockStatusExt,
            0x8001 => Self::Error,
            0x8002 => Self::ErrorOffset,
            other => Self::Unknown(other),
        }
    }

    /// The number on the wire.
    #[inline]
    pub const fn wire(self) -> u16 {
        match self {
            Self::None => 0,
            Self::OffsetData => 1,
            Self::OffsetHole => 2,
            Self::BlockStatus => 5,
            Self::BlockStatusExt => 6,
            Self::Error => 0x8001,
            Self::ErrorOffset => 0x8002,
            Self::Unknown(other) => other,
        }
    }

    /// Whether the chunk reports an error; true for unknown types with bit 15 set, too.
    #[inline]
    pub const fn is_error(self) -> bool {
        self.wire() & 0x8000 != 0
    }
}

/// The header of a reply chunk (section "Structured reply chunk message").
///
/// | bytes | structured | extended |
/// |---|---|---|
/// | 4 | [`STRUCTURED_REPLY_MAGIC`] | [`EXTENDED_REPLY_MAGIC`] |
/// | 2 | flags | flags |
/// | 2 | type | type |
/// | 8 | cookie | cookie |
/// | 8 | (absent) | offset of the request |
/// | 4 or 8 | payload length | payload length |
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct ChunkHeader {
    /// Reply flags; [`REPLY_FLAG_DONE`] is the only one defined.
    pub flags: u16,
    /// How to read the payload.
    pub kind: ChunkType,
    /// The cookie of the request.
    pub cookie: u64,
    /// The offset of the request, in bytes; not sent in a structured chunk.
    pub offset: u64,
    /// Length of the payload, in bytes.
    pub length: u64,
}

impl ChunkHeader {
    /// Length of a structured header, in bytes.
    pub const STRUCTURED_LEN: usize = 20;
    /// Length of an extended header, in bytes.
    pub const EXTENDED_LEN: usize = 32;

    /// Length of a header, in bytes. Simple replies have no chunks, hence 0.
    #[inline]
    pub const fn len(style: ReplyStyle) -> usize {
        match style {
            ReplyStyle::Simple => 0,
            ReplyStyle::Structured => Self::STRUCTURED_LEN,
            ReplyStyle::Extended => Self::EXTENDED_LEN,
        }
    }

    /// Whether this is the last chunk of its reply.
    #[inline]
    pub const fn done(&self) -> bool {
        self.flags & REPLY_FLAG_DONE != 0
    }

    /// Writes the header to the front of `out` and returns its length, [`ChunkHeader::len`].
    ///
    /// A structured header holds lengths below 4 GiB; a longer one is a mistake of the caller and is sent as
    /// `u32::MAX`.
    ///
    /// # Panics
    ///
    /// If `out` is shorter than the header.
    #[inline]
    pub fn write(&self, style: ReplyStyle, out: &mut [u8]) -> usize {
        match style {
            ReplyStyle::Simple => debug_assert!(false, "a simple reply has no chunks"),
            ReplyStyle::Structured => {
                out[..Self::STRUCTURED_LEN].copy_from_slice(&self.structured());
            }
            ReplyStyle::Extended => {
                out[..Self::EXTENDED_LEN].copy_from_slice(&self.extended());
            }
        }
        Self::len(style)
    }

    /// Appends the header to `out`; otherwise as [`ChunkHeader::write`].
    #[inline]
    pub fn put(&self, style: ReplyStyle, out: &mut Vec<u8>) {
        match style {
            ReplyStyle::Simple => debug_assert!(false, "a simple reply has no chunks"),
            ReplyStyle::Structured => out.extend_from_slice(&self.structured()),
            ReplyStyle::Extended => out.extend_from_slice(&self.extended()),
        }
    }

    #[inline]
    fn structured(&self) -> [u8; Self::STRUCTURED_LEN] {
        debug_assert!(self.length <= u64::from(u32::MAX), "a structured chunk is below 4 GiB");
        let mut header = [0; Self::STRUCTURED_LEN];
        let mut place = &mut header[..];
        place.put_u32(STRUCTURED_REPLY_MAGIC);
        place.put_u16(self.flags);
        place.put_u16(self.kind.wire());
        place.put_u64(self.cookie);
        place.put_u32(u32::try_from(self.length).unwrap_or(u32::MAX));
        header
    }

    #[inline]
    fn extended(&self) -> [u8; Self::EXTENDED_LEN] {
        let mut header = [0; Self::EXTENDED_LEN];
        let mut place = &mut header[..];
        place.put_u32(EXTENDED_REPLY_MAGIC);
        place.put_u16(self.flags);
        place.put_u16(self.kind.wire());
        place.put_u64(self.cookie);
        place.put_u64(self.offset);
        place.put_u64(self.length);
        header
    }

    /// Decodes the chunk header at the front of `buf`; `None` means that more bytes are needed.
    ///
    /// # Errors
    ///
    /// [`BadMagic`] for anything but a chunk of this style, and always for [`ReplyStyle::Simple`]. A client
    /// that may meet simple replies, too, uses [`ReplyHeader::parse`](crate::ReplyHeader::parse).
    pub fn parse(buf: &[u8], style: ReplyStyle) -> Result<Option<Self>, BadMagic> {
        let mut reader = Reader::new(buf);
        let Some(magic) = reader.u32() else {
            return Ok(None);
        };
        let wide = match (style, magic) {
            (ReplyStyle::Structured, STRUCTURED_REPLY_MAGIC) => false,
            (ReplyStyle::Extended, EXTENDED_REPLY_MAGIC) => true,
            _ => return Err(BadMagic { found: u64::from(magic) }),
        };
        Ok(Self::fields(reader, wide))
    }

    fn fields(mut reader: Reader<'_>, wide: bool) -> Option<Self> {
        Some(Self {
            flags: reader.u16()?,
            kind: ChunkType::from_wire(reader.u16()?),
            cookie: reader.u64()?,
            offset: if wide { reader.u64()? } else { 0 },
            length: if wide { reader.u64()? } else { u64::from(reader.u32()?) },
        })
    }
}
