//! The end of a volume that does not go as it should: its last flush fails, its data plane is killed while it comes up, it
//! is unmounted by hand, its disk is gone.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

use crate::http;
use crate::support::mount::run;
use crate::support::{PROGRAM, Server, eventually, net, text};
use crate::world::World;

fn record(world: &World, name: &str) -> serde_json::Value {
    serde_json::from_slice(&fs::read(world.volume(name).join("volume.json")).unwrap()).unwrap()
}

/// The runtime folder by a link, as /var/run is one: mounts are found by where they are.
#[test]
fn a_runtime_folder_behind_a_link() {
    let Some(world) = World::here("a_runtime_folder_behind_a_link", &[]) else { return };
    fs::create_dir_all(world.join("real/run")).unwrap();
    std::os::unix::fs::symlink("real/run", world.join("run")).unwrap();
    world.ok("create a -o size=32M");
    for _ in 0..2 {
        let point = world.mount("a");
        assert!(point.starts_with(world.join("real")), "{}", point.display());
        assert_eq!(world.inspect("a")["health"], "ok");
        world.ok("umount a");
        assert!(!point.exists());
    }
    world.ok("rm a");
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(world.folder.path().to_str().unwrap()), "{mounts}");
}

/// A disk that another server has, which can be exchanged for one with faults.
pub(crate) struct Remote {
    disk: PathBuf,
    socket: PathBuf,
}

impl Remote {
    pub(crate) fn new(world: &World) -> Remote {
        let (disk, socket) = (world.join("remote.img"), world.join("remote.sock"));
        File::create(&disk).unwrap().set_len(64 << 20).unwrap();
        Remote { disk, socket }
    }

    pub(crate) fn uri(&self) -> String {
        format!("nbd+unix:///?socket={}", text(&self.socket))
    }

    pub(crate) fn serve(&self, more: &[&str]) -> Server {
        let words = [text(&self.disk), "-f", "raw", "-k", text(&self.socket)];
        Server::start(&mut net(&[&words[..], more].concat()), 1)
    }
}

#[test]
fn an_unmount_whose_last_flush_fails_tells() {
    let Some(world) = World::here("an_unmount_whose_last_flush_fails_tells", &[]) else { return };
    let remote = Remote::new(&world);
    let server = remote.serve(&[]);
    world.ok(&format!("create a -o source={} -o door=fuse", remote.uri()));
    let point = world.mount("a");
    fs::write(point.join("kept"), "durable").unwrap();
    File::open(&point).unwrap().sync_all().unwrap();
    run("sync", &[&"-f", &point]);
    // From now on no flush succeeds.
    server.stop();
    let server = remote.serve(&["--fault", "op=flush,errno=EIO,error-every=1"]);
    fs::write(point.join("lost"), "perhaps").unwrap();
    let line = world.fails("umount a", 1);
    assert!(line.contains("volume `a`") && line.contains("last flush failed"), "{line}");
    assert_eq!(record(&world, "a")["unclean"], true, "it is checked before it is mounted next");
    world.assert_idle();
    // Its own last flush fails, too.
    drop(server);
    let server = remote.serve(&[]);
    assert_eq!(fs::read(world.mount("a").join("kept")).unwrap(), b"durable");
    world.ok("umount a");
    assert_eq!(record(&world, "a")["unclean"], false);
    server.stop();
}

/// A container engine is told, too: by the answer to its call.
#[test]
fn a_plugins_unmount_whose_last_flush_fails_tells() {
    let Some(world) = World::here("a_plugins_unmount_whose_last_flush_fails_tells", &[]) else { return };
    let remote = Remote::new(&world);
    let server = remote.serve(&[]);
    let (pool, socket) = (world.join("pool"), world.join("plugin.sock"));
    let words = ["volumed", "--pool", text(&pool), "--docker-socket", text(&socket)];
    let mut daemon = Server::start(&mut world.command(&words), 1);
    let call = |call: &str, body: serde_json::Value| {
        http::call(&socket, &format!("VolumeDriver.{call}"), body.to_string().as_bytes())
    };
    let done = |name: &str, body: serde_json::Value| {
        let (status, answer) = call(name, body);
        assert_eq!((status, &answer["Err"]), (200, &"".into()), "{name}: {answer}");
        answer
    };
    let holder = json!({ "Name": "a", "ID": "one" });
    done("Create", json!({ "Name": "a", "Opts": { "source": remote.uri(), "door": "fuse" } }));
    let mounted = done("Mount", holder.clone());
    let point = PathBuf::from(mounted["Mountpoint"].as_str().unwrap());
    fs::write(point.join("kept"), "durable").unwrap();
    run("sync", &[&"-f", &point]);
    server.stop();
    let server = remote.serve(&["--fault", "op=flush,errno=EIO,error-every=1"]);
    fs::write(point.join("lost"), "perhaps").unwrap();
    let (status, answer) = call("Unmount", holder.clone());
    let line = answer["Err"].as_str().unwrap();
    assert_eq!(status, 500, "{line}");
    assert!(line.contains("volume `a`") && line.contains("last flush failed"), "{line}");
    assert_eq!(record(&world, "a")["unclean"], true, "it is checked before it is mounted next");
    world.assert_idle();
    // Told once; the volume has ended.
    done("Unmount", holder.clone());
    assert_eq!(record(&world, "a")["unclean"], true);
    drop(server);
    let server = remote.serve(&[]);
    done("Mount", holder.clone());
    assert_eq!(fs::read(point.join("kept")).unwrap(), b"durable");
    done("Unmount", holder);
    assert_eq!(record(&world, "a")["unclean"], false);
    done("Remove", json!({ "Name": "a" }));
    daemon.signal(Signal::TERM);
    assert_eq!(daemon.wait(Duration::from_secs(40)).expect("it ends").code(), Some(0));
    server.stop();
}

/// All that the data plane has made, in whatever step it is killed, is gone after the next command.
#[test]
fn planes_are_killed_while_they_come_up() {
    let Some(world) = World::here("planes_are_killed_while_they_come_up", &[]) else { return };
    world.ok("create a -o size=32M -o door=fuse");
    let disk = world.volume("a").join("disk.raw");
    for round in 0..16_u64 {
        let mut mount = world.command(&["volume", "mount", "a"]);
        let mut mount = mount.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let until = Instant::now() + Duration::from_secs(20);
        while world.planes().is_empty() && mount.try_wait().unwrap().is_none() && Instant::now() < until {}
        std::thread::sleep(Duration::from_millis(round * 3));
        for plane in world.planes() {
            let _ = kill_process(Pid::from_raw(plane.cast_signed()).unwrap(), Signal::KILL);
        }
        mount.wait().unwrap();
        // A mount(2) that was under way may end after the first look: then the next one finds it.
        let nowhere = || {
            world.call("umount a");
            let mounts = String::from_utf8_lossy(&fs::read("/proc/self/mounts").unwrap()).into_owned();
            [mounts, run(PROGRAM, &[&"devices"])].iter().all(|text| !text.contains(disk.to_str().unwrap()))
        };
        eventually(&format!("nothing is left of round {round}"), nowhere);
    }
    world.mount("a");
    world.ok("umount a");
    world.ok("rm a");
    world.assert_idle();
}

/// What is left of a plane whose volume nobody mounts again goes with any command on the pool.
#[test]
fn what_a_killed_plane_has_left_is_swept() {
    let Some(world) = World::here("what_a_killed_plane_has_left_is_swept", &[]) else { return };
    world.ok("create a -o size=32M");
    let disk = world.volume("a").join("disk.raw");
    let output =
        world.command(&["attach", "--door", "fuse", "-f", "raw", disk.to_str().unwrap()]).output().unwrap();
    let device = PathBuf::from(String::from_utf8(output.stdout).unwrap().trim());
    for plane in world.planes() {
        kill_process(Pid::from_raw(plane.cast_signed()).unwrap(), Signal::KILL).unwrap();
    }
    eventually("it is gone", || world.planes().is_empty());
    world.ok("ls");
    let name = device.file_name().unwrap().to_str().unwrap();
    assert!(!Path::new(&format!("/sys/block/{name}/loop")).exists());
    assert!(
        !String::from_utf8_lossy(&fs::read("/proc/self/mounts").unwrap())
            .into_owned()
            .contains(disk.to_str().unwrap())
    );
}

#[test]
fn what_is_said_of_a_volume_that_was_unmounted_by_hand() {
    let Some(world) = World::here("what_is_said_of_a_volume_that_was_unmounted_by_hand", &[]) else { return };
    world.ok("create a -o size=32M -o door=fuse");
    for lazily in [false, true] {
        let point = world.mount("a");
        let open = lazily.then(|| File::create(point.join("file")).unwrap());
        let mut umount = Command::new("umount");
        if lazily {
            umount.arg("-l");
        }
        assert!(umount.arg(&point).status().unwrap().success());
        let status = world.inspect("a");
        assert!(status["mounted"].is_null(), "{status}");
        let health = status["health"]["bad"].as_str().unwrap_or_default().to_owned();
        assert!(health.contains("was unmounted by somebody else"), "{status}");
        assert_eq!(health.contains("but is in use"), lazily, "{status}");
        assert!(!world.ok("ls").contains(point.to_str().unwrap()));
        if let Some(open) = open {
            open.write_all_at(b"still served", 0).unwrap();
        }
        eventually("it is free", || !world.inspect("a")["health"].to_string().contains("is in use"));
        world.ok("umount a");
        assert_eq!(
            (&world.inspect("a")["health"], &record(&world, "a")["unclean"]),
            (&"ok".into(), &false.into())
        );
        // It can be mounted again, with or without an unmount of ours.
        let point = world.mount("a");
        run("umount", &[&point]);
        assert_eq!(world.mount("a"), point);
        assert_eq!(world.inspect("a")["health"], "ok");
        world.ok("umount a");
        world.assert_idle();
    }
}

#[test]
fn a_volume_whose_disk_is_gone_is_broken() {
    let Some(world) = World::here("a_volume_whose_disk_is_gone_is_broken", &[]) else { return };
    world.ok("create a -o size=32M");
    world.ok("create b -o size=32M -o format=qcow2");
    let (raw, qcow2) = (world.volume("a").join("disk.raw"), world.volume("b").join("disk.qcow2"));
    let health = |name: &str| world.inspect(name)["health"]["bad"].as_str().unwrap_or_default().to_owned();
    assert_eq!((health("a"), health("b")), (String::new(), String::new()));
    File::options().write(true).open(&raw).unwrap().set_len(1 << 20).unwrap();
    assert!(health("a").contains("is cut short: it has 1048576 of 33554432 bytes"), "{}", health("a"));
    fs::remove_file(&raw).unwrap();
    fs::remove_file(&qcow2).unwrap();
    for name in ["a", "b"] {
        assert!(health(name).contains("is gone; restore it, or remove the volume"), "{}", health(name));
        let table = world.ok("ls");
        let row = table.lines().find(|line| line.starts_with(&format!("{name} "))).unwrap();
        assert!(row.contains("is gone"), "{table}");
        world.fails(&format!("mount {name}"), 1);
    }
    world.ok("rm --force a b");
    assert_eq!(world.names(), Vec::<String>::new());
}
