//! The server side of the fixed newstyle negotiation.
//!
//! ```text
//!   greeting ->      ClientFlags -> OptionHeader <----+
//!                                    |  |  |          | answer
//!                                    |  |  +-> Body --+
//!                                    |  +----> Skip --+    (refused; counted, never stored)
//!                                    |                +--> StartingTls -> OptionHeader
//!                                    +-> Over         +--> Over
//! ```
//!
//! Bytes may come in any cut. At most one option's data is stored, and never more than
//! [`Limits::max_option_bytes`] of it; what is longer is skipped by counting. Time limits are the caller's.

mod step;

pub use step::{Limits, Step, TlsPolicy};

use bytes::BufMut;

use crate::consts::{IHAVEOPT, MAX_NAME_BYTES, NBDMAGIC, OPTION_HEADER_LEN};
use crate::error::CloseReason;
use crate::export::{Directory, Negotiated};
use crate::flags::{ClientFlags, HandshakeFlags};
use crate::option::{OptReply, OptionCode, Replies, Session, info, list, meta, upgrade};
use crate::wire::{Reader, fill};

/// The server's half of one connection's handshake.
///
/// ```
/// # use nbd_proto::*;
/// # struct Dir;
/// # impl Directory for Dir {
/// #     fn list(&self, _: &mut dyn FnMut(&str, Option<&str>)) {}
/// #     fn find(&self, _: &str) -> Option<(String, ExportInfo)> { None }
/// #     fn contexts(&self, _: &str) -> Vec<String> { Vec::new() }
/// # }
/// let mut handshake = Handshake::new(Limits::default(), TlsPolicy::Disabled);
/// assert_eq!(&handshake.greeting()[..16], b"NBDMAGICIHAVEOPT");
///
/// let mut input = 3_u32.to_be_bytes().to_vec();
/// put_option(OptionCode::Abort, b"", &mut input);
/// let mut out = Vec::new();
/// let (consumed, step) = handshake.advance(&input, &Dir, &mut out);
/// assert_eq!((consumed, step), (input.len(), Step::Close(CloseReason::Abort)));
/// let (reply, _) = OptionReply::parse(&out, 4096)?.expect("a whole reply");
/// assert_eq!(reply.kind, OptReply::Ack);
/// # Ok::<(), BadReply>(())
/// ```
pub struct Handshake {
    limits: Limits,
    tls: TlsPolicy,
    shutting_down: bool,
    options_seen: u32,
    session: Session,
    state: State,
    /// The part of a header or of an option's data that has come so far.
    partial: Vec<u8>,
}

enum State {
    ClientFlags,
    OptionHeader,
    /// Storing an option's data, to act on it.
    Body {
        option: OptionCode,
        length: usize,
    },
    /// Counting off an option's data.
    Skip {
        option: OptionCode,
        left: u32,
        then: AfterSkip,
    },
    StartingTls,
    Over(CloseReason),
}

#[derive(Clone, Copy)]
enum AfterSkip {
    Refuse(OptReply, &'static str),
    Abort,
}

/// What to do with an option, decided by its header alone.
enum Verdict {
    Read,
    Skip(AfterSkip),
    Close(CloseReason),
}

impl Handshake {
    /// A handshake at its beginning. Send [`Handshake::greeting`] first.
    pub fn new(limits: Limits, tls: TlsPolicy) -> Self {
        Self {
            limits,
            tls,
            shutting_down: false,
            options_seen: 0,
            session: Session::default(),
            state: State::ClientFlags,
            partial: Vec::new(),
        }
    }

    /// What the server sends first: [`NBDMAGIC`], [`IHAVEOPT`], handshake flags (section "Newstyle
    /// negotiation").
    pub fn greeting(&self) -> [u8; 18] {
        let flags = HandshakeFlags::FIXED_NEWSTYLE | HandshakeFlags::NO_ZEROES;
        let mut greeting = [0; 18];
        let mut place = &mut greeting[..];
        place.put_u64(NBDMAGIC);
        place.put_u64(IHAVEOPT);
        place.put_u16(flags.0);
        greeting
    }

    /// Takes what it can use from the front of `input` and appends the answers to `out`; returns the number of
    /// bytes taken and what to do next. The caller drops the bytes taken, sends `out`, and clears it.
    ///
    /// Any amount of input will do, a single byte too. All of it is taken, with these exceptions: after
    /// [`Step::Flush`] the rest is to be given again; after [`Step::Transmission`] it belongs to the
    /// transmission phase; after [`Step::Close`] it is of no use. Before [`Step::StartTls`] everything is
    /// taken, and what followed the option thrown away.
    ///
    /// Once closed, it keeps answering [`Step::Close`] with the same reason.
    pub fn advance(&mut self, input: &[u8], dir: &dyn Directory, out: &mut Vec<u8>) -> (usize, Step) {
        let mut rest = input;
        let step = loop {
            if let Some(step) = self.turn(&mut rest, dir, out) {
                break step;
            }
            if out.len() >= self.limits.max_output_bytes {
                break Step::Flush;
            }
        };
        if step == Step::StartTls {
            rest = &[];
        }
        (input.len() - rest.len(), step)
    }

    /// TLS is up: forgets everything negotiated before (section `NBD_OPT_STARTTLS`). The client flags stay, as
    /// they are sent only once, and so does the count of options.
    pub fn tls_started(&mut self) {
        self.session =
            Session { client_flags: self.session.client_flags, encrypted: true, ..Session::default() };
        self.partial.clear();
        self.state = State::OptionHeader;
    }

    /// From now on every option is answered `NBD_REP_ERR_SHUTDOWN`; `NBD_OPT_ABORT` is acknowledged, and
    /// `NBD_OPT_EXPORT_NAME` closes the connection (section "Termination of the session during option
    /// haggling"). An option whose data is still coming is refused as well.
    pub fn shutting_down(&mut self) {
        self.shutting_down = true;
    }

    /// Bytes of the client's input held at the moment: at most [`Limits::max_option_bytes`], or
    /// [`MAX_NAME_BYTES`] if that is more.
    pub fn buffered_bytes(&self) -> usize {
        self.partial.len()
    }

    /// One header, or one option's data. `None` means: go on at once.
    fn turn(&mut self, rest: &mut &[u8], dir: &dyn Directory, out: &mut Vec<u8>) -> Option<Step> {
        match self.state {
            State::ClientFlags => {
                if !fill(&mut self.partial, rest, 4) {
                    return Some(Step::NeedMore);
                }
                self.client_flags()
            }
            State::OptionHeader => {
                if !fill(&mut self.partial, rest, OPTION_HEADER_LEN) {
                    return Some(Step::NeedMore);
                }
                self.option_header()
            }
            State::Body { option, length } => {
                if !fill(&mut self.partial, rest, length) {
                    return Some(Step::NeedMore);
                }
                self.state = State::OptionHeader;
                let body = std::mem::take(&mut self.partial);
                let step = self.act(option, &body, dir, out);
                self.partial = body;
                self.partial.clear();
                step
            }
            State::Skip { option, ref mut left, then } => {
                let here = usize::try_from(*left).unwrap_or(usize::MAX).min(rest.len());
                *rest = &rest[here..];
                // No more than `left`, hence in range.
                *left -= u32::try_from(here).unwrap_or(*left);
                if *left > 0 {
                    return Some(Step::NeedMore);
                }
                self.state = State::OptionHeader;
                let mut replies = Replies::new(option, out);
                match then {
                    AfterSkip::Refuse(kind, text) => {
                        replies.error(kind, text);
                        None
                    }
                    AfterSkip::Abort => {
                        replies.ack();
                        self.close(CloseReason::Abort)
                    }
                }
            }
            State::StartingTls => Some(Step::StartTls),
            State::Over(ref reason) => Some(Step::Close(reason.clone())),
        }
    }

    fn client_flags(&mut self) -> Option<Step> {
        let flags = ClientFlags(Reader::new(&self.partial).u32()?);
        self.partial.clear();
        if !flags.without(ClientFlags::known()).is_empty() {
            return self.close(CloseReason::ClientFlags(flags.0));
        }
        self.session.client_flags = flags;
        self.state = State::OptionHeader;
        None
    }

    fn option_header(&mut self) -> Option<Step> {
        let mut reader = Reader::new(&self.partial);
        let (magic, option, length) = (reader.u64()?, OptionCode::from_wire(reader.u32()?), reader.u32()?);
        self.partial.clear();
        if magic != IHAVEOPT {
            return self.close(CloseReason::OptionMagic(magic));
        }
        if self.options_seen >= self.limits.max_options {
            return self.close(CloseReason::TooManyOptions(self.limits.max_options));
        }
        self.options_seen += 1;
        if option == OptionCode::SetMetaContext {
            // Replaces the former selection even when it fails, for whatever reason.
            self.session.meta = None;
        }
        match self.judge(option, length) {
            Verdict::Close(reason) => return self.close(reason),
            Verdict::Skip(then) => self.state = State::Skip { option, left: length, then },
            Verdict::Read => match usize::try_from(length) {
                Ok(length) => self.state = State::Body { option, length },
                Err(_) => self.state = State::Skip { option, left: length, then: TOO_BIG },
            },
        }
        None
    }

    fn judge(&self, option: OptionCode, length: u32) -> Verdict {
        let plain = !self.session.encrypted && self.tls == TlsPolicy::Required;
        let refuse = |kind, text| Verdict::Skip(AfterSkip::Refuse(kind, text));
        if option == OptionCode::ExportName {
            // Cannot be refused, only hung up on.
            return if self.shutting_down {
                Verdict::Close(CloseReason::ShuttingDown)
            } else if plain {
                Verdict::Close(CloseReason::TlsRequired)
            } else if self.session.style.extended() {
                Verdict::Close(CloseReason::ExtendedExportName)
            } else if usize::try_from(length).is_ok_and(|length| length <= MAX_NAME_BYTES) {
                Verdict::Read
            } else {
                Verdict::Close(CloseReason::BadExportName)
            };
        }
        if !self.session.client_flags.contains(ClientFlags::FIXED_NEWSTYLE) {
            return Verdict::Close(CloseReason::NotFixedNewstyle(option));
        }
        if option == OptionCode::Abort {
            // Whatever data it has is ignored.
            return Verdict::Skip(AfterSkip::Abort);
        }
        if self.shutting_down {
            return Verdict::Skip(SHUTDOWN);
        }
        if plain && option != OptionCode::StartTls {
            return refuse(OptReply::ErrTlsReqd, "start TLS first");
        }
        match option {
            OptionCode::List
            | OptionCode::StartTls
            | OptionCode::StructuredReply
            | OptionCode::ExtendedHeaders
                if length > 0 =>
            {
                refuse(OptReply::ErrInvalid, "this option has no data")
            }
            OptionCode::Unknown(_) => refuse(OptReply::ErrUnsup, "unknown option"),
            _ if length > self.limits.max_option_bytes => Verdict::Skip(TOO_BIG),
            _ => Verdict::Read,
        }
    }

    /// Acts on an option whose data is complete.
    fn act(
        &mut self,
        option: OptionCode,
        body: &[u8],
        dir: &dyn Directory,
        out: &mut Vec<u8>,
    ) -> Option<Step> {
        if option == OptionCode::ExportName {
            if self.shutting_down {
                return self.close(CloseReason::ShuttingDown);
            }
            return match info::export_name(&mut self.session, body, dir, out) {
                Ok(negotiated) => self.enter(negotiated),
                Err(reason) => self.close(reason),
            };
        }
        let session = &mut self.session;
        let mut replies = Replies::new(option, out);
        if self.shutting_down {
            // It began while the data was still coming.
            replies.error(OptReply::ErrShutdown, SHUTDOWN_TEXT);
            return None;
        }
        match option {
            OptionCode::List => list::list(dir, &mut replies),
            OptionCode::Info => {
                info::info(session, body, dir, &mut replies);
            }
            OptionCode::Go => {
                if let Some(negotiated) = info::info(session, body, dir, &mut replies) {
                    return self.enter(negotiated);
                }
            }
            OptionCode::StructuredReply => upgrade::structured_reply(session, &mut replies),
            OptionCode::ExtendedHeaders => upgrade::extended_headers(session, &mut replies),
            OptionCode::ListMetaContext => meta::list(session, body, dir, &mut replies),
            OptionCode::SetMetaContext => meta::set(session, body, dir, &mut replies),
            OptionCode::StartTls => {
                if upgrade::start_tls(session, self.tls, &mut replies) {
                    self.state = State::StartingTls;
                    return Some(Step::StartTls);
                }
            }
            OptionCode::ExportName | OptionCode::Abort | OptionCode::Unknown(_) => {
                debug_assert!(false, "{option:?} is never read");
            }
        }
        None
    }

    fn enter(&mut self, negotiated: Negotiated) -> Option<Step> {
        self.state = State::Over(CloseReason::Finished);
        Some(Step::Transmission(negotiated))
    }

    fn close(&mut self, reason: CloseReason) -> Option<Step> {
        self.state = State::Over(reason.clone());
        Some(Step::Close(reason))
    }
}

const TOO_BIG: AfterSkip = AfterSkip::Refuse(OptReply::ErrTooBig, "too much data for an option");
const SHUTDOWN_TEXT: &str = "the server is shutting down";
const SHUTDOWN: AfterSkip = AfterSkip::Refuse(OptReply::ErrShutdown, SHUTDOWN_TEXT);

#[cfg(test)]
mod tests;
