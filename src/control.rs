//! The control socket: how a running server is watched and changed, by people and by other programs.
//!
//! ```text
//!   nbdbridge ps, stats, throttle, resize ── command ── find (which EXPORT?) ── client
//!   curl --unix-socket                                                            │ HTTP + JSON (wire)
//!                                                   folder: /run/nbdbridge/<pid>.sock
//!   ──────────────────────────────────────────────────────────────────────────────│──────────────
//!   a thread of its own: server (limits) ── routes ──> Export: stats, throttle, resize
//!                                                 └──> Clients: a door asks its workers
//! ```
//!
//! Whoever uses it, well or badly, takes nothing from the data path but a lock-free look at the counters. Where the
//! socket cannot be made, the server serves without it.

mod client;
pub(crate) mod command;
mod find;
mod folder;
mod guests;
mod peer;
mod query;
mod routes;
mod server;
mod wire;

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use bridge::Export;
use bridge::worker::Workers;

use crate::os_text::OsText;

pub(crate) use folder::{journal_folder, listen, path as runtime_folder};
pub(crate) use query::{Served, served, served_by};
pub(crate) use server::{Control, is_welcome};
use wire::ResizeWish;
pub(crate) use wire::{Client, ClientReport, Place};

/// A boxed future that any thread may poll.
pub(crate) type SendFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// What is told of a door.
pub(crate) struct Watch {
    /// The command that opens such a door.
    pub(crate) kind: &'static str,
    /// Where its exports are found.
    pub(crate) places: Vec<Place>,
    /// Who is connected, where there is such a thing.
    pub(crate) clients: Option<Arc<dyn Clients>>,
    /// Why it keeps its size when its export grows; None where it grows too.
    pub(crate) fixed: Option<String>,
}

/// Knows a door's clients. Asked from the control socket's thread.
pub(crate) trait Clients: Send + Sync {
    /// Who is there now. Answers within a second, whatever the data path does.
    fn list(&self) -> SendFuture<'_, ClientReport>;
}

/// What the socket tells of, and acts upon.
pub(crate) struct Site {
    exports: Vec<(Arc<Export>, OsText)>,
    doors: Vec<Watch>,
    workers: Arc<Workers>,
    started: u64,
}

impl Site {
    /// Exports, each with where its blocks come from, behind these doors.
    pub(crate) fn new(exports: Vec<(Arc<Export>, OsText)>, doors: Vec<Watch>, workers: Arc<Workers>) -> Self {
        let started = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        Site { exports, doors, workers, started }
    }
}
