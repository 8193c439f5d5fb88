//! Clients that people use, against the real server: qemu-img, qemu-io, nbdinfo and nbdcopy. A tool that is not
//! installed is skipped aloud.

// Clippy's exception for tests does not reach their helpers.
#![allow(clippy::unwrap_used)]

mod support;

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use support::{Random, Server, need, run, text, try_run};

const SIZE: u64 = 16 << 20;

/// An image with random data, zeroes and holes in it.
fn image(folder: &Path) -> PathBuf {
    let mut random = Random::new(0x5eed_5001);
    let path = folder.join("disk.img");
    let file = fs::File::create(&path).unwrap();
    file.set_len(SIZE).unwrap();
    for n in 0..16 {
        match n % 4 {
            0 | 3 => file.write_all_at(&random.bytes(1 << 20), n << 20).unwrap(),
            1 => file.write_all_at(&vec![0; 1 << 20], n << 20).unwrap(),
            _ => {}
        }
    }
    path
}

fn places() -> [tempfile::TempDir; 2] {
    ["/dev/shm", "/var/tmp"].map(|place| tempfile::tempdir_in(place).unwrap())
}

#[test]
fn qemu_img_info_and_map() {
    need!("qemu_img_info_and_map", "qemu-img");
    for folder in places() {
        let path = image(folder.path());
        let server = Server::serve(&[text(&path)]);
        let info = run("qemu-img", &["info", "--output=json", &server.uri("")]);
        assert!(info.contains(&format!("\"virtual-size\": {SIZE}")), "{info}");
        let map = |source: &str| {
            let map = run("qemu-img", &["map", "--output=json", "-f", "raw", source]);
            // What an export cannot know is where in the file an extent lies; whether zeroes are allocated it knows.
            let fields = |line: &str| {
                ["start", "length", "zero", "data"].map(|key| {
                    let value = line.split(&format!("\"{key}\": ")).nth(1).unwrap_or_default();
                    value.split([',', '}']).next().unwrap_or_default().to_owned()
                })
            };
            map.lines().map(fields).collect::<Vec<_>>()
        };
        let (ours, theirs) = (map(&server.uri("")), map(&format!("file:{}", text(&path))));
        assert!(ours.len() >= 8, "{ours:?}");
        assert_eq!(ours, theirs);
    }
}

#[test]
fn qemu_img_convert_and_compare() {
    need!("qemu_img_convert_and_compare", "qemu-img");
    for folder in places() {
        let path = image(folder.path());
        for source in ["file", "mem"] {
            let copy = folder.path().join("copy.img");
            let target = if source == "mem" { format!("mem:{SIZE}") } else { text(&copy).to_owned() };
            let size = SIZE.to_string();
            let from = Server::serve(&[text(&path), "-r"]);
            let to = Server::serve(&[&target, "--create", &size][..if source == "mem" { 1 } else { 3 }]);
            run("qemu-img", &["convert", "-n", "-f", "raw", "-O", "raw", &from.uri(""), &to.uri("")]);
            run("qemu-img", &["compare", "-f", "raw", "-F", "raw", &from.uri(""), &to.uri("")]);
            run("qemu-img", &["compare", "-U", "-f", "raw", "-F", "raw", text(&path), &to.uri("")]);
            if source == "file" {
                to.stop();
                assert!(fs::read(&copy).unwrap() == fs::read(&path).unwrap());
                fs::remove_file(&copy).unwrap();
            }
            let out = folder.path().join("out.img");
            run("qemu-img", &["convert", "-f", "raw", "-O", "raw", &from.uri(""), text(&out)]);
            assert!(fs::read(&out).unwrap() == fs::read(&path).unwrap());
            let kept = fs::metadata(&out).unwrap().blocks() * 512;
            assert!(kept < SIZE * 3 / 4, "{kept} bytes: the holes were not told");
        }
    }
}

#[test]
fn qemu_io_commands() {
    need!("qemu_io_commands", "qemu-io", "qemu-img");
    let [shm, disk] = places();
    for (folder, flags) in [
        (&shm, &[][..]),
        (&disk, &[]),
        (&disk, &["--cache", "none"]),
        (&disk, &["--cache", "directsync", "--aio", "threads"]),
    ] {
        let path = folder.path().join("disk.img");
        fs::write(&path, vec![0x11; 4 << 20]).unwrap();
        let server = Server::serve(&[&[text(&path)], flags].concat());
        let commands = [
            "write -P 0x5a 64k 128k",
            "write -f -P 0x5b 512k 64k",
            "write -z 1M 256k",
            "write -z -u 1536k 256k",
            "discard 2M 1M",
            "flush",
            "read -P 0x11 0 64k",
            "read -P 0x5a 64k 128k",
            "read -P 0x5b 512k 64k",
            "read -P 0 1M 256k",
            "read -P 0 1536k 256k",
            "aio_write -P 0x77 3M 128k",
            "aio_write -P 0x78 3200k 128k",
            "aio_flush",
            "read -P 0x77 3M 128k",
            "read -P 0x78 3200k 128k",
        ];
        let mut args = vec!["-f", "raw"];
        let uri = server.uri("");
        commands.iter().for_each(|command| args.extend(["-c", command]));
        args.push(&uri);
        let said = run("qemu-io", &args);
        assert!(!said.contains("failed"), "{flags:?}: {said}");
        let past = try_run("qemu-io", &["-f", "raw", "-c", "write 4M 64k", &uri]);
        assert!(!past.status.success());
        server.stop();
        let file = fs::read(&path).unwrap();
        assert!(file[64 << 10..192 << 10].iter().all(|byte| *byte == 0x5a));
        assert!(file[2 << 20..3 << 20].iter().all(|byte| *byte == 0), "discarded");
        assert!(fs::metadata(&path).unwrap().blocks() * 512 < 4 << 20, "{flags:?}: nothing was given back");
    }
}

#[test]
fn qemu_respects_our_locks_and_we_respect_its() {
    need!("qemu_respects_our_locks_and_we_respect_its", "qemu-img", "qemu-io");
    let folder = tempfile::tempdir_in("/var/tmp").unwrap();
    let path = image(folder.path());
    let refused = |program: &str, args: &[&str]| {
        let output = try_run(program, args);
        let words = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && words.contains("lock"), "{program} {args:?}: {output:?}");
    };
    let server = Server::serve(&[text(&path)]);
    refused("qemu-io", &["-f", "raw", "-c", "write 0 512", text(&path)]);
    // A reader of a raw image tolerates a writer, as it does beside qemu-nbd.
    run("qemu-img", &["compare", "-f", "raw", "-F", "raw", text(&path), &server.uri("")]);
    run("qemu-img", &["compare", "-U", "-f", "raw", "-F", "raw", text(&path), &server.uri("")]);
    refused(support::PROGRAM, &["net", text(&path), "-p", "0"]);
    server.stop();
    // Readers share an image, and keep writers out.
    let readers = [Server::serve(&[text(&path), "-r"]), Server::serve(&[text(&path), "-r"])];
    run("qemu-img", &["compare", "-f", "raw", "-F", "raw", text(&path), &readers[0].uri("")]);
    refused("qemu-io", &["-f", "raw", "-c", "write 0 512", text(&path)]);
    drop(readers);
    let free = Server::serve(&[text(&path), "--no-lock"]);
    run("qemu-io", &["-f", "raw", "-c", "write -P 9 0 512", text(&path)]);
    run("qemu-io", &["-f", "raw", "-c", "read -P 9 0 512", &free.uri("")]);
}

#[test]
fn nbdinfo_tells_what_we_tell() {
    need!("nbdinfo_tells_what_we_tell", "nbdinfo");
    let folder = tempfile::tempdir_in("/var/tmp").unwrap();
    let path = image(folder.path());
    let export = format!("disk={}", text(&path));
    let server = Server::serve(&["mem:1M", "-x", "a b", "-D", "words of it", "--export", &export, "-p", "0"]);
    let tcp = format!("nbd://{}", server.address());
    for uri in [server.uri("disk"), format!("{tcp}/disk")] {
        let listed = run("nbdinfo", &["--list", "--json", &uri]);
        assert!(listed.contains("\"a b\"") && listed.contains("\"disk\""), "{listed}");
        assert!(listed.contains("words of it"), "{listed}");
        let told = run("nbdinfo", &["--json", &uri]);
        for word in [
            &format!("\"export-size\": {SIZE}"),
            "\"is_read_only\": false",
            "\"can_multi_conn\": true",
            "\"can_flush\": true",
            "\"can_fua\": true",
            "\"can_trim\": true",
            "\"can_zero\": true",
            "\"can_df\": true",
            "\"structured\": true",
            "\"block_size_maximum\": 33554432",
            "base:allocation",
        ] {
            assert!(told.contains(word), "{word}: {told}");
        }
        assert_eq!(run("nbdinfo", &["--size", &uri]).trim(), SIZE.to_string());
        for question in ["cache", "df", "fast-zero", "flush", "fua", "multi-conn", "trim", "zero"] {
            run("nbdinfo", &["--can", question, &uri]);
        }
        let read_only = try_run("nbdinfo", &["--is", "read-only", &uri]);
        assert_eq!(read_only.status.code(), Some(2), "{read_only:?}");
    }
    let map = run("nbdinfo", &["--map", "--json", &server.uri("disk")]);
    assert_eq!(map.matches("\"description\": \"hole,zero\"").count(), 4, "{map}");
    assert!(!run("nbdinfo", &["--map", &server.uri("a%20b")]).is_empty());
    let wrong = try_run("nbdinfo", &[&server.uri("nobody")]);
    assert!(String::from_utf8_lossy(&wrong.stderr).contains("nobody"), "{wrong:?}");
}

#[test]
fn nbdcopy_both_ways() {
    need!("nbdcopy_both_ways", "nbdcopy");
    for folder in places() {
        let path = image(folder.path());
        let content = fs::read(&path).unwrap();
        let from = Server::serve(&[text(&path), "-r"]);
        let ways: [&[&str]; 4] = [
            &[],
            &["--connections=4", "--requests=64"],
            &["--synchronous"],
            &["--allocated", "--no-extents", "--flush", "--request-size=1048576"],
        ];
        for (n, flags) in ways.iter().enumerate() {
            let out = folder.path().join(format!("out{n}"));
            run("nbdcopy", &[flags, &[&from.uri("")[..], text(&out)][..]].concat());
            assert!(fs::read(&out).unwrap() == content, "{flags:?}");
            let target = folder.path().join(format!("target{n}"));
            fs::write(&target, vec![0xff; content.len()]).unwrap();
            let to = Server::serve(&[text(&target), "-p", "0"]);
            let tcp = format!("nbd://{}/", to.address());
            run("nbdcopy", &[flags, &[text(&path), &tcp][..]].concat());
            to.stop();
            assert!(fs::read(&target).unwrap() == content, "{flags:?}: to the server");
            let memory = Server::serve(&[&format!("mem:{SIZE}")]);
            run("nbdcopy", &[flags, &[&from.uri("")[..], &memory.uri("")][..]].concat());
            run("nbdcopy", &[flags, &[&memory.uri("")[..], text(&out)][..]].concat());
            assert!(fs::read(&out).unwrap() == content, "{flags:?}: between servers");
            if n == 0 {
                let kept = fs::metadata(&out).unwrap().blocks() * 512;
                assert!(kept < SIZE * 3 / 4, "{kept} bytes: the holes were not told");
            }
        }
    }
}

/// Both tools ask about each export within the handshake that listed them.
#[test]
fn common_clients_list_600_exports() {
    need!("common_clients_list_600_exports", "qemu-nbd", "nbdinfo");
    let exports: Vec<String> = (0..600).map(|n| format!("volume-{n}=null:1M")).collect();
    let args: Vec<&str> = exports.iter().flat_map(|export| ["--export", export]).collect();
    let server = Server::serve(&args);
    let socket = server.socket();
    let qemu = run("qemu-nbd", &["--list", "--socket", text(&socket)]);
    assert!(qemu.contains("exports available: 600"), "{qemu}");
    let nbdinfo = run("nbdinfo", &["--list", &server.uri("")]);
    for (listed, start) in [(&qemu, "export: '"), (&nbdinfo, "export=\"")] {
        for n in [0, 311, 599] {
            assert!(listed.contains(&format!("{start}volume-{n}")), "{n} of {listed}");
        }
        assert_eq!(listed.matches(start).count(), 600);
    }
}
