//! The command line: words to typed values ([`Action`], [`ServeArgs`]), and nothing else. It opens no image and
//! no socket.
//!
//! ```text
//!   argv ──clap──> NetCommand ──checks──> ServeArgs ──> serve::run
//!            │      = exports + source.rs + process.rs + the door's own flags
//!            └── a flag of qemu-nbd's that we answer in one line (qemu.rs)
//! ```
//!
//! Usage errors are one line on stderr and exit status 2; help and version are clap's.

mod also;
mod ask;
mod attach;
mod bench;
pub(crate) mod create;
mod fuse;
mod info;
pub(crate) mod logging;
mod net;
mod process;
mod qemu;
mod remote;
mod source;
mod ublk;
mod values;
mod volume;
mod volumed;

use std::ffi::OsString;
use std::fmt;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::error::ErrorKind;
use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};

pub(crate) use ask::{AskAction, LimitsWish};
pub(crate) use attach::{AttachAction, BlockDoor, DetachArgs, LoopArgs};
pub(crate) use bench::{BenchArgs, End};
pub(crate) use fuse::FuseArgs;
pub(crate) use info::InfoArgs;
pub(crate) use net::NetArgs;
pub(crate) use process::ProcessArgs;
pub(crate) use source::{ExportArg, OverlayArg, Part, SourceArgs};
pub(crate) use ublk::{DevicesArgs, RecoverArgs, UblkArgs};
pub(crate) use values::{
    AioMode, CacheMode, DetectZeroes, DiscardMode, Format, Listen, Source, abstract_name, parse_source,
};
pub(crate) use volume::{PoolWish, VolumeAction, VolumeWish};

use crate::helper;
use crate::output;
use crate::volume::freeze::GUARD_COMMAND;

/// Exit status of a command line that makes no sense.
const USAGE_STATUS: u8 = 2;

/// What the command line asks for.
#[derive(Debug)]
pub(crate) enum Action {
    /// `nbdbridge net`, `nbdbridge fuse`: serve.
    Serve(Box<ServeArgs>),
    /// `nbdbridge ublk`: serve as a block device.
    Ublk(Box<ServeArgs>),
    /// `nbdbridge ublk --recover`: take a device over.
    Recover(Box<RecoverArgs>),
    /// `nbdbridge attach`: serve as a block device, of the kind that this host has.
    Attach(Box<AttachAction>),
    /// `nbdbridge devices`: list them.
    Devices(DevicesArgs),
    /// `nbdbridge detach`: end an attachment.
    Detach(DetachArgs),
    /// `nbdbridge create`: make an image.
    Create(create::CreateArgs),
    /// `nbdbridge ps` and others: ask the servers that are running.
    Ask(AskAction),
    /// `nbdbridge bench`: measure a server.
    Bench(Box<BenchArgs>),
    /// `nbdbridge volume`: container volumes.
    Volume(Box<VolumeAction>),
    /// `nbdbridge info`: tell about a source.
    Info(Box<InfoArgs>),
    /// Make system calls for another process of this program.
    Helper(Vec<OsString>),
    /// Keep a file system frozen for a while.
    GuardFrozen {
        /// Where it is mounted.
        point: PathBuf,
        /// The longest time.
        limit: Duration,
    },
    /// `nbdbridge volumed`: serve volumes to container engines.
    Volumed {
        /// How often `-v` was given.
        verbose: u8,
        /// What it is to be.
        args: crate::volume::DaemonArgs,
    },
    /// `nbdbridge completions`: print a completion script.
    Completions(clap_complete::Shell),
}

/// What to serve, how, and through which doors.
#[derive(Debug)]
pub(crate) struct ServeArgs {
    /// At least one, no name twice.
    pub(crate) exports: Vec<ExportArg>,
    /// How their sources are opened.
    pub(crate) source: SourceArgs,
    /// At least one. The first may write what the sources let it.
    pub(crate) doors: Vec<DoorArgs>,
    /// So may the others.
    pub(crate) multi_writer: bool,
    /// How the process behaves.
    pub(crate) process: ProcessArgs,
}

/// One way to the exports.
#[derive(Debug)]
pub(crate) enum DoorArgs {
    /// The NBD server.
    Net(NetArgs),
    /// A file.
    Fuse(FuseArgs),
    /// A loop device over a file of its own.
    Loop(LoopArgs),
    /// The kernel device.
    Ublk(UblkArgs),
}

impl DoorArgs {
    /// The NBD server, if it is one.
    pub(crate) fn net(&self) -> Option<&NetArgs> {
        match self {
            DoorArgs::Net(args) => Some(args),
            DoorArgs::Fuse(_) | DoorArgs::Loop(_) | DoorArgs::Ublk(_) => None,
        }
    }

    /// The kernel device, if it is one.
    pub(crate) fn ublk(&self) -> Option<&UblkArgs> {
        match self {
            DoorArgs::Ublk(args) => Some(args),
            _ => None,
        }
    }

    /// The same, to change it.
    pub(crate) fn ublk_mut(&mut self) -> Option<&mut UblkArgs> {
        match self {
            DoorArgs::Ublk(args) => Some(args),
            _ => None,
        }
    }

    /// Whether the kernel of this host is its user: then memory may only come free once a write through it is done.
    pub(crate) fn is_local(&self) -> bool {
        matches!(self, DoorArgs::Fuse(_) | DoorArgs::Loop(_))
    }
}

/// A command line that cannot be meant. Where `main` finds one in its error, the exit status is 2.
#[derive(Debug)]
pub(crate) struct UsageError(String);

impl UsageError {
    /// One line that names the flag and the way out.
    pub(crate) fn new(message: impl Into<String>) -> Self {
        UsageError(message.into())
    }
}

impl fmt::Display for UsageError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for UsageError {}

/// A userspace block bridge: opens disk images to NBD clients, as block devices and as files.
#[derive(Debug, Parser)]
#[command(
    name = "nbdbridge",
    version,
    propagate_version = true,
    arg_required_else_help = true,
    subcommand_required = true,
    max_term_width = 110,
    after_help = "Serve an image:  nbdbridge net disk.img\n\
                  Make one first:  nbdbridge create disk.img 10G"
)]
struct Cli {
    #[command(subcommand)]
    command: Words,
}

#[derive(Debug, Subcommand)]
enum Words {
    /// Serve disk images to NBD clients
    Net(Box<net::NetCommand>),
    /// Give this host a block device, by ublk
    Ublk(Box<ublk::UblkCommand>),
    /// Mount a disk image as one plain file, by FUSE
    Fuse(Box<fuse::FuseCommand>),
    /// Make a block device of a disk image, by the best way that this host has
    Attach(Box<attach::AttachCommand>),
    /// End what ublk, attach or fuse has made
    Detach(DetachArgs),
    /// List what ublk, attach and fuse have made
    Devices(DevicesArgs),
    /// Make an empty disk image
    Create(create::CreateArgs),
    /// List the servers that are running, and what they serve
    Ps(ask::PsCommand),
    /// Show what was asked of exports: counts, bytes, errors, latencies
    Stats(ask::StatsCommand),
    /// Show or change the limits of an export that is being served
    Throttle(ask::ThrottleCommand),
    /// Make an export larger while it is being served
    Resize(ask::ResizeCommand),
    /// Serve volumes to Docker and podman, as a volume plugin
    Volumed(volumed::VolumedCommand),
    /// Measure an NBD server
    Bench(Box<bench::BenchCommand>),
    /// Make and use container volumes: disks with a file system, in a pool
    Volume(Box<volume::VolumeCommand>),
    /// Tell what a source is
    Info(Box<InfoArgs>),
    /// Print a completion script for a shell
    #[command(after_help = "For bash:  nbdbridge completions bash \
                            > /usr/share/bash-completion/completions/nbdbridge")]
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
}

/// A word of more letters is shown in part; paths are shorter, for the most part.
const LONG_WORD: usize = 256;

/// So many of them.
const SHOWN_OF_IT: usize = 64;

/// Reads the command line. What is answered here (help, version, usage errors) comes back as an exit status.
pub(crate) fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Action, ExitCode> {
    let args: Vec<OsString> = args.into_iter().collect();
    if let Some(action) = guard_words(&args) {
        return Ok(action);
    }
    let matches = command().try_get_matches_from(&args).map_err(|error| answer(&error))?;
    if let Some(line) = matches.subcommand_matches("net").and_then(qemu::answer) {
        return Err(report(&UsageError::new(line).into()));
    }
    match Cli::from_arg_matches(&matches).map_err(|error| answer(&error))?.command {
        Words::Net(flags) => serve(flags.into_args()),
        Words::Ublk(flags) => flags.into_action(args[2..].to_vec()).map_err(|error| report(&error.into())),
        Words::Fuse(flags) => serve(flags.into_args()),
        Words::Attach(flags) => match flags.into_action(&args[2..]) {
            Ok(action) => Ok(Action::Attach(Box::new(action))),
            Err(error) => Err(report(&error.into())),
        },
        Words::Detach(args) => Ok(Action::Detach(args)),
        Words::Devices(args) => Ok(Action::Devices(args)),
        Words::Create(args) => Ok(Action::Create(args)),
        Words::Ps(flags) => Ok(Action::Ask(flags.into_action())),
        Words::Stats(flags) => Ok(Action::Ask(flags.into_action())),
        Words::Throttle(flags) => flags.into_action().map(Action::Ask).map_err(|error| report(&error.into())),
        Words::Resize(flags) => Ok(Action::Ask(flags.into_action())),
        Words::Volumed(flags) => Ok(Action::Volumed { verbose: flags.verbose(), args: flags.into_args() }),
        Words::Bench(flags) => match flags.into_args() {
            Ok(args) => Ok(Action::Bench(Box::new(args))),
            Err(error) => Err(report(&error.into())),
        },
        Words::Volume(flags) => match flags.into_action() {
            Ok(action) => Ok(Action::Volume(Box::new(action))),
            Err(error) => Err(report(&error.into())),
        },
        Words::Info(args) => Ok(Action::Info(args)),
        Words::Completions { shell } => Ok(Action::Completions(shell)),
    }
}

/// The command that this program gives itself: neither help nor completions tell of it.
fn guard_words(args: &[OsString]) -> Option<Action> {
    if let [_, word, task @ ..] = args
        && word == helper::COMMAND
    {
        return Some(Action::Helper(task.to_vec()));
    }
    let [_, word, point, milliseconds] = args else { return None };
    let limit = Duration::from_millis(milliseconds.to_str()?.parse().ok()?);
    (word == GUARD_COMMAND).then(|| Action::GuardFrozen { point: point.into(), limit })
}

fn serve(args: Result<ServeArgs, UsageError>) -> Result<Action, ExitCode> {
    match args {
        Ok(args) => Ok(Action::Serve(Box::new(args))),
        Err(error) => Err(report(&error.into())),
    }
}

/// Prints a shell's completion script.
///
/// # Errors
/// Standard output's, but for a reader that has enough.
pub(crate) fn print_completions(shell: clap_complete::Shell) -> anyhow::Result<()> {
    // clap panics where it cannot write; into memory it can.
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut command(), "nbdbridge", &mut script);
    output::data(&script)
}

/// Says an error as one line on stderr; gives 2 for a [`UsageError`] and 1 for others.
pub(crate) fn report(error: &anyhow::Error) -> ExitCode {
    let line = join_lines(&format!("{error:#}"));
    if error.is::<UsageError>() {
        output::note(&format!("nbdbridge: {}", cut_words(&line)));
        return ExitCode::from(USAGE_STATUS);
    }
    output::note(&format!("nbdbridge: {line}"));
    ExitCode::FAILURE
}

fn command() -> clap::Command {
    // `NAME VERSION` is the same line behind every subcommand: scripts read its second word.
    let command = Cli::command().mut_subcommands(|subcommand| subcommand.display_name("nbdbridge"));
    command.mut_subcommand("net", |net| net.args(qemu::hidden_args()))
}

/// Help and version as clap prints them; its errors as one line.
fn answer(error: &clap::Error) -> ExitCode {
    if !error.use_stderr() || error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        // A reader that went away (`| head`) is no failure.
        let _ = error.print();
        return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(USAGE_STATUS));
    }
    output::note(&format!("nbdbridge: {}", cut_words(&one_line(error))));
    ExitCode::from(USAGE_STATUS)
}

/// The first paragraph of clap's text, its tips, and where to read on.
fn one_line(error: &clap::Error) -> String {
    if error.kind() == ErrorKind::InvalidUtf8 {
        // clap does not say which.
        return "one of the arguments is not UTF-8; only paths, sources and EXPORT may hold other bytes (try --help)".into();
    }
    let text = error.render().to_string();
    let mut paragraphs = text.split("\n\n");
    let first = paragraphs.next().unwrap_or_default();
    let mut line = join_lines(first.strip_prefix("error: ").unwrap_or(first));
    for tip in paragraphs.filter_map(|paragraph| paragraph.trim().strip_prefix("tip: ")) {
        line.push_str("; ");
        line.push_str(&join_lines(tip));
    }
    // Who has a word behind `volume` means no image.
    if error.kind() == ErrorKind::InvalidSubcommand && !text.contains("Usage: nbdbridge volume") {
        line.push_str("; to serve an image: nbdbridge net IMAGE");
    }
    line.push_str(" (try --help)");
    line
}

/// What somebody typed comes back in errors; of a very long word, the beginning says which it was.
fn cut_words(line: &str) -> String {
    let cut = |word: &str| match word.char_indices().nth(LONG_WORD) {
        Some(_) => word.chars().take(SHOWN_OF_IT).chain("...".chars()).collect(),
        None => word.to_owned(),
    };
    line.split(' ').map(cut).collect::<Vec<_>>().join(" ")
}

fn join_lines(text: &str) -> String {
    text.lines().map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests;
