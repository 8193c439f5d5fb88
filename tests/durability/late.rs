//! Writes of a connection that was lost: they are done before the next connection of the same export is answered, so that
//! none lands on newer data.

use std::thread::sleep;
use std::time::{Duration, Instant};

use nbd_proto::{Command, CommandFlags, ReplyStyle};
use rustix::process::Signal;

use crate::support::{NO_FLAGS, Server};

/// Writes that touch the second page are late by this.
const LATE: Duration = Duration::from_millis(1500);

fn server(more: &[&str]) -> Server {
    Server::serve(
        &[&["mem:8M", "--fault", "op=write,delay-ms=1500,delay-rate=1,offset=4k,len=4k"], more].concat(),
    )
}

#[test]
fn a_late_write_of_a_lost_connection_does_not_land_on_newer_data() {
    for (len, flags) in [(8192, NO_FLAGS), (8192, CommandFlags::FUA), (2 << 20, NO_FLAGS)] {
        let server = server(&["--workers", "2"]);
        let mut lost = server.client(ReplyStyle::Structured);
        lost.ask_write(flags, 0, &vec![1; len]);
        // It is taken in, and waits.
        sleep(Duration::from_millis(300));
        drop(lost);

        let mut next = server.client(ReplyStyle::Structured);
        next.write(0, &[2; 4096]);
        sleep(LATE);
        assert!(next.read(0, 4096) == [2; 4096], "{len} {flags:?}: the older write came last");
        assert!(next.read(4096, 4096) == [1; 4096], "{len} {flags:?}: the older write was done");
    }
}

#[test]
fn a_client_that_is_there_makes_nobody_wait() {
    let server = server(&[]);
    let mut busy = server.client(ReplyStyle::Structured);
    let cookie = busy.ask_write(NO_FLAGS, 0, &[1; 8192]);
    sleep(Duration::from_millis(100));
    let begun = Instant::now();
    let mut next = server.client(ReplyStyle::Structured);
    assert_eq!(next.call(Command::Read, NO_FLAGS, 1 << 20, 4096).error, None);
    assert!(begun.elapsed() < LATE - Duration::from_millis(300), "it waited for another client");
    assert_eq!(busy.answer().cookie, cookie);
}

/// A storage that hangs keeps new clients off for as long as a handshake may take, and the end of the server not at all.
#[test]
fn a_change_that_hangs_is_not_waited_for_without_limit() {
    let server = Server::serve(&[
        "mem:8M",
        "--fault",
        "op=write,hang-every=1,offset=4k,len=4k",
        "--handshake-limit",
        "1s",
        "--drain-timeout",
        "1s",
    ]);
    let mut lost = server.client(ReplyStyle::Structured);
    lost.ask_write(NO_FLAGS, 0, &[1; 8192]);
    sleep(Duration::from_millis(200));
    drop(lost);
    let mut next = server.client(ReplyStyle::Structured);
    next.ask(Command::Read, NO_FLAGS, 0, 4096);
    assert!(next.answer_or_end().is_none(), "answered before the older write is done");
    server.signal(Signal::TERM);
    let mut server = server;
    assert!(server.wait(Duration::from_secs(20)).is_some(), "it does not end");
}
