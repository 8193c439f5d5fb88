//! Overlays, parts of images, detected zeroes, throttle groups and `qemu:allocation-depth`, with the tools that people have:
//! qemu-img, qemu-io, qemu-nbd and nbdinfo.

// Clippy's exception for tests does not reach their helpers.
#![allow(clippy::unwrap_used)]

mod support;

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command as Program};
use std::time::{Duration, Instant};

use nbd_proto::{Command, CommandFlags, ReplyStyle};
use rustix::process::Signal;
use support::{NO_FLAGS, Random, Server, eventually, lacks, net, one_line, refusal, run, text};

const MIB: u64 = 1 << 20;
const MIB_LEN: usize = 1 << 20;

/// An image of random bytes, but for a hole in its middle. Odd in size.
fn image(folder: &Path) -> (PathBuf, Vec<u8>) {
    let path = folder.join("base.img");
    let mut content = Random::new(0x5eed_7000).bytes(3 << 20);
    content[MIB_LEN..2 * MIB_LEN].fill(0);
    content.extend([7; 1000]);
    let file = File::create(&path).unwrap();
    file.write_all_at(&content[..MIB_LEN], 0).unwrap();
    file.write_all_at(&content[2 * MIB_LEN..], 2 * MIB).unwrap();
    (path, content)
}

/// Random changes by a client, of which the model hears as well.
fn change(server: &Server, model: &mut [u8], seed: u64, count: usize) {
    println!("seed {seed:#x}");
    let mut random = Random::new(seed);
    let mut client = server.client(ReplyStyle::Extended);
    let size = model.len() as u64;
    for _ in 0..count {
        let most = random.pick(&[16, 5000, 70_000, 300_000]);
        let len = 1 + random.below(most.min(size / 2));
        let offset = random.below(size - len);
        let range = usize::try_from(offset).unwrap()..usize::try_from(offset + len).unwrap();
        let fua = if random.below(4) == 0 { CommandFlags::FUA } else { NO_FLAGS };
        if random.below(4) == 0 {
            assert_eq!(client.call(Command::WriteZeroes, fua, offset, len).error, None);
            model[range].fill(0);
        } else {
            let data = random.bytes(range.len());
            assert_eq!(client.call_write(fua, offset, &data).error, None);
            model[range].copy_from_slice(&data);
        }
    }
    assert!(client.read(0, size) == model);
}

fn assert_holds(server: &Server, model: &[u8]) {
    let mut client = server.client(ReplyStyle::Structured);
    assert!(client.read(0, model.len() as u64) == model, "{}", server.log());
}

#[test]
fn a_snapshot_leaves_the_image_alone_and_no_file_behind() {
    let folder = tempfile::tempdir_in("/var/tmp").unwrap();
    let (path, content) = image(folder.path());
    let before = fs::metadata(&path).unwrap();
    let scratch = folder.path().join("scratch");
    fs::create_dir(&scratch).unwrap();
    for cache in ["writeback", "none"] {
        let socket = folder.path().join("sock");
        let mut command = net(&[text(&path), "-s", "--cache", cache, "-k", text(&socket)]);
        let mut server = Server::start(command.env("TMPDIR", &scratch), 1);
        assert_eq!(server.lines.len(), 1);
        let mut client = support::Negotiation::begin(support::Stream::unix(&socket).unwrap())
            .enter(ReplyStyle::Structured, "");
        client.write(5, &[0xee; 100_000]);
        client.flush();
        assert_eq!(client.read(5, 100_000), [0xee; 100_000]);
        assert_eq!(client.read(0, 5), content[..5]);
        assert_eq!(fs::read_dir(&scratch).unwrap().count(), 0, "the file has no name");
        // In two ways, the second of which nobody can clean up after.
        if cache == "none" {
            server.signal(Signal::KILL);
            server.wait(Duration::from_secs(10)).unwrap();
        } else {
            drop(client);
            server.stop();
        }
        let _ = fs::remove_file(&socket);
        assert!(fs::read(&path).unwrap() == content);
        assert_eq!(fs::read_dir(&scratch).unwrap().count(), 0);
    }
    let after = fs::metadata(&path).unwrap();
    assert_eq!((before.mtime_nsec(), before.blocks()), (after.mtime_nsec(), after.blocks()));
    let mut command = net(&[text(&path), "-s", "-k", "/nonexistent/sock"]);
    let line = one_line(&command.env("TMPDIR", folder.path().join("missing")).output().unwrap());
    assert!(line.contains("missing: cannot make a temporary file; set TMPDIR"), "{line}");
}

#[test]
fn a_kept_overlay_is_a_qcow2_image_over_its_base() {
    if lacks("a_kept_overlay_is_a_qcow2_image_over_its_base", &["qemu-img", "qemu-io"]) {
        return;
    }
    let folder = tempfile::tempdir_in("/var/tmp").unwrap();
    let (path, mut model) = image(folder.path());
    let before = fs::read(&path).unwrap();
    let overlay = folder.path().join("changes.qcow2");
    let args = [text(&path), "--overlay", text(&overlay)];
    for round in 0..3 {
        let server = Server::serve(&args);
        change(&server, &mut model, 0x5eed_7010 + round, 25);
        let line = refusal(&args);
        assert!(line.contains("in use by another process"), "{line}");
        server.stop();
        run("qemu-img", &["check", "-q", text(&overlay)]);
        // qemu reads what we wrote; it counts in sectors.
        let mut whole = model.clone();
        whole.resize(whole.len().next_multiple_of(512), 0);
        let expected = folder.path().join("expected");
        fs::write(&expected, &whole).unwrap();
        run("qemu-img", &["compare", "-q", "-f", "qcow2", "-F", "raw", text(&overlay), text(&expected)]);
    }
    assert!(fs::read(&path).unwrap() == before);
    let info = run("qemu-img", &["info", text(&overlay)]);
    assert!(info.contains("backing file format: raw") && info.contains(text(&path)), "{info}");
    let metadata = fs::metadata(&overlay).unwrap();
    assert!(metadata.blocks() * 512 < 5 << 20, "sparse: {} of {}", metadata.blocks() * 512, metadata.len());

    // Read-only it is as it was left.
    let server = Server::serve(&[&args[..], &["-r"]].concat());
    assert_holds(&server, &model);
    server.stop();
    // What qemu writes where there is something already, we read.
    let client = Server::serve(&args);
    client.client(ReplyStyle::Structured).write(0, &[1; 65_536]);
    model[..65_536].fill(1);
    client.stop();
    run("qemu-io", &["-f", "qcow2", text(&overlay), "-c", "write -P 0x77 100 1000"]);
    model[100..1100].fill(0x77);
    let server = Server::serve(&args);
    assert_holds(&server, &model);
    server.stop();
    // And commits.
    run("qemu-img", &["commit", "-q", text(&overlay)]);
    assert!(fs::read(&path).unwrap()[..model.len()] == model[..]);
    // Now the base is another, and the file qemu's.
    let line = refusal(&args);
    assert!(line.contains("changes.qcow2") && line.contains("by another program"), "{line}");
}

#[test]
fn overlays_that_do_not_fit_are_refused_in_one_line() {
    let folder = tempfile::tempdir_in("/var/tmp").unwrap();
    let (path, content) = image(folder.path());
    let overlay = folder.path().join("changes.qcow2");
    let args = [text(&path), "--overlay", text(&overlay)];
    let line = refusal(&[&args[..], &["-r"]].concat());
    assert!(line.contains("does not exist; leave --read-only out once"), "{line}");
    Server::serve(&args).stop();
    fs::write(&path, [&[1], &content[1..]].concat()).unwrap();
    let line = refusal(&args);
    assert!(line.contains("changes.qcow2: belongs to another base"), "{line}");
    fs::write(&path, &content[1..]).unwrap();
    let line = refusal(&args);
    assert!(line.contains("belongs to a base of 3146728 bytes, and this one has 3146727"), "{line}");
    let line = refusal(&[text(&path), "--overlay", text(&path)]);
    assert!(line.contains("base.img"), "{line}");
    assert!(fs::read(&path).unwrap() == content[1..]);
    let foreign = folder.path().join("foreign");
    fs::write(&foreign, "precious").unwrap();
    let line = refusal(&[text(&path), "--overlay", text(&foreign)]);
    assert!(line.contains("foreign: is no overlay of this program"), "{line}");
    assert_eq!(fs::read(&foreign).unwrap(), b"precious");
}

/// Serves again after a kill: an operation that the kernel still has at work keeps the file, and its lock, for a moment.
fn serve_after_kill(args: &[&str]) -> Server {
    let mut server = None;
    eventually("the killed server's file is free", || {
        server = Server::try_serve(args).ok();
        server.is_some()
    });
    server.unwrap()
}

/// Killed in the middle of a load, again and again: what was answered is there, and qemu finds no corruption.
#[test]
fn a_kept_overlay_survives_kill_9() {
    let folder = tempfile::tempdir_in("/var/tmp").unwrap();
    let (path, content) = image(folder.path());
    let overlay = folder.path().join("changes.qcow2");
    let args = [text(&path), "--overlay", text(&overlay)];
    let check = !lacks("a_kept_overlay_survives_kill_9", &["qemu-img"]);
    let mut model = content;
    for round in 0..12_u64 {
        let seed = 0x5eed_7100 + round;
        let mut server = serve_after_kill(&args);
        assert_holds(&server, &model);
        println!("seed {seed:#x}");
        let mut random = Random::new(seed);
        let mut client = server.client(ReplyStyle::Structured);
        for step in 0..random.below(40) {
            let len = 1 + random.below(100_000);
            let offset = random.below(model.len() as u64 - len);
            let data = random.bytes(usize::try_from(len).unwrap());
            assert_eq!(client.call_write(NO_FLAGS, offset, &data).error, None);
            model[usize::try_from(offset).unwrap()..][..data.len()].copy_from_slice(&data);
            if step % 16 == 15 {
                client.flush();
            }
        }
        // In the middle of a flush, too.
        if round % 2 == 0 {
            client.ask(Command::Flush, NO_FLAGS, 0, 0);
        }
        server.signal(Signal::KILL);
        server.wait(Duration::from_secs(10)).unwrap();
        if check {
            let output = Program::new("qemu-img").args(["check", "-U", text(&overlay)]).output().unwrap();
            // 3 is for leaked clusters alone.
            assert!(matches!(output.status.code(), Some(0 | 3)), "{output:?}");
        }
    }
    let server = serve_after_kill(&args);
    assert_holds(&server, &model);
    server.stop();
}

#[test]
fn a_part_of_an_image() {
    let folder = tempfile::tempdir_in("/var/tmp").unwrap();
    let (path, content) = image(folder.path());
    let server = Server::serve(&[text(&path), "-o", "1000", "--size", "70000", "--detect-zeroes", "on"]);
    let mut client = server.client(ReplyStyle::Structured);
    assert!(client.size == 70_000 && client.read(0, 70_000) == content[1000..71_000]);
    let mut model = content[1000..71_000].to_vec();
    change(&server, &mut model, 0x5eed_7020, 10);
    server.stop();
    let now = fs::read(&path).unwrap();
    assert!(
        now[..1000] == content[..1000] && now[1000..71_000] == model && now[71_000..] == content[71_000..]
    );
}

#[test]
fn zeroes_are_detected() {
    for (mode, kept) in [("off", true), ("on", true), ("unmap", false)] {
        let folder = tempfile::tempdir_in("/var/tmp").unwrap();
        let (path, _) = image(folder.path());
        let server = Server::serve(&[text(&path), "--detect-zeroes", mode]);
        let mut client = server.client(ReplyStyle::Structured);
        client.flush();
        let before = fs::metadata(&path).unwrap().blocks();
        client.write(0, &[0; MIB_LEN]);
        client.flush();
        let after = fs::metadata(&path).unwrap().blocks();
        assert_eq!(after >= before, kept, "{mode}: {before} blocks before, {after} after");
        assert!(client.read(0, MIB).iter().all(|byte| *byte == 0));
    }
}

/// Two exports that share a limit, and a third that has none.
#[test]
fn exports_share_a_limit() {
    let group = "group=slow,export=a,export=b,iops-total=50";
    let server = Server::serve(&[
        "mem:1M",
        "-x",
        "free",
        "--export",
        "a=mem:1M",
        "--export",
        "b=mem:1M",
        "--throttle",
        group,
    ]);
    let mut clients: Vec<_> =
        ["a", "b", "free"].map(|name| server.negotiate().enter(ReplyStyle::Structured, name)).into();
    let start = Instant::now();
    for _ in 0..25 {
        clients[0].read(0, 512);
        clients[1].read(0, 512);
    }
    // 50 requests at 50 a second, of which the bucket takes a few at once.
    assert!(start.elapsed() > Duration::from_millis(700), "{:?}", start.elapsed());
    for _ in 0..500 {
        clients[2].read(0, 512);
    }
}

/// A qemu-nbd that ends with its test.
struct Peer(Child);

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn allocation_depth_is_what_qemu_nbd_tells() {
    if lacks("allocation_depth_is_what_qemu_nbd_tells", &["qemu-nbd", "qemu-io", "nbdinfo"]) {
        return;
    }
    let folder = tempfile::tempdir_in("/var/tmp").unwrap();
    let (path, _) = image(folder.path());
    // Both count in sectors then.
    File::options().write(true).open(&path).unwrap().set_len(3 * MIB).unwrap();
    let overlay = folder.path().join("changes.qcow2");
    let changes = ["write -P 1 512k 128k", "write -z 1M 64k", "write -P 3 2M 4k"];
    for (name, args) in [
        ("raw", &[text(&path), "-A", "-r"][..]),
        ("snapshot", &[text(&path), "-A", "-s"]),
        ("overlay", &[text(&path), "-A", "--overlay", text(&overlay)]),
    ] {
        let server = Server::serve(args);
        let socket = folder.path().join(name);
        let uri = format!("nbd+unix:///?socket={}", text(&socket));
        let mut qemu = Program::new("qemu-nbd");
        qemu.args(["-A", "-t", "-k", text(&socket), "-f", "raw", text(&path)]);
        qemu.args(if name == "raw" { "-r" } else { "-s" }.split_whitespace());
        let _peer = Peer(qemu.spawn().unwrap());
        eventually("qemu-nbd listens", || socket.exists());
        if name != "raw" {
            for uri in [&server.uri(""), &uri] {
                let commands: Vec<&str> = changes.iter().flat_map(|change| ["-c", change]).collect();
                run("qemu-io", &[&["-f", "raw", uri][..], &commands].concat());
            }
        }
        let map = |uri: &str| run("nbdinfo", &["--map=qemu:allocation-depth", "--json", uri]);
        assert_eq!(map(&server.uri("")), map(&uri), "{name}");
        assert!(run("nbdinfo", &[&server.uri("")]).contains("qemu:allocation-depth"));
        assert!(run("nbdinfo", &["--map", &server.uri("")]).contains("data"));
        server.stop();
    }
    let server = Server::serve(&[text(&path)]);
    assert!(!run("nbdinfo", &[&server.uri("")]).contains("qemu:"), "only on demand");
}
