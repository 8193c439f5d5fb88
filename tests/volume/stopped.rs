//! Data planes that are stopped (`kill -STOP`): every command ends soon, and names the process.

use std::fs;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::ends::Remote;
use crate::support::{PROGRAM, eventually, one_line};
use crate::world::World;

/// Every command ends within this time, on a loaded machine too.
const SOON: Duration = Duration::from_secs(40);

/// Stopped until this is dropped.
struct Stopped(Pid);

impl Stopped {
    fn new(process: Pid) -> Stopped {
        kill_process(process, Signal::STOP).unwrap();
        let stopped = Stopped(process);
        let stat = format!("/proc/{}/stat", process.as_raw_nonzero());
        soon("it stops", || fs::read_to_string(&stat).unwrap_or_default().contains(") T "));
        stopped
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        // At worst it has been ended.
        let _ = kill_process(self.0, Signal::CONT);
    }
}

/// Waits for a command, which must end soon.
fn ends_soon(mut child: Child) -> Output {
    let until = Instant::now() + SOON;
    while child.try_wait().unwrap().is_none() {
        if Instant::now() >= until {
            let tasks = fs::read_dir(format!("/proc/{}/task", child.id())).unwrap().flatten();
            let stacks: Vec<_> = tasks.map(|task| fs::read_to_string(task.path().join("stack"))).collect();
            let _ = child.kill();
            panic!("it does not end: {stacks:?}");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    child.wait_with_output().unwrap()
}

/// Waits until it holds, for longer than `eventually`.
fn soon(what: &str, mut holds: impl FnMut() -> bool) {
    let until = Instant::now() + 2 * SOON;
    while !holds() {
        assert!(Instant::now() < until, "{what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn start(command: &mut Command) -> Child {
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

/// `nbdbridge volume WORD...`, which must end soon.
fn call(world: &World, line: &str) -> Output {
    let words: Vec<_> = line.split_whitespace().collect();
    ends_soon(start(&mut world.command(&[&["volume"], &words[..]].concat())))
}

#[test]
fn commands_beside_a_stopped_data_plane() {
    let Some(world) = World::here("commands_beside_a_stopped_data_plane", &[]) else { return };
    world.ok("create a -o size=32M -o door=fuse");
    world.ok("create b -o size=32M -o door=fuse");
    let point = world.mount("a");
    fs::write(point.join("file"), "kept").unwrap();
    let plane = world.plane("a");
    let stopped = Stopped::new(plane);
    let process = format!("process {}", plane.as_raw_nonzero());
    for line in ["ls", "inspect a"] {
        let output = call(&world, line);
        assert!(output.status.success(), "{line}: {output:?}");
        let said = String::from_utf8(output.stdout).unwrap();
        assert!(said.contains(&process) && said.contains("is stopped"), "{line}: {said}");
    }
    let devices = ends_soon(start(Command::new(PROGRAM).arg("devices")));
    assert!(String::from_utf8(devices.stdout).unwrap().contains(" stopped "));
    for line in [
        "mount a",
        "umount a",
        "rm --force a",
        "resize a +32M",
        "snapshot a s",
        "limit a iops-total=9",
        "fsck a",
    ] {
        let output = call(&world, line);
        assert_eq!(output.status.code(), Some(1), "{line}: {output:?}");
        let said = one_line(&output);
        // What a check needs is said first.
        assert!(said.contains(&process) || line == "fsck a", "{line}: {said}");
    }
    // Nobody waits for it but who uses it.
    world.mount("b");
    world.ok("umount b");
    drop(stopped);
    assert_eq!(world.inspect("a")["health"], "ok");
    assert_eq!(fs::read(point.join("file")).unwrap(), b"kept");
    world.ok("umount a");
    world.assert_idle();
}

#[test]
fn a_data_plane_that_is_stopped_while_it_comes_up() {
    let Some(world) = World::here("a_data_plane_that_is_stopped_while_it_comes_up", &[]) else { return };
    world.ok("create a -o size=32M -o door=fuse");
    let mount = start(&mut world.command(&["volume", "mount", "a"]));
    eventually("its data plane starts", || !world.planes().is_empty());
    // The one that waits and the one that serves.
    let all: Vec<_> = world.planes();
    let stopped: Vec<_> =
        all.iter().map(|pid| Stopped::new(Pid::from_raw(pid.cast_signed()).unwrap())).collect();
    let output = ends_soon(mount);
    drop(stopped);
    // It may have come up meanwhile.
    if output.status.success() {
        eprintln!("SKIP: a_data_plane_that_is_stopped_while_it_comes_up: it was quicker");
    } else {
        let said = one_line(&output);
        assert!(said.contains("was stopped") || said.contains("is stopped"), "{said}");
    }
    world.ok("umount a");
    world.assert_idle();
    world.mount("a");
    world.ok("umount a");
}

/// Stopped in the middle of a mount(2) and of a check.
#[test]
fn a_data_plane_that_is_stopped_in_the_middle() {
    let Some(world) = World::here("a_data_plane_that_is_stopped_in_the_middle", &[]) else { return };
    let remote = Remote::new(&world);
    let server = remote.serve(&[]);
    world.ok(&format!("create a -o source={} -o door=fuse", remote.uri()));
    server.stop();
    let slow = remote.serve(&["--throttle", "iops-total=3"]);
    for (command, worker) in [("mount a", "helper-process\0mount\0"), ("fsck a", "e2fsck\0")] {
        let words: Vec<_> = ["volume"].into_iter().chain(command.split(' ')).collect();
        let child = start(&mut world.command(&words));
        let works = || {
            let all = fs::read_dir("/proc").unwrap().flatten();
            let lines = all.filter_map(|process| fs::read(process.path().join("cmdline")).ok());
            let device = fs::read_dir("/sys/block").unwrap().flatten().find(|device| {
                let file = fs::read_to_string(device.path().join("loop/backing_file")).unwrap_or_default();
                world.planes().iter().any(|pid| file.contains(&format!("attach-{pid}/")))
            });
            let Some(device) = device else { return false };
            let device = format!("/dev/{}\0", device.file_name().display());
            let mut lines = lines.map(|line| String::from_utf8_lossy(&line).into_owned());
            lines.any(|line| line.contains(worker) && line.contains(&device))
        };
        soon("it works on the device", works);
        let stopped: Vec<_> = world
            .planes()
            .iter()
            .map(|pid| Stopped::new(Pid::from_raw(pid.cast_signed()).unwrap()))
            .collect();
        let output = ends_soon(child);
        assert_eq!(output.status.code(), Some(1), "{command}: {output:?}");
        let said = one_line(&output);
        assert!(said.contains("which serves it, is stopped; let it go on"), "{command}: {said}");
        drop(stopped);
        soon("what was left of the work ends", || !works());
        // Whatever the left one has come to is undone.
        soon("it can be ended", || world.call("umount a").status.success());
        world.assert_idle();
    }
    slow.stop();
    let server = remote.serve(&[]);
    world.mount("a");
    world.ok("umount a");
    world.ok("rm a");
    server.stop();
}
