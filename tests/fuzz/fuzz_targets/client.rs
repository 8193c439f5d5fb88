//! A server's side of a handshake, in one piece and in many: the client says the same and ends the same, and no
//! more is kept than promised. And an address, read as a URI: what is written of it reads the same.
//!
//! Input: what the client wants (1 byte: goal, style, TLS), size of the pieces (1), how many bytes come before TLS
//! (2, big-endian), then what the server sends.
#![no_main]

use libfuzzer_sys::fuzz_target;
use nbd_proto::uri::Uri;
use nbd_proto::{
    ClientError, ClientHandshake, ClientLimits, ClientStep, Goal, MAX_NAME_BYTES, ReplyStyle, Wants,
};

/// Small, so that a fuzzer reaches them.
const LIMITS: ClientLimits = ClientLimits { max_replies: 24, max_kept_bytes: 4096, max_described: 3 };
/// The longest reply: two strings, a length, and the header.
const LONGEST_REPLY: usize = 20 + 4 + 2 * MAX_NAME_BYTES;

/// Feeds `parts`, the second of them over TLS if that starts, in pieces of `size` bytes; what the client sent,
/// and the last step.
fn play(wants: &Wants, parts: [&[u8]; 2], size: usize) -> (Vec<u8>, Result<ClientStep, ClientError>) {
    let mut handshake = ClientHandshake::new(wants.clone());
    let mut sent = Vec::new();
    let mut last = ClientStep::NeedMore;
    for part in parts {
        if last == ClientStep::StartTls {
            handshake.tls_started(&mut sent);
        }
        let mut rest = part;
        while !rest.is_empty() {
            let piece = &rest[..size.min(rest.len())];
            let (taken, step) = match handshake.advance(piece, &mut sent) {
                Ok(progress) => progress,
                Err(error) => {
                    assert!(!error.to_string().chars().any(char::is_control));
                    return (sent, Err(error));
                }
            };
            assert!(handshake.buffered_bytes() <= LONGEST_REPLY);
            match step {
                ClientStep::NeedMore | ClientStep::StartTls => assert_eq!(taken, piece.len()),
                ClientStep::Transmission(_) | ClientStep::Listed(_) => return (sent, Ok(step)),
            }
            rest = &rest[taken..];
            last = step;
        }
    }
    (sent, Ok(last))
}

fuzz_target!(|data: &[u8]| {
    if let Ok(Ok(uri)) = std::str::from_utf8(data).map(str::parse::<Uri>) {
        assert_eq!(uri.to_string().parse(), Ok(uri));
    }
    let Some((&[choice, size, high, low], input)) = data.split_first_chunk::<4>() else {
        return;
    };
    let wants = Wants {
        goal: [Goal::Transmission, Goal::Info, Goal::List][usize::from(choice % 3)],
        style: [ReplyStyle::Simple, ReplyStyle::Structured, ReplyStyle::Extended]
            [usize::from(choice / 3 % 3)],
        tls: choice / 9 % 2 == 1,
        contexts: vec!["base:allocation".to_owned(), "x-test:one".to_owned()],
        limits: LIMITS,
        ..Wants::export("disk")
    };
    let plain = usize::from(u16::from_be_bytes([high, low])).min(input.len());
    let parts = [&input[..plain], &input[plain..]];
    let whole = play(&wants, parts, usize::MAX);
    assert_eq!(play(&wants, parts, usize::from(size).max(1)), whole);
    assert_eq!(play(&wants, parts, 1), whole);
    match &whole.1 {
        Ok(ClientStep::Transmission(negotiated)) => {
            assert_eq!(negotiated.encrypted, wants.tls);
            assert!(negotiated.contexts.len() <= wants.contexts.len());
            assert!(i64::try_from(negotiated.info.size).is_ok());
        }
        Ok(ClientStep::Listed(listed)) => {
            let kept: usize = listed.iter().map(|listed| listed.contexts.len() + 1).sum();
            assert!(kept <= LIMITS.max_kept_bytes);
        }
        _ => {}
    }
});
