//! `nbdbridge fuse`: the flags of the FUSE file, and the typed values made of them.

use std::path::PathBuf;

use clap::Args;
use clap::builder::{OsStringValueParser, TypedValueParser};

use super::also::{AlsoNet, Writers};
use super::process::ProcessFlags;
use super::source::SourceFlags;
use super::values::{self, Source};
use super::{DoorArgs, ServeArgs, UsageError};

/// What the FUSE file was asked to be.
#[derive(Clone, Debug)]
pub(crate) struct FuseArgs {
    /// The file to mount over, or to make.
    pub(crate) file: PathBuf,
    /// Other users may use it.
    pub(crate) allow_other: bool,
    /// A write past the end makes the source longer, and truncating changes its size.
    pub(crate) growable: bool,
    /// Threads that answer the kernel; None for as many as do well.
    pub(crate) threads: Option<usize>,
}

/// The flags of `nbdbridge fuse` as clap reads them.
#[derive(Debug, Args)]
#[command(
    next_line_help = false,
    after_help = "Ready, it prints the path of the file. To end it: nbdbridge detach FILE, umount FILE or SIGTERM.\n\
                  SIZE and BYTES take K, M, G and T (powers of 1024), SECONDS also 500ms, 10s or 2m.\n\
                  NBDBRIDGE_LOG (as in debug, or bridge=trace) says what is logged, and overrides -v."
)]
pub(super) struct FuseCommand {
    /// What to serve: the path of a raw image or block device, file:PATH, mem:SIZE or null:SIZE
    #[arg(value_name = "SOURCE", value_parser = OsStringValueParser::new().try_map(values::parse_source))]
    source: Source,

    /// The file to be: one that exists is mounted over (SOURCE itself, too), a new one is removed at the end
    #[arg(value_name = "FILE")]
    file: PathBuf,

    #[command(flatten)]
    fuse: FuseFlags,

    #[command(flatten)]
    also: AlsoNet,

    #[command(flatten)]
    writers: Writers,

    #[command(flatten)]
    image: SourceFlags,

    #[command(flatten)]
    process: ProcessFlags,
}

/// The flags of the file itself.
#[derive(Debug, Args)]
#[command(next_help_heading = "File")]
struct FuseFlags {
    /// Let other users open the file, as far as its mode lets them
    #[arg(long)]
    allow_other: bool,

    /// SOURCE becomes longer with what is written past its end or truncated, and a raw image shorter, too (truncate, dd
    /// without conv=notrunc)
    #[arg(long)]
    growable: bool,

    /// Threads that answer the kernel [default: one for each core, 4 at most]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    threads: Option<u16>,
}

impl FuseCommand {
    /// Checks what clap cannot, and makes the typed values.
    pub(super) fn into_args(self) -> Result<ServeArgs, UsageError> {
        let exports = vec![self.also.name(self.source)];
        let door = FuseArgs {
            file: self.file,
            allow_other: self.fuse.allow_other,
            growable: self.fuse.growable,
            threads: self.fuse.threads.map(usize::from),
        };
        Ok(ServeArgs {
            source: self.image.into_args(&exports)?,
            exports,
            doors: std::iter::once(DoorArgs::Fuse(door)).chain(self.also.into_door()?).collect(),
            multi_writer: self.writers.multi_writer,
            process: self.process.into_args(),
        })
    }
}

/// The file as a second door.
#[derive(Debug, Args)]
#[command(next_help_heading = "More doors")]
pub(super) struct AlsoFuse {
    /// Mount SOURCE as a file, too (see `nbdbridge fuse --help`); it may only be read without --multi-writer
    #[arg(long, value_name = "FILE")]
    also_fuse: Option<PathBuf>,
}

impl AlsoFuse {
    /// The door, if it is wanted.
    pub(super) fn into_door(self) -> Option<DoorArgs> {
        let file = self.also_fuse?;
        Some(DoorArgs::Fuse(FuseArgs { file, allow_other: false, growable: false, threads: None }))
    }
}
