//! Whose server a control socket leads to. Folders and sockets can be made by others; what the kernel says of the process
//! that listens (SO_PEERCRED) cannot.

use tokio::net::UnixStream;

use crate::trust;

/// The process that listens at a control socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Peer {
    pub(super) uid: u32,
    /// None where the process is not to be seen from here.
    pub(super) pid: Option<u32>,
}

impl Peer {
    /// The process at the other end of a connection.
    ///
    /// # Errors
    /// The operating system's.
    pub(super) fn of(stream: &UnixStream) -> std::io::Result<Self> {
        let credentials = stream.peer_cred()?;
        let pid = credentials.pid().and_then(|pid| u32::try_from(pid).ok()).filter(|pid| *pid != 0);
        Ok(Peer { uid: credentials.uid(), pid })
    }

    /// Returns whether what it says is believed.
    pub(super) fn is_trusted(self) -> bool {
        trust::is_trusted(self.uid)
    }
}
