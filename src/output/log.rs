//! Log lines: one event is one line, with its level in colour on a terminal.

use std::io;

use tracing::{Level, Metadata};
use tracing_subscriber::fmt::MakeWriter;

use super::{plain, stderr};

/// The way of log lines to stderr.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Log {
    /// Shows levels in colour.
    pub(crate) coloured: bool,
}

/// Writes one event.
#[derive(Debug)]
pub(crate) struct Event {
    level: Option<Level>,
}

impl<'a> MakeWriter<'a> for Log {
    type Writer = Event;

    fn make_writer(&'a self) -> Event {
        Event { level: None }
    }

    fn make_writer_for(&'a self, meta: &Metadata<'_>) -> Event {
        Event { level: self.coloured.then_some(*meta.level()) }
    }
}

impl io::Write for Event {
    /// Takes a whole event. Never fails: what cannot be written is counted, since whoever logs could do nothing about it.
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        let text = String::from_utf8_lossy(event);
        let line = plain(text.trim_end_matches('\n'));
        stderr::log(&match self.level {
            Some(level) => colour(&line, level),
            None => line,
        });
        Ok(event.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn colour(line: &str, level: Level) -> String {
    let code = match level {
        Level::ERROR => 31,
        Level::WARN => 33,
        Level::INFO => 32,
        Level::DEBUG => 34,
        Level::TRACE => 35,
    };
    line.replacen(level.as_str(), &format!("\x1b[{code}m{level}\x1b[0m"), 1)
}
