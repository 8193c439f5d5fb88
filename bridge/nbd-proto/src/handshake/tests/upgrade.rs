//! `STRUCTURED_REPLY`, `EXTENDED_HEADERS`, `STARTTLS`, and shutting down.

use super::*;

#[test]
fn reply_styles() {
    let go = option(GO, &ask(b"disk", &[]));
    let to = |style| Step::Transmission(serving_disk(style));
    let (structured, extended) = (option(STRUCTURED_REPLY, b""), option(EXTENDED_HEADERS, b""));
    let chunks = || disk(GO, DISK_FLAGS | 0x80);
    check(vec![
        case(
            "structured",
            client(3, &[structured.clone(), go.clone()]),
            [ack(STRUCTURED_REPLY), chunks()].concat(),
            to(ReplyStyle::Structured),
        ),
        case(
            "structured with data",
            client(3, &[option(STRUCTURED_REPLY, b"x"), go.clone()]),
            [error(STRUCTURED_REPLY, HAS_DATA), disk(GO, DISK_FLAGS)].concat(),
            to(ReplyStyle::Simple),
        ),
        case(
            "structured twice",
            client(3, &[structured.clone(), structured.clone(), go.clone()]),
            [ack(STRUCTURED_REPLY), error(STRUCTURED_REPLY, STRUCTURED_TWICE), chunks()].concat(),
            to(ReplyStyle::Structured),
        ),
        case(
            "extended",
            client(3, &[extended.clone(), go.clone()]),
            [ack(EXTENDED_HEADERS), chunks()].concat(),
            to(ReplyStyle::Extended),
        ),
        case(
            "extended with data",
            client(3, &[option(EXTENDED_HEADERS, b"xyz"), go.clone()]),
            [error(EXTENDED_HEADERS, HAS_DATA), disk(GO, DISK_FLAGS)].concat(),
            to(ReplyStyle::Simple),
        ),
        case(
            "structured, then extended twice",
            client(3, &[structured.clone(), extended.clone(), extended.clone(), go.clone()]),
            [ack(STRUCTURED_REPLY), ack(EXTENDED_HEADERS), error(EXTENDED_HEADERS, EXTENDED_TWICE), chunks()]
                .concat(),
            to(ReplyStyle::Extended),
        ),
        case(
            "extended, then structured",
            client(3, &[extended, structured, go]),
            [ack(EXTENDED_HEADERS), error(STRUCTURED_REPLY, EXTENDED_IN_USE), chunks()].concat(),
            to(ReplyStyle::Extended),
        ),
    ]);
}

#[test]
fn without_tls() {
    check(vec![
        case("not configured", client(3, &[option(STARTTLS, b"")]), error(STARTTLS, NO_TLS), Step::NeedMore),
        case("with data", client(3, &[option(STARTTLS, b"x")]), error(STARTTLS, HAS_DATA), Step::NeedMore),
    ]);
}

#[test]
fn starting_tls_forgets_what_was_negotiated() {
    let before = client(
        3,
        &[
            option(STRUCTURED_REPLY, b""),
            option(SET_META_CONTEXT, &queries(b"disk", &["base:allocation"])),
            option(STARTTLS, b""),
        ],
    );
    let answered = [
        ack(STRUCTURED_REPLY),
        reply(SET_META_CONTEXT, 4, b"\0\0\0\0base:allocation"),
        ack(SET_META_CONTEXT),
        ack(STARTTLS),
    ]
    .concat();
    let encrypted = Negotiated { encrypted: true, ..serving_disk(ReplyStyle::Simple) };
    let after = [option(STARTTLS, b""), option(STARTTLS, b"x"), option(GO, &ask(b"disk", &[]))].concat();
    let served =
        [answered.clone(), error(STARTTLS, TLS_TWICE), error(STARTTLS, HAS_DATA), disk(GO, DISK_FLAGS)];
    let again = [option(STRUCTURED_REPLY, b""), option(GO, &ask(b"disk", &[]))].concat();
    let served_again = [answered.clone(), ack(STRUCTURED_REPLY), disk(GO, DISK_FLAGS | 0x80)].concat();
    let encrypted_again = Negotiated { style: ReplyStyle::Structured, ..encrypted.clone() };
    let optional = |one: Case, after: &[Vec<u8>]| {
        let client = [one.client.as_slice(), after].concat();
        Case { tls: TlsPolicy::Optional, client, ..one }
    };
    let (no_structured, no_contexts) = (
        Step::Transmission(encrypted),
        Step::Transmission({
            let mut info = encrypted_again.clone();
            info.info.flags |= TransmissionFlags::SEND_DF;
            info
        }),
    );
    check(vec![
        optional(case("upgrade", before.clone(), answered, Step::StartTls), &[]),
        optional(case("forgotten, and only once", before.clone(), served.concat(), no_structured), &[after]),
        optional(case("contexts are gone, too", before, served_again, no_contexts), &[again]),
    ]);
}

/// CVE-2021-3716 (nbdkit): an option sent in the clear behind STARTTLS must not count as sent over TLS.
#[test]
fn plaintext_behind_starttls_is_thrown_away() {
    for tls in [TlsPolicy::Optional, TlsPolicy::Required] {
        let injected = client(3, &[option(STARTTLS, b""), option(STRUCTURED_REPLY, b""), b"IHAVE".to_vec()]);
        let one = case("injected", injected, [ack(STARTTLS), disk(GO, DISK_FLAGS)].concat(), {
            Step::Transmission(Negotiated { encrypted: true, ..serving_disk(ReplyStyle::Simple) })
        });
        let client = vec![one.client[0].clone(), option(GO, &ask(b"disk", &[]))];
        check(vec![Case { tls, client, ..one }]);
    }
}

#[test]
fn tls_is_required() {
    let required = |one: Case| Case { tls: TlsPolicy::Required, ..one };
    let others = [
        LIST,
        INFO,
        GO,
        STRUCTURED_REPLY,
        LIST_META_CONTEXT,
        SET_META_CONTEXT,
        EXTENDED_HEADERS,
        PEEK_EXPORT,
        77,
    ];
    let refused = others.map(|code| error(code, TLS_REQD)).concat();
    let hangs_up = |name, flags| {
        let refused = closed(CloseReason::TlsRequired);
        Case {
            unused: 4,
            ..required(case(name, client(flags, &[option(EXPORT_NAME, b"disk")]), vec![], refused))
        }
    };
    check(vec![
        required(case(
            "everything else is refused, with or without data",
            client(
                3,
                &[
                    others.map(|code| option(code, b"")).concat(),
                    others.map(|code| option(code, b"x")).concat(),
                ],
            ),
            [refused.clone(), refused].concat(),
            Step::NeedMore,
        )),
        hangs_up("name", 3),
        hangs_up("newstyle", 0),
        required(case(
            "data",
            client(3, &[option(STARTTLS, b"x")]),
            error(STARTTLS, HAS_DATA),
            Step::NeedMore,
        )),
        required(case("abort", client(3, &[option(ABORT, b"")]), ack(ABORT), closed(CloseReason::Abort))),
    ]);
    let one = case(
        "all is well over TLS",
        client(3, &[option(STARTTLS, b"")]),
        [ack(STARTTLS), disk(INFO, DISK_FLAGS), error(77, UNSUP)].concat(),
        Step::NeedMore,
    );
    let client = vec![one.client[0].clone(), [option(INFO, &ask(b"disk", &[])), option(77, b"")].concat()];
    let check_tls = Case { tls: TlsPolicy::Required, client, ..one };
    check(vec![check_tls]);
}

#[test]
fn shutting_down() {
    let feed = |before: &[u8], after: &[u8]| {
        let mut handshake = Handshake::new(Limits::default(), TlsPolicy::Disabled);
        let mut out = Vec::new();
        assert_eq!(handshake.advance(before, &Exports, &mut out), (before.len(), Step::NeedMore));
        handshake.shutting_down();
        let (_, step) = handshake.advance(after, &Exports, &mut out);
        (out, step)
    };
    let flags = client(3, &[]);
    for code in [LIST, INFO, GO, STARTTLS, STRUCTURED_REPLY, LIST_META_CONTEXT, SET_META_CONTEXT, 77] {
        let sent = [&flags[..], &option(code, b"data")].concat();
        for cut in 4..sent.len() {
            let (before, after) = sent.split_at(cut);
            let expected = match code {
                // Refused by its header, before the end was near.
                LIST | STARTTLS | STRUCTURED_REPLY if cut >= 20 => error(code, HAS_DATA),
                77 if cut >= 20 => error(code, UNSUP),
                _ => error(code, SHUTTING_DOWN),
            };
            assert_eq!(feed(before, after), (expected, Step::NeedMore), "option {code} cut at {cut}");
        }
    }
    assert_eq!(feed(&flags, &option(ABORT, b"")), (ack(ABORT), closed(CloseReason::Abort)));
    let name = [&flags[..], &option(EXPORT_NAME, b"disk")].concat();
    for cut in 4..name.len() {
        let (before, after) = name.split_at(cut);
        assert_eq!(feed(before, after), (vec![], closed(CloseReason::ShuttingDown)), "cut at {cut}");
    }
}
