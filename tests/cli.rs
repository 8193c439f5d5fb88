//! The program as a person at a terminal meets it: usage errors, help, `create`, completions, and qemu-nbd's
//! flags. Nothing here serves an image.

// Clippy's exception for tests does not reach their helpers.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, Output};

fn nbdbridge(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_nbdbridge")).args(args).env_remove("NBDBRIDGE_LOG").output().unwrap()
}

fn stdout(args: &[&str]) -> String {
    let output = nbdbridge(args);
    assert!(output.status.success(), "{args:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// Runs what must fail with this status, and gives its one line.
fn failure(args: &[&str], status: i32) -> String {
    let output = nbdbridge(args);
    assert_eq!(output.status.code(), Some(status), "{args:?}: {output:?}");
    assert_eq!(String::from_utf8_lossy(&output.stdout), "", "{args:?}");
    let line = String::from_utf8(output.stderr).unwrap();
    assert!(line.starts_with("nbdbridge: ") && line.ends_with('\n'), "{args:?}: {line}");
    assert_eq!(line.lines().count(), 1, "{args:?}: {line}");
    line
}

#[test]
fn what_is_far_too_long_is_not_echoed() {
    let name = "n".repeat(5000);
    for args in [
        &["net", "mem:1M", "-x", &name][..],
        &["net", &format!("--{name}")],
        &[&name],
        &["net", "mem:1M", "--throttle", &format!("export={name},iops-total=1")],
    ] {
        let line = failure(args, 2);
        assert!(line.contains("nnn...") && line.len() < 400, "{line}");
    }
    assert!(
        failure(&["net", "mem:1M", "-x", &name], 2).contains("longer than the 4096 bytes that NBD allows")
    );
}

#[test]
fn usage_errors_are_one_line_and_exit_2() {
    for (args, words) in [
        (&["net"][..], "nothing to serve"),
        (&["disk.img"], "nbdbridge net IMAGE"),
        (&["net", "a", "b"], "'b'"),
        (&["net", "a", "--prot", "1"], "'--port'"),
        (&["net", "a", "--port", "70000"], "70000 is not in 0..=65535"),
        (&["net", "a", "--create", "many"], "not a size"),
        (&["net", "a", "--create", "9E"], "too large"),
        (&["net", "mem:"], "not a size"),
        (&["net", "a", "--cache", "x"], "possible values: writeback, none, directsync, writethrough, unsafe"),
        (&["net", "a", "--handshake-limit", "soon"], "not a time"),
        (&["net", "a", "--memory-budget", "1M"], "at least 128 MiB"),
        (&["create", "-f", "qcow2", "-b", "./a", "a"], "its own backing file"),
        (&["net", "a", "-f", "vhdx"], "qemu-img convert -f vhdx"),
        (&["net", "a", "--detect-zeroes", "some"], "possible values: off, on, unmap"),
        (&["net", "a", "--detect-zeroes", "unmap", "--discard", "ignore"], "needs --discard unmap"),
        (&["net", "a", "-P", "1", "-o", "1"], "--partition"),
        (&["net", "a", "-s", "-r"], "--snapshot"),
        (&["net", "--export", "a=b", "--export", "c=d", "--overlay", "e"], "use --snapshot"),
        (&["net", "mem:1M", "--throttle", "export=x,iops-total=1"], "no export is named `x`"),
        (&["net", "mem:1M", "--overlay", "x"], "and mem:1048576 cannot"),
        (&["net", "mem:1M", "-o", "2M"], "past the end"),
        (&["net", "mem:1M", "-o", "1K", "--size", "1M"], "past the end"),
        (&["net", "a", "-n", "--cache", "none"], "--nocache"),
        (&["net", "--export", "a"], "NAME=SOURCE"),
        (&["net", "a", "--export", "=b"], "two exports"),
        (&["net", "http://host/"], "URLs"),
        (&["net", "nbds://host/"], "TLS"),
        (&["net", "nbd://host/?connections=0"], "from 1 to 64"),
        (&["info", "nbd+unix:///x"], "socket=PATH"),
        (&["create", "a"], "<SIZE>"),
        (&["create", "a", "1G\n2G"], "not a size"),
        (&["completions", "cmd.exe"], "possible values: bash"),
    ] {
        let line = failure(args, 2);
        assert!(line.contains(words), "{args:?}: {line}");
    }
    let nothing = nbdbridge(&[]);
    assert_eq!(nothing.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&nothing.stderr).contains("Usage: nbdbridge"));
}

#[test]
fn a_log_filter_that_makes_no_sense() {
    let output = Command::new(env!("CARGO_BIN_EXE_nbdbridge"))
        .args(["net", "/nowhere/disk.img"])
        .env("NBDBRIDGE_LOG", "bridge=loud")
        .output()
        .unwrap();
    let line = String::from_utf8(output.stderr).unwrap();
    assert_eq!((output.status.code(), line.lines().count()), (Some(2), 1), "{line}");
    assert!(line.contains("NBDBRIDGE_LOG"), "{line}");
}

#[test]
fn help_lists_everything() {
    let help = stdout(&["--help"]);
    for word in [
        "net",
        "create",
        "bench",
        "ps",
        "stats",
        "throttle",
        "resize",
        "completions",
        "--version",
        "nbdbridge net disk.img",
    ] {
        assert!(help.contains(word), "{word}");
    }
    let help = stdout(&["net", "--help"]);
    for flag in [
        "-b, --bind",
        "-p, --port",
        "-k, --socket",
        "-x, --export-name",
        "-D, --description",
        "-e, --shared",
        "-f, --format",
        "-r, --read-only",
        "-o, --offset",
        "--size",
        "-P, --partition",
        "-s, --snapshot",
        "--overlay",
        "--detect-zeroes",
        "-A, --allocation-depth",
        "-t, --persistent",
        "--once",
        "--fork",
        "--pid-file",
        "--handshake-limit",
        "--cache",
        "-n, --nocache",
        "--aio",
        "--discard",
        "--throttle",
        "-v, --verbose",
        "-V, --version",
        "--export <NAME=SOURCE",
        "--create",
        "--workers",
        "--max-in-flight",
        "--memory-budget",
        "--send-timeout",
        "--drain-timeout",
        "--no-lock",
        "mem:SIZE",
        "null:SIZE",
        "NBDBRIDGE_LOG",
    ] {
        assert!(help.contains(flag), "{flag}");
    }
    assert!(!help.contains("--tls-creds"), "flags that we only answer stay out of the help");
    let version = format!("nbdbridge {}\n", env!("CARGO_PKG_VERSION"));
    assert_eq!(stdout(&["--version"]), version);
    assert_eq!(stdout(&["-V"]), version);
    assert!(stdout(&["net", "-V"]).contains(env!("CARGO_PKG_VERSION")));
}

#[test]
fn completions_for_the_shells() {
    for (shell, mark) in
        [("bash", "complete -F"), ("zsh", "#compdef nbdbridge"), ("fish", "complete -c nbdbridge")]
    {
        let script = stdout(&["completions", shell]);
        assert!(script.contains(mark) && script.contains("max-in-flight"), "{shell}");
    }
}

#[test]
fn create_makes_sparse_images() {
    let folder = tempfile::tempdir().unwrap();
    for (size, bytes) in [("0", 0), ("1000", 1000), ("1.5G", 3 << 29), ("64MiB", 64 << 20)] {
        let path = folder.path().join(size);
        let said = stdout(&["create", path.to_str().unwrap(), size, "-f", "raw"]);
        assert!(said.contains(path.to_str().unwrap()) && said.contains(&bytes.to_string()), "{said}");
        let metadata = fs::metadata(&path).unwrap();
        assert_eq!((metadata.len(), metadata.blocks()), (bytes, 0));
    }
    let path = folder.path().join("allocated");
    stdout(&["create", "--allocate", path.to_str().unwrap(), "1M"]);
    assert_eq!(fs::metadata(&path).unwrap().blocks(), 2048);
}

#[test]
fn create_never_touches_what_exists() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.img");
    fs::write(&path, "precious").unwrap();
    for there in [&path, folder.path()] {
        let line = failure(&["create", there.to_str().unwrap(), "1M"], 1);
        assert!(line.contains("exists already") && line.contains(there.to_str().unwrap()), "{line}");
    }
    assert_eq!(fs::read(&path).unwrap(), b"precious");
}

#[test]
fn create_in_places_that_will_not_do() {
    let folder = tempfile::tempdir().unwrap();
    let missing = folder.path().join("missing/disk.img");
    let line = failure(&["create", missing.to_str().unwrap(), "1M"], 1);
    assert!(line.contains("missing does not exist"), "{line}");
    let in_a_file = folder.path().join("file");
    fs::write(&in_a_file, "").unwrap();
    failure(&["create", in_a_file.join("disk.img").to_str().unwrap(), "1M"], 1);
    let line = failure(&["create", "/proc/disk.img", "1M"], 1);
    assert!(line.contains("/proc/disk.img"), "{line}");
}

#[test]
fn create_without_room_leaves_nothing() {
    // tmpfs refuses at once what it can never hold; other file systems would first fill up.
    let shm = Path::new("/dev/shm");
    let limited = rustix::fs::statfs(shm).is_ok_and(|fs| fs.f_type == 0x0102_1994 && fs.f_blocks > 0);
    if !limited {
        eprintln!("SKIP: create_without_room_leaves_nothing: /dev/shm is no tmpfs with a limit");
        return;
    }
    let folder = tempfile::tempdir_in(shm).unwrap();
    let path = folder.path().join("disk.img");
    let line = failure(&["create", "--allocate", path.to_str().unwrap(), "1P"], 1);
    assert!(line.contains("1 PiB") && line.contains("No space left"), "{line}");
    assert!(!path.exists());
}

/// Every flag that the installed qemu-nbd lists is ours too, or is answered with the way to get there.
#[test]
fn every_flag_of_qemu_nbd_is_known() {
    let Ok(help) = Command::new("qemu-nbd").arg("--help").output() else {
        eprintln!("SKIP: every_flag_of_qemu_nbd_is_known: no qemu-nbd here");
        return;
    };
    let help = String::from_utf8(help.stdout).unwrap();
    let mut walked = 0;
    for line in help.lines().map(str::trim_start).filter(|line| line.starts_with('-')) {
        // "-p, --port=PORT   words" or "--object type,id=ID   words" or "-T, --trace [[enable=]..."
        let spec = line.split("  ").next().unwrap_or_default();
        for word in spec.split(", ").filter(|word| word.starts_with('-')) {
            let flag = word.split(['=', ' ']).next().unwrap_or_default();
            check_foreign_flag(flag, spec.contains('='));
            walked += 1;
        }
    }
    assert!(walked >= 40, "only {walked} flags in:\n{help}");
}

fn check_foreign_flag(flag: &str, takes_value: bool) {
    if ["-h", "--help", "-V", "--version"].contains(&flag) {
        stdout(&["net", flag]);
        return;
    }
    let value = match flag {
        "-b" | "--bind" => "0.0.0.0",
        "-f" | "--format" => "raw",
        "--cache" => "none",
        "--aio" => "native",
        "--discard" => "unmap",
        "--detect-zeroes" => "off",
        _ => "1",
    };
    let args = if takes_value { &["net", flag, value][..] } else { &["net", flag] };
    // With nothing to serve even our own flags end here; what is asked is that nobody calls the flag unknown.
    let line = failure(args, 2);
    let ours = line.contains("nothing to serve") || line.contains("SOURCE, which is missing");
    let answered = line.contains(&format!("{flag}/")) || line.contains(&format!("{flag}: "));
    assert!(ours || answered, "{args:?}: {line}");
}

#[test]
fn flags_we_do_not_have_point_to_our_way() {
    for (args, words) in [
        (&["-c", "/dev/nbd0", "x"][..], "nbd-client"),
        (&["-c", "/dev/nbd0", "x"], "nbdbridge ublk"),
        (&["-d", "/dev/nbd0"], "nbdbridge detach"),
        (&["-L"], "nbdbridge info --list"),
        (&["-l", "snap", "x"], "qemu-img convert"),
        (&["-B", "bitmap", "x"], "qemu-nbd -B"),
        (&["-T", "nbd_*", "x"], "NBDBRIDGE_LOG"),
        (&["--image-opts", "driver=raw"], "file:PATH"),
        (&["--object", "secret,id=s", "--tls-creds", "s", "x"], "--throttle"),
        (&["--tls-creds", "s", "x"], "stunnel"),
        (&["--tls-authz", "s", "x"], "TLS"),
        (&["--tls-hostname", "s", "x"], "TLS"),
        (&["--selinux-label", "l", "x"], "runcon"),
    ] {
        let line = failure(&[&["net"], args].concat(), 2);
        assert!(line.contains(words), "{args:?}: {line}");
    }
}
