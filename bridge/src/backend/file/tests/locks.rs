//! Image locks, against ourselves and against qemu's own programs.

use super::*;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Stdio};

fn reading() -> FileOptions {
    FileOptions { read_only: true, ..FileOptions::default() }
}

fn locked(path: &Path, options: &FileOptions) -> String {
    match FileBackend::open(path, options) {
        Err(error @ OpenError::Locked { .. }) => error.to_string(),
        other => panic!("{other:?}"),
    }
}

/// Refused for what this process itself has open.
fn open_here(path: &Path, options: &FileOptions) {
    assert!(matches!(FileBackend::open(path, options), Err(OpenError::Twice(_))));
}

#[test]
fn writers_keep_everybody_off_and_readers_share() {
    for folder in [memory(), disk()] {
        let path = image(&folder, 4096);
        let writer = open(&path, &FileOptions::default());
        open_here(&path, &FileOptions::default());
        open_here(&path, &reading());
        open(&path, &FileOptions { lock: false, ..FileOptions::default() });
        drop(writer);
        let reader = open(&path, &reading());
        let second = open(&path, &reading());
        open_here(&path, &FileOptions::default());
        drop((reader, second));
        open(&path, &FileOptions { cache: CacheMode::DirectSync, ..FileOptions::default() });
        open(&path, &FileOptions::default());
    }
}

/// A qemu-io that has the image open until it is dropped.
struct QemuIo(Child);

impl QemuIo {
    fn open(path: &Path, read_only: bool) -> Option<Self> {
        let mut command = Command::new("qemu-io");
        if read_only {
            command.arg("-r");
        }
        command.args(["-f", "raw"]).arg(path).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = match command.spawn() {
            Ok(child) => child,
            Err(error) => {
                eprintln!("SKIP qemu-io: {error}");
                return None;
            }
        };
        // It answers when it has opened the image.
        child.stdin.as_mut().unwrap().write_all(b"length\n").unwrap();
        let mut answers = BufReader::new(child.stdout.take().unwrap()).lines();
        assert!(answers.any(|line| line.unwrap().contains("KiB")), "qemu-io did not open the image");
        Some(QemuIo(child))
    }
}

impl Drop for QemuIo {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}

/// Whether a program of qemu's succeeds, and what it says.
fn qemu(name: &str, args: &[&str]) -> Option<(bool, String)> {
    let output = program(name, args)?;
    Some((output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned()))
}

#[test]
fn qemu_and_we_keep_off_each_other() {
    let folder = disk();
    let path = image(&folder, 64 << 10);
    let name = path.to_str().unwrap();
    let write = ["-f", "raw", "-c", "write 0 512", name];
    let read = ["-r", "-f", "raw", "-c", "read 0 512", name];

    let writer = open(&path, &FileOptions::default());
    let Some((done, said)) = qemu("qemu-io", &write) else { return };
    assert!(!done && said.contains("lock"), "our writer, its writer: {said}");
    let (_, said) = qemu("qemu-img", &["compare", "-U", "-f", "raw", "-F", "raw", name, name]).unwrap();
    assert_eq!(said, "");
    assert!(qemu("qemu-img", &["info", "-U", "-f", "raw", name]).unwrap().0);
    drop(writer);

    let reader = open(&path, &reading());
    assert!(qemu("qemu-io", &read).unwrap().0, "two readers");
    let (done, said) = qemu("qemu-io", &write).unwrap();
    assert!(!done && said.contains("\"write\" lock"), "our reader, its writer: {said}");
    drop(reader);
    soon(|| qemu("qemu-io", &write).unwrap().0.then_some(()));

    let theirs = QemuIo::open(&path, false).unwrap();
    let said = locked(&path, &FileOptions::default());
    assert!(said.contains("in use by another process (write lock refused)"), "{said}");
    assert!(locked(&path, &reading()).contains("serve with --no-lock"));
    open(&path, &FileOptions { lock: false, ..FileOptions::default() });
    drop(theirs);
    let theirs = QemuIo::open(&path, true).unwrap();
    open(&path, &reading());
    drop(theirs);
    open(&path, &FileOptions::default());
}

#[test]
fn devices_are_locked_too() {
    let folder = disk();
    let path = image(&folder, 1 << 20);
    let Some(device) = Loop::over(&path, &[]) else { return };
    let _writer = open(device.path(), &FileOptions::default());
    open_here(device.path(), &FileOptions::default());
    let Some((done, said)) = qemu("qemu-io", &["-f", "raw", "-c", "write 0 512", &device.0]) else { return };
    assert!(!done && said.contains("lock"), "{said}");
}
