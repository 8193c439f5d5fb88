//! The options of the handshake, one file for each group, and the frame their replies share.

mod codes;
pub(crate) mod info;
pub(crate) mod list;
pub(crate) mod meta;
pub(crate) mod upgrade;

pub use codes::{InfoType, OptReply, OptionCode};

use bytes::BufMut;

use crate::chunk::ReplyStyle;
use crate::consts::{IHAVEOPT, OPTION_REPLY_HEADER_LEN, OPTION_REPLY_MAGIC};
use crate::error::{BadMagic, BadReply};
use crate::flags::ClientFlags;
use crate::wire::{Reader, bounded_text, len_u32};

/// What the options have settled so far. All of it but `client_flags` is forgotten when TLS starts.
#[derive(Default)]
pub(crate) struct Session {
    pub(crate) client_flags: ClientFlags,
    pub(crate) encrypted: bool,
    pub(crate) style: ReplyStyle,
    pub(crate) meta: Option<meta::Selection>,
}

/// Writes the replies to one option.
///
/// ```text
///   8 bytes  OPTION_REPLY_MAGIC
///   4        the option
///   4        reply type
///   4        length of the data
///   n        data
/// ```
pub(crate) struct Replies<'a> {
    option: OptionCode,
    out: &'a mut Vec<u8>,
}

impl<'a> Replies<'a> {
    pub(crate) fn new(option: OptionCode, out: &'a mut Vec<u8>) -> Self {
        Self { option, out }
    }

    /// One reply whose data `fill` appends.
    pub(crate) fn send(&mut self, kind: OptReply, fill: impl FnOnce(&mut Vec<u8>)) {
        self.out.put_u64(OPTION_REPLY_MAGIC);
        self.out.put_u32(self.option.wire());
        self.out.put_u32(kind.wire());
        self.out.extend_from_slice(&[0; 4]);
        let start = self.out.len();
        fill(self.out);
        let length = len_u32(&self.out[start..]);
        self.out[start - 4..start].copy_from_slice(&length.to_be_bytes());
    }

    /// `NBD_REP_ACK`, which ends the answer.
    pub(crate) fn ack(&mut self) {
        self.send(OptReply::Ack, |_| {});
    }

    /// An error, which ends the answer, with a text for a human.
    pub(crate) fn error(&mut self, kind: OptReply, text: &str) {
        self.send(kind, |out| out.extend_from_slice(bounded_text(text).as_bytes()));
    }

    /// `NBD_REP_ERR_UNKNOWN`. The name is quoted, so the text is bounded like every other (CVE-2020-10761).
    pub(crate) fn unknown_export(&mut self, name: &str) {
        self.error(OptReply::ErrUnknown, &format!("no export is called {name:?}"));
    }
}

/// Appends an option as a client sends it: [`IHAVEOPT`], the option, the length of the data, the data.
pub fn put_option(option: OptionCode, data: &[u8], out: &mut Vec<u8>) {
    out.put_u64(IHAVEOPT);
    out.put_u32(option.wire());
    out.put_u32(len_u32(data));
    out.extend_from_slice(data);
}

/// One reply to an option, as a client sees it. An option may have several; the last is [`OptReply::Ack`] or
/// an error.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct OptionReply<'a> {
    /// The option it answers.
    pub option: OptionCode,
    /// What it says.
    pub kind: OptReply,
    /// Data, as the kind demands; for an error, text for a human.
    pub data: &'a [u8],
}

impl<'a> OptionReply<'a> {
    /// Decodes the reply at the front of `buf`, with its length in bytes; `None` means that more bytes are
    /// needed.
    ///
    /// # Errors
    ///
    /// [`BadReply`] for a wrong magic, or more than `max_data` bytes of data.
    pub fn parse(buf: &'a [u8], max_data: u32) -> Result<Option<(Self, usize)>, BadReply> {
        let mut reader = Reader::new(buf);
        let Some(magic) = reader.u64() else {
            return Ok(None);
        };
        if magic != OPTION_REPLY_MAGIC {
            return Err(BadMagic { found: magic }.into());
        }
        let (Some(option), Some(kind), Some(length)) = (reader.u32(), reader.u32(), reader.u32()) else {
            return Ok(None);
        };
        if length > max_data {
            return Err(BadReply::TooLong { length: length.into(), max: max_data.into() });
        }
        let Some(data) = reader.bytes(length) else {
            return Ok(None);
        };
        let reply = Self { option: OptionCode::from_wire(option), kind: OptReply::from_wire(kind), data };
        Ok(Some((reply, OPTION_REPLY_HEADER_LEN + data.len())))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing::quick;

    #[test]
    fn a_reply_is_bounded_before_it_is_awaited() {
        let mut out = Vec::new();
        Replies::new(OptionCode::List, &mut out).send(OptReply::Server, |out| out.extend_from_slice(b"data"));
        let expected = OptionReply { option: OptionCode::List, kind: OptReply::Server, data: b"data" };
        assert_eq!(OptionReply::parse(&out, 4), Ok(Some((expected, 24))));
        let too_long = BadReply::TooLong { length: 4, max: 3 };
        assert_eq!(OptionReply::parse(&out[..20], 3), Err(too_long));
        assert_eq!(OptionReply::parse(&[0; 8], 4), Err(BadMagic { found: 0 }.into()));
    }

    proptest! {
        #![proptest_config(quick(0x5eed_0003))]

        #[test]
        fn frames_survive_decoding(option: u32, kind: u32, data: Vec<u8>) {
            let (option, kind) = (OptionCode::from_wire(option), OptReply::from_wire(kind));
            let mut out = Vec::new();
            Replies::new(option, &mut out).send(kind, |out| out.extend_from_slice(&data));
            for cut in 0..out.len() {
                prop_assert_eq!(OptionReply::parse(&out[..cut], 4096), Ok(None));
            }
            let expected = OptionReply { option, kind, data: &data };
            prop_assert_eq!(OptionReply::parse(&out, 4096), Ok(Some((expected, out.len()))));
        }

        #[test]
        fn numbers_survive_decoding(number: u32, small in 0..16_u32, high: bool) {
            for number in [number, small, if high { small | 1 << 31 } else { small }] {
                prop_assert_eq!(OptionCode::from_wire(number).wire(), number);
                prop_assert_eq!(OptReply::from_wire(number).wire(), number);
                prop_assert_eq!(OptReply::from_wire(number).is_error(), number >= 1 << 31);
                let short = u16::try_from(number & 0xffff).unwrap();
                prop_assert_eq!(InfoType::from_wire(short).wire(), short);
            }
        }
    }
}
