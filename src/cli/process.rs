//! The options of the process itself, which every door has.

use std::path::PathBuf;
use std::time::Duration;

use clap::{ArgAction, Args};

use super::values;

/// How the process behaves.
#[derive(Clone, Debug)]
pub(crate) struct ProcessArgs {
    /// Go to the background once ready.
    pub(crate) fork: bool,
    /// Where the process number goes.
    pub(crate) pid_file: Option<PathBuf>,
    /// Worker threads, at least one.
    pub(crate) workers: usize,
    /// How long requests in flight may take at the end.
    pub(crate) drain_timeout: Duration,
    /// How often `-v` was given.
    pub(crate) verbose: u8,
}

/// The flags as clap reads them.
#[derive(Debug, Args)]
#[command(next_help_heading = "Process")]
pub(super) struct ProcessFlags {
    /// Go to the background once it is ready
    #[arg(long)]
    fork: bool,

    /// Write the process number to this file, and remove it at the end
    #[arg(long, value_name = "PATH")]
    pid_file: Option<PathBuf>,

    /// Worker threads [default: one for each core]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    workers: Option<u16>,

    /// At the end, wait so long for requests in flight
    #[arg(long, value_name = "SECONDS", default_value = "10", value_parser = values::parse_duration)]
    drain_timeout: Duration,

    /// Log more: -v connections, -vv handshakes, -vvv requests
    #[arg(short, long, action = ArgAction::Count)]
    verbose: u8,
}

impl ProcessFlags {
    /// How much is logged.
    pub(super) fn verbose(&self) -> u8 {
        self.verbose
    }

    /// The typed values.
    pub(super) fn into_args(self) -> ProcessArgs {
        let cores = || std::thread::available_parallelism().map_or(1, usize::from);
        ProcessArgs {
            fork: self.fork,
            pid_file: self.pid_file,
            workers: self.workers.map_or_else(cores, usize::from),
            drain_timeout: self.drain_timeout,
            verbose: self.verbose,
        }
    }
}
