//! `nbdbridge info`: what a source is. Each kind of source has its own facts.

mod local;
mod remote;

use std::process::ExitCode;

use anyhow::Result;

use crate::cli::{InfoArgs, Source, UsageError};
use crate::output;
use remote::Ask;

/// Tells about a source. The status is that of a failure where it could not be served, and that is all there is to tell.
///
/// # Errors
/// One line that says what kept us from it.
pub(crate) fn run(args: &InfoArgs) -> Result<ExitCode> {
    let mut status = ExitCode::SUCCESS;
    let text = match (&args.source, args.list, args.map) {
        (Source::Remote(source), list, map) => {
            let ask = match (list, map) {
                (true, _) => Ask::List,
                (false, true) => Ask::Map,
                (false, false) => Ask::Export,
            };
            remote::tell(&source.uri, &args.remote.options(source), ask, args.json)?
        }
        (source, true, _) => {
            let message = format!("--list asks a server, as in nbd://HOST, and {source} is none");
            return Err(UsageError::new(message).into());
        }
        _ => {
            let told = local::tell(args)?;
            if !told.can_be_served {
                status = ExitCode::FAILURE;
            }
            told.text
        }
    };
    if args.json {
        output::data(&text)?
    } else {
        output::text(&text)?
    }
    Ok(status)
}
