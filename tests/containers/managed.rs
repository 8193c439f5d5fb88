//! The managed plugin that contrib/containers/plugin/build makes: all of it in a container, with which it ends.

use std::fs;
use std::process::Command;

use serde_json::{Value, json};

use crate::support::{PROGRAM, eventually, run, text, try_run};
use crate::world::{IMAGE, World};

/// What `docker volume inspect` shows of a volume.
fn status(world: &World, name: &str) -> Value {
    let said: Value = serde_json::from_str(&world.docker(&["volume", "inspect", name])).unwrap();
    said[0]["Status"].clone()
}

#[test]
fn a_managed_plugin_and_its_end() {
    let mut world = world!("a_managed_plugin_and_its_end");
    world.start_dockerd();
    let folder = world.join("plugin");
    let build = concat!(env!("CARGO_MANIFEST_DIR"), "/contrib/containers/plugin/build");
    run(build, &["--program", PROGRAM, "--into", text(&folder)]);
    // Nobody can be given what this host does not have.
    let config = folder.join("config.json");
    let words = fs::read_to_string(&config).unwrap();
    let has = Command::new("setpriv").arg("--dump").output().unwrap();
    if !String::from_utf8_lossy(&has.stdout).contains("sys_resource") {
        fs::write(&config, words.replace("\"CAP_SYS_RESOURCE\", ", "")).unwrap();
    }
    fs::create_dir_all("/var/lib/nbdbridge/volumes").unwrap();
    world.docker(&["plugin", "create", "nbdbridge", text(&folder)]);
    world.docker(&["plugin", "enable", "nbdbridge"]);

    world.docker(&["volume", "create", "-d", "nbdbridge", "-o", "size=64M", "data"]);
    let script = "echo hello >/data/x; sync; exec sleep 1000";
    let run_one =
        ["run", "-d", "--name", "one", "--network=none", "-v", "data:/data", IMAGE, "sh", "-c", script];
    world.docker(&run_one);
    let read = |name: &str| try_run("docker", &["exec", name, "cat", "/data/x"]);
    eventually("it does not write", || read("one").stdout == b"hello\n");
    let device = status(&world, "data")["device"].as_str().unwrap().to_owned();
    assert!(!try_run("docker", &["plugin", "disable", "nbdbridge"]).status.success(), "it is in use");

    // By force, what serves the volume ends under its user; with the next start it can be had again.
    world.docker(&["plugin", "disable", "-f", "nbdbridge"]);
    eventually("its processes stay", || world.planes().is_empty());
    world.docker(&["plugin", "enable", "nbdbridge"]);
    let seen = status(&world, "data");
    assert_eq!(seen["references"], json!(1), "{seen}");
    assert!(seen["health"] != "ok" || !device.starts_with("/dev/loop"), "{seen}");
    world.docker(&["rm", "-f", "one"]);
    world.docker(&[
        "run",
        "-d",
        "--name",
        "two",
        "--network=none",
        "-v",
        "data:/data",
        IMAGE,
        "sleep",
        "1000",
    ]);
    assert_eq!(String::from_utf8_lossy(&read("two").stdout), "hello\n");
    world.docker(&["rm", "-f", "two"]);

    world.docker(&["volume", "rm", "data"]);
    assert_eq!(
        fs::read_dir("/var/lib/nbdbridge/volumes")
            .unwrap()
            .flatten()
            .filter(|entry| entry.path().is_dir())
            .count(),
        0
    );
    world.docker(&["plugin", "disable", "nbdbridge"]);
    world.docker(&["plugin", "rm", "nbdbridge"]);
    let backing = format!("/sys/block/{}/loop/backing_file", device.trim_start_matches("/dev/"));
    assert_ne!(fs::read_to_string(backing).unwrap_or_default().trim(), "/", "its loop device is left");
    world.assert_clean();
}
