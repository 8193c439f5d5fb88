//! Servers that are killed or stopped at a bad moment: nobody waits for them for ever, and what they leave is found.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::support::mount::{Mount, missing, nbdbridge, run};
use crate::support::{PROGRAM, eventually, one_line};

/// What is wrong is told within this time, with a loaded machine in mind.
const SOON: Duration = Duration::from_secs(30);

fn skip(test: &str) -> bool {
    if !Path::new("/dev/loop-control").exists() {
        eprintln!("SKIP: {test}: there are no loop devices here");
        return true;
    }
    missing(test, &["umount"])
}

/// Waits for a process; None where it does not end in time.
fn wait(child: &mut Child, limit: Duration) -> Option<std::process::ExitStatus> {
    let until = Instant::now() + limit;
    while Instant::now() < until {
        if let Some(status) = child.try_wait().unwrap() {
            return Some(status);
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    None
}

/// Runs a command of nbdbridge's that must end soon, however it ends.
fn ends_soon(words: &[&str]) -> Output {
    let mut command = Command::new("timeout");
    let output = command.args(["-s", "KILL", "25", PROGRAM]).args(words).output().unwrap();
    assert!(output.status.code().is_some_and(|code| code != 124 && code != 137), "{words:?}: {output:?}");
    output
}

fn children(pid: u32) -> Vec<u32> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let lists = tasks.map(|task| fs::read_to_string(task.path().join("children")).unwrap_or_default());
    lists
        .flat_map(|list| list.split_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<_>>())
        .collect()
}

fn is_in(pid: u32, function: &str) -> bool {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    tasks
        .into_iter()
        .any(|task| fs::read_to_string(task.path().join("stack")).unwrap_or_default().contains(function))
}

fn kill(pid: u32) {
    // At worst it has ended.
    let _ = kill_process(Pid::from_raw(pid.cast_signed()).unwrap(), Signal::KILL);
}

/// Folders, mounts and loop devices that an attachment by this process has left.
fn left_of(pid: u32) -> Vec<String> {
    let folder = PathBuf::from(format!("/run/nbdbridge/attach-{pid}"));
    let mut left = Vec::new();
    if folder.exists() {
        left.push(folder.display().to_string());
    }
    let name = format!("attach-{pid}/");
    let mounts = String::from_utf8_lossy(&fs::read("/proc/self/mounts").unwrap()).into_owned();
    left.extend(mounts.lines().filter(|line| line.contains(&name)).map(str::to_owned));
    for device in fs::read_dir("/sys/block").unwrap().flatten() {
        let backing = fs::read_to_string(device.path().join("loop/backing_file")).unwrap_or_default();
        if backing.contains(&name) {
            left.push(format!("{} over {backing}", device.path().display()));
        }
    }
    let notes = fs::read_dir("/run/nbdbridge").unwrap().flatten().map(|note| note.path());
    left.extend(
        notes
            .filter(|note| note.to_str().unwrap().contains(&format!("/fuse-{pid}-")))
            .map(|note| note.display().to_string()),
    );
    left
}

/// The kernel asks the file that a loop device is made over; its server is killed at that moment.
#[test]
fn attach_is_killed_while_its_device_is_made() {
    const TEST: &str = "attach_is_killed_while_its_device_is_made";
    if skip(TEST) {
        return;
    }
    let slow = Mount::image(8 << 20, &["-f", "raw", "--fault", "op=flush,delay-ms=3000"]);
    let mut attach = nbdbridge(slow.folder.path(), &["attach", "file", "-f", "raw", "--door", "fuse"])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let until = Instant::now() + SOON;
    let mut server = None;
    while server.is_none() && Instant::now() < until && attach.try_wait().unwrap().is_none() {
        // The server itself, or a helper of its own.
        server = children(attach.id()).into_iter().find(|server| {
            std::iter::once(*server).chain(children(*server)).any(|pid| is_in(pid, "loop_configure"))
        });
    }
    let server = server.expect("it was never seen in LOOP_CONFIGURE");
    kill(server);
    let status = wait(&mut attach, SOON);
    // Whatever became of it, the mount must go.
    let clean_up = || {
        let _ = Command::new("umount").args(["-f", &format!("/run/nbdbridge/attach-{server}/file")]).output();
    };
    if status.is_none() {
        clean_up();
    }
    assert!(status.is_some_and(|status| status.code() == Some(1)), "attach: {status:?}");
    ends_soon(&["devices"]);
    eventually("nothing is left", || left_of(server).is_empty());
}

/// Killed at each step of coming up, with all that it has started; what is left is listed, and `detach` ends it.
#[test]
fn attach_is_killed_at_each_step() {
    const TEST: &str = "attach_is_killed_at_each_step";
    if skip(TEST) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    fs::File::create(folder.path().join("disk.img")).unwrap().set_len(8 << 20).unwrap();
    let note = |pid: u32| fs::read_to_string(format!("/run/nbdbridge/fuse-{pid}-0.json")).unwrap_or_default();
    let at = |pid: u32, name: &str| PathBuf::from(format!("/run/nbdbridge/attach-{pid}{name}"));
    let mounted = |pid: u32| {
        let mounts = String::from_utf8_lossy(&fs::read("/proc/self/mounts").unwrap()).into_owned();
        mounts.contains(&format!("attach-{pid}/"))
    };
    let over = |pid: u32| left_of(pid).iter().any(|left| left.contains(" over "));
    let steps: [(&str, &dyn Fn(u32) -> bool); 7] = [
        ("noted", &|pid| !note(pid).is_empty()),
        ("folder", &|pid| at(pid, "").exists()),
        ("file", &|pid| at(pid, "/disk.img").exists()),
        ("mounted", &mounted),
        ("number noted", &|pid| note(pid).contains("\"number\":\"")),
        ("loop device", &over),
        ("device noted", &|pid| note(pid).contains("/dev/loop")),
    ];
    for (step, is_there) in steps.iter().cycle().take(21) {
        let mut attach = nbdbridge(folder.path(), &["attach", "disk.img", "-f", "raw", "--door", "fuse"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let until = Instant::now() + SOON;
        let server = loop {
            match children(attach.id()).first() {
                Some(server) => break *server,
                None if attach.try_wait().unwrap().is_some() => break 0,
                None => assert!(Instant::now() < until, "{step}: no server"),
            }
        };
        while !is_there(server) && attach.try_wait().unwrap().is_none() && Instant::now() < until {}
        // The one that waits first: it would clear what the others leave.
        kill(attach.id());
        let helpers = children(server);
        kill(server);
        helpers.into_iter().for_each(kill);
        attach.wait().unwrap();
        eventually("the server is gone", || {
            let state = fs::read_to_string(format!("/proc/{server}/stat")).unwrap_or_default();
            state.is_empty() || state.contains(") Z ")
        });
        for _ in 0..3 {
            let listed = String::from_utf8(ends_soon(&["devices"]).stdout).unwrap();
            let ours = |line: &&str| line.split_whitespace().any(|word| word == server.to_string());
            let Some(row) = listed.lines().find(ours) else { break };
            assert!(row.contains(" dead "), "{step}: {listed}");
            let place = row.split_whitespace().next().unwrap();
            let ended = ends_soon(&["detach", place]);
            assert!(ended.status.success(), "{step}: {row}: {ended:?}");
        }
        assert_eq!(left_of(server), Vec::<String>::new(), "{step}");
    }
}

/// Commands end although a server is stopped, and say what is wrong.
#[test]
fn nobody_waits_for_a_stopped_server() {
    const TEST: &str = "nobody_waits_for_a_stopped_server";
    if skip(TEST) {
        return;
    }
    let mut mount = Mount::image(8 << 20, &[]);
    let file = mount.path.to_str().unwrap().to_owned();
    let output = nbdbridge(mount.folder.path(), &["attach", "--door", "fuse", "mem:8M"]).output().unwrap();
    let device = String::from_utf8(output.stdout).unwrap().trim().to_owned();
    let listed = run(PROGRAM, &[&"devices"]);
    let row = listed.lines().find(|line| line.starts_with(&format!("{device} "))).expect("it is listed");
    let attached = row.split_whitespace().nth(5).unwrap().parse::<i32>().unwrap();
    let attached = Pid::from_raw(attached).unwrap();
    mount.server.signal(Signal::STOP);
    kill_process(attached, Signal::STOP).unwrap();
    let results = std::panic::catch_unwind(|| {
        for place in [&file, &device] {
            // A signal takes a moment to arrive.
            eventually("it is listed as stopped", || {
                let listed = String::from_utf8(ends_soon(&["devices"]).stdout).unwrap();
                let row = listed.lines().find(|line| line.starts_with(&format!("{place} ")));
                row.is_some_and(|row| row.contains(" stopped "))
            });
            let refused = ends_soon(&["detach", place]);
            assert_eq!(refused.status.code(), Some(1), "{refused:?}");
            assert!(one_line(&refused).contains("is stopped; let it go on (kill -CONT "), "{refused:?}");
        }
        ends_soon(&["ps"]);
        ends_soon(&["volume", "ls"]);
        // A second server at the same place does not wait either.
        let again = ends_soon(&["fuse", "mem:1M", &file]);
        assert_eq!(again.status.code(), Some(1), "{again:?}");
    });
    kill_process(attached, Signal::CONT).unwrap();
    mount.server.signal(Signal::CONT);
    run(PROGRAM, &[&"detach", &device]);
    mount.stop();
    if let Err(panic) = results {
        std::panic::resume_unwind(panic);
    }
}
