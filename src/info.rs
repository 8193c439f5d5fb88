//! `nbdbridge info`: what a source is.

mod remote;

use std::io::Write;

use anyhow::{Result, bail};

use crate::cli::{InfoArgs, Source};
use remote::Ask;

/// Tells about a source.
///
/// # Errors
/// One line that says what kept us from it.
pub(crate) fn run(args: &InfoArgs) -> Result<()> {
    let Source::Remote(source) = &args.source else {
        bail!("{}: only nbd:// and nbd+unix:// in this version; for images: qemu-img info", args.source);
    };
    let ask = match (args.list, args.map) {
        (true, _) => Ask::List,
        (false, true) => Ask::Map,
        (false, false) => Ask::Export,
    };
    let text = remote::tell(&source.uri, &args.remote.options(source), ask, args.json)?;
    match std::io::stdout().write_all(text.as_bytes()) {
        // A reader that went away (`| head`) is no failure.
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(()),
    }
}
