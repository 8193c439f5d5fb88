//! `NBD_OPT_LIST`.

use super::{OptReply, Replies};
use bytes::BufMut;

use crate::export::Directory;
use crate::wire::{bounded_text, len_u32, parse_string};

/// One `NBD_REP_SERVER` for each export, then the acknowledgement. The caller has refused data already.
///
/// The answer's length is up to the directory, not to the client; what a client can ask for is bounded by the
/// number of options and by the pause after each full output buffer.
pub(crate) fn list(dir: &dyn Directory, replies: &mut Replies<'_>) {
    dir.list(&mut |name, description| {
        // A cut name would be another name.
        if parse_string(name.as_bytes()).is_none() {
            return;
        }
        replies.send(OptReply::Server, |out| {
            out.put_u32(len_u32(name.as_bytes()));
            out.extend_from_slice(name.as_bytes());
            out.extend_from_slice(bounded_text(description.unwrap_or_default()).as_bytes());
        });
    });
    replies.ack();
}
