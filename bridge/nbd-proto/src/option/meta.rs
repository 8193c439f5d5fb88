//! `NBD_OPT_LIST_META_CONTEXT` and `NBD_OPT_SET_META_CONTEXT` (section "Metadata querying").

use super::{OptReply, Replies, Session};
use bytes::BufMut;

use crate::chunk::ReplyStyle;
use crate::export::{Directory, MetaContext};
use crate::wire::{Reader, parse_string};

/// The contexts selected last, and the canonical name of the export they were selected for.
pub(crate) struct Selection {
    pub(crate) export: String,
    pub(crate) contexts: Vec<MetaContext>,
}

/// Answers `NBD_OPT_LIST_META_CONTEXT`. Without queries every context is listed; the id is always 0.
pub(crate) fn list(session: &Session, body: &[u8], dir: &dyn Directory, replies: &mut Replies<'_>) {
    let Some((_, ask, contexts)) = look_up(session, body, dir, replies) else {
        return;
    };
    for context in contexts {
        if ask.count == 0 || ask.queries().any(|query| lists(query, &context.name)) {
            send(replies, 0, &context.name);
        }
    }
    replies.ack();
}

/// Answers `NBD_OPT_SET_META_CONTEXT`. Without queries nothing is selected. The caller has dropped the former
/// selection already, since even a failure replaces it.
pub(crate) fn set(session: &mut Session, body: &[u8], dir: &dyn Directory, replies: &mut Replies<'_>) {
    let Some((export, ask, mut contexts)) = look_up(session, body, dir, replies) else {
        return;
    };
    // Only whole names select. A wildcard such as `base:` must not, nor a namespace nobody here knows.
    contexts.retain(|context| ask.queries().any(|query| query == context.name));
    for context in &contexts {
        send(replies, context.id, &context.name);
    }
    replies.ack();
    session.meta = Some(Selection { export, contexts });
}

/// Whether `query` lists `name`: the name itself, or its namespace and colon as a wildcard.
fn lists(query: &str, name: &str) -> bool {
    query == name || (query.ends_with(':') && name.split_inclusive(':').next() == Some(query))
}

fn send(replies: &mut Replies<'_>, id: u32, name: &str) {
    replies.send(OptReply::MetaContext, |out| {
        out.put_u32(id);
        out.extend_from_slice(name.as_bytes());
    });
}

/// What both options do first: the canonical export name, the queries, and every context of the export. `None`
/// once an error has been sent.
fn look_up<'a>(
    session: &Session,
    body: &'a [u8],
    dir: &dyn Directory,
    replies: &mut Replies<'_>,
) -> Option<(String, Ask<'a>, Vec<MetaContext>)> {
    if session.style == ReplyStyle::Simple {
        replies.error(OptReply::ErrInvalid, "negotiate structured replies first");
        return None;
    }
    let Some(ask) = Ask::parse(body) else {
        replies.error(OptReply::ErrInvalid, "malformed name or queries");
        return None;
    };
    let Some((export, _)) = dir.find(ask.name) else {
        replies.unknown_export(ask.name);
        return None;
    };
    let contexts = (0..).zip(dir.contexts(&export)).map(|(id, name)| MetaContext { id, name }).collect();
    Some((export, ask, contexts))
}

/// The data of both options, its lengths checked.
///
/// ```text
///   4 bytes  length of the export name
///   n        export name
///   4        number of queries
///   then for each query
///     4      length
///     n      query
/// ```
struct Ask<'a> {
    name: &'a str,
    count: u32,
    queries: Reader<'a>,
}

impl<'a> Ask<'a> {
    fn parse(body: &'a [u8]) -> Option<Self> {
        let mut reader = Reader::new(body);
        let length = reader.u32()?;
        let name = parse_string(reader.bytes(length)?)?;
        let count = reader.u32()?;
        let queries = reader;
        // Ends at the first query that is not there, so a huge count costs nothing.
        for _ in 0..count {
            next_query(&mut reader)?;
        }
        reader.rest().is_empty().then_some(Self { name, count, queries })
    }

    fn queries(&self) -> impl Iterator<Item = &'a str> + use<'a> {
        let mut reader = self.queries;
        std::iter::from_fn(move || next_query(&mut reader))
    }
}

fn next_query<'a>(reader: &mut Reader<'a>) -> Option<&'a str> {
    let length = reader.u32()?;
    parse_string(reader.bytes(length)?)
}
