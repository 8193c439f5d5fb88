//! What a crash leaves behind, of the program, of a data plane or of the host, is put right by whoever comes next; no
//! file system that was handed out is ever made again.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::time::Duration;

use rustix::mount::{UnmountFlags, unmount};
use serde_json::{Value, json};

use crate::support::Random;
use crate::support::mount::run;
use crate::world::World;

/// Runs `nbdbridge volume LINE` with a program of ours in the place of another; it kills whoever calls it.
fn killed_by(world: &World, program: &str, before: &str, line: &str) -> Output {
    let tools = world.join("tools");
    fs::create_dir_all(&tools).unwrap();
    let path = tools.join(program);
    let script = format!("#!/bin/sh\nPATH=/usr/sbin:/usr/bin:/sbin:/bin\n{before}\nkill -9 $PPID\n");
    fs::write(&path, script).unwrap();
    fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).unwrap();
    let words: Vec<_> = line.split(' ').collect();
    let mut command = world.command(&[&["volume"], &words[..]].concat());
    let output =
        command.env("PATH", format!("{}:/usr/sbin:/usr/bin:/sbin:/bin", tools.display())).output().unwrap();
    assert_eq!(output.status.signal(), Some(9), "{output:?}");
    output
}

/// The run-time state of a volume.
pub(crate) fn state_file(world: &World, name: &str) -> PathBuf {
    let pools = fs::read_dir(world.join("run/volumes")).unwrap().flatten();
    pools.map(|pool| pool.path().join(".state").join(name)).find(|path| path.exists()).unwrap()
}

fn change_state(path: &Path, change: impl FnOnce(&mut Value)) {
    let mut state = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    change(&mut state);
    fs::write(path, serde_json::to_vec(&state).unwrap()).unwrap();
}

#[test]
fn a_making_that_was_cut_short() {
    let Some(world) = World::here("a_making_that_was_cut_short", &[]) else { return };
    world.ok("create other -o size=64M");
    // Before mkfs, and when it is done and not written down; its data plane is still there.
    for before in ["", "mkfs.ext4 \"$@\""] {
        killed_by(&world, "mkfs.ext4", before, "create a -o size=64M");
        assert_eq!(world.planes().len(), 1);
        assert_eq!(world.names(), ["other"], "nobody was told of it");
        world.assert_idle();
    }
    // Without a name yet; with a name and no disk, half a disk, a disk and no data plane (as after a reboot).
    let pool = world.join("pool");
    let mut record: Value =
        serde_json::from_slice(&fs::read(pool.join("other/volume.json")).unwrap()).unwrap();
    record["formatted"] = json!(false);
    record["pending"] = json!({ "create": { "formatting": true } });
    for (folder, disk) in [(".new-a", None), ("a", None), ("a", Some(5)), ("a", Some(64 << 20))] {
        fs::create_dir(pool.join(folder)).unwrap();
        fs::write(pool.join(folder).join("volume.json"), record.to_string()).unwrap();
        fs::write(pool.join(folder).join(".volume.json.new"), "{").unwrap();
        if let Some(len) = disk {
            fs::File::create(pool.join(folder).join("disk.raw")).unwrap().set_len(len).unwrap();
        }
        assert_eq!(world.names(), ["other"]);
        world.assert_idle();
    }
    // Whoever wants it next gets it.
    killed_by(&world, "mkfs.ext4", "", "create a -o size=64M");
    let output = world.call("create a -o size=128M");
    assert!(output.status.success() && String::from_utf8_lossy(&output.stdout).contains("a: made: 128 MiB"));
    // What was removed and not all of it gone.
    fs::create_dir_all(pool.join(".gone-a-1-2/snapshots")).unwrap();
    fs::write(pool.join(".gone-a-1-2/disk.raw"), "x").unwrap();
    assert_eq!(world.names(), ["a", "other"]);
    world.assert_idle();
}

#[test]
fn a_mount_that_was_cut_short() {
    let Some(world) = World::here("a_mount_that_was_cut_short", &[]) else { return };
    world.ok("create a -o size=64M");
    let point = world.mount("a");
    fs::write(point.join("file"), "data").unwrap();
    run("sync", &[&"-f", &point]);
    let state = state_file(&world, "a");
    // Mounted, and that not written down; nobody was told: it is taken down.
    change_state(&state, |state| {
        state["mounted"] = Value::Null;
        state["holders"] = json!({});
    });
    assert_eq!(world.names(), ["a"]);
    world.assert_idle();
    // A data plane was started, and that not written down: it is found again.
    world.mount("a");
    let device = world.inspect("a")["device"].clone();
    let plane = world.plane("a");
    unmount(&point, UnmountFlags::empty()).unwrap();
    change_state(&state_file(&world, "a"), |state| {
        state["plane"] = Value::Null;
        state["mounted"] = Value::Null;
        state["starting"] = json!(true);
        // Somebody has it, so that nobody else ends it meanwhile.
        state["holders"] = json!({ "engine": 1 });
    });
    world.mount("a");
    assert_eq!((&world.inspect("a")["device"], world.plane("a")), (&device, plane));
    world.kill_plane("a");
    // It is checked, as it was not unmounted; whoever checks it dies.
    killed_by(&world, "e2fsck", "", "mount a");
    assert_eq!(fs::read(world.mount("a").join("file")).unwrap(), b"data");
    change_state(&state_file(&world, "a"), |state| state["holders"] = json!({ "by hand": 1 }));
    world.ok("umount a");
}

#[test]
fn a_data_plane_that_dies() {
    let Some(world) = World::here("a_data_plane_that_dies", &[]) else { return };
    world.ok("create a -o size=64M -o door=fuse");
    let point = world.mount("a");
    fs::write(point.join("file"), "data").unwrap();
    run("sync", &[&"-f", &point]);
    world.kill_plane("a");
    let health = world.inspect("a")["health"]["bad"].as_str().unwrap().to_owned();
    assert!(health.contains("its data plane has died"), "{health}");
    let limited = world.ok("limit a iops-total=90000");
    assert_eq!(limited, "iops-total=90000\n");
    // Mounted again, it is another one's, and what was flushed is there.
    assert_eq!(fs::read(world.mount("a").join("file")).unwrap(), b"data");
    assert_eq!(world.inspect("a")["health"], "ok");
    world.kill_plane("a");
    world.ok("umount a");
    world.assert_idle();
    assert!(world.inspect("a")["health"]["bad"].as_str().unwrap().contains("was not unmounted"));
    world.mount("a");
    world.ok("umount a");
    assert_eq!(world.inspect("a")["health"], "ok");
    world.mount("a");
    world.kill_plane("a");
    world.ok("rm a --force");
}

#[test]
fn a_device_whose_number_was_given_away() {
    let Some(world) = World::here("a_device_whose_number_was_given_away", &[]) else { return };
    for name in ["a", "b"] {
        world.ok(&format!("create {name} -o size=64M -o door=fuse"));
        world.mount(name);
    }
    let device = |name: &str| world.inspect(name)["device"].as_str().unwrap().to_owned();
    let (old, taken) = (device("a"), device("b"));
    world.kill_plane("a");
    unmount(world.inspect("a")["mounted"].as_str().unwrap(), UnmountFlags::DETACH).unwrap();
    assert!(world.command(&["detach", "--force", &old]).output().unwrap().status.success());
    change_state(&state_file(&world, "a"), |state| state["plane"]["device"] = json!(taken));
    world.ok("umount a");
    world.mount("a");
    world.ok("umount a");
    let point = PathBuf::from(world.inspect("b")["mounted"].as_str().unwrap());
    fs::write(point.join("file"), "still there").unwrap();
    run("sync", &[&"-f", &point]);
    assert_eq!((device("b"), &world.inspect("b")["health"]), (taken, &json!("ok")));
    world.ok("umount b");
}

#[test]
fn a_reboot() {
    let Some(world) = World::here("a_reboot", &["mkfs.xfs"]) else { return };
    world.ok("create ext4 -o size=64M");
    world.ok("create xfs -o size=320M -o fs=xfs");
    for name in ["ext4", "xfs"] {
        let point = world.mount(name);
        fs::write(point.join("file"), name).unwrap();
        run("sync", &[&"-f", &point]);
        let device = world.inspect(name)["device"].as_str().unwrap().to_owned();
        world.kill_plane(name);
        unmount(&point, UnmountFlags::DETACH).unwrap();
        let detached = world.command(&["detach", "--force", &device]).output().unwrap();
        assert!(detached.status.success(), "{detached:?}");
        change_state(&state_file(&world, name), |state| state["boot_id"] = json!("an earlier one"));
        let found = world.inspect(name);
        assert_eq!((&found["mounted"], &found["holders"]), (&Value::Null, &json!({})), "forgotten");
        assert_eq!(
            found["health"],
            json!({ "bad": "was not unmounted; it is checked before it is mounted next" })
        );
        if name == "xfs" {
            assert_eq!(world.ok("fsck xfs"), "xfs: clean\n", "its log was replayed");
        }
        assert_eq!(fs::read_to_string(world.mount(name).join("file")).unwrap(), name);
        world.ok(&format!("umount {name}"));
        assert_eq!(world.inspect(name)["health"], "ok");
    }
}

#[test]
fn a_damaged_file_system_is_told_and_repaired() {
    let Some(world) = World::here("a_damaged_file_system_is_told_and_repaired", &["debugfs"]) else { return };
    world.ok("create a -o size=64M");
    fs::write(world.mount("a").join("file"), "data").unwrap();
    world.ok("umount a");
    let disk = world.volume("a").join("disk.raw");
    run("debugfs", &[&"-w", &"-R", &"clri file", &disk]);
    let line = world.fails("fsck a", 1);
    assert!(line.contains("volume `a`: e2fsck: "), "{line}");
    assert_eq!(world.ok("fsck a --repair"), "a: repaired\n");
    assert_eq!(world.ok("fsck a"), "a: clean\n");
    // Where it cannot be repaired without a person, it is not mounted, and never made again.
    run("debugfs", &[&"-w", &"-R", &"ssv state 2", &disk]);
    run("debugfs", &[&"-w", &"-R", &"ssv inodes_per_group 7", &disk]);
    let path = world.volume("a").join("volume.json");
    let record = fs::read_to_string(&path).unwrap().replace("\"unclean\": false", "\"unclean\": true");
    fs::write(&path, record).unwrap();
    // The id that mkfs gave it, in its superblock.
    let id = || fs::read(&disk).unwrap()[1024 + 104..1024 + 120].to_vec();
    let before = id();
    let line = world.fails("mount a", 1);
    assert!(line.contains("fsck a --repair"), "{line}");
    // Nothing else that looks at it makes it pass for checked.
    world.fails("resize a 128M", 1);
    let line = world.fails("mount a", 1);
    assert!(line.contains("fsck a --repair"), "{line}");
    assert_eq!(id(), before);
    world.assert_idle();
}

#[test]
fn killed_at_any_moment() {
    let Some(world) = World::here("killed_at_any_moment", &[]) else { return };
    let mut random = Random::new(std::process::id().into());
    let mut killed = |line: &str, within: u64| {
        let words: Vec<_> = line.split(' ').collect();
        let mut command = world.command(&[&["volume"], &words[..]].concat());
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(random.below(within)));
        child.kill().unwrap();
        child.wait().unwrap();
    };
    for round in 0..10 {
        killed("create a -o size=64M", 250);
        world.ok("create a -o size=64M");
        let point = world.mount("a");
        fs::write(point.join("file"), "data").unwrap();
        if round % 2 == 0 {
            killed("umount a", 80);
            world.mount("a");
        }
        world.ok("umount a");
        killed("mount a", 80);
        assert_eq!(fs::read(world.mount("a").join("file")).unwrap(), b"data");
        world.ok("umount a");
        world.assert_idle();
        killed("rm a", 10);
        if world.names() == ["a"] {
            world.ok("rm a");
        }
        world.assert_idle();
    }
}
