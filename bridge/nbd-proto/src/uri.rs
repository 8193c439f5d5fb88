//! The address of an export, as NBD's URI specification writes it (NetworkBlockDevice/nbd, `doc/uri.md`):
//! `nbd://HOST[:PORT]/NAME` and `nbd+unix:///NAME?socket=PATH`. Read and written here; resolving a host and
//! connecting are for others. QEMU's older spelling is read, too: `nbd:HOST:PORT[:exportname=NAME]` and
//! `nbd:unix:PATH[:exportname=NAME]`.

use std::ffi::OsString;
use std::fmt::{self, Write};
use std::net::{Ipv6Addr, SocketAddr};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use crate::consts::DEFAULT_PORT;
use crate::wire::parse_string;

/// Scheme of QEMU's older spelling.
const LEGACY: &str = "nbd:";

/// The address of an export.
///
/// ```
/// # use nbd_proto::uri::{Address, Uri};
/// let uri: Uri = "nbd://example.com/hello%20world".parse()?;
/// assert_eq!(uri.address, Address::Tcp { host: "example.com".to_owned(), port: 10809 });
/// assert_eq!(uri.export, "hello world");
/// # Ok::<(), nbd_proto::uri::UriError>(())
/// ```
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Uri {
    /// Where the server is.
    pub address: Address,
    /// Name of the export: a protocol string; `""` is the default export.
    pub export: String,
}

/// Where a server is.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Address {
    /// TCP.
    Tcp {
        /// A name or an address; one of IPv6 without its brackets, and with `%ZONE` where it has one.
        host: String,
        /// The port.
        port: u16,
    },
    /// A Unix socket. One of the abstract namespace begins with a NUL.
    Unix(PathBuf),
}

/// Why something is no address of an export.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UriError {
    /// Neither `nbd://` nor `nbd+unix://`.
    #[error("an NBD URI is nbd://HOST[:PORT]/NAME or nbd+unix:///NAME?socket=PATH")]
    Scheme,
    /// `nbds://`, a user, or `tls-` parameters.
    #[error(
        "{0} asks for TLS, which is not supported; use nbd:// or nbd+unix:// over a path that can be trusted"
    )]
    Tls(String),
    /// The authority cannot be read.
    #[error("{0:?} is not HOST or HOST:PORT (an IPv6 address stands in brackets)")]
    Authority(String),
    /// `nbd:` and no port behind the host.
    #[error(
        "nbd:{0} has no port; write nbd:HOST:PORT, nbd:unix:PATH or nbd://HOST/NAME (a file is ./nbd:{0})"
    )]
    Legacy(String),
    /// A host where a Unix socket was meant.
    #[error(
        "nbd+unix:// takes no host (three slashes, then the export's name): the path goes into ?socket=PATH"
    )]
    HostOfSocket,
    /// `nbd+unix://` without its parameter.
    #[error("nbd+unix:// needs ?socket=PATH")]
    NoSocket,
    /// The socket's path is empty or has a NUL inside.
    #[error("?socket= is no path")]
    BadSocket,
    /// `%` without two hexadecimal digits after it.
    #[error("% is not followed by two hexadecimal digits in {0:?}")]
    Escape(String),
    /// The export's name is no protocol string.
    #[error("the export's name is longer than 4096 bytes, not UTF-8 or has a NUL")]
    Name,
    /// A parameter that has no meaning here.
    #[error("unknown parameter {0:?}")]
    Parameter(String),
    /// A parameter that is given twice.
    #[error("parameter {0:?} is given twice")]
    Twice(String),
    /// `#`, which has no meaning here.
    #[error("# has no meaning in an NBD URI; in a name or path write %23")]
    Fragment,
}

impl Uri {
    /// An export on a TCP port.
    pub fn tcp(address: SocketAddr, export: &str) -> Self {
        let host = match address {
            SocketAddr::V6(v6) if v6.scope_id() != 0 => format!("{}%{}", v6.ip(), v6.scope_id()),
            other => other.ip().to_string(),
        };
        Self { address: Address::Tcp { host, port: address.port() }, export: export.to_owned() }
    }

    /// An export on a Unix socket. Clients read the path from their own folder, so give an absolute one.
    pub fn unix(socket: &Path, export: &str) -> Self {
        Self { address: Address::Unix(socket.to_owned()), export: export.to_owned() }
    }

    /// Returns true if `text` means to be an address of this kind, well-formed or not: it has the scheme of one. `nbd:NAME`
    /// without another colon is the name of a file.
    pub fn is_meant(text: &str) -> bool {
        let legacy = text.strip_prefix(LEGACY).is_some_and(|rest| rest.contains(':'));
        legacy
            || text.split_once("://").is_some_and(|(scheme, _)| {
                let scheme = scheme.to_ascii_lowercase();
                scheme == "nbd"
                    || scheme == "nbds"
                    || scheme.starts_with("nbd+")
                    || scheme.starts_with("nbds+")
            })
    }
}

impl FromStr for Uri {
    type Err = UriError;

    fn from_str(text: &str) -> Result<Self, UriError> {
        if let Some(rest) = text.strip_prefix(LEGACY).filter(|rest| !rest.starts_with("//")) {
            return legacy(rest);
        }
        let (scheme, rest) = text.split_once("://").ok_or(UriError::Scheme)?;
        let scheme = scheme.to_ascii_lowercase();
        let unix = match scheme.as_str() {
            "nbd" => false,
            "nbd+unix" => true,
            "nbds" | "nbds+unix" => return Err(UriError::Tls(format!("{scheme}://"))),
            _ => return Err(UriError::Scheme),
        };
        if rest.contains('#') {
            return Err(UriError::Fragment);
        }
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
        let export = decode(path)?;
        let export = parse_string(&export).ok_or(UriError::Name)?.to_owned();
        let socket = socket_parameter(query, unix)?;
        let address = match socket {
            Some(_) if !authority.is_empty() => return Err(UriError::HostOfSocket),
            Some(socket) => Address::Unix(socket),
            None if unix => return Err(UriError::NoSocket),
            None => tcp_address(authority)?,
        };
        Ok(Self { address, export })
    }
}

/// Reads what follows `nbd:` in QEMU's older spelling. Nothing in it is escaped.
fn legacy(text: &str) -> Result<Uri, UriError> {
    let (place, export) = text.split_once(":exportname=").unwrap_or((text, ""));
    let export = parse_string(export.as_bytes()).ok_or(UriError::Name)?.to_owned();
    let address = match place.strip_prefix("unix:") {
        Some(path) => Address::Unix(socket_path(path.as_bytes().to_vec())?),
        None => {
            // QEMU wants the port; a host alone looks like the name of a file.
            let port = place.rsplit_once(':').map_or("", |(_, port)| port);
            if port.is_empty() || port.contains(']') {
                return Err(UriError::Legacy(place.to_owned()));
            }
            tcp_address(place)?
        }
    };
    Ok(Uri { address, export })
}

/// The path of a socket. A NUL at its start is the abstract namespace.
fn socket_path(path: Vec<u8>) -> Result<PathBuf, UriError> {
    if path.is_empty() || path[1..].contains(&0) || path == [0] {
        return Err(UriError::BadSocket);
    }
    Ok(PathBuf::from(OsString::from_vec(path)))
}

/// The path of a Unix socket, if there is one; it is the only parameter.
fn socket_parameter(query: &str, unix: bool) -> Result<Option<PathBuf>, UriError> {
    let mut socket = None;
    for parameter in query.split('&').filter(|parameter| !parameter.is_empty()) {
        let (key, value) = parameter.split_once('=').unwrap_or((parameter, ""));
        let key = String::from_utf8_lossy(&decode(key)?).into_owned();
        match key.as_str() {
            "socket" if unix => {
                let mut path = decode(value)?;
                // As people write the abstract namespace; a path that begins so has %40, or ./ before it.
                if value.starts_with('@') {
                    path[0] = 0;
                }
                if socket.replace(socket_path(path)?).is_some() {
                    return Err(UriError::Twice(key));
                }
            }
            tls if tls.starts_with("tls-") => return Err(UriError::Tls(key)),
            _ => return Err(UriError::Parameter(key)),
        }
    }
    Ok(socket)
}

/// `HOST`, `HOST:PORT`, `[IPV6]` or `[IPV6]:PORT`; nothing is this host.
fn tcp_address(authority: &str) -> Result<Address, UriError> {
    let bad = || UriError::Authority(authority.to_owned());
    if let Some((user, _)) = authority.split_once('@') {
        return Err(UriError::Tls(format!("a user name ({user}@)")));
    }
    let (host, port) = if let Some(rest) = authority.strip_prefix('[') {
        let (host, after) = rest.split_once(']').ok_or_else(bad)?;
        let port = if after.is_empty() { "" } else { after.strip_prefix(':').ok_or_else(bad)? };
        (ipv6(host)?.ok_or_else(bad)?, port)
    } else {
        let (host, port) = authority.split_once(':').unwrap_or((authority, ""));
        // Only an address in brackets has colons, so that what is printed reads the same.
        let host = String::from_utf8(decode(host)?).map_err(|_| bad())?;
        if host.contains(':') {
            return Err(bad());
        }
        (host, port)
    };
    // `parse` would take a sign.
    if !port.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(bad());
    }
    let port = if port.is_empty() { DEFAULT_PORT } else { port.parse().map_err(|_| bad())? };
    if port == 0 || host.contains(['\0', '[', ']', '@', '/']) {
        return Err(bad());
    }
    let host = if host.is_empty() { "localhost".to_owned() } else { host };
    Ok(Address::Tcp { host, port })
}

/// Reads `ADDRESS` or `ADDRESS%ZONE`; `None` where it is no address of IPv6.
fn ipv6(text: &str) -> Result<Option<String>, UriError> {
    let (address, zone) = text.split_once('%').map_or((text, None), |(address, zone)| (address, Some(zone)));
    if address.parse::<Ipv6Addr>().is_err() {
        return Ok(None);
    }
    let Some(zone) = zone else {
        return Ok(Some(address.to_owned()));
    };
    // RFC 6874 escapes the percent sign before a zone; people write it as ip(8) shows it.
    let zone = zone.strip_prefix("25").filter(|zone| !zone.is_empty()).unwrap_or(zone);
    let zone = String::from_utf8(decode(zone)?).ok().filter(|zone| !zone.is_empty());
    Ok(zone.map(|zone| format!("{address}%{zone}")))
}

fn decode(text: &str) -> Result<Vec<u8>, UriError> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        rest = after;
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let escaped = after.first_chunk::<2>().and_then(|&[high, low]| {
            let digit = |byte: u8| char::from(byte).to_digit(16);
            u8::try_from(digit(high)? << 4 | digit(low)?).ok()
        });
        bytes.push(escaped.ok_or_else(|| UriError::Escape(text.to_owned()))?);
        rest = &after[2..];
    }
    Ok(bytes)
}

impl fmt::Display for Uri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.address {
            Address::Tcp { host, port } => {
                f.write_str("nbd://")?;
                if host.contains(':') {
                    // RFC 6874: the percent sign before a zone is itself encoded.
                    f.write_char('[')?;
                    encode(f, host.as_bytes(), b":")?;
                    f.write_char(']')?;
                } else {
                    encode(f, host.as_bytes(), b"")?;
                }
                if *port != DEFAULT_PORT {
                    write!(f, ":{port}")?;
                }
                f.write_char('/')?;
                write_name(f, &self.export)
            }
            Address::Unix(socket) => {
                f.write_str("nbd+unix:///")?;
                write_name(f, &self.export)?;
                f.write_str("?socket=")?;
                match socket.as_os_str().as_bytes() {
                    // The abstract namespace, as people write it.
                    [0, name @ ..] => {
                        f.write_char('@')?;
                        encode(f, name, b"/")
                    }
                    path => encode(f, path, b"/"),
                }
            }
        }
    }
}

/// A slash may stand in a name, but not at its start: clients skip what looks like more of the separator.
fn write_name(f: &mut fmt::Formatter<'_>, name: &str) -> fmt::Result {
    let rest = name.trim_start_matches('/');
    for _ in rest.len()..name.len() {
        f.write_str("%2F")?;
    }
    encode(f, rest.as_bytes(), b"/")
}

/// RFC 3986: all but unreserved bytes (and `also`) as `%XX`.
fn encode(f: &mut fmt::Formatter<'_>, bytes: &[u8], also: &[u8]) -> fmt::Result {
    for &byte in bytes {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) || also.contains(&byte) {
            f.write_char(char::from(byte))?;
        } else {
            write!(f, "%{byte:02X}")?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
