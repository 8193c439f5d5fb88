//! Who uses a volume. Engines tell by an ID, and tell it as often as they like: each is counted. They also die without
//! a word, so that counts can be too high, never too low; where it matters, the kernel is asked: who has the volume's
//! device mounted, in any mount namespace, beside us.
//!
//! What others mount of our mount goes with it when it is unmounted, where mounts propagate to them: such copies are
//! nobody's use. What stays, as a container's volume does, is.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{major, makedev, minor};
use rustix::time::{ClockId, clock_gettime};

use super::runtime::State;
use super::{Error, FsKind, Result, Volume, remove};
use crate::fuse::Mounted;

/// IDs of one volume at most.
const MOST: usize = 4096;

/// The longest ID in bytes. Those of engines have 64.
const MAX_ID: usize = 1024;

/// A count that is older than this, of a volume that nobody has mounted, is that of an engine which was killed. A younger
/// one counts whatever the kernel says: engines mount a volume into a container a moment after they were told where it is.
const STALE_SECONDS: u64 = 60;

/// Users named in a line at most.
const NAMED: usize = 3;

/// Whether `id` may be counted among these.
///
/// # Errors
/// [`Error::Usage`]: no ID that an engine has, or too many.
pub(super) fn admit(holders: &BTreeMap<String, u32>, id: &str) -> Result<()> {
    if id.len() > MAX_ID || id.contains(|c: char| c.is_control()) {
        return Err(Error::Usage(format!("an ID longer than {MAX_ID} bytes, or with control characters")));
    }
    if holders.len() >= MOST && !holders.contains_key(id) {
        return Err(Error::Usage(format!("more than {MOST} users of one volume")));
    }
    Ok(())
}

impl Volume<'_> {
    /// Refuses where somebody uses the volume: by hand, by a fresh count of an engine, or by what the kernel knows, whatever
    /// old counts say.
    ///
    /// # Errors
    /// [`Error::InUse`].
    pub(super) fn refuse_if_used(&self, state: &State) -> Result<()> {
        let in_use =
            |why: &str| Error::InUse(format!("volume `{}` is in use: {why}; end that first", self.name));
        let counts = self.record.fs == FsKind::None || state.holders.contains_key(Volume::BY_HAND);
        if counts && !state.holders.is_empty() {
            return Err(in_use(&remove::describe(state)));
        }
        let Some(plane) = &state.plane else { return Ok(()) };
        match &state.mounted {
            Some(path) if self.record.fs != FsKind::None => match users(&plane.device, path) {
                Ok(users) if users.is_empty() => match state.fresh_age() {
                    None => Ok(()),
                    Some(age) => Err(Error::InUse(format!(
                        "volume `{}` is in use: {}, since {age} s; end that first, or, where its engine was killed, try \
                         again after {STALE_SECONDS} s",
                        self.name,
                        remove::describe(state)
                    ))),
                },
                Ok(users) => Err(in_use(&name_some(&users))),
                Err(error) => {
                    Err(in_use(&format!("who uses {} cannot be known: {error}", plane.device.display())))
                }
            },
            _ if plane.is_in_use() => Err(in_use(&plane.describe_use())),
            _ => Ok(()),
        }
    }

    /// Whether the counts that are left are those of engines which were killed: they are old, and the kernel knows of
    /// nobody.
    pub(super) fn is_stale(&self, state: &State) -> bool {
        let (Some(plane), Some(path)) = (&state.plane, &state.mounted) else { return false };
        let counts = self.record.fs == FsKind::None || state.holders.contains_key(Volume::BY_HAND);
        !counts
            && state.held_age() > STALE_SECONDS
            && users(&plane.device, path).is_ok_and(|users| users.is_empty())
    }
}

impl State {
    /// Seconds since the last holder came.
    fn held_age(&self) -> u64 {
        now().saturating_sub(self.held_at)
    }

    /// The same, where a holder that has not unmounted since came a short time ago: the kernel may not know of its mount
    /// yet.
    fn fresh_age(&self) -> Option<u64> {
        let age = self.held_age();
        (!self.recent.is_empty() && age <= STALE_SECONDS).then_some(age)
    }

    /// Counts one more use. By hand there is one.
    pub(super) fn hold(&mut self, holder: &str) {
        if self.fresh_age().is_none() {
            self.recent.clear();
        }
        self.recent.insert(holder.to_owned());
        self.held_at = now();
        let count = self.holders.entry(holder.to_owned()).or_insert(0);
        *count = if holder == Volume::BY_HAND { 1 } else { count.saturating_add(1) };
    }

    /// Counts one less; one that is not there is no error. What is left of the holder's counts are those of an engine that
    /// was killed and mounted the volume for the same container again.
    pub(super) fn release(&mut self, holder: &str) {
        self.recent.remove(holder);
        if let Some(count) = self.holders.get_mut(holder) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                self.holders.remove(holder);
            }
        }
    }
}

/// Seconds since the boot.
pub(super) fn now() -> u64 {
    u64::try_from(clock_gettime(ClockId::Boottime).tv_sec).unwrap_or(0)
}

/// Somebody who has a volume mounted.
#[derive(Clone, Debug, PartialEq, Eq)]
struct User {
    /// A process that sees the mount, and its name.
    pid: u32,
    name: String,
    /// Where, in that process's eyes.
    point: PathBuf,
}

impl fmt::Display for User {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} in {} ({})", self.point.display(), self.name, self.pid)
    }
}

/// Words for some, as in `mounted at /data in postgres (812)`.
fn name_some(users: &[User]) -> String {
    let mut named: Vec<String> = users.iter().take(NAMED).map(User::to_string).collect();
    if users.len() > NAMED {
        named.push(format!("{} more", users.len() - NAMED));
    }
    format!("mounted at {}", named.join(", "))
}

/// Who has this block device mounted, in any mount namespace that a process of ours to see is in; but for the mount at
/// `own` in this one, and what goes with it.
///
/// # Errors
/// That of looking at the device or at our own mounts.
fn users(device: &Path, own: &Path) -> io::Result<Vec<User>> {
    let meta = fs::metadata(device)?;
    if !meta.file_type().is_block_device() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a block device"));
    }
    let device = Device { number: number(&meta), path: device };
    let here = Namespace::of(Path::new("/proc/self"))?;
    let place = here.mounts.iter().rev().find(|mounted| mounted.point == own && device.is_in(mounted));
    let place = place.and_then(|mounted| here.place(mounted));

    let mut found = Vec::new();
    let mut seen = HashSet::new();
    for process in std::iter::once(PathBuf::from("/proc/self")).chain(processes()) {
        // Of a process that ends meanwhile, another may tell.
        let Ok(id) = fs::read_link(process.join("ns/mnt")) else { continue };
        if seen.contains(&id) {
            continue;
        }
        let Ok(there) = Namespace::of(&process) else { continue };
        let is_here = seen.is_empty();
        seen.insert(id);
        for mounted in there.mounts.iter().filter(|mounted| device.is_in(mounted)) {
            let is_own = is_here && mounted.point == own;
            let goes_along = match (&place, there.place(mounted)) {
                (Some(place), Some(copy)) => !is_here && place.is_followed_by(&copy),
                _ => false,
            };
            if !is_own && !goes_along {
                found.push(user(&process, mounted));
            }
        }
    }
    Ok(found)
}

fn user(process: &Path, mounted: &Mounted) -> User {
    let name = fs::read_to_string(process.join("comm")).unwrap_or_default();
    let pid = fs::read_link(process).ok().or_else(|| Some(process.to_owned()));
    let pid = pid.and_then(|path| path.file_name()?.to_str()?.parse().ok());
    User { pid: pid.unwrap_or(0), name: name.trim_end().to_owned(), point: mounted.point.clone() }
}

fn processes() -> impl Iterator<Item = PathBuf> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        .filter(|entry| entry.file_name().to_string_lossy().bytes().all(|byte| byte.is_ascii_digit()))
        .map(|entry| entry.path())
}

fn number(meta: &fs::Metadata) -> u64 {
    makedev(major(meta.rdev()), minor(meta.rdev()))
}

/// A block device.
struct Device<'a> {
    number: u64,
    path: &'a Path,
}

impl Device<'_> {
    /// Whether it is what is mounted there.
    fn is_in(&self, mounted: &Mounted) -> bool {
        let Some((major, minor)) = mounted.device.split_once(':') else { return false };
        let (Ok(major), Ok(minor)) = (major.parse(), minor.parse()) else { return false };
        // btrfs has numbers of its own; then the source tells.
        makedev(major, minor) == self.number || (major == 0 && self.path.as_os_str() == mounted.source)
    }
}

/// The mounts of one namespace.
struct Namespace {
    mounts: Vec<Mounted>,
    by_id: HashMap<u64, usize>,
}

/// Where a mount is, told so that it can be compared between namespaces: the mount that it is in, and the place in that
/// one's file system.
#[derive(Debug, PartialEq, Eq)]
struct Place {
    shared: Option<u64>,
    masters: Vec<u64>,
    path: PathBuf,
}

impl Namespace {
    fn of(process: &Path) -> io::Result<Self> {
        let mounts = Mounted::seen_by(process)?;
        let by_id = mounts.iter().enumerate().map(|(index, mounted)| (mounted.id, index)).collect();
        Ok(Namespace { mounts, by_id })
    }

    fn place(&self, mounted: &Mounted) -> Option<Place> {
        let parent = self.mounts.get(*self.by_id.get(&mounted.parent)?)?;
        let below = mounted.point.strip_prefix(&parent.point).ok()?;
        let path = parent.root.join(below);
        Some(Place { shared: parent.shared, masters: parent.masters.clone(), path })
    }
}

impl Place {
    /// Whether what is unmounted here is unmounted there.
    fn is_followed_by(&self, copy: &Place) -> bool {
        let Some(group) = self.shared else { return false };
        self.path == copy.path && (copy.shared == Some(group) || copy.masters.contains(&group))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_have_limits() {
        let mut holders = BTreeMap::from([("a".to_owned(), 1)]);
        admit(&holders, "a").unwrap();
        for id in ["a\n", &"x".repeat(MAX_ID + 1)] {
            assert!(matches!(admit(&holders, id), Err(Error::Usage(_))));
        }
        for number in 1..MOST {
            admit(&holders, &number.to_string()).unwrap();
            holders.insert(number.to_string(), 1);
        }
        assert!(admit(&holders, "b").unwrap_err().to_string().contains("more than 4096"));
        admit(&holders, "7").unwrap();
    }

    #[test]
    fn a_count_is_fresh_until_it_is_old_or_released() {
        let mut state = State::default();
        assert_eq!(state.fresh_age(), None);
        state.hold("a");
        state.hold("b");
        assert!(state.fresh_age().is_some_and(|age| age < 10));
        state.release("a");
        assert!(state.fresh_age().is_some());
        state.held_at = now() - STALE_SECONDS - 1;
        assert_eq!(state.fresh_age(), None);
        // A dockerd that was killed and started again: three mounts, one unmount.
        for _ in 0..3 {
            state.hold("a");
        }
        assert!(state.fresh_age().is_some());
        state.release("a");
        assert_eq!(
            (state.fresh_age(), &state.holders),
            (None, &BTreeMap::from([("a".into(), 2), ("b".into(), 1)]))
        );
    }

    #[test]
    fn copies_go_along_where_mounts_propagate() {
        let place = |shared: Option<u64>, masters: &[u64], path: &str| Place {
            shared,
            masters: masters.to_vec(),
            path: path.into(),
        };
        let ours = place(Some(7), &[], "/volumes/a");
        assert!(ours.is_followed_by(&place(Some(7), &[], "/volumes/a")));
        assert!(ours.is_followed_by(&place(None, &[3, 7], "/volumes/a")));
        assert!(!ours.is_followed_by(&place(Some(7), &[], "/volumes/b")));
        assert!(!ours.is_followed_by(&place(None, &[], "/volumes/a")));
        assert!(!place(None, &[7], "/volumes/a").is_followed_by(&place(None, &[], "/volumes/a")));
    }

    #[test]
    fn the_root_is_somewhere() {
        let here = Namespace::of(Path::new("/proc/self")).unwrap();
        let proc = here.mounts.iter().find(|mounted| mounted.point == Path::new("/proc")).unwrap();
        assert_eq!(here.place(proc).unwrap().path, Path::new("/proc"));
        assert!(users(Path::new("/dev/null"), Path::new("/")).is_err());
    }

    #[test]
    fn some_are_named() {
        let user = |pid| User { pid, name: "sleep".into(), point: "/data".into() };
        assert_eq!(name_some(&[user(7)]), "mounted at /data in sleep (7)");
        let line = name_some(&[user(1), user(2), user(3), user(4), user(5)]);
        assert!(line.ends_with("/data in sleep (3), 2 more"), "{line}");
    }
}
