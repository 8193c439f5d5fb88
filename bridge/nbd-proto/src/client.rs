//! The client side of the negotiation: fixed newstyle, and the bare newstyle before it.
//!
//! ```text
//!   Greeting --> [StartTls] --> [ExtendedHeaders] -> [StructuredReply]      refused: the next best
//!                                        |
//!       Transmission: [SetMetaContext] -> Go -> (unknown: ExportName) --> ClientStep::Transmission
//!       Info:          Info, ListMetaContext --------------------------> ClientStep::Listed
//!       List:          List, then for each: Info, ListMetaContext -----> ClientStep::Listed
//! ```
//!
//! One option is in flight at a time. Bytes may come in any cut; one reply is stored, of a bounded length, and
//! all that is kept is bounded by [`ClientLimits`]. Time limits, and what to do about a server that offers less
//! than was wanted, are the caller's.

mod dialogue;
mod error;
mod told;
mod wants;

pub use error::ClientError;
pub use wants::{ClientLimits, ClientStep, Goal, Listed, Wants};

use bytes::BufMut;

use crate::chunk::ReplyStyle;
use crate::consts::{IHAVEOPT, NBDMAGIC, OLDSTYLE_MAGIC, OPTION_REPLY_HEADER_LEN};
use crate::export::MetaContext;
use crate::flags::{ClientFlags, HandshakeFlags};
use crate::option::info::EXPORT_NAME_PADDING;
use crate::option::{OptionCode, OptionReply};
use crate::wire::{Reader, fill, parse_string};
use dialogue::Question;
use told::Told;

/// The client's half of one connection's handshake.
///
/// ```
/// # use nbd_proto::*;
/// let mut handshake = ClientHandshake::new(Wants { style: ReplyStyle::Simple, ..Wants::export("disk") });
/// let mut out = Vec::new();
/// let (consumed, step) = handshake.advance(b"NBDMAGICIHAVEOPT\x00\x03", &mut out)?;
/// assert_eq!((consumed, step), (18, ClientStep::NeedMore));
/// // The client flags, and NBD_OPT_GO.
/// assert_eq!(out[..16], *b"\x00\x00\x00\x03IHAVEOPT\x00\x00\x00\x07");
/// # Ok::<(), ClientError>(())
/// ```
pub struct ClientHandshake {
    wants: Wants,
    state: State,
    client_flags: ClientFlags,
    encrypted: bool,
    style: ReplyStyle,
    contexts: Vec<MetaContext>,
    listed: Vec<Listed>,
    /// About the export that was asked about last.
    told: Told,
    /// Replies to the option in flight.
    replies: u32,
    kept_bytes: usize,
    /// The greeting or the reply, as far as it has come.
    partial: Vec<u8>,
}

enum State {
    Greeting,
    Asked(Question),
    /// Waiting for the answer to `NBD_OPT_EXPORT_NAME`, which has no frame.
    ExportName,
    StartingTls,
    Over(ClientError),
}

/// The longest reply there is any reason to send: two strings and a length.
const MAX_REPLY_DATA: u32 = 4 + 2 * 4096;
/// `None`: go on at once.
type Turn = Result<Option<ClientStep>, ClientError>;

impl ClientHandshake {
    /// A handshake at its beginning, which is the server's: there is nothing to send yet.
    pub fn new(wants: Wants) -> Self {
        Self {
            wants,
            state: State::Greeting,
            client_flags: ClientFlags::empty(),
            encrypted: false,
            style: ReplyStyle::Simple,
            contexts: Vec::new(),
            listed: Vec::new(),
            told: Told::default(),
            replies: 0,
            kept_bytes: 0,
            partial: Vec::new(),
        }
    }

    /// Takes what it can use from the front of `input` and appends what is to be sent to `out`; returns the
    /// number of bytes taken and what to do next. The caller drops the bytes taken, sends `out`, and clears it.
    ///
    /// Any amount of input will do, none or a single byte too. All of it is taken, but what follows
    /// [`ClientStep::Transmission`] belongs to the transmission phase, and what follows
    /// [`ClientStep::Listed`] is of no use.
    ///
    /// # Errors
    ///
    /// [`ClientError`]: close the connection. From then on every call answers the same.
    pub fn advance(&mut self, input: &[u8], out: &mut Vec<u8>) -> Result<(usize, ClientStep), ClientError> {
        let mut rest = input;
        loop {
            match self.turn(&mut rest, out) {
                Ok(None) => {}
                Ok(Some(step)) => return Ok((input.len() - rest.len(), step)),
                Err(error) => {
                    self.state = State::Over(error.clone());
                    return Err(error);
                }
            }
        }
    }

    /// TLS is up: goes on with the options, and appends the first of them to `out`.
    pub fn tls_started(&mut self, out: &mut Vec<u8>) {
        self.encrypted = true;
        self.settle(self.wants.style, out);
    }

    /// What it means that the server hung up instead of sending more.
    pub fn hung_up(&self) -> ClientError {
        match &self.state {
            State::Greeting if self.partial.is_empty() => ClientError::HungUp("without a greeting"),
            State::Greeting => ClientError::HungUp("in its greeting"),
            // The only way to refuse it.
            State::ExportName if self.partial.is_empty() => {
                ClientError::UnknownExport { name: self.wants.export.clone(), message: String::new() }
            }
            State::Asked(_) | State::ExportName => ClientError::HungUp("during the handshake"),
            State::StartingTls => ClientError::HungUp("where TLS should begin"),
            State::Over(error) => error.clone(),
        }
    }

    /// Bytes of the server's input held at the moment: less than 9 KiB.
    pub fn buffered_bytes(&self) -> usize {
        self.partial.len()
    }

    /// The greeting, or one reply.
    fn turn(&mut self, rest: &mut &[u8], out: &mut Vec<u8>) -> Turn {
        match self.state {
            State::Greeting => self.greeting(rest, out),
            State::Asked(question) => {
                if !fill(&mut self.partial, rest, OPTION_REPLY_HEADER_LEN) {
                    return Ok(Some(ClientStep::NeedMore));
                }
                let length = Reader::new(&self.partial[OPTION_REPLY_HEADER_LEN - 4..]).u32().unwrap_or(0);
                // A frame that is wrong or too long ends here, before its data is waited for.
                OptionReply::parse(&self.partial, MAX_REPLY_DATA)?;
                let need =
                    usize::try_from(length).unwrap_or(usize::MAX).saturating_add(OPTION_REPLY_HEADER_LEN);
                if !fill(&mut self.partial, rest, need) {
                    return Ok(Some(ClientStep::NeedMore));
                }
                let message = std::mem::take(&mut self.partial);
                let turn = match OptionReply::parse(&message, MAX_REPLY_DATA)? {
                    Some((reply, _)) => self.reply(question, &reply, out),
                    None => Ok(Some(ClientStep::NeedMore)),
                };
                self.partial = message;
                self.partial.clear();
                if matches!(turn, Ok(Some(ClientStep::StartTls))) && !rest.is_empty() {
                    return Err(ClientError::PlainBytes);
                }
                turn
            }
            State::ExportName => {
                let padding =
                    if self.client_flags.contains(ClientFlags::NO_ZEROES) { 0 } else { EXPORT_NAME_PADDING };
                if !fill(&mut self.partial, rest, 10 + padding) {
                    return Ok(Some(ClientStep::NeedMore));
                }
                // Ten bytes always have this layout.
                let _ = self.told.take_export(&self.partial[..10]);
                self.enter(OptionCode::ExportName)
            }
            State::StartingTls if rest.is_empty() => Ok(Some(ClientStep::StartTls)),
            State::StartingTls => Err(ClientError::PlainBytes),
            State::Over(ref error) => Err(error.clone()),
        }
    }

    fn greeting(&mut self, rest: &mut &[u8], out: &mut Vec<u8>) -> Turn {
        if parse_string(self.wants.export.as_bytes()).is_none() {
            return Err(ClientError::BadName);
        }
        // Step by step: a stranger may send less than 18 bytes, and wait.
        if !fill(&mut self.partial, rest, 8) {
            return Ok(Some(ClientStep::NeedMore));
        }
        let magic = Reader::new(&self.partial).u64();
        if magic != Some(NBDMAGIC) {
            return Err(ClientError::NotNbd(magic.unwrap_or(0)));
        }
        if !fill(&mut self.partial, rest, 16) {
            return Ok(Some(ClientStep::NeedMore));
        }
        match Reader::new(&self.partial[8..]).u64() {
            Some(IHAVEOPT) => {}
            Some(OLDSTYLE_MAGIC) => return Err(ClientError::Oldstyle),
            other => return Err(ClientError::NotNbd(other.unwrap_or(0))),
        }
        if !fill(&mut self.partial, rest, 18) {
            return Ok(Some(ClientStep::NeedMore));
        }
        let offered = HandshakeFlags(Reader::new(&self.partial[16..]).u16().unwrap_or(0));
        self.partial.clear();
        // The bits are the same on both sides.
        self.client_flags = ClientFlags(u32::from((offered & HandshakeFlags::known()).0));
        out.put_u32(self.client_flags.0);
        if offered.contains(HandshakeFlags::FIXED_NEWSTYLE) {
            if self.wants.tls {
                self.ask(Question::StartTls, &[], out);
            } else {
                self.settle(self.wants.style, out);
            }
            return Ok(None);
        }
        match (self.wants.tls, self.wants.goal) {
            (true, _) => Err(ClientError::NotFixedNewstyle("start TLS")),
            (_, Goal::List) => Err(ClientError::NotFixedNewstyle("list its exports")),
            (_, Goal::Info) => Err(ClientError::NotFixedNewstyle("describe an export")),
            (_, Goal::Transmission) => {
                self.export_name(out);
                Ok(None)
            }
        }
    }
}

#[cfg(test)]
mod tests;
