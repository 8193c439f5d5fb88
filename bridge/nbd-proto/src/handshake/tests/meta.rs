//! `LIST_META_CONTEXT` and `SET_META_CONTEXT`.

use super::*;

fn listed(id: u32, name: &str) -> Vec<u8> {
    reply(LIST_META_CONTEXT, 4, &[&id.to_be_bytes()[..], name.as_bytes()].concat())
}

fn selected(id: u32, name: &str) -> Vec<u8> {
    reply(SET_META_CONTEXT, 4, &[&id.to_be_bytes()[..], name.as_bytes()].concat())
}

/// A client that negotiates structured replies, sends `options`, and goes to `disk`.
fn structured(
    name: &'static str,
    options: &[Vec<u8>],
    server: &[Vec<u8>],
    contexts: Vec<MetaContext>,
) -> Case {
    let sent = [&[option(STRUCTURED_REPLY, b"")], options, &[option(GO, &ask(b"disk", &[]))]].concat();
    let server = [&[ack(STRUCTURED_REPLY)], server, &[disk(GO, DISK_FLAGS | 0x80)]].concat().concat();
    let negotiated = Negotiated { contexts, ..serving_disk(ReplyStyle::Structured) };
    case(name, client(3, &sent), server, Step::Transmission(negotiated))
}

#[test]
fn listing() {
    let all = || [listed(0, "base:allocation"), listed(0, "x-test:a:b"), listed(0, "x-test:c")].concat();
    let list = |query: &[&str]| vec![option(LIST_META_CONTEXT, &queries(b"disk", query))];
    let done = || ack(LIST_META_CONTEXT);
    check(vec![
        structured("all", &list(&[]), &[all(), done()], vec![]),
        structured("one", &list(&["base:allocation"]), &[listed(0, "base:allocation"), done()], vec![]),
        structured("wildcard", &list(&["base:"]), &[listed(0, "base:allocation"), done()], vec![]),
        structured(
            "two wildcards, each context once",
            &list(&["x-test:", "base:", "x-test:"]),
            &[all(), done()],
            vec![],
        ),
        structured("a colon in the leaf is no namespace", &list(&["x-test:a:"]), &[done()], vec![]),
        structured("unknown ones", &list(&["qemu:", "base:nope", "plain", "", ":"]), &[done()], vec![]),
    ]);
}

#[test]
fn selecting() {
    let set = |query: &[&str]| option(SET_META_CONTEXT, &queries(b"disk", query));
    let done = || ack(SET_META_CONTEXT);
    let base = || selected(0, "base:allocation");
    let has_base = || vec![context(0, "base:allocation")];
    check(vec![
        structured("none", &[set(&[])], &[done()], vec![]),
        structured("one", &[set(&["base:allocation"])], &[base(), done()], has_base()),
        structured("twice is once", &[set(&["base:allocation"; 3])], &[base(), done()], has_base()),
        structured("a wildcard selects nothing", &[set(&["base:", "x-test:"])], &[done()], vec![]),
        structured(
            "unknown ones",
            &[set(&["qemu:dirty-bitmap:x", "base:nope", "plain", ""])],
            &[done()],
            vec![],
        ),
        structured(
            "several, with the directory's ids",
            &[set(&["x-test:c", "base:allocation", "base:"])],
            &[base(), selected(2, "x-test:c"), done()],
            vec![context(0, "base:allocation"), context(2, "x-test:c")],
        ),
        structured(
            "the last one counts",
            &[set(&["base:allocation"]), set(&["x-test:c"])],
            &[base(), done(), selected(2, "x-test:c"), done()],
            vec![context(2, "x-test:c")],
        ),
        structured(
            "even an empty one",
            &[set(&["base:allocation"]), set(&[])],
            &[base(), done(), done()],
            vec![],
        ),
        structured(
            "listing leaves the selection alone",
            &[set(&["base:allocation"]), option(LIST_META_CONTEXT, &queries(b"ro", &["x-test:c"]))],
            &[base(), done(), ack(LIST_META_CONTEXT)],
            has_base(),
        ),
        structured(
            "by another name of the same export",
            &[option(SET_META_CONTEXT, &queries(b"", &["base:allocation"]))],
            &[base(), done()],
            has_base(),
        ),
        structured(
            "void for another export",
            &[option(SET_META_CONTEXT, &queries(b"ro", &["base:allocation"]))],
            &[base(), done()],
            vec![],
        ),
        structured(
            "INFO between leaves it alone",
            &[set(&["base:allocation"]), option(INFO, &ask(b"ro", &[]))],
            &[base(), done(), read_only(INFO, READ_ONLY_FLAGS | 0x80)],
            has_base(),
        ),
    ]);
}

/// A failure replaces the former selection, too.
#[test]
fn a_failure_selects_nothing() {
    let before = || vec![option(SET_META_CONTEXT, &queries(b"disk", &["base:allocation"]))];
    let answered = || vec![selected(0, "base:allocation"), ack(SET_META_CONTEXT)];
    let unknown = (0x8000_0006, "no export is called \"nope\"");
    let rows: [(&'static str, Vec<u8>, (u32, &str)); 13] = [
        ("unknown export", queries(b"nope", &["base:allocation"]), unknown),
        ("nothing", vec![], BAD_QUERIES),
        ("no count", counted(b"disk"), BAD_QUERIES),
        ("half a count", [counted(b"disk"), vec![0, 0]].concat(), BAD_QUERIES),
        ("a query less than counted", [counted(b"disk"), vec![0, 0, 0, 1]].concat(), BAD_QUERIES),
        ("many queries, none there", [counted(b"disk"), vec![0xff; 4]].concat(), BAD_QUERIES),
        ("a byte more", [queries(b"disk", &["base:allocation"]), vec![0]].concat(), BAD_QUERIES),
        ("name beyond the option", [vec![0, 0, 0, 5], b"disk".to_vec()].concat(), BAD_QUERIES),
        ("name of 4 GiB", [vec![0xff; 4], b"disk".to_vec()].concat(), BAD_QUERIES),
        (
            "query beyond the option",
            [counted(b"disk"), vec![0, 0, 0, 1, 0, 0, 0, 9], b"base:".to_vec()].concat(),
            BAD_QUERIES,
        ),
        (
            "query of 4 GiB",
            [counted(b"disk"), vec![0, 0, 0, 1], vec![0xff; 4], b"base:".to_vec()].concat(),
            BAD_QUERIES,
        ),
        ("query with NUL", queries(b"disk", &["base:\0"]), BAD_QUERIES),
        ("name with NUL", queries(b"di\0sk", &[]), BAD_QUERIES),
    ];
    for (name, data, refusal) in rows {
        let set = [before(), vec![option(SET_META_CONTEXT, &data)]].concat();
        let server = [answered(), vec![error(SET_META_CONTEXT, refusal)]].concat();
        check(vec![structured(name, &set, &server, vec![])]);
        // Listing refuses the same, and leaves the selection alone.
        let list = [before(), vec![option(LIST_META_CONTEXT, &data)]].concat();
        let server = [answered(), vec![error(LIST_META_CONTEXT, refusal)]].concat();
        check(vec![structured(name, &list, &server, vec![context(0, "base:allocation")])]);
    }
}

#[test]
fn too_much_data_selects_nothing() {
    let mut limited = structured(
        "too much",
        &[
            option(SET_META_CONTEXT, &queries(b"disk", &["base:allocation"])),
            option(SET_META_CONTEXT, &queries(b"disk", &["base:allocation", "base:allocation"])),
        ],
        &[selected(0, "base:allocation"), ack(SET_META_CONTEXT), error(SET_META_CONTEXT, TOO_MUCH)],
        vec![],
    );
    limited.limits.max_option_bytes = 40;
    check(vec![limited]);
}

#[test]
fn only_with_structured_replies() {
    let query = queries(b"disk", &["base:allocation"]);
    let both = [option(LIST_META_CONTEXT, &query), option(SET_META_CONTEXT, &query)];
    let refused = [error(LIST_META_CONTEXT, UNSTRUCTURED), error(SET_META_CONTEXT, UNSTRUCTURED)].concat();
    let go = option(GO, &ask(b"disk", &[]));
    check(vec![
        case(
            "never",
            client(3, &[both.concat(), go.clone()]),
            [refused, disk(GO, DISK_FLAGS)].concat(),
            Step::Transmission(serving_disk(ReplyStyle::Simple)),
        ),
        case(
            "with extended headers",
            client(3, &[option(EXTENDED_HEADERS, b""), both.concat(), go]),
            [
                ack(EXTENDED_HEADERS),
                listed(0, "base:allocation"),
                ack(LIST_META_CONTEXT),
                selected(0, "base:allocation"),
                ack(SET_META_CONTEXT),
                disk(GO, DISK_FLAGS | 0x80),
            ]
            .concat(),
            Step::Transmission(Negotiated {
                contexts: vec![context(0, "base:allocation")],
                ..serving_disk(ReplyStyle::Extended)
            }),
        ),
    ]);
}
