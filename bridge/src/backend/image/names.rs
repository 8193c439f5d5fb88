//! Names of other files in an image: what they mean, and whether they are followed. Nobody vouches for them.
//!
//! Beside paths, the simple forms of qemu's `json:` names are known, which libvirt writes:
//! `json:{"driver":"qcow2","file":{"driver":"file","filename":"base.qcow2"}}` and the same with dots in the keys.

use std::collections::HashSet;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::chain::unsupported;
use super::map::MAX_FILES;
use crate::OpenError;

type Result<T> = std::result::Result<T, OpenError>;

/// Keys of a `json:` name that do not change which bytes are read.
const HARMLESS: &[&str] = &[
    "aio",
    "auto-read-only",
    "cache.direct",
    "cache.no-flush",
    "detect-zeroes",
    "discard",
    "locking",
    "node-name",
    "pr-manager",
    "read-only",
];

/// Which files may be opened because an image names them.
pub(super) struct Policy {
    /// The folder of the first image.
    folder: PathBuf,
    any: bool,
    seen: HashSet<(u64, u64)>,
}

impl Policy {
    pub(super) fn new(path: &Path, any: bool) -> Result<Self> {
        let whole = canonical(path)?;
        let folder = whole.parent().unwrap_or(Path::new("/")).to_owned();
        let mut policy = Policy { folder, any, seen: HashSet::new() };
        policy.see(&whole);
        Ok(policy)
    }

    /// False for a file that is part of the image already.
    fn see(&mut self, path: &Path) -> bool {
        identity(path).is_none_or(|found| self.seen.insert(found))
    }

    /// Returns the path that `name` in the image at `image` leads to.
    ///
    /// # Errors
    /// One line. The name is no path; the file does not exist, lies outside of the image's folder, or is in the chain already.
    pub(super) fn admit(&mut self, image: &Path, name: &Path, what: &str) -> Result<PathBuf> {
        self.follow(image, name, what, self.any)
    }

    /// The same for a file that the user has named too, wherever it lies.
    pub(super) fn admit_allowed(&mut self, image: &Path, name: &Path, what: &str) -> Result<PathBuf> {
        self.follow(image, name, what, true)
    }

    fn follow(&mut self, image: &Path, name: &Path, what: &str, any: bool) -> Result<PathBuf> {
        let refuse = |reason: String| Err(unsupported(image, reason));
        let text = name.to_string_lossy();
        let plain = match name.as_os_str().as_bytes().strip_prefix(b"file:") {
            Some(plain) => Path::new(OsStr::from_bytes(plain)),
            None if text.split_once(':').is_some_and(|(scheme, _)| is_scheme(scheme)) => {
                return refuse(format!("its {what} `{text}` is no path, and only paths are followed"));
            }
            None => name,
        };
        let whole = match locate(image, plain) {
            Ok(whole) => whole,
            Err(OpenError::NotFound(path)) => {
                return refuse(format!(
                    "its {what} {} does not exist (`qemu-img rebase` names another)",
                    path.display()
                ));
            }
            Err(error) => return Err(error),
        };
        if !any && !whole.starts_with(&self.folder) {
            return refuse(format!(
                "its {what} {} lies outside of the image's own folder; --allow-backing any, where you trust the image",
                whole.display()
            ));
        }
        if !self.see(&whole) {
            return refuse(format!("its {what} {} is part of the chain already: a loop", whole.display()));
        }
        if self.seen.len() > MAX_FILES {
            return refuse(format!(
                "its chain has more than {MAX_FILES} files; `qemu-img commit` shortens it"
            ));
        }
        Ok(whole)
    }
}

/// The device and the number of a file, by which it is known under any name.
fn identity(path: &Path) -> Option<(u64, u64)> {
    std::fs::metadata(path).map(|found| (found.dev(), found.ino())).ok()
}

/// Returns true if both paths lead to one file, which is there.
pub(super) fn are_same_file(one: &Path, other: &Path) -> bool {
    identity(one).is_some_and(|found| Some(found) == identity(other))
}

/// `nbd`, `https`, `fat+rw`; not `C` and not `./a`.
fn is_scheme(text: &str) -> bool {
    text.len() > 1 && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'+' || byte == b'-')
}

/// Returns a path as an image means it: from the image's own folder.
pub(super) fn beside(image: &Path, name: &Path) -> PathBuf {
    image.parent().unwrap_or(Path::new("")).join(name)
}

/// Finds the file that `name` leads to: beside the image's path, or else, if that is a link, beside its target.
fn locate(image: &Path, name: &Path) -> Result<PathBuf> {
    match canonical(&beside(image, name)) {
        Err(OpenError::NotFound(path)) => match canonical(image) {
            Ok(target) => canonical(&beside(&target, name)).map_err(|_| OpenError::NotFound(path)),
            Err(error) => Err(error),
        },
        found => found,
    }
}

fn canonical(path: &Path) -> Result<PathBuf> {
    std::fs::canonicalize(path).map_err(|source| match source.kind() {
        std::io::ErrorKind::NotFound => OpenError::NotFound(path.to_owned()),
        _ => OpenError::Os { path: path.to_owned(), action: "cannot look at it", error: source },
    })
}

/// A backing file's name and the name of its format, where the name tells it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct BackingName {
    pub(super) path: OsString,
    pub(super) format: Option<String>,
}

/// Reads the name of a backing file. What is no `json:` name is a path.
///
/// # Errors
/// The end of a line: it is a `json:` name that cannot be followed.
pub(super) fn parse_backing(name: &OsStr) -> std::result::Result<BackingName, String> {
    let Some(text) = name.as_bytes().strip_prefix(b"json:") else {
        return Ok(BackingName { path: name.to_owned(), format: None });
    };
    let name = name.display();
    let no_path = || format!("its backing file `{name}` is no path, and only paths are followed");
    let Ok(Value::Object(mut node)) = serde_json::from_slice(text) else { return Err(no_path()) };
    let format = take(&mut node, "driver");
    let protocol = |driver: Option<&str>| matches!(driver, None | Some("file" | "host_device"));
    let below = match node.remove("file") {
        Some(Value::Object(below)) => below,
        Some(_) => return Err(no_path()),
        None => {
            let keys: Vec<String> = node.keys().filter(|key| key.starts_with("file.")).cloned().collect();
            keys.into_iter()
                .filter_map(|key| Some((key.strip_prefix("file.")?.to_owned(), node.remove(&key)?)))
                .collect()
        }
    };
    // Without a file below, the node is the file itself.
    let (mut file, format, rest) = match below.is_empty() {
        true if protocol(format.as_deref()) => {
            node.insert("driver".into(), format.unwrap_or_else(|| "file".into()).into());
            (node, None, Map::new())
        }
        true => return Err(no_path()),
        false => (below, format, node),
    };
    if !protocol(take(&mut file, "driver").as_deref()) {
        return Err(no_path());
    }
    let Some(path) = take(&mut file, "filename") else { return Err(no_path()) };
    match file.keys().chain(rest.keys()).find(|key| !HARMLESS.contains(&key.as_str())) {
        Some(key) => Err(format!("its backing file `{name}` has the key `{key}`, which is not followed")),
        None => Ok(BackingName { path: path.into(), format }),
    }
}

/// Removes a member that is text.
fn take(members: &mut Map<String, Value>, key: &str) -> Option<String> {
    match members.remove(key) {
        Some(Value::String(text)) => Some(text),
        Some(other) => {
            members.insert(key.to_owned(), other);
            None
        }
        None => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_that_are_not_there_are_not_the_same() {
        let folder = tempfile::tempdir().unwrap();
        let (one, link, missing) =
            (folder.path().join("one"), folder.path().join("link"), folder.path().join("none"));
        std::fs::write(&one, "").unwrap();
        std::os::unix::fs::symlink(&one, &link).unwrap();
        assert!(are_same_file(&one, &link));
        assert!(!are_same_file(&one, &missing) && !are_same_file(&missing, &missing));
    }

    #[test]
    fn names_of_backing_files() {
        let name = |path: &str, format: Option<&str>| {
            Ok(BackingName { path: path.into(), format: format.map(str::to_owned) })
        };
        for (text, path, format) in [
            ("a: b.img", "a: b.img", None),
            (r#"json:{"driver":"qcow2","file":{"driver":"file","filename":"/d/b"}}"#, "/d/b", Some("qcow2")),
            (r#"json:{"file":{"filename":"b"},"driver":"raw"}"#, "b", Some("raw")),
            (r#"json:{"file.driver":"file","file.filename":"b"}"#, "b", None),
            (r#"json:{"driver":"file","filename":"b"}"#, "b", None),
            (r#"json:{"filename":"b"}"#, "b", None),
            (
                r#"json:{"driver":"qcow2","node-name":"n","file":{"driver":"host_device","filename":"/dev/x","locking":"off"}}"#,
                "/dev/x",
                Some("qcow2"),
            ),
        ] {
            assert_eq!(parse_backing(text.as_ref()), name(path, format), "{text}");
        }
        for (text, word) in [
            ("json:", "only paths"),
            ("json:[]", "only paths"),
            (r#"json:{"driver":"null-co"}"#, "only paths"),
            (r#"json:{"driver":"qcow2","filename":"b"}"#, "only paths"),
            (r#"json:{"driver":"raw","file":{"driver":"nbd","filename":"b"}}"#, "only paths"),
            (r#"json:{"driver":"raw","file":{"driver":7,"filename":"b"}}"#, "`driver`"),
            (r#"json:{"driver":"raw","offset":512,"file":{"driver":"file","filename":"b"}}"#, "`offset`"),
            (r#"json:{"driver":"qcow2","file":{"filename":"b"},"backing":null}"#, "`backing`"),
        ] {
            let error = parse_backing(text.as_ref()).unwrap_err();
            assert!(error.contains(word), "{text}: {error}");
        }
    }
}
