//! The bindings of libublk, which are made beforehand, are those that its crate's own build makes. Without libclang or the
//! registry that cannot be told.

// Clippy's exception for tests does not reach their helpers.
#![allow(clippy::unwrap_used)]

use std::process::Command;

#[test]
fn the_bindings_are_those_of_the_bundled_header() {
    let folder = env!("CARGO_MANIFEST_DIR");
    let compared =
        Command::new("contrib/libublk-bindings").arg("--check").current_dir(folder).output().unwrap();
    let said = String::from_utf8_lossy(&compared.stdout);
    match compared.status.code() {
        Some(77) => {
            let why = said.lines().last().unwrap_or_default();
            eprintln!("SKIP: the_bindings_are_those_of_the_bundled_header: {why}");
        }
        code => assert_eq!(code, Some(0), "{said}{}", String::from_utf8_lossy(&compared.stderr)),
    }
}
