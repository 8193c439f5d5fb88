//! Whatever becomes of the process that froze a file system, writers are let go on.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use super::pool::{Pool, assert_sound, has_file, write_file};
use crate::support::eventually;
use crate::support::mount::missing;

/// Large enough that a copy of it takes a moment.
const LARGE: usize = 160 << 20;

/// A mounted volume, on a file system without reflinks.
fn volume(pool: &Pool) -> PathBuf {
    pool.create("a", "size=512M door=fuse");
    let point = pool.mount("a");
    write_file(&point.join("large"), LARGE, 9);
    point
}

/// Starts a command, and stops its process (SIGSTOP) while it has copied a part to `part`. None where it was too quick.
fn stop_in_the_middle(pool: &Pool, words: &[&str], part: &Path) -> Option<Child> {
    let mut child = pool.command(words).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let until = Instant::now() + Duration::from_secs(20);
    while !part.exists() {
        if child.try_wait().unwrap().is_some() || Instant::now() > until {
            panic!("it did not come to copying: {:?}", child.wait_with_output());
        }
        thread::sleep(Duration::from_micros(200));
    }
    kill_process(Pid::from_child(&child), Signal::STOP).unwrap();
    // Stopped is what it is when the piece that is being copied is done.
    let stat = format!("/proc/{}/stat", child.id());
    eventually("it does not stop", || fs::read_to_string(&stat).is_ok_and(|stat| stat.contains(") T ")));
    if part.exists() {
        return Some(child);
    }
    child.kill().unwrap();
    child.wait().unwrap();
    None
}

/// The same with a snapshot of `a`; it is tried again until it is caught.
fn snapshot_in_the_middle(pool: &Pool, limit: &str) -> (Child, String) {
    for n in 0..20 {
        let name = format!("s{n}");
        let part = pool.path("a", "snapshots/.new/disk.raw");
        let words = ["snapshot", "a", &name, "--freeze-limit", limit];
        if let Some(mut child) = stop_in_the_middle(pool, &words, &part) {
            // The guard is there as long as it is frozen.
            if guard_of(&child).is_some() {
                return (child, name);
            }
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }
    panic!("every copy was done before it could be stopped");
}

/// A copy `b` of a volume or a snapshot, stopped; it is tried again until it is caught.
fn clone_in_the_middle(pool: &Pool, origin: &str) -> Child {
    let part = pool.path("b", "disk.raw");
    let child = (0..20).find_map(|_| {
        let mut child = stop_in_the_middle(pool, &["clone", origin, "b"], &part)?;
        if pool.record("b")["pending"].is_null() {
            child.kill().unwrap();
            child.wait().unwrap();
            pool.ok(&["rm", "b"]);
            return None;
        }
        Some(child)
    });
    child.expect("every copy was done before it could be stopped")
}

/// A write that is held up as long as the file system is frozen.
fn write_in_background(point: &Path) -> mpsc::Receiver<()> {
    let (done, wait) = mpsc::channel();
    let path = point.join("held-up");
    thread::spawn(move || {
        write_file(&path, 4096, 10);
        let _ = done.send(());
    });
    wait
}

/// The process that looks after a file system frozen by this one.
fn guard_of(child: &Child) -> Option<Pid> {
    let folder = format!("/proc/{0}/task/{0}/children", child.id());
    let all = fs::read_to_string(&folder).unwrap();
    let is_guard = |pid: &&str| {
        fs::read_to_string(format!("/proc/{pid}/cmdline")).is_ok_and(|line| line.contains("guard-frozen"))
    };
    all.split_whitespace().find(is_guard).and_then(|pid| Pid::from_raw(pid.parse().unwrap()))
}

/// Nothing is left of a snapshot, and the volume is well.
fn assert_nothing_left(pool: &Pool, point: &Path, name: &str) {
    pool.ok(&["ls"]);
    let left = pool.snapshot_files("a");
    assert!(left.iter().all(|left| !left.starts_with('.') && left != name), "{left:?}");
    assert!(pool.record("a")["pending"].is_null());
    assert!(has_file(&point.join("large"), LARGE, 9) && has_file(&point.join("held-up"), 4096, 10));
    pool.umount("a");
    assert_sound(pool, "a");
}

#[test]
fn a_copy_that_takes_too_long_holds_nobody_up() {
    if missing("a_copy_that_takes_too_long_holds_nobody_up", &["mkfs.ext4"]) {
        return;
    }
    let pool = Pool::new();
    let point = volume(&pool);
    let (child, name) = snapshot_in_the_middle(&pool, "1s");
    // Nobody asks for it: the guard thaws by itself.
    write_in_background(&point).recv_timeout(Duration::from_secs(20)).expect("it stays frozen");
    kill_process(Pid::from_child(&child), Signal::CONT).unwrap();
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("--freeze-limit") && said.lines().count() == 1, "{said}");
    assert_nothing_left(&pool, &point, &name);
}

#[test]
fn a_killed_process_leaves_nothing_frozen() {
    if missing("a_killed_process_leaves_nothing_frozen", &["mkfs.ext4"]) {
        return;
    }
    let pool = Pool::new();
    let point = volume(&pool);
    let (mut child, name) = snapshot_in_the_middle(&pool, "100s");
    let writer = write_in_background(&point);
    assert!(writer.recv_timeout(Duration::from_millis(50)).is_err(), "it is not frozen");
    child.kill().unwrap();
    child.wait().unwrap();
    writer.recv_timeout(Duration::from_secs(20)).expect("it stays frozen");
    assert_nothing_left(&pool, &point, &name);
}

#[test]
fn when_both_are_killed_the_next_command_thaws() {
    if missing("when_both_are_killed_the_next_command_thaws", &["mkfs.ext4"]) {
        return;
    }
    let pool = Pool::new();
    let point = volume(&pool);
    let (mut child, name) = snapshot_in_the_middle(&pool, "100s");
    let guard = guard_of(&child).unwrap();
    // What ends a service's processes in good order is not for it.
    kill_process(guard, Signal::TERM).unwrap();
    let writer = write_in_background(&point);
    assert!(writer.recv_timeout(Duration::from_millis(50)).is_err(), "it is not frozen");
    kill_process(guard, Signal::KILL).unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(writer.recv_timeout(Duration::from_millis(50)).is_err(), "who has thawed it?");
    pool.ok(&["ls"]);
    writer.recv_timeout(Duration::from_secs(20)).expect("it stays frozen");
    assert_nothing_left(&pool, &point, &name);
}

#[test]
fn a_killed_copy_is_none() {
    if missing("a_killed_copy_is_none", &["mkfs.ext4"]) {
        return;
    }
    let pool = Pool::new();
    volume(&pool);
    pool.umount("a");
    let mut child = clone_in_the_middle(&pool, "a");
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(pool.refusal(&["inspect", "b"]).contains("no volume is named `b`"));
    pool.ok(&["clone", "a", "b"]);
    let point = pool.mount("b");
    assert!(has_file(&point.join("large"), LARGE, 9));
}

#[test]
fn a_copy_of_a_snapshot_holds_nobody_up() {
    if missing("a_copy_of_a_snapshot_holds_nobody_up", &["mkfs.ext4"]) {
        return;
    }
    let pool = Pool::new();
    volume(&pool);
    pool.ok(&["snapshot", "a", "s"]);
    let mut child = clone_in_the_middle(&pool, "a@s");
    pool.umount("a");
    pool.ok(&["snapshot", "a", "s", "--remove"]);
    pool.ok(&["rm", "a"]);
    kill_process(Pid::from_child(&child), Signal::CONT).unwrap();
    assert!(child.wait().unwrap().success());
    assert!(has_file(&pool.mount("b").join("large"), LARGE, 9));
}
