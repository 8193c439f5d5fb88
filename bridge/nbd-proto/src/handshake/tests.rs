//! Transcripts: what the client sends, what the server must answer, and how it ends. Each is fed whole, byte
//! by byte, and cut at every length. The bytes are spelled out here, apart from the crate's own encoders.

mod choose;
mod limits;
mod meta;
mod upgrade;

use super::*;
use crate::chunk::ReplyStyle;
use crate::export::{ExportInfo, MetaContext};
use crate::flags::TransmissionFlags;

// Options.
const EXPORT_NAME: u32 = 1;
const ABORT: u32 = 2;
const LIST: u32 = 3;
const PEEK_EXPORT: u32 = 4;
const STARTTLS: u32 = 5;
const INFO: u32 = 6;
const GO: u32 = 7;
const STRUCTURED_REPLY: u32 = 8;
const LIST_META_CONTEXT: u32 = 9;
const SET_META_CONTEXT: u32 = 10;
const EXTENDED_HEADERS: u32 = 11;

// Error replies, and the texts that go with them.
const UNSUP: (u32, &str) = (0x8000_0001, "unknown option");
const NO_TLS: (u32, &str) = (0x8000_0002, "TLS is not configured");
const HAS_DATA: (u32, &str) = (0x8000_0003, "this option has no data");
const BAD_REQUESTS: (u32, &str) = (0x8000_0003, "malformed name or information requests");
const BAD_QUERIES: (u32, &str) = (0x8000_0003, "malformed name or queries");
const UNSTRUCTURED: (u32, &str) = (0x8000_0003, "negotiate structured replies first");
const TLS_TWICE: (u32, &str) = (0x8000_0003, "TLS is in use already");
const STRUCTURED_TWICE: (u32, &str) = (0x8000_0003, "structured replies are in use already");
const EXTENDED_TWICE: (u32, &str) = (0x8000_0003, "extended headers are in use already");
const TLS_REQD: (u32, &str) = (0x8000_0005, "start TLS first");
const SHUTTING_DOWN: (u32, &str) = (0x8000_0007, "the server is shutting down");
const TOO_MUCH: (u32, &str) = (0x8000_0009, "too much data for an option");
const EXTENDED_IN_USE: (u32, &str) = (0x8000_000a, "extended headers are in use already");

const DISK_SIZE: u64 = 1 << 30;
/// Of the export `disk`; what is sent adds `SEND_DF` (0x80) when replies are chunks.
const DISK_FLAGS: u16 = 0x0d6d;
const READ_ONLY_SIZE: u64 = 12_288;
const READ_ONLY_FLAGS: u16 = 0x0003;

/// Two exports: `disk`, the default one, and `ro`.
struct Exports;

impl Directory for Exports {
    fn list(&self, each: &mut dyn FnMut(&str, Option<&str>)) {
        each("disk", Some("a disk"));
        each("ro", None);
        each("no\0name", None);
        each(&"x".repeat(4097), None);
    }

    fn find(&self, name: &str) -> Option<(String, ExportInfo)> {
        let disk = ExportInfo {
            size: DISK_SIZE,
            flags: TransmissionFlags(DISK_FLAGS),
            description: Some("a disk".to_owned()),
            min_block: 1,
            preferred_block: 4096,
            max_payload: 32 << 20,
        };
        let read_only = ExportInfo {
            size: READ_ONLY_SIZE,
            flags: TransmissionFlags(READ_ONLY_FLAGS),
            description: None,
            min_block: 4096,
            preferred_block: 65_536,
            max_payload: 32 << 20,
        };
        match name {
            "" | "disk" => Some(("disk".to_owned(), disk)),
            "ro" => Some(("ro".to_owned(), read_only)),
            _ => None,
        }
    }

    fn contexts(&self, name: &str) -> Vec<String> {
        let contexts: &[&str] = match name {
            "disk" => &["base:allocation", "x-test:a:b", "x-test:c"],
            _ => &["base:allocation"],
        };
        contexts.iter().map(ToString::to_string).collect()
    }
}

/// One transcript.
#[derive(Clone)]
struct Case {
    name: &'static str,
    tls: TlsPolicy,
    limits: Limits,
    /// What the client sends, in the clear and then, where there is a second part, over TLS.
    client: Vec<Vec<u8>>,
    server: Vec<u8>,
    end: Step,
    /// What the client sent after the end of the handshake, in bytes.
    unused: usize,
}

/// A transcript without TLS and with the usual limits.
fn case(name: &'static str, client: Vec<u8>, server: Vec<u8>, end: Step) -> Case {
    let limits = Limits::default();
    Case { name, tls: TlsPolicy::Disabled, limits, client: vec![client], server, end, unused: 0 }
}

/// How the bytes reach the handshake.
#[derive(Clone, Copy)]
enum Feed {
    Whole,
    Pieces(usize),
    /// Only this many bytes in all.
    Cut(usize),
}

/// Plays the client's bytes; the answers, the last step, and the bytes left over.
fn play(case: &Case, feed: Feed) -> (Vec<u8>, Step, usize) {
    let mut handshake = Handshake::new(case.limits, case.tls);
    let mut server = handshake.greeting().to_vec();
    let mut last = Step::NeedMore;
    let mut budget = if let Feed::Cut(total) = feed { total } else { usize::MAX };
    for part in &case.client {
        if last == Step::StartTls {
            handshake.tls_started();
        }
        let mut rest = &part[..part.len().min(budget)];
        budget -= rest.len();
        loop {
            let size = if let Feed::Pieces(size) = feed { size.min(rest.len()) } else { rest.len() };
            let mut out = Vec::new();
            let (taken, step) = handshake.advance(&rest[..size], &Exports, &mut out);
            assert!(taken <= size, "{}: took more than there was", case.name);
            assert!(step != Step::Flush || !out.is_empty(), "{}: an empty flush", case.name);
            server.extend_from_slice(&out);
            rest = &rest[taken..];
            match step {
                // What follows STARTTLS in the clear is taken, too, and thrown away.
                Step::NeedMore | Step::StartTls => {
                    assert_eq!(taken, size, "{}: left bytes behind", case.name);
                }
                Step::Flush => {}
                Step::Transmission(_) | Step::Close(_) => return (server, step, rest.len()),
            }
            last = step;
            if rest.is_empty() && last != Step::Flush {
                break;
            }
        }
    }
    (server, last, 0)
}

fn check(cases: Vec<Case>) {
    for case in cases {
        let server = [greeting(), case.server.clone()].concat();
        for feed in [Feed::Whole, Feed::Pieces(1), Feed::Pieces(7)] {
            let (sent, end, left) = play(&case, feed);
            assert_eq!(show(&sent), show(&server), "{}", case.name);
            assert_eq!(end, case.end, "{}", case.name);
            if matches!(feed, Feed::Whole) {
                assert_eq!(left, case.unused, "{}: bytes left over", case.name);
            }
        }
        let total: usize = case.client.iter().map(Vec::len).sum();
        for cut in 0..total - case.unused {
            let (sent, end, _) = play(&case, Feed::Cut(cut));
            assert!(server.starts_with(&sent), "{}: cut at {cut}", case.name);
            assert!(!matches!(end, Step::Transmission(_)), "{}: cut at {cut}: {end:?}", case.name);
        }
    }
}

/// Bytes as text, so that a failed comparison can be read.
fn show(bytes: &[u8]) -> String {
    bytes.escape_ascii().to_string()
}

fn greeting() -> Vec<u8> {
    b"NBDMAGICIHAVEOPT\0\x03".to_vec()
}

/// The client flags, and the options.
fn client(flags: u32, options: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = flags.to_be_bytes().to_vec();
    bytes.extend(options.concat());
    bytes
}

fn option(option: u32, data: &[u8]) -> Vec<u8> {
    claim(option, u32::try_from(data.len()).unwrap(), data)
}

/// An option that states another length than its data has.
fn claim(option: u32, length: u32, data: &[u8]) -> Vec<u8> {
    [b"IHAVEOPT", &option.to_be_bytes()[..], &length.to_be_bytes(), data].concat()
}

fn reply(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    let magic = [0x00, 0x03, 0xe8, 0x89, 0x04, 0x55, 0x65, 0xa9];
    let length = u32::try_from(data.len()).unwrap();
    [&magic[..], &option.to_be_bytes(), &kind.to_be_bytes(), &length.to_be_bytes(), data].concat()
}

fn ack(option: u32) -> Vec<u8> {
    reply(option, 1, b"")
}

fn error(option: u32, (kind, text): (u32, &str)) -> Vec<u8> {
    reply(option, kind, text.as_bytes())
}

/// A length of four bytes, and the text.
fn counted(text: &[u8]) -> Vec<u8> {
    [&u32::try_from(text.len()).unwrap().to_be_bytes()[..], text].concat()
}

/// The data of `INFO` and `GO`.
fn ask(name: &[u8], requests: &[u16]) -> Vec<u8> {
    let mut data = counted(name);
    data.extend_from_slice(&u16::try_from(requests.len()).unwrap().to_be_bytes());
    data.extend(requests.iter().flat_map(|request| request.to_be_bytes()));
    data
}

/// The data of both metadata options.
fn queries(name: &[u8], queries: &[&str]) -> Vec<u8> {
    let mut data = counted(name);
    data.extend_from_slice(&u32::try_from(queries.len()).unwrap().to_be_bytes());
    data.extend(queries.iter().flat_map(|query| counted(query.as_bytes())));
    data
}

/// `NBD_INFO_EXPORT`.
fn info_export(option: u32, size: u64, flags: u16) -> Vec<u8> {
    reply(option, 3, &[&[0, 0][..], &size.to_be_bytes(), &flags.to_be_bytes()].concat())
}

/// `NBD_INFO_BLOCK_SIZE`.
fn info_block_size(option: u32, min: u32, preferred: u32, payload: u32) -> Vec<u8> {
    let sizes = [min, preferred, payload].map(u32::to_be_bytes).concat();
    reply(option, 3, &[&[0, 3][..], &sizes].concat())
}

/// The whole answer to `INFO` or `GO` for `disk`, when nothing particular was asked.
fn disk(option: u32, flags: u16) -> Vec<u8> {
    [info_export(option, DISK_SIZE, flags), info_block_size(option, 1, 4096, 32 << 20), ack(option)].concat()
}

/// The whole answer to `INFO` or `GO` for `ro`, when nothing particular was asked.
fn read_only(option: u32, flags: u16) -> Vec<u8> {
    let sizes = info_block_size(option, 4096, 65_536, 32 << 20);
    [info_export(option, READ_ONLY_SIZE, flags), sizes, ack(option)].concat()
}

/// Transmission with `disk`, reached by `GO` with no more said.
fn serving_disk(style: ReplyStyle) -> Negotiated {
    serving("disk", style)
}

fn serving(name: &str, style: ReplyStyle) -> Negotiated {
    let (export, mut info) = Exports.find(name).unwrap();
    if style != ReplyStyle::Simple {
        info.flags |= TransmissionFlags::SEND_DF;
    }
    Negotiated {
        export,
        info,
        style,
        contexts: Vec::new(),
        client_flags: ClientFlags(3),
        honours_block_size: false,
        encrypted: false,
    }
}

fn context(id: u32, name: &str) -> MetaContext {
    MetaContext { id, name: name.to_owned() }
}

fn closed(reason: CloseReason) -> Step {
    Step::Close(reason)
}
