//! Choosing an export: `EXPORT_NAME`, `INFO`, `GO`, and `LIST` and `ABORT` beside them.

use super::*;

#[test]
fn export_name() {
    let answer = [&DISK_SIZE.to_be_bytes()[..], &DISK_FLAGS.to_be_bytes()].concat();
    let padded = [&answer[..], &[0; 124]].concat();
    let serving = |flags| {
        Step::Transmission(Negotiated {
            client_flags: ClientFlags(flags),
            ..serving_disk(ReplyStyle::Simple)
        })
    };
    let name = option(EXPORT_NAME, b"disk");
    let unknown = closed(CloseReason::UnknownExport("nope".to_owned()));
    let bad = closed(CloseReason::BadExportName);
    let mut with_rest =
        case("rest", client(3, &[name.clone(), b"rest".to_vec()]), answer.clone(), serving(3));
    with_rest.unused = 4;
    check(vec![
        case("no zeroes", client(3, std::slice::from_ref(&name)), answer.clone(), serving(3)),
        case("padding", client(1, std::slice::from_ref(&name)), padded.clone(), serving(1)),
        case("newstyle", client(0, std::slice::from_ref(&name)), padded, serving(0)),
        case("newstyle, no zeroes", client(2, &[name]), answer.clone(), serving(2)),
        case("default export", client(3, &[option(EXPORT_NAME, b"")]), answer, serving(3)),
        case("unknown", client(3, &[option(EXPORT_NAME, b"nope")]), vec![], unknown),
        case("NUL", client(3, &[option(EXPORT_NAME, b"di\0sk")]), vec![], bad.clone()),
        case("not UTF-8", client(3, &[option(EXPORT_NAME, b"\xff")]), vec![], bad.clone()),
        // CVE-2022-26495, CVE-2017-15118: refused by the length alone.
        case("too long", client(3, &[claim(EXPORT_NAME, 4097, b"")]), vec![], bad.clone()),
        case("far too long", client(3, &[claim(EXPORT_NAME, u32::MAX, b"")]), vec![], bad),
        with_rest,
    ]);
}

#[test]
fn export_name_with_structured_replies_offers_df() {
    let answer = [&DISK_SIZE.to_be_bytes()[..], &(DISK_FLAGS | 0x80).to_be_bytes()].concat();
    check(vec![
        case(
            "structured",
            client(3, &[option(STRUCTURED_REPLY, b""), option(EXPORT_NAME, b"disk")]),
            [ack(STRUCTURED_REPLY), answer].concat(),
            Step::Transmission(serving_disk(ReplyStyle::Structured)),
        ),
        Case {
            unused: 4,
            ..case(
                "extended headers forbid it",
                client(3, &[option(EXTENDED_HEADERS, b""), option(EXPORT_NAME, b"disk")]),
                ack(EXTENDED_HEADERS),
                closed(CloseReason::ExtendedExportName),
            )
        },
    ]);
}

#[test]
fn a_name_of_4096_bytes_is_well_formed() {
    let name = "n".repeat(4096);
    let mut one = case("", client(3, &[option(EXPORT_NAME, name.as_bytes())]), vec![], Step::NeedMore);
    let (sent, end, _) = play(&one, Feed::Whole);
    assert_eq!((sent, end), (greeting(), closed(CloseReason::UnknownExport(name.clone()))));

    // CVE-2020-10761 (qemu): the name comes back in the text, which must not grow over the limit.
    one.client = vec![client(3, &[option(INFO, &ask(name.as_bytes(), &[]))])];
    let (sent, end, _) = play(&one, Feed::Whole);
    assert_eq!(end, Step::NeedMore);
    assert_eq!(sent.len(), 18 + 20 + 4096);
    assert_eq!(sent[18 + 12..18 + 16], 0x8000_0006_u32.to_be_bytes());
}

#[test]
fn info_and_go() {
    let serving = Step::Transmission(serving_disk(ReplyStyle::Simple));
    let full = |option| {
        [
            info_export(option, DISK_SIZE, DISK_FLAGS),
            reply(option, 3, b"\0\x01disk"),
            reply(option, 3, b"\0\x02a disk"),
            info_block_size(option, 1, 4096, 32 << 20),
            ack(option),
        ]
        .concat()
    };
    let asked = Negotiated { honours_block_size: true, ..serving_disk(ReplyStyle::Simple) };
    let asked_ro = Negotiated { honours_block_size: true, ..self::serving("ro", ReplyStyle::Simple) };
    let everything = ask(b"", &[0, 1, 2, 3, 3, 0, 77]);
    let unknown = (0x8000_0006, "no export is called \"nope\"");
    let mut with_rest = case(
        "rest",
        client(3, &[option(GO, &ask(b"disk", &[])), vec![9; 28]]),
        disk(GO, DISK_FLAGS),
        serving.clone(),
    );
    with_rest.unused = 28;
    check(vec![
        case("info", client(3, &[option(INFO, &ask(b"disk", &[]))]), disk(INFO, DISK_FLAGS), Step::NeedMore),
        case("go", client(3, &[option(GO, &ask(b"disk", &[]))]), disk(GO, DISK_FLAGS), serving.clone()),
        case(
            "default export",
            client(3, &[option(GO, &ask(b"", &[]))]),
            disk(GO, DISK_FLAGS),
            serving.clone(),
        ),
        case(
            "GO never pads",
            client(1, &[option(GO, &ask(b"", &[]))]),
            disk(GO, DISK_FLAGS),
            Step::Transmission(Negotiated {
                client_flags: ClientFlags(1),
                ..serving_disk(ReplyStyle::Simple)
            }),
        ),
        case(
            "everything, some twice, some unknown; and INFO agrees with GO",
            client(3, &[option(INFO, &everything), option(GO, &everything)]),
            [full(INFO), full(GO)].concat(),
            Step::Transmission(asked),
        ),
        case(
            "no description",
            client(3, &[option(GO, &ask(b"ro", &[2, 3]))]),
            read_only(GO, READ_ONLY_FLAGS),
            Step::Transmission(asked_ro),
        ),
        case(
            "unknown, and then known",
            client(
                3,
                &[
                    option(INFO, &ask(b"nope", &[])),
                    option(GO, &ask(b"nope", &[])),
                    option(GO, &ask(b"", &[])),
                ],
            ),
            [error(INFO, unknown), error(GO, unknown), disk(GO, DISK_FLAGS)].concat(),
            serving,
        ),
        with_rest,
    ]);
}

#[test]
fn malformed_info_and_go() {
    // Each with its name; the handshake goes on after each.
    let rows: [(&'static str, Vec<u8>); 13] = [
        ("nothing", vec![]),
        ("half a length", vec![0, 0]),
        ("no count", counted(b"disk")),
        ("half a count", [counted(b"disk"), vec![0]].concat()),
        ("a request less than counted", [counted(b"disk"), vec![0, 1]].concat()),
        ("half a request", [counted(b"disk"), vec![0, 1, 0]].concat()),
        ("a request more than counted", [counted(b"disk"), vec![0, 0, 0, 3]].concat()),
        ("a byte more", [ask(b"disk", &[3]), vec![0]].concat()),
        ("many requests, none there", [counted(b"disk"), vec![0xff, 0xff]].concat()),
        // CVE-2022-26496 (nbd-server): the name is longer than the option; CVE-2022-26495: and wraps around.
        ("name beyond the option", [vec![0, 0, 0, 5], b"disk".to_vec()].concat()),
        ("name of 4 GiB", [vec![0xff; 4], b"disk\0\0".to_vec()].concat()),
        ("name with NUL", ask(b"di\0sk", &[])),
        ("name not UTF-8", ask(b"\xc3\x28", &[])),
    ];
    for (name, data) in rows {
        for code in [INFO, GO] {
            check(vec![case(
                name,
                client(3, &[option(code, &data), option(GO, &ask(b"disk", &[]))]),
                [error(code, BAD_REQUESTS), disk(GO, DISK_FLAGS)].concat(),
                Step::Transmission(serving_disk(ReplyStyle::Simple)),
            )]);
        }
    }
    let long = "n".repeat(4097);
    let long = case("", client(3, &[option(GO, &ask(long.as_bytes(), &[]))]), vec![], Step::NeedMore);
    let (sent, end, _) = play(&long, Feed::Whole);
    assert_eq!((sent, end), ([greeting(), error(GO, BAD_REQUESTS)].concat(), Step::NeedMore));
}

#[test]
fn list_and_abort() {
    let server =
        |name: &str, rest: &str| reply(LIST, 2, &[&counted(name.as_bytes())[..], rest.as_bytes()].concat());
    let listed = [server("disk", "a disk"), server("ro", ""), ack(LIST)].concat();
    let aborted = closed(CloseReason::Abort);
    check(vec![
        // Names that are no protocol strings are left out.
        case("list", client(3, &[option(LIST, b"")]), listed.clone(), Step::NeedMore),
        case("list with data", client(3, &[option(LIST, b"x")]), error(LIST, HAS_DATA), Step::NeedMore),
        case(
            "list and abort",
            client(1, &[option(LIST, b""), option(ABORT, b"")]),
            [listed, ack(ABORT)].concat(),
            aborted.clone(),
        ),
        case("abort with data", client(3, &[option(ABORT, b"why not")]), ack(ABORT), aborted.clone()),
        Case {
            unused: 3,
            ..case("after abort", client(3, &[option(ABORT, b""), vec![1, 2, 3]]), ack(ABORT), aborted)
        },
    ]);
}
