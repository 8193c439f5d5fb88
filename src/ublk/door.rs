//! The kernel device as a door.

use std::cell::RefCell;
use std::ffi::OsString;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use bridge::{Capabilities, Export, LocalFuture};
use tokio::sync::{oneshot, watch};

use super::control::block_path;
use super::device::{self, Device};
use super::holders;
use super::state::Record;
use super::supervise::{self, Message};
use crate::cli::UblkArgs;
use crate::control::{Place, Watch};
use crate::door::{Door, Site};

/// How often a device that is in use is looked at.
const EVERY: Duration = Duration::from_millis(500);

/// A device and what it serves.
pub(crate) struct UblkDoor {
    id: u32,
    export: Arc<Export>,
    running: watch::Receiver<usize>,
    /// None once it is ending.
    device: RefCell<Option<Device>>,
    drain_timeout: Duration,
}

impl UblkDoor {
    /// Makes the device, or takes it over.
    ///
    /// # Errors
    /// One line that says why there is none, and the way out.
    pub(crate) fn open(args: &UblkArgs, site: &Site<'_>) -> Result<Self> {
        let export = site.exports.first().context("a device needs a source")?.clone();
        let words: &[OsString] = &args.words;
        let args = &UblkArgs { recoverable: args.recoverable && can_be_recovered(&export), ..args.clone() };
        let record = Record::new(args.source.clone(), words, args.recoverable, args.supervisor);
        let device = match args.recover {
            Some(id) => Device::recover(id, export.clone(), args, record)?,
            None => Device::create(export.clone(), args, record)?,
        };
        Ok(UblkDoor {
            id: device.id(),
            export,
            running: device.running(),
            device: RefCell::new(Some(device)),
            drain_timeout: site.process.drain_timeout,
        })
    }

    fn grow(&self) {
        if let Some(device) = &*self.device.borrow()
            && let Err(error) = device.update_size()
        {
            tracing::warn!("{}: {error:#}", block_path(self.id));
        }
    }
}

impl Door for UblkDoor {
    fn lines(&self) -> Vec<OsString> {
        vec![block_path(self.id).into()]
    }

    fn watch(&self) -> Watch {
        let place = Place { export: self.export.name().to_owned(), at: block_path(self.id).into() };
        let fixed = device::fixed_size().map(|why| format!("{} keeps its size: {why}", block_path(self.id)));
        Watch { kind: "ublk", places: vec![place], clients: None, fixed }
    }

    /// Serves until somebody else has ended the device. A source that grows makes it grow.
    fn serve(&self) -> LocalFuture<'_, ()> {
        let mut running = self.running.clone();
        Box::pin(async move {
            let mut size = self.export.watch_size();
            let mut ended = std::pin::pin!(running.wait_for(|count| *count == 0));
            loop {
                // The first time for one that was taken over: its last process may have died in between.
                self.grow();
                tokio::select! {
                    _ = &mut ended => break,
                    Ok(()) = size.changed() => {}
                }
            }
            tracing::info!("{}: was ended from outside", block_path(self.id));
        })
    }

    /// Waits until it is neither mounted nor open.
    fn release(&self) -> LocalFuture<'_, ()> {
        Box::pin(async move {
            let mut said = None;
            while let Some(uses) = look(self.id).await {
                if said.as_ref() != Some(&uses) {
                    tracing::warn!(
                        "{}: in use ({uses}); it is served until it is released, a second signal ends it",
                        block_path(self.id)
                    );
                    said = Some(uses);
                }
                tokio::time::sleep(EVERY).await;
            }
        })
    }

    fn drain(&self) -> LocalFuture<'_, bool> {
        supervise::tell(Message::Stopping);
        let (device, patience) = (self.device.borrow_mut().take(), self.drain_timeout);
        Box::pin(async move {
            let Some(device) = device else { return true };
            run(move || device.stop(patience)).await.unwrap_or_else(|error| {
                tracing::error!("{error:#}");
                false
            })
        })
    }

    /// The device ends with the process, if the thread that stops it does not come first.
    fn cut(&self) -> LocalFuture<'_, ()> {
        Box::pin(std::future::ready(()))
    }
}

/// Whether nothing that was answered is lost when this process dies: a successor would serve an older disk to a file
/// system that is mounted.
fn can_be_recovered(export: &Export) -> bool {
    let geometry = export.geometry();
    let lost = !geometry.read_only() && geometry.capabilities.contains(Capabilities::VOLATILE);
    if lost {
        tracing::warn!(
            "{}: the device is not recoverable: what is answered and not flushed would be missing after a crash",
            export.name()
        );
    }
    !lost
}

/// What the device is used for. Where that cannot be learnt, it is not in use.
async fn look(id: u32) -> Option<String> {
    run(move || holders::of(id, true)).await.ok().flatten()
}

/// Runs what waits for the kernel on a thread of its own. Not on the runtime's: that would wait for it at the end.
async fn run<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T> {
    let (done, result) = oneshot::channel();
    std::thread::Builder::new()
        .name("ublk-look".into())
        .spawn(move || {
            let _ = done.send(work());
        })
        .context("cannot start a thread")?;
    result.await.map_err(|_| anyhow!("a thread ended without its result"))
}
