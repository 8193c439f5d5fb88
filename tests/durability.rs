//! What was flushed, or written with FUA, is in the file whatever happens to the server; and an end in good order
//! loses nothing. A crash of the process is what can be made here; one of the host is simulated by the crash
//! backend, in the library's own tests.

// Clippy's exception for tests does not reach their helpers.
#![allow(clippy::unwrap_used)]

#[path = "durability/late.rs"]
mod late;
#[path = "durability/passing.rs"]
mod passing;
mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use nbd_proto::{Command, CommandFlags, ReplyStyle};
use rustix::process::Signal;
use support::{NO_FLAGS, Random, STYLES, Server, text};

const SIZE: usize = 8 << 20;

fn image(folder: &Path) -> PathBuf {
    let path = folder.join("disk.img");
    fs::write(&path, vec![0; SIZE]).unwrap();
    path
}

#[test]
fn what_was_promised_survives_a_kill() {
    let mut random = Random::new(0x5eed_4001);
    for (place, flags) in [
        ("/dev/shm", &[][..]),
        ("/var/tmp", &[]),
        ("/var/tmp", &["--cache", "none"]),
        ("/var/tmp", &["--aio", "threads"]),
        ("/var/tmp", &["--cache", "writethrough"]),
    ] {
        let folder = tempfile::tempdir_in(place).unwrap();
        let path = image(folder.path());
        let mut model = vec![0; SIZE];
        for style in STYLES {
            let mut server = restart(&[&[text(&path)], flags].concat());
            let mut client = server.client(style);
            for round in 0..12 {
                let page = random.index(SIZE / 4096 - 400);
                let length = 4096 * (1 + random.index(if round % 4 == 0 { 400 } else { 8 }));
                let (start, data) = (page * 4096, random.bytes(length));
                // By FUA, or by a flush; zeroes and trims change the file too.
                let fua = if round % 2 == 0 { CommandFlags::FUA } else { NO_FLAGS };
                assert_eq!(client.call_write(fua, start as u64, &data).error, None);
                model[start..start + length].copy_from_slice(&data);
                if round % 3 == 0 {
                    let answer = client.call(Command::WriteZeroes, fua, start as u64, 4096);
                    assert_eq!(answer.error, None);
                    model[start..start + 4096].fill(0);
                }
                if fua == NO_FLAGS {
                    client.flush();
                }
            }
            // Something unfinished besides, beyond what is compared.
            client.ask_write(NO_FLAGS, 0, &data_in_flight(&model));
            server.signal(Signal::KILL);
            server.wait(Duration::from_secs(10)).unwrap();
            assert!(fs::read(&path).unwrap() == model, "{place} {flags:?} {style:?}");
        }
    }
}

/// After a kill the kernel may take a moment to let go of the image, and of its locks with it.
fn restart(args: &[&str]) -> Server {
    let start = Instant::now();
    loop {
        match Server::try_serve(args) {
            Ok(server) => return server,
            Err(log) => assert!(log.contains("in use") && start.elapsed() < Duration::from_secs(5), "{log}"),
        }
    }
}

/// A write of what is there already: done or not, in part or whole, it changes nothing.
fn data_in_flight(model: &[u8]) -> Vec<u8> {
    model[..1 << 20].to_vec()
}

#[test]
fn a_server_after_a_kill_serves_the_same_socket_and_image() {
    let folder = tempfile::tempdir().unwrap();
    let (path, socket) = (image(folder.path()), folder.path().join("sock"));
    for round in 1..4_u8 {
        // The socket of the killed one lies about, and its locks are gone.
        let command = &mut support::net(&[text(&path), "-k", text(&socket)]);
        let mut server = Server::start(command, 1);
        assert_eq!(server.lines.len(), 1, "round {round}");
        let stream = support::Stream::unix(&socket).unwrap();
        let mut client = support::Negotiation::begin(stream).enter(ReplyStyle::Structured, "");
        assert_eq!(client.read(0, 1), [round - 1]);
        assert_eq!(client.call_write(CommandFlags::FUA, 0, &[round]).error, None);
        server.signal(Signal::KILL);
        server.wait(Duration::from_secs(10)).unwrap();
        assert!(client.answer_or_end().is_none());
    }
}

/// A supervisor restarts what crashed at once.
#[test]
fn a_restart_at_once_after_a_kill_with_writes_in_flight() {
    let folder = tempfile::tempdir_in("/var/tmp").unwrap();
    let path = image(folder.path());
    for _ in 0..8 {
        // A ring that is torn down holds the image, and its locks, a moment longer than the process lives.
        let mut server = Server::serve(&[text(&path), "--cache", "none"]);
        let mut client = server.client(ReplyStyle::Structured);
        for n in 0..4 {
            client.ask_write(CommandFlags::FUA, n << 20, &[1; 1 << 20]);
        }
        server.signal(Signal::KILL);
        server.wait(Duration::from_secs(10)).unwrap();
    }
}

#[test]
fn the_end_in_good_order_loses_nothing() {
    for flags in [&[][..], &["--fault", "op=write,delay-ms=150,delay-rate=0.5,seed=9"]] {
        let folder = tempfile::tempdir_in("/var/tmp").unwrap();
        let path = image(folder.path());
        let mut server = Server::serve(&[&[text(&path)], flags].concat());
        let writers: Vec<_> = STYLES
            .into_iter()
            .enumerate()
            .map(|(n, style)| {
                let mut client = server.client(style);
                // Each has its own places in the image. It writes until it is told to stop, without a flush.
                thread::spawn(move || {
                    let mut done = Vec::new();
                    let mut places = std::collections::HashMap::new();
                    for slot in 0..16 {
                        let (start, byte) = ((slot * 3 + n) * 65536, u8::try_from(slot + 1).unwrap());
                        let cookie = client.ask_write(NO_FLAGS, start as u64, &[byte; 65536]);
                        places.insert(cookie, (start, byte));
                    }
                    while let Some(answer) = client.answer_or_end() {
                        if answer.error.is_none() {
                            done.push(places[&answer.cookie]);
                        }
                    }
                    done
                })
            })
            .collect();
        thread::sleep(Duration::from_millis(60));
        server.signal(Signal::TERM);
        let status = server.wait(Duration::from_secs(20)).unwrap();
        assert_eq!(status.code(), Some(0), "{}", server.log());
        let file = fs::read(&path).unwrap();
        let mut answered = 0;
        for (start, byte) in writers.into_iter().flat_map(|writer| writer.join().unwrap()) {
            assert!(file[start..start + 65536] == [byte; 65536], "an answered write at {start} is lost");
            answered += 1;
        }
        assert_eq!(answered, 48, "what was in flight is finished");
    }
}

/// An error of the disk is told once it is known, and again for every later flush: nobody may think it is stored.
#[test]
fn a_failed_flush_is_told_and_the_end_says_so() {
    let folder = tempfile::tempdir_in("/var/tmp").unwrap();
    let path = image(folder.path());
    let mut server = Server::serve(&[text(&path), "--fault", "op=flush,errno=EIO,error-every=1"]);
    let mut client = server.client(ReplyStyle::Structured);
    client.write(0, &[1; 4096]);
    for _ in 0..3 {
        let answer = client.call(Command::Flush, NO_FLAGS, 0, 0);
        assert_eq!(answer.error, Some(nbd_proto::NbdError::Io));
        assert_eq!(client.read(0, 4096), [1; 4096]);
    }
    server.signal(Signal::TERM);
    let status = server.wait(Duration::from_secs(10)).unwrap();
    assert_eq!(status.code(), Some(1), "an end without its flush is no success");
    assert!(server.log().contains("flush"), "{}", server.log());
}
