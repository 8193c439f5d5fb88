//! Tests of the file backend on real files: tmpfs, the disk's file system, loop devices.

mod data;
mod direct;
mod fast;
mod locks;
mod opening;
mod zeroes;

use std::path::{Path, PathBuf};
use std::process::Command;

use super::*;
use crate::ErrorKind;

/// A folder in memory.
fn memory() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").unwrap()
}

/// A folder on the disk's file system.
fn disk() -> tempfile::TempDir {
    tempfile::tempdir_in("/var/tmp").unwrap()
}

/// A new image of `size` bytes.
fn image(folder: &tempfile::TempDir, size: u64) -> PathBuf {
    let path = folder.path().join("image");
    create(&path, size).unwrap();
    path
}

fn open(path: &Path, options: &FileOptions) -> FileBackend {
    soon(|| match FileBackend::open(path, options) {
        Err(OpenError::Locked { .. }) => None,
        other => Some(other.unwrap()),
    })
}

/// Waits a little for something to be there. A process that another test is just starting shares all descriptors
/// until it executes its program, and so keeps a lock that was given up.
fn soon<T>(mut attempt: impl FnMut() -> Option<T>) -> T {
    for _ in 0..200 {
        if let Some(found) = attempt() {
            return found;
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    panic!("it did not come to pass");
}

/// Runs a test on a runtime like a worker's.
fn block_on<T>(test: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(16)
        .build_local(tokio::runtime::LocalOptions::default())
        .unwrap();
    runtime.block_on(test)
}

async fn store(backend: &FileBackend, offset: u64, bytes: &[u8], flags: Flags) -> Result<()> {
    backend.write(offset, Buffer::copy_of(bytes), flags).await
}

async fn load(backend: &FileBackend, offset: u64, len: usize) -> Vec<u8> {
    // What the buffer holds before must not shine through.
    let mut buf = Buffer::new(len);
    buf.fill(0xee);
    backend.read(offset, buf, Flags::NONE).await.unwrap().to_vec()
}

/// Bytes that differ from their neighbours.
fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|n| u8::try_from(n % 251).unwrap_or(0) + 1).collect()
}

/// A program's success; None (said aloud) where it is not there.
fn program(name: &str, args: &[&str]) -> Option<std::process::Output> {
    match Command::new(name).args(args).output() {
        Ok(output) => Some(output),
        Err(error) => {
            eprintln!("SKIP {name}: {error}");
            None
        }
    }
}

/// A loop device over a file, detached when dropped.
struct Loop(String);

impl Loop {
    fn over(path: &Path, more: &[&str]) -> Option<Self> {
        let path = path.to_str().unwrap();
        let output = program("losetup", &[more, &["--find", "--show", path]].concat())?;
        if !output.status.success() {
            eprintln!("SKIP losetup: {}", String::from_utf8_lossy(&output.stderr).trim());
            return None;
        }
        Some(Loop(String::from_utf8_lossy(&output.stdout).trim().to_owned()))
    }

    fn path(&self) -> &Path {
        Path::new(&self.0)
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["--detach", &self.0]).status();
    }
}

/// Mounts that only the calling thread and its children see; false (said aloud) where that is not allowed.
fn mount(args: &[&str]) -> bool {
    if let Err(error) = crate::sys::own_mounts_on_this_thread() {
        eprintln!("SKIP mounts: {error}");
        return false;
    }
    let done = [["--make-rprivate", "/"].as_slice(), args]
        .iter()
        .all(|args| program("mount", args).is_some_and(|output| output.status.success()));
    if !done {
        eprintln!("SKIP mount {args:?}");
    }
    done
}
