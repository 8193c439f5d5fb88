//! What other parts of this program ask a server that runs: where it serves, and to change its limits or size. For
//! threads that may block.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use bridge::layer::ThrottleConfig;
use hyper::Method;
use serde_json::json;

use super::client::{self, CallError};
use super::find;
use super::folder;
use super::wire::{Instance, Resized, Throttle};
use super::{ResizeWish, command};
use crate::os_text::OsText;

/// A server's export, found by where it is served.
#[derive(Clone, Debug)]
pub(crate) struct Served {
    socket: PathBuf,
    export: String,
    /// The process.
    pub(crate) pid: u32,
    /// Where its blocks come from.
    pub(crate) source: OsText,
    /// Where it is found: devices, files, URIs.
    pub(crate) places: Vec<OsText>,
    /// In bytes.
    pub(crate) size: u64,
    /// Why writes that were answered and not flushed do not survive a crash of the process; None where they do.
    pub(crate) loss_after_crash: Option<String>,
}

/// All exports that this user's servers have.
///
/// # Errors
/// One line, where nobody can be asked.
pub(crate) fn served() -> Result<Vec<Served>> {
    let servers = run(find::servers())??;
    Ok(servers.servers.into_iter().flat_map(|server| of(server.instance, &server.socket)).collect())
}

/// What the process of this number serves; nothing where it does not answer.
pub(crate) fn served_by(pid: u32) -> Vec<Served> {
    let socket = folder::path().join(format!("{pid}.sock"));
    let asked = run(client::get::<Instance>(&socket, "/v1/instance"));
    asked.ok().and_then(Result::ok).map(|instance| of(instance, &socket)).unwrap_or_default()
}

impl Served {
    /// Whether it is found at this path.
    pub(crate) fn is_at(&self, path: &Path) -> bool {
        self.places.iter().any(|place| place.as_path() == path)
    }

    /// Sets its limits to exactly these.
    ///
    /// # Errors
    /// One line.
    pub(crate) fn set_limits(&self, limits: &ThrottleConfig) -> Result<()> {
        let mut body = serde_json::Map::new();
        for unit in ["iops", "bps"] {
            for part in ["total", "read", "write"] {
                body.insert(format!("{unit}-{part}"), json!(0));
                body.insert(format!("{unit}-{part}-max"), json!(0));
                body.insert(format!("{unit}-{part}-max-length"), json!(1));
            }
        }
        body.insert("iops-size".to_owned(), json!(0));
        body.extend(limits.settings().into_iter().map(|(key, value)| (key, json!(value))));
        self.call::<Throttle>(Method::PATCH, "throttle", &body).map(drop)
    }

    /// Makes it larger.
    ///
    /// # Errors
    /// One line.
    pub(crate) fn resize(&self, size: u64) -> Result<Resized> {
        self.call(Method::POST, "resize", &ResizeWish { size })
    }

    fn call<T: serde::de::DeserializeOwned>(
        &self,
        method: Method,
        what: &str,
        body: &impl serde::Serialize,
    ) -> Result<T> {
        let path = command::path(what, &self.export);
        let answer = run(client::send(&self.socket, method, &path, body))?;
        answer.map_err(|error| match error {
            CallError::Gone => anyhow!("process {} has just ended", self.pid),
            CallError::Refused(line) => anyhow!("process {}: {line}", self.pid),
            CallError::Silent(why) => anyhow!("process {} does not answer: {why}", self.pid),
            CallError::Foreign(peer) => {
                anyhow!("{}: user {} listens there, and is not asked", self.socket.display(), peer.uid)
            }
        })
    }
}

fn of(instance: Instance, socket: &Path) -> Vec<Served> {
    let Instance { pid, exports, doors, .. } = instance;
    let places = |name: &str| -> Vec<OsText> {
        let all = doors.iter().flat_map(|door| &door.places);
        all.filter(|place| place.export == name).map(|place| place.at.clone()).collect()
    };
    exports
        .into_iter()
        .map(|export| Served {
            socket: socket.to_owned(),
            pid,
            places: places(&export.name),
            export: export.name,
            source: export.source,
            size: export.size,
            loss_after_crash: export.loss_after_crash,
        })
        .collect()
}

fn run<F: Future>(future: F) -> Result<F::Output> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the event loop")?;
    Ok(runtime.block_on(future))
}
