//! Junk, floods and other things a stranger may try.

use super::*;

#[test]
fn client_flags() {
    for flags in [4, 7, 0x8000_0003, u32::MAX] {
        let refused = closed(CloseReason::ClientFlags(flags));
        check(vec![Case {
            unused: 16,
            ..case("unknown flags", client(flags, &[option(LIST, b"")]), vec![], refused)
        }]);
    }
}

#[test]
fn without_fixed_newstyle_there_is_one_option() {
    for code in [ABORT, LIST, STARTTLS, INFO, GO, STRUCTURED_REPLY, SET_META_CONTEXT, EXTENDED_HEADERS, 77] {
        for flags in [0, 2] {
            let refused = closed(CloseReason::NotFixedNewstyle(OptionCode::from_wire(code)));
            check(vec![case("newstyle", client(flags, &[option(code, b"")]), vec![], refused)]);
        }
    }
}

#[test]
fn unknown_options_are_skipped_to_the_byte() {
    let unknown = [0, PEEK_EXPORT, 12, 77, 0xffff_ffff];
    for code in unknown {
        // What looks like an option inside the data is data.
        for data in [vec![], vec![1], option(ABORT, b"")] {
            check(vec![case(
                "unknown",
                client(3, &[option(code, &data), option(GO, &ask(b"disk", &[]))]),
                [error(code, UNSUP), disk(GO, DISK_FLAGS)].concat(),
                Step::Transmission(serving_disk(ReplyStyle::Simple)),
            )]);
        }
    }
}

#[test]
fn junk_closes() {
    let magic = |bytes: &[u8; 8]| closed(CloseReason::OptionMagic(u64::from_be_bytes(*bytes)));
    let mut late = option(LIST, b"");
    late[0] = b'X';
    check(vec![
        case("not an option", client(3, &[b"GET / HTTP/1.1\r\n".to_vec()]), vec![], magic(b"GET / HT")),
        case(
            "a reply",
            client(3, &[ack(LIST)[..16].to_vec()]),
            vec![],
            closed(CloseReason::OptionMagic(0x0003_e889_0455_65a9)),
        ),
        case("later", client(3, &[option(INFO, b""), late]), error(INFO, BAD_REQUESTS), magic(b"XHAVEOPT")),
    ]);
}

#[test]
fn too_many_options() {
    let mut one = case(
        "the fourth",
        client(3, &[option(77, b"").repeat(3), option(GO, &ask(b"", &[]))]),
        error(77, UNSUP).repeat(3),
        closed(CloseReason::TooManyOptions(3)),
    );
    one.limits.max_options = 3;
    one.unused = ask(b"", &[]).len();
    check(vec![one.clone()]);
    one.limits.max_options = 4;
    one.server.extend(disk(GO, DISK_FLAGS));
    one.end = Step::Transmission(serving_disk(ReplyStyle::Simple));
    one.unused = 0;
    check(vec![one]);

    // TLS does not start the count again.
    let mut tls =
        case("over TLS", client(3, &[option(STARTTLS, b"")]), [ack(STARTTLS), error(77, UNSUP)].concat(), {
            closed(CloseReason::TooManyOptions(2))
        });
    tls.tls = TlsPolicy::Optional;
    tls.limits.max_options = 2;
    tls.client.push(option(77, b"").repeat(2));
    check(vec![tls]);
}

#[test]
fn more_data_than_allowed_is_skipped() {
    let codes = [
        (INFO, TOO_MUCH),
        (GO, TOO_MUCH),
        (LIST_META_CONTEXT, TOO_MUCH),
        (SET_META_CONTEXT, TOO_MUCH),
        (LIST, HAS_DATA),
        (STARTTLS, HAS_DATA),
        (STRUCTURED_REPLY, HAS_DATA),
        (EXTENDED_HEADERS, HAS_DATA),
        (77, UNSUP),
    ];
    for (code, refusal) in codes {
        let mut one = case(
            "skipped",
            client(3, &[option(code, &[0; 33]), option(ABORT, &[0; 33])]),
            [error(code, refusal), ack(ABORT)].concat(),
            closed(CloseReason::Abort),
        );
        one.limits.max_option_bytes = 32;
        check(vec![one]);
    }
}

#[test]
fn as_much_data_as_allowed_is_read() {
    let data = ask(b"disk", &[0]);
    let serving = Step::Transmission(serving_disk(ReplyStyle::Simple));
    let mut one = case("just", client(3, &[option(GO, &data)]), disk(GO, DISK_FLAGS), serving);
    one.limits.max_option_bytes = u32::try_from(data.len()).unwrap();
    check(vec![one]);
}

/// CVE-2017-15119 (qemu): huge options. They cost no memory, and the connection stays usable.
#[test]
fn four_gib_of_data_are_counted_not_stored() {
    let block = vec![0; 1 << 20];
    for (code, refusal) in [(77, UNSUP), (GO, TOO_MUCH), (LIST, HAS_DATA)] {
        let mut handshake = Handshake::new(Limits::default(), TlsPolicy::Disabled);
        let mut out = Vec::new();
        let header = client(3, &[claim(code, u32::MAX, b"")]);
        handshake.advance(&header, &Exports, &mut out);
        let mut left = u32::MAX;
        while left > 0 {
            let piece = &block[..block.len().min(usize::try_from(left).unwrap())];
            assert_eq!(handshake.advance(piece, &Exports, &mut out), (piece.len(), Step::NeedMore));
            left -= u32::try_from(piece.len()).unwrap();
            assert!(out.is_empty() || left == 0);
        }
        assert_eq!(out, error(code, refusal));
        assert!(handshake.partial.capacity() < 64);
        out.clear();
        let (_, step) = handshake.advance(&option(ABORT, b""), &Exports, &mut out);
        assert_eq!((out, step), (ack(ABORT), closed(CloseReason::Abort)));
    }
}

/// Data is stored as it comes, not as it is announced.
#[test]
fn memory_follows_what_was_received() {
    let mut handshake = Handshake::new(Limits::default(), TlsPolicy::Disabled);
    let mut out = Vec::new();
    handshake.advance(&client(3, &[claim(GO, 64 << 10, b"few")]), &Exports, &mut out);
    assert!(handshake.partial.capacity() <= 64);
}

/// A client that asks and asks is answered one buffer at a time.
#[test]
fn output_is_bounded() {
    let mut handshake =
        Handshake::new(Limits { max_output_bytes: 256, ..Limits::default() }, TlsPolicy::Disabled);
    let flood = client(3, &[option(LIST, b"").repeat(100)]);
    let (mut rest, mut total, mut flushes) = (&flood[..], 0, 0);
    loop {
        let mut out = Vec::new();
        let (taken, step) = handshake.advance(rest, &Exports, &mut out);
        // One answer beyond the bound at the most.
        assert!(out.len() < 256 + 100, "{}", out.len());
        (rest, total) = (&rest[taken..], total + out.len());
        match step {
            Step::Flush => flushes += 1,
            other => break assert_eq!(other, Step::NeedMore),
        }
    }
    assert!(rest.is_empty());
    assert!(flushes > 20);
    assert_eq!(total, 100 * (34 + 26 + 20));
}

#[test]
fn the_end_is_final() {
    let mut handshake = Handshake::new(Limits::default(), TlsPolicy::Disabled);
    let mut out = Vec::new();
    let sent = client(3, &[option(GO, &ask(b"", &[]))]);
    let (taken, step) = handshake.advance(&sent, &Exports, &mut out);
    assert!(matches!(step, Step::Transmission(_)));
    assert_eq!(taken, sent.len());
    out.clear();
    assert_eq!(handshake.advance(b"more", &Exports, &mut out), (0, closed(CloseReason::Finished)));

    let mut handshake = Handshake::new(Limits::default(), TlsPolicy::Disabled);
    handshake.advance(&client(4, &[]), &Exports, &mut out);
    assert_eq!(handshake.advance(b"more", &Exports, &mut out), (0, closed(CloseReason::ClientFlags(4))));
    assert!(out.is_empty());
}
