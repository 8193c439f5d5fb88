//! The address of an export, as NBD's URI specification writes it (NetworkBlockDevice/nbd, `doc/uri.md`):
//! `nbd://HOST[:PORT]/NAME` and `nbd+unix:///NAME?socket=PATH`. Only written here, not read.

use std::fmt::Write;
use std::net::SocketAddr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use crate::cli::DEFAULT_PORT;

/// The URI of an export on a TCP port.
pub(crate) fn tcp(address: SocketAddr, name: &str) -> String {
    let mut uri = match address {
        SocketAddr::V4(v4) => format!("nbd://{}", v4.ip()),
        // RFC 6874: the percent sign before a zone is itself encoded.
        SocketAddr::V6(v6) if v6.scope_id() != 0 => format!("nbd://[{}%25{}]", v6.ip(), v6.scope_id()),
        SocketAddr::V6(v6) => format!("nbd://[{}]", v6.ip()),
    };
    if address.port() != DEFAULT_PORT {
        let _ = write!(uri, ":{}", address.port());
    }
    uri.push('/');
    push_name(&mut uri, name);
    uri
}

/// The URI of an export on a Unix socket. Clients read the path from their own folder, so give an absolute one.
pub(crate) fn unix(socket: &Path, name: &str) -> String {
    let mut uri = String::from("nbd+unix:///");
    push_name(&mut uri, name);
    uri.push_str("?socket=");
    push_encoded(&mut uri, socket.as_os_str().as_bytes(), b"/");
    uri
}

/// The value of a key in a query, as form data has it.
pub(crate) fn query_value(text: &str) -> String {
    let mut value = String::new();
    push_encoded(&mut value, text.as_bytes(), b"");
    value
}

/// A slash may stand in a name, but not at its start: clients skip what looks like more of the separator.
fn push_name(uri: &mut String, name: &str) {
    let rest = name.trim_start_matches('/');
    for _ in rest.len()..name.len() {
        uri.push_str("%2F");
    }
    push_encoded(uri, rest.as_bytes(), b"/");
}

/// RFC 3986: all but unreserved bytes (and `also`) as `%XX`.
fn push_encoded(uri: &mut String, bytes: &[u8], also: &[u8]) {
    for &byte in bytes {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) || also.contains(&byte) {
            uri.push(char::from(byte));
        } else {
            let _ = write!(uri, "%{byte:02X}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::OsStr;

    #[test]
    fn tcp_addresses() {
        for (address, name, uri) in [
            ("127.0.0.1:10809", "", "nbd://127.0.0.1/"),
            ("127.0.0.1:10810", "", "nbd://127.0.0.1:10810/"),
            ("0.0.0.0:1", "disk one", "nbd://0.0.0.0:1/disk%20one"),
            ("[::1]:10809", "a/b", "nbd://[::1]/a/b"),
            ("[fe80::1%3]:9", "/x", "nbd://[fe80::1%253]:9/%2Fx"),
            ("1.2.3.4:5", "ä?#&=%+", "nbd://1.2.3.4:5/%C3%A4%3F%23%26%3D%25%2B"),
        ] {
            assert_eq!(tcp(address.parse().unwrap(), name), uri);
        }
    }

    #[test]
    fn unix_sockets() {
        for (socket, name, uri) in [
            (&b"/run/nbd.sock"[..], "", "nbd+unix:///?socket=/run/nbd.sock"),
            (b"/tmp/a b&c", "d", "nbd+unix:///d?socket=/tmp/a%20b%26c"),
            (b"/tmp/\xff+", "//", "nbd+unix:///%2F%2F?socket=/tmp/%FF%2B"),
        ] {
            assert_eq!(unix(Path::new(OsStr::from_bytes(socket)), name), uri);
        }
    }
}
