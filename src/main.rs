//! `nbdbridge`: a userspace block bridge. This file only hands the command line's wish to whom it concerns.

mod allocator;
mod assemble;
mod attach;
mod attachment;
mod bench;
mod cli;
mod control;
mod daemon;
mod detach;
mod devices;
mod door;
mod fuse;
mod io_flusher;
mod net;
mod serve;
mod size;
mod systemd;

use std::process::ExitCode;

use anyhow::Result;

use cli::Action;

fn main() -> ExitCode {
    allocator::keep_little();
    let action = match cli::parse(std::env::args_os()) {
        Ok(action) => action,
        Err(status) => return status,
    };
    run(action).unwrap_or_else(|error| cli::report(&error))
}

fn run(action: Action) -> Result<ExitCode> {
    match action {
        Action::Serve(args) => {
            cli::logging::init(args.process.verbose)?;
            serve::run(&args)
        }
        Action::Detach(args) => detach::run(&args).map(|()| ExitCode::SUCCESS),
        Action::Devices => devices::run().map(|()| ExitCode::SUCCESS),
        Action::Create(args) => cli::create::run(&args).map(|()| ExitCode::SUCCESS),
        Action::Ask(action) => control::command::run(&action).map(|()| ExitCode::SUCCESS),
        Action::Bench(args) => bench::run(&args).map(|()| ExitCode::SUCCESS),
        Action::Completions(shell) => cli::print_completions(shell).map(|()| ExitCode::SUCCESS),
    }
}
