//! The exits for words: everything that this program writes to stdout and stderr leaves through here.
//!
//! | exit | for | control characters |
//! |---|---|---|
//! | [`text`] | results for people | escaped |
//! | [`json`] | JSON | escaped as JSON has it |
//! | [`data`] | other text for programs | as they are |
//! | [`places`], [`result`] | where something is found that a command has made, for scripts | escaped on a terminal alone |
//! | [`note`] | lines on stderr | escaped |
//! | `log` | log lines on stderr | escaped |
//!
//! Names inside images, names of processes and answers of other servers may hold escapes for a terminal; they need no care
//! elsewhere. A line on stderr that cannot be written is counted and dropped: it ends no process and blocks none.

#![allow(clippy::disallowed_methods)] // the one place that may name the standard streams

mod log;
mod stderr;

use std::ffi::{OsStr, OsString};
use std::io::{self, IsTerminal, Write};
use std::os::unix::ffi::OsStrExt;

use anyhow::{Context, Result};

pub(crate) use log::Log;

/// What failed where stdout cannot be written.
const CANNOT: &str = "cannot write to standard output";

/// Writes text for people to stdout; a reader that has enough (`| head`) is no failure.
///
/// # Errors
/// Standard output's.
pub(crate) fn text(text: &str) -> Result<()> {
    data(escape(text, |c| c == '\n'))
}

/// Writes JSON to stdout; a reader that has enough is no failure. Programs read what was there before it was escaped.
///
/// # Errors
/// Standard output's.
pub(crate) fn json(text: &str) -> Result<()> {
    data(escape_json(text))
}

/// Writes text for programs to stdout, as it is; a reader that has enough is no failure.
///
/// # Errors
/// Standard output's.
pub(crate) fn data(text: impl AsRef<[u8]>) -> Result<()> {
    match put(text.as_ref()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error).context(CANNOT),
        _ => Ok(()),
    }
}

/// Writes text for programs to stdout without which the work of the command is of no use: a closed pipe is a failure.
///
/// # Errors
/// Standard output's.
pub(crate) fn result(text: impl AsRef<[u8]>) -> Result<()> {
    put(text.as_ref()).context(CANNOT)
}

/// Writes the places of what a command has made to stdout, a line each, for a script byte by byte.
///
/// # Errors
/// Standard output's, as for [`result`].
pub(crate) fn places(places: &[OsString]) -> Result<()> {
    let lines: Vec<Vec<u8>> = places.iter().map(|place| line_for_scripts(place)).collect();
    result(lines.concat())
}

fn put(text: &[u8]) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text).and_then(|()| out.flush())
}

fn line_for_scripts(place: &OsStr) -> Vec<u8> {
    let mut line = if io::stdout().is_terminal() {
        plain(&place.to_string_lossy()).into_bytes()
    } else {
        place.as_bytes().to_owned()
    };
    line.push(b'\n');
    line
}

/// Writes a line to stderr.
pub(crate) fn note(line: &str) {
    stderr::note(&plain(line));
}

/// Shows progress on a terminal, in place of what was shown before: "" for none.
pub(crate) fn progress(line: &str) {
    // A terminal that is gone is no reason to stop.
    let _ = write!(io::stderr(), "\r{}\x1b[K", plain(line));
}

/// Returns whether stderr is a terminal.
pub(crate) fn stderr_is_terminal() -> bool {
    io::stderr().is_terminal()
}

/// Writes out what is left in stdout's buffer.
pub(crate) fn flush() {
    let _ = io::stdout().flush();
}

/// Returns one line, or a part of one, with every character escaped that a terminal would act on.
pub(crate) fn plain(text: &str) -> String {
    escape(text, |_| false)
}

/// Escapes control characters, line breaks among them, and those that change the direction of text, except where `keep`
/// says so.
fn escape(text: &str, keep: impl Fn(char) -> bool) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        if acts(c) && !keep(c) {
            escaped.extend(c.escape_default());
        } else {
            escaped.push(c);
        }
    }
    escaped
}

/// Escapes in JSON what a terminal acts on. Such characters are within strings, but for the blanks between tokens.
pub(crate) fn escape_json(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        if acts(c) && c != '\n' {
            for unit in c.encode_utf16(&mut [0; 2]) {
                // Writing to a string does not fail.
                let _ = std::fmt::Write::write_fmt(&mut escaped, format_args!("\\u{unit:04x}"));
            }
        } else {
            escaped.push(c);
        }
    }
    escaped
}

/// Returns true for control characters, and for characters that show nothing and change how text is shown.
fn acts(c: char) -> bool {
    c.is_control()
        || matches!(
            c,
            '\u{61c}'
                | '\u{200b}'..='\u{200f}'
                | '\u{2028}'..='\u{202e}'
                | '\u{2060}'..='\u{206f}'
                | '\u{feff}'
                | '\u{e0000}'..='\u{e007f}'
        )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_terminal_acts_on_is_escaped() {
        assert_eq!(
            plain("a\x1b[2Jb\r\n\u{9b}31m\u{202e}\x7f"),
            "a\\u{1b}[2Jb\\r\\n\\u{9b}31m\\u{202e}\\u{7f}"
        );
        assert_eq!(plain("Grüße, C:\\x {} \u{1f600}"), "Grüße, C:\\x {} \u{1f600}");
        assert_eq!(escape("a\x1bb\nc\n", |c| c == '\n'), "a\\u{1b}b\nc\n");
    }

    #[test]
    fn json_stays_what_it_is() {
        let text = "a\x1b\u{9b}31m\u{202e}\x7f\u{e0041}\n\t\"\\é\u{1f600}";
        let document = serde_json::json!({ text: [text] });
        let escaped = escape_json(&serde_json::to_string_pretty(&document).unwrap());
        assert!(!escaped.chars().any(|c| acts(c) && c != '\n'), "{escaped}");
        assert!(escaped.contains("\\u009b") && escaped.contains("\\udb40\\udc41") && escaped.contains('é'));
        assert_eq!(serde_json::from_str::<serde_json::Value>(&escaped).unwrap(), document);
    }
}
