//! Listening sockets: made from an address, a path, or handed over by systemd; and the loop that accepts.

use std::ffi::OsString;
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::net::sockopt;
use tokio::net::{TcpListener, UnixListener, UnixStream};

use super::server::Server;
use crate::cli::{Listen, abstract_name};
use crate::systemd::{Family, PassedSocket};

/// After an accept that failed for want of descriptors or memory, so long until the next.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Clients that wait to be accepted, at most.
const BACKLOG: i32 = 1024;

/// A socket that clients can connect to.
pub(crate) enum Listener {
    /// TCP.
    Tcp(TcpListener),
    /// Unix.
    Unix {
        /// The socket.
        listener: UnixListener,
        /// Removes the path when dropped.
        _path: Option<SocketPath>,
    },
}

/// The path of a Unix socket that we made. Removed when dropped.
pub(crate) struct SocketPath(PathBuf);

impl Drop for SocketPath {
    fn drop(&mut self) {
        // Somebody may have removed it already.
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Listens at each address that `listen` stands for.
///
/// # Errors
/// One line that names the address and the way out.
pub(crate) fn bind(listen: &Listen) -> anyhow::Result<Vec<Listener>> {
    match listen {
        Listen::Tcp { host, port } => {
            let addresses = host
                .resolve(*port)
                .map_err(|error| anyhow::anyhow!("cannot find the address {listen}: {error} (--bind)"))?;
            let (bound, refused): (Vec<_>, Vec<_>) =
                addresses.into_iter().map(bind_tcp).partition(anyhow::Result::is_ok);
            // A name may stand for an address that this host lacks, as localhost does without IPv6.
            match refused.into_iter().next() {
                Some(error) if bound.is_empty() => error.map(|listener| vec![listener]),
                _ => bound.into_iter().collect(),
            }
        }
        Listen::Unix(path) => Ok(vec![bind_unix(path)?]),
    }
}

fn bind_tcp(address: SocketAddr) -> anyhow::Result<Listener> {
    let listen = || -> io::Result<TcpListener> {
        let socket = match address {
            SocketAddr::V4(_) => tokio::net::TcpSocket::new_v4()?,
            SocketAddr::V6(_) => tokio::net::TcpSocket::new_v6()?,
        };
        socket.set_reuseaddr(true)?;
        socket.bind(address)?;
        socket.listen(BACKLOG.unsigned_abs())
    };
    match listen() {
        Ok(listener) => Ok(Listener::Tcp(listener)),
        Err(error) => {
            let way_out = match error.kind() {
                io::ErrorKind::AddrInUse => "another server listens there; choose another --port",
                io::ErrorKind::AddrNotAvailable => {
                    "this host does not have that address; choose another --bind"
                }
                io::ErrorKind::PermissionDenied => "ports below 1024 are root's; choose another --port",
                _ => return Err(anyhow::anyhow!("cannot listen on {address}: {error}")),
            };
            anyhow::bail!("cannot listen on {address}: {way_out}")
        }
    }
}

fn bind_unix(path: &Path) -> anyhow::Result<Listener> {
    if let Some(name) = abstract_name(path) {
        return bind_abstract(name).map_err(|error| {
            let shown = Listen::Unix(path.to_owned());
            match error.kind() {
                io::ErrorKind::AddrInUse => {
                    anyhow::anyhow!("{shown}: another server listens there; choose another --socket")
                }
                _ => anyhow::anyhow!("{shown}: cannot listen there: {error}"),
            }
        });
    }
    let shown = path.display();
    match std::os::unix::net::UnixListener::bind(path) {
        Ok(listener) => own_unix(listener, path),
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            let is_socket = std::fs::symlink_metadata(path).is_ok_and(|meta| meta.file_type().is_socket());
            anyhow::ensure!(is_socket, "{shown}: exists and is not a socket; choose another --socket");
            match std::os::unix::net::UnixStream::connect(path) {
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
                _ => anyhow::bail!("{shown}: another server listens there; choose another --socket"),
            }
            tracing::info!("{shown}: replacing a stale socket");
            std::fs::remove_file(path)
                .and_then(|()| std::os::unix::net::UnixListener::bind(path))
                .map_err(anyhow::Error::from)
                .and_then(|listener| own_unix(listener, path))
                .map_err(|error| anyhow::anyhow!("{shown}: cannot replace the stale socket: {error}"))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            anyhow::bail!(
                "{shown}: the folder of the socket does not exist; make it, or choose another --socket"
            )
        }
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => {
            anyhow::bail!("{shown}: the path is too long for a socket (107 bytes at most)")
        }
        Err(error) => anyhow::bail!("{shown}: cannot listen there: {error}"),
    }
}

/// Listens on a name of the abstract namespace, which is gone with the socket.
fn bind_abstract(name: &[u8]) -> io::Result<Listener> {
    let address = std::os::unix::net::SocketAddr::from_abstract_name(name)?;
    let listener = std::os::unix::net::UnixListener::bind_addr(&address)?;
    listener.set_nonblocking(true)?;
    Ok(Listener::Unix { listener: UnixListener::from_std(listener)?, _path: None })
}

fn own_unix(listener: std::os::unix::net::UnixListener, path: &Path) -> anyhow::Result<Listener> {
    let made = SocketPath(path.to_owned());
    listener.set_nonblocking(true)?;
    Ok(Listener::Unix { listener: UnixListener::from_std(listener)?, _path: Some(made) })
}

impl Listener {
    /// Takes over a listening socket that systemd made.
    ///
    /// # Errors
    /// The operating system's.
    pub(crate) fn from_passed(socket: PassedSocket) -> anyhow::Result<Self> {
        let PassedSocket { fd, family, name, .. } = socket;
        tracing::debug!(name, ?family, "listening on a passed socket");
        rustix::io::ioctl_fionbio(&fd, true)?;
        Ok(match family {
            Family::Unix => Listener::Unix { listener: UnixListener::from_std(fd.into())?, _path: None },
            Family::Tcp => Listener::Tcp(TcpListener::from_std(fd.into())?),
        })
    }

    /// The TCP address or Unix socket it listens on.
    pub(crate) fn local(&self) -> Local {
        match self {
            Listener::Tcp(listener) => listener.local_addr().map_or(Local::Unnamed, Local::Tcp),
            Listener::Unix { listener, .. } => {
                let address = listener.local_addr().ok().map(std::os::unix::net::SocketAddr::from);
                address.and_then(|address| socket_path(&address)).map_or(Local::Unnamed, Local::Unix)
            }
        }
    }

    /// Accepts clients for ever. Cancel-safe: a dropped wait loses no client.
    pub(crate) async fn serve(&self, server: &Server) {
        loop {
            // Who is too many waits in the backlog, as qemu-nbd has it.
            server.wait_for_room().await;
            match self.accept().await {
                Ok((fd, peer)) => {
                    // Another listener may have taken the last place in the meantime.
                    server.wait_for_room().await;
                    server.take(fd, peer);
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a client");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    async fn accept(&self) -> io::Result<(OwnedFd, String)> {
        match self {
            Listener::Tcp(listener) => {
                let (stream, peer) = listener.accept().await?;
                let fd = OwnedFd::from(stream.into_std()?);
                set_up_tcp(&fd);
                Ok((fd, peer.to_string()))
            }
            Listener::Unix { listener, .. } => {
                let (stream, _) = listener.accept().await?;
                unix_client(stream)
            }
        }
    }
}

/// Returns the path of a Unix socket; one of the abstract namespace begins with a NUL.
fn socket_path(address: &std::os::unix::net::SocketAddr) -> Option<PathBuf> {
    let of_name = |name: &[u8]| PathBuf::from(OsString::from_vec([&[0], name].concat()));
    address.as_pathname().map(Path::to_owned).or_else(|| address.as_abstract_name().map(of_name))
}

/// Makes a client of a connection that was passed in. Returns the socket and the peer's name.
///
/// # Errors
/// The operating system's.
pub(crate) fn passed_client(socket: PassedSocket) -> anyhow::Result<(OwnedFd, String)> {
    let PassedSocket { fd, family, .. } = socket;
    rustix::io::ioctl_fionbio(&fd, true)?;
    let client = match family {
        Family::Unix => unix_client(UnixStream::from_std(fd.into())?)?,
        Family::Tcp => {
            set_up_tcp(&fd);
            let address = rustix::net::getpeername(&fd).ok().flatten();
            let address = address.and_then(|address| SocketAddr::try_from(address).ok());
            (fd, address.map_or_else(|| "tcp".to_owned(), |address| address.to_string()))
        }
    };
    Ok(client)
}

/// Small answers must not wait for each other; a dead peer is noticed in the end. It fails only for a peer that is gone
/// already, as its reader will find out.
fn set_up_tcp(fd: &OwnedFd) {
    let _ = sockopt::set_tcp_nodelay(fd, true);
    let _ = sockopt::set_socket_keepalive(fd, true);
}

fn unix_client(stream: UnixStream) -> io::Result<(OwnedFd, String)> {
    let pid = stream.peer_cred().ok().and_then(|cred| cred.pid());
    let peer = pid.map_or_else(|| "unix".to_owned(), |pid| format!("unix, pid {pid}"));
    Ok((OwnedFd::from(stream.into_std()?), peer))
}

/// Where a listener is found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Local {
    /// An address and a port.
    Tcp(SocketAddr),
    /// A path; one of the abstract namespace begins with a NUL.
    Unix(PathBuf),
    /// Nowhere that could be told.
    Unnamed,
}
