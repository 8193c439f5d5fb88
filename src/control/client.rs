//! The other end of the control socket: one request to one process, with a limit on time and size.

use std::io;
use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::client::conn::http1;
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

use super::folder;
use super::peer::Peer;
use super::wire::Failure;

/// Time for an answer; a server that is well needs a thousandth of it.
const LIMIT: Duration = Duration::from_secs(5);

/// Time for an answer of another user's server.
const FOREIGN_LIMIT: Duration = Duration::from_secs(2);

/// Time for a change, which storage may have to agree to.
const CHANGE_LIMIT: Duration = Duration::from_secs(60);

/// The longest answer that is read: room for a hundred thousand clients.
const ANSWER_BYTES: usize = 32 << 20;

/// The longest answer of another user's server.
const FOREIGN_BYTES: usize = 1 << 20;

/// Why there is no answer.
#[derive(Debug)]
pub(super) enum CallError {
    /// Nobody listens there.
    Gone,
    /// The server said no, and why.
    Refused(String),
    /// It did not answer, or nothing that makes sense.
    Silent(String),
    /// Another user listens there, and was asked nothing.
    Foreign(Peer),
}

impl CallError {
    fn silent(error: impl ToString) -> Self {
        CallError::Silent(error.to_string())
    }
}

/// Asks another user's server for what is at `path`. The answer may be shown, and is neither believed nor acted on.
pub(super) async fn get_foreign<T: DeserializeOwned>(
    socket: &Path,
    path: &str,
) -> Result<(Peer, T), CallError> {
    let exchanged = async {
        let stream = UnixStream::connect(socket).await.map_err(CallError::silent)?;
        let peer = Peer::of(&stream).map_err(CallError::silent)?;
        let answer = exchange(stream, Method::GET, path, Bytes::new(), FOREIGN_BYTES).await?;
        Ok((peer, answer))
    };
    tokio::time::timeout(FOREIGN_LIMIT, exchanged)
        .await
        .unwrap_or_else(|_| Err(CallError::Silent(format!("no answer within {FOREIGN_LIMIT:?}"))))
}

/// Asks for what is at `path`.
pub(super) async fn get<T: DeserializeOwned>(socket: &Path, path: &str) -> Result<T, CallError> {
    call(socket, Method::GET, path, Bytes::new()).await
}

/// Sends `body` as JSON.
pub(super) async fn send<T: DeserializeOwned>(
    socket: &Path,
    method: Method,
    path: &str,
    body: &impl Serialize,
) -> Result<T, CallError> {
    let body = serde_json::to_vec(body).map_err(CallError::silent)?;
    call(socket, method, path, body.into()).await
}

/// Sends a request that needs no body.
pub(super) async fn call<T: DeserializeOwned>(
    socket: &Path,
    method: Method,
    path: &str,
    body: Bytes,
) -> Result<T, CallError> {
    let limit = if method == Method::GET { LIMIT } else { CHANGE_LIMIT };
    let exchanged = async {
        let stream = connect(socket).await?;
        exchange(stream, method, path, body, ANSWER_BYTES).await
    };
    tokio::time::timeout(limit, exchanged)
        .await
        .unwrap_or_else(|_| Err(CallError::Silent(format!("no answer within {limit:?}"))))
}

/// Connects to a server that is believed.
async fn connect(socket: &Path) -> Result<UnixStream, CallError> {
    let stream = UnixStream::connect(socket).await.map_err(|error| match error {
        error if folder::is_nobody_there(&error) => {
            folder::remove_stale(socket);
            CallError::Gone
        }
        error if error.kind() == io::ErrorKind::NotFound => CallError::Gone,
        error => CallError::silent(error),
    })?;
    let peer = Peer::of(&stream).map_err(CallError::silent)?;
    if peer.is_trusted() { Ok(stream) } else { Err(CallError::Foreign(peer)) }
}

async fn exchange<T: DeserializeOwned>(
    stream: UnixStream,
    method: Method,
    path: &str,
    body: Bytes,
    most: usize,
) -> Result<T, CallError> {
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(CallError::silent)?;
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header("host", "nbdbridge")
        .header("content-type", "application/json")
        .body(Full::new(body))
        .map_err(CallError::silent)?;
    // The sender goes when the answer is there, and with it the connection ends.
    let answer = async move {
        let response = sender.send_request(request).await.map_err(CallError::silent)?;
        let status = response.status();
        let body = Limited::new(response.into_body(), most).collect().await;
        read(status, &body.map_err(CallError::silent)?.to_bytes())
    };
    let (answer, _) = tokio::join!(answer, connection);
    answer
}

fn read<T: DeserializeOwned>(status: StatusCode, body: &[u8]) -> Result<T, CallError> {
    if status.is_success() {
        return serde_json::from_slice(body).map_err(CallError::silent);
    }
    match serde_json::from_slice::<Failure>(body) {
        Ok(failure) => Err(CallError::Refused(failure.error)),
        Err(_) => Err(CallError::Silent(format!("it answered {status}"))),
    }
}
