//! `nbdbridge devices`: what is attached on this host, as a table.

use std::borrow::Cow;
use std::path::PathBuf;

use anyhow::Result;
use serde::Serialize;

use crate::attachment::{Attachment, is_stopped};
use crate::cli::DevicesArgs;
use crate::control::command::{json_text, loss_text};
use crate::control::served_by;
use crate::fuse::{self, Answer, Mounted};
use crate::os_text::OsText;
use crate::{output, size, ublk};

const COLUMNS: usize = 7;

/// The head of the table.
const HEAD: [&str; COLUMNS] = ["PATH", "DOOR", "SIZE", "STATE", "PID", "RECOVERABLE", "SOURCE"];

/// A device or file that is attached: a row of the table, or an element of the JSON array.
#[derive(Debug, Serialize)]
pub(crate) struct Row {
    pub(crate) path: OsText,
    /// The kind of device: `ublk`, `loop` or `fuse`.
    pub(crate) door: &'static str,
    /// In bytes; None where it is not known.
    pub(crate) size: Option<u64>,
    pub(crate) state: Cow<'static, str>,
    /// The process that serves it, where there is one.
    pub(crate) pid: Option<u32>,
    /// A successor may take the device over.
    pub(crate) recoverable: bool,
    /// Why writes that were answered and not flushed do not survive a crash of the process; None where they do, and where
    /// nobody tells.
    pub(crate) loss_after_crash: Option<String>,
    pub(crate) source: OsText,
}

/// Prints what `args` ask for: the table, unless it is something else about ublk.
///
/// # Errors
/// Standard output's, but for a reader that has enough; what ublk is asked and cannot tell.
pub(crate) fn run(args: &DevicesArgs) -> Result<()> {
    let text = match &args.owner {
        Some(device) => ublk::owner(device)?,
        None if args.features => ublk::features()?,
        None => {
            let (all, refused) = Attachment::all_believed();
            for line in refused {
                output::note(&format!("nbdbridge: {line}"));
            }
            let mut rows = ublk::devices()?;
            rows.extend(all.iter().map(|(attachment, _)| row(attachment)));
            rows.extend(unknown(&all));
            rows.iter_mut().for_each(Row::ask);
            if args.json {
                return output::json(&json_text(&rows)?);
            }
            if rows.is_empty() {
                output::note("nothing is attached");
                return Ok(());
            }
            let cells = rows.iter().map(Row::cells);
            let mut text = table(&std::iter::once(HEAD.map(str::to_owned)).chain(cells).collect::<Vec<_>>());
            for row in &rows {
                if let Some(reason) = &row.loss_after_crash {
                    let line = format!("{}: {}", row.path, loss_text(reason));
                    text.push_str(&format!("{}\n", output::plain(&line)));
                }
            }
            text
        }
    };
    output::text(&text)
}

impl Row {
    /// Asks the server, if there is one that can answer, what a crash would lose.
    fn ask(&mut self) {
        if let Some(pid) = self.pid.filter(|pid| !is_stopped(*pid)) {
            let served = served_by(pid).into_iter().find(|served| served.is_at(self.path.as_path()));
            self.loss_after_crash = served.and_then(|served| served.loss_after_crash);
        }
    }

    fn cells(&self) -> [String; COLUMNS] {
        let unknown = || "-".to_owned();
        [
            self.path.to_string(),
            self.door.to_owned(),
            self.size.map_or_else(unknown, size::human),
            self.state.to_string(),
            self.pid.map_or_else(unknown, |pid| pid.to_string()),
            if self.recoverable { "yes" } else { "no" }.to_owned(),
            self.source.to_string(),
        ]
    }
}

fn row(attachment: &Attachment) -> Row {
    let path = attachment.device.as_ref().unwrap_or(&attachment.file);
    Row {
        path: path.into(),
        door: if attachment.device.is_some() { "loop" } else { "fuse" },
        size: Some(attachment.size),
        state: state(attachment).into(),
        pid: Some(attachment.pid),
        recoverable: false,
        loss_after_crash: None,
        source: attachment.source.clone(),
    }
}

/// The state of an attachment in a word.
fn state(attachment: &Attachment) -> &'static str {
    if !attachment.is_alive() {
        return "dead";
    }
    if is_stopped(attachment.pid) {
        return "stopped";
    }
    let is_there = match &attachment.device {
        // The kernel knows the device by the file; where that was unmounted, the device is served all the same.
        Some(_) => !attachment.devices().is_empty(),
        None => attachment.is_mounted(),
    };
    match (is_there, attachment.read_only) {
        (true, true) => "read-only",
        (true, false) => "serving",
        (false, _) if attachment.number.is_none() => "starting",
        (false, _) if attachment.device.is_some() => "detached",
        // Whoever had it open goes on.
        (false, _) => "unmounted",
    }
}

/// Mounted files of which nothing is written down: those of other users, and of servers that could not write.
fn unknown(known: &[(Attachment, PathBuf)]) -> Vec<Row> {
    let mut mounts = Mounted::all().unwrap_or_default();
    mounts.retain(|mounted| {
        mounted.is_ours() && !known.iter().any(|(attachment, _)| attachment.file == mounted.point)
    });
    // All at once: each that does not answer takes its time.
    let answers: Vec<Answer> = std::thread::scope(|scope| {
        let asked: Vec<_> = mounts.iter().map(|mounted| scope.spawn(|| fuse::ask(&mounted.point))).collect();
        asked.into_iter().map(|asked| asked.join().unwrap_or(Answer::Silent)).collect()
    });
    let row = |(mounted, answer): (Mounted, Answer)| {
        let state = match answer {
            Answer::Lives => "serving",
            Answer::Dead => "dead",
            Answer::Silent => "silent",
        };
        Row {
            path: mounted.point.into(),
            door: "fuse",
            size: None,
            state: state.into(),
            pid: None,
            recoverable: false,
            loss_after_crash: None,
            source: mounted.source.into(),
        }
    };
    mounts.into_iter().zip(answers).map(row).collect()
}

/// Columns as wide as their widest cell; the last one ends where it ends.
fn table(rows: &[[String; COLUMNS]]) -> String {
    let rows: Vec<_> = rows.iter().map(|row| row.each_ref().map(|cell| output::plain(cell))).collect();
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..COLUMNS - 1).map(width).collect();
    let mut text = String::new();
    for row in &rows {
        for (cell, width) in row.iter().zip(&widths) {
            text.push_str(&format!("{cell:<width$}  "));
        }
        text.push_str(&row[COLUMNS - 1]);
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let rows = [["PATH", "A", "B", "C", "D", "E", "SOURCE"], ["/tmp/x", "1", "2", "3", "4", "5", "a b"]];
        let text = table(&rows.map(|row| row.map(str::to_owned)));
        assert_eq!(text, "PATH    A  B  C  D  E  SOURCE\n/tmp/x  1  2  3  4  5  a b\n");
    }
}
