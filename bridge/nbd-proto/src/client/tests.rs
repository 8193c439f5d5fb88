//! Transcripts of servers as they are and as they should not be, each fed whole, byte by byte, and cut at every
//! length; and our own server on the other end. Bytes are spelled out here, apart from the crate's encoders.

mod hostile;
mod listing;
mod pairs;
mod transcripts;

use super::*;
use crate::chunk::ReplyStyle;
use crate::export::{ExportInfo, Negotiated};
use crate::flags::TransmissionFlags;
use crate::option::OptReply;

// Options.
const EXPORT_NAME: u32 = 1;
const ABORT: u32 = 2;
const LIST: u32 = 3;
const STARTTLS: u32 = 5;
const INFO: u32 = 6;
const GO: u32 = 7;
const STRUCTURED_REPLY: u32 = 8;
const LIST_META_CONTEXT: u32 = 9;
const SET_META_CONTEXT: u32 = 10;
const EXTENDED_HEADERS: u32 = 11;

// Errors.
const UNSUP: u32 = 0x8000_0001;
const POLICY: u32 = 0x8000_0002;
const INVALID: u32 = 0x8000_0003;
const TLS_REQD: u32 = 0x8000_0005;
const UNKNOWN: u32 = 0x8000_0006;
const SHUTDOWN: u32 = 0x8000_0007;

const SIZE: u64 = 1 << 30;
const FLAGS: u16 = 0x0d6d;

type Ending = Result<ClientStep, ClientError>;

/// How the bytes reach the handshake.
#[derive(Clone, Copy)]
enum Feed {
    Whole,
    Pieces(usize),
}

/// Plays the server's bytes, whatever the client sends; what it sent, the end, and the bytes left over.
fn play(wants: &Wants, server: &[u8], feed: Feed) -> (Vec<u8>, Ending, usize) {
    let mut handshake = ClientHandshake::new(wants.clone());
    let (mut sent, mut rest) = (Vec::new(), server);
    loop {
        let size = if let Feed::Pieces(size) = feed { size.min(rest.len()) } else { rest.len() };
        let mut out = Vec::new();
        let step = handshake.advance(&rest[..size], &mut out);
        assert!(handshake.buffered_bytes() < 9 << 10);
        sent.extend_from_slice(&out);
        match step {
            Ok((taken, ClientStep::NeedMore)) => {
                assert_eq!(taken, size, "left bytes behind");
                rest = &rest[taken..];
                if rest.is_empty() {
                    return (sent, Ok(ClientStep::NeedMore), 0);
                }
            }
            Ok((taken, step)) => return (sent, Ok(step), rest.len() - taken),
            Err(error) => {
                // It stays what it was.
                assert_eq!(handshake.advance(b"x", &mut out), Err(error.clone()));
                assert_eq!(handshake.hung_up(), error);
                return (sent, Err(error), 0);
            }
        }
    }
}

/// One transcript: what the server says, what the client must have said in the end, and the end.
fn check(name: &str, wants: &Wants, server: &[Vec<u8>], client: &[Vec<u8>], end: &Ending) {
    let (server, client) = (server.concat(), client.concat());
    for feed in [Feed::Whole, Feed::Pieces(1), Feed::Pieces(7)] {
        let (sent, ending, left) = play(wants, &server, feed);
        assert_eq!(sent.escape_ascii().to_string(), client.escape_ascii().to_string(), "{name}");
        assert_eq!(&ending, end, "{name}");
        assert_eq!(left, 0, "{name}");
    }
    for cut in 0..server.len() {
        let (sent, ending, _) = play(wants, &server[..cut], Feed::Whole);
        assert!(client.starts_with(&sent), "{name}: cut at {cut}");
        match ending {
            Ok(step) => assert_eq!(step, ClientStep::NeedMore, "{name}: cut at {cut}"),
            // What is wrong may show before its last byte.
            error => assert_eq!(&error, end, "{name}: cut at {cut}"),
        }
    }
}

fn wants(style: ReplyStyle) -> Wants {
    Wants { style, ..Wants::export("disk") }
}

fn with_contexts(style: ReplyStyle, contexts: &[&str]) -> Wants {
    Wants { contexts: contexts.iter().map(ToString::to_string).collect(), ..wants(style) }
}

/// Fixed newstyle, no zeroes.
fn greeting() -> Vec<u8> {
    b"NBDMAGICIHAVEOPT\0\x03".to_vec()
}

fn client_flags() -> Vec<u8> {
    vec![0, 0, 0, 3]
}

fn option(option: u32, data: &[u8]) -> Vec<u8> {
    [b"IHAVEOPT", &option.to_be_bytes()[..], &length(data), data].concat()
}

fn reply(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    let magic = [0x00, 0x03, 0xe8, 0x89, 0x04, 0x55, 0x65, 0xa9];
    [&magic[..], &option.to_be_bytes(), &kind.to_be_bytes(), &length(data), data].concat()
}

fn ack(option: u32) -> Vec<u8> {
    reply(option, 1, b"")
}

fn length(data: &[u8]) -> [u8; 4] {
    u32::try_from(data.len()).unwrap().to_be_bytes()
}

fn counted(text: &str) -> Vec<u8> {
    [&length(text.as_bytes())[..], text.as_bytes()].concat()
}

/// `GO` or `INFO`, with the requests that are always made: name, description, block sizes.
fn ask(code: u32, name: &str) -> Vec<u8> {
    option(code, &[counted(name), vec![0, 3, 0, 1, 0, 2, 0, 3]].concat())
}

/// Either option about contexts.
fn queries(code: u32, name: &str, queries: &[&str]) -> Vec<u8> {
    let mut data = counted(name);
    data.extend(u32::try_from(queries.len()).unwrap().to_be_bytes());
    data.extend(queries.iter().flat_map(|query| counted(query)));
    option(code, &data)
}

fn context(code: u32, id: u32, name: &str) -> Vec<u8> {
    reply(code, 4, &[&id.to_be_bytes()[..], name.as_bytes()].concat())
}

fn size_and_flags() -> Vec<u8> {
    [&SIZE.to_be_bytes()[..], &FLAGS.to_be_bytes()].concat()
}

/// `NBD_INFO_EXPORT`.
fn info_export(code: u32) -> Vec<u8> {
    reply(code, 3, &[vec![0, 0], size_and_flags()].concat())
}

/// `NBD_INFO_NAME` (1) or `NBD_INFO_DESCRIPTION` (2).
fn info_text(code: u32, kind: u8, text: &str) -> Vec<u8> {
    reply(code, 3, &[&[0, kind], text.as_bytes()].concat())
}

/// `NBD_INFO_BLOCK_SIZE`.
fn info_blocks(code: u32, sizes: [u32; 3]) -> Vec<u8> {
    reply(code, 3, &[vec![0, 3], sizes.map(u32::to_be_bytes).concat()].concat())
}

/// The export with nothing told but size and flags.
fn plain_info() -> ExportInfo {
    ExportInfo {
        size: SIZE,
        flags: TransmissionFlags(FLAGS),
        description: None,
        min_block: 1,
        preferred_block: 4096,
        max_payload: 32 << 20,
    }
}

fn negotiated(style: ReplyStyle) -> Negotiated {
    Negotiated {
        export: "disk".to_owned(),
        info: plain_info(),
        style,
        contexts: Vec::new(),
        client_flags: ClientFlags(3),
        honours_block_size: false,
        encrypted: false,
    }
}

fn serving(negotiated: Negotiated) -> Ending {
    Ok(ClientStep::Transmission(negotiated))
}
