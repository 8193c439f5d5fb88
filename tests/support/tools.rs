//! The tools that people have, run by tests.

use std::path::Path;
use std::process::{Command, Stdio};

use super::{net, one_line, text};

/// Says that a test is skipped; true where one of the tools is missing.
pub(crate) fn lacks(test: &str, tools: &[&str]) -> bool {
    let missing = tools.iter().find(|tool| {
        Command::new(tool).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_err()
    });
    if let Some(tool) = missing {
        eprintln!("SKIP: {test}: no {tool} here");
    }
    missing.is_some()
}

/// Runs a tool that must succeed, and gives what it said.
pub(crate) fn run(tool: &str, args: &[&str]) -> String {
    let output = Command::new(tool).args(args).output().unwrap();
    assert!(output.status.success(), "{tool} {args:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// The refusal of a server that must not start.
pub(crate) fn refusal(args: &[&str]) -> String {
    let output = net(args).args(["-k", "/nonexistent/sock"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    one_line(&output)
}

/// A loop device, until it is dropped.
pub(crate) struct Loop(pub(crate) String);

impl Loop {
    /// Over a file; None where there are no such devices.
    pub(crate) fn new(path: &Path, args: &[&str]) -> Option<Loop> {
        let output =
            Command::new("losetup").args(["-f", "--show"]).args(args).arg(text(path)).output().ok()?;
        let name = String::from_utf8(output.stdout).ok()?.trim().to_owned();
        (output.status.success() && Path::new(&name).exists()).then_some(Loop(name))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["-d", &self.0]).status();
    }
}
