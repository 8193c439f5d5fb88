//! `nbdbridge bench`: the flags of the load generator, and the checks that need no server.

use std::num::NonZeroU64;
use std::time::Duration;

use bridge::random::Random;
use clap::Args;
use nbd_proto::ReplyStyle;
use nbd_proto::uri::Uri;

use super::UsageError;
use super::values;
use crate::size;

/// The most bytes that requests in flight may hold together.
const MAX_HELD_BYTES: u64 = 1 << 30;

/// The words of the command line.
#[derive(Debug, Args)]
#[command(
    after_help = "Reads unless --write is given. SIZE and BYTES take K, M, G and T (powers of 1024); SECONDS also \
                        500ms, 10s, 2m.\n\n\
                        Reads at depth 64:   nbdbridge bench nbd://host/disk --depth 64\n\
                        Checks every block:  nbdbridge bench nbd://host/scratch --write --read-percent 50 --verify"
)]
pub(crate) struct BenchCommand {
    /// The export: `nbd://HOST[:PORT]/NAME` or `nbd+unix:///NAME?socket=PATH`
    #[arg(value_name = "URI", help = "The export: nbd://HOST[:PORT]/NAME or nbd+unix:///NAME?socket=PATH")]
    uri: Uri,

    /// Requests in flight on each connection
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..=4096))]
    depth: u16,

    /// Bytes of each request
    #[arg(long, value_name = "SIZE", default_value = "4K", value_parser = parse_block)]
    block_size: u32,

    /// Connections
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1024))]
    connections: u16,

    /// Threads that share the connections
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=256))]
    threads: u16,

    /// Write: DESTROYS what the export holds
    #[arg(long)]
    write: bool,

    /// Share of reads among the requests; needs --write unless it is 100 [default: 100; with --write 0]
    #[arg(long, value_name = "PERCENT", value_parser = clap::value_parser!(u8).range(0..=100))]
    read_percent: Option<u8>,

    /// Flush after so many writes of a connection
    #[arg(long, value_name = "N", requires = "write")]
    flush_every: Option<NonZeroU64>,

    /// One block after the other; each connection has its own part of the range
    #[arg(long, overrides_with = "random")]
    sequential: bool,

    /// Any block next (the default)
    #[arg(long, overrides_with = "sequential")]
    random: bool,

    /// How long
    #[arg(long, value_name = "SECONDS", default_value = "5", value_parser = values::parse_positive_duration,
          conflicts_with = "requests")]
    duration: Duration,

    /// How many requests, however long that takes
    #[arg(long, value_name = "N")]
    requests: Option<NonZeroU64>,

    /// Where the range of requests begins
    #[arg(long, value_name = "BYTES", default_value = "0", value_parser = size::parse)]
    offset: u64,

    /// Length of the range of requests [default: to the export's end]
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    size: Option<u64>,

    /// Check what is read: with --write this run's own blocks, else those of a run with this --seed
    #[arg(long)]
    verify: bool,

    /// Seed of places, and of what is written [default: another one in each run]
    #[arg(long, value_name = "SEED", value_parser = parse_seed)]
    seed: Option<u64>,

    /// Ask for no structured replies
    #[arg(long, conflicts_with = "extended")]
    simple: bool,

    /// Ask for extended headers
    #[arg(long)]
    extended: bool,

    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

/// What to measure, and how.
#[derive(Clone, Debug)]
pub(crate) struct BenchArgs {
    /// The export.
    pub(crate) uri: Uri,
    /// Requests in flight on each connection.
    pub(crate) depth: u16,
    /// Bytes of each request; not 0.
    pub(crate) block_size: u32,
    /// At least 1.
    pub(crate) connections: u16,
    /// At least 1, and no more than connections.
    pub(crate) threads: u16,
    /// Share of reads, 0 to 100. Below 100 somebody agreed to that.
    pub(crate) read_percent: u8,
    /// A flush after so many writes of a connection.
    pub(crate) flush_every: Option<NonZeroU64>,
    /// In order, not at random.
    pub(crate) sequential: bool,
    /// When it ends.
    pub(crate) end: End,
    /// First byte of the range.
    pub(crate) offset: u64,
    /// Bytes of the range; to the export's end if `None`.
    pub(crate) size: Option<u64>,
    /// Blocks carry a pattern, which is checked.
    pub(crate) verify: bool,
    /// Seed of all that is random.
    pub(crate) seed: u64,
    /// The reply style to ask for.
    pub(crate) style: ReplyStyle,
    /// Print JSON.
    pub(crate) json: bool,
}

/// When a run ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// After so long.
    After(Duration),
    /// With the last of so many requests.
    Requests(NonZeroU64),
}

impl BenchArgs {
    /// Whether it writes.
    pub(crate) fn writes(&self) -> bool {
        self.read_percent < 100
    }
}

impl BenchCommand {
    /// Checks what no server is needed for.
    pub(super) fn into_args(self) -> Result<BenchArgs, UsageError> {
        let refuse = |message: &str| Err(UsageError::new(message));
        let read_percent = self.read_percent.unwrap_or(if self.write { 0 } else { 100 });
        if read_percent < 100 && !self.write {
            return Err(UsageError::new(format!(
                "--read-percent {read_percent} writes, which destroys what the export holds: if that is meant, add \
                 --write"
            )));
        }
        if self.write && read_percent == 100 {
            return refuse("--write with --read-percent 100 writes nothing; leave one of them out");
        }
        if self.verify && (!self.block_size.is_multiple_of(8) || self.block_size < 64) {
            return refuse("--verify needs a --block-size of at least 64 that is a multiple of 8");
        }
        if self.verify && !self.write && self.seed.is_none() {
            return refuse(
                "--verify without --write checks what an earlier run wrote: give the --seed it printed",
            );
        }
        let held = u64::from(self.depth) * u64::from(self.connections) * u64::from(self.block_size);
        if held > MAX_HELD_BYTES {
            return Err(UsageError::new(format!(
                "{} would be in flight; --depth, --connections and --block-size together must stay below {}",
                size::human(held),
                size::human(MAX_HELD_BYTES)
            )));
        }
        Ok(BenchArgs {
            uri: self.uri,
            depth: self.depth,
            block_size: self.block_size,
            connections: self.connections,
            threads: self.threads.min(self.connections),
            read_percent,
            flush_every: self.flush_every,
            sequential: self.sequential,
            end: self.requests.map_or(End::After(self.duration), End::Requests),
            offset: self.offset,
            size: self.size,
            verify: self.verify,
            seed: self.seed.unwrap_or_else(Random::any_seed),
            style: match (self.simple, self.extended) {
                (true, _) => ReplyStyle::Simple,
                (_, true) => ReplyStyle::Extended,
                _ => ReplyStyle::Structured,
            },
            json: self.json,
        })
    }
}

/// Reads `--block-size`: what a request's payload may be.
fn parse_block(text: &str) -> Result<u32, String> {
    let bytes = size::parse(text).map_err(|error| error.to_string())?;
    match u32::try_from(bytes) {
        Ok(bytes) if bytes > 0 && bytes <= nbd_proto::MAX_PAYLOAD_BYTES => Ok(bytes),
        _ => Err("must be from 1 byte to 32M".into()),
    }
}

/// Reads `--seed`, as it is printed or in decimal.
fn parse_seed(text: &str) -> Result<u64, String> {
    let number = match text.strip_prefix("0x") {
        Some(hex) if !hex.starts_with('+') => u64::from_str_radix(hex, 16),
        _ => text.parse(),
    };
    number.map_err(|_| "not a number; write it as it was printed, or in decimal".into())
}
