//! Lines to stderr. A full disk, a closed pipe or a reader that has stopped costs lines and nothing else: the lost ones are
//! counted, and the next line that can be written tells how many there were.

use std::fmt;
use std::os::fd::BorrowedFd;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

/// A server waits so long for a reader of its log, once; then lines are lost until there is room.
const LOG_PATIENCE: Duration = Duration::from_millis(100);

/// A command waits so long for the reader of its errors.
const NOTE_PATIENCE: Duration = Duration::from_secs(10);

/// A pipe that is ready has room for so many bytes (PIPE_BUF), so that a write of no more does not block.
const PIECE: usize = 4096;

/// What could not be written so far.
static UNTOLD: Mutex<Untold> = Mutex::new(Untold { lines: 0, why: None, torn: false });

/// Lines that are lost and that nobody has been told of.
#[derive(Debug)]
struct Untold {
    lines: u64,
    /// The error of the last one.
    why: Option<Failure>,
    /// The last one was written in part: the next one begins on a line of its own.
    torn: bool,
}

/// Why a line was not written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Failure {
    /// The operating system's error.
    Error(Errno),
    /// There was no room for it.
    NoRoom,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::Error(errno) => write!(f, "{errno}"),
            Failure::NoRoom => f.write_str("the reader had stopped"),
        }
    }
}

/// Writes a line of a command, or the last one of a server.
pub(super) fn note(line: &str) {
    UNTOLD.lock().unwrap_or_else(PoisonError::into_inner).put(rustix::stdio::stderr(), line, NOTE_PATIENCE);
}

/// Writes a line of the log.
pub(super) fn log(line: &str) {
    UNTOLD.lock().unwrap_or_else(PoisonError::into_inner).put(rustix::stdio::stderr(), line, LOG_PATIENCE);
}

impl Untold {
    fn put(&mut self, to: BorrowedFd<'_>, line: &str, patience: Duration) {
        // Whoever has waited in vain does not wait again.
        let patience = if self.why == Some(Failure::NoRoom) { Duration::ZERO } else { patience };
        if self.lines > 0 {
            let (lines, why) = (self.lines, self.why.unwrap_or(Failure::NoRoom));
            let told =
                format!("nbdbridge: {lines} lines before this one could not be written and are lost: {why}");
            if let Err(failure) = self.write(to, &told, patience) {
                self.lose(failure);
                return;
            }
            (self.lines, self.why) = (0, None);
        }
        match self.write(to, line, patience) {
            Ok(()) => self.why = None,
            Err(failure) => self.lose(failure),
        }
    }

    fn lose(&mut self, failure: Failure) {
        self.lines += 1;
        self.why = Some(failure);
    }

    fn write(&mut self, to: BorrowedFd<'_>, line: &str, patience: Duration) -> Result<(), Failure> {
        let start = if self.torn { "\n" } else { "" };
        let text = format!("{start}{line}\n");
        let mut rest = text.as_bytes();
        while !rest.is_empty() {
            let piece = &rest[..rest.len().min(PIECE)];
            match write_piece(to, piece, patience) {
                Ok(written) => rest = &rest[written..],
                Err(failure) => {
                    self.torn |= rest.len() < text.len();
                    return Err(failure);
                }
            }
        }
        self.torn = false;
        Ok(())
    }
}

fn write_piece(to: BorrowedFd<'_>, piece: &[u8], patience: Duration) -> Result<usize, Failure> {
    let limit = Timespec {
        tv_sec: i64::try_from(patience.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(patience.subsec_nanos()),
    };
    loop {
        match poll(&mut [PollFd::from_borrowed_fd(to, PollFlags::OUT)], Some(&limit)) {
            Ok(0) => return Err(Failure::NoRoom),
            // Errors come back from the write.
            Ok(_) => {}
            Err(Errno::INTR) => continue,
            Err(errno) => return Err(Failure::Error(errno)),
        }
        match rustix::io::write(to, piece) {
            Ok(0) | Err(Errno::AGAIN) => return Err(Failure::NoRoom),
            Ok(written) => return Ok(written),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(Failure::Error(errno)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::Read;
    use std::os::fd::AsFd;

    fn untold() -> Untold {
        Untold { lines: 0, why: None, torn: false }
    }

    #[test]
    fn lines_that_a_full_disk_loses_are_told_later() {
        let full = File::options().write(true).open("/dev/full").unwrap();
        let (mut reader, writer) = std::io::pipe().unwrap();
        let mut lines = untold();
        for _ in 0..3 {
            lines.put(full.as_fd(), "lost", LOG_PATIENCE);
        }
        assert_eq!((lines.lines, lines.why), (3, Some(Failure::Error(Errno::NOSPC))));
        lines.put(writer.as_fd(), "one", LOG_PATIENCE);
        lines.put(writer.as_fd(), "two", LOG_PATIENCE);
        drop(writer);
        let mut said = String::new();
        reader.read_to_string(&mut said).unwrap();
        let said: Vec<_> = said.lines().collect();
        assert!(said[0].contains("3 lines before this one") && said[0].contains("space"), "{said:?}");
        assert_eq!(said[1..], ["one", "two"]);
    }

    #[test]
    fn a_reader_that_has_stopped_blocks_nobody() {
        let (mut reader, writer) = std::io::pipe().unwrap();
        let mut lines = untold();
        let begun = std::time::Instant::now();
        let line = "x".repeat(1000);
        while lines.lines < 1000 {
            lines.put(writer.as_fd(), &line, Duration::from_millis(10));
        }
        assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
        assert_eq!(lines.why, Some(Failure::NoRoom));
        let mut room = [0; 32 << 10];
        reader.read_exact(&mut room).unwrap();
        lines.put(writer.as_fd(), "again", Duration::ZERO);
        assert_eq!(lines.lines, 0);
        drop(writer);
        let mut said = String::new();
        reader.read_to_string(&mut said).unwrap();
        let last: Vec<_> = said.lines().rev().take(2).collect();
        assert_eq!(last[0], "again");
        assert!(last[1].starts_with("nbdbridge: 1000 lines before this one"), "{}", last[1]);
    }

    #[test]
    fn a_reader_that_is_gone_is_no_end() {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let mut lines = untold();
        lines.put(writer.as_fd(), "lost", NOTE_PATIENCE);
        assert_eq!((lines.lines, lines.why), (1, Some(Failure::Error(Errno::PIPE))));
    }
}
