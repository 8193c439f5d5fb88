//! Volumes whose disk is another server's export: used as it is, made a file system on where it is empty, and never where
//! it is not.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use serde_json::{Value, json};

use crate::crash::state_file;
use crate::support::Server;
use crate::world::{World, skip};

#[test]
fn a_remote_disk() {
    if skip("a_remote_disk", &["mkfs.xfs"]) {
        return;
    }
    let (world, other) = (World::new(), World::new());
    let disk = world.join("remote.img");
    File::create(&disk).unwrap().set_len(64 << 20).unwrap();
    let server = Server::serve(&[disk.to_str().unwrap(), "-f", "raw"]);
    let uri = server.uri("");
    let line = world.fails(&format!("create a -o source={uri} -o read-only"), 1);
    assert!(line.contains("is empty, and read-only nobody can fill it"), "{line}");
    world.ok(&format!("create a -o source={uri}"));
    assert_eq!(world.inspect("a")["size"], 64 << 20);
    assert!(!world.volume("a").join("disk.raw").exists());
    fs::write(world.mount("a").join("file"), "far away").unwrap();
    world.ok("umount a");
    world.ok("rm a");

    // Another host finds what is there.
    let line = other.fails(&format!("create b -o source={uri} -o fs=xfs"), 1);
    assert!(line.contains("holds ext4 already"), "{line}");
    other.ok(&format!("create b -o source={uri}"));
    assert_eq!(fs::read(other.mount("b").join("file")).unwrap(), b"far away");
    other.ok("umount b");
    other.ok(&format!("create c -o source={uri} -o read-only"));
    let point = other.mount("c");
    assert_eq!(fs::read(point.join("file")).unwrap(), b"far away");
    assert_eq!(
        fs::write(point.join("file"), "x").unwrap_err().kind(),
        std::io::ErrorKind::ReadOnlyFilesystem
    );
    other.ok("umount c");
    server.stop();

    // Something that nobody knows, at its end only.
    let disk_file = File::options().write(true).open(&disk).unwrap();
    disk_file.set_len(0).unwrap();
    disk_file.set_len(64 << 20).unwrap();
    disk_file.write_all_at(b"a partition table's copy", (64 << 20) - 512).unwrap();
    let server = Server::serve(&[disk.to_str().unwrap(), "-f", "raw"]);
    let uri = server.uri("");
    let line = world.fails(&format!("create a -o source={uri}"), 1);
    assert!(line.contains("holds something that is neither"), "{line}");
    world.ok(&format!("create a -o source={uri} -o fs=none"));
    server.stop();
    let line = world.fails(&format!("create b -o source={uri}"), 1);
    assert!(line.contains("cannot be attached"), "{line}");
    assert_eq!(world.names(), ["a"]);
}

#[test]
fn a_disk_that_cannot_be_read_is_not_formatted() {
    let Some(world) = World::here("a_disk_that_cannot_be_read_is_not_formatted", &[]) else { return };
    let disk = world.join("remote.img");
    let content = vec![0x77; 8 << 20];
    fs::write(&disk, &content).unwrap();
    let server = Server::serve(&[disk.to_str().unwrap(), "-f", "raw", "--fault", "op=read,error-rate=1"]);
    let line = world.fails(&format!("create a -o source={}", server.uri("")), 1);
    assert!(line.contains("cannot read what is there"), "{line}");
    assert!(fs::read(&disk).unwrap() == content);
    assert_eq!(world.names(), Vec::<String>::new());
}

#[test]
fn what_somebody_else_has_attached_is_not_taken() {
    let Some(world) = World::here("what_somebody_else_has_attached_is_not_taken", &[]) else { return };
    let server = Server::serve(&["mem:64M"]);
    let uri = server.uri("");
    world.ok(&format!("create a -o source={uri} -o door=fuse"));
    world.mount("a");
    let path = state_file(&world, "a");
    let mut state: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    world.ok("umount a");
    let attached = world.command(&["attach", "--door=fuse", &uri]).output().unwrap();
    let device = String::from_utf8(attached.stdout).unwrap().trim().to_owned();
    assert!(device.starts_with("/dev/loop"), "{device}");
    // A data plane was about to be started; it never was.
    (state["plane"], state["mounted"]) = (Value::Null, Value::Null);
    (state["holders"], state["starting"]) = (json!({}), json!(true));
    fs::write(path, serde_json::to_vec(&state).unwrap()).unwrap();
    world.mount("a");
    assert_ne!(world.inspect("a")["device"], json!(device));
    world.ok("umount a");
    let detached = world.command(&["detach", &device]).output().unwrap();
    assert!(detached.status.success(), "{detached:?}");
}
