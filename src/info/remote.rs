//! What a remote server tells about its exports, as nbdinfo shows it.

use std::fmt::Write;

use anyhow::{Context, Result};
use bridge::backend::nbd::{NbdBackend, NbdOptions};
use bridge::{Backend, ExtentKind, Flags};
use nbd_proto::uri::Uri;
use nbd_proto::{ClientError, ExportInfo, Goal, Listed, TransmissionFlags};

use crate::output;
use crate::size;

/// What there is to be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ask {
    /// The export at the address.
    Export,
    /// All exports of the server.
    List,
    /// What the export at the address consists of.
    Map,
}

/// What there is to print.
pub(super) struct Told {
    /// With its last newline.
    pub(super) text: String,
    /// What keeps the rest of a map from being told.
    pub(super) failed: Option<anyhow::Error>,
}

/// Asks a server.
///
/// # Errors
/// One line that names the address.
pub(crate) fn tell(uri: &Uri, options: &NbdOptions, ask: Ask, json: bool) -> Result<Told> {
    let goal = match ask {
        Ask::Map => {
            let (parts, failed) = map(uri, options)?;
            let text = if json { map_as_json(&parts) } else { map_as_text(&parts) };
            return Ok(Told { text, failed });
        }
        Ask::Export => Goal::Info,
        Ask::List => Goal::List,
    };
    let mut exports = NbdBackend::ask(uri, goal, options)?;
    // Those that did not fit into one handshake are asked about in one of their own.
    for listed in &mut exports {
        if listed.info == Err(ClientError::NotAsked) {
            let uri = Uri { export: listed.name.clone(), ..uri.clone() };
            if let Some(asked) = NbdBackend::ask(&uri, Goal::Info, options)?.pop() {
                *listed = asked;
            }
        }
    }
    let text = if json { exports_as_json(&exports) } else { exports.iter().map(export_as_text).collect() };
    Ok(Told { text, failed: None })
}

fn export_as_text(listed: &Listed) -> String {
    let mut text = String::new();
    // Writing to a string does not fail.
    let _ = match &listed.info {
        Ok(info) => {
            writeln!(text, "export {:?}: {}", listed.name, size::full(info.size))
        }
        Err(error) => writeln!(text, "export {:?}: {}", listed.name, output::plain(&error.to_string())),
    };
    if let Some(description) = &listed.description {
        let _ = writeln!(text, "  description: {}", output::plain(description));
    }
    if let Ok(info) = &listed.info {
        let can = abilities(info).filter(|(_, can)| *can).map(|(name, _)| name).collect::<Vec<_>>();
        let _ = writeln!(text, "  flags:       {}", can.join(" "));
        let told = if listed.tells_block_sizes { "" } else { " (assumed: the server does not tell)" };
        let (min, preferred, max) = (info.min_block, info.preferred_block, info.max_payload);
        let _ = writeln!(text, "  blocks:      minimum {min}, preferred {preferred}, maximum {max}{told}");
    }
    if !listed.contexts.is_empty() {
        let _ = writeln!(text, "  contexts:    {}", output::plain(&listed.contexts.join(" ")));
    }
    text
}

/// The transmission flags by name, and whether each is set.
fn abilities(info: &ExportInfo) -> impl Iterator<Item = (&'static str, bool)> + use<> {
    let flags = info.flags;
    let table = [
        ("read-only", TransmissionFlags::READ_ONLY),
        ("flush", TransmissionFlags::SEND_FLUSH),
        ("fua", TransmissionFlags::SEND_FUA),
        ("rotational", TransmissionFlags::ROTATIONAL),
        ("trim", TransmissionFlags::SEND_TRIM),
        ("write-zeroes", TransmissionFlags::SEND_WRITE_ZEROES),
        ("fast-zero", TransmissionFlags::SEND_FAST_ZERO),
        ("df", TransmissionFlags::SEND_DF),
        ("multi-conn", TransmissionFlags::CAN_MULTI_CONN),
        ("cache", TransmissionFlags::SEND_CACHE),
    ];
    table.into_iter().map(move |(name, flag)| (name, flags.contains(flag)))
}

fn exports_as_json(exports: &[Listed]) -> String {
    let each = exports.iter().map(|listed| {
        let mut fields = vec![format!("\"name\": {}", json(&listed.name))];
        if let Some(description) = &listed.description {
            fields.push(format!("\"description\": {}", json(description)));
        }
        match &listed.info {
            Ok(info) => {
                fields.push(format!("\"size\": {}", info.size));
                let flags = abilities(info).map(|(name, can)| format!("{}: {can}", json(name)));
                fields.push(format!("\"flags\": {{{}}}", flags.collect::<Vec<_>>().join(", ")));
                fields.push(format!("\"block-size-minimum\": {}", info.min_block));
                fields.push(format!("\"block-size-preferred\": {}", info.preferred_block));
                fields.push(format!("\"block-size-maximum\": {}", info.max_payload));
                fields.push(format!("\"block-sizes-told\": {}", listed.tells_block_sizes));
            }
            Err(error) => fields.push(format!("\"error\": {}", json(&error.to_string()))),
        }
        let contexts: Vec<String> = listed.contexts.iter().map(|context| json(context)).collect();
        fields.push(format!("\"contexts\": [{}]", contexts.join(", ")));
        format!("    {{{}}}", fields.join(", "))
    });
    format!("{{\n  \"exports\": [\n{}\n  ]\n}}\n", each.collect::<Vec<_>>().join(",\n"))
}

/// A part of a map: offset, length, what it is.
type Part = (u64, u64, ExtentKind);

/// Walks over the whole export. If a part of it cannot be told, returns what lies before that part, and the reason.
fn map(uri: &Uri, options: &NbdOptions) -> Result<(Vec<Part>, Option<anyhow::Error>)> {
    let source = NbdBackend::open(uri, options)?;
    let size = source.geometry().size;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build_local(tokio::runtime::LocalOptions::default())
        .context("cannot start the event loop")?;
    let mut parts: Vec<Part> = Vec::new();
    let mut at = 0;
    while at < size {
        let found = match runtime.block_on(source.block_status(at, size - at, Flags::NONE)) {
            Ok(found) => found,
            Err(error) => return Ok((parts, Some(anyhow::Error::from(error).context(uri.to_string())))),
        };
        for extent in found {
            match parts.last_mut() {
                Some(last) if last.2 == extent.kind => last.1 += extent.len,
                _ => parts.push((at, extent.len, extent.kind)),
            }
            at += extent.len;
        }
    }
    Ok((parts, None))
}

/// nbdinfo's number and words for each kind.
fn words(kind: ExtentKind) -> (u8, &'static str) {
    match kind {
        ExtentKind::Data => (0, "data"),
        ExtentKind::Zero => (2, "zero"),
        ExtentKind::Hole => (3, "hole,zero"),
        ExtentKind::HoleNotZero => (1, "hole"),
    }
}

fn map_as_text(parts: &[Part]) -> String {
    let line = |(offset, len, kind): &Part| {
        let (number, word) = words(*kind);
        format!("{offset:>10}  {len:>10}  {number:>3}  {word}\n")
    };
    parts.iter().map(line).collect()
}

fn map_as_json(parts: &[Part]) -> String {
    let part = |(offset, len, kind): &Part| {
        let (number, word) = words(*kind);
        format!(
            "{{ \"offset\": {offset}, \"length\": {len}, \"type\": {number}, \"description\": {} }}",
            json(word)
        )
    };
    format!("[\n{}\n]\n", parts.iter().map(part).collect::<Vec<_>>().join(",\n"))
}

/// A JSON string.
fn json(text: &str) -> String {
    let mut out = String::from('"');
    for c in text.chars() {
        match c {
            '"' | '\\' => out.extend(['\\', c]),
            c if c.is_control() => {
                let mut units = [0; 2];
                for unit in c.encode_utf16(&mut units) {
                    let _ = write!(out, "\\u{unit:04x}");
                }
            }
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strings_of_a_server_do_no_harm() {
        assert_eq!(json("a\"b\\c\n\u{1b}é"), r#""a\"b\\c\u000a\u001bé""#);
        let listed = Listed {
            name: "\u{1b}[2J".into(),
            description: Some("x\ny".into()),
            info: Err(ClientError::TlsRequired),
            tells_block_sizes: false,
            contexts: Vec::new(),
        };
        let text = export_as_text(&listed);
        assert!(!text.trim_end().replace('\n', "").chars().any(char::is_control), "{text:?}");
        assert!(text.contains("requires TLS") && text.contains("x\\ny"), "{text}");
    }
}
