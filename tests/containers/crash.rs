//! The daemon killed under a container that writes, and the end of the whole host.

use std::fs;
use std::process::Command;

use rustix::mount::{UnmountFlags, unmount};
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::support::{eventually, run};
use crate::world::{IMAGE, World};

/// Lines that a writing container has written and read back, and an error if it met one.
fn progress(world: &World) -> usize {
    let log = world.podman(&["logs", "writer"]);
    assert!(!log.contains("error"), "{log}");
    log.lines().count()
}

#[test]
fn a_killed_daemon_is_not_missed() {
    let mut world = world!("a_killed_daemon_is_not_missed");
    world.start_daemon();
    world.podman_image();
    world.podman(&["volume", "create", "--driver", "nbdbridge", "-o", "size=64M", "data"]);
    let script = "n=0; while :; do n=$((n+1)); echo $n >/data/$n && sync && [ $(cat /data/$n) = $n ] && echo $n \
                  || { echo error; exit 1; }; rm /data/$n; done";
    world.podman(&["run", "-d", "--name", "writer", "-v", "data:/data", IMAGE, "sh", "-c", script]);
    for _ in 0..3 {
        let before = progress(&world);
        world.end_daemon(Signal::KILL);
        eventually("the container does not go on", || progress(&world) > before + 3);
        world.start_daemon();
    }
    let before = progress(&world);
    eventually("the container does not go on", || progress(&world) > before + 3);
    let said: Value = serde_json::from_str(&world.podman(&["volume", "inspect", "data"])).unwrap();
    assert_eq!(said[0]["Driver"], "nbdbridge");
    assert_eq!(world.status("data")["references"], json!(1));
    world.podman(&["stop", "-t", "0", "writer"]);
    world.assert_clean();
    world.podman(&["rm", "writer"]);
    world.podman(&["volume", "rm", "data"]);
    assert_eq!(world.volumes(), [""; 0]);
    world.assert_clean();
}

/// Everything is killed, /run is empty, and the boot's id is another one.
#[test]
fn after_a_reboot_mounts_are_forgotten_and_volumes_are_not() {
    let mut world = world!("after_a_reboot_mounts_are_forgotten_and_volumes_are_not");
    world.start_daemon();
    world.podman_image();
    world.podman(&["volume", "create", "--driver", "nbdbridge", "-o", "size=64M", "data"]);
    let script = "echo kept >/data/x; sync; while :; do date >>/data/log; done";
    world.podman(&["run", "-d", "--name", "one", "-v", "data:/data", IMAGE, "sh", "-c", script]);
    eventually("it does not write", || {
        !world.podman(&["exec", "one", "sh", "-c", "cat /data/log || true"]).is_empty()
    });
    assert_eq!(world.status("data")["references"], json!(1));

    world.kill_all();
    let mounts = String::from_utf8_lossy(&fs::read("/proc/self/mountinfo").unwrap()).into_owned();
    let points = mounts.lines().filter_map(|line| line.split(' ').nth(4));
    for point in points.rev().filter(|point| point.starts_with("/run/") || point.contains("/overlay/")) {
        unmount(point, UnmountFlags::DETACH).unwrap();
    }
    for device in world.loop_devices() {
        run("losetup", &["-d", &device]);
    }
    // Our own runtime files stay, as they would in a folder that is no tmpfs: the boot's id tells that they are void.
    let left = fs::read_dir("/run").unwrap().chain(fs::read_dir("/dev/shm").unwrap()).flatten();
    for entry in
        left.filter(|entry| !matches!(entry.file_name().to_str(), Some("world" | "nbdbridge" | "lock")))
    {
        if entry.path().is_dir() { fs::remove_dir_all(entry.path()) } else { fs::remove_file(entry.path()) }
            .unwrap();
    }
    assert_eq!(fs::read_dir("/run/nbdbridge/volumes").unwrap().count(), 1);
    let id = world.join("boot_id");
    fs::write(&id, "b6e7c4f0-0000-4000-8000-000000000001\n").unwrap();
    let bound = Command::new("mount").arg("--bind").arg(&id).arg("/proc/sys/kernel/random/boot_id").status();
    assert!(bound.unwrap().success());

    world.start_daemon();
    assert_eq!(world.volumes(), ["data"]);
    let status = world.status("data");
    assert_eq!((&status["references"], &status["device"]), (&json!(0), &json!(null)), "{status}");
    world.assert_clean();
    world.podman(&["start", "one"]);
    assert_eq!(world.podman(&["exec", "one", "cat", "/data/x"]), "kept");
    world.podman(&["rm", "-f", "-t", "0", "one"]);
    world.assert_clean();
    world.podman(&["volume", "rm", "data"]);
    assert_eq!(world.volumes(), [""; 0]);
    world.assert_clean();
}
