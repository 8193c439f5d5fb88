//! Reaching a server: resolving, connecting, and the handshake, which `nbd-proto` leads. Each is limited in time.

use std::future::Future;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use nbd_proto::uri::{Address, Uri};
use nbd_proto::{ClientHandshake, ClientStep, Goal, Listed, Negotiated, Wants};
use rustix::net::sockopt;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream, lookup_host};

use super::translate::BASE_ALLOCATION;

/// A peer whose host is gone without a word is found out after this and a few probes.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(15);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
const KEEPALIVE_PROBES: u32 = 3;

/// Room in a Unix socket for what the server has not taken yet, so that a large write fits. TCP grows by itself.
const UNIX_SEND_BYTES: usize = 1 << 20;

/// A connection whose transmission phase begins.
pub(super) struct Fresh {
    /// Non-blocking, and in no event queue.
    pub(super) fd: OwnedFd,
    pub(super) negotiated: Negotiated,
    /// What came behind the handshake. An honest server sends nothing there.
    pub(super) early: Vec<u8>,
}

/// Connects to the export, for use. Cancel-safe: a dropped attempt leaves nothing.
///
/// # Errors
/// A few words that say what went wrong.
pub(super) async fn connect(uri: &Uri, limit: Duration) -> Result<Fresh, String> {
    let contexts = vec![BASE_ALLOCATION.to_owned()];
    match reach(uri, Wants { contexts, ..Wants::export(&uri.export) }, limit).await? {
        (fd, ClientStep::Transmission(negotiated), early) => Ok(Fresh { fd, negotiated, early }),
        _ => Err("the handshake ended without the export".into()),
    }
}

/// Asks a server what it tells about its exports, and leaves.
///
/// # Errors
/// As [`connect`].
pub(super) async fn ask(uri: &Uri, goal: Goal, limit: Duration) -> Result<Vec<Listed>, String> {
    match reach(uri, Wants { goal, ..Wants::export(&uri.export) }, limit).await? {
        (_, ClientStep::Listed(listed), _) => Ok(listed),
        _ => Err("the handshake ended without a list".into()),
    }
}

/// Runs a future to its end on a thread of its own, for callers who may be on an event loop and cannot wait there.
pub(super) fn block_on<T: Send>(future: impl Future<Output = T> + Send) -> io::Result<T> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            let result = runtime.block_on(future);
            // A resolver that hangs is not waited for.
            runtime.shutdown_background();
            Ok(result)
        });
        thread.join().unwrap_or_else(|_| Err(io::Error::other("the connecting thread panicked")))
    })
}

async fn reach(uri: &Uri, wants: Wants, limit: Duration) -> Result<(OwnedFd, ClientStep, Vec<u8>), String> {
    let dialogue = async {
        match &uri.address {
            Address::Tcp { host, port } => {
                let mut stream = dial(host, *port).await?;
                let (step, early) = shake_hands(&mut stream, wants).await?;
                let stream = stream.into_std().map_err(|error| error.to_string())?;
                Ok((OwnedFd::from(stream), step, early))
            }
            Address::Unix(path) => {
                let connected = UnixStream::connect(path).await;
                let mut stream = connected.map_err(|error| format!("cannot connect: {error}"))?;
                // It gets what the system allows: a smaller buffer only means more waits.
                let _ = sockopt::set_socket_send_buffer_size(stream.as_fd(), UNIX_SEND_BYTES);
                let (step, early) = shake_hands(&mut stream, wants).await?;
                let stream = stream.into_std().map_err(|error| error.to_string())?;
                Ok((OwnedFd::from(stream), step, early))
            }
        }
    };
    match tokio::time::timeout(limit, dialogue).await {
        Ok(result) => result,
        Err(_) => Err(format!("the server let {limit:?} pass without finishing the handshake")),
    }
}

/// Connects to the first address of the host that answers.
async fn dial(host: &str, port: u16) -> Result<TcpStream, String> {
    let addresses = lookup_host((host, port)).await.map_err(|error| format!("cannot resolve: {error}"))?;
    let mut failure = "the host has no address".to_owned();
    for address in addresses {
        match TcpStream::connect(address).await {
            Ok(stream) => {
                tune(&stream).map_err(|error| error.to_string())?;
                return Ok(stream);
            }
            Err(error) => failure = format!("cannot connect to {address}: {error}"),
        }
    }
    Err(failure)
}

fn tune(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let fd = stream.as_fd();
    sockopt::set_socket_keepalive(fd, true)?;
    sockopt::set_tcp_keepidle(fd, KEEPALIVE_IDLE)?;
    sockopt::set_tcp_keepintvl(fd, KEEPALIVE_INTERVAL)?;
    sockopt::set_tcp_keepcnt(fd, KEEPALIVE_PROBES)?;
    Ok(())
}

async fn shake_hands<S>(stream: &mut S, wants: Wants) -> Result<(ClientStep, Vec<u8>), String>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut handshake = ClientHandshake::new(wants);
    let (mut input, mut out) = ([0; 4096], Vec::new());
    loop {
        let received = match stream.read(&mut input).await {
            Ok(0) => return Err(handshake.hung_up().to_string()),
            Ok(received) => received,
            // Some servers hang up with words of ours unread.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {
                return Err(handshake.hung_up().to_string());
            }
            Err(error) => return Err(format!("connection lost during the handshake: {error}")),
        };
        let advanced = handshake.advance(&input[..received], &mut out);
        // One that takes no more may still have said why: reading finds out.
        let _ = stream.write_all(&out).await;
        out.clear();
        let (used, step) = advanced.map_err(|error| error.to_string())?;
        match step {
            ClientStep::NeedMore => {}
            ClientStep::StartTls => return Err("the server wants TLS, which is not supported".into()),
            step => return Ok((step, input[used..received].to_vec())),
        }
    }
}
