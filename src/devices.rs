//! `nbdbridge devices`: what is attached on this host, as a table.

use std::io::{self, Write};

use anyhow::Result;

use crate::attachment::Attachment;
use crate::size;

/// The table's head, and each row's cells.
type Row = [String; 6];

/// Prints the table.
///
/// # Errors
/// Standard output's, but for a reader that has enough.
pub(crate) fn run() -> Result<()> {
    let mut rows: Vec<Row> = vec![["PATH", "DOOR", "SIZE", "STATE", "PID", "SOURCE"].map(str::to_owned)];
    rows.extend(Attachment::all().iter().map(|(attachment, _)| row(attachment)));
    if rows.len() == 1 {
        eprintln!("nothing is attached");
        return Ok(());
    }
    match io::stdout().write_all(table(&rows).as_bytes()) {
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
        attachment.source.clone(),
    ]
}

/// Columns as wide as their widest cell; the last one ends where it ends.
fn table(rows: &[Row]) -> String {
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..5).map(width).collect();
    let mut text = String::new();
    for row in rows {
        for (cell, width) in row.iter().zip(&widths) {
            text.push_str(&format!("{cell:<width$}  "));
        }
        text.push_str(&row[5]);
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let rows = [["PATH", "A", "B", "C", "D", "SOURCE"], ["/tmp/x", "1", "2", "3", "4", "a b"]];
        let text = table(&rows.map(|row| row.map(str::to_owned)));
        assert_eq!(text, "PATH    A  B  C  D  SOURCE\n/tmp/x  1  2  3  4  a b\n");
    }
}
