//! `nbdbridge bench`, against this program, against others, and against servers that are broken. How fast
//! anything is plays no part.

// Clippy's exception for tests does not reach their helpers.
#![allow(clippy::unwrap_used)]

mod support;

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use nbd_proto::{
    Directory, ExportInfo, Handshake, Limits, ReplyStyle, Request, Step, TlsPolicy, TransmissionFlags,
    put_data_header, put_done,
};
use rustix::process::{Pid, Signal, kill_process};

use support::{PROGRAM, Server, eventually, text};

fn command(uri: &str, args: &str) -> Command {
    let mut command = Command::new(PROGRAM);
    command.args(["bench", uri]).args(args.split_whitespace()).stdin(Stdio::null());
    command
}

fn bench(uri: &str, args: &str) -> Output {
    command(uri, args).output().unwrap()
}

/// What it prints where all is well.
fn report(uri: &str, args: &str) -> String {
    let output = bench(uri, args);
    assert_eq!(output.status.code(), Some(0), "{args}: {output:?}");
    assert_eq!(String::from_utf8_lossy(&output.stderr), "", "{args}");
    String::from_utf8(output.stdout).unwrap()
}

/// The one line where it is not.
fn failure(uri: &str, args: &str, status: i32) -> String {
    let output = bench(uri, args);
    assert_eq!(output.status.code(), Some(status), "{args}: {output:?}");
    let line = String::from_utf8(output.stderr).unwrap();
    assert!(line.starts_with("nbdbridge: ") && line.lines().count() == 1, "{args}: {line}");
    line
}

/// The number behind a key of the JSON; the first of that name.
fn number(json: &str, key: &str) -> f64 {
    let (_, rest) = json.split_once(&format!("\"{key}\": ")).unwrap_or_else(|| panic!("{key}: {json}"));
    let end = rest.find([',', '}']).unwrap();
    rest[..end].parse().unwrap_or_else(|_| panic!("{key}: {json}"))
}

#[test]
fn every_style_and_shape_reads() {
    let server = Server::serve(&["mem:8M", "-p", "0"]);
    let tcp = format!("nbd://{}/", server.address());
    for (style, word) in [("--simple", "simple"), ("", "structured"), ("--extended", "extended")] {
        for uri in [&server.uri(""), &tcp] {
            for shape in [
                "--depth 1",
                "--depth 64 --sequential",
                "--connections 5 --threads 2 --depth 8",
                "--block-size 300K --depth 3",
                "--block-size 1000 --offset 777 --size 1M",
            ] {
                let json = report(uri, &format!("{style} {shape} --requests 53 --json"));
                assert_eq!(number(&json, "requests"), 53.0, "{shape}: {json}");
                let bytes = 53.0 * number(&json, "block_size");
                assert_eq!(number(&json, "bytes"), bytes, "{shape}: {json}");
                assert!(json.contains("\"errors\": {}"), "{shape}: {json}");
                assert!(json.contains(&format!("\"style\": \"{word}\"")));
            }
        }
    }
    let lines = report(&server.uri(""), "--duration 100ms --seed 0x2a");
    assert!(lines.contains("seed 0x2a") && lines.contains("IOPS") && lines.contains("p99.9"), "{lines}");
    assert!(lines.contains("1 connection, 32 deep, random blocks of 4 KiB"), "{lines}");
    server.stop();
}

#[test]
fn json_is_json() {
    let server = Server::serve(&["mem:8M"]);
    let json = report(&server.uri(""), "--requests 100 --write --flush-every 10 --verify --json");
    // The flushes are requests, too.
    assert_eq!((number(&json, "requests"), json.lines().count()), (100.0, 1), "{json}");
    assert!(json.contains("\"flush\": {\"requests\": 9,"), "{json}");
    let mut python = Command::new("python3");
    python.args(["-m", "json.tool"]).stdin(Stdio::piped()).stdout(Stdio::null());
    let Ok(mut python) = python.spawn() else {
        eprintln!("SKIP: json_is_json: no python3 here");
        return;
    };
    python.stdin.take().unwrap().write_all(json.as_bytes()).unwrap();
    assert!(python.wait().unwrap().success(), "{json}");
}

#[test]
fn what_was_written_is_verified() {
    let server = Server::serve(&["mem:4M"]);
    for style in ["--simple", "", "--extended"] {
        for shape in [
            "--read-percent 50",
            "--read-percent 30 --connections 3 --threads 3 --depth 16",
            "--sequential --block-size 3000 --depth 4",
            "--block-size 64K --depth 2 --flush-every 3",
        ] {
            let json = report(
                &server.uri(""),
                &format!("{style} --write --verify --requests 400 {shape} --json --seed 5"),
            );
            assert!(number(&json, "right") > 0.0 && json.contains("\"wrong\": 0"), "{shape}: {json}");
        }
    }
    server.stop();
}

#[test]
fn a_later_run_knows_the_blocks_and_finds_the_changed_one() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("image");
    fs::write(&image, vec![0; 1 << 20]).unwrap();
    let server = Server::serve(&[text(&image)]);
    let uri = server.uri("");
    report(&uri, "--write --sequential --verify --seed 77 --requests 256");
    let check = "--verify --seed 77 --sequential --requests 256";
    let lines = report(&uri, check);
    assert!(lines.contains("256 blocks are right, 0 wrong, 0 hold nothing"), "{lines}");
    // Another run's pattern is none of ours.
    let line = failure(&uri, "--verify --seed 78 --requests 256", 1);
    assert!(line.contains("no block was checked") && line.contains("0x4e"), "{line}");

    let file = fs::File::options().read(true).write(true).open(&image).unwrap();
    let place = 37 * 4096 + 1000;
    let mut byte = [0];
    file.read_exact_at(&mut byte, place).unwrap();
    file.write_all_at(&[byte[0] ^ 1], place).unwrap();
    let line = failure(&uri, check, 1);
    assert!(line.contains("1 of the blocks read are wrong: the block at 151552 is wrong from"), "{line}");
    file.write_all_at(&byte, place).unwrap();

    // A block in the place of another.
    let mut block = [0; 4096];
    file.read_exact_at(&mut block, 4096).unwrap();
    file.write_all_at(&block, 3 * 4096).unwrap();
    let line = failure(&uri, check, 1);
    assert!(line.contains("the block at 12288 holds what was written at 4096"), "{line}");
    server.stop();
}

#[test]
fn a_disk_that_forgets_is_found_out() {
    let server = Server::serve(&["null:4M"]);
    let line = failure(&server.uri(""), "--write --verify --requests 200", 1);
    assert!(line.contains("does not hold what was written"), "{line}");
    server.stop();
}

#[test]
fn errors_are_counted_and_told() {
    let server = Server::serve(&["mem:4M", "--fault", "error-rate=1,errno=ENOSPC,op=write"]);
    for style in ["--simple", "", "--extended"] {
        let args = format!("--write --read-percent 50 --requests 500 --seed 3 --json {style}");
        let output = bench(&server.uri(""), &args);
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        let json = String::from_utf8(output.stdout).unwrap();
        let failed = number(&json, "no space left on device");
        assert!(failed > 0.0 && failed < 500.0, "{json}");
        let line = String::from_utf8(output.stderr).unwrap();
        assert!(line.contains(&format!("{failed} times no space left on device")), "{line}");
        // All of them have been answered.
        assert_eq!(number(&json, "requests"), 500.0, "{json}");
    }
    server.stop();
}

#[test]
fn refusals_name_the_flag() {
    let server = Server::serve(&["mem:1M", "-r", "-x", "disk"]);
    let uri = server.uri("disk");
    for (args, words) in [
        ("--write", "leave out --write"),
        ("--offset 1M", "no block of 4 KiB fits"),
        ("--offset 2M", "--offset is past"),
        ("--size 2M", "--size goes past"),
    ] {
        let line = failure(&uri, args, 1);
        assert!(line.contains(words), "{args}: {line}");
    }
    for (args, words) in [
        ("--read-percent 70", "add --write"),
        ("--write --read-percent 100", "writes nothing"),
        ("--verify", "--seed"),
        ("--write --verify --block-size 1001", "multiple of 8"),
        ("--flush-every 3", "--write"),
        ("--depth 0", "--depth"),
        ("--depth 4096 --block-size 32M", "would be in flight"),
        ("--requests 3 --duration 4", "--duration"),
        ("--simple --extended", "--extended"),
        ("--seed x", "not a number"),
    ] {
        let line = failure(&uri, args, 2);
        assert!(line.contains(words), "{args}: {line}");
    }
    let line = failure(&server.uri("none"), "", 1);
    assert!(line.contains("no export called \"none\""), "{line}");
    for (uri, status, words) in [
        ("nbds://host/", 2, "TLS"),
        ("disk.img", 2, "nbd://HOST"),
        ("nbd://127.0.0.1:1/", 1, "cannot connect to 127.0.0.1 port 1"),
        ("nbd+unix:///?socket=/nowhere/sock", 1, "cannot connect to /nowhere/sock"),
    ] {
        let line = failure(uri, "", status);
        assert!(line.contains(words), "{uri}: {line}");
    }
    server.stop();

    let server = Server::serve(&["mem:64K"]);
    let line = failure(&server.uri(""), "--write --verify", 1);
    assert!(line.contains("lower --depth"), "{line}");
    server.stop();
}

#[test]
fn a_signal_ends_it_with_its_result() {
    let server = Server::serve(&["mem:1M"]);
    let mut child = command(&server.uri(""), "--duration 10m").stdout(Stdio::piped()).spawn().unwrap();
    let before = server.processor_time();
    eventually("it does nothing", || server.processor_time() > before);
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    let mut lines = String::new();
    child.stdout.take().unwrap().read_to_string(&mut lines).unwrap();
    assert!(child.wait().unwrap().success() && lines.contains("IOPS"), "{lines}");
    server.stop();
}

#[test]
fn a_server_that_dies_is_one_line() {
    let mut server = Server::serve(&["mem:1M"]);
    let args = "--duration 10m --connections 3 --threads 2 --write --verify";
    let child = command(&server.uri(""), args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let before = server.processor_time();
    eventually("it does nothing", || server.processor_time() > before);
    server.signal(Signal::KILL);
    server.wait(Duration::from_secs(10)).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let line = String::from_utf8(output.stderr).unwrap();
    assert!(line.lines().count() == 1 && line.contains("the server"), "{line}");
}

/// One export of 1 MiB.
struct Disk;

impl Directory for Disk {
    fn list(&self, _: &mut dyn FnMut(&str, Option<&str>)) {}

    fn find(&self, name: &str) -> Option<(String, ExportInfo)> {
        let flags = TransmissionFlags::HAS_FLAGS;
        let info = ExportInfo {
            size: 1 << 20,
            flags,
            description: None,
            min_block: 512,
            preferred_block: 4096,
            max_payload: 64 << 10,
        };
        name.is_empty().then(|| (String::new(), info))
    }

    fn contexts(&self, _: &str) -> Vec<String> {
        Vec::new()
    }
}

/// Serves one client: `answer` turns its first request into bytes, after which the server is silent.
fn broken_server(listener: &UnixListener, answer: impl FnOnce(Request, ReplyStyle) -> Vec<u8>) {
    let (mut stream, _) = listener.accept().unwrap();
    let mut handshake = Handshake::new(Limits::default(), TlsPolicy::Disabled);
    stream.write_all(&handshake.greeting()).unwrap();
    let mut out = Vec::new();
    let style = loop {
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        let (_, step) = handshake.advance(&byte, &Disk, &mut out);
        stream.write_all(&out).unwrap();
        out.clear();
        if let Step::Transmission(negotiated) = step {
            break negotiated.style;
        }
    };
    let mut header = vec![0; Request::header_len(style.extended())];
    // It may have refused to go on.
    if stream.read_exact(&mut header).is_ok() {
        let request = Request::parse(&header, style.extended()).unwrap().unwrap();
        let _ = stream.write_all(&answer(request, style));
        wait_for_end(&mut stream);
    }
}

fn wait_for_end(stream: &mut UnixStream) {
    let mut rest = [0; 4096];
    while stream.read(&mut rest).is_ok_and(|n| n > 0) {}
}

/// What the client says about a server that answers so.
fn against(path: &Path, args: &str, answer: impl FnOnce(Request, ReplyStyle) -> Vec<u8> + Send) -> String {
    let _ = fs::remove_file(path);
    let listener = UnixListener::bind(path).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| broken_server(&listener, answer));
        failure(&format!("nbd+unix:///?socket={}", text(path)), args, 1)
    })
}

#[test]
fn broken_servers_are_found_out() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("sock");
    let reply = |fill: &dyn Fn(&mut Vec<u8>)| {
        let mut out = Vec::new();
        fill(&mut out);
        out
    };
    let line = against(&path, "", |_, _| b"nonsense".to_vec());
    assert!(line.contains("bad magic"), "{line}");
    let line = against(&path, "", |request, style| reply(&|out| put_done(style, request.cookie + 1, 0, out)));
    assert!(line.contains("not made"), "{line}");
    let line = against(&path, "", |request, style| {
        reply(&|out| {
            put_data_header(style, request.cookie, request.offset, request.offset, 512, true, out);
            out.extend([0; 512]);
        })
    });
    assert!(line.contains("a read of 4096 bytes with 512 bytes"), "{line}");
    for outside in [4096_u64, 512, u64::MAX] {
        let line = against(&path, "--extended", |request, style| {
            let offset = request.offset.wrapping_add(outside);
            reply(&|out| {
                put_data_header(style, request.cookie, request.offset, offset, 4096, true, out);
                out.extend([0; 4096]);
            })
        });
        assert!(line.contains("not asked for"), "{outside}: {line}");
    }
    for (args, words) in [
        ("--block-size 100", "multiples of 512 bytes; change --block-size"),
        ("--offset 100", "multiples of 512 bytes; change --offset"),
        ("--block-size 128K", "at most 64 KiB"),
        ("--write --flush-every 1", "leave out --flush-every"),
    ] {
        let line = against(&path, args, |_, _| Vec::new());
        assert!(line.contains(words), "{args}: {line}");
    }
}

#[test]
fn other_servers() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("image");
    fs::write(&image, vec![0; 4 << 20]).unwrap();
    for (tool, args) in [
        ("nbdkit", &["-f", "-U", "SOCKET", "memory", "4M"][..]),
        ("qemu-nbd", &["-f", "raw", "-t", "-k", "SOCKET", text(&image)]),
    ] {
        let socket = folder.path().join(tool);
        let args = args.iter().map(|arg| if *arg == "SOCKET" { text(&socket) } else { arg });
        let Ok(mut child) = Command::new(tool).args(args).spawn() else {
            eprintln!("SKIP: other_servers: no {tool} here");
            continue;
        };
        eventually(tool, || socket.exists());
        let uri = format!("nbd+unix:///?socket={}", text(&socket));
        let outputs: Vec<Output> = ["--simple", "", "--extended"]
            .map(|style| bench(&uri, &format!("{style} --write --read-percent 50 --verify --requests 3000")))
            .into();
        kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
        child.wait().unwrap();
        for output in outputs {
            assert!(output.status.success(), "{tool}: {output:?}");
        }
    }
}
