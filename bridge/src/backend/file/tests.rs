//! Tests of the file backend on real files: tmpfs, the disk's file system, loop devices.

mod data;

use std::path::{Path, PathBuf};

use super::*;

/// A folder in memory.
pub(super) fn memory() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").unwrap()
}

/// A folder on the disk's file system.
pub(super) fn disk() -> tempfile::TempDir {
    tempfile::tempdir_in("/var/tmp").unwrap()
}

/// A new image of `size` bytes.
pub(super) fn image(folder: &tempfile::TempDir, size: u64) -> PathBuf {
    let path = folder.path().join("image");
    create(&path, size).unwrap();
    path
}

pub(super) fn open(path: &Path, options: &FileOptions) -> FileBackend {
    FileBackend::open(path, options).unwrap()
}

/// Runs a test on a runtime like a worker's.
pub(super) fn block_on<T>(test: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(16)
        .build_local(tokio::runtime::LocalOptions::default())
        .unwrap();
    runtime.block_on(test)
}
