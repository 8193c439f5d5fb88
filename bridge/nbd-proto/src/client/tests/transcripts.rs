//! Into transmission, with servers of every age.

use super::*;
use crate::export::MetaContext;
use ReplyStyle::{Extended, Simple, Structured};

#[test]
fn everything_at_once() {
    let info = ExportInfo {
        description: Some("a disk".to_owned()),
        min_block: 512,
        preferred_block: 65_536,
        // No limit, and the next smaller multiple of the minimum.
        max_payload: u32::MAX - 511,
        ..plain_info()
    };
    let contexts = [(7, "base:allocation"), (9, "qemu:allocation-depth")]
        .map(|(id, name)| MetaContext { id, name: name.to_owned() });
    check(
        "everything",
        &with_contexts(Extended, &["base:allocation", "qemu:allocation-depth", "x:none"]),
        &[
            greeting(),
            ack(EXTENDED_HEADERS),
            context(SET_META_CONTEXT, 7, "base:allocation"),
            context(SET_META_CONTEXT, 9, "qemu:allocation-depth"),
            ack(SET_META_CONTEXT),
            info_text(GO, 1, "the disk"),
            info_blocks(GO, [512, 65_536, u32::MAX]),
            // Unknown information is ignored.
            reply(GO, 3, &[0x12, 0x34, 1, 2, 3]),
            info_text(GO, 2, "a disk"),
            info_export(GO),
            ack(GO),
        ],
        &[
            client_flags(),
            option(EXTENDED_HEADERS, b""),
            queries(SET_META_CONTEXT, "disk", &["base:allocation", "qemu:allocation-depth", "x:none"]),
            ask(GO, "disk"),
        ],
        &serving(Negotiated {
            export: "the disk".to_owned(),
            info,
            contexts: contexts.into(),
            honours_block_size: true,
            ..negotiated(Extended)
        }),
    );
}

#[test]
fn without_asking_for_more() {
    check(
        "simple",
        // Without chunks there are no contexts, and nothing to ask.
        &with_contexts(Simple, &["base:allocation"]),
        &[greeting(), info_export(GO), ack(GO)],
        &[client_flags(), ask(GO, "disk")],
        &serving(negotiated(Simple)),
    );
    check(
        "structured",
        &wants(Structured),
        &[greeting(), ack(STRUCTURED_REPLY), info_export(GO), ack(GO)],
        &[client_flags(), option(STRUCTURED_REPLY, b""), ask(GO, "disk")],
        &serving(negotiated(Structured)),
    );
}

#[test]
fn styles_fall_back() {
    for refusal in [UNSUP, POLICY, INVALID, 0x8000_1234] {
        check(
            "to structured",
            &wants(Extended),
            &[
                greeting(),
                reply(EXTENDED_HEADERS, refusal, b"no"),
                ack(STRUCTURED_REPLY),
                info_export(GO),
                ack(GO),
            ],
            &[client_flags(), option(EXTENDED_HEADERS, b""), option(STRUCTURED_REPLY, b""), ask(GO, "disk")],
            &serving(negotiated(Structured)),
        );
        check(
            "to simple",
            &with_contexts(Extended, &["base:allocation"]),
            &[
                greeting(),
                reply(EXTENDED_HEADERS, refusal, b""),
                reply(STRUCTURED_REPLY, refusal, b""),
                info_export(GO),
                ack(GO),
            ],
            &[client_flags(), option(EXTENDED_HEADERS, b""), option(STRUCTURED_REPLY, b""), ask(GO, "disk")],
            &serving(negotiated(Simple)),
        );
    }
}

#[test]
fn contexts_fall_back() {
    for answer in [ack(SET_META_CONTEXT), reply(SET_META_CONTEXT, UNSUP, b"what?")] {
        check(
            "no contexts",
            &with_contexts(Structured, &["base:allocation"]),
            &[greeting(), ack(STRUCTURED_REPLY), answer, info_export(GO), ack(GO)],
            &[
                client_flags(),
                option(STRUCTURED_REPLY, b""),
                queries(SET_META_CONTEXT, "disk", &["base:allocation"]),
                ask(GO, "disk"),
            ],
            &serving(negotiated(Structured)),
        );
    }
    // An error after the first context: none of them counts.
    check(
        "half a selection",
        &with_contexts(Structured, &["base:allocation"]),
        &[
            greeting(),
            ack(STRUCTURED_REPLY),
            context(SET_META_CONTEXT, 0, "base:allocation"),
            reply(SET_META_CONTEXT, INVALID, b""),
            info_export(GO),
            ack(GO),
        ],
        &[
            client_flags(),
            option(STRUCTURED_REPLY, b""),
            queries(SET_META_CONTEXT, "disk", &["base:allocation"]),
            ask(GO, "disk"),
        ],
        &serving(negotiated(Structured)),
    );
}

#[test]
fn servers_without_go() {
    check(
        "fixed newstyle",
        &wants(Extended),
        &[
            greeting(),
            reply(EXTENDED_HEADERS, UNSUP, b""),
            reply(STRUCTURED_REPLY, UNSUP, b""),
            reply(GO, UNSUP, b""),
            size_and_flags(),
        ],
        &[
            client_flags(),
            option(EXTENDED_HEADERS, b""),
            option(STRUCTURED_REPLY, b""),
            ask(GO, "disk"),
            option(EXPORT_NAME, b"disk"),
        ],
        &serving(negotiated(Simple)),
    );
    let padded = [size_and_flags(), vec![0; 124]].concat();
    check(
        "with zeroes",
        &wants(Simple),
        &[b"NBDMAGICIHAVEOPT\0\x01".to_vec(), reply(GO, UNSUP, b""), padded.clone()],
        &[vec![0, 0, 0, 1], ask(GO, "disk"), option(EXPORT_NAME, b"disk")],
        &serving(Negotiated { client_flags: ClientFlags(1), ..negotiated(Simple) }),
    );
    for (flags, answer) in [(0, padded), (2, size_and_flags())] {
        check(
            "not even fixed newstyle",
            &with_contexts(Extended, &["base:allocation"]),
            &[[&b"NBDMAGICIHAVEOPT\0"[..], &[flags]].concat(), answer],
            &[vec![0, 0, 0, flags], option(EXPORT_NAME, b"disk")],
            &serving(Negotiated { client_flags: ClientFlags(flags.into()), ..negotiated(Simple) }),
        );
    }
    check(
        "extended headers forbid the old way",
        &wants(Extended),
        &[greeting(), ack(EXTENDED_HEADERS), reply(GO, UNSUP, b"")],
        &[client_flags(), option(EXTENDED_HEADERS, b""), ask(GO, "disk")],
        &Err(ClientError::Unsupported(OptionCode::Go)),
    );
}

#[test]
fn bits_of_the_greeting_that_nobody_knows() {
    check(
        "newer than us",
        &wants(Simple),
        &[b"NBDMAGICIHAVEOPT\xff\xff".to_vec(), info_export(GO), ack(GO)],
        &[client_flags(), ask(GO, "disk")],
        &serving(negotiated(Simple)),
    );
}

#[test]
fn refusals_of_the_export() {
    let refused = |kind| {
        let (option, kind, message) = (OptionCode::Go, OptReply::from_wire(kind), "no  why".to_owned());
        ClientError::Refused { option, kind, message }
    };
    let rows = [
        (UNKNOWN, ClientError::UnknownExport { name: "disk".to_owned(), message: "no  why".to_owned() }),
        (TLS_REQD, ClientError::TlsRequired),
        (POLICY, refused(POLICY)),
        (SHUTDOWN, refused(SHUTDOWN)),
        (0x8000_0008, refused(0x8000_0008)),
        (0xffff_ffff, refused(0xffff_ffff)),
    ];
    for (kind, error) in rows {
        check(
            "refused",
            &wants(Simple),
            // What a terminal would act on is not kept.
            &[greeting(), reply(GO, kind, b"no\x1b\nwhy")],
            &[client_flags(), ask(GO, "disk")],
            &Err(error),
        );
    }
}

#[test]
fn what_ends_every_option() {
    for kind in [TLS_REQD, SHUTDOWN] {
        let error = match kind {
            TLS_REQD => ClientError::TlsRequired,
            _ => ClientError::Refused {
                option: OptionCode::ExtendedHeaders,
                kind: OptReply::ErrShutdown,
                message: String::new(),
            },
        };
        check(
            "at the first option",
            &wants(Extended),
            &[greeting(), reply(EXTENDED_HEADERS, kind, b"")],
            &[client_flags(), option(EXTENDED_HEADERS, b"")],
            &Err(error),
        );
    }
}

#[test]
fn tls() {
    let wants = Wants { tls: true, ..wants(Extended) };
    let begun = [client_flags(), option(STARTTLS, b"")];
    check(
        "refused",
        &wants,
        &[greeting(), reply(STARTTLS, POLICY, b"no certificate")],
        &begun,
        &Err(ClientError::TlsRefused("no certificate".to_owned())),
    );
    let mut handshake = ClientHandshake::new(wants.clone());
    let mut out = Vec::new();
    let started = [greeting(), ack(STARTTLS)].concat();
    assert_eq!(handshake.advance(&started, &mut out), Ok((started.len(), ClientStep::StartTls)));
    assert_eq!(handshake.advance(b"", &mut out), Ok((0, ClientStep::StartTls)));
    assert_eq!(out, begun.concat());
    handshake.tls_started(&mut out);
    let rest = [ack(EXTENDED_HEADERS), info_export(GO), ack(GO)].concat();
    let (taken, step) = handshake.advance(&rest, &mut out).unwrap();
    assert_eq!(taken, rest.len());
    let expected = Negotiated { encrypted: true, ..negotiated(Extended) };
    assert_eq!(step, ClientStep::Transmission(expected));
    // The client flags are sent once.
    let sent = [&begun.concat()[..], &option(EXTENDED_HEADERS, b""), &ask(GO, "disk")].concat();
    assert_eq!(out, sent);

    // CVE-2021-3716, from the other side: an answer slipped in before TLS.
    for piece in [started.len(), started.len() + 1, started.len() + 20] {
        let slipped = [&started[..], &ack(EXTENDED_HEADERS)].concat();
        let mut handshake = ClientHandshake::new(wants.clone());
        let mut out = Vec::new();
        if handshake.advance(&slipped[..piece], &mut out).is_ok() {
            assert_eq!(handshake.advance(&slipped[piece..], &mut out), Err(ClientError::PlainBytes));
        }
        assert_eq!(handshake.hung_up(), ClientError::PlainBytes);
    }
}

#[test]
fn the_servers_next_bytes_are_left_alone() {
    for (name, answers) in [
        ("GO", [info_export(GO), ack(GO)].concat()),
        ("EXPORT_NAME", [reply(GO, UNSUP, b""), size_and_flags()].concat()),
    ] {
        let server = [&greeting()[..], &answers, b"rest"].concat();
        let (_, ending, left) = play(&wants(Simple), &server, Feed::Whole);
        assert_eq!((ending, left), (serving(negotiated(Simple)), 4), "{name}");
    }
}
