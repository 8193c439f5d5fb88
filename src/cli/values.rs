//! The values that flags take, and how each is read. Errors are a few words that clap puts behind the flag's name.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;
use std::time::Duration;

use clap::ValueEnum;

use crate::size;

/// Longest path of a Unix socket: `sun_path` less its closing zero.
const MAX_SOCKET_PATH: usize = 107;

/// Longest wait that makes sense; keeps sums of times far from their end.
const MAX_DURATION: Duration = Duration::from_secs(365 * 24 * 3600);

/// Longest name and description, in bytes: NBD's limit on strings.
pub(super) const MAX_STRING: usize = 4096;

/// Where the blocks come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// A raw image or a block device.
    Path(PathBuf),
    /// `mem:SIZE`: a disk of so many bytes in memory.
    Memory(u64),
    /// `null:SIZE`: reads zeroes, forgets writes.
    Null(u64),
}

impl Source {
    /// What it is called outside of this process: a path does not hang on our working folder.
    pub(crate) fn global(&self) -> String {
        match self {
            Source::Path(path) => {
                std::path::absolute(path).unwrap_or_else(|_| path.clone()).display().to_string()
            }
            source => source.to_string(),
        }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Source::Path(path) => path.display().fmt(f),
            Source::Memory(size) => write!(f, "mem:{size}"),
            Source::Null(size) => write!(f, "null:{size}"),
        }
    }
}

/// Reads a SOURCE. A path that begins like a prefix is written `./mem:x`.
pub(super) fn parse_source(text: OsString) -> Result<Source, String> {
    let sized = |prefix: &str| text.to_str().and_then(|text| text.strip_prefix(prefix));
    if let Some(size) = sized("mem:") {
        return size::parse(size).map(Source::Memory).map_err(|error| error.to_string());
    }
    if let Some(size) = sized("null:") {
        return size::parse(size).map(Source::Null).map_err(|error| error.to_string());
    }
    let bytes = text.as_bytes();
    let path = bytes.strip_prefix(b"file:").unwrap_or(bytes);
    if path.is_empty() {
        return Err("an empty path; give an image, a block device, mem:SIZE or null:SIZE".into());
    }
    if path.contains(&0) {
        return Err("a path cannot hold a zero byte".into());
    }
    let scheme_end = path.windows(3).position(|window| window == b"://");
    if scheme_end
        .is_some_and(|end| end > 0 && path[..end].iter().all(|b| b.is_ascii_alphanumeric() || *b == b'+'))
    {
        return Err("URLs are not in this version; give a path, mem:SIZE or null:SIZE".into());
    }
    Ok(Source::Path(PathBuf::from(OsStr::from_bytes(path))))
}

/// Reads `NAME=SOURCE`; the name ends at the first `=`.
pub(super) fn parse_export(text: OsString) -> Result<(String, Source), String> {
    let bytes = text.into_vec();
    let Some(end) = bytes.iter().position(|b| *b == b'=') else {
        return Err("write NAME=SOURCE, as in --export disk1=disk1.img".into());
    };
    let name = String::from_utf8(bytes[..end].to_vec()).map_err(|_| "the name must be UTF-8".to_owned())?;
    let source = parse_source(OsString::from_vec(bytes[end + 1..].to_vec()))?;
    Ok((parse_string(&name)?, source))
}

/// Reads an export's name or description, within NBD's limits.
pub(super) fn parse_string(text: &str) -> Result<String, String> {
    if text.len() > MAX_STRING {
        return Err(format!("longer than the {MAX_STRING} bytes that NBD allows"));
    }
    Ok(text.to_owned())
}

/// An address to listen on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Listen {
    /// A TCP port; port 0 is any free one.
    Tcp {
        /// The address.
        host: Host,
        /// The port.
        port: u16,
    },
    /// A Unix socket.
    Unix(PathBuf),
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Listen::Tcp { host: Host::Address(address), port } => SocketAddr::new(*address, *port).fmt(f),
            Listen::Tcp { host: Host::Name(name), port } => write!(f, "{name}:{port}"),
            Listen::Unix(path) => path.display().fmt(f),
        }
    }
}

/// A host to listen on: an address, or a name that has to be looked up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Host {
    /// A numeric address.
    Address(IpAddr),
    /// A name, as in `localhost`.
    Name(String),
}

impl Host {
    /// The addresses that stand for it; asks the resolver for a name.
    ///
    /// # Errors
    /// The resolver's.
    pub(crate) fn resolve(&self, port: u16) -> io::Result<Vec<SocketAddr>> {
        match self {
            Host::Address(address) => Ok(vec![SocketAddr::new(*address, port)]),
            Host::Name(name) => Ok((name.as_str(), port).to_socket_addrs()?.collect()),
        }
    }
}

/// Reads an address for `--bind`; IPv6 also in brackets.
pub(super) fn parse_host(text: &str) -> Result<Host, String> {
    let bare = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')).unwrap_or(text);
    if let Ok(address) = bare.parse() {
        return Ok(Host::Address(address));
    }
    if text == "*" {
        return Err("write 0.0.0.0 for every IPv4 address, or :: for every address".into());
    }
    let name_byte = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_');
    if text.is_empty() || !text.bytes().all(name_byte) {
        return Err("not an address or host name; the port goes into --port".into());
    }
    Ok(Host::Name(text.to_owned()))
}

/// Reads the path of a Unix socket.
pub(super) fn parse_socket(text: OsString) -> Result<PathBuf, String> {
    match text.len() {
        0 => Err("an empty path".into()),
        len if len > MAX_SOCKET_PATH => {
            Err(format!("{len} bytes are too long for a socket's path (at most {MAX_SOCKET_PATH})"))
        }
        _ => Ok(PathBuf::from(text)),
    }
}

/// Reads a time: seconds, or with `ms`, `s` or `m` behind.
pub(super) fn parse_duration(text: &str) -> Result<Duration, String> {
    let error = || "not a time; write seconds, or as in 500ms, 10s, 2m".to_owned();
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let scale = match unit {
        "ms" => 0.001,
        "" | "s" => 1.0,
        "m" => 60.0,
        _ => return Err(error()),
    };
    let number: f64 = number.parse().map_err(|_| error())?;
    match Duration::try_from_secs_f64(number * scale) {
        Ok(duration) if duration <= MAX_DURATION => Ok(duration),
        _ => Err("more than a year".into()),
    }
}

/// Reads a time that must not be zero.
pub(super) fn parse_positive_duration(text: &str) -> Result<Duration, String> {
    match parse_duration(text)? {
        Duration::ZERO => Err("must be more than 0".into()),
        duration => Ok(duration),
    }
}

/// Reads `--memory-budget`.
pub(super) fn parse_budget(text: &str) -> Result<u64, String> {
    let bytes = size::parse(text).map_err(|error| error.to_string())?;
    if bytes < bridge::admission::MIN_BUDGET_BYTES {
        // A quarter of it must hold the largest request.
        return Err(format!("must be at least {}", size::human(bridge::admission::MIN_BUDGET_BYTES)));
    }
    Ok(bytes)
}

/// An image's format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    /// The bytes of the file are the bytes of the disk.
    Raw,
}

/// Reads `--format`.
pub(super) fn parse_format(text: &str) -> Result<Format, String> {
    match text {
        "raw" => Ok(Format::Raw),
        _ => {
            Err("only raw is in this version; convert with `qemu-img convert -O raw`, or serve with qemu-nbd"
                .into())
        }
    }
}

/// How the image is opened and when a write is answered, in qemu's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum CacheMode {
    /// Through the page cache; durable after a flush
    Writeback,
    /// Past the page cache (O_DIRECT); durable after a flush
    None,
    /// Past the page cache; every write durable before it is answered
    Directsync,
    /// Through the page cache; every write durable before it is answered
    Writethrough,
    /// Through the page cache; flushes are ignored: a crash of the host loses data
    Unsafe,
}

/// What carries requests that would wait for storage.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum AioMode {
    /// io_uring, or threads where the kernel or a container denies it
    Auto,
    /// io_uring (`native`, qemu's word for Linux AIO, means the same here)
    #[value(name = "io_uring", alias = "native")]
    IoUring,
    /// A small pool of threads
    Threads,
}

/// What a client's trim does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum DiscardMode {
    /// It gives the space back (`on` means the same)
    #[value(alias = "on")]
    Unmap,
    /// Nothing (`off` means the same)
    #[value(alias = "off")]
    Ignore,
}

/// What becomes of a write that is all zeroes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum DetectZeroes {
    /// It is stored as it is
    Off,
    /// It becomes zeroes that keep their space
    On,
    /// It becomes zeroes, and gives the space back
    Unmap,
}
