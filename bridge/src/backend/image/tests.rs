//! Tests of images on disks that lose power. `qemu-img` judges what is left.

mod crash;
mod flush;
mod guard;
mod reuse;
mod zeroes;

use std::path::Path;
use std::process::Command;

use super::*;

/// Runs a test on a runtime like a worker's.
fn block_on<T>(test: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build_local(tokio::runtime::LocalOptions::default())
        .unwrap();
    runtime.block_on(test)
}

/// Whether `qemu-img` is there; said aloud where it is not.
fn has_qemu_img(test: &str) -> bool {
    let found =
        Command::new("qemu-img").arg("--version").output().is_ok_and(|output| output.status.success());
    if !found {
        eprintln!("SKIP: {test}: no qemu-img");
    }
    found
}

fn qemu_img(args: &[&str]) -> std::process::Output {
    Command::new("qemu-img").args(args).output().unwrap()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}
