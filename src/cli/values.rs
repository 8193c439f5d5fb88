//! The values that flags take, and how each is read. Errors are a few words that clap puts behind the flag's name.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, ToSocketAddrs};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::ValueEnum;
use nbd_proto::uri::Uri;

use super::remote::{RemoteSource, parse_remote};
use super::source::{ExportArg, ExportOptions};
use crate::os_text::OsText;
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
    /// `null:SIZE`, or `null-co://`: reads zeroes, forgets writes.
    Null(u64),
    /// `nbd://...`, `nbd+unix://...`: another server's export.
    Remote(RemoteSource),
}

impl Source {
    /// Returns the source as it was given; sizes in bytes.
    pub(crate) fn as_given(&self) -> OsText {
        match self {
            Source::Path(path) => path.into(),
            source => source.to_string().into(),
        }
    }

    /// Returns the name of the source outside of this process: a path is absolute.
    pub(crate) fn global(&self) -> OsText {
        match self {
            Source::Path(path) => std::path::absolute(path).unwrap_or_else(|_| path.clone()).into(),
            source => source.to_string().into(),
        }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Source::Path(path) => path.display().fmt(f),
            Source::Memory(size) => write!(f, "mem:{size}"),
            Source::Null(size) => write!(f, "null:{size}"),
            Source::Remote(remote) => remote.fmt(f),
        }
    }
}

/// Reads a SOURCE. A path that begins like a prefix is written `./mem:x`.
pub(crate) fn parse_source(text: OsString) -> Result<Source, String> {
    let sized = |prefix: &str| text.to_str().and_then(|text| text.strip_prefix(prefix));
    if let Some(size) = sized("mem:") {
        return size::parse(size).map(Source::Memory).map_err(|error| error.to_string());
    }
    if let Some(size) = sized("null:") {
        return size::parse(size).map(Source::Null).map_err(|error| error.to_string());
    }
    if let Some(rest) = sized("null-co://").or_else(|| sized("null-aio://")) {
        return parse_null(rest).map(Source::Null);
    }
    if let Some(uri) = text.to_str().filter(|text| Uri::is_meant(text)) {
        return parse_remote(uri).map(Source::Remote);
    }
    let bytes = text.as_bytes();
    let path = bytes.strip_prefix(b"file:").unwrap_or(bytes);
    if path.is_empty() {
        return Err(
            "an empty path; give an image, a block device, nbd://HOST/NAME, mem:SIZE or null:SIZE".into()
        );
    }
    if path.contains(&0) {
        return Err("a path cannot hold a zero byte".into());
    }
    let scheme_end = path.windows(3).position(|window| window == b"://");
    if scheme_end
        .is_some_and(|end| end > 0 && path[..end].iter().all(|b| b.is_ascii_alphanumeric() || *b == b'+'))
    {
        return Err(
            "of URLs only nbd:// and nbd+unix:// are sources; give one, a path, mem:SIZE or null:SIZE".into(),
        );
    }
    Ok(Source::Path(PathBuf::from(OsStr::from_bytes(path))))
}

/// Reads what follows `null-co://`, QEMU's name for a disk of nothing: no size, `SIZE`, or `,size=SIZE`.
fn parse_null(rest: &str) -> Result<u64, String> {
    match rest.strip_prefix(",size=").unwrap_or(rest) {
        // QEMU's default.
        "" => Ok(1 << 30),
        size => size::parse(size).map_err(|error| error.to_string()),
    }
}

/// Reads `NAME=SOURCE[,SETTING]...`; the name ends at the first `=`. A comma that no setting follows is part of SOURCE.
pub(super) fn parse_export(text: OsString) -> Result<ExportArg, String> {
    let bytes = text.into_vec();
    let Some(end) = bytes.iter().position(|b| *b == b'=') else {
        return Err("write NAME=SOURCE, as in --export disk1=disk1.img".into());
    };
    let name = parse_string(OsString::from_vec(bytes[..end].to_vec()))
        .map_err(|why| format!("the name is {why}"))?;
    let mut source = &bytes[end + 1..];
    let mut options = ExportOptions::default();
    while let Some(comma) = source.iter().rposition(|b| *b == b',')
        && let Some(setting) = std::str::from_utf8(&source[comma + 1..]).ok().filter(|text| is_setting(text))
    {
        match setting.strip_prefix("format=") {
            Some(format) => options.format = Some(parse_format(format)?),
            None if setting == "snapshot" => options.snapshot = true,
            None => options.read_only = true,
        }
        source = &source[..comma];
    }
    if options.read_only && options.snapshot {
        return Err("read-only and snapshot exclude each other".into());
    }
    let source = parse_source(OsString::from_vec(source.to_vec()))?;
    Ok(ExportArg { name, description: None, source, options })
}

/// Whether a word behind a comma is a setting of an export.
fn is_setting(word: &str) -> bool {
    word == "read-only" || word == "snapshot" || word.starts_with("format=")
}

/// Reads an export's name or description, within NBD's limits on strings: length and UTF-8.
pub(super) fn parse_string(text: OsString) -> Result<String, String> {
    if text.len() > MAX_STRING {
        return Err(format!("longer than the {MAX_STRING} bytes that NBD allows"));
    }
    text.into_string()
        .map_err(|_| "not UTF-8, and the NBD protocol has no other names and descriptions".to_owned())
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
    /// A Unix socket. One of the abstract namespace begins with a NUL.
    Unix(PathBuf),
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Listen::Tcp { host: Host::Address(address), port } => SocketAddr::new(*address, *port).fmt(f),
            Listen::Tcp { host: Host::Name(name), port } if name.contains(':') => {
                write!(f, "[{name}]:{port}")
            }
            Listen::Tcp { host: Host::Name(name), port } => write!(f, "{name}:{port}"),
            Listen::Unix(path) => match abstract_name(path) {
                Some(name) => write!(f, "@{}", OsStr::from_bytes(name).display()),
                None => path.display().fmt(f),
            },
        }
    }
}

/// Returns the name of a Unix socket in the abstract namespace (unix(7)), without the NUL before it.
pub(crate) fn abstract_name(path: &Path) -> Option<&[u8]> {
    path.as_os_str().as_bytes().strip_prefix(&[0])
}

/// A host to listen on: an address, or a name that has to be looked up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Host {
    /// A numeric address.
    Address(IpAddr),
    /// A name, as in `localhost`, or an IPv6 address with its interface, as in `fe80::1%eth0`.
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
    // The resolver knows the numbers of interfaces.
    if let Some((address, zone)) = bare.split_once('%')
        && address.parse::<Ipv6Addr>().is_ok()
    {
        return match zone {
            "" => Err("the interface is missing after %, as in fe80::1%eth0".into()),
            _ => Ok(Host::Name(bare.to_owned())),
        };
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

/// Reads the path of a Unix socket; `@NAME` is one of the abstract namespace, as systemd and ss(8) write it.
pub(super) fn parse_socket(text: OsString) -> Result<PathBuf, String> {
    match text.len() {
        1 if text == "@" => Err("an abstract socket needs a name, as in @disk".into()),
        0 => Err("an empty path".into()),
        len if len > MAX_SOCKET_PATH => {
            Err(format!("{len} bytes are too long for a socket's path (at most {MAX_SOCKET_PATH})"))
        }
        _ if text.as_bytes()[0] == b'@' => {
            let mut name = text.into_vec();
            name[0] = 0;
            Ok(PathBuf::from(OsString::from_vec(name)))
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

/// Reads `--sector-size`.
pub(super) fn parse_sector_size(text: &str) -> Result<u32, String> {
    let bytes = size::parse(text).map_err(|error| error.to_string())?;
    let known = bridge::partition::SECTOR_SIZES.into_iter().find(|known| u64::from(*known) == bytes);
    known.ok_or_else(|| "sectors have 512, 1024, 2048 or 4096 bytes".into())
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
pub(crate) use bridge::backend::image::ImageFormat as Format;

/// Reads `--format`.
pub(super) fn parse_format(text: &str) -> Result<Format, String> {
    text.parse()
}

/// Which backing files may be opened because an image names them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum AllowBacking {
    /// Those in the folder of the image, and below it
    Folder,
    /// Any: for images from somebody you trust
    Any,
}

impl AllowBacking {
    /// Whether any will do.
    pub(crate) fn any(self) -> bool {
        self == AllowBacking::Any
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
