//! How sources are opened and what is laid over them: the options that every door has.

use std::path::PathBuf;

use clap::Args;

use super::UsageError;
use super::remote::RemoteArgs;
use super::values::{self, AioMode, AllowBacking, CacheMode, DetectZeroes, DiscardMode, Format, Source};
use crate::size;

/// How sources are opened. Holds for every export of the process.
#[derive(Clone, Debug)]
pub(crate) struct SourceArgs {
    /// The images' format; None to look.
    pub(crate) format: Option<Format>,
    /// Which backing files may be opened.
    pub(crate) allow_backing: AllowBacking,
    /// External data files that may be written because an image names them.
    pub(crate) data_files: Vec<PathBuf>,
    /// Nobody may change anything.
    pub(crate) read_only: bool,
    /// Where changes go instead of the image.
    pub(crate) overlay: Option<OverlayArg>,
    /// What of the image is served; None for all of it.
    pub(crate) part: Option<Part>,
    /// Bytes of a sector, in which the partition table counts; None for the device's, or 512.
    pub(crate) sector_size: Option<u32>,
    /// What becomes of written zeroes.
    pub(crate) detect_zeroes: DetectZeroes,
    /// How images are opened.
    pub(crate) cache: CacheMode,
    /// What carries requests that would wait.
    pub(crate) aio: AioMode,
    /// What a trim does.
    pub(crate) discard: DiscardMode,
    /// Each `KEY=VALUE,...`, not looked into here.
    pub(crate) throttles: Vec<String>,
    /// Rules of what goes wrong, each `KEY=VALUE,...`, not looked into here.
    pub(crate) faults: Vec<String>,
    /// Size of an image that is made where the path of an export leads nowhere.
    pub(crate) create: Option<u64>,
    /// Take qemu's locks on images.
    pub(crate) lock: bool,
    /// A folder of volumes that the images are in: they are reached from it without links, and stand alone.
    pub(crate) beneath: Option<PathBuf>,
    /// How remote exports are used.
    pub(crate) remote: RemoteArgs,
}

/// An overlay.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum OverlayArg {
    /// Gone at the end.
    Temporary,
    /// A file that is made, or opened again.
    Keep(PathBuf),
}

/// A part of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    /// So many bytes from an offset on, or all that follow.
    Range {
        /// In bytes.
        offset: u64,
        /// In bytes.
        size: Option<u64>,
    },
    /// The partition of this number.
    Partition(u32),
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
    /// Settings of this export, beside those of all exports.
    pub(crate) options: ExportOptions,
}

/// Settings of one export of several.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct ExportOptions {
    /// No client may change it.
    pub(crate) read_only: bool,
    /// Changes go to a temporary overlay.
    pub(crate) snapshot: bool,
    /// The image's format; None for that of all exports.
    pub(crate) format: Option<Format>,
}

impl ExportArg {
    /// Returns how the source of this export is opened: the settings of all exports with its own.
    pub(crate) fn settings(&self, all: &SourceArgs) -> SourceArgs {
        let own = self.options;
        let mut settings = all.clone();
        settings.read_only |= own.read_only;
        settings.format = own.format.or(all.format);
        if own.snapshot {
            settings.overlay = Some(OverlayArg::Temporary);
        }
        settings
    }
}

/// The flags as clap reads them.
#[derive(Debug, Args)]
#[command(next_help_heading = "Image")]
pub(super) struct SourceFlags {
    /// Image format: raw, qcow2 or vmdk; without it, it is told from the first sector
    #[arg(short, long, value_name = "FORMAT", value_parser = values::parse_format)]
    format: Option<Format>,

    /// Which backing files an image may name; `any` lets it write to its data file, too
    #[arg(long, value_name = "WHERE", default_value = "folder")]
    allow_backing: AllowBacking,

    /// Let a qcow2 image write to this external data file, which it names; repeat it for others
    #[arg(long, value_name = "PATH")]
    data_file: Vec<PathBuf>,

    /// Let no client change anything
    #[arg(short, long)]
    read_only: bool,

    /// Leave the image alone: changes go to a temporary file, which is gone at the end
    ///
    /// It is made in $TMPDIR, or else in /var/tmp.
    #[arg(short, long, conflicts_with = "read_only")]
    snapshot: bool,

    /// Leave the image alone: changes go to FILE, a qcow2 image over it, which is made or used again
    #[arg(long, value_name = "FILE", conflicts_with_all = ["snapshot", "create"])]
    overlay: Option<PathBuf>,

    /// Serve this partition of the image (GPT or MBR, logical ones from 5 on)
    #[arg(short = 'P', long, value_name = "N", conflicts_with_all = ["offset", "size"],
          value_parser = clap::value_parser!(u32).range(1..))]
    partition: Option<u32>,

    /// Bytes of a sector, in which the partition table counts: 512, 1024, 2048 or 4096 [default: the device's, else 512]
    #[arg(long, value_name = "BYTES", requires = "partition", value_parser = values::parse_sector_size)]
    sector_size: Option<u32>,

    /// Serve from this byte of the image on
    #[arg(short, long, value_name = "BYTES", value_parser = size::parse)]
    offset: Option<u64>,

    /// Serve so many bytes of the image [default: all from --offset on]
    #[arg(long, value_name = "BYTES", value_parser = size::parse)]
    size: Option<u64>,

    /// Make an image of this size (raw, or as -f says) where the path leads nowhere; one that exists is served as it is
    #[arg(long, value_name = "SIZE", value_parser = size::parse, conflicts_with = "snapshot")]
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

    /// What becomes of a write that is all zeroes
    #[arg(long, value_name = "MODE", default_value = "off")]
    detect_zeroes: DetectZeroes,

    /// Limit what clients do, as in iops-total=1000,bps-read=50M; qemu's key names
    ///
    /// Repeat it. Each export has these limits for itself; with export=NAME among the keys only that one, and
    /// with group=NAME the exports of the group share them: all, or those that export=NAME names.
    #[arg(long, value_name = "KEY=VALUE,...")]
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

    /// Images are below this folder, whose content may be a stranger's: no link is followed, and no other file named
    #[arg(long, value_name = "DIR", hide = true, requires = "format",
          conflicts_with_all = ["create", "overlay"])]
    beneath: Option<PathBuf>,

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
        let snapshots = || exports.iter().filter(|export| export.options.snapshot);
        if let (Some(twice), true) = (snapshots().next(), self.read_only || self.create.is_some()) {
            let flag = if self.read_only { "--read-only" } else { "--create" };
            return Err(UsageError::new(format!(
                "export `{}`: snapshot takes no {flag}; give {flag} up, or the export's snapshot",
                twice.name
            )));
        }
        if let (Some(_), [_, _, ..]) = (&self.overlay, exports) {
            let message = "--overlay FILE belongs to one image; serve one, or use --snapshot";
            return Err(UsageError::new(message));
        }
        if self.detect_zeroes == DetectZeroes::Unmap && self.discard == DiscardMode::Ignore {
            return Err(UsageError::new(
                "--detect-zeroes unmap needs --discard unmap; or detect them with `on`",
            ));
        }
        let range = (self.offset.is_some() || self.size.is_some())
            .then(|| Part::Range { offset: self.offset.unwrap_or(0), size: self.size });
        let temporary = self.snapshot.then_some(OverlayArg::Temporary);
        Ok(SourceArgs {
            format: self.format,
            allow_backing: self.allow_backing,
            data_files: self.data_file,
            read_only: self.read_only,
            overlay: self.overlay.map(OverlayArg::Keep).or(temporary),
            part: self.partition.map(Part::Partition).or(range),
            sector_size: self.sector_size,
            detect_zeroes: self.detect_zeroes,
            cache: if self.nocache { CacheMode::None } else { self.cache },
            aio: self.aio,
            discard: self.discard,
            throttles: self.throttle,
            faults: self.fault,
            create: self.create,
            lock: !self.no_lock,
            beneath: self.beneath,
            remote: self.remote,
        })
    }
}
