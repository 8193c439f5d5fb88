//! The systemd units: what instances of one unit have in common, and whether systemd takes them.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::support::PROGRAM;
use crate::support::mount::missing;

const FOLDER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/contrib/systemd");

/// The services: name of an instance, and the text of its unit.
fn services() -> Vec<(String, String)> {
    let entries = fs::read_dir(FOLDER).unwrap().map(|entry| entry.unwrap().path());
    let services = entries.filter(|path| path.extension().is_some_and(|ext| ext == "service"));
    let read = |path: std::path::PathBuf| {
        let name = path.file_name().unwrap().to_str().unwrap().replace('@', "@7");
        (name, fs::read_to_string(path).unwrap())
    };
    services.map(read).collect()
}

fn setting<'a>(text: &'a str, key: &str) -> Vec<&'a str> {
    text.lines().filter_map(|line| line.strip_prefix(key)?.strip_prefix('=')).collect()
}

#[test]
fn no_two_instances_share_user_and_state_folder() {
    let services = services();
    assert!(services.len() >= 3, "{services:?}");
    let mut folders = Vec::new();
    for (name, text) in &services {
        let folder = setting(text, "StateDirectory");
        assert_eq!(folder.len(), 1, "{name}");
        folders.push(folder[0].trim_end_matches("/%i"));
        if !name.contains('@') {
            continue;
        }
        assert!(folder[0].ends_with("/%i"), "{name}: {folder:?}");
        let dynamic = setting(text, "DynamicUser") == ["yes"];
        let users = setting(text, "User");
        // systemd names a dynamic user by the whole name of the unit, its instance included.
        assert!(users.iter().all(|user| user.contains("%i")), "{name}: {users:?}");
        assert!(dynamic || name.starts_with("nbdbridge-ublk@"), "{name}: only a device needs root");
        for line in setting(text, "ExecStart").iter().filter(|line| line.contains("/var/lib/")) {
            assert!(line.contains(&format!("/var/lib/{}/", folder[0])), "{name}: {line}");
        }
    }
    // Nor do instances of one unit and another unit.
    for (at, folder) in folders.iter().enumerate() {
        let inside = folders.iter().filter(|other| Path::new(other).starts_with(folder));
        assert_eq!(inside.count(), 1, "{folder} at {at} of {folders:?}");
    }
}

#[test]
fn systemd_takes_the_units() {
    if missing("systemd_takes_the_units", &["systemd-analyze"]) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(FOLDER).unwrap().flatten() {
        let text = fs::read_to_string(entry.path()).unwrap().replace("/usr/bin/nbdbridge", PROGRAM);
        fs::write(folder.path().join(entry.file_name()), text).unwrap();
    }
    for (name, _) in services() {
        let mut command = Command::new("systemd-analyze");
        command.env("SYSTEMD_UNIT_PATH", format!("{}:", folder.path().display()));
        let output = command.args(["verify", "--man=no", &name]).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        let ours: Vec<_> = said.lines().filter(|line| line.contains("nbdbridge")).collect();
        assert!(ours.is_empty(), "{name}: {said}");
        // Other units of this host are its own business.
        assert!(output.status.success() || !said.is_empty(), "{name}: {output:?}");
    }
}
