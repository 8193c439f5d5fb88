//! Requests of the transmission phase: the one message on every connection's hot path.

use bytes::{Buf, BufMut};

use crate::consts::{EXTENDED_REQUEST_MAGIC, REQUEST_MAGIC};
use crate::error::{BadMagic, NbdError};
use crate::flags::{CommandFlags, TransmissionFlags};

/// The command of a request (section "Request types").
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Command {
    /// `NBD_CMD_READ` (0).
    Read,
    /// `NBD_CMD_WRITE` (1); the data follows the request.
    Write,
    /// `NBD_CMD_DISC` (2); never answered.
    Disconnect,
    /// `NBD_CMD_FLUSH` (3).
    Flush,
    /// `NBD_CMD_TRIM` (4).
    Trim,
    /// `NBD_CMD_CACHE` (5).
    Cache,
    /// `NBD_CMD_WRITE_ZEROES` (6).
    WriteZeroes,
    /// `NBD_CMD_BLOCK_STATUS` (7).
    BlockStatus,
    /// `NBD_CMD_RESIZE` (8), of an experimental extension.
    Resize,
    /// Any other number; the answer is `NBD_EINVAL`.
    Unknown(u16),
}

impl Command {
    /// The command a number on the wire stands for.
    #[inline]
    pub const fn from_wire(number: u16) -> Self {
        match number {
            0 => Self::Read,
            1 => Self::Write,
            2 => Self::Disconnect,
            3 => Self::Flush,
            4 => Self::Trim,
            5 => Self::Cache,
            6 => Self::WriteZeroes,
            7 => Self::BlockStatus,
            8 => Self::Resize,
            other => Self::Unknown(other),
        }
    }

    /// The number on the wire.
    #[inline]
    pub const fn wire(self) -> u16 {
        match self {
            Self::Read => 0,
            Self::Write => 1,
            Self::Disconnect => 2,
            Self::Flush => 3,
            Self::Trim => 4,
            Self::Cache => 5,
            Self::WriteZeroes => 6,
            Self::BlockStatus => 7,
            Self::Resize => 8,
            Self::Unknown(other) => other,
        }
    }
}

/// A request header (section "Request message").
///
/// | bytes | compact | extended |
/// |---|---|---|
/// | 4 | [`REQUEST_MAGIC`] | [`EXTENDED_REQUEST_MAGIC`] |
/// | 2 | command flags | command flags |
/// | 2 | command | command |
/// | 8 | cookie | cookie |
/// | 8 | offset | offset |
/// | 4 or 8 | length | length |
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Request {
    /// Command flags, unknown bits included.
    pub flags: CommandFlags,
    /// What to do.
    pub command: Command,
    /// Opaque to the server, and echoed in every answer.
    pub cookie: u64,
    /// Where in the export, in bytes.
    pub offset: u64,
    /// How much of the export, in bytes; or, see [`Request::payload_len`], how much payload.
    pub length: u64,
}

impl Request {
    /// Length of a compact header, in bytes.
    pub const COMPACT_LEN: usize = 28;
    /// Length of an extended header, in bytes.
    pub const EXTENDED_LEN: usize = 32;

    /// Length of a header, in bytes.
    #[inline]
    pub const fn header_len(extended: bool) -> usize {
        if extended { Self::EXTENDED_LEN } else { Self::COMPACT_LEN }
    }

    /// Decodes the header at the front of `buf`; `None` means that more bytes are needed. The caller then
    /// advances by [`Request::header_len`].
    ///
    /// # Errors
    ///
    /// [`BadMagic`] as soon as the first four bytes are there and wrong: the connection must be dropped.
    #[inline]
    pub fn parse(buf: &[u8], extended: bool) -> Result<Option<Self>, BadMagic> {
        let expected = if extended { EXTENDED_REQUEST_MAGIC } else { REQUEST_MAGIC };
        let Ok(magic) = { buf }.try_get_u32() else {
            return Ok(None);
        };
        if magic != expected {
            return Err(BadMagic { found: u64::from(magic) });
        }
        // A length that is known lets the compiler drop the check of each field.
        let fields = if extended {
            buf.first_chunk::<{ Self::EXTENDED_LEN }>().map(|header| Self::fields(&header[4..], true))
        } else {
            buf.first_chunk::<{ Self::COMPACT_LEN }>().map(|header| Self::fields(&header[4..], false))
        };
        Ok(fields)
    }

    /// Reads what follows the magic; `rest` is long enough.
    #[inline]
    fn fields(mut rest: &[u8], extended: bool) -> Self {
        Self {
            flags: CommandFlags(rest.get_u16()),
            command: Command::from_wire(rest.get_u16()),
            cookie: rest.get_u64(),
            offset: rest.get_u64(),
            length: if extended { rest.get_u64() } else { u64::from(rest.get_u32()) },
        }
    }

    /// Bytes of payload that follow the header and must be consumed, whatever the answer will be.
    ///
    /// A write always has `length` of them: with extended headers the client must set
    /// `NBD_CMD_FLAG_PAYLOAD_LEN`, but one that forgets it sends the data all the same. With extended headers
    /// any other command has them exactly when it sets that flag, even one that has no use for a payload.
    #[inline]
    pub const fn payload_len(&self, extended: bool) -> u64 {
        let announced = extended && self.flags.contains(CommandFlags::PAYLOAD_LEN);
        if announced || matches!(self.command, Command::Write) { self.length } else { 0 }
    }

    /// Checks that the command is known and that every flag applies to it (section "Command flags").
    /// `granted` are the transmission flags the client was told.
    ///
    /// # Errors
    ///
    /// `NBD_EINVAL`, to be answered once the payload has been drained.
    #[inline]
    pub fn check_flags(&self, extended: bool, granted: TransmissionFlags) -> Result<(), NbdError> {
        let mut allowed = CommandFlags::empty();
        let mut allow_if = |flag: CommandFlags, condition: bool| {
            if condition {
                allowed |= flag;
            }
        };
        // Legal on every command, since clients are known to set it on all of them.
        allow_if(CommandFlags::FUA, granted.contains(TransmissionFlags::SEND_FUA));
        match self.command {
            Command::Read => allow_if(CommandFlags::DF, granted.contains(TransmissionFlags::SEND_DF)),
            Command::Write => allow_if(CommandFlags::PAYLOAD_LEN, extended),
            Command::WriteZeroes => {
                allow_if(CommandFlags::NO_HOLE, true);
                allow_if(CommandFlags::FAST_ZERO, granted.contains(TransmissionFlags::SEND_FAST_ZERO));
            }
            Command::BlockStatus => {
                allow_if(CommandFlags::REQ_ONE, true);
                let lists = extended && granted.contains(TransmissionFlags::BLOCK_STATUS_PAYLOAD);
                allow_if(CommandFlags::PAYLOAD_LEN, lists);
            }
            Command::Disconnect | Command::Flush | Command::Trim | Command::Cache => {}
            Command::Resize | Command::Unknown(_) => return Err(NbdError::Inval),
        }
        if self.flags.without(allowed).is_empty() { Ok(()) } else { Err(NbdError::Inval) }
    }

    /// Appends the header. A compact one cannot hold a length of 4 GiB or more; it is sent as `u32::MAX`, which
    /// a caller must avoid by splitting.
    #[inline]
    pub fn encode(&self, extended: bool, out: &mut Vec<u8>) {
        let magic = if extended { EXTENDED_REQUEST_MAGIC } else { REQUEST_MAGIC };
        out.put_u32(magic);
        out.put_u16(self.flags.0);
        out.put_u16(self.command.wire());
        out.put_u64(self.cookie);
        out.put_u64(self.offset);
        if extended {
            out.put_u64(self.length);
        } else {
            debug_assert!(self.length <= u64::from(u32::MAX), "a compact request is below 4 GiB");
            out.put_u32(u32::try_from(self.length).unwrap_or(u32::MAX));
        }
    }
}

#[cfg(test)]
mod tests;
