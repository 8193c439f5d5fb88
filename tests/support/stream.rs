//! A connected socket of either kind, with a limit on every wait.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// No wait of a test takes longer.
pub(crate) const LIMIT: Duration = Duration::from_secs(20);

pub(crate) enum Stream {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Stream {
    pub(crate) fn unix(path: &Path) -> io::Result<Stream> {
        let stream = Stream::Unix(UnixStream::connect(path)?);
        stream.limit(LIMIT);
        Ok(stream)
    }

    pub(crate) fn tcp(address: SocketAddr) -> io::Result<Stream> {
        let stream = TcpStream::connect(address)?;
        stream.set_nodelay(true).unwrap();
        let stream = Stream::Tcp(stream);
        stream.limit(LIMIT);
        Ok(stream)
    }

    /// Sets the limit on each wait.
    pub(crate) fn limit(&self, limit: Duration) {
        let limit = Some(limit);
        match self {
            Stream::Unix(s) => s.set_read_timeout(limit).and_then(|()| s.set_write_timeout(limit)),
            Stream::Tcp(s) => s.set_read_timeout(limit).and_then(|()| s.set_write_timeout(limit)),
        }
        .unwrap();
    }

    /// The same socket once more.
    pub(crate) fn again(&self) -> Stream {
        match self {
            Stream::Unix(s) => Stream::Unix(s.try_clone().unwrap()),
            Stream::Tcp(s) => Stream::Tcp(s.try_clone().unwrap()),
        }
    }

    /// Tells the peer that nothing more will be sent.
    pub(crate) fn finish_sending(&self) {
        let _ = match self {
            Stream::Unix(s) => s.shutdown(Shutdown::Write),
            Stream::Tcp(s) => s.shutdown(Shutdown::Write),
        };
    }

    /// Sends until the socket takes nothing for `pause`, and says how many bytes it took.
    pub(crate) fn send_until_blocked(&mut self, bytes: &[u8], pause: Duration) -> usize {
        self.limit(pause);
        let mut sent = 0;
        while sent < bytes.len() {
            match self.write(&bytes[sent..]) {
                Ok(n) => sent += n,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => panic!("cannot send: {error}"),
            }
        }
        self.limit(LIMIT);
        sent
    }

    /// Whether the server has ended this connection, found out without reading anything. Where the socket has room
    /// it takes a byte that makes no sense.
    pub(crate) fn refuses_bytes(&mut self) -> bool {
        self.limit(Duration::from_millis(20));
        let result = self.write(&[0]);
        self.limit(LIMIT);
        result.is_err_and(|error| error.kind() != io::ErrorKind::WouldBlock)
    }

    /// Whether the server has ended this connection; what it still sent is thrown away.
    pub(crate) fn is_closed(&mut self) -> bool {
        let mut junk = [0; 4096];
        loop {
            match self.read(&mut junk) {
                Ok(0) => return true,
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return true,
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return true,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return false,
            }
        }
    }
}

impl Read for Stream {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Stream::Unix(s) => s.read(buf),
            Stream::Tcp(s) => s.read(buf),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        match self {
            Stream::Unix(s) => s.write(buf),
            Stream::Tcp(s) => s.write(buf),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
