//! The client's half of the handshake, one option at a time.

use std::io::{Read, Write};

use nbd_proto::{OptReply, OptionCode, OptionReply, ReplyStyle, TransmissionFlags, put_option};

use super::{Client, Stream};

/// Fixed newstyle and no padding: what every client of today sends.
const CLIENT_FLAGS: u32 = 3;

/// A connection in its handshake.
pub(crate) struct Negotiation {
    pub(crate) stream: Stream,
    incoming: Vec<u8>,
}

impl Negotiation {
    /// Takes the greeting and answers it.
    pub(crate) fn begin(stream: Stream) -> Negotiation {
        Negotiation::begin_with(stream, CLIENT_FLAGS)
    }

    pub(crate) fn begin_with(mut stream: Stream, flags: u32) -> Negotiation {
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting).expect("a greeting");
        assert_eq!(&greeting[..16], b"NBDMAGICIHAVEOPT");
        assert_eq!(greeting[16..], [0, 3], "fixed newstyle, no zeroes");
        stream.write_all(&flags.to_be_bytes()).unwrap();
        Negotiation { stream, incoming: Vec::new() }
    }

    /// Sends an option and takes its replies; the last is the acknowledgement or an error.
    pub(crate) fn option(&mut self, option: OptionCode, data: &[u8]) -> Vec<(OptReply, Vec<u8>)> {
        self.send(option, data);
        self.replies(option)
    }

    /// The last reply alone.
    pub(crate) fn verdict(&mut self, option: OptionCode, data: &[u8]) -> OptReply {
        self.option(option, data).pop().unwrap().0
    }

    pub(crate) fn send(&mut self, option: OptionCode, data: &[u8]) {
        let mut bytes = Vec::new();
        put_option(option, data, &mut bytes);
        self.stream.write_all(&bytes).unwrap();
    }

    pub(crate) fn replies(&mut self, option: OptionCode) -> Vec<(OptReply, Vec<u8>)> {
        let mut replies = Vec::new();
        loop {
            let (answered, kind, data) = self.reply().expect("a reply to the option");
            assert_eq!(answered, option);
            replies.push((kind, data));
            if kind == OptReply::Ack || kind.is_error() {
                return replies;
            }
        }
    }

    /// Like `verdict`; None where the server hung up.
    pub(crate) fn option_or_end(&mut self, option: OptionCode, data: &[u8]) -> Option<OptReply> {
        let mut bytes = Vec::new();
        put_option(option, data, &mut bytes);
        self.stream.write_all(&bytes).ok()?;
        loop {
            let kind = self.reply()?.1;
            if kind == OptReply::Ack || kind.is_error() {
                return Some(kind);
            }
        }
    }

    /// The next reply; None where the server hung up.
    pub(crate) fn reply(&mut self) -> Option<(OptionCode, OptReply, Vec<u8>)> {
        loop {
            // The longest thing the protocol allows is two strings.
            if let Some((reply, used)) = OptionReply::parse(&self.incoming, 3 * 4096).unwrap() {
                let reply = (reply.option, reply.kind, reply.data.to_vec());
                assert!(!reply.1.is_error() || reply.2.len() <= 4096, "an error text is too long");
                self.incoming.drain(..used);
                return Some(reply);
            }
            let mut buf = [0; 16384];
            match self.stream.read(&mut buf) {
                Ok(0) => return None,
                Ok(n) => self.incoming.extend_from_slice(&buf[..n]),
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return None,
                Err(error) => panic!("waiting for an option reply: {error}"),
            }
        }
    }

    /// Settles the reply style; whether replies are chunks now.
    pub(crate) fn settle(&mut self, style: ReplyStyle) -> bool {
        let option = match style {
            ReplyStyle::Simple => return false,
            ReplyStyle::Structured => OptionCode::StructuredReply,
            ReplyStyle::Extended => OptionCode::ExtendedHeaders,
        };
        assert_eq!(self.verdict(option, b""), OptReply::Ack);
        true
    }

    /// Selects `base:allocation`, and gives its id.
    pub(crate) fn select_allocation(&mut self, name: &str) -> u32 {
        let replies = self.option(OptionCode::SetMetaContext, &meta_data(name, &["base:allocation"]));
        assert_eq!(replies.len(), 2, "{replies:?}");
        let (kind, data) = &replies[0];
        assert_eq!((*kind, &data[4..]), (OptReply::MetaContext, &b"base:allocation"[..]));
        u32::from_be_bytes(data[..4].try_into().unwrap())
    }

    /// Into transmission: by EXPORT_NAME for simple replies, otherwise by GO.
    pub(crate) fn enter(mut self, style: ReplyStyle, name: &str) -> Client {
        if !self.settle(style) {
            return self.export_name(name);
        }
        self.select_allocation(name);
        self.go(style, name)
    }

    /// Enters an export that must be there; `style` is what was settled before.
    pub(crate) fn go(mut self, style: ReplyStyle, name: &str) -> Client {
        let replies = self.option(OptionCode::Go, &go_data(name, &[]));
        assert_eq!(replies.last().unwrap().0, OptReply::Ack, "{replies:?}");
        let (size, flags) = export_of(&replies);
        Client::new(self.stream, self.incoming, style, size, flags)
    }

    /// The old way in; the client flags asked for no padding.
    pub(crate) fn export_name(mut self, name: &str) -> Client {
        self.send(OptionCode::ExportName, name.as_bytes());
        let mut answer = [0; 10];
        self.stream.read_exact(&mut answer).expect("an export");
        let size = u64::from_be_bytes(answer[..8].try_into().unwrap());
        let flags = u16::from_be_bytes(answer[8..].try_into().unwrap());
        Client::new(self.stream, Vec::new(), ReplyStyle::Simple, size, TransmissionFlags(flags))
    }
}

/// Size and transmission flags out of the replies to INFO or GO.
pub(crate) fn export_of(replies: &[(OptReply, Vec<u8>)]) -> (u64, TransmissionFlags) {
    let data = replies.iter().find(|(kind, data)| *kind == OptReply::Info && data[..2] == [0, 0]);
    let data = &data.expect("NBD_INFO_EXPORT").1;
    assert_eq!(data.len(), 12);
    let size = u64::from_be_bytes(data[2..10].try_into().unwrap());
    (size, TransmissionFlags(u16::from_be_bytes(data[10..].try_into().unwrap())))
}

/// The data of INFO and GO.
pub(crate) fn go_data(name: &str, infos: &[u16]) -> Vec<u8> {
    let mut data = string(name);
    data.extend_from_slice(&u16::try_from(infos.len()).unwrap().to_be_bytes());
    infos.iter().for_each(|info| data.extend_from_slice(&info.to_be_bytes()));
    data
}

/// The data of LIST_META_CONTEXT and SET_META_CONTEXT.
pub(crate) fn meta_data(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut data = string(name);
    data.extend_from_slice(&u32::try_from(queries.len()).unwrap().to_be_bytes());
    queries.iter().for_each(|query| data.extend_from_slice(&string(query)));
    data
}

fn string(text: &str) -> Vec<u8> {
    let mut data = u32::try_from(text.len()).unwrap().to_be_bytes().to_vec();
    data.extend_from_slice(text.as_bytes());
    data
}
