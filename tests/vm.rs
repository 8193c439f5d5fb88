//! What needs a kernel with ublk and nbd, on two of Debian's kernels in QEMU: tests/vm/suite, which see. Without QEMU or
//! the kernels' packages (no Debian, no network at the first run) it is skipped.
//!
//! The program under test is that of this build, or NBDBRIDGE_VM_PROGRAM: contrib/test gives the release build.

// Clippy's exception for tests does not reach their helpers.
#![allow(clippy::unwrap_used)]

use std::process::Command;
use std::sync::{Mutex, PoisonError};

/// Machines at the same time would take each other's cores.
static ONE_MACHINE: Mutex<()> = Mutex::new(());

#[test]
fn all_on_linux_6_12() {
    suite("all_on_linux_6_12", &["--kernel", "6.12"], &[]);
}

#[test]
fn with_little_memory() {
    suite("with_little_memory", &["--memory", "256M", "--disk", "1G"], &["little_memory"]);
}

/// A driver that never answers ADD_DEV, as that of Linux 6.18.4: its function is made to fail.
#[test]
fn with_a_kernel_that_does_not_make_devices() {
    suite("with_a_kernel_that_does_not_make_devices", &["--kernel", "new"], &["silent_add"]);
}

/// What depends on the kernel's features, which this one has more of.
#[test]
fn on_a_newer_kernel() {
    let names = [
        "verify",
        "discard",
        "recover",
        "qcow2_without_journal",
        "last_flush",
        "supervis",
        "no_successor",
        "odd_io",
        "partition_scan",
        "attach",
        "resize",
        "large_reads",
        "volume_grow",
        "library",
    ];
    suite("on_a_newer_kernel", &["--kernel", "new"], &names);
}

/// Runs the named tests of the suite, all of them where none is named, in a machine made by these words.
fn suite(test: &str, machine: &[&str], names: &[&str]) {
    let _one = ONE_MACHINE.lock().unwrap_or_else(PoisonError::into_inner);
    let folder = env!("CARGO_MANIFEST_DIR");
    let prepared = Command::new("tests/vm/prepare").current_dir(folder).output().unwrap();
    if !prepared.status.success() {
        let said = String::from_utf8_lossy(&prepared.stderr);
        eprintln!("SKIP: {test}: {}", said.lines().last().unwrap_or("tests/vm/prepare failed"));
        return;
    }
    let program = std::env::var("NBDBRIDGE_VM_PROGRAM").unwrap_or(env!("CARGO_BIN_EXE_nbdbridge").into());
    let command = format!("tests/vm/suite {program} {}", names.join(" "));
    let output = Command::new("tests/vm/run")
        .args(["--timeout", "1000"])
        .args(machine)
        .arg(command)
        .current_dir(folder)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    // The one that is for a machine of its own is no news.
    said.lines().filter(|line| !line.starts_with("SKIP: little_memory")).for_each(|line| println!("{line}"));
    let passed = said.lines().filter(|line| line.starts_with("ok ")).count();
    let status = output.status;
    assert!(status.success(), "{status}\n{said}\n{}", String::from_utf8_lossy(&output.stderr));
    assert!(passed > 0, "nothing was tested:\n{said}");
}
