//! Spellings and settings that users of other block servers are used to: addresses, sizes, sources, settings of one export.

// Clippy's exception for tests does not reach their helpers.
#![allow(clippy::unwrap_used)]

mod support;

use std::fs;
use std::io::{Read, Write};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixStream};
use std::process::Command;

use nbd_proto::{NbdError, ReplyStyle};
use support::{CONTROL_FOLDER, Client, NO_FLAGS, PROGRAM, Server, need, net, one_line, run, text};

/// Runs the program, which must succeed, with control sockets looked for in `folder`.
fn ask(folder: &std::path::Path, args: &[&str]) -> String {
    let output = Command::new(PROGRAM).args(args).env(CONTROL_FOLDER, folder).output().unwrap();
    assert!(output.status.success(), "{args:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn an_abstract_socket_serves_and_is_a_source() {
    let name = format!("nbdbridge-test-{}", std::process::id());
    let mut server = Server::start(&mut net(&["mem:1M", "-k", &format!("@{name}")]), 1);
    assert!(server.lines[0].contains(&format!("socket=@{name}")), "{:?}", server.lines);
    let address = SocketAddr::from_abstract_name(&name).unwrap();
    let mut stream = UnixStream::connect_addr(&address).unwrap();
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting).unwrap();
    assert!(greeting.starts_with(b"NBDMAGICIHAVEOPT"));
    stream.write_all(&[0, 0, 0, 0]).unwrap();
    drop(stream);
    let uri = format!("nbd+unix:///?socket=@{name}");
    let proxy = Server::serve(&[&uri]);
    let mut client = proxy.client(ReplyStyle::Structured);
    client.write(0, b"over an abstract socket");
    assert_eq!(client.read(0, 23), b"over an abstract socket");
    let line = one_line(&net(&["mem:1M", "-k", &format!("@{name}")]).output().unwrap());
    assert!(line.contains("another server listens there"), "{line}");
    assert!(server.is_running());
}

#[test]
fn the_older_spelling_of_qemu_reaches_a_server() {
    need!("the_older_spelling_of_qemu_reaches_a_server", "qemu-img");
    let server = Server::serve(&["mem:3M", "-x", "a:b", "-p", "0"]);
    let tcp = format!("nbd:{}:exportname=a:b", server.address());
    let unix = format!("nbd:unix:{}:exportname=a:b", text(&server.socket()));
    for source in [tcp, unix] {
        assert!(run(PROGRAM, &["info", &source]).contains("3 MiB"), "{source}");
        // The tool whose spelling it is means the same by it.
        assert!(run("qemu-img", &["info", "-f", "raw", &source]).contains("3 MiB"), "{source}");
        let proxy = Server::serve(&[&source]);
        assert_eq!(proxy.client(ReplyStyle::Structured).read(0, 512), [0; 512]);
    }
}

#[test]
fn several_addresses_and_an_interface() {
    let scoped = "fe80::1%nonexistent0";
    let line = one_line(&net(&["mem:1M", "-b", scoped, "-p", "0"]).output().unwrap());
    assert!(line.contains("[fe80::1%nonexistent0]") && line.contains("--bind"), "{line}");
    let server = Server::start(&mut net(&["mem:1M", "-b", "127.0.0.1", "-b", "127.0.0.2", "-p", "0"]), 2);
    for (line, host) in server.lines.iter().zip(["127.0.0.1", "127.0.0.2"]) {
        let uri = line.split_whitespace().find(|word| word.starts_with("nbd://")).unwrap();
        assert!(uri.starts_with(&format!("nbd://{host}:")), "{line}");
        assert!(run(PROGRAM, &["info", uri]).contains("1 MiB"), "{uri}");
    }
}

#[test]
fn nothing_grows_by_so_much_more() {
    let folder = tempfile::tempdir().unwrap();
    let control = folder.path().join("control");
    let server = Server::serve_in(&control, &["null-co://,size=64MiB", "-x", "n"]);
    assert_eq!(ask(&control, &["resize", "n", "+10Mi"]).matches("74 MiB").count(), 1);
    assert_eq!(server.negotiate().enter(ReplyStyle::Structured, "n").read((74 << 20) - 512, 512), [0; 512]);
    let output = Command::new(PROGRAM).args(["resize", "n", "+8E"]).env(CONTROL_FOLDER, &control).output();
    assert_eq!(output.unwrap().status.code(), Some(2));
}

#[test]
fn settings_of_one_export_leave_the_others_alone() {
    let folder = tempfile::tempdir().unwrap();
    let names = ["plain", "fixed", "golden"].map(|name| folder.path().join(name));
    for image in &names {
        fs::write(image, [1; 4096]).unwrap();
    }
    let [plain, fixed, golden] = names.each_ref().map(|image| text(image));
    let exports = [
        format!("plain={plain}"),
        format!("fixed={fixed},read-only"),
        format!("golden={golden},format=raw,snapshot"),
    ];
    let flags = exports.iter().flat_map(|export| ["--export", export]);
    let args: Vec<&str> = flags.chain(["-f", "raw"]).collect();
    let server = Server::serve(&args);
    let write = |name: &str| -> (Client, Option<NbdError>) {
        let mut client = server.negotiate().enter(ReplyStyle::Structured, name);
        let answer = client.call_write(NO_FLAGS, 0, &[7; 512]).error;
        (client, answer)
    };
    let (mut client, answer) = write("plain");
    assert_eq!((answer, client.read(0, 512)), (None, vec![7; 512]));
    let (mut client, answer) = write("fixed");
    assert_eq!((answer, client.read(0, 512)), (Some(NbdError::Perm), vec![1; 512]));
    let (mut client, answer) = write("golden");
    assert_eq!((answer, client.read(0, 512)), (None, vec![7; 512]));
    server.stop();
    let first = |path: &str| fs::read(path).unwrap()[0];
    assert_eq!((first(plain), first(fixed), first(golden)), (7, 1, 1));
}

#[test]
fn every_command_tells_the_same_version() {
    let line = format!("nbdbridge {}\n", env!("CARGO_PKG_VERSION"));
    for args in [&["--version"][..], &["-V"], &["net", "--version"], &["net", "-V"], &["volume", "--version"]]
    {
        assert_eq!(run(PROGRAM, args), line, "{args:?}");
    }
}
