//! `nbdbridge devices`: what is attached on this host, as a table.

use std::io::{self, Write};

use anyhow::Result;

use crate::attachment::Attachment;
use crate::cli::DevicesArgs;
use crate::{size, ublk};

/// The table's head, and each row's cells.
pub(crate) type Row = [String; COLUMNS];

const COLUMNS: usize = 7;

/// Prints what `args` ask for: the table, unless it is something else about ublk.
///
/// # Errors
/// Standard output's, but for a reader that has enough; what ublk is asked and cannot tell.
pub(crate) fn run(args: &DevicesArgs) -> Result<()> {
    let text = match &args.owner {
        Some(device) => ublk::owner(device)?,
        None if args.features => ublk::features()?,
        None => {
            let head = ["PATH", "DOOR", "SIZE", "STATE", "PID", "RECOVERABLE", "SOURCE"].map(str::to_owned);
            let mut rows: Vec<Row> = vec![head];
            rows.extend(ublk::devices()?);
            rows.extend(Attachment::all().iter().map(|(attachment, _)| row(attachment)));
            if rows.len() == 1 {
                eprintln!("nothing is attached");
                return Ok(());
            }
            table(&rows)
        }
    };
    match io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(()),
    }
}

fn row(attachment: &Attachment) -> Row {
    let path = attachment.device.as_ref().unwrap_or(&attachment.file);
    let state = match (attachment.is_alive(), attachment.read_only) {
        (false, _) => "dead",
        (true, true) => "read-only",
        (true, false) => "serving",
    };
    [
        path.display().to_string(),
        if attachment.device.is_some() { "loop" } else { "fuse" }.to_owned(),
        size::human(attachment.size),
        state.to_owned(),
        attachment.pid.to_string(),
        "no".to_owned(),
        attachment.source.clone(),
    ]
}

/// Columns as wide as their widest cell; the last one ends where it ends.
fn table(rows: &[Row]) -> String {
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..COLUMNS - 1).map(width).collect();
    let mut text = String::new();
    for row in rows {
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
