//! `NBD_OPT_STARTTLS`, `NBD_OPT_STRUCTURED_REPLY` and `NBD_OPT_EXTENDED_HEADERS`: options without data that
//! change the connection. The caller has refused data already.

use super::{OptReply, Replies, Session};
use crate::chunk::ReplyStyle;
use crate::handshake::TlsPolicy;

/// Whether TLS starts.
pub(crate) fn start_tls(session: &Session, tls: TlsPolicy, replies: &mut Replies<'_>) -> bool {
    if session.encrypted {
        replies.error(OptReply::ErrInvalid, "TLS is in use already");
        return false;
    }
    if tls == TlsPolicy::Disabled {
        replies.error(OptReply::ErrPolicy, "TLS is not configured");
        return false;
    }
    replies.ack();
    true
}

/// Asking twice is refused, which the document allows and qemu does.
pub(crate) fn structured_reply(session: &mut Session, replies: &mut Replies<'_>) {
    match session.style {
        ReplyStyle::Simple => {
            session.style = ReplyStyle::Structured;
            replies.ack();
        }
        ReplyStyle::Structured => {
            replies.error(OptReply::ErrInvalid, "structured replies are in use already")
        }
        ReplyStyle::Extended => {
            replies.error(OptReply::ErrExtHeaderReqd, "extended headers are in use already")
        }
    }
}

/// Extended headers take the place of structured replies, whether or not those were negotiated first.
pub(crate) fn extended_headers(session: &mut Session, replies: &mut Replies<'_>) {
    if session.style == ReplyStyle::Extended {
        replies.error(OptReply::ErrInvalid, "extended headers are in use already");
    } else {
        session.style = ReplyStyle::Extended;
        replies.ack();
    }
}
