//! `contrib/bench` as a program: its figures are whole, what fails is said and fails the run, and Ctrl-C leaves nothing
//! behind. What the figures say is no matter here.

// Clippy's exception for tests does not reach their helpers.
#![allow(clippy::unwrap_used)]

mod support;

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use support::{PROGRAM, text};

/// A short run in a folder of its own, of nbdbridge alone; None, said aloud, where the clients are missing.
fn bench(test: &str, folder: &Path, program: &str, flags: &[&str]) -> Option<Command> {
    for tool in ["python3", "fio", "nbdcopy"] {
        if Command::new(tool).arg("--version").output().is_err() {
            eprintln!("SKIP: {test}: no {tool} here");
            return None;
        }
    }
    let mut command = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/contrib/bench"));
    command.args(["--no-apt", "--quick", "--size", "16", "--server", "nbdbridge", "--storage", "tmpfs"]);
    command.args(["--tmpfs-folder", text(folder), "--program", program]).args(flags);
    Some(command)
}

/// An nbdbridge whose reads fail.
fn broken_program(folder: &Path) -> std::path::PathBuf {
    let path = folder.join("nbdbridge");
    let script = format!(
        "#!/bin/sh\n[ \"$1\" != net ] || set -- \"$@\" --fault op=read,errno=EIO,error-every=1\nexec {PROGRAM} \"$@\"\n"
    );
    fs::write(&path, script).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

#[test]
fn the_figures_are_whole() {
    let (images, results) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let file = |name| results.path().join(name);
    let (json, svg, markdown) = (file("figures.json"), file("chart.svg"), file("tables.md"));
    let flags =
        ["--cell", "4k mixed QD1 x4", "--cell", "copy full", "--json", text(&json), "--svg", text(&svg)];
    let Some(mut command) = bench("the_figures_are_whole", images.path(), PROGRAM, &flags) else { return };
    let output = command.args(["--markdown", text(&markdown)]).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let figures = fs::read_to_string(json).unwrap();
    for known in ["rate", "server_cpu_us", "total_cpu_us", "peak_kib"] {
        assert_eq!(figures.matches(&format!("\"{known}\": ")).count(), 4, "{known}: {figures}");
        assert!(!figures.contains(&format!("\"{known}\": null")), "{known}: {figures}");
    }
    // Latencies of fio's cell, once as its round and once as the median.
    assert_eq!(figures.matches("\"p999_us\": null").count(), 2, "{figures}");
    for cell in ["4k mixed QD1 x4", "copy full"] {
        assert!(fs::read_to_string(&markdown).unwrap().contains(&format!("| {cell} |")));
    }
    assert!(fs::read_to_string(svg).unwrap().ends_with("</svg>\n"));
    assert_eq!(fs::read_dir(images.path()).unwrap().count(), 0);
}

#[test]
fn an_error_of_a_client_fails_the_run_by_name() {
    let (images, programs) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let program = broken_program(programs.path());
    let flags = ["--cell", "4k read QD1", "--cell", "4k write QD32", "--cell", "copy full"];
    let test = "an_error_of_a_client_fails_the_run_by_name";
    let Some(mut command) = bench(test, images.path(), text(&program), &flags) else { return };
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let said = String::from_utf8_lossy(&output.stdout);
    let failed: Vec<_> = said.lines().filter(|line| line.starts_with("- FAILED: ")).collect();
    // Writes went well: they are measured all the same.
    assert_eq!(failed.len(), 2, "{said}");
    assert!(failed[0].contains("4k read QD1: nbdbridge: fio"), "{said}");
    assert!(failed[1].contains("copy full: nbdbridge: nbdcopy"), "{said}");
    assert_eq!(fs::read_dir(images.path()).unwrap().count(), 0);
}

#[test]
fn an_interrupt_leaves_nothing_behind() {
    let images = tempfile::tempdir().unwrap();
    let test = "an_interrupt_leaves_nothing_behind";
    let flags = ["--cell", "4k read QD1", "--seconds", "1", "--rounds", "100"];
    let Some(mut command) = bench(test, images.path(), PROGRAM, &flags) else { return };
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    // The second run has begun, or is about to.
    assert!(lines.any(|line| line.unwrap().contains("round 1 of 100")));
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stdout).contains("4k read QD1"), "what was measured is shown");
    assert_eq!(fs::read_dir(images.path()).unwrap().count(), 0);
    // No server is left: its command line names the image in our folder.
    let servers =
        fs::read_dir("/proc").unwrap().filter_map(|entry| fs::read(entry.ok()?.path().join("cmdline")).ok());
    let ours = text(images.path()).as_bytes();
    assert_eq!(servers.filter(|line| line.windows(ours.len()).any(|part| part == ours)).count(), 0);
}
