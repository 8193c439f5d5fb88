//! `nbdbridge net`: the flags of the NBD server, with the letters of qemu-nbd, and the typed values made of them.

use std::collections::HashSet;
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use clap::builder::{OsStringValueParser, TypedValueParser};
use nbd_proto::DEFAULT_PORT;

use super::also::Writers;
use super::fuse::AlsoFuse;
use super::process::ProcessFlags;
use super::source::{ExportArg, ExportOptions, SourceFlags};
use super::values::{self, Host, Listen, Source};
use super::{DoorArgs, ServeArgs, UsageError};
use crate::net::Settings;

/// What the NBD server was asked to do.
#[derive(Debug)]
pub(crate) struct NetArgs {
    /// Where to listen, as far as flags say it: see [`NetArgs::listen_or_default`].
    pub(crate) listen: Vec<Listen>,
    /// Clients at the same time; None is as many as come.
    pub(crate) shared: Option<NonZeroU32>,
    /// Exit when the last client has left.
    pub(crate) once: bool,
    /// How long a handshake may take; None is as long as it likes.
    pub(crate) handshake_limit: Option<Duration>,
    /// Requests in flight on one connection, at least one.
    pub(crate) max_in_flight: u32,
    /// Bytes that all connections together may hold.
    pub(crate) memory_budget: u64,
    /// How long a client may leave an answer unread; not zero.
    pub(crate) send_timeout: Duration,
    /// Offer `qemu:allocation-depth`.
    pub(crate) allocation_depth: bool,
}

impl NetArgs {
    /// Where to listen when no socket was passed in: what the flags say, else the usual port on this host.
    pub(crate) fn listen_or_default(&self) -> Vec<Listen> {
        if self.listen.is_empty() {
            vec![Listen::Tcp { host: default_host(), port: DEFAULT_PORT }]
        } else {
            self.listen.clone()
        }
    }
}

fn default_host() -> Host {
    Host::Address(std::net::Ipv4Addr::LOCALHOST.into())
}

/// The flags of `nbdbridge net` as clap reads them.
#[derive(Debug, Args)]
#[command(
    next_line_help = false,
    after_help = "SIZE and BYTES take K, M, G and T (powers of 1024), SECONDS also 500ms, 10s or 2m.\n\
                  The flags of qemu-nbd that are not listed here are answered with the way to get there.\n\
                  NBDBRIDGE_LOG (as in debug, or bridge=trace) says what is logged, and overrides -v."
)]
pub(super) struct NetCommand {
    /// What to serve: the path of a raw image or block device, file:PATH, nbd://HOST:PORT/NAME,
    /// nbd+unix:///NAME?socket=PATH, mem:SIZE or null:SIZE
    #[arg(value_name = "SOURCE", value_parser = OsStringValueParser::new().try_map(values::parse_source))]
    source: Option<Source>,

    /// Serve SOURCE under NAME too; repeat it to serve many
    ///
    /// Settings of this export alone may follow: read-only, snapshot, format=FORMAT, as in
    /// golden=golden.qcow2,format=qcow2,snapshot. --read-only, --snapshot and --format are for all exports.
    #[arg(long, value_name = "NAME=SOURCE[,SETTING]...",
          value_parser = OsStringValueParser::new().try_map(values::parse_export))]
    export: Vec<ExportArg>,

    #[command(flatten)]
    net: NetFlags,

    #[command(flatten)]
    also: AlsoFuse,

    #[command(flatten)]
    writers: Writers,

    #[command(flatten)]
    image: SourceFlags,

    #[command(flatten)]
    process: ProcessFlags,
}

impl NetCommand {
    /// Checks what clap cannot, and makes the typed values.
    pub(super) fn into_args(self) -> Result<ServeArgs, UsageError> {
        let net = self.net;
        if self.source.is_none() && (net.export_name.is_some() || net.description.is_some()) {
            let message = "--export-name and --description are for SOURCE, which is missing (try --help)";
            return Err(UsageError::new(message));
        }
        let first = self.source.map(|source| net.name(source));
        let exports: Vec<ExportArg> = first.into_iter().chain(self.export).collect();
        if exports.is_empty() {
            let message =
                "nothing to serve; give the path of an image, mem:SIZE, or --export NAME=SOURCE (try --help)";
            return Err(UsageError::new(message));
        }
        let mut names = HashSet::new();
        if let Some(twice) = exports.iter().find(|export| !names.insert(export.name.as_str())) {
            return Err(UsageError::new(format!(
                "two exports are named `{}`; give each its own name with --export NAME=SOURCE",
                twice.name
            )));
        }
        Ok(ServeArgs {
            source: self.image.into_args(&exports)?,
            exports,
            doors: std::iter::once(DoorArgs::Net(net.into_args())).chain(self.also.into_door()).collect(),
            multi_writer: self.writers.multi_writer,
            process: self.process.into_args(),
        })
    }
}

/// The flags of the server itself.
#[derive(Debug, Args)]
#[command(next_help_heading = "Connections")]
pub(super) struct NetFlags {
    /// Address to listen on; 0.0.0.0 for every IPv4 address, :: for every address [default: 127.0.0.1]
    ///
    /// Repeat it to listen on several. A link-local IPv6 address needs its interface, as in fe80::1%eth0.
    #[arg(short, long, value_name = "ADDR", value_parser = values::parse_host)]
    bind: Vec<Host>,

    /// TCP port to listen on; 0 for any free one [default: 10809]
    #[arg(short, long, value_name = "PORT")]
    port: Option<u16>,

    /// Unix socket to listen on (@NAME for an abstract one); TCP as well only where --bind or --port is given
    #[arg(short = 'k', long, value_name = "PATH",
          value_parser = OsStringValueParser::new().try_map(values::parse_socket))]
    socket: Option<PathBuf>,

    /// Name of SOURCE's export [default: the empty name]
    #[arg(short = 'x', long, value_name = "NAME",
          value_parser = OsStringValueParser::new().try_map(values::parse_string))]
    export_name: Option<String>,

    /// Describe SOURCE's export to people
    #[arg(short = 'D', long, value_name = "TEXT",
          value_parser = OsStringValueParser::new().try_map(values::parse_string))]
    description: Option<String>,

    /// Serve at most N clients at the same time; 0 for as many as come
    #[arg(short = 'e', long, value_name = "N", default_value = "0")]
    shared: u32,

    /// Go on when the last client has left: the default, accepted for qemu-nbd's sake
    #[arg(short = 't', long, conflicts_with = "once")]
    persistent: bool,

    /// Exit when the last client has left
    #[arg(long)]
    once: bool,

    /// Offer clients the context qemu:allocation-depth: which layer of an overlay holds what
    #[arg(short = 'A', long)]
    allocation_depth: bool,

    /// Time for a client's handshake; 0 for no limit
    #[arg(long, value_name = "SECONDS", default_value = "10", value_parser = values::parse_duration)]
    handshake_limit: Duration,

    /// Close a connection whose client has not read its answers for so long
    #[arg(long, value_name = "SECONDS", default_value = "30", value_parser = values::parse_positive_duration)]
    send_timeout: Duration,

    /// Requests in flight on one connection at most
    #[arg(long, value_name = "N", default_value = "128", value_parser = clap::value_parser!(u32).range(1..=i64::from(Settings::MAX_IN_FLIGHT)))]
    max_in_flight: u32,

    /// Bytes that requests of all connections may hold at most; 128M or more, and images a quarter of it beside
    #[arg(long, value_name = "SIZE", default_value = "256M", value_parser = values::parse_budget)]
    memory_budget: u64,
}

impl NetFlags {
    /// The export that `source` is, under the name that the flags give it.
    pub(super) fn name(&self, source: Source) -> ExportArg {
        let name = self.export_name.clone().unwrap_or_default();
        let options = ExportOptions::default();
        ExportArg { name, description: self.description.clone(), source, options }
    }

    /// The typed values.
    pub(super) fn into_args(self) -> NetArgs {
        let unix = self.socket.map(Listen::Unix);
        let mut hosts = self.bind;
        if hosts.is_empty() && self.port.is_some() {
            hosts.push(default_host());
        }
        let port = self.port.unwrap_or(DEFAULT_PORT);
        let tcp = hosts.into_iter().map(|host| Listen::Tcp { host, port });
        NetArgs {
            listen: unix.into_iter().chain(tcp).collect(),
            shared: NonZeroU32::new(self.shared),
            once: self.once,
            handshake_limit: Some(self.handshake_limit).filter(|limit| !limit.is_zero()),
            max_in_flight: self.max_in_flight,
            memory_budget: self.memory_budget,
            send_timeout: self.send_timeout,
            allocation_depth: self.allocation_depth,
        }
    }
}
