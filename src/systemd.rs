//! systemd's two protocols: sockets that it passes in (sd_listen_fds(3)) and the words we send it (sd_notify(3)).
//! A leaf file: the only `unsafe` is taking over descriptors by number and clearing variables.
#![allow(unsafe_code)]

use std::env;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Result, anyhow, bail};
use rustix::io::{FdFlags, fcntl_getfd, fcntl_setfd};
use rustix::net::{AddressFamily, SocketType, sockopt};

/// The first descriptor that is passed in: SD_LISTEN_FDS_START.
const FIRST: RawFd = 3;

/// More than anybody passes; keeps a broken number from costing time.
const MOST: RawFd = 1024;

/// A listening socket that systemd opened.
#[derive(Debug)]
pub(crate) struct PassedSocket {
    /// The socket.
    pub(crate) fd: OwnedFd,
    /// Its kind.
    pub(crate) family: Family,
    /// FileDescriptorName= of the socket unit, or "".
    pub(crate) name: String,
}

/// What a socket speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Family {
    /// IPv4 or IPv6.
    Tcp,
    /// A Unix socket.
    Unix,
}

/// Takes the sockets over that systemd passed to this process; none where it passed none. To be called early in
/// `main`, before threads; a second call finds nothing.
///
/// # Errors
/// One line: a number that makes no sense, a descriptor that is no listening stream socket.
pub(crate) fn take_sockets() -> Result<Vec<PassedSocket>> {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    if TAKEN.swap(true, Ordering::Relaxed) {
        return Ok(Vec::new());
    }
    let variable = |name| env::var(name).unwrap_or_default();
    let (pid, count, names) = (variable("LISTEN_PID"), variable("LISTEN_FDS"), variable("LISTEN_FDNAMES"));
    clear(&["LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"]);
    // Variables for another process are left from an ancestor: their descriptors are not ours.
    if pid.parse() != Ok(std::process::id()) {
        return Ok(Vec::new());
    }
    let count = match count.parse::<RawFd>() {
        Ok(count @ 0..=MOST) => count,
        _ => bail!("socket activation: LISTEN_FDS={count} is not a number of sockets"),
    };
    let mut names = names.split(':').map(str::to_owned);
    (FIRST..FIRST + count).map(|number| take_socket(number, names.next().unwrap_or_default())).collect()
}

/// Clears variables, where no other thread can be reading them.
fn clear(names: &[&str]) {
    let alone = std::fs::read_dir("/proc/self/task").is_ok_and(|threads| threads.count() == 1);
    if alone {
        for name in names {
            // SAFETY: the process has this one thread, so that nobody else looks into the environment.
            unsafe { env::remove_var(name) };
        }
    }
}

fn take_socket(number: RawFd, name: String) -> Result<PassedSocket> {
    if flags_of(number).is_none() {
        bail!("socket activation: descriptor {number} is not open");
    }
    // SAFETY: the descriptor is open, and by systemd's contract (LISTEN_PID is ours) it belongs to us. It is
    // taken once: `take_sockets` does its work once, and each number comes up once.
    let fd = unsafe { OwnedFd::from_raw_fd(number) };
    let family = listening_family(fd.as_fd()).ok_or_else(|| {
        anyhow!(
            "socket activation: descriptor {number} is not a listening stream socket (Accept=no is needed)"
        )
    })?;
    let flags = fcntl_getfd(&fd)?;
    fcntl_setfd(&fd, flags | FdFlags::CLOEXEC)?;
    Ok(PassedSocket { fd, family, name })
}

/// The flags of a descriptor that may not exist.
fn flags_of(number: RawFd) -> Option<i32> {
    // SAFETY: F_GETFD takes any number and touches no memory.
    let flags = unsafe { libc::fcntl(number, libc::F_GETFD) };
    (flags >= 0).then_some(flags)
}

fn listening_family(fd: BorrowedFd<'_>) -> Option<Family> {
    let stream = sockopt::socket_type(fd).ok()? == SocketType::STREAM;
    if !stream || !sockopt::socket_acceptconn(fd).ok()? {
        return None;
    }
    match sockopt::socket_domain(fd).ok()? {
        AddressFamily::INET | AddressFamily::INET6 => Some(Family::Tcp),
        AddressFamily::UNIX => Some(Family::Unix),
        _ => None,
    }
}

/// Tells systemd about us, as in `READY=1` or `STOPPING=1`; does nothing where nobody listens.
///
/// # Errors
/// The socket's. No reason to stop: log it.
pub(crate) fn notify(state: &str) -> io::Result<()> {
    match env::var("NOTIFY_SOCKET") {
        Ok(socket) if !socket.is_empty() => notify_at(&socket, state),
        _ => Ok(()),
    }
}

fn notify_at(socket: &str, state: &str) -> io::Result<()> {
    let address = match socket.strip_prefix('@') {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(socket)?,
    };
    UnixDatagram::unbound()?.send_to_addr(state.as_bytes(), &address).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream, UdpSocket};
    use std::os::unix::net::UnixListener;

    #[test]
    fn only_listening_stream_sockets_pass() {
        let folder = tempfile::tempdir().unwrap();
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let unix = UnixListener::bind(folder.path().join("s")).unwrap();
        let client = TcpStream::connect(tcp.local_addr().unwrap()).unwrap();
        let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
        assert_eq!(listening_family(tcp.as_fd()), Some(Family::Tcp));
        assert_eq!(listening_family(unix.as_fd()), Some(Family::Unix));
        assert_eq!(listening_family(client.as_fd()), None);
        assert_eq!(listening_family(udp.as_fd()), None);
        assert_eq!(listening_family(tempfile::tempfile().unwrap().as_fd()), None);
        assert_eq!(flags_of(100_000_000), None);
    }

    #[test]
    fn words_arrive_by_path_and_by_abstract_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notify");
        let name = format!("nbdbridge-test-{}", std::process::id());
        let by_path = UnixDatagram::bind(&path).unwrap();
        let by_name = UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
        notify_at(path.to_str().unwrap(), "READY=1").unwrap();
        notify_at(&format!("@{name}"), "STOPPING=1").unwrap();
        let mut words = [0; 32];
        let length = by_path.recv(&mut words).unwrap();
        assert_eq!(&words[..length], b"READY=1");
        let length = by_name.recv(&mut words).unwrap();
        assert_eq!(&words[..length], b"STOPPING=1");
        assert!(notify_at("/nowhere/notify", "READY=1").is_err());
    }
}
