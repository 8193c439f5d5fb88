//! A stream of requests: no panic, and what was decoded encodes to the same bytes.
//!
//! Input: one byte whose lowest bit chooses extended headers, then the stream.
#![no_main]

use libfuzzer_sys::fuzz_target;
use nbd_proto::{Request, TransmissionFlags};

fuzz_target!(|data: &[u8]| {
    let Some((choice, mut stream)) = data.split_first() else {
        return;
    };
    let extended = choice & 1 != 0;
    while let Ok(Some(request)) = Request::parse(stream, extended) {
        let (header, rest) = stream.split_at(Request::header_len(extended));
        let mut again = Vec::new();
        request.encode(extended, &mut again);
        assert_eq!(again, header);
        for cut in 0..header.len() {
            assert_eq!(Request::parse(&header[..cut], extended), Ok(None));
        }
        let _ = request.check_flags(extended, TransmissionFlags(0xffff));
        // As a server does: drain the payload, and go on if the next request is there.
        match usize::try_from(request.payload_len(extended)) {
            Ok(payload) if payload <= rest.len() => stream = &rest[payload..],
            _ => break,
        }
    }
});
