//! A client's side of a handshake, in one piece and in many: the same answers and the same end, no more output
//! at a time and no more memory than promised.
//!
//! Input: TLS policy (1 byte, modulo 3), size of the pieces (1), how many bytes come before TLS (2, big-endian),
//! then what the client sends.
#![no_main]

use libfuzzer_sys::fuzz_target;
use nbd_proto::{
    Directory, ExportInfo, Handshake, Limits, MAX_NAME_BYTES, Step, TlsPolicy, TransmissionFlags,
};

/// Small, so that a fuzzer reaches them.
const LIMITS: Limits = Limits { max_options: 24, max_option_bytes: 512, max_output_bytes: 256 };
/// The longest answer to one option: an error text, or the list of exports.
const LONGEST_ANSWER: usize = 20 + MAX_NAME_BYTES;

struct Exports;

impl Directory for Exports {
    fn list(&self, each: &mut dyn FnMut(&str, Option<&str>)) {
        each("disk", Some("a disk"));
        each("ro", None);
    }

    fn find(&self, name: &str) -> Option<(String, ExportInfo)> {
        let name = match name {
            "" | "disk" => "disk",
            "ro" => "ro",
            _ => return None,
        };
        let info = ExportInfo {
            size: 1 << 30,
            flags: TransmissionFlags(0xffff),
            description: (name == "disk").then(|| "a disk".to_owned()),
            min_block: 1,
            preferred_block: 4096,
            max_payload: 32 << 20,
        };
        Some((name.to_owned(), info))
    }

    fn contexts(&self, _: &str) -> Vec<String> {
        vec!["base:allocation".to_owned(), "x-test:one".to_owned()]
    }
}

/// Feeds `parts`, the second of them over TLS if the first asks for it, in pieces of `size` bytes; the answers
/// and the last step.
fn play(tls: TlsPolicy, parts: [&[u8]; 2], size: usize) -> (Vec<u8>, Step) {
    let mut handshake = Handshake::new(LIMITS, tls);
    let mut answers = Vec::new();
    let mut last = Step::NeedMore;
    for part in parts {
        if last == Step::StartTls {
            handshake.tls_started();
        }
        let mut rest = part;
        loop {
            let piece = &rest[..size.min(rest.len())];
            let mut out = Vec::new();
            let (taken, step) = handshake.advance(piece, &Exports, &mut out);
            assert!(taken <= piece.len());
            assert!(out.len() <= LIMITS.max_output_bytes + LONGEST_ANSWER);
            assert!(handshake.buffered_bytes() <= MAX_NAME_BYTES);
            answers.extend_from_slice(&out);
            rest = &rest[taken..];
            match step {
                Step::NeedMore | Step::StartTls => assert_eq!(taken, piece.len()),
                Step::Flush => assert!(!out.is_empty()),
                Step::Transmission(_) | Step::Close(_) => return (answers, step),
            }
            last = step;
            if rest.is_empty() && last != Step::Flush {
                break;
            }
        }
    }
    (answers, last)
}

fuzz_target!(|data: &[u8]| {
    let Some((&[tls, size, high, low], input)) = data.split_first_chunk::<4>() else {
        return;
    };
    let tls = match tls % 3 {
        0 => TlsPolicy::Disabled,
        1 => TlsPolicy::Optional,
        _ => TlsPolicy::Required,
    };
    let plain = usize::from(u16::from_be_bytes([high, low])).min(input.len());
    let parts = [&input[..plain], &input[plain..]];
    let whole = play(tls, parts, usize::MAX);
    assert_eq!(play(tls, parts, usize::from(size).max(1)), whole);
    assert_eq!(play(tls, parts, 1), whole);
    if let Step::Transmission(negotiated) = &whole.1 {
        assert!(tls != TlsPolicy::Required || negotiated.encrypted);
        assert!(["disk", "ro"].contains(&negotiated.export.as_str()));
    }
});
