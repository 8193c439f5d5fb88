//! How the server ends: what is in flight is finished, what waits for nothing does not delay it, and how many
//! clients it takes before.

// Clippy's exception for tests does not reach their helpers.
#![allow(clippy::unwrap_used)]

mod support;

use std::io::Read;
use std::time::{Duration, Instant};

use nbd_proto::{Command, OptReply, OptionCode, ReplyStyle};
use rustix::process::Signal;
use support::{NO_FLAGS, STYLES, Server, Stream, eventually, go_data};

const SECOND: Duration = Duration::from_secs(1);

#[test]
fn idle_clients_do_not_delay_it() {
    for signal in [Signal::TERM, Signal::INT] {
        let mut server = Server::serve(&["mem:1M", "-p", "0"]);
        let (silent, greeted) = (server.stream(), server.negotiate());
        let mut clients: Vec<_> = STYLES.iter().map(|style| server.client(*style)).collect();
        let start = Instant::now();
        server.signal(signal);
        assert_eq!(server.wait(10 * SECOND).unwrap().code(), Some(0));
        assert!(start.elapsed() < SECOND, "{:?}", start.elapsed());
        assert!(clients.iter_mut().all(|client| client.answer_or_end().is_none()));
        assert!(!server.socket().exists());
        drop((silent, greeted));
    }
}

#[test]
fn what_is_in_flight_is_finished() {
    let mut server = Server::serve(&["mem:8M", "--fault", "delay-ms=500,delay-rate=1"]);
    let mut clients: Vec<_> = STYLES.iter().map(|style| server.client(*style)).collect();
    let asked: Vec<Vec<u64>> = clients
        .iter_mut()
        .map(|client| {
            let mut cookies: Vec<u64> =
                (0..20).map(|n| client.ask(Command::Read, NO_FLAGS, n * 4096, 200_000)).collect();
            cookies.push(client.ask_write(NO_FLAGS, 0, &[1; 100]));
            cookies.push(client.ask_write(NO_FLAGS, 0, &[1; 1 << 20]));
            cookies.push(client.ask(Command::Flush, NO_FLAGS, 0, 0));
            cookies
        })
        .collect();
    // All are taken in when the last payload has gone.
    std::thread::sleep(Duration::from_millis(250));
    let start = Instant::now();
    server.signal(Signal::TERM);
    for (client, asked) in clients.iter_mut().zip(&asked) {
        let mut answered = Vec::new();
        while let Some(answer) = client.answer_or_end() {
            assert_eq!(answer.error, None);
            answered.push(answer.cookie);
        }
        answered.sort_unstable();
        assert_eq!(&answered, asked, "{:?}", client.style);
    }
    assert_eq!(server.wait(10 * SECOND).unwrap().code(), Some(0));
    assert!(start.elapsed() < 4 * SECOND);
}

#[test]
fn a_request_that_hangs_is_abandoned() {
    let mut server =
        Server::serve(&["mem:1M", "--drain-timeout", "700ms", "--fault", "op=read,hang-every=1"]);
    let mut client = server.client(ReplyStyle::Structured);
    client.ask(Command::Read, NO_FLAGS, 0, 512);
    client.write(0, &[1; 512]);
    let start = Instant::now();
    server.signal(Signal::TERM);
    let status = server.wait(10 * SECOND).expect("the hanging request keeps the server");
    assert!(start.elapsed() > Duration::from_millis(600), "it did not wait: {:?}", start.elapsed());
    assert!(start.elapsed() < 4 * SECOND, "{:?}", start.elapsed());
    assert_eq!(status.code(), Some(0), "{}", server.log());
    assert!(client.answer_or_end().is_none());
}

#[test]
fn a_client_that_does_not_read_is_abandoned() {
    let mut server = Server::serve(&["mem:64M", "--drain-timeout", "700ms"]);
    for style in STYLES {
        let mut client = server.client(style);
        client.write(0, &vec![1; 32 << 20]);
    }
    let mut clients: Vec<_> = STYLES.iter().map(|style| server.client(*style)).collect();
    for client in &mut clients {
        client.ask(Command::Read, NO_FLAGS, 0, 32 << 20);
    }
    std::thread::sleep(Duration::from_millis(200));
    let start = Instant::now();
    server.signal(Signal::TERM);
    assert!(server.wait(10 * SECOND).is_some());
    assert!(start.elapsed() < 4 * SECOND, "{:?}", start.elapsed());
}

#[test]
fn a_second_signal_ends_it_at_once() {
    let mut server = Server::serve(&["mem:1M", "--fault", "op=read,hang-every=1"]);
    let mut client = server.client(ReplyStyle::Structured);
    client.ask(Command::Read, NO_FLAGS, 0, 512);
    client.write(0, &[1; 512]);
    server.signal(Signal::TERM);
    // It drains now, for ten seconds if nobody hurries it; no new client is let in.
    eventually("it stops listening", || Stream::unix(&server.socket()).is_err());
    // Less than two seconds after the first, it would be the same.
    std::thread::sleep(Duration::from_millis(2300));
    assert!(server.is_running());
    let start = Instant::now();
    server.signal(Signal::TERM);
    assert!(server.wait(5 * SECOND).is_some(), "the second signal does nothing");
    assert!(start.elapsed() < 3 * SECOND, "{:?}", start.elapsed());
}

#[test]
fn a_handshake_in_the_drain_is_refused() {
    let mut server = Server::serve(&["mem:1M", "--fault", "op=read,delay-ms=800,delay-rate=1"]);
    let mut client = server.client(ReplyStyle::Structured);
    client.ask(Command::Read, NO_FLAGS, 0, 512);
    let mut half = server.negotiate();
    std::thread::sleep(Duration::from_millis(100));
    server.signal(Signal::TERM);
    // What it sends around the signal is refused or falls on a closed connection; nobody gets in.
    let _ = half.option_or_end(OptionCode::Info, &go_data("", &[]));
    std::thread::sleep(Duration::from_millis(50));
    let verdict = half.option_or_end(OptionCode::Go, &go_data("", &[]));
    assert!(matches!(verdict, None | Some(OptReply::ErrShutdown)), "{verdict:?}");
    assert_eq!(client.answer().error, None);
    assert_eq!(server.wait(10 * SECOND).unwrap().code(), Some(0));
}

#[test]
fn once_ends_with_the_last_client() {
    let mut server = Server::serve(&["mem:1M", "--once"]);
    let mut first = server.client(ReplyStyle::Simple);
    let mut second = server.client(ReplyStyle::Structured);
    first.write(0, &[1; 512]);
    first.disconnect();
    assert!(first.answer_or_end().is_none());
    std::thread::sleep(Duration::from_millis(200));
    assert!(server.is_running(), "a client is still there");
    assert_eq!(second.read(0, 512), [1; 512]);
    second.disconnect();
    assert_eq!(server.wait(10 * SECOND).expect("it goes on").code(), Some(0));
}

#[test]
fn as_many_clients_as_allowed() {
    let server = Server::serve(&["mem:1M", "-e", "2"]);
    let mut first = server.client(ReplyStyle::Simple);
    let second = server.client(ReplyStyle::Structured);
    let mut third = server.stream();
    third.limit(Duration::from_millis(300));
    assert!(third.read(&mut [0; 18]).is_err(), "the third waits, unanswered");
    assert_eq!(first.read(0, 512), [0; 512]);
    third.limit(support::LIMIT);
    drop(second);
    let mut third = support::Negotiation::begin(third).enter(ReplyStyle::Extended, "");
    assert_eq!(third.read(0, 512), [0; 512]);
    server.stop();
}
