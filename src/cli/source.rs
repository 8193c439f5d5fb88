//! How sources are opened and what is laid over them: the options that every door has.

use clap::Args;

use super::UsageError;
use super::remote::RemoteArgs;
use super::values::{self, AioMode, CacheMode, DiscardMode, Format, Source};
use crate::size;

/// How sources are opened. Holds for every export of the process.
#[derive(Clone, Debug)]
pub(crate) struct SourceArgs {
    /// The images' format.
    pub(crate) format: Format,
    /// Nobody may change anything.
    pub(crate) read_only: bool,
    /// The first byte that is served.
    pub(crate) offset: u64,
    /// How images are opened.
    pub(crate) cache: CacheMode,
    /// What carries requests that would wait.
    pub(crate) aio: AioMode,
    /// What a trim does.
    pub(crate) discard: DiscardMode,
    /// `KEY=VALUE,...`, not looked into here.
    pub(crate) throttle: Option<String>,
    /// Rules of what goes wrong, each `KEY=VALUE,...`, not looked into here.
    pub(crate) faults: Vec<String>,
    /// Size of an image that is made where the path of an export leads nowhere.
    pub(crate) create: Option<u64>,
    /// Take qemu's locks on images.
    pub(crate) lock: bool,
    /// How remote exports are used.
    pub(crate) remote: RemoteArgs,
}

/// One export.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ExportArg {
    /// The name that clients ask for; "" is the default export.
    pub(crate) name: String,
    /// Words for people.
    pub(crate) description: Option<String>,
    /// Where the blocks come from.
    pub(crate) source: Source,
}

/// The flags as clap reads them.
#[derive(Debug, Args)]
#[command(next_help_heading = "Image")]
pub(super) struct SourceFlags {
    /// Image format; only raw in this version
    #[arg(short, long, value_name = "FORMAT", default_value = "raw", value_parser = values::parse_format,
          hide_default_value = true)]
    format: Format,

    /// Let no client change anything
    #[arg(short, long)]
    read_only: bool,

    /// Serve from this byte of the image on
    #[arg(short, long, value_name = "BYTES", default_value = "0", value_parser = size::parse)]
    offset: u64,

    /// Make a raw image of this size where the path leads nowhere; one that exists is served as it is
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    create: Option<u64>,

    /// How the image is opened, and when a write is answered
    #[arg(long, value_name = "MODE", default_value = "writeback")]
    cache: CacheMode,

    /// The same as --cache none
    #[arg(short, long, conflicts_with = "cache")]
    nocache: bool,

    /// What carries requests that would wait for storage
    #[arg(long, value_name = "MODE", default_value = "auto")]
    aio: AioMode,

    /// What a client's trim does
    #[arg(long, value_name = "MODE", default_value = "unmap")]
    discard: DiscardMode,

    /// Accepted for qemu-nbd's sake: only off
    #[arg(long, value_name = "MODE", value_parser = values::parse_detect_zeroes, hide = true)]
    detect_zeroes: Option<()>,

    /// Limit what clients do, as in iops-total=1000,bps-read=50M; qemu's key names
    #[arg(long, value_name = "KEY=VALUE,...", value_delimiter = ',')]
    throttle: Vec<String>,

    /// Make requests fail, come late or hang, to test clients: op=read,delay-ms=50,error-rate=0.01,seed=7
    ///
    /// Each --fault is a rule of its own. Keys: seed, op, offset, len, errno, error-rate, error-every, short-rate,
    /// delay-ms, delay-rate, hang-rate, hang-every.
    #[arg(long, value_name = "KEY=VALUE,...")]
    fault: Vec<String>,

    /// Take no locks on the image: another writer may destroy it
    #[arg(long)]
    no_lock: bool,

    #[command(flatten)]
    remote: RemoteArgs,
}

impl SourceFlags {
    /// Checks what clap cannot, against the `exports` that it holds for, and makes the typed values.
    pub(super) fn into_args(self, exports: &[ExportArg]) -> Result<SourceArgs, UsageError> {
        let on_disk = |export: &ExportArg| matches!(export.source, Source::Path(_));
        if self.create.is_some() && !exports.iter().any(on_disk) {
            return Err(UsageError::new("--create makes an image at a path, and no path was given"));
        }
        Ok(SourceArgs {
            format: self.format,
            read_only: self.read_only,
            offset: self.offset,
            cache: if self.nocache { CacheMode::None } else { self.cache },
            aio: self.aio,
            discard: self.discard,
            throttle: (!self.throttle.is_empty()).then(|| self.throttle.join(",")),
            faults: self.fault,
            create: self.create,
            lock: !self.no_lock,
            remote: self.remote,
        })
    }
}
