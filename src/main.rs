//! `nbdbridge`: a userspace block bridge. This file only hands the command line's wish to whom it concerns.

// Until the server is wired, half of what the command line says has no reader.
#[allow(dead_code, unused_imports)]
mod cli;
#[allow(dead_code)]
mod daemon;
mod size;
#[allow(dead_code)]
mod systemd;
#[allow(dead_code)]
mod uri;

use std::process::ExitCode;

use anyhow::{Result, anyhow};

use cli::{Action, NetArgs};

fn main() -> ExitCode {
    let action = match cli::parse(std::env::args_os()) {
        Ok(action) => action,
        Err(status) => return status,
    };
    run(action).unwrap_or_else(|error| cli::report(&error))
}

fn run(action: Action) -> Result<ExitCode> {
    match action {
        Action::Net(args) => {
            cli::logging::init(args.verbose)?;
            net_main(*args)
        }
        Action::Create(args) => cli::create::run(&args).map(|()| ExitCode::SUCCESS),
        Action::Completions(shell) => cli::print_completions(shell).map(|()| ExitCode::SUCCESS),
    }
}

/// Serves until told to stop.
fn net_main(args: NetArgs) -> Result<ExitCode> {
    tracing::debug!(?args, "command line");
    Err(anyhow!("the NBD server is not wired yet"))
}
