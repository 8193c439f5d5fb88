//! `nbdbridge attach` and `nbdbridge detach`: their flags, and the typed values made of them.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::builder::{OsStringValueParser, TypedValueParser};
use clap::{Args, ValueEnum};

use super::also::{AlsoNet, Writers};
use super::process::ProcessFlags;
use super::source::SourceFlags;
use super::values::{self, Source};
use super::{DoorArgs, ServeArgs, UsageError};

/// What the loop device was asked to be. All else comes from the source.
#[derive(Clone, Debug)]
pub(crate) struct LoopArgs {
    /// Threads that answer the kernel; None for as many as do well.
    pub(crate) threads: Option<usize>,
}

/// The flags of `nbdbridge attach` as clap reads them.
#[derive(Debug, Args)]
#[command(
    next_line_help = false,
    after_help = "It goes to the background and prints the path of the block device. To end it: nbdbridge detach DEVICE.\n\
                  SIZE and BYTES take K, M, G and T (powers of 1024), SECONDS also 500ms, 10s or 2m."
)]
pub(super) struct AttachCommand {
    /// What to attach: the path of a raw image or block device, file:PATH, mem:SIZE or null:SIZE
    #[arg(value_name = "SOURCE", value_parser = OsStringValueParser::new().try_map(values::parse_source))]
    source: Source,

    /// Which kind of device
    #[arg(long, value_name = "DOOR", default_value = "auto")]
    door: BlockDoor,

    /// Stay in the foreground, until a signal ends it
    #[arg(long, conflicts_with = "fork")]
    foreground: bool,

    #[command(flatten)]
    also: AlsoNet,

    #[command(flatten)]
    writers: Writers,

    #[command(flatten)]
    image: SourceFlags,

    #[command(flatten)]
    process: ProcessFlags,
}

/// A way to a block device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum BlockDoor {
    /// ublk where the kernel has it, else FUSE and a loop device
    Auto,
    /// A device of ublk's: it survives the death of its process
    Ublk,
    /// A loop device over a FUSE file
    Fuse,
}

/// The two ways to a block device, of which the host decides, or a person.
#[derive(Debug)]
pub(crate) struct AttachAction {
    /// Which.
    pub(crate) door: BlockDoor,
    /// Where the kernel has no ublk: a loop device over a FUSE file.
    pub(crate) by_loop: ServeArgs,
    /// Where it has: the command line of `nbdbridge ublk` that makes one. A device that is taken over is remembered by it.
    pub(crate) ublk_words: Vec<OsString>,
}

impl AttachCommand {
    /// Checks what clap cannot, and makes the typed values. `words` are those behind `attach`.
    pub(super) fn into_action(self, words: &[OsString]) -> Result<AttachAction, UsageError> {
        let (stays, door) = (self.foreground, self.door);
        let by_loop = self.into_args()?;
        let head = ["nbdbridge", "ublk"].into_iter().map(OsString::from);
        let fork = (!stays && !words.iter().any(|word| word == "--fork")).then(|| OsString::from("--fork"));
        Ok(AttachAction { door, by_loop, ublk_words: head.chain(fork).chain(of_ublk(words)).collect() })
    }

    fn into_args(self) -> Result<ServeArgs, UsageError> {
        let exports = vec![self.also.name(self.source)];
        let mut process = self.process.into_args();
        process.fork = !self.foreground;
        let device = DoorArgs::Loop(LoopArgs { threads: None });
        Ok(ServeArgs {
            source: self.image.into_args(&exports)?,
            exports,
            doors: std::iter::once(device).chain(self.also.into_door()?).collect(),
            multi_writer: self.writers.multi_writer,
            process,
        })
    }
}

/// The words that `nbdbridge ublk` knows, too.
fn of_ublk(words: &[OsString]) -> Vec<OsString> {
    let mut words = words.iter();
    let mut rest = Vec::new();
    while let Some(word) = words.next() {
        if word == "--door" {
            words.next();
        } else if word != "--foreground" && !word.as_encoded_bytes().starts_with(b"--door=") {
            rest.push(word.clone());
        }
    }
    rest
}

/// What to end.
#[derive(Debug, Args)]
pub(crate) struct DetachArgs {
    /// The block device or file that ublk, attach or fuse has made
    #[arg(value_name = "DEVICE|FILE")]
    pub(crate) target: PathBuf,

    /// End it although it is in use: its users get errors
    #[arg(long)]
    pub(crate) force: bool,
}
