//! `nbdbridge info`: what a source is. Each kind of source has its own facts.

mod local;
mod remote;

use std::process::ExitCode;

use anyhow::Result;

use crate::cli::{InfoArgs, Source, UsageError};
use crate::output;
use local::Failed;
use remote::Ask;

/// Tells about a source. The status is that of a failure where it could not be served, and that is all there is to tell.
///
/// # Errors
/// One line that says what kept us from it.
pub(crate) fn run(args: &InfoArgs) -> Result<ExitCode> {
    let mut status = ExitCode::SUCCESS;
    let mut failed = None;
    let text = match (&args.source, args.list, args.map) {
        (Source::Remote(source), list, map) => {
            let ask = match (list, map) {
                (true, _) => Ask::List,
                (false, true) => Ask::Map,
                (false, false) => Ask::Export,
            };
            let told = remote::tell(&source.uri, &args.remote.options(source), ask, args.json)?;
            failed = told.failed;
            told.text
        }
        (source, true, _) => {
            let message = format!("--list asks a server, as in nbd://HOST, and {source} is none");
            return Err(UsageError::new(message).into());
        }
        _ => {
            let told = local::tell(args)?;
            match told.failed {
                None => {}
                Some(Failed::Told) => status = ExitCode::FAILURE,
                Some(Failed::Map(error)) => failed = Some(error),
            }
            told.text
        }
    };
    if args.json {
        output::json(&text)?
    } else {
        output::text(&text)?
    }
    match failed {
        Some(error) => Err(error),
        None => Ok(status),
    }
}
