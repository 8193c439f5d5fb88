//! fio writes blocks with checksums at depth 32, and reads them back: through either kind of socket, onto every
//! kind of source.

// Clippy's exception for tests does not reach their helpers.
#![allow(clippy::unwrap_used)]

mod support;

use std::process::Command;

use support::{Server, text};

/// Runs fio against a source; `flags` are the server's.
fn verify(test: &str, place: Option<&str>, tcp: bool, flags: &[&str]) {
    let engines = Command::new("fio").arg("--enghelp").output();
    if !engines.is_ok_and(|output| String::from_utf8_lossy(&output.stdout).contains("nbd")) {
        eprintln!("SKIP: {test}: no fio with an nbd engine here");
        return;
    }
    let folder = tempfile::tempdir_in(place.unwrap_or("/tmp")).unwrap();
    let path = folder.path().join("disk.img");
    let source = if place.is_some() { text(&path) } else { "mem:48M" };
    let create = if place.is_some() { &["--create", "48M"][..] } else { &[] };
    let port = if tcp { &["-p", "0"][..] } else { &[] };
    let server = Server::serve(&[&[source], create, port, flags].concat());
    let uri = if tcp { format!("nbd://{}/", server.address()) } else { server.uri("") };
    let common = [
        "--ioengine=nbd",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--verify_backlog=512",
        "--iodepth=32",
        "--randseed=99",
        "--group_reporting",
        "--minimal",
    ];
    // The second job of mixed sizes writes over what the first has left.
    let jobs: [&[&str]; 3] = [
        &["--name=small", "--rw=randwrite", "--bs=4k", "--size=12M"],
        &[
            "--name=mixed",
            "--rw=randrw",
            "--bsrange=512-256k",
            "--bs_unaligned=0",
            "--blockalign=512",
            "--size=48M",
        ],
        &["--name=large", "--rw=write", "--bs=1M", "--size=48M", "--fsync=7"],
    ];
    for job in jobs {
        let mut fio = Command::new("timeout");
        fio.args(["-k", "1", "60", "fio"]).args(job).args(common).arg(format!("--uri={uri}"));
        let output = fio.current_dir(folder.path()).output().unwrap();
        assert!(output.status.success(), "{test}, {}: {output:?}", job[0]);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!said.contains("verify:"), "{test}, {}: {said}", job[0]);
    }
    server.stop();
}

#[test]
fn memory_over_tcp() {
    verify("memory_over_tcp", None, true, &[]);
}

#[test]
fn memory_with_delays_over_unix() {
    let delays = ["--fault", "delay-ms=1,delay-rate=0.05,seed=3"];
    verify("memory_with_delays_over_unix", None, false, &delays);
}

#[test]
fn tmpfs_over_unix() {
    verify("tmpfs_over_unix", Some("/dev/shm"), false, &[]);
}

#[test]
fn disk_over_tcp() {
    verify("disk_over_tcp", Some("/var/tmp"), true, &[]);
}

#[test]
fn disk_past_the_page_cache_over_unix() {
    verify("disk_past_the_page_cache_over_unix", Some("/var/tmp"), false, &["--cache", "none"]);
}

#[test]
fn disk_by_threads_over_unix() {
    verify("disk_by_threads_over_unix", Some("/var/tmp"), false, &["--aio", "threads"]);
}

#[test]
fn disk_past_the_page_cache_by_threads_over_tcp() {
    let flags = ["--aio", "threads", "--cache", "none"];
    verify("disk_past_the_page_cache_by_threads_over_tcp", Some("/var/tmp"), true, &flags);
}
