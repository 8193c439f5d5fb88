//! The kernel device: gives this host a block device, /dev/ublkbN, that is served by an export (ublk, Linux 6.0).
//!
//! ```text
//!   /dev/ublkbN ── kernel ──> channel (descriptors, ring) ──> queue (a thread each) ──try──> Export
//!                              └─ data (copies)                └──tasks──> Export
//!   door ──> device (make, start, take over, end) ──> control (/dev/ublk-control) ──> apart (a child) ──> library
//!   supervise: another process, for the case that this one dies      state: what is remembered of each device
//! ```
//!
//! The kernel's interface is spoken by libublk: its structures and numbers (`libublk::sys`), its control ring and `UblkCtrl`
//! (`command`, `library`), `UblkDev`, `UblkQueue` and `IoBuf` (`channel`, `data`). Ours are the loop that takes requests,
//! which waits for tokio's sources as well; the limits on every command, because some kernels never answer; recovery,
//! standby and supervisor; the records of devices; and the mounts of the process. `abi` has what libublk lacks.

mod abi;
mod apart;
mod channel;
mod command;
mod control;
mod data;
mod device;
mod door;
mod holders;
mod library;
mod list;
mod memory;
mod plain;
mod queue;
mod signals;
mod standby;
mod state;
mod supervise;
mod task;
mod translate;
mod wait;
mod watched;

use std::path::PathBuf;

use anyhow::Result;
use bridge::backend::nbd::NbdBackend;
use nbd_proto::Goal;

use crate::cli::{ServeArgs, Source};

pub(crate) use door::UblkDoor;
pub(crate) use holders::openers;
pub(crate) use list::{Server, detach, devices, features, owner, server};
pub(crate) use supervise::run;

/// Whether this host can make such devices, and this user.
pub(crate) fn is_here() -> bool {
    rustix::process::geteuid().is_root() && control::Control::open().is_ok()
}

/// Whether a device can show the first source, as far as a remote server tells beforehand. What cannot be learnt is left
/// to the one that opens the source.
pub(crate) fn can_show(args: &ServeArgs) -> bool {
    let Some(Source::Remote(source)) = args.exports.first().map(|export| &export.source) else { return true };
    let asked = NbdBackend::ask(&source.uri, Goal::Info, &args.source.remote.options(source));
    asked.into_iter().flatten().flat_map(|listed| listed.info).all(|info| translate::can_show(info.min_block))
}

/// What the process must be before it opens a source.
pub(crate) fn before_sources() {
    memory::serve_reclaim(true);
}

/// What it must be before it makes threads. `needed` are paths that it makes or removes later.
pub(crate) fn before_threads(needed: &[PathBuf]) {
    memory::leave_mounts(needed);
}

/// Whether a path is one of such a device, even where there is none any more.
pub(crate) fn is_name(path: &str) -> bool {
    path.starts_with("/dev/ublkb") && control::parse_id(path).is_ok()
}

/// What is remembered of a device whose process has died.
///
/// # Errors
/// One line: it is none of ours, it is gone, or somebody serves it.
pub(crate) fn left(id: u32) -> Result<state::Record> {
    wait::check_left(id)?;
    state::remembered(id)
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use crate::cli::{Action, parse};

    #[test]
    fn whole_blocks_above_a_page_are_for_another_door() {
        for (block, shown) in [("512", true), ("4096", true), ("8192", false), ("65536", false)] {
            let folder = tempfile::tempdir().unwrap();
            let socket = folder.path().join("sock");
            let mut server = Command::new("nbdkit");
            server.args(["-f", "--filter=blocksize-policy", "memory", "1M", "-U"]).arg(&socket);
            server.args([format!("blocksize-minimum={block}").as_str(), "blocksize-preferred=64K"]);
            server.args(["blocksize-maximum=32M", "blocksize-error-policy=error"]).stdin(Stdio::null());
            let Ok(mut server) = server.spawn() else {
                eprintln!("SKIP: whole_blocks_above_a_page_are_for_another_door: no nbdkit here");
                return;
            };
            for _ in 0..1000 {
                if socket.exists() {
                    break;
                }
                std::thread::sleep(std::time::Duration::from_millis(10));
            }
            let uri = format!("nbd+unix:///?socket={}", socket.display());
            let words = ["nbdbridge", "attach", &uri].map(std::ffi::OsString::from);
            let Ok(Action::Attach(action)) = parse(words) else { panic!("{block}") };
            let can = super::can_show(&action.by_loop);
            server.kill().unwrap();
            server.wait().unwrap();
            assert_eq!(can, shown, "{block}");
        }
    }
}
