//! Where log lines go (stderr) and which ones do: warnings, more with `-v`, or what NBDBRIDGE_LOG says.

use anyhow::Result;
use tracing_subscriber::EnvFilter;

use super::UsageError;
use crate::output::{self, Log};

/// The variable that overrides `-v`, in the syntax of RUST_LOG.
const VARIABLE: &str = "NBDBRIDGE_LOG";

/// Sets the process's logging up. Makes no thread, so that it may come before a fork.
///
/// # Errors
/// A [`UsageError`] where the variable makes no sense.
pub(crate) fn init(verbose: u8) -> Result<()> {
    let filter = match std::env::var(VARIABLE) {
        Ok(text) if !text.is_empty() => EnvFilter::try_new(&text)
            .map_err(|error| UsageError::new(format!("{VARIABLE}={text}: {error}")))?,
        _ => EnvFilter::new(level(verbose)),
    };
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(Log { coloured: output::stderr_is_terminal() })
        // Colours come behind the escaping; and a line that cannot be written is `output`'s business.
        .with_ansi(false)
        .log_internal_errors(false)
        .with_target(verbose > 1);
    // The journal has its own clock.
    if std::env::var_os("JOURNAL_STREAM").is_some() {
        subscriber.without_time().init();
    } else {
        subscriber.init();
    }
    Ok(())
}

fn level(verbose: u8) -> &'static str {
    match verbose {
        0 => "warn",
        1 => "info",
        2 => "debug",
        _ => "trace",
    }
}
