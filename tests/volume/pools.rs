//! Pools: what makes one, how much it promises, and when it is full.

use std::fs;
use std::path::Path;

use rustix::mount::{MountFlags, mount};

use crate::world::{World, skip};

/// A world whose pool is a file system of so many MiB in memory.
fn small(megabytes: u32) -> World {
    let world = World::new();
    let pool = world.join("pool");
    fs::create_dir(&pool).unwrap();
    let size = std::ffi::CString::new(format!("size={megabytes}M,mode=700")).unwrap();
    mount("none", &pool, "tmpfs", MountFlags::empty(), Some(size.as_c_str())).unwrap();
    world
}

#[test]
fn what_is_a_pool() {
    let Some(world) = World::here("what_is_a_pool", &[]) else { return };
    let line = world.fails("ls", 1);
    assert!(line.contains("there is no such pool"), "{line}");
    fs::create_dir(world.join("pool")).unwrap();
    fs::write(world.join("pool/alien"), "").unwrap();
    for line in ["ls", "create a -o size=64M"] {
        let said = world.fails(line, 1);
        assert!(said.contains("pool --make") || said.contains("--make"), "{said}");
    }
    world.ok("pool --make");
    world.ok("create a -o size=64M");
    assert_eq!(world.names(), ["a"], "what is no volume is none");
    fs::write(world.join("pool/.pool.json"), "{").unwrap();
    let line = world.fails("ls", 1);
    assert!(line.contains(".pool.json"), "{line}");
    fs::write(world.join("pool/.pool.json"), "{}").unwrap();
    assert_eq!(world.json("pool")["settings"]["overcommit"], 1.0);
}

#[test]
fn promises_are_kept() {
    if skip("promises_are_kept", &[]) {
        return;
    }
    let world = small(200);
    world.ok("pool --make --reserve 8M --default-size 64M");
    world.ok("create a");
    assert_eq!(world.inspect("a")["size"], 64 << 20);
    world.ok("create b -o size=64M");
    let line = world.fails("create c -o size=72M", 1);
    assert!(line.contains("more than the 64 MiB that may still be promised"), "{line}");
    world.ok("pool --overcommit 1.5");
    world.ok("create c -o size=72M");
    let space = &world.json("pool")["space"];
    assert_eq!(
        (space["promised"].as_u64(), space["promisable"].as_u64()),
        (Some(200 << 20), Some(288 << 20))
    );
    // What is reserved at once must be there at once.
    world.ok("pool --overcommit 10");
    let line = world.fails("create d -o size=196M -o provision=thick", 1);
    assert!(line.contains("no space: 196 MiB are wanted"), "{line}");
    for wrong in ["--reserve 101%", "--reserve x", "--overcommit 0", "--overcommit NaN", "--default-size 0"] {
        world.fails(&format!("pool {wrong}"), 2);
    }
    world.ok("pool --reserve 50%");
    assert_eq!(world.json("pool")["space"]["reserve"].as_u64(), Some(100 << 20));
    assert_eq!(world.names(), ["a", "b", "c"]);
}

#[test]
fn a_pool_on_a_full_disk() {
    if skip("a_pool_on_a_full_disk", &[]) {
        return;
    }
    let world = small(64);
    world.ok("pool --make --overcommit 10");
    world.ok("create old -o size=32M");
    fill(&world.join("pool/filler"), 1 << 20);
    let line = world.fails("create a -o size=32M", 1);
    assert!(line.contains("no space: ") && line.contains("kept in reserve"), "{line}");
    world.ok("pool --reserve 0");
    fill(&world.join("pool/filler"), 128 << 10);
    let line = world.fails("create a -o size=32M", 1);
    assert!(line.contains("mkfs.ext4: ") && line.contains("its pool has "), "{line}");
    // Not even a record has room.
    fill(&world.join("pool/filler"), 0);
    world.fails("create a -o size=32M", 1);
    assert_eq!(world.names(), ["old"]);
    world.assert_idle();
    world.ok("rm old");
    fs::remove_file(world.join("pool/filler")).unwrap();
    world.ok("create a -o size=32M");
    let point = world.mount("a");
    fs::write(point.join("file"), vec![1; 1 << 20]).unwrap();
    world.ok("umount a");
}

/// Leaves so many bytes of a file system free.
fn fill(path: &Path, free: u64) {
    let mut file = fs::File::options().append(true).create(true).open(path).unwrap();
    let available = || {
        let found = rustix::fs::statvfs(path).unwrap();
        found.f_bavail * found.f_frsize
    };
    while available() > free {
        let len = usize::try_from((available() - free).min(1 << 20)).unwrap();
        std::io::Write::write_all(&mut file, &vec![0xa5; len]).unwrap();
    }
}
