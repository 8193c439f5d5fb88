//! How a remote export is used: what a user can set.

use std::time::Duration;

/// How a remote export is used.
#[derive(Clone, Debug)]
pub struct NbdOptions {
    /// Connections at most. One is all there is where the server does not offer `NBD_FLAG_CAN_MULTI_CONN`.
    pub connections: u16,
    /// Requests on the wire of one connection at most; those above wait here.
    pub requests: u32,
    /// How long one attempt to connect may take, with its handshake.
    pub connect_timeout: Duration,
    /// How long requests wait for a lost connection to come back.
    pub reconnect_timeout: Duration,
    /// A connection on which a request is not answered for so long is given up; None: never.
    pub request_timeout: Option<Duration>,
    /// What is assumed of the server's cache.
    pub reconnect: Reconnect,
}

/// What is assumed of a server that comes back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reconnect {
    /// What it had answered and not flushed is still there: its cache has survived, as its host's page cache does.
    Trust,
    /// Nothing but what is durable: every change is sent with `NBD_CMD_FLAG_FUA`.
    Strict,
}

impl Default for NbdOptions {
    fn default() -> Self {
        NbdOptions {
            connections: 16,
            requests: 128,
            connect_timeout: Duration::from_secs(10),
            reconnect_timeout: Duration::from_secs(60),
            request_timeout: Some(Duration::from_secs(60)),
            reconnect: Reconnect::Trust,
        }
    }
}
