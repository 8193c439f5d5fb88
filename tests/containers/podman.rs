//! podman: volumes made, used by one container after another, full, in use, and removed.

use serde_json::Value;

use crate::support::try_run;
use crate::world::{IMAGE, World};

/// A container that ends with its command.
fn run(world: &World, volume: &str, script: &str) -> String {
    world.podman(&["run", "--rm", "-v", volume, IMAGE, "sh", "-c", script])
}

#[test]
fn a_volumes_life_with_podman() {
    let mut world = world!("a_volumes_life_with_podman");
    world.start_daemon();
    world.podman_image();
    let create =
        ["volume", "create", "--driver", "nbdbridge", "-o", "size=64M", "--label", "tier=gold", "data"];
    assert_eq!(world.podman(&create), "data");
    let said: Value = serde_json::from_str(&world.podman(&["volume", "inspect", "data"])).unwrap();
    assert_eq!((&said[0]["Driver"], &said[0]["Labels"]["tier"]), (&"nbdbridge".into(), &"gold".into()));
    assert_eq!(said[0]["Options"]["size"], "64M");
    assert!(world.podman(&["volume", "ls", "--filter", "label=tier=gold"]).contains("data"));

    // What one container has written, the next one has.
    run(&world, "data:/data", "echo hello >/data/x; mkdir /data/d");
    world.assert_clean();
    assert_eq!(run(&world, "data:/data:ro", "cat /data/x; ls /data"), "hello\nd\nx");

    // It is a disk of its own, of the size that was asked for, and no larger.
    let said = run(
        &world,
        "data:/data",
        "dd if=/dev/zero of=/data/full bs=1M count=100 2>&1; stat -f -c %b*%S /data",
    );
    assert!(said.contains("No space left on device"), "{said}");
    let (blocks, size) = said.lines().last().unwrap().split_once('*').unwrap();
    let bytes = blocks.parse::<u64>().unwrap() * size.parse::<u64>().unwrap();
    assert!((48 << 20..=64 << 20).contains(&bytes), "{bytes}");
    run(&world, "data:/data", "rm /data/full; test $(cat /data/x) = hello");

    // Two containers at the same time have it from one mount.
    world.podman(&["run", "-d", "--name", "one", "-v", "data:/data", IMAGE, "sleep", "1000"]);
    world.podman(&["run", "-d", "--name", "two", "-v", "data:/data", IMAGE, "sleep", "1000"]);
    world.podman(&["exec", "one", "sh", "-c", "echo 1 >/data/shared"]);
    assert_eq!(world.podman(&["exec", "two", "cat", "/data/shared"]), "1");
    let refused = try_run("podman", &["volume", "rm", "data"]);
    assert!(!refused.status.success());
    world.podman(&["rm", "-f", "-t", "0", "one"]);
    assert_eq!(world.podman(&["exec", "two", "cat", "/data/shared"]), "1");
    world.podman(&["rm", "-f", "-t", "0", "two"]);
    world.assert_clean();

    world.podman(&["volume", "rm", "data"]);
    assert_eq!(world.volumes(), [""; 0]);
    assert_eq!(
        std::fs::read_dir(world.pool()).unwrap().flatten().filter(|entry| entry.path().is_dir()).count(),
        0
    );
    world.assert_clean();
}

#[test]
fn podman_runs_nothing_on_a_volume_that_cannot_be_mounted() {
    let mut world = world!("podman_runs_nothing_on_a_volume_that_cannot_be_mounted");
    world.start_daemon();
    world.podman_image();
    let refused = try_run("podman", &["volume", "create", "--driver", "nbdbridge", "-o", "siez=1G", "x"]);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && said.contains("unknown option `siez`; there are size"), "{said}");

    world.podman(&["volume", "create", "--driver", "nbdbridge", "-o", "size=64M", "data"]);
    std::fs::write(world.pool().join("data/volume.json"), "{").unwrap();
    let refused =
        try_run("podman", &["run", "--rm", "-v", "data:/data", IMAGE, "touch", "/data/on-the-host"]);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && said.contains("is broken"), "{said}");
    world.assert_clean();
}
