//! How much memory the server takes: idle, with many idle clients, and with clients who ask for all they can and
//! read nothing.
//!
//! The limits are those of a release build. A debug build has larger code and tables, and gets half as much again;
//! what clients can make it hold on top is the same in both.

// Clippy's exception for tests does not reach their helpers.
#![allow(clippy::unwrap_used)]

#[path = "memory/images.rs"]
mod images;
mod support;

use std::io::Write;
use std::time::{Duration, Instant};

use nbd_proto::{Command, ReplyStyle, Request};
use support::{Client, NO_FLAGS, STYLES, Server, Stream, text};

const MIB: u64 = 1 << 20;

fn limit(release: u64) -> u64 {
    if cfg!(debug_assertions) { release * 3 / 2 } else { release }
}

#[test]
fn idle() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.img");
    let server = Server::serve(&[text(&path), "--create", "1G", "-p", "0"]);
    server.assert_alive();
    let resident = server.resident();
    assert!(resident < limit(16 * MIB), "{} KiB", resident >> 10);
}

#[test]
fn a_thousand_idle_clients() {
    let server = Server::serve(&["mem:1G", "-p", "0"]);
    let mut clients: Vec<Client> = (0..1000)
        .map(|n| match n % 4 {
            3 => support::Negotiation::begin(Stream::tcp(server.address()).unwrap())
                .enter(ReplyStyle::Structured, ""),
            n => server.client(STYLES[n]),
        })
        .collect();
    // Each has been busy once, with more than what a connection keeps for nothing.
    for client in &mut clients {
        let cookies = [
            client.ask(Command::Read, NO_FLAGS, 0, 100_000),
            client.ask(Command::Read, NO_FLAGS, 0, 300_000),
            client.ask_write(NO_FLAGS, 0, &[0; 50_000]),
        ];
        cookies.iter().for_each(|_| assert_eq!(client.answer().error, None));
    }
    let start = Instant::now();
    while server.resident() >= limit(64 * MIB) {
        assert!(start.elapsed() < Duration::from_secs(3), "{} KiB", server.resident() >> 10);
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(clients[999].read(0, 512), [0; 512]);
}

/// The most that the server has resident while `clients` each leave their answers unread.
fn peak_of_greed(server: &Server, clients: usize) -> u64 {
    let mut greedy: Vec<Client> = (0..clients).map(|n| server.client(STYLES[n % 3])).collect();
    let mut peak = 0;
    for client in &mut greedy {
        let read = client.request(Command::Read, NO_FLAGS, 0, MIB);
        let mut bytes = Vec::new();
        for cookie in 0..128 {
            Request { cookie, offset: cookie % 32 * MIB, ..read }.encode(client.style.extended(), &mut bytes);
        }
        client.stream.write_all(&bytes).unwrap();
        peak = peak.max(server.resident());
    }
    let start = Instant::now();
    while start.elapsed() < Duration::from_millis(700) {
        peak = peak.max(server.resident());
        std::thread::sleep(Duration::from_millis(5));
    }
    peak
}

#[test]
fn sixty_four_clients_that_leave_their_reads_unread() {
    for source in ["memory", "file", "late"] {
        let folder = tempfile::tempdir_in("/var/tmp").unwrap();
        let path = folder.path().join("disk.img");
        std::fs::write(&path, vec![0xcd; 32 << 20]).unwrap();
        let args = match source {
            "memory" => vec!["mem:32M"],
            "file" => vec![text(&path), "--cache", "none"],
            _ => vec![text(&path), "--fault", "op=read,delay-ms=1,delay-rate=1"],
        };
        let server = Server::serve(&[&args[..], &["--memory-budget", "128M"]].concat());
        if source == "memory" {
            server.client(ReplyStyle::Simple).write(0, &vec![0xcd; 32 << 20]);
        }
        let before = server.resident();
        let peak = peak_of_greed(&server, 64);
        let cost = peak - before;
        assert!(cost < 160 * MIB, "{source}: {} MiB with a budget of 128 MiB", cost >> 20);
        server.stop_within(Duration::from_secs(20));
    }
}

#[test]
fn memory_comes_back_after_a_burst() {
    let server = Server::serve(&["mem:64M"]);
    server.client(ReplyStyle::Simple).write(0, &vec![0xcd; 32 << 20]);
    for round in 0..3 {
        let clients: Vec<Client> = (0..12)
            .map(|n| {
                let mut client = server.client(STYLES[n % 3]);
                for cookie in 0..16 {
                    client.ask(Command::Read, NO_FLAGS, cookie * MIB, 2 * MIB);
                }
                client
            })
            .collect();
        std::thread::sleep(Duration::from_millis(200));
        drop(clients);
        // What the disk itself holds is half of that limit.
        let start = Instant::now();
        while server.resident() > limit(80 * MIB) {
            assert!(
                start.elapsed() < Duration::from_secs(3),
                "round {round}: {} MiB",
                server.resident() >> 20
            );
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}
