//! Everything at the same time.

use std::fs;
use std::path::Path;

use serde_json::json;

use crate::world::World;

/// Volumes at the same time.
const VOLUMES: usize = 50;

#[test]
fn a_storm_leaves_nothing() {
    let mut world = world!("a_storm_leaves_nothing");
    world.start_daemon();
    let shared = json!({ "Name": "shared", "Opts": { "size": "16M" } });
    world.call("VolumeDriver.Create", &shared);
    std::thread::scope(|scope| {
        for number in 0..VOLUMES {
            let world: &World = &world;
            scope.spawn(move || one(world, number));
        }
    });
    assert_eq!(world.status("shared")["references"], json!(0));
    assert_eq!(world.volumes(), ["shared"]);
    world.assert_clean();
    world.call("VolumeDriver.Remove", &json!({ "Name": "shared" }));
    assert_eq!(
        fs::read_dir(world.pool()).unwrap().filter(|entry| entry.as_ref().unwrap().path().is_dir()).count(),
        0
    );
}

/// A volume's life; and one that all have in common is mounted and unmounted meanwhile.
fn one(world: &World, number: usize) {
    let name = format!("v{number}");
    let which = json!({ "Name": name, "ID": "x" });
    let shared = json!({ "Name": "shared", "ID": format!("{number}") });
    world.call("VolumeDriver.Create", &json!({ "Name": name, "Opts": { "size": "16M" } }));
    let point = world.call("VolumeDriver.Mount", &which)["Mountpoint"].as_str().unwrap().to_owned();
    fs::write(Path::new(&point).join(&name), &name).unwrap();
    world.call("VolumeDriver.Mount", &shared);
    world.call("VolumeDriver.Unmount", &shared);
    assert_eq!(fs::read_to_string(Path::new(&point).join(&name)).unwrap(), name);
    world.call("VolumeDriver.Unmount", &which);
    world.call("VolumeDriver.Remove", &json!({ "Name": name }));
}
