//! Programs of others that tests need.

use std::process::{Command, Output};

/// Skips the test that calls it where a program is not there.
macro_rules! need {
    ($test:literal, $($tool:literal),+) => {
        for tool in [$($tool),+] {
            if std::process::Command::new(tool).arg("--version").output().is_err() {
                eprintln!("SKIP: {}: no {tool} here", $test);
                return;
            }
        }
    };
}
pub(crate) use need;

pub(crate) fn try_run(program: &str, args: &[&str]) -> Output {
    // Nothing of this takes a minute; a tool that waits for ever fails its test.
    Command::new("timeout").args(["-k", "1", "60", program]).args(args).output().unwrap()
}

/// Runs what must succeed, and gives what it printed.
pub(crate) fn run(program: &str, args: &[&str]) -> String {
    let output = try_run(program, args);
    assert!(output.status.success(), "{program} {args:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}
