//! The report of a server whose end lost data, for the process that asked it to end: its exit status is known to its parent
//! alone, and a background process has no log. The report is a file beside those of `attachment`; the command that ended
//! the server removes it. Reports that nobody has read are removed after some time.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use crate::attachment::{folder, started};
use crate::trust;

/// Names of these files begin with it.
const PREFIX: &str = "ended-";

/// A report that nobody has read for so long is removed by the next.
const KEEP: Duration = Duration::from_secs(24 * 3600);

/// Says that this process, which is about to end, could not make all data durable. Where that cannot be written, the exit
/// status and the log are all there is.
pub(crate) fn write(line: &str) {
    let pid = std::process::id();
    let Some(path) = started(pid).and_then(|since| path(pid, since)) else { return };
    remove_old();
    let half = path.with_extension("new");
    if let Err(error) = fs::write(&half, line).and_then(|()| fs::rename(&half, &path)) {
        tracing::info!("{}: cannot be written: {error}", path.display());
    }
}

/// What a process that has ended has reported, once.
pub(crate) fn take(pid: u32, started: u64) -> Option<String> {
    let path = path(pid, started)?;
    let line = String::from_utf8_lossy(&trust::read(&path).ok()?).into_owned();
    // At worst it stays until it is old.
    let _ = fs::remove_file(&path);
    Some(line)
}

fn path(pid: u32, started: u64) -> Option<PathBuf> {
    Some(folder()?.join(format!("{PREFIX}{pid}-{started}.txt")))
}

fn remove_old() {
    let Some(Ok(files)) = folder().map(fs::read_dir) else { return };
    for file in files.flatten().filter(|file| file.file_name().to_string_lossy().starts_with(PREFIX)) {
        let written = file.metadata().and_then(|found| found.modified());
        let age = written.ok().and_then(|written| SystemTime::now().duration_since(written).ok());
        if age.is_some_and(|age| age > KEEP) {
            let _ = fs::remove_file(file.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_is_read_once() {
        let pid = std::process::id();
        let since = started(pid).unwrap();
        if folder().is_none_or(|folder| fs::create_dir_all(folder).is_err()) {
            eprintln!("SKIP: a_report_is_read_once: no folder for reports");
            return;
        }
        write("cannot flush");
        assert_eq!(take(pid, since + 1), None);
        assert_eq!(take(pid, since).as_deref(), Some("cannot flush"));
        assert_eq!(take(pid, since), None);
    }
}
