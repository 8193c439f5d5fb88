//! What volumes are for: each option has its effect, and data stays.

use std::fs;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::Path;

use crate::support::mount::run;
use crate::world::World;

/// Options of the file system at a path, as the kernel tells them.
fn mount_options(point: &Path) -> String {
    let table = String::from_utf8_lossy(&fs::read("/proc/self/mounts").unwrap()).into_owned();
    let line = table.lines().find(|line| line.split(' ').nth(1) == point.to_str()).unwrap();
    line.split(' ').nth(3).unwrap().to_owned()
}

#[test]
fn a_volume_from_its_making_to_its_end() {
    let Some(world) = World::here("a_volume_from_its_making_to_its_end", &[]) else { return };
    assert_eq!(world.ok("create data -o size=64M"), "data: made: 64 MiB of ext4\n");
    assert!(world.ok("create data -o size=65536K").contains("is there, with equal options"));
    let idle = world.inspect("data");
    assert_eq!(
        (&idle["health"], &idle["mounted"], &idle["size"]),
        (&"ok".into(), &().into(), &67_108_864.into())
    );
    world.assert_idle();

    let point = world.mount("data");
    assert_eq!(world.mount("data"), point, "mounted already");
    assert_eq!(fs::read_dir(&point).unwrap().count(), 0, "no lost+found");
    fs::write(point.join("file"), "some data").unwrap();
    let busy = world.inspect("data");
    assert_eq!(busy["mounted"].as_str(), point.to_str());
    assert!(busy["usage"]["total"].as_u64().unwrap() > 40 << 20, "{busy}");
    assert_eq!(busy["holders"], serde_json::json!({ "by hand": 1 }));
    assert!(busy["guarantee"].is_string() && busy["door"].is_string(), "{busy}");
    let listed = world.ok("ls");
    assert!(listed.contains("64 MiB") && listed.contains(point.to_str().unwrap()), "{listed}");

    world.ok("umount data");
    assert!(!point.join("file").exists(), "nothing is below");
    world.assert_idle();
    world.ok("umount data");
    assert_eq!(world.ok("fsck data"), "data: clean\n");
    assert_eq!(fs::read(world.mount("data").join("file")).unwrap(), b"some data");
    world.ok("umount data");
    world.ok("rm data");
    assert_eq!(world.names(), Vec::<String>::new());
    assert!(!world.volume("data").exists());
}

/// An image of version 2 has no journal: what is answered and not flushed is lost with the data plane.
#[test]
fn a_volume_that_a_crash_would_cut_short_says_so() {
    let Some(world) = World::here("a_volume_that_a_crash_would_cut_short_says_so", &["qemu-img"]) else {
        return;
    };
    world.ok("create data -o size=32M -o format=qcow2");
    world.mount("data");
    assert_eq!(world.inspect("data")["loss_after_crash"], serde_json::Value::Null);
    assert!(!world.ok("ls").contains("a crash"));
    world.ok("umount data");
    let disk = world.volume("data").join("disk.qcow2");
    run("qemu-img", &[&"amend", &"-f", &"qcow2", &"-o", &"compat=0.10", &disk]);
    world.mount("data");
    let status = world.inspect("data");
    assert!(status["loss_after_crash"].as_str().unwrap().contains("version 2"), "{status}");
    assert!(status["guarantee"].as_str().unwrap().contains("what was flushed is kept"), "{status}");
    let listed = world.ok("ls");
    assert!(listed.contains("ok; writes that are answered and not flushed do not survive"), "{listed}");
    world.ok("umount data");
}

#[test]
fn every_file_system_and_format() {
    let Some(world) = World::here("every_file_system_and_format", &["mkfs.xfs", "mkfs.btrfs"]) else {
        return;
    };
    for (name, options) in [
        ("xfs", "-o fs=xfs -o size=320M"),
        ("btrfs", "-o fs=btrfs -o size=128M"),
        ("qcow2", "-o format=qcow2 -o size=64M"),
    ] {
        world.ok(&format!("create {name} {options}"));
        let point = world.mount(name);
        fs::write(point.join("file"), name).unwrap();
        world.ok(&format!("umount {name}"));
        assert_eq!(world.ok(&format!("fsck {name}")), format!("{name}: clean\n"));
        assert_eq!(fs::read_to_string(world.mount(name).join("file")).unwrap(), name);
        world.ok(&format!("umount {name}"));
    }
    assert!(world.volume("qcow2").join("disk.qcow2").exists());
    world.ok("create none -o fs=none -o size=1M");
    let device = world.mount("none");
    assert!(fs::metadata(&device).unwrap().file_type().is_block_device());
    let disk = fs::File::options().write(true).open(&device).unwrap();
    disk.write_all_at(b"raw", 4096).unwrap();
    disk.sync_all().unwrap();
    drop(disk);
    world.ok("umount none");
    assert_eq!(&fs::read(world.volume("none").join("disk.raw")).unwrap()[4096..4099], b"raw");
}

#[test]
fn the_root_folder_and_words_for_mkfs_and_mount() {
    let Some(world) = World::here("the_root_folder_and_words_for_mkfs_and_mount", &["dumpe2fs"]) else {
        return;
    };
    let mut create =
        world.command(&["volume", "create", "a", "-o", "size=64M", "-o", "uid=7", "-o", "gid=8"]);
    create.args([
        "-o",
        "mode=1750",
        "-o",
        "mkfs-options=-m 0 -L hello",
        "-o",
        "mount-options=noatime,nodev,data=journal",
    ]);
    assert!(create.output().unwrap().status.success());
    let point = world.mount("a");
    let root = fs::metadata(&point).unwrap();
    assert_eq!((root.uid(), root.gid(), root.mode() & 0o7777), (7, 8, 0o1750));
    let options = mount_options(&point);
    assert!(["noatime", "nodev", "data=journal"].iter().all(|option| options.contains(option)), "{options}");
    world.ok("umount a");
    let head = run("dumpe2fs", &[&"-h", &world.volume("a").join("disk.raw")]);
    assert!(head.contains("hello") && head.contains("Reserved block count:     0"), "{head}");
    // What mkfs or the kernel does not like is told when the volume is made, and nothing is left of it.
    let refused = world.fails("create b -o size=64M -o mkfs-options=-b1000", 1);
    assert!(refused.contains("mkfs.ext4: "), "{refused}");
    for option in ["no_such_option", "commit=999999999999"] {
        let refused = world.fails(&format!("create b -o size=64M -o mount-options={option}"), 1);
        assert!(refused.contains(&format!("mount-options={option}")), "{refused}");
    }
    assert_eq!(world.names(), ["a"]);
    world.assert_idle();
}

#[test]
fn thick_stays_thick_and_thin_thin() {
    let Some(world) = World::here("thick_stays_thick_and_thin_thin", &["fstrim"]) else { return };
    world.ok("create thin -o size=64M");
    world.ok("create thick -o size=64M -o provision=thick");
    let allocated = |name: &str| world.inspect(name)["allocated"].as_u64().unwrap();
    assert!(allocated("thin") < 32 << 20 && allocated("thick") >= 64 << 20);
    for name in ["thin", "thick"] {
        let point = world.mount(name);
        fs::write(point.join("file"), vec![1; 20 << 20]).unwrap();
        fs::remove_file(point.join("file")).unwrap();
        run("sync", &[&"-f", &point]);
        run("fstrim", &[&point]);
        world.ok(&format!("umount {name}"));
    }
    assert!(allocated("thin") < 32 << 20 && allocated("thick") >= 64 << 20);
}

#[test]
fn limits_hold_at_once_and_for_good() {
    let Some(world) = World::here("limits_hold_at_once_and_for_good", &[]) else { return };
    world.ok("create a -o size=64M -o iops-read=5000 -o bps-total=100M");
    let live = || {
        let pid = world.plane("a").as_raw_nonzero().to_string();
        let output = world.command(&["throttle", &pid, "--json"]).output().unwrap();
        serde_json::from_slice::<serde_json::Value>(&output.stdout).unwrap()["limits"].clone()
    };
    world.mount("a");
    assert_eq!(live(), serde_json::json!({ "iops-read": 5000, "bps-total": 104_857_600 }));
    world.ok("limit a bps-total=0 bps-write=7M,iops-write=9");
    let changed = serde_json::json!({ "iops-read": 5000, "iops-write": 9, "bps-write": 7_340_032 });
    assert_eq!((live(), &world.inspect("a")["limits"]), (changed.clone(), &changed));
    let refused = world.fails("limit a iops-total=5", 2);
    assert!(refused.contains("iops-total excludes"), "{refused}");
    assert_eq!(world.json("limit a")["limits"], changed);
    world.ok("limit a iops-write=0");
    world.ok("umount a");
    world.ok("limit a iops-read=6000");
    world.mount("a");
    assert_eq!(live(), serde_json::json!({ "iops-read": 6000, "bps-write": 7_340_032 }));
    assert_eq!(world.ok("limit a off"), "no limits\n");
    assert_eq!(live(), serde_json::json!({}));
    world.ok("umount a");
}

#[test]
fn mounted_elsewhere() {
    let Some(world) = World::here("mounted_elsewhere", &[]) else { return };
    world.ok("create a -o size=64M");
    let root = world.join("other");
    let path = world.ok(&format!("mount a --mount-root {}", root.display()));
    assert_eq!(Path::new(path.trim_end()), root.join("a"));
    fs::write(root.join("a/file"), "x").unwrap();
    assert_eq!(world.mount("a"), root.join("a"), "it is where it is");
    world.ok("umount a");
    assert!(!root.join("a").exists());
    // The folder alone is the volume, also under another name and in another pool.
    let moved = world.join("moved");
    world.ok(&format!("pool --make --pool {}", moved.display()));
    run("cp", &[&"-r", &"--sparse=always", &world.volume("a"), &moved.join("b")]);
    let path = world.ok(&format!("mount b --pool {}", moved.display()));
    assert_eq!(fs::read(Path::new(path.trim_end()).join("file")).unwrap(), b"x");
    world.ok(&format!("umount b --pool {}", moved.display()));
}

/// As a container does that has a copy of all mounts of the host.
#[test]
fn what_others_have_mounted_is_whole() {
    let Some(world) = World::here("what_others_have_mounted_is_whole", &[]) else { return };
    world.ok("create a -o size=64M");
    let point = world.mount("a");
    let copy = world.join("copy");
    fs::create_dir(&copy).unwrap();
    run("mount", &[&"--bind", &point, &copy]);
    fs::write(copy.join("file"), "not flushed").unwrap();
    world.ok("umount a");
    assert!(world.fails("fsck a", 1).contains("is in use"));
    assert_eq!(world.mount("a"), point);
    assert_eq!(fs::read(point.join("file")).unwrap(), b"not flushed");
    world.ok("umount a");
    run("umount", &[&copy]);
    assert_eq!(fs::read(world.mount("a").join("file")).unwrap(), b"not flushed");
    world.ok("umount a");
    world.assert_idle();
}

#[test]
fn an_open_device_is_in_use() {
    let Some(world) = World::here("an_open_device_is_in_use", &[]) else { return };
    world.ok("create a -o size=64M -o fs=none");
    let open = fs::File::options().read(true).write(true).open(world.mount("a")).unwrap();
    assert!(world.fails("umount a", 1).contains("is in use"));
    std::io::Write::write_all(&mut &open, &[1; 4096]).unwrap();
    open.sync_all().unwrap();
    drop(open);
    world.ok("umount a");
    world.assert_idle();
}
