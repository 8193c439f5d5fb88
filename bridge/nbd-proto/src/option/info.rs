//! `NBD_OPT_INFO`, `NBD_OPT_GO` and `NBD_OPT_EXPORT_NAME`: choosing an export.

use super::{InfoType, OptReply, Replies, Session};
use bytes::BufMut;

use crate::error::CloseReason;
use crate::export::{Directory, ExportInfo, Negotiated};
use crate::flags::ClientFlags;
use crate::wire::{Reader, bounded_text, parse_string};

/// Zero bytes after the answer to `NBD_OPT_EXPORT_NAME`, unless the client does without.
pub(crate) const EXPORT_NAME_PADDING: usize = 124;

/// Answers `NBD_OPT_INFO` and `NBD_OPT_GO`, which differ only in what follows. `Some` if the export was
/// acknowledged.
pub(crate) fn info(
    session: &mut Session,
    body: &[u8],
    dir: &dyn Directory,
    replies: &mut Replies<'_>,
) -> Option<Negotiated> {
    let Some(ask) = Ask::parse(body) else {
        replies.error(OptReply::ErrInvalid, "malformed name or information requests");
        return None;
    };
    let Some((export, info)) = find(session, ask.name, dir) else {
        replies.unknown_export(ask.name);
        return None;
    };
    replies.send(OptReply::Info, |out| {
        out.put_u16(InfoType::Export.wire());
        out.put_u64(info.size);
        out.put_u16(info.flags.0);
    });
    if ask.requests(InfoType::Name) {
        replies.send(OptReply::Info, |out| {
            out.put_u16(InfoType::Name.wire());
            out.extend_from_slice(bounded_text(&export).as_bytes());
        });
    }
    if let (true, Some(description)) = (ask.requests(InfoType::Description), &info.description) {
        replies.send(OptReply::Info, |out| {
            out.put_u16(InfoType::Description.wire());
            out.extend_from_slice(bounded_text(description).as_bytes());
        });
    }
    // Sent to those who did not ask, too: a client must ignore what it does not understand, and one that
    // understands is spared errors on unaligned requests.
    replies.send(OptReply::Info, |out| {
        out.put_u16(InfoType::BlockSize.wire());
        out.put_u32(info.min_block);
        out.put_u32(info.preferred_block);
        out.put_u32(info.max_payload);
    });
    replies.ack();
    Some(negotiated(session, export, info, ask.requests(InfoType::BlockSize)))
}

/// Answers `NBD_OPT_EXPORT_NAME`: size, transmission flags, and zeroes unless the client said not to.
///
/// # Errors
///
/// This option cannot be refused but by closing the connection.
pub(crate) fn export_name(
    session: &mut Session,
    body: &[u8],
    dir: &dyn Directory,
    out: &mut Vec<u8>,
) -> Result<Negotiated, CloseReason> {
    let name = parse_string(body).ok_or(CloseReason::BadExportName)?;
    let (export, info) =
        find(session, name, dir).ok_or_else(|| CloseReason::UnknownExport(name.to_owned()))?;
    out.put_u64(info.size);
    out.put_u16(info.flags.0);
    if !session.client_flags.contains(ClientFlags::NO_ZEROES) {
        out.extend_from_slice(&[0; EXPORT_NAME_PADDING]);
    }
    Ok(negotiated(session, export, info, false))
}

/// The data of `NBD_OPT_INFO` and `NBD_OPT_GO`.
///
/// ```text
///   4 bytes  length of the name
///   n        name
///   2        number of information requests
///   2 each   information requests
/// ```
struct Ask<'a> {
    name: &'a str,
    requests: &'a [u8],
}

impl<'a> Ask<'a> {
    /// `None` unless the lengths add up exactly; a name may claim more bytes than there are (CVE-2022-26496).
    fn parse(body: &'a [u8]) -> Option<Self> {
        let mut reader = Reader::new(body);
        let length = reader.u32()?;
        let name = parse_string(reader.bytes(length)?)?;
        let count = reader.u16()?;
        let requests = reader.rest();
        (requests.len() == usize::from(count) * 2).then_some(Self { name, requests })
    }

    fn requests(&self, kind: InfoType) -> bool {
        self.requests.chunks_exact(2).any(|request| request == kind.wire().to_be_bytes())
    }
}

fn find(session: &Session, name: &str, dir: &dyn Directory) -> Option<(String, ExportInfo)> {
    let (export, mut info) = dir.find(name)?;
    debug_assert!(info.block_sizes_are_legal(), "{export}: block sizes against the protocol");
    info.flags = info.flags.advertised(session.style);
    Some((export, info))
}

fn negotiated(session: &Session, export: String, info: ExportInfo, honours_block_size: bool) -> Negotiated {
    // A selection made for another export is void.
    let contexts = match &session.meta {
        Some(selection) if selection.export == export => selection.contexts.clone(),
        _ => Vec::new(),
    };
    Negotiated {
        export,
        info,
        style: session.style,
        contexts,
        client_flags: session.client_flags,
        honours_block_size,
        encrypted: session.encrypted,
    }
}
