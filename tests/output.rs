//! What reaches a terminal, and a log that cannot be written.

// Clippy's exception for tests does not reach their helpers.
#![allow(clippy::unwrap_used)]

mod support;

#[path = "output/result.rs"]
mod result;

use std::fs::{self, File};
use std::io::{Read, Write};
use std::process::{Command, Stdio};
use std::time::Duration;

use nbd_proto::ReplyStyle;
use rustix::process::Signal;
use support::{CONTROL_FOLDER, LIMIT, PROGRAM, Server, eventually, need, net, run, text};

/// No byte of it moves a cursor or changes a colour.
fn assert_harmless(output: &[u8]) {
    let said = String::from_utf8_lossy(output);
    assert!(!said.chars().any(|c| c.is_control() && c != '\n'), "{said:?}");
}

/// A server in a folder of its own, whose stderr is `log`; with a line for each client.
fn logging_to(folder: &std::path::Path, log: Stdio) -> Server {
    let socket = folder.join("sock");
    let mut command = net(&["mem:1M", "-k", text(&socket), "-v"]);
    Server::start(command.env(CONTROL_FOLDER, folder.join("control")).stderr(log), 1)
}

fn client_of(folder: &std::path::Path) -> support::Client {
    let stream = support::Stream::unix(&folder.join("sock")).unwrap();
    support::Negotiation::begin(stream).enter(ReplyStyle::Structured, "")
}

#[test]
fn a_log_on_a_full_disk_or_a_closed_pipe_ends_nothing() {
    let (reader, closed) = std::io::pipe().unwrap();
    drop(reader);
    let full = File::options().write(true).open("/dev/full").unwrap();
    for log in [Stdio::from(full), Stdio::from(closed)] {
        let folder = tempfile::tempdir().unwrap();
        let mut server = logging_to(folder.path(), log);
        for n in 0..4 {
            let mut client = client_of(folder.path());
            client.write(n * 512, &[7; 512]);
            assert_eq!(client.read(n * 512, 512), [7; 512]);
        }
        assert!(server.is_running());
        server.stop();
    }
}

#[test]
fn a_log_that_nobody_reads_blocks_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let (mut reader, mut writer) = std::io::pipe().unwrap();
    // Full before the first line.
    let size = rustix::pipe::fcntl_setpipe_size(&writer, 4096).unwrap();
    writer.write_all(&vec![b'.'; size]).unwrap();
    let server = logging_to(folder.path(), writer.into());
    for n in 0..8 {
        assert_eq!(client_of(folder.path()).read(n * 512, 512), [0; 512]);
    }
    // Read on, the log tells what is missing.
    let reading = std::thread::spawn(move || {
        let mut said = String::new();
        reader.read_to_string(&mut said).unwrap();
        said
    });
    std::thread::sleep(Duration::from_millis(300));
    drop(client_of(folder.path()));
    std::thread::sleep(Duration::from_millis(300));
    server.stop();
    let said = reading.join().unwrap();
    assert!(said.contains("lines before this one could not be written and are lost"), "{said}");
}

/// A command whose errors cannot be written still tells by its status.
#[test]
fn an_error_that_cannot_be_written_keeps_its_status() {
    for (words, status) in [(&["info", "/nowhere"][..], 1), (&["net"], 2), (&["ps"], 0), (&["devices"], 0)] {
        let full = || File::options().write(true).open("/dev/full").unwrap();
        let folder = tempfile::tempdir().unwrap();
        let mut command = Command::new(PROGRAM);
        command.args(words).stdin(Stdio::null()).stdout(Stdio::null()).stderr(full());
        let ended = command.env(CONTROL_FOLDER, folder.path()).status().unwrap();
        if words != ["devices"] {
            assert_eq!(ended.code(), Some(status), "{words:?}");
        }
        assert!(ended.code().is_some_and(|code| code != 101), "{words:?} panicked");
    }
}

#[test]
fn names_from_images_are_escaped() {
    need!("names_from_images_are_escaped", "qemu-img");
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("x.qcow2");
    let name = "\x1b[31mred\r\u{9b}1m\nformat:          raw";
    run("qemu-img", &["create", "-q", "-u", "-f", "qcow2", "-b", name, "-F", "raw", text(&image), "1M"]);
    for words in [&["info", text(&image)][..], &["net", text(&image), "-k", "/nowhere/sock"]] {
        let output = Command::new(PROGRAM).args(words).stdin(Stdio::null()).output().unwrap();
        let said = [output.stdout, output.stderr].concat();
        assert!(
            String::from_utf8_lossy(&said).contains("u{1b}[31mred"),
            "{}",
            String::from_utf8_lossy(&said)
        );
        assert_harmless(&said);
        assert!(String::from_utf8_lossy(&said).matches("\nformat:").count() <= 1);
    }
    // For programs it is as it is.
    let output = Command::new(PROGRAM).args(["info", "--json", text(&image)]).output().unwrap();
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(json.to_string().contains("\\u001b[31mred"), "{json}");
}

#[test]
fn names_of_exports_and_clients_are_escaped() {
    let folder = tempfile::tempdir().unwrap();
    let name = "\x1b[31mred\nnext";
    let server = Server::serve_in(folder.path(), &["mem:1M", "-vv", "-x", name, "-D", "\x1b]0;title\x07"]);
    let mut client = server.negotiate().enter(ReplyStyle::Structured, name);
    client.read(0, 512);
    for words in [&["ps"][..], &["stats"], &["stats", "nothing"], &["info", "--list", &server.uri("")]] {
        let mut command = Command::new(PROGRAM);
        let output = command.args(words).env(CONTROL_FOLDER, folder.path()).output().unwrap();
        assert_harmless(&output.stdout);
        assert_harmless(&output.stderr);
        let said = [output.stdout, output.stderr].concat();
        assert!(String::from_utf8_lossy(&said).contains("[31mred"), "{words:?}: {said:?}");
    }
    eventually("its client is logged", || server.log().contains("client connected"));
    assert_harmless(server.log().as_bytes());
    server.stop();
}

#[test]
fn a_line_that_is_torn_by_a_full_disk_is_told() {
    // A file system of two pages: it is full soon, and has room again when the log is cut.
    let folder = tempfile::tempdir().unwrap();
    let small = folder.path().join("small");
    fs::create_dir(&small).unwrap();
    let flags = rustix::mount::MountFlags::empty();
    if let Err(error) = rustix::mount::mount("none", &small, "tmpfs", flags, c"size=8k") {
        eprintln!("SKIP: a_line_that_is_torn_by_a_full_disk_is_told: {error}");
        return;
    }
    let log = File::options().append(true).create(true).open(small.join("log")).unwrap();
    let mut server = logging_to(folder.path(), log.try_clone().unwrap().into());
    for _ in 0..100 {
        drop(client_of(folder.path()));
    }
    let alive = server.is_running();
    log.set_len(0).unwrap();
    std::thread::sleep(Duration::from_millis(100));
    drop(client_of(folder.path()));
    server.signal(Signal::TERM);
    let status = server.wait(LIMIT);
    let said = fs::read_to_string(small.join("log")).unwrap();
    drop(log);
    rustix::mount::unmount(&small, rustix::mount::UnmountFlags::DETACH).unwrap();
    assert!(alive && status.unwrap().code() == Some(0));
    assert!(
        said.contains("lines before this one could not be written and are lost: No space left"),
        "{said}"
    );
}
