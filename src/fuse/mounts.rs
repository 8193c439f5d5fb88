//! What is mounted where: lines of /proc/self/mountinfo (proc_pid_mountinfo(5)).

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// The file system type of our mounts.
pub(crate) const DOOR_TYPE: &str = "fuse.nbdbridge";

/// One mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Mounted {
    /// Its number, and that of the mount that it is in.
    pub(crate) id: u64,
    pub(crate) parent: u64,
    /// What of the file system is mounted, as in `/`.
    pub(crate) root: PathBuf,
    /// The group of mounts that see what is mounted in this one, and it in them.
    pub(crate) shared: Option<u64>,
    /// Groups that it only sees.
    pub(crate) masters: Vec<u64>,
    /// The device number, as in `0:52`.
    pub(crate) device: String,
    /// Where it is.
    pub(crate) point: PathBuf,
    /// The file system's type, as in `fuse.nbdbridge`.
    pub(crate) kind: String,
    /// What is mounted.
    pub(crate) source: OsString,
}

impl Mounted {
    /// All mounts that this thread sees, which may have mounts of its own; later ones cover earlier ones at the same place.
    ///
    /// # Errors
    /// That of reading /proc.
    pub(crate) fn all() -> io::Result<Vec<Mounted>> {
        Mounted::seen_by(Path::new("/proc/thread-self"))
    }

    /// All mounts that the process of this folder in /proc sees.
    ///
    /// # Errors
    /// That of reading /proc; the process may be gone.
    pub(crate) fn seen_by(process: &Path) -> io::Result<Vec<Mounted>> {
        let text = std::fs::read(process.join("mountinfo"))?;
        Ok(text.split(|byte| *byte == b'\n').filter_map(parse).collect())
    }

    /// What is mounted on this very path, uppermost last.
    ///
    /// # Errors
    /// As [`Mounted::all`].
    pub(crate) fn at(path: &Path) -> io::Result<Vec<Mounted>> {
        let mut all = Mounted::all()?;
        all.retain(|mounted| mounted.point == path);
        Ok(all)
    }

    /// Whether it is one of ours.
    pub(crate) fn is_ours(&self) -> bool {
        self.kind == DOOR_TYPE
    }

    /// Whether it is a FUSE mount.
    pub(crate) fn is_fuse(&self) -> bool {
        self.kind == "fuse" || self.kind.starts_with("fuse.")
    }
}

/// `36 35 0:52 / /mnt rw,noatime shared:1 - fuse.nbdbridge disk.img rw`: the optional fields end with a `-`.
fn parse(line: &[u8]) -> Option<Mounted> {
    let text = |field: &[u8]| String::from_utf8(field.to_vec()).ok();
    let mut fields = line.split(|byte| *byte == b' ');
    let id = text(fields.next()?)?.parse().ok()?;
    let parent = text(fields.next()?)?.parse().ok()?;
    let device = text(fields.next()?)?;
    let root = PathBuf::from(unescape(fields.next()?));
    let point = PathBuf::from(unescape(fields.next()?));
    let (mut shared, mut masters) = (None, Vec::new());
    for field in fields.by_ref().skip(1).take_while(|field| *field != b"-") {
        let field = text(field)?;
        match field.split_once(':') {
            Some(("shared", group)) => shared = group.parse().ok(),
            Some(("master" | "propagate_from", group)) => masters.extend(group.parse::<u64>()),
            _ => {}
        }
    }
    let kind = unescape(fields.next()?).into_string().ok()?;
    let source = unescape(fields.next()?);
    Some(Mounted { id, parent, root, shared, masters, device, point, kind, source })
}

/// Blanks and the like are written as `\040`.
fn unescape(field: &[u8]) -> OsString {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let [first, tail @ ..] = rest {
        let code = tail.get(..3).filter(|digits| digits.iter().all(|digit| (b'0'..=b'7').contains(digit)));
        match (first, code) {
            (b'\\', Some(digits)) => {
                let number = digits.iter().fold(0_u32, |sum, digit| sum * 8 + u32::from(digit - b'0'));
                bytes.push(u8::try_from(number).unwrap_or(b'?'));
                rest = &tail[3..];
            }
            _ => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    OsString::from_vec(bytes)
}

/// A path as `/proc/PID/fd` and sysfs show it, for comparison.
pub(super) fn same_path(shown: &[u8], path: &Path) -> bool {
    shown == path.as_os_str().as_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_read() {
        let line = br"61 28 0:45 / /tmp/a\040b\134c rw,nosuid,nodev,relatime shared:5 master:1 - fuse.nbdbridge disk\040\303\244.img rw,user_id=0";
        let mounted = parse(line).unwrap();
        assert_eq!(mounted.device, "0:45");
        assert_eq!(mounted.point, Path::new(r"/tmp/a b\c"));
        assert_eq!(mounted.source, "disk ä.img");
        assert!(mounted.is_ours() && mounted.is_fuse());
        assert_eq!((mounted.id, mounted.parent, mounted.root.as_path()), (61, 28, Path::new("/")));
        assert_eq!((mounted.shared, mounted.masters), (Some(5), vec![1]));
        let plain = parse(b"28 1 254:0 / / rw - ext4 /dev/root rw").unwrap();
        assert_eq!((plain.kind.as_str(), plain.is_fuse()), ("ext4", false));
        assert_eq!(parse(b""), None);
        assert_eq!(parse(b"28 1 254:0 / / rw ext4"), None);
        assert_eq!(unescape(br"\"), r"\");
        assert_eq!(unescape(br"a\777"), "a?");
    }

    #[test]
    fn the_root_is_mounted() {
        assert!(!Mounted::at(Path::new("/")).unwrap().is_empty());
        assert!(Mounted::at(Path::new("/no/such/place")).unwrap().is_empty());
    }
}
