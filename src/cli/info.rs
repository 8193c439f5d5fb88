//! `nbdbridge info`: the words of the command line.

use clap::Args;
use clap::builder::{OsStringValueParser, TypedValueParser};

use super::remote::RemoteArgs;
use super::values::{self, Source};

/// What to tell about.
#[derive(Debug, Args)]
#[command(after_help = "Every export of a server:  nbdbridge info --list nbd://server")]
pub(crate) struct InfoArgs {
    /// A remote export: nbd://HOST:PORT/NAME or nbd+unix:///NAME?socket=PATH
    #[arg(value_name = "SOURCE", value_parser = OsStringValueParser::new().try_map(values::parse_source))]
    pub(crate) source: Source,

    /// All exports of a remote server
    #[arg(short = 'L', long, conflicts_with = "map")]
    pub(crate) list: bool,

    /// Print JSON, for programs
    #[arg(long)]
    pub(crate) json: bool,

    /// Print what is data, zeroes and holes
    #[arg(long)]
    pub(crate) map: bool,

    /// How remote exports are reached.
    #[command(flatten)]
    pub(crate) remote: RemoteArgs,
}
