//! Paths whose names are not UTF-8, through every command: a path is bytes.

// Clippy's exception for tests does not reach their helpers.
#![allow(clippy::unwrap_used)]

mod support;

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::{Value, json};
use support::{CONTROL_FOLDER, PROGRAM, Server, net, one_line};
use tempfile::TempDir;

/// A folder with a name that is not UTF-8, and an image of 1 MiB in it.
struct Odd {
    folder: TempDir,
}

impl Odd {
    fn new() -> Odd {
        let odd = Odd { folder: tempfile::tempdir().unwrap() };
        fs::create_dir(odd.path("")).unwrap();
        fs::File::create(odd.path("i\u{fe}")).unwrap().set_len(1 << 20).unwrap();
        odd
    }

    /// A name in the folder; each `\u{fe}` becomes a byte that is not UTF-8.
    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(bytes("d\u{fe}")).join(bytes(name))
    }

    fn image(&self) -> PathBuf {
        self.path("i\u{fe}")
    }

    fn run(&self, words: &[&dyn AsRef<OsStr>]) -> Output {
        let mut command = Command::new(PROGRAM);
        command.args(words).current_dir(self.folder.path());
        command.env(CONTROL_FOLDER, self.folder.path().join("control")).output().unwrap()
    }

    /// JSON that a command prints which must succeed.
    fn json(&self, words: &[&dyn AsRef<OsStr>]) -> Value {
        let output = self.run(words);
        assert!(output.status.success(), "{output:?}");
        serde_json::from_slice(&output.stdout).unwrap()
    }
}

fn bytes(text: &str) -> OsString {
    let mut bytes = Vec::new();
    for c in text.chars() {
        match c {
            '\u{fe}' => bytes.push(0xff),
            c => bytes.extend(c.to_string().bytes()),
        }
    }
    OsStr::from_bytes(&bytes).to_owned()
}

/// A path as it stands in JSON.
fn in_json(path: &Path) -> Value {
    json!(path.as_os_str().as_bytes())
}

#[test]
fn a_server_is_found_by_a_path_that_is_not_utf8() {
    let odd = Odd::new();
    let (image, socket, pid_file) = (odd.image(), odd.path("s\u{fe}"), odd.path("p\u{fe}"));
    let words: [&OsStr; 5] =
        ["-k".as_ref(), socket.as_os_str(), "--pid-file".as_ref(), pid_file.as_os_str(), image.as_os_str()];
    let mut command = net(&words);
    command.env(CONTROL_FOLDER, odd.folder.path().join("control"));
    let server = Server::start(&mut command, 1);
    assert_eq!(fs::read_to_string(&pid_file).unwrap().trim(), server.id().to_string());
    // The URI is plain text, and leads there.
    let uri = &server.lines[0];
    assert!(uri.is_ascii() && uri.contains("d%FF/s%FF"), "{uri}");
    let info = odd.json(&[&"info", &"--json", uri]);
    assert_eq!(info["exports"][0]["size"], 1 << 20, "{info}");
    let ps = odd.json(&[&"ps", &"--json"]);
    assert_eq!(ps[0]["exports"][0]["source"], in_json(&image), "{ps}");
    assert_eq!(ps[0]["doors"][0]["places"][0]["at"], json!(uri), "{ps}");
    // By its path, in full or from here.
    let from_here = Path::new(&bytes("d\u{fe}")).join(bytes("i\u{fe}"));
    let grown = odd.json(&[&"resize", &"--json", &image, &"2M"]);
    assert_eq!(grown["size"], 2 << 20);
    let limited = odd.json(&[&"throttle", &"--json", &from_here, &"iops-total=7"]);
    assert_eq!(limited["limits"]["iops-total"], 7);
    assert_eq!(odd.json(&[&"stats", &"--json", &from_here]).as_array().unwrap().len(), 1);
    // Another name, as lossy text shows it, is not the same.
    let line = one_line(&odd.run(&[&"stats", &image.to_string_lossy().as_ref()]));
    assert!(line.contains("no export"), "{line}");
}

/// Skips aloud where there is no FUSE or no loop device.
fn lacks(test: &str, device: &str) -> bool {
    let lacks = !rustix::process::geteuid().is_root() || !Path::new(device).exists();
    if lacks {
        eprintln!("SKIP: {test}: needs root and {device}");
    }
    lacks
}

/// The row of `devices --json` with this path or source.
fn row(odd: &Odd, key: &str, path: &Path) -> Option<Value> {
    let rows = odd.json(&[&"devices", &"--json"]);
    rows.as_array().unwrap().iter().find(|row| row[key] == in_json(path)).cloned()
}

#[test]
fn a_mounted_file_is_printed_listed_and_detached() {
    if lacks("a_mounted_file_is_printed_listed_and_detached", "/dev/fuse") {
        return;
    }
    let odd = Odd::new();
    let (image, file) = (odd.image(), odd.path("m\u{fe}"));
    let made = odd.run(&[&"fuse", &"--fork", &image, &file]);
    assert!(made.status.success(), "{made:?}");
    assert_eq!(made.stdout, [file.as_os_str().as_bytes(), b"\n"].concat());
    let row_of = row(&odd, "path", &file).unwrap();
    assert_eq!(
        (&row_of["door"], &row_of["size"], &row_of["source"], &row_of["recoverable"]),
        (&json!("fuse"), &json!(1 << 20), &in_json(&image), &json!(false)),
        "{row_of}"
    );
    let grown = odd.json(&[&"resize", &"--json", &file, &"2M"]);
    assert_eq!(grown["size"], 2 << 20);
    let ended = odd.run(&[&"detach", &file]);
    assert!(ended.status.success(), "{ended:?}");
    assert!(!file.exists() && row(&odd, "path", &file).is_none());
}

#[test]
fn an_attached_image_is_detached() {
    if lacks("an_attached_image_is_detached", "/dev/loop-control") {
        return;
    }
    let odd = Odd::new();
    // Its size is no multiple of 512: a loop device has whole blocks.
    fs::File::options().write(true).open(odd.image()).unwrap().set_len((1 << 20) + 700).unwrap();
    let made = odd.run(&[&"attach", &"--door", &"fuse", &odd.image()]);
    assert!(made.status.success(), "{made:?}");
    let device = String::from_utf8(made.stdout).unwrap();
    let device = device.trim_end();
    let said = String::from_utf8_lossy(&made.stderr);
    assert!(said.contains("the last 188 bytes"), "{said}");
    let sectors = fs::read_to_string(format!("/sys/block/{}/size", &device[5..])).unwrap();
    assert_eq!(sectors.trim(), "2049");
    let row_of = row(&odd, "source", &odd.image()).unwrap();
    assert_eq!((&row_of["path"], &row_of["door"]), (&json!(device), &json!("loop")), "{row_of}");
    assert!(row_of["pid"].as_u64().is_some() && row_of["state"] == "serving", "{row_of}");
    let table = odd.run(&[&"devices"]);
    assert!(String::from_utf8_lossy(&table.stdout).contains(device), "{table:?}");
    let ended = odd.run(&[&"detach", &device]);
    assert!(ended.status.success(), "{ended:?}");
    assert!(row(&odd, "source", &odd.image()).is_none());
    // Nothing holds the image any more.
    let again = odd.json(&[&"info", &"--json", &odd.image()]);
    assert_eq!(again["size"], (1 << 20) + 700);
}

#[test]
fn a_volume_is_mounted_where_the_path_is_not_utf8() {
    if lacks("a_volume_is_mounted_where_the_path_is_not_utf8", "/dev/loop-control") {
        return;
    }
    let odd = Odd::new();
    let (pool, root) = (odd.path("pool\u{fe}"), odd.path("mnt\u{fe}"));
    let volume = |words: &[&dyn AsRef<OsStr>]| {
        let mut all: Vec<&dyn AsRef<OsStr>> = vec![&"volume", &words[0], &"--pool", &pool];
        all.extend([&"--mount-root" as &dyn AsRef<OsStr>, &root]);
        all.extend(&words[1..]);
        odd.run(&all)
    };
    fs::create_dir(&root).unwrap();
    let made = volume(&[&"create", &"a", &"-o", &"size=32M"]);
    assert!(made.status.success(), "{made:?}");
    let mounted = volume(&[&"mount", &"a"]);
    assert!(mounted.status.success(), "{mounted:?}");
    let at = fs::canonicalize(&root).unwrap().join("a");
    assert_eq!(mounted.stdout, [at.as_os_str().as_bytes(), b"\n"].concat());
    let inspected: Value = serde_json::from_slice(&volume(&[&"inspect", &"a", &"--json"]).stdout).unwrap();
    assert_eq!(inspected[0]["mounted"], in_json(&at), "{inspected}");
    for words in [&[&"umount" as &dyn AsRef<OsStr>, &"a"][..], &[&"rm", &"a"]] {
        let ended = volume(words);
        assert!(ended.status.success(), "{ended:?}");
    }
    assert!(row(&odd, "source", &pool.join("a/disk.raw")).is_none());
}

#[test]
fn images_and_what_is_told_of_them() {
    let odd = Odd::new();
    let (base, top) = (odd.path("base\u{fe}"), odd.path("top"));
    let made = odd.run(&[&"create", &"-f", &"qcow2", &base, &"1M"]);
    assert!(made.status.success(), "{made:?}");
    let told = odd.json(&[&"info", &"--json", &base]);
    assert_eq!((&told["source"], &told["format"]), (&in_json(&base), &json!("qcow2")));
    // Only the folder's name is not UTF-8: an image can name what is beside it.
    fs::rename(&base, odd.path("base")).unwrap();
    let made = odd.run(&[&"create", &"-f", &"qcow2", &"-b", &"base", &"-F", &"qcow2", &top]);
    assert!(made.status.success(), "{made:?}");
    let told = odd.json(&[&"info", &"--json", &top]);
    let mut backing = odd.path("base").into_os_string();
    backing.push(" (qcow2)");
    assert_eq!(told["backing-chain"][0], json!(backing.as_bytes()), "{told}");
}

#[test]
fn names_in_the_protocol_are_utf8_and_that_is_said() {
    let odd = Odd::new();
    let (name, image) = (bytes("n\u{fe}"), odd.image());
    let export = [name.as_bytes(), b"=", image.as_os_str().as_bytes()].concat();
    let by_option: [&[&dyn AsRef<OsStr>]; 3] = [
        &[&"net", &"-x", &name, &image],
        &[&"net", &"-D", &name, &image],
        &[&"net", &"--export", &OsStr::from_bytes(&export)],
    ];
    for words in by_option {
        let refused = odd.run(words);
        let line = one_line(&refused);
        assert!(line.contains("n\u{fffd}") && line.contains("not UTF-8, and the NBD protocol"), "{line}");
        assert_eq!(refused.status.code(), Some(2));
    }
    let line = one_line(&odd.run(&[&"net", &"--size", &name, &image]));
    assert!(line.contains("is not UTF-8; only paths"), "{line}");
}

#[test]
fn a_pool_with_a_name_that_is_not_utf8() {
    let odd = Odd::new();
    let pool = odd.path("pool\u{fe}");
    let volume = |words: &[&dyn AsRef<OsStr>]| {
        let mut all: Vec<&dyn AsRef<OsStr>> = vec![&"volume", &words[0], &"--pool", &pool, &"--json"];
        all.extend(&words[1..]);
        odd.json(&all)
    };
    volume(&[&"create", &"a", &"-o", &"size=32M", &"-o", &"fs=none"]);
    assert_eq!(volume(&[&"pool"])["pool"], in_json(&fs::canonicalize(&pool).unwrap()));
    assert_eq!(volume(&[&"ls"])[0]["name"], "a");
    volume(&[&"rm", &"a"]);
}
