//! Who has FILE open, or what is in a mounted folder: for a warning, so that a person finds what is in the way. By the
//! paths in /proc and /sys alone: to look at the file itself could wait for its server.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::AtFlags;

use super::mounts::same_path;
use super::point::look;

/// More are not listed.
const MOST: usize = 5;

/// Words for the programs and loop devices that have `path` open, or what is below it, as far as we may see them; not this
/// process. Where the file system's device number is given (`0:52`), also those who had it open before it was unmounted.
pub(crate) fn describe(path: &Path, number: Option<&str>) -> String {
    let mut users: Vec<String> = loops(path);
    users.extend(programs(path, number));
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

/// Whether a link of /proc leads into the file system of this number. Its path says nothing once that is unmounted.
fn is_in(link: &Path, number: &str) -> bool {
    look(link, AtFlags::empty())
        .is_ok_and(|found| format!("{}:{}", found.stx_dev_major, found.stx_dev_minor) == number)
}

fn programs(path: &Path, mounted: Option<&str>) -> Vec<String> {
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
        let mut links = links.filter_map(|link| Some((fs::read_link(&link).ok()?, link)));
        let is_it = |(leads_to, link): (PathBuf, PathBuf)| {
            leads_to.starts_with(path)
                || leads_to == Path::new("/") && mounted.is_some_and(|number| is_in(&link, number))
        };
        if links.any(is_it) {
            let name = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
            found.push(format!("{} (process {})", name.trim(), number.display()));
        }
    }
    found
}
