//! Another server's export as a source: `net` in front of qemu-nbd, nbdkit and ourselves, what `info` tells of them,
//! and what is left of it when the server behind is killed, hangs, is late or fails. A tool that is not installed is
//! skipped aloud.

// Clippy's exception for tests does not reach their helpers.
#![allow(clippy::unwrap_used)]

#[path = "remote/blocks.rs"]
mod blocks;
#[path = "remote/killed.rs"]
mod killed;
#[path = "remote/status.rs"]
mod status;
mod support;

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nbd_proto::{Command as NbdCommand, NbdError, ReplyStyle};
use support::{CONTROL_FOLDER, NO_FLAGS, PROGRAM, Random, Server, eventually, need, net, run, text, try_run};
use tempfile::TempDir;

/// A server of somebody else's, on the socket `sock` in a folder of its own.
struct Peer {
    child: Child,
    folder: TempDir,
}

impl Peer {
    /// Starts it; `{}` in its arguments is the folder.
    fn start(program: &str, args: &[&str]) -> Peer {
        let folder = tempfile::tempdir().unwrap();
        let here = |arg: &&str| arg.replace("{}", text(folder.path()));
        let child = Command::new(program).args(args.iter().map(here)).stdin(Stdio::null()).spawn().unwrap();
        let peer = Peer { child, folder };
        let socket = peer.folder.path().join("sock");
        eventually("the peer listens", || std::os::unix::net::UnixStream::connect(&socket).is_ok());
        peer
    }

    fn nbdkit(args: &[&str]) -> Peer {
        Peer::start("nbdkit", &[&["--foreground", "--unix", "{}/sock"], args].concat())
    }

    fn uri(&self) -> String {
        format!("nbd+unix:///?socket={}", text(&self.folder.path().join("sock")))
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

const MIB: usize = 1 << 20;

/// Copies random bytes through a proxy of `uri` and back, and compares with what the server itself gives.
fn copy_through(uri: &str, flags: &[&str]) {
    let folder = tempfile::tempdir().unwrap();
    let (image, back) = (folder.path().join("image"), folder.path().join("back"));
    let mut content = Random::new(0x5eed_7001).bytes(8 * MIB);
    content[MIB..3 * MIB].fill(0);
    std::fs::write(&image, &content).unwrap();
    let proxy = Server::serve(&[&[uri], flags].concat());
    run("nbdcopy", &["--flush", "--connections=2", text(&image), &proxy.uri("")]);
    for source in [&proxy.uri("")[..], uri] {
        // The server itself may be one that takes no larger ones.
        run("nbdcopy", &["--request-size=65536", source, text(&back)]);
        assert!(std::fs::read(&back).unwrap() == content, "{source}");
        std::fs::remove_file(&back).unwrap();
    }
    assert_eq!(run("nbdinfo", &["--map", &proxy.uri("")]), run("nbdinfo", &["--map", uri]));
    proxy.stop();
}

#[test]
fn a_proxy_of_qemu_nbd() {
    need!("a_proxy_of_qemu_nbd", "qemu-nbd", "nbdcopy", "nbdinfo");
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("image");
    std::fs::write(&image, vec![0; 8 * MIB]).unwrap();
    let args = ["--format=raw", "--persistent", "--shared=8", "--discard=unmap", "--socket={}/sock"];
    let peer = Peer::start("qemu-nbd", &[&args[..], &[text(&image)]].concat());
    copy_through(&peer.uri(), &[]);
}

#[test]
fn a_proxy_of_nbdkit_and_its_filters() {
    need!("a_proxy_of_nbdkit_and_its_filters", "nbdkit", "nbdcopy", "nbdinfo");
    copy_through(&Peer::nbdkit(&["memory", "8M"]).uri(), &[]);
    let late = ["--filter=delay", "memory", "8M", "rdelay=2ms", "wdelay=2ms"];
    copy_through(&Peer::nbdkit(&late).uri(), &[]);
    // Small requests only, and in whole blocks.
    let picky = [
        "--filter=blocksize-policy",
        "memory",
        "8M",
        "blocksize-minimum=4096",
        "blocksize-maximum=64k",
        "blocksize-error-policy=error",
    ];
    let peer = Peer::nbdkit(&picky);
    copy_through(&peer.uri(), &[]);
    let proxy = Server::serve(&[&peer.uri()]);
    assert!(run("nbdinfo", &[&proxy.uri("")]).contains("block_size_minimum: 4096"));
    // Nothing but reads and writes, and one thread.
    let poor =
        ["--filter=nozero", "--filter=noextents", "--filter=fua", "--filter=noparallel", "memory", "8M"];
    copy_through(&Peer::nbdkit(&poor).uri(), &[]);
}

#[test]
fn errors_pass_through() {
    need!("errors_pass_through", "nbdkit");
    let args = ["--filter=error", "memory", "8M", "error-pwrite=ENOSPC", "error-pwrite-rate=100%"];
    let peer = Peer::nbdkit(&[&args[..], &["error-trim=EPERM", "error-trim-rate=100%"]].concat());
    let proxy = Server::serve(&[&peer.uri()]);
    let mut client = proxy.client(ReplyStyle::Structured);
    assert_eq!(client.call_write(NO_FLAGS, 0, &[1; 512]).error, Some(NbdError::NoSpc));
    assert_eq!(client.call(NbdCommand::Trim, NO_FLAGS, 0, 512).error, Some(NbdError::Perm));
    assert_eq!(client.read(0, 512), [0; 512]);
    drop(client);
    // Now and then: what fails fails alone.
    let peer = Peer::nbdkit(&["--filter=error", "memory", "8M", "error=EIO", "error-rate=30%"]);
    let proxy = Server::serve(&[&peer.uri()]);
    let mut client = proxy.client(ReplyStyle::Simple);
    let failed =
        (0..100).filter(|n| client.call(NbdCommand::Read, NO_FLAGS, n * 512, 512).error.is_some()).count();
    assert!((5..95).contains(&failed), "{failed} of 100");
}

#[test]
fn a_read_only_export_stays_one() {
    need!("a_read_only_export_stays_one", "nbdkit", "nbdinfo");
    let peer = Peer::nbdkit(&["--readonly", "memory", "8M"]);
    let proxy = Server::serve(&[&peer.uri()]);
    assert!(try_run("nbdinfo", &["--is", "read-only", &proxy.uri("")]).status.success());
    let mut client = proxy.client(ReplyStyle::Extended);
    assert_eq!(client.call_write(NO_FLAGS, 0, &[1; 512]).error, Some(NbdError::Perm));
}

#[test]
fn strict_writes_are_durable_one_by_one() {
    need!("strict_writes_are_durable_one_by_one", "nbdkit");
    for (mode, expected) in [("strict", "fua=1"), ("trust", "fua=0")] {
        let peer = Peer::nbdkit(&["--filter=log", "memory", "8M", "logfile={}/log"]);
        let proxy = Server::serve(&[&peer.uri(), "--reconnect", mode]);
        let mut client = proxy.client(ReplyStyle::Structured);
        client.write(0, &[1; 4096]);
        client.flush();
        drop(client);
        let log = std::fs::read_to_string(peer.folder.path().join("log")).unwrap();
        // `connection=1 Write id=1 offset=0x0 count=0x1000 fua=1 ...`
        let writes: Vec<&str> =
            log.lines().filter(|line| line.contains("Write") && line.contains("fua=")).collect();
        assert!(!writes.is_empty() && writes.iter().all(|line| line.contains(expected)), "{mode}: {log}");
    }
    let peer = Peer::nbdkit(&["--filter=fua", "memory", "8M"]);
    let refused = Server::try_serve(&[&peer.uri(), "--reconnect", "strict"]).err().unwrap();
    assert!(refused.contains("needs FUA") && refused.lines().count() == 1, "{refused}");
}

/// A server of ours at a fixed place, to be killed and started again.
struct Upstream {
    server: Option<Server>,
    folder: TempDir,
}

impl Upstream {
    fn new(place: &str, size: &str) -> Upstream {
        Upstream::with_format(place, "raw", size)
    }

    fn with_format(place: &str, format: &str, size: &str) -> Upstream {
        let folder = tempfile::tempdir_in(place).unwrap();
        let mut upstream = Upstream { server: None, folder };
        run(PROGRAM, &["create", "-f", format, text(&upstream.path("image")), size]);
        upstream.start();
        upstream
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.folder.path().join(name)
    }

    fn start(&mut self) {
        let (image, socket) = (self.path("image"), self.path("sock"));
        let start = Instant::now();
        loop {
            let _ = std::fs::remove_file(&socket);
            let mut command = net(&[text(&image), "-k", text(&socket)]);
            let server = Server::start(command.env(CONTROL_FOLDER, self.path("control")), 1);
            if !server.lines.is_empty() {
                self.server = Some(server);
                return;
            }
            // After a kill the kernel may take a moment to let go of the image.
            assert!(start.elapsed() < Duration::from_secs(20), "it does not start");
        }
    }

    /// kill -9.
    fn kill(&mut self) {
        self.server = None;
    }

    fn uri(&self) -> String {
        format!("nbd+unix:///?socket={}", text(&self.path("sock")))
    }
}

fn has_fio() -> bool {
    let engines = Command::new("fio").arg("--enghelp").output();
    engines.is_ok_and(|output| String::from_utf8_lossy(&output.stdout).contains("nbd"))
}

/// fio writes blocks with checksums, and reads them back.
fn verify(uri: &str, folder: &Path, size: &str) -> Child {
    let mut fio = Command::new("timeout");
    fio.args(["-k", "1", "100", "fio", "--name=job", "--ioengine=nbd", "--rw=randwrite", "--bs=4k"]);
    fio.args(["--verify=crc32c", "--verify_fatal=1", "--verify_backlog=256", "--iodepth=32", "--randseed=7"]);
    fio.args(["--fsync=200", "--minimal", &format!("--size={size}"), &format!("--uri={uri}")]);
    fio.current_dir(folder).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

#[test]
fn a_server_killed_and_started_again_loses_nothing() {
    if !has_fio() {
        eprintln!("SKIP: a_server_killed_and_started_again_loses_nothing: no fio with an nbd engine here");
        return;
    }
    for (n, flags) in [&["--connections", "1"][..], &["--workers", "2"]].iter().enumerate() {
        let mut upstream = Upstream::new("/var/tmp", "48M");
        let proxy = Server::serve(&[&[&upstream.uri()[..]], *flags].concat());
        let fios = [verify(&proxy.uri(""), upstream.folder.path(), "24M")];
        let mut random = Random::new(0x5eed_7002 + n as u64);
        for _ in 0..6 {
            std::thread::sleep(Duration::from_millis(100 + u64::from(random.bytes(1)[0])));
            upstream.kill();
            std::thread::sleep(Duration::from_millis(u64::from(random.bytes(1)[0])));
            upstream.start();
        }
        for fio in fios {
            let output = fio.wait_with_output().unwrap();
            assert!(output.status.success(), "{flags:?}: {output:?}\n{}", proxy.log());
            let said = String::from_utf8_lossy(&output.stderr);
            assert!(!said.contains("verify:"), "{flags:?}: {said}");
        }
        let log = proxy.log();
        assert!(log.contains("connection lost") && log.contains("connected again"), "{log}");
        proxy.stop();
    }
}

#[test]
fn a_server_that_stays_away_costs_errors_and_the_export_lives_on() {
    let mut upstream = Upstream::new("/dev/shm", "8M");
    let proxy = Server::serve(&[&upstream.uri(), "--reconnect-timeout", "400ms"]);
    let mut client = proxy.client(ReplyStyle::Structured);
    client.write(0, &[5; 512]);
    client.flush();
    upstream.kill();
    let begun = Instant::now();
    assert_eq!(client.call(NbdCommand::Read, NO_FLAGS, 0, 512).error, Some(NbdError::Io));
    assert!(begun.elapsed() >= Duration::from_millis(300), "{:?}", begun.elapsed());
    assert_eq!(client.call(NbdCommand::Read, NO_FLAGS, 0, 512).error, Some(NbdError::Io));
    upstream.start();
    eventually("it is there again", || client.call(NbdCommand::Read, NO_FLAGS, 0, 512).error.is_none());
    assert_eq!(client.read(0, 512), [5; 512]);
    // A client that comes while nobody is there is let in, and waits.
    upstream.kill();
    let mut second = proxy.client(ReplyStyle::Extended);
    upstream.start();
    eventually("it is there again", || second.call(NbdCommand::Read, NO_FLAGS, 0, 512).error.is_none());
}

#[test]
fn a_server_that_hangs_is_left_for_a_new_connection() {
    let upstream = Server::serve(&["mem:8M", "--fault", "op=read,hang-every=10,seed=1"]);
    let uri = upstream.uri("");
    let proxy = Server::serve(&[&uri, "--request-timeout", "300ms"]);
    let mut client = proxy.client(ReplyStyle::Extended);
    for n in 0..30 {
        assert_eq!(client.read(n * 512, 512), [0; 512]);
    }
    assert!(proxy.log().contains("no answer for 300ms"), "{}", proxy.log());
}

#[test]
fn a_proxy_whose_server_is_gone_ends_when_it_is_told() {
    let mut upstream = Upstream::new("/dev/shm", "8M");
    let mut proxy =
        Server::serve(&[&upstream.uri(), "--drain-timeout", "500ms", "--reconnect-timeout", "300"]);
    proxy.client(ReplyStyle::Extended).write(0, &[1; 512]);
    upstream.kill();
    proxy.signal(rustix::process::Signal::TERM);
    let status = proxy.wait(support::LIMIT).expect("it waits for the server");
    let log = proxy.log();
    assert_eq!(status.code(), Some(1), "{log}");
    assert_eq!(log.lines().filter(|line| line.contains("cannot flush")).count(), 1, "{log}");
}

#[test]
fn another_disk_at_the_same_address_is_not_taken_for_the_first() {
    let mut upstream = Upstream::new("/dev/shm", "8M");
    let proxy = Server::serve(&[&upstream.uri()]);
    let mut client = proxy.client(ReplyStyle::Structured);
    client.read(0, 512);
    upstream.kill();
    std::fs::File::options().write(true).open(upstream.path("image")).unwrap().set_len(1 << 20).unwrap();
    upstream.start();
    assert_eq!(client.call(NbdCommand::Read, NO_FLAGS, 0, 512).error, Some(NbdError::Io));
    assert!(proxy.log().contains("the export is another one: it has 1048576 bytes now"), "{}", proxy.log());
}

#[test]
fn over_tcp_and_in_a_chain() {
    need!("over_tcp_and_in_a_chain", "nbdcopy", "nbdinfo");
    let first = Server::serve(&["mem:8M", "-p", "0"]);
    let second = Server::serve(&[&format!("nbd://{}/?connections=2", first.address()), "-p", "0"]);
    copy_through(&format!("nbd://{}/", second.address()), &["--connections", "1"]);
}

#[test]
fn what_cannot_be_a_source_is_told_in_a_line() {
    let server = Server::serve(&["mem:1M", "-x", "there"]);
    for (uri, word) in [
        (server.uri("nowhere"), "no export called \"nowhere\""),
        ("nbd://127.0.0.1:1/".into(), "cannot connect to 127.0.0.1:1"),
        ("nbd+unix:///?socket=/nonexistent".into(), "cannot connect"),
    ] {
        let said = Server::try_serve(&[&uri]).err().unwrap();
        assert!(said.starts_with("nbdbridge: nbd") && said.contains(word), "{said}");
        assert_eq!(said.lines().count(), 1, "{said}");
    }
}

#[test]
fn info_tells_what_the_server_tells() {
    let exports = ["--export", "b=null:1G", "--export", "c d=mem:3M"];
    let server = Server::serve(&[&["mem:8M", "-x", "a", "-D", "the first"], &exports[..]].concat());
    server.negotiate().enter(ReplyStyle::Simple, "c d").write(MIB as u64, &[1; MIB]);
    let info = |args: &[&str]| run(PROGRAM, &[&["info"], args].concat());
    let told = info(&[&server.uri("a")]);
    for part in [
        "export \"a\": 8 MiB (8388608 bytes)",
        "description: the first",
        "flush fua trim write-zeroes",
        "minimum 1, preferred 4096, maximum 33554432\n",
        "base:allocation",
    ] {
        assert!(told.contains(part), "{part}: {told}");
    }
    let all = info(&["--list", &server.uri("")]);
    assert_eq!(all.matches("export ").count(), 3, "{all}");
    let json = info(&["--list", "--json", &server.uri("")]);
    let check = "import json, sys; e = json.load(sys.stdin)['exports']; print([(x['name'], x['size'], x['flags']['read-only']) for x in e])";
    if Command::new("python3").arg("--version").output().is_ok() {
        let mut python = Command::new("python3");
        let mut python =
            python.args(["-c", check]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        std::io::Write::write_all(&mut python.stdin.take().unwrap(), json.as_bytes()).unwrap();
        let read = String::from_utf8(python.wait_with_output().unwrap().stdout).unwrap();
        let expected = "[('a', 8388608, False), ('b', 1073741824, False), ('c d', 3145728, False)]\n";
        assert_eq!(read, expected, "{json}");
    } else {
        eprintln!("SKIP: info_tells_what_the_server_tells: no python3 here to read JSON");
    }
    let map = info(&["--map", &server.uri("c%20d")]);
    let fields: Vec<Vec<&str>> = map.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(
        fields,
        [
            ["0", "1048576", "3", "hole,zero"],
            ["1048576", "1048576", "0", "data"],
            ["2097152", "1048576", "3", "hole,zero"]
        ]
    );
    assert!(info(&["--map", "--json", &server.uri("c%20d")]).contains("\"length\": 1048576"));
    let nobody = try_run(PROGRAM, &["info", &server.uri("x")]);
    assert_eq!(nobody.status.code(), Some(1));
    assert!(support::one_line(&nobody).contains("no export called \"x\""));
}

#[test]
fn info_lists_more_exports_than_fit_into_one_handshake() {
    let names: Vec<String> = (0..30).map(|n| format!("disk{n}=mem:{}", 512 * (n + 1))).collect();
    let args: Vec<&str> = names.iter().flat_map(|name| ["--export", name]).collect();
    let server = Server::serve(&[&["mem:1M"], &args[..]].concat());
    let all = run(PROGRAM, &["info", "--list", &server.uri("")]);
    for n in 0..30 {
        assert!(
            all.contains(&format!("export \"disk{n}\": "))
                && all.contains(&format!("{} bytes", 512 * (n + 1))),
            "{all}"
        );
    }
}

#[test]
fn a_large_durable_write_to_a_server_without_flush_is_durable() {
    need!("a_large_durable_write_to_a_server_without_flush_is_durable", "nbdkit");
    let peer = Peer::nbdkit(&[
        "eval",
        "get_size=echo 8M",
        "can_write=exit 0",
        "can_flush=exit 3",
        "can_fua=echo native",
        "pread=dd if=/dev/zero count=$3 iflag=count_bytes status=none",
        "pwrite=cat > /dev/null; echo \"$3 $4 $5\" >> {}/seen",
    ]);
    let server = Server::serve(&[&peer.uri()]);
    for style in support::STYLES {
        let mut client = server.client(style);
        let answer = client.call_write(nbd_proto::CommandFlags::FUA, 0, &vec![5; 2 * MIB]);
        assert_eq!(answer.error, None, "{style:?}: {}", server.log());
        client.write(4096, &[6; 4096]);
        client.flush();
    }
    let seen = std::fs::read_to_string(peer.folder.path().join("seen")).unwrap();
    assert!(seen.lines().count() >= 6 && seen.lines().all(|line| line.ends_with(" fua")), "{seen}");
}
