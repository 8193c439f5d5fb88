//! Sockets that are passed in, by systemd (sd_listen_fds(3)) or as stdin by inetd, and the states that we tell systemd
//! (sd_notify(3)).
//! A leaf file: the only `unsafe` is taking over descriptors by number and clearing variables.
#![allow(unsafe_code)]

use std::env;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use anyhow::{Context, Result, anyhow, bail};
use rustix::fs::fstat;
use rustix::io::{FdFlags, fcntl_dupfd_cloexec, fcntl_getfd, fcntl_setfd};
use rustix::net::{AddressFamily, SocketType, getpeername, sockopt};
use rustix::stdio::{dup2_stderr, dup2_stdin, dup2_stdout};

/// The first descriptor that is passed in: SD_LISTEN_FDS_START.
const FIRST: RawFd = 3;

/// More than anybody passes; keeps a broken number from costing time.
const MOST: RawFd = 1024;

/// The process that was started, where this one is a fork of it.
static STARTED_AS: AtomicU32 = AtomicU32::new(0);

/// A socket that was opened by another process and passed to this one.
#[derive(Debug)]
pub(crate) struct PassedSocket {
    /// The socket.
    pub(crate) fd: OwnedFd,
    /// Its kind.
    pub(crate) family: Family,
    /// Its state.
    pub(crate) state: SocketState,
    /// FileDescriptorName= of the socket unit, or "".
    pub(crate) name: String,
}

/// Whether clients come by a passed socket, or it is a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SocketState {
    /// Clients connect to it: Accept=no, inetd's `wait`.
    Listening,
    /// A connected client: Accept=yes, inetd's `nowait`.
    Connected,
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
/// One line: a number that makes no sense, a descriptor that is neither a listening nor a connected stream socket.
pub(crate) fn take_sockets() -> Result<Vec<PassedSocket>> {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    if TAKEN.swap(true, Ordering::Relaxed) {
        return Ok(Vec::new());
    }
    let variable = |name| env::var(name).unwrap_or_default();
    let (pid, count, names) = (variable("LISTEN_PID"), variable("LISTEN_FDS"), variable("LISTEN_FDNAMES"));
    clear(&["LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"]);
    // Variables for another process are left from an ancestor: their descriptors are not ours.
    let meant =
        |pid: u32| pid != 0 && [std::process::id(), STARTED_AS.load(Ordering::Relaxed)].contains(&pid);
    if !pid.parse().is_ok_and(meant) {
        return Ok(Vec::new());
    }
    let count = match count.parse::<RawFd>() {
        Ok(count @ 0..=MOST) => count,
        _ => bail!("socket activation: LISTEN_FDS={count} is not a number of sockets"),
    };
    let mut names = names.split(':').map(str::to_owned);
    (FIRST..FIRST + count).map(|number| take_socket(number, names.next().unwrap_or_default())).collect()
}

/// Notes that this process is about to fork: what was passed to it is for its child.
pub(crate) fn before_fork() {
    // Who was started first is whom the sockets were passed to.
    let _ = STARTED_AS.compare_exchange(0, std::process::id(), Ordering::Relaxed, Ordering::Relaxed);
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
    let (family, state) = kind(fd.as_fd()).ok_or_else(|| {
        anyhow!("socket activation: descriptor {number} is not a listening or connected stream socket")
    })?;
    let flags = fcntl_getfd(&fd)?;
    fcntl_setfd(&fd, flags | FdFlags::CLOEXEC)?;
    keep_output_out(fd.as_fd(), state)?;
    Ok(PassedSocket { fd, family, state, name })
}

/// Takes the socket over that is stdin, as inetd passes it; None where stdin is something else.
///
/// # Errors
/// The operating system's.
pub(crate) fn take_stdin() -> Result<Option<PassedSocket>> {
    let stdin = io::stdin();
    let Some((family, state)) = kind(stdin.as_fd()) else { return Ok(None) };
    let fd = fcntl_dupfd_cloexec(&stdin, FIRST).context("cannot take the socket that is stdin")?;
    keep_output_out(fd.as_fd(), state)?;
    dup2_stdin(&File::open("/dev/null").context("cannot open /dev/null")?)?;
    Ok(Some(PassedSocket { fd, family, state, name: "stdin".to_owned() }))
}

/// Sends stdout and stderr to /dev/null where they are this connection, as with inetd: a line between the replies would
/// be taken for one of them.
fn keep_output_out(fd: BorrowedFd<'_>, state: SocketState) -> Result<()> {
    if state == SocketState::Listening {
        return Ok(());
    }
    let socket = fstat(fd)?;
    let is_it = |output: BorrowedFd<'_>| {
        fstat(output).is_ok_and(|found| (found.st_dev, found.st_ino) == (socket.st_dev, socket.st_ino))
    };
    let null = || File::options().write(true).open("/dev/null").context("cannot open /dev/null");
    if is_it(rustix::stdio::stdout()) {
        dup2_stdout(&null()?)?;
    }
    if is_it(rustix::stdio::stderr()) {
        dup2_stderr(&null()?)?;
    }
    Ok(())
}

/// The flags of a descriptor that may not exist.
fn flags_of(number: RawFd) -> Option<i32> {
    // SAFETY: F_GETFD takes any number and touches no memory.
    let flags = unsafe { libc::fcntl(number, libc::F_GETFD) };
    (flags >= 0).then_some(flags)
}

fn kind(fd: BorrowedFd<'_>) -> Option<(Family, SocketState)> {
    if sockopt::socket_type(fd).ok()? != SocketType::STREAM {
        return None;
    }
    let state = match sockopt::socket_acceptconn(fd).ok()? {
        true => SocketState::Listening,
        false if getpeername(fd).is_ok() => SocketState::Connected,
        false => return None,
    };
    match sockopt::socket_domain(fd).ok()? {
        AddressFamily::INET | AddressFamily::INET6 => Some((Family::Tcp, state)),
        AddressFamily::UNIX => Some((Family::Unix, state)),
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
    use std::os::unix::net::{UnixListener, UnixStream};

    #[test]
    fn only_stream_sockets_pass() {
        let folder = tempfile::tempdir().unwrap();
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let unix = UnixListener::bind(folder.path().join("s")).unwrap();
        let client = TcpStream::connect(tcp.local_addr().unwrap()).unwrap();
        let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
        let (end, _other) = UnixStream::pair().unwrap();
        assert_eq!(kind(tcp.as_fd()), Some((Family::Tcp, SocketState::Listening)));
        assert_eq!(kind(unix.as_fd()), Some((Family::Unix, SocketState::Listening)));
        assert_eq!(kind(client.as_fd()), Some((Family::Tcp, SocketState::Connected)));
        assert_eq!(kind(end.as_fd()), Some((Family::Unix, SocketState::Connected)));
        assert_eq!(kind(udp.as_fd()), None);
        assert_eq!(kind(tempfile::tempfile().unwrap().as_fd()), None);
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
