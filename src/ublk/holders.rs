//! Who uses a device: mounts, devices on top of it, processes that have it open. Reads /proc and /sys only.

use std::collections::HashSet;
use std::fmt::Write;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{major, makedev, minor};
use rustix::io::Errno;

use super::apart;
use super::control::block_path;
use super::memory::unescape;

/// Uses named in a line at most.
const MOST: usize = 4;

/// How long an open that looks for other users may take.
const OPENING: Duration = Duration::from_secs(2);

/// What keeps the device of this number busy, in words, as in "mounted on /srv"; None where nobody would be hurt by
/// its end. `live` lets it be opened for that, which can take for ever where nobody serves it.
pub(super) fn of(id: u32, live: bool) -> Option<String> {
    let numbers = device_numbers(id);
    let mut uses = mounts(&numbers);
    uses.extend(stacked(id));
    uses.extend(processes(&numbers));
    if uses.is_empty() && live {
        // What claims the whole device without a name in /proc: swap, or a mount that was detached.
        let claimed = apart::open_exclusively(&block_path(id), OPENING) == Some(Errno::BUSY);
        if claimed {
            uses.push("claimed by the kernel (swap, or a mount that was detached)".to_owned());
        }
    }
    join(&uses)
}

fn join(uses: &[String]) -> Option<String> {
    let mut line = uses.get(..MOST.min(uses.len()))?.join(", ");
    if uses.len() > MOST {
        let _ = write!(line, " and {} more", uses.len() - MOST);
    }
    (!line.is_empty()).then_some(line)
}

/// Other processes that have a block device open, in words.
pub(crate) fn openers(device: &Path) -> Vec<String> {
    let Ok(found) = fs::metadata(device) else { return Vec::new() };
    if !found.file_type().is_block_device() {
        return Vec::new();
    }
    processes(&HashSet::from([makedev(major(found.rdev()), minor(found.rdev()))]))
}

/// The device's number and those of its partitions.
fn device_numbers(id: u32) -> HashSet<u64> {
    let folder = PathBuf::from(format!("/sys/block/ublkb{id}"));
    let parts = fs::read_dir(&folder).into_iter().flatten().flatten().map(|entry| entry.path());
    std::iter::once(folder.clone())
        .chain(parts)
        .filter_map(|folder| fs::read_to_string(folder.join("dev")).ok())
        .filter_map(|text| parse_number(text.trim()))
        .collect()
}

fn parse_number(text: &str) -> Option<u64> {
    let (major, minor) = text.split_once(':')?;
    Some(makedev(major.parse().ok()?, minor.parse().ok()?))
}

/// Mounts in every mount namespace that can be seen.
fn mounts(numbers: &HashSet<u64>) -> Vec<String> {
    let mut namespaces = HashSet::new();
    let mut found = Vec::new();
    let own = PathBuf::from("/proc/self");
    for process in std::iter::once(own).chain(all_processes()) {
        let Ok(namespace) = fs::read_link(process.join("ns/mnt")) else { continue };
        if !namespaces.insert(namespace) {
            continue;
        }
        let table = fs::read(process.join("mountinfo")).unwrap_or_default();
        for line in table.split(|byte| *byte == b'\n') {
            let Some(point) = mount_point(line, numbers) else { continue };
            let text = format!("mounted on {}", point.display());
            if !found.contains(&text) {
                found.push(text);
            }
        }
    }
    found
}

/// Where a line of mountinfo mounts one of these devices.
fn mount_point(line: &[u8], numbers: &HashSet<u64>) -> Option<PathBuf> {
    let mut fields = line.split(|byte| *byte == b' ');
    let number = parse_number(std::str::from_utf8(fields.nth(2)?).ok()?)?;
    let point = fields.nth(1)?;
    // btrfs and others have a number of their own; then the source tells.
    let source = fields.skip_while(|field| *field != b"-").nth(2)?;
    let by_source = || fs::metadata(unescape(source)).is_ok_and(|there| is_one_of(&there, numbers));
    (numbers.contains(&number) || (major(number) == 0 && source.starts_with(b"/dev/") && by_source()))
        .then(|| unescape(point))
}

/// Devices on top: dm, md, bcache.
fn stacked(id: u32) -> Vec<String> {
    let folder = PathBuf::from(format!("/sys/block/ublkb{id}"));
    let parts =
        fs::read_dir(&folder).into_iter().flatten().flatten().map(|entry| entry.path().join("holders"));
    std::iter::once(folder.join("holders"))
        .chain(parts)
        .flat_map(|holders| fs::read_dir(holders).into_iter().flatten().flatten())
        .map(|entry| format!("below {}", entry.file_name().to_string_lossy()))
        .collect()
}

/// Other processes that have it open.
fn processes(numbers: &HashSet<u64>) -> Vec<String> {
    let own = PathBuf::from(format!("/proc/{}", std::process::id()));
    all_processes()
        .into_iter()
        .filter(|process| *process != own && has_open(process, numbers))
        .map(|process| {
            let name = fs::read_to_string(process.join("comm")).unwrap_or_default();
            let number = process.file_name().unwrap_or_default().to_string_lossy().into_owned();
            format!("open in {} ({number})", name.trim())
        })
        .collect()
}

fn has_open(process: &Path, numbers: &HashSet<u64>) -> bool {
    let files = fs::read_dir(process.join("fd")).into_iter().flatten().flatten();
    files.into_iter().any(|file| {
        // The link's text costs less than what it leads to.
        fs::read_link(file.path()).is_ok_and(|path| path.starts_with("/dev"))
            && fs::metadata(file.path()).is_ok_and(|there| is_one_of(&there, numbers))
    })
}

fn is_one_of(there: &fs::Metadata, numbers: &HashSet<u64>) -> bool {
    let number = there.rdev();
    there.file_type().is_block_device() && numbers.contains(&makedev(major(number), minor(number)))
}

fn all_processes() -> Vec<PathBuf> {
    fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().bytes().all(|byte| byte.is_ascii_digit()))
        .map(|entry| entry.path())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_mountinfo() {
        let numbers = HashSet::from([makedev(259, 3)]);
        let line = |number: &str| format!("36 35 {number} / /srv/a\\040b rw shared:1 - ext4 /nowhere rw");
        assert_eq!(mount_point(line("259:3").as_bytes(), &numbers), Some(PathBuf::from("/srv/a b")));
        assert_eq!(mount_point(line("259:4").as_bytes(), &numbers), None);
        assert_eq!(mount_point(b"", &numbers), None);
    }

    #[test]
    fn a_line_names_some_and_counts_the_rest() {
        assert_eq!(join(&[]), None);
        let uses: Vec<String> = (1..=6).map(|n| format!("use {n}")).collect();
        assert_eq!(join(&uses[..2]).as_deref(), Some("use 1, use 2"));
        assert_eq!(join(&uses).as_deref(), Some("use 1, use 2, use 3, use 4 and 2 more"));
    }

    #[test]
    fn nobody_holds_a_device_that_is_not_there() {
        assert_eq!(of(u32::MAX, true), None);
    }
}
