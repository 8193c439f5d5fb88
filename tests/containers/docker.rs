//! dockerd: the same, `docker cp` beside a running container, and a dockerd that was killed.

use std::fs;

use serde_json::{Value, json};

use crate::support::{eventually, text, try_run};
use crate::world::{IMAGE, World};

/// A container that ends with its command.
fn run(world: &World, volume: &str, script: &str) -> String {
    world.docker(&["run", "--rm", "--network=none", "-v", volume, IMAGE, "sh", "-c", script])
}

#[test]
fn a_volumes_life_with_docker() {
    let mut world = world!("a_volumes_life_with_docker");
    world.start_daemon();
    world.start_dockerd();
    let create = ["volume", "create", "-d", "nbdbridge", "-o", "size=64M", "--label", "tier=gold", "data"];
    assert_eq!(world.docker(&create), "data");
    assert_eq!(world.docker(&create), "data", "the same once more is no error");
    let said: Value = serde_json::from_str(&world.docker(&["volume", "inspect", "data"])).unwrap();
    assert_eq!((&said[0]["Driver"], &said[0]["Labels"]["tier"]), (&"nbdbridge".into(), &"gold".into()));
    assert_eq!((&said[0]["Status"]["size"], &said[0]["Status"]["health"]), (&json!(64 << 20), &"ok".into()));
    assert!(world.docker(&["volume", "ls", "--filter", "label=tier=gold"]).contains("data"));

    run(&world, "data:/data", "echo hello >/data/x; mkdir /data/d");
    world.assert_clean();
    assert_eq!(run(&world, "data:/data:ro", "cat /data/x; ls /data"), "hello\nd\nx");
    let said = run(&world, "data:/data", "dd if=/dev/zero of=/data/full bs=1M count=100 2>&1; rm /data/full");
    assert!(said.contains("No space left on device"), "{said}");

    // docker cp mounts once more, with the same ID.
    world.docker(&[
        "run",
        "-d",
        "--name",
        "one",
        "--network=none",
        "-v",
        "data:/data",
        IMAGE,
        "sh",
        "-c",
        "while echo tick >>/data/log; do sleep 0.05; done",
    ]);
    let copy = world.join("copy");
    for _ in 0..3 {
        world.docker(&["cp", "one:/data/x", text(&copy)]);
        assert_eq!(fs::read_to_string(&copy).unwrap(), "hello\n");
        assert_eq!(world.status("data")["references"], json!(1));
    }
    fs::write(&copy, "in").unwrap();
    world.docker(&["cp", text(&copy), "one:/data/in"]);
    assert_eq!(world.docker(&["exec", "one", "cat", "/data/in"]), "in");
    let refused = try_run("docker", &["volume", "rm", "data"]);
    assert!(!refused.status.success());
    world.docker(&["exec", "one", "sh", "-c", "echo more >>/data/log"]);
    world.docker(&["rm", "-f", "one"]);
    world.assert_clean();
    // Of a container that is not running, too.
    world.docker(&["create", "--name", "two", "--network=none", "-v", "data:/data", IMAGE, "true"]);
    world.docker(&["cp", "two:/data/in", text(&copy)]);
    world.assert_clean();
    world.docker(&["rm", "two"]);

    let refused =
        try_run("docker", &["volume", "create", "-d", "nbdbridge", "-o", "size=128M", "-o", "siez=1", "x"]);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && said.contains("unknown option `siez`; there are size"), "{said}");
    world.docker(&["volume", "rm", "data"]);
    assert_eq!(world.volumes(), [""; 0]);
    world.assert_clean();
}

/// It sends no Unmount for what ran, and once more Mount, with the same ID, when it starts that again.
#[test]
fn a_killed_dockerd_does_not_keep_a_volume() {
    let mut world = world!("a_killed_dockerd_does_not_keep_a_volume");
    world.start_daemon();
    world.start_dockerd();
    world.docker(&["volume", "create", "-d", "nbdbridge", "-o", "size=64M", "data"]);
    world.docker(&[
        "run",
        "-d",
        "--name",
        "one",
        "--restart=always",
        "--stop-timeout=1",
        "--network=none",
        "-v",
        "data:/data",
        IMAGE,
        "sh",
        "-c",
        "echo start >>/data/starts; exec sleep 1000",
    ]);
    let starts = |world: &World| {
        let output = try_run("docker", &["exec", "one", "cat", "/data/starts"]);
        let _ = world;
        String::from_utf8_lossy(&output.stdout).lines().count()
    };
    eventually("it does not start", || starts(&world) == 1);
    for expected in [2, 3] {
        world.kill_dockerd();
        world.start_dockerd();
        eventually("dockerd does not start it again", || starts(&world) == expected);
    }
    assert!(world.status("data")["references"].as_u64().unwrap() > 1, "{}", world.status("data"));
    let refused = try_run("docker", &["volume", "rm", "data"]);
    assert!(!refused.status.success());
    world.docker(&["rm", "-f", "one"]);
    world.docker(&["volume", "rm", "data"]);
    assert_eq!(world.volumes(), [""; 0]);
    world.assert_clean();
}
