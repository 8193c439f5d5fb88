//! Connecting to a server, as a client that blocks: there is nothing else to do before the connections are there.

use std::io;
use std::net::{TcpStream, ToSocketAddrs};
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use nbd_proto::uri::{Address, Uri};
use nbd_proto::{ClientError, ClientHandshake, ClientStep, Negotiated, ReplyStyle, Wants};

use super::socket::Socket;

/// For connecting, and again for the handshake.
const LIMIT: Duration = Duration::from_secs(10);

/// A connection in its transmission phase.
pub(super) struct Connected {
    pub(super) socket: Socket,
    pub(super) negotiated: Negotiated,
}

/// Connects and shakes hands.
///
/// # Errors
/// One line that names the server and what it did.
pub(super) fn connect(uri: &Uri, style: ReplyStyle) -> Result<Connected> {
    let socket = Socket::new(dial(&uri.address)?).context("cannot set up a socket")?;
    let negotiated = shake_hands(&socket, uri, style).with_context(|| uri.to_string())?;
    Ok(Connected { socket, negotiated })
}

fn dial(address: &Address) -> Result<OwnedFd> {
    match address {
        Address::Tcp { host, port } => {
            let name = || format!("cannot connect to {host} port {port}");
            let stream = dial_tcp(host, *port).with_context(name)?;
            // A request that waits for the answers before it is what this must not measure.
            stream.set_nodelay(true).with_context(name)?;
            Ok(stream.into())
        }
        Address::Unix(path) => dial_unix(path)
            .map(OwnedFd::from)
            .with_context(|| format!("cannot connect to {}", path.as_os_str().as_bytes().escape_ascii())),
    }
}

/// Tries every address of the host.
fn dial_tcp(host: &str, port: u16) -> io::Result<TcpStream> {
    let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
    for address in (host, port).to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, LIMIT) {
            Ok(stream) => return Ok(stream),
            Err(error) => last = error,
        }
    }
    Err(last)
}

fn dial_unix(path: &Path) -> io::Result<UnixStream> {
    match path.as_os_str().as_bytes() {
        [0, name @ ..] => UnixStream::connect_addr(&SocketAddr::from_abstract_name(name)?),
        _ => UnixStream::connect(path),
    }
}

fn shake_hands(socket: &Socket, uri: &Uri, style: ReplyStyle) -> Result<Negotiated> {
    let mut handshake = ClientHandshake::new(Wants { style, ..Wants::export(&uri.export) });
    let mut buf = vec![0; 16 << 10];
    let mut out = Vec::new();
    let deadline = Instant::now() + LIMIT;
    loop {
        if Instant::now() > deadline {
            bail!("the server does not finish its handshake within {} s", LIMIT.as_secs());
        }
        let received = match socket.receive(&mut buf, true) {
            Ok(Some(0)) => return Err(handshake.hung_up().into()),
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {
                return Err(handshake.hung_up().into());
            }
            Ok(received) => received.unwrap_or(0),
            Err(error) => return Err(error).context("cannot receive"),
        };
        let (taken, step) = handshake.advance(&buf[..received], &mut out)?;
        socket.send_all(&out, deadline).context("cannot send")?;
        out.clear();
        match step {
            ClientStep::NeedMore => {}
            ClientStep::Transmission(negotiated) if taken == received => return Ok(negotiated),
            ClientStep::Transmission(_) => return Err(anyhow!("the server answers before it was asked")),
            // Neither was wanted.
            ClientStep::StartTls | ClientStep::Listed(_) => return Err(ClientError::Finished.into()),
        }
    }
}
