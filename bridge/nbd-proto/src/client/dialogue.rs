//! The options a client sends, one after the other, and what each answer leads to.

use super::error::printable;
use super::told::{Told, context, server};
use super::{ClientError, ClientHandshake, ClientStep, Goal, Listed, State, Turn};
use bytes::BufMut;

use crate::chunk::ReplyStyle;
use crate::consts::MAX_NAME_BYTES;
use crate::export::Negotiated;
use crate::option::{InfoType, OptReply, OptionCode, OptionReply, put_option};
use crate::wire::len_u32;

/// The option in flight; a number is the position in the list of exports.
#[derive(Clone, Copy)]
pub(super) enum Question {
    StartTls,
    ExtendedHeaders,
    StructuredReply,
    SetMetaContext,
    Go,
    List,
    Info(usize),
    ListMetaContext(usize),
}

impl Question {
    pub(super) fn option(self) -> OptionCode {
        match self {
            Self::StartTls => OptionCode::StartTls,
            Self::ExtendedHeaders => OptionCode::ExtendedHeaders,
            Self::StructuredReply => OptionCode::StructuredReply,
            Self::SetMetaContext => OptionCode::SetMetaContext,
            Self::Go => OptionCode::Go,
            Self::List => OptionCode::List,
            Self::Info(_) => OptionCode::Info,
            Self::ListMetaContext(_) => OptionCode::ListMetaContext,
        }
    }
}

impl ClientHandshake {
    pub(super) fn ask(&mut self, question: Question, data: &[u8], out: &mut Vec<u8>) {
        put_option(question.option(), data, out);
        self.replies = 0;
        self.state = State::Asked(question);
    }

    /// Asks for a reply style, or goes on if there is nothing to ask for.
    pub(super) fn settle(&mut self, style: ReplyStyle, out: &mut Vec<u8>) {
        match style {
            ReplyStyle::Extended => self.ask(Question::ExtendedHeaders, &[], out),
            ReplyStyle::Structured => self.ask(Question::StructuredReply, &[], out),
            ReplyStyle::Simple => self.choose(out),
        }
    }

    /// The style is settled: on to what the handshake is for.
    fn choose(&mut self, out: &mut Vec<u8>) {
        match self.wants.goal {
            Goal::Transmission if self.style != ReplyStyle::Simple && !self.wants.contexts.is_empty() => {
                let data = queries(&self.wants.export, &self.wants.contexts);
                self.ask(Question::SetMetaContext, &data, out);
            }
            Goal::Transmission => self.go(out),
            Goal::Info => {
                let name = self.wants.export.clone();
                self.listed.push(not_asked(name, None));
                self.describe(0, out);
            }
            Goal::List => self.ask(Question::List, &[], out),
        }
    }

    fn go(&mut self, out: &mut Vec<u8>) {
        let data = requests(&self.wants.export);
        self.ask(Question::Go, &data, out);
    }

    pub(super) fn export_name(&mut self, out: &mut Vec<u8>) {
        put_option(OptionCode::ExportName, self.wants.export.as_bytes(), out);
        self.told = Told::default();
        self.state = State::ExportName;
    }

    /// Asks about an export of the list; `Some` after the last one, with a goodbye in the output.
    fn describe(&mut self, index: usize, out: &mut Vec<u8>) -> Option<ClientStep> {
        match self.listed.get(index) {
            Some(listed) if index < self.wants.limits.max_described.max(1) => {
                let data = requests(&listed.name);
                self.told = Told::default();
                self.ask(Question::Info(index), &data, out);
                None
            }
            _ => Some(self.goodbye(out)),
        }
    }

    /// The server need not be waited for: it may not answer this one.
    fn goodbye(&mut self, out: &mut Vec<u8>) -> ClientStep {
        put_option(OptionCode::Abort, &[], out);
        self.state = State::Over(ClientError::Finished);
        ClientStep::Listed(std::mem::take(&mut self.listed))
    }

    /// Asks for the contexts of an export of the list, if it can have any.
    fn contexts_of(&mut self, index: usize, out: &mut Vec<u8>) -> Option<ClientStep> {
        match self.listed.get(index) {
            Some(listed) if self.style != ReplyStyle::Simple => {
                let data = queries(&listed.name, &[]);
                self.ask(Question::ListMetaContext(index), &data, out);
                None
            }
            _ => self.describe(index + 1, out),
        }
    }

    pub(super) fn reply(&mut self, question: Question, reply: &OptionReply<'_>, out: &mut Vec<u8>) -> Turn {
        let option = question.option();
        let malformed = |what| ClientError::Malformed { option, what };
        if reply.option != option {
            return Err(malformed("it answers another option"));
        }
        self.replies += 1;
        if self.replies > self.wants.limits.max_replies {
            return Err(ClientError::TooMuch(option));
        }
        if reply.kind == OptReply::Ack {
            return self.acknowledged(question, out);
        }
        if reply.kind.is_error() {
            return self.refused(question, reply, out);
        }
        match (question, reply.kind) {
            (Question::Go | Question::Info(_), OptReply::Info) => {
                self.told.take(reply.data).ok_or(malformed("a broken piece of information"))?;
            }
            (Question::List, OptReply::Server) => {
                let (name, description) = server(reply.data).ok_or(malformed("a broken name"))?;
                self.keep(option, reply.data.len())?;
                self.listed.push(not_asked(name.to_owned(), description.map(str::to_owned)));
            }
            (Question::SetMetaContext, OptReply::MetaContext) => {
                let context = context(reply.data).ok_or(malformed("a broken context"))?;
                if !self.wants.contexts.contains(&context.name) {
                    return Err(malformed("a context that was not asked for"));
                }
                if self.contexts.iter().any(|known| known.id == context.id || known.name == context.name) {
                    return Err(malformed("the same context twice"));
                }
                self.contexts.push(context);
            }
            (Question::ListMetaContext(index), OptReply::MetaContext) => {
                let context = context(reply.data).ok_or(malformed("a broken context"))?;
                self.keep(option, reply.data.len())?;
                if let Some(listed) = self.listed.get_mut(index) {
                    listed.contexts.push(context.name);
                }
            }
            _ => return Err(malformed("a reply of the wrong type")),
        }
        Ok(None)
    }

    /// The option in flight was answered to the end.
    fn acknowledged(&mut self, question: Question, out: &mut Vec<u8>) -> Turn {
        match question {
            Question::StartTls => {
                self.state = State::StartingTls;
                return Ok(Some(ClientStep::StartTls));
            }
            Question::ExtendedHeaders => {
                self.style = ReplyStyle::Extended;
                self.choose(out);
            }
            Question::StructuredReply => {
                self.style = ReplyStyle::Structured;
                self.choose(out);
            }
            Question::SetMetaContext => self.go(out),
            Question::Go => return self.enter(OptionCode::Go),
            Question::List => return Ok(self.describe(0, out)),
            Question::Info(index) => {
                let info = self.told.info(self.style, OptionCode::Info)?;
                self.keep(OptionCode::Info, MAX_NAME_BYTES)?;
                if let Some(listed) = self.listed.get_mut(index) {
                    listed.tells_block_sizes = self.told.tells_block_sizes();
                    listed.name = self.told.name.take().unwrap_or_else(|| std::mem::take(&mut listed.name));
                    listed.description = info.description.clone().or(listed.description.take());
                    listed.info = Ok(info);
                }
                return Ok(self.contexts_of(index, out));
            }
            Question::ListMetaContext(index) => return Ok(self.describe(index + 1, out)),
        }
        Ok(None)
    }

    /// The option in flight was refused: do without, where that can be done.
    fn refused(&mut self, question: Question, reply: &OptionReply<'_>, out: &mut Vec<u8>) -> Turn {
        let error = ClientError::refused(reply.option, reply.kind, reply.data, &self.wants.export);
        // Whatever it was, nothing else will be answered better.
        let hopeless = matches!(reply.kind, OptReply::ErrTlsReqd | OptReply::ErrShutdown);
        match question {
            Question::StartTls => return Err(ClientError::TlsRefused(printable(reply.data))),
            // TLS may be required for this export alone.
            Question::Info(index) if self.wants.goal == Goal::List => {
                let asked_in_vain = reply.kind == OptReply::ErrUnsup;
                if let Some(listed) = self.listed.get_mut(index) {
                    listed.info = Err(error.clone());
                }
                if !asked_in_vain {
                    return Ok(self.describe(index + 1, out));
                }
                self.listed.iter_mut().for_each(|listed| listed.info = Err(error.clone()));
                return Ok(Some(self.goodbye(out)));
            }
            _ if hopeless => return Err(error),
            Question::ExtendedHeaders => self.settle(ReplyStyle::Structured, out),
            Question::StructuredReply => self.choose(out),
            Question::SetMetaContext => {
                self.contexts.clear();
                self.go(out);
            }
            // Extended headers forbid the old way.
            Question::Go if reply.kind == OptReply::ErrUnsup && !self.style.extended() => {
                self.export_name(out);
            }
            Question::ListMetaContext(index) => return Ok(self.describe(index + 1, out)),
            Question::Go | Question::List | Question::Info(_) => return Err(error),
        }
        Ok(None)
    }

    /// The export was granted by `option`.
    pub(super) fn enter(&mut self, option: OptionCode) -> Turn {
        let info = self.told.info(self.style, option)?;
        self.state = State::Over(ClientError::Finished);
        Ok(Some(ClientStep::Transmission(Negotiated {
            export: self.told.name.take().unwrap_or_else(|| self.wants.export.clone()),
            info,
            style: self.style,
            contexts: std::mem::take(&mut self.contexts),
            client_flags: self.client_flags,
            honours_block_size: self.told.tells_block_sizes(),
            encrypted: self.encrypted,
        })))
    }

    /// Counts what is to be stored.
    fn keep(&mut self, option: OptionCode, bytes: usize) -> Result<(), ClientError> {
        self.kept_bytes = self.kept_bytes.saturating_add(bytes).saturating_add(ENTRY_BYTES);
        if self.kept_bytes > self.wants.limits.max_kept_bytes {
            return Err(ClientError::TooMuch(option));
        }
        Ok(())
    }
}

/// What an entry of a list costs beside its text.
const ENTRY_BYTES: usize = size_of::<Listed>();

fn not_asked(name: String, description: Option<String>) -> Listed {
    let info = Err(ClientError::NotAsked);
    Listed { name, description, info, tells_block_sizes: false, contexts: Vec::new() }
}

/// The data of `NBD_OPT_GO` and `NBD_OPT_INFO`: a name, and everything there is to know about it.
fn requests(name: &str) -> Vec<u8> {
    let kinds = [InfoType::Name, InfoType::Description, InfoType::BlockSize];
    let mut data = Vec::new();
    put_counted(name, &mut data);
    data.extend_from_slice(&[0, 3]);
    data.extend(kinds.iter().flat_map(|kind| kind.wire().to_be_bytes()));
    data
}

/// The data of `NBD_OPT_SET_META_CONTEXT` and `NBD_OPT_LIST_META_CONTEXT`: a name and queries.
fn queries(name: &str, queries: &[String]) -> Vec<u8> {
    let mut data = Vec::new();
    put_counted(name, &mut data);
    data.put_u32(u32::try_from(queries.len()).unwrap_or(u32::MAX));
    queries.iter().for_each(|query| put_counted(query, &mut data));
    data
}

fn put_counted(text: &str, data: &mut Vec<u8>) {
    data.put_u32(len_u32(text.as_bytes()));
    data.extend_from_slice(text.as_bytes());
}
