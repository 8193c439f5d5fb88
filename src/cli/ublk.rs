//! `nbdbridge ublk` and `devices`: their flags, and the typed values made of them.

use std::ffi::OsString;
use std::time::Duration;

use clap::Args;
use clap::builder::{OsStringValueParser, TypedValueParser};

use super::also::{AlsoNet, Writers};
use super::process::ProcessFlags;
use super::source::SourceFlags;
use super::values::{self, Source};
use super::{Action, DoorArgs, ServeArgs, UsageError};
use crate::os_text::OsText;
use crate::size;

/// Queues where nothing else is said: cores, but no more than this.
const MOST_QUEUES: usize = 4;

/// What the kernel device was asked to be.
#[derive(Clone, Debug)]
pub(crate) struct UblkArgs {
    /// The source, as it was given.
    pub(crate) source: OsText,
    /// The command line's words behind `ublk`, to be remembered.
    pub(crate) words: Vec<OsString>,
    /// The device's number; None is any free one.
    pub(crate) id: Option<u32>,
    /// Hardware queues, at least one.
    pub(crate) queues: u16,
    /// Requests in flight on one queue.
    pub(crate) depth: u16,
    /// Largest request in bytes.
    pub(crate) io_size: u32,
    /// Logical block in bytes; None is the source's.
    pub(crate) block_size: Option<u32>,
    /// A user's device.
    pub(crate) unprivileged: bool,
    /// A successor may take it over.
    pub(crate) recoverable: bool,
    /// How long requests wait for one.
    pub(crate) recover_timeout: Duration,
    /// Another process starts it again.
    pub(crate) supervise: bool,
    /// The device to take over, instead of making one.
    pub(crate) recover: Option<u32>,
    /// The process that supervises this one.
    pub(crate) supervisor: Option<u32>,
    /// A request that takes longer fails; None is as long as it takes.
    pub(crate) io_timeout: Option<Duration>,
    /// The kernel copies data, as before 6.5.
    pub(crate) kernel_copy: bool,
    /// The kernel fills large reads by itself, where it can.
    pub(crate) zero_copy: bool,
    /// The kernel looks for partitions by itself; None is where it cannot be told not to.
    pub(crate) scan_partitions: Option<bool>,
}

/// A device to be taken over: what it was made of is remembered elsewhere.
#[derive(Debug)]
pub(crate) struct RecoverArgs {
    /// Its number.
    pub(crate) id: u32,
    process: ProcessFlags,
    supervise: bool,
    no_supervise: bool,
}

/// `nbdbridge ublk`.
#[derive(Debug, Args)]
#[command(
    next_line_help = false,
    after_help = "SIZE and BYTES take K, M, G and T (powers of 1024), SECONDS also 500ms, 10s or 2m.\n\
                  Ends with SIGTERM, or by `nbdbridge detach /dev/ublkbN`; not while it is in use.\n\
                  NBDBRIDGE_LOG (as in debug, or bridge=trace) says what is logged, and overrides -v."
)]
pub(super) struct UblkCommand {
    /// What to serve: the path of an image or block device, file:PATH, mem:SIZE or null:SIZE
    #[arg(value_name = "SOURCE", required_unless_present = "recover", conflicts_with = "recover",
          value_parser = OsStringValueParser::new().try_map(values::parse_source))]
    source: Option<Source>,

    #[command(flatten)]
    device: DeviceFlags,

    #[command(flatten)]
    also: AlsoNet,

    #[command(flatten)]
    writers: Writers,

    #[command(flatten)]
    image: SourceFlags,

    #[command(flatten)]
    process: ProcessFlags,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Device")]
struct DeviceFlags {
    /// Make /dev/ublkbN [default: the first that is free]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(0..1 << 20))]
    id: Option<u32>,

    /// Hardware queues, each with a thread [default: one for each core, at most 4]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=128))]
    queues: Option<u16>,

    /// Requests in flight on one queue at most
    #[arg(long, value_name = "N", default_value = "128", value_parser = clap::value_parser!(u16).range(1..=4096))]
    depth: u16,

    /// Largest request
    #[arg(long, value_name = "SIZE", default_value = "512K", value_parser = parse_io_size)]
    io_size: u32,

    /// Logical block size, 512 or 4096 [default: the source's]
    #[arg(long, value_name = "BYTES", value_parser = parse_block_size)]
    block_size: Option<u32>,

    /// Make a device that this user owns (with contrib/udev's rule)
    #[arg(long)]
    unprivileged: bool,

    /// Whether another process can take the device over when this one dies; never where answered writes would be lost
    #[arg(long, value_name = "on|off", num_args = 0..=1, default_missing_value = "on", require_equals = true,
          value_parser = parse_switch)]
    recoverable: Option<bool>,

    /// Take device N over, whose process has died; its source and options are remembered
    #[arg(long, value_name = "N", exclusive = false)]
    recover: Option<u32>,

    /// Remove a device that nobody has taken over for so long: whoever waits for it gets an error
    #[arg(long, value_name = "SECONDS", default_value = "60", value_parser = values::parse_positive_duration)]
    recover_timeout: Duration,

    /// Watch over it from another process, which starts it again when it dies; with --fork that is the default
    #[arg(long, overrides_with = "no_supervise")]
    supervise: bool,

    /// No other process starts it again
    #[arg(long, overrides_with = "supervise")]
    no_supervise: bool,

    /// Fail a request that the source has not answered for so long; 0 for never
    #[arg(long, value_name = "SECONDS", default_value = "300", value_parser = values::parse_duration)]
    io_timeout: Duration,

    /// Let the kernel fill large reads from the file's pages, without a copy, where it can do that
    #[arg(long, conflicts_with_all = ["unprivileged", "kernel_copy"])]
    zero_copy: bool,

    /// Let the kernel read the partition table when the device starts; off: not, so that a source which hangs does not
    /// hold the start up [default: off where the kernel has NO_AUTO_PART_SCAN, else on]
    #[arg(long, value_name = "on|off", num_args = 0..=1, default_missing_value = "on", require_equals = true,
          value_parser = parse_switch)]
    scan_partitions: Option<bool>,

    /// Let the kernel copy the data, as Linux before 6.5 does
    #[arg(long, hide = true)]
    kernel_copy: bool,
}

impl UblkCommand {
    /// Checks what clap cannot, and makes the typed values. `words` are those behind `ublk`.
    pub(super) fn into_action(self, words: Vec<OsString>) -> Result<Action, UsageError> {
        let device = self.device;
        if let Some(id) = device.recover {
            let (supervise, no_supervise) = (device.supervise, device.no_supervise);
            return Ok(Action::Recover(Box::new(RecoverArgs {
                id,
                process: self.process,
                supervise,
                no_supervise,
            })));
        }
        let Some(source) = self.source else { return Err(UsageError::new("SOURCE is missing (try --help)")) };
        let name = source.as_given();
        let in_memory = matches!(source, Source::Memory(_));
        let exports = vec![self.also.name(source)];
        let image = self.image.into_args(&exports)?;
        let wished = device.recoverable == Some(true);
        if wished && !image.lock {
            return Err(UsageError::new(
                "--no-lock excludes --recoverable: the lock tells when the requests of a dead process are over",
            ));
        }
        if wished && in_memory {
            return Err(UsageError::new("mem:SIZE ends with its process, and cannot be --recoverable"));
        }
        if wished && device.unprivileged {
            return Err(UsageError::new(
                "the kernel lets no user's device be taken over: --unprivileged excludes --recoverable",
            ));
        }
        let able = image.lock && !in_memory && !device.unprivileged;
        let recoverable = device.recoverable.unwrap_or(able);
        if device.supervise && !recoverable {
            return Err(UsageError::new("--supervise needs a recoverable device"));
        }
        let process = self.process.into_args();
        let cores = std::thread::available_parallelism().map_or(1, usize::from).min(MOST_QUEUES);
        let ublk = UblkArgs {
            source: name,
            words,
            id: device.id,
            queues: device.queues.unwrap_or(u16::try_from(cores).unwrap_or(1)),
            depth: device.depth,
            io_size: device.io_size,
            block_size: device.block_size,
            unprivileged: device.unprivileged,
            recoverable,
            recover_timeout: device.recover_timeout,
            supervise: device.supervise || (process.fork && !device.no_supervise),
            recover: None,
            supervisor: None,
            io_timeout: (!device.io_timeout.is_zero()).then_some(device.io_timeout),
            kernel_copy: device.kernel_copy,
            zero_copy: device.zero_copy,
            scan_partitions: device.scan_partitions,
        };
        Ok(Action::Ublk(Box::new(ServeArgs {
            exports,
            source: image,
            doors: std::iter::once(DoorArgs::Ublk(ublk)).chain(self.also.into_door()?).collect(),
            multi_writer: self.writers.multi_writer,
            process,
        })))
    }
}

impl RecoverArgs {
    /// How much is logged.
    pub(crate) fn verbose(&self) -> u8 {
        self.process.verbose()
    }

    /// The arguments of the device that is taken over, with what this command line says of the process.
    pub(crate) fn apply(self, args: &mut ServeArgs) {
        args.process = self.process.into_args();
        for ublk in args.doors.iter_mut().filter_map(DoorArgs::ublk_mut) {
            ublk.recover = Some(self.id);
            ublk.supervise = self.supervise || (args.process.fork && !self.no_supervise);
        }
    }
}

/// `nbdbridge devices`.
#[derive(Debug, Args)]
pub(crate) struct DevicesArgs {
    /// Show what this kernel's ublk can do, and what of it is used
    #[arg(long)]
    pub(crate) features: bool,

    /// Print JSON: an array, with exact sizes
    #[arg(long, conflicts_with = "features")]
    pub(crate) json: bool,

    /// Print user and group of a device, for udev
    #[arg(long, value_name = "DEVICE", hide = true, conflicts_with_all = ["features", "json"])]
    pub(crate) owner: Option<String>,
}

/// Reads `--io-size`.
fn parse_io_size(text: &str) -> Result<u32, String> {
    let bytes = size::parse(text).map_err(|error| error.to_string())?;
    match u32::try_from(bytes) {
        Ok(bytes @ 4096..=0x0200_0000) if bytes % 4096 == 0 => Ok(bytes),
        _ => Err("must be a multiple of 4K, up to 32M".into()),
    }
}

/// Reads `--block-size`.
fn parse_block_size(text: &str) -> Result<u32, String> {
    match size::parse(text).map_err(|error| error.to_string())? {
        512 => Ok(512),
        4096 => Ok(4096),
        _ => Err("must be 512 or 4096".into()),
    }
}

fn parse_switch(text: &str) -> Result<bool, String> {
    match text {
        "on" | "yes" | "true" => Ok(true),
        "off" | "no" | "false" => Ok(false),
        _ => Err("write on or off".into()),
    }
}
