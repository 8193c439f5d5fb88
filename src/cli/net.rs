//! `nbdbridge net`: the flags, with the letters of qemu-nbd, and the typed values made of them.

use std::collections::HashSet;
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::time::Duration;

use clap::builder::{OsStringValueParser, TypedValueParser};
use clap::{ArgAction, Args};

use super::UsageError;
use super::values::{self, AioMode, CacheMode, DiscardMode, Format, Host, Listen, Source};
use crate::net::Settings;
use crate::size;

/// The port that the protocol's registration names.
pub(crate) const DEFAULT_PORT: u16 = 10809;

/// What `nbdbridge net` was asked to do. All but `exports` hold for every export.
#[derive(Debug)]
pub(crate) struct NetArgs {
    /// What to serve, SOURCE first; at least one, no name twice.
    pub(crate) exports: Vec<ExportArg>,
    /// Where to listen, as far as flags say it: see [`NetArgs::listen_or_default`].
    pub(crate) listen: Vec<Listen>,
    /// Clients at the same time; None is as many as come.
    pub(crate) shared: Option<NonZeroU32>,
    /// The images' format.
    pub(crate) format: Format,
    /// No client may change anything.
    pub(crate) read_only: bool,
    /// The first byte that is served.
    pub(crate) offset: u64,
    /// Exit when the last client has left.
    pub(crate) once: bool,
    /// Go to the background once ready.
    pub(crate) fork: bool,
    /// Where the process number goes.
    pub(crate) pid_file: Option<PathBuf>,
    /// How long a handshake may take; None is as long as it likes.
    pub(crate) handshake_limit: Option<Duration>,
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
    /// How often `-v` was given.
    pub(crate) verbose: u8,
    /// Size of an image that is made where the path of an export leads nowhere.
    pub(crate) create: Option<u64>,
    /// Worker threads, at least one.
    pub(crate) workers: usize,
    /// Requests in flight on one connection, at least one.
    pub(crate) max_in_flight: u32,
    /// Bytes that all connections together may hold.
    pub(crate) memory_budget: u64,
    /// How long a client may leave an answer unread; not zero.
    pub(crate) send_timeout: Duration,
    /// How long requests in flight may take at the end.
    pub(crate) drain_timeout: Duration,
    /// Take qemu's locks on images.
    pub(crate) lock: bool,
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

/// The flags as clap reads them.
#[derive(Debug, Args)]
#[command(
    next_line_help = false,
    after_help = "SIZE and BYTES take K, M, G and T (powers of 1024), SECONDS also 500ms, 10s or 2m.\n\
                  The flags of qemu-nbd that are not listed here are answered with the way to get there.\n\
                  NBDBRIDGE_LOG (as in debug, or bridge=trace) says what is logged, and overrides -v."
)]
pub(super) struct NetFlags {
    /// What to serve: the path of a raw image or block device, file:PATH, mem:SIZE or null:SIZE
    #[arg(value_name = "SOURCE", value_parser = OsStringValueParser::new().try_map(values::parse_source))]
    source: Option<Source>,

    /// Serve SOURCE under NAME too; repeat it to serve many
    #[arg(long, value_name = "NAME=SOURCE",
          value_parser = OsStringValueParser::new().try_map(values::parse_export))]
    export: Vec<(String, Source)>,

    /// Address to listen on; 0.0.0.0 for every IPv4 address, :: for every address [default: 127.0.0.1]
    #[arg(short, long, value_name = "ADDR", value_parser = values::parse_host, help_heading = CONNECTION)]
    bind: Option<Host>,

    /// TCP port to listen on; 0 for any free one [default: 10809]
    #[arg(short, long, value_name = "PORT", help_heading = CONNECTION)]
    port: Option<u16>,

    /// Unix socket to listen on; TCP as well only where --bind or --port is given
    #[arg(short = 'k', long, value_name = "PATH",
          value_parser = OsStringValueParser::new().try_map(values::parse_socket), help_heading = CONNECTION)]
    socket: Option<PathBuf>,

    /// Name of SOURCE's export [default: the empty name]
    #[arg(short = 'x', long, value_name = "NAME", value_parser = values::parse_string,
          help_heading = CONNECTION)]
    export_name: Option<String>,

    /// Describe SOURCE's export to people
    #[arg(short = 'D', long, value_name = "TEXT", value_parser = values::parse_string,
          help_heading = CONNECTION)]
    description: Option<String>,

    /// Serve at most N clients at the same time; 0 for as many as come
    #[arg(short = 'e', long, value_name = "N", default_value = "0", help_heading = CONNECTION)]
    shared: u32,

    /// Go on when the last client has left: the default, accepted for qemu-nbd's sake
    #[arg(short = 't', long, conflicts_with = "once", help_heading = CONNECTION)]
    persistent: bool,

    /// Exit when the last client has left
    #[arg(long, help_heading = CONNECTION)]
    once: bool,

    /// Time for a client's handshake; 0 for no limit
    #[arg(long, value_name = "SECONDS", default_value = "10", value_parser = values::parse_duration,
          help_heading = CONNECTION)]
    handshake_limit: Duration,

    /// Close a connection whose client has not read its answers for so long
    #[arg(long, value_name = "SECONDS", default_value = "30", value_parser = values::parse_positive_duration,
          help_heading = CONNECTION)]
    send_timeout: Duration,

    /// Image format; only raw in this version
    #[arg(short, long, value_name = "FORMAT", default_value = "raw", value_parser = values::parse_format,
          hide_default_value = true, help_heading = IMAGE)]
    format: Format,

    /// Let no client change anything
    #[arg(short, long, help_heading = IMAGE)]
    read_only: bool,

    /// Serve from this byte of the image on
    #[arg(short, long, value_name = "BYTES", default_value = "0", value_parser = size::parse,
          help_heading = IMAGE)]
    offset: u64,

    /// Make a raw image of this size where the path leads nowhere; one that exists is served as it is
    #[arg(long, value_name = "SIZE", value_parser = size::parse, help_heading = IMAGE)]
    create: Option<u64>,

    /// How the image is opened, and when a write is answered
    #[arg(long, value_name = "MODE", default_value = "writeback", help_heading = IMAGE)]
    cache: CacheMode,

    /// The same as --cache none
    #[arg(short, long, conflicts_with = "cache", help_heading = IMAGE)]
    nocache: bool,

    /// What carries requests that would wait for storage
    #[arg(long, value_name = "MODE", default_value = "auto", help_heading = IMAGE)]
    aio: AioMode,

    /// What a client's trim does
    #[arg(long, value_name = "MODE", default_value = "unmap", help_heading = IMAGE)]
    discard: DiscardMode,

    /// Accepted for qemu-nbd's sake: only off
    #[arg(long, value_name = "MODE", value_parser = values::parse_detect_zeroes, hide = true)]
    detect_zeroes: Option<()>,

    /// Limit what clients do, as in iops-total=1000,bps-read=50M; qemu's key names
    #[arg(long, value_name = "KEY=VALUE,...", value_delimiter = ',', help_heading = IMAGE)]
    throttle: Vec<String>,

    /// Make requests fail, come late or hang, to test clients: op=read,delay-ms=50,error-rate=0.01,seed=7
    ///
    /// Each --fault is a rule of its own. Keys: seed, op, offset, len, errno, error-rate, error-every, short-rate,
    /// delay-ms, delay-rate, hang-rate, hang-every.
    #[arg(long, value_name = "KEY=VALUE,...", help_heading = IMAGE)]
    fault: Vec<String>,

    /// Take no locks on the image: another writer may destroy it
    #[arg(long, help_heading = IMAGE)]
    no_lock: bool,

    /// Go to the background once clients can connect
    #[arg(long, help_heading = PROCESS)]
    fork: bool,

    /// Write the process number to this file, and remove it at the end
    #[arg(long, value_name = "PATH", help_heading = PROCESS)]
    pid_file: Option<PathBuf>,

    /// Worker threads [default: one for each core]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024),
          help_heading = PROCESS)]
    workers: Option<u16>,

    /// Requests in flight on one connection at most
    #[arg(long, value_name = "N", default_value = "128", value_parser = clap::value_parser!(u32).range(1..=i64::from(Settings::MAX_IN_FLIGHT)),
          help_heading = PROCESS)]
    max_in_flight: u32,

    /// Bytes that requests of all connections may hold at most; 128M or more
    #[arg(long, value_name = "SIZE", default_value = "256M", value_parser = values::parse_budget,
          help_heading = PROCESS)]
    memory_budget: u64,

    /// At the end, wait so long for requests in flight
    #[arg(long, value_name = "SECONDS", default_value = "10", value_parser = values::parse_duration,
          help_heading = PROCESS)]
    drain_timeout: Duration,

    /// Log more: -v connections, -vv handshakes, -vvv requests
    #[arg(short, long, action = ArgAction::Count, help_heading = PROCESS)]
    verbose: u8,
}

const CONNECTION: &str = "Connections";
const IMAGE: &str = "Image";
const PROCESS: &str = "Process";

impl NetFlags {
    /// Checks what clap cannot, and makes the typed values.
    pub(super) fn into_args(self) -> Result<NetArgs, UsageError> {
        let listen = self.listen();
        let exports = exports(self.source, self.export_name, self.description, self.export)?;
        let on_disk = |export: &ExportArg| matches!(export.source, Source::Path(_));
        if self.create.is_some() && !exports.iter().any(on_disk) {
            return Err(UsageError::new("--create makes an image at a path, and no path was given"));
        }
        let cores = || std::thread::available_parallelism().map_or(1, usize::from);
        Ok(NetArgs {
            exports,
            listen,
            shared: NonZeroU32::new(self.shared),
            format: self.format,
            read_only: self.read_only,
            offset: self.offset,
            once: self.once,
            fork: self.fork,
            pid_file: self.pid_file,
            handshake_limit: Some(self.handshake_limit).filter(|limit| !limit.is_zero()),
            cache: if self.nocache { CacheMode::None } else { self.cache },
            aio: self.aio,
            discard: self.discard,
            throttle: (!self.throttle.is_empty()).then(|| self.throttle.join(",")),
            faults: self.fault,
            verbose: self.verbose,
            create: self.create,
            workers: self.workers.map_or_else(cores, usize::from),
            max_in_flight: self.max_in_flight,
            memory_budget: self.memory_budget,
            send_timeout: self.send_timeout,
            drain_timeout: self.drain_timeout,
            lock: !self.no_lock,
        })
    }

    fn listen(&self) -> Vec<Listen> {
        let unix = self.socket.clone().map(Listen::Unix);
        let tcp = (self.bind.is_some() || self.port.is_some()).then(|| Listen::Tcp {
            host: self.bind.clone().unwrap_or_else(default_host),
            port: self.port.unwrap_or(DEFAULT_PORT),
        });
        unix.into_iter().chain(tcp).collect()
    }
}

fn exports(
    source: Option<Source>,
    name: Option<String>,
    description: Option<String>,
    more: Vec<(String, Source)>,
) -> Result<Vec<ExportArg>, UsageError> {
    if source.is_none() && (name.is_some() || description.is_some()) {
        let message = "--export-name and --description are for SOURCE, which is missing (try --help)";
        return Err(UsageError::new(message));
    }
    let first = source.map(|source| ExportArg { name: name.unwrap_or_default(), description, source });
    let more = more.into_iter().map(|(name, source)| ExportArg { name, description: None, source });
    let exports: Vec<ExportArg> = first.into_iter().chain(more).collect();
    if exports.is_empty() {
        let message =
            "nothing to serve; give the path of an image, mem:SIZE, or --export NAME=SOURCE (try --help)";
        return Err(UsageError::new(message));
    }
    let mut names = HashSet::new();
    match exports.iter().find(|export| !names.insert(export.name.as_str())) {
        Some(twice) => Err(UsageError::new(format!(
            "two exports are named `{}`; give each its own name with --export NAME=SOURCE",
            twice.name
        ))),
        None => Ok(exports),
    }
}
