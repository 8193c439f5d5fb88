//! Commands whose result is a line: where the line cannot be written, they fail and leave nothing.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::support::mount::{missing, nbdbridge};
use crate::support::{CONTROL_FOLDER, LIMIT, PROGRAM, eventually, one_line, text};

/// Standard outputs that take nothing: a full disk, and a pipe without a reader.
fn unwritable() -> [Stdio; 2] {
    let (reader, closed) = std::io::pipe().unwrap();
    drop(reader);
    [File::options().write(true).open("/dev/full").unwrap().into(), closed.into()]
}

/// Runs a command whose result cannot be written; gives its one line on stderr.
fn refused(command: &mut Command, stdout: Stdio) -> String {
    let mut child = command.stdout(stdout).stderr(Stdio::piped()).spawn().unwrap();
    let until = Instant::now() + LIMIT;
    while child.try_wait().unwrap().is_none() {
        if Instant::now() >= until {
            // In good order: what it has made goes with it.
            kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
            panic!("{command:?} serves: {:?}", child.wait_with_output());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{command:?}: {output:?}");
    let line = one_line(&output);
    assert!(line.contains("cannot write to standard output: "), "{line}");
    line
}

/// Nothing of what was served from a folder is left: no process, mount, loop device or note.
fn assert_nothing(folder: &Path) {
    let name = text(folder);
    let processes = || {
        let all = fs::read_dir("/proc").unwrap().flatten();
        let lines = all.filter_map(|process| fs::read(process.path().join("cmdline")).ok());
        lines.filter(|line| String::from_utf8_lossy(line).contains(name)).count()
    };
    eventually("its processes end", || processes() == 0);
    assert!(!String::from_utf8_lossy(&fs::read("/proc/self/mounts").unwrap()).contains(name));
    for note in fs::read_dir("/run/nbdbridge").into_iter().flatten().flatten() {
        let is_it = fs::read(note.path()).is_ok_and(|note| String::from_utf8_lossy(&note).contains(name));
        assert!(!is_it, "{}", note.path().display());
    }
    for device in fs::read_dir("/sys/block").unwrap().flatten() {
        // Named as the image is, which is this test's own.
        let file = fs::read_to_string(device.path().join("loop/backing_file")).unwrap_or_default();
        assert!(!file.contains("result-that-is-lost"), "{}: {file}", device.path().display());
    }
    let listed = Command::new(PROGRAM).arg("devices").output().unwrap();
    assert!(!String::from_utf8_lossy(&listed.stdout).contains(name), "{listed:?}");
}

#[test]
fn what_is_made_and_cannot_be_told_is_undone() {
    const TEST: &str = "what_is_made_and_cannot_be_told_is_undone";
    if missing(TEST, &[]) {
        return;
    }
    let mut all = vec![&["fuse", "file"][..], &["fuse", "file", "--fork"], &["net", "-k", "sock", "--fork"]];
    if Path::new("/dev/loop-control").exists() {
        all.extend([&["attach", "--door", "fuse"][..], &["attach", "--door", "fuse", "--foreground"]]);
    } else {
        eprintln!("SKIP: {TEST}: attach: there are no loop devices here");
    }
    for words in all {
        for stdout in unwritable() {
            let folder = tempfile::tempdir().unwrap();
            let image = folder.path().join("result-that-is-lost");
            File::create(&image).unwrap().set_len(1 << 20).unwrap();
            let (command, rest) = words.split_first().unwrap();
            let words = [&[*command, text(&image)], rest, &["--pid-file", "pid"]].concat();
            let mut command = nbdbridge(folder.path(), &words);
            refused(command.env(CONTROL_FOLDER, folder.path().join("control")), stdout);
            assert_nothing(folder.path());
            let left: Vec<_> =
                fs::read_dir(folder.path()).unwrap().flatten().map(|e| e.file_name()).collect();
            assert!(left.iter().all(|name| name == "result-that-is-lost" || name == "control"), "{left:?}");
            let sockets = fs::read_dir(folder.path().join("control")).into_iter().flatten().count();
            assert_eq!(sockets, 0, "{words:?}");
        }
    }
}

/// Its addresses are those of its command line.
#[test]
fn a_server_in_the_foreground_needs_no_reader() {
    for stdout in unwritable() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("sock");
        let mut command = nbdbridge(folder.path(), &["net", "mem:1M", "-k", "sock"]);
        let log = File::create(folder.path().join("log")).unwrap();
        let child = command.env(CONTROL_FOLDER, folder.path().join("control")).stdout(stdout).stderr(log);
        let mut child = child.spawn().unwrap();
        let log = || fs::read_to_string(folder.path().join("log")).unwrap();
        eventually("it says that nobody was told", || log().contains("cannot write to standard output"));
        let served = crate::support::Stream::unix(&socket).is_ok();
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(served, "{}", log());
    }
}

#[test]
fn a_volume_whose_place_cannot_be_told_is_not_mounted() {
    if missing("a_volume_whose_place_cannot_be_told_is_not_mounted", &["mkfs.ext4", "umount"]) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let volume = |words: &[&str]| {
        let mut command = nbdbridge(folder.path(), &[&["volume"], words].concat());
        command.env(CONTROL_FOLDER, folder.path().join("run"));
        command.env("NBDBRIDGE_POOL", folder.path().join("pool"));
        command
    };
    /// A volume that a test has left mounted.
    struct Unmounted<F: Fn()>(F);
    impl<F: Fn()> Drop for Unmounted<F> {
        fn drop(&mut self) {
            self.0();
        }
    }
    let _unmounted = Unmounted(|| drop(volume(&["umount", "data"]).output()));
    let done = |words: &[&str]| {
        let output = volume(words).output().unwrap();
        assert!(output.status.success(), "{words:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    done(&["create", "data", "-o", "size=32M"]);
    for words in [&["mount", "data"][..], &["mount", "data", "--json"]] {
        for stdout in unwritable() {
            refused(&mut volume(words), stdout);
            assert!(done(&["inspect", "data", "--json"]).contains("\"holders\": {}"), "{words:?}");
            assert_nothing(folder.path());
        }
    }
    // One that was mounted before stays.
    let point = done(&["mount", "data"]);
    let [full, _] = unwritable();
    refused(&mut volume(&["mount", "data"]), full);
    let is_mounted = crate::support::mount::is_mounted(Path::new(point.trim_end()));
    done(&["umount", "data"]);
    done(&["rm", "data"]);
    assert!(is_mounted);
}
