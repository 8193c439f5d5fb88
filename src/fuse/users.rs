//! Who has FILE open, or what is in a mounted folder: for a warning, so that a person finds what is in the way. By the
//! paths in /proc and /sys alone: to look at the file itself could wait for its server.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::mounts::same_path;

/// More are not listed.
const MOST: usize = 5;

/// Words for the programs and loop devices that have `path` open, or what is below it, as far as we may see them; not this
/// process.
pub(crate) fn describe(path: &Path) -> String {
    let mut users: Vec<String> = loops(path);
    users.extend(programs(path));
    match users.len() {
        0 => "somebody".to_owned(),
        1..=MOST => users.join(", "),
        many => {
            users.truncate(MOST);
            format!("{} and {} more", users.join(", "), many - MOST)
        }
    }
}

/// Loop devices over it.
fn loops(path: &Path) -> Vec<String> {
    let Ok(devices) = fs::read_dir("/sys/block") else { return Vec::new() };
    let devices = devices.flatten().filter(|device| {
        let backing = fs::read(device.path().join("loop/backing_file")).unwrap_or_default();
        same_path(backing.strip_suffix(b"\n").unwrap_or(&backing), path)
    });
    devices.map(|device| format!("/dev/{}", device.file_name().display())).collect()
}

fn programs(path: &Path) -> Vec<String> {
    let Ok(processes) = fs::read_dir("/proc") else { return Vec::new() };
    let ours = std::process::id().to_string();
    let numbered = |name: &[u8]| name.iter().all(u8::is_ascii_digit);
    let mut found = Vec::new();
    for process in processes.flatten() {
        let number = process.file_name();
        if !numbered(number.as_bytes()) || number == ours.as_str() {
            continue;
        }
        let Ok(descriptors) = fs::read_dir(process.path().join("fd")) else { continue };
        let links = descriptors.flatten().map(|descriptor| descriptor.path());
        let links = std::iter::once(process.path().join("cwd")).chain(links);
        let mut links = links.filter_map(|link| fs::read_link(link).ok());
        if links.any(|link| link.starts_with(path)) {
            let name = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
            found.push(format!("{} (process {})", name.trim(), number.display()));
        }
    }
    found
}
