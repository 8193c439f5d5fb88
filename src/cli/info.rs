//! `nbdbridge info`: the words of the command line.

use clap::Args;
use clap::builder::{OsStringValueParser, TypedValueParser};

use super::remote::RemoteArgs;
use super::source::SourceArgs;
use super::values::{self, AioMode, AllowBacking, CacheMode, DetectZeroes, DiscardMode, Format, Source};

/// What to tell about.
#[derive(Debug, Args)]
#[command(after_help = "Every export of a server:  nbdbridge info --list nbd://server")]
pub(crate) struct InfoArgs {
    /// An image, a block device, or a remote export: nbd://HOST:PORT/NAME, nbd+unix:///NAME?socket=PATH
    #[arg(value_name = "SOURCE",
          value_parser = OsStringValueParser::new().try_map(values::parse_source))]
    pub(crate) source: Source,

    /// All exports of a remote server
    #[arg(short = 'L', long, conflicts_with = "map")]
    pub(crate) list: bool,

    /// Image format; without it, it is told from the first sector
    #[arg(short, long, value_name = "FORMAT", value_parser = values::parse_format)]
    pub(crate) format: Option<Format>,

    /// Print JSON, for programs
    #[arg(long)]
    pub(crate) json: bool,

    /// Print what is data, zeroes and holes
    #[arg(long)]
    pub(crate) map: bool,

    /// Bytes of a sector, in which the partition table counts: 512, 1024, 2048 or 4096 [default: the device's, else 512]
    #[arg(long, value_name = "BYTES", value_parser = values::parse_sector_size)]
    pub(crate) sector_size: Option<u32>,

    /// Follow backing files outside of the image's own folder
    #[arg(long, value_name = "WHERE", default_value = "folder")]
    pub(crate) allow_backing: AllowBacking,

    /// How remote exports are reached.
    #[command(flatten)]
    pub(crate) remote: RemoteArgs,
}

impl InfoArgs {
    /// How the source is opened to look at it: nothing is changed, and nobody kept away.
    pub(crate) fn source_args(&self) -> SourceArgs {
        SourceArgs {
            format: self.format,
            allow_backing: self.allow_backing,
            data_files: Vec::new(),
            read_only: true,
            overlay: None,
            part: None,
            sector_size: self.sector_size,
            detect_zeroes: DetectZeroes::Off,
            cache: CacheMode::Writeback,
            aio: AioMode::Auto,
            discard: DiscardMode::Ignore,
            throttles: Vec::new(),
            faults: Vec::new(),
            create: None,
            beneath: None,
            lock: false,
            remote: self.remote.clone(),
        }
    }
}
