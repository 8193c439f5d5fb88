//! `nbdbridge`: a userspace block bridge. This file only hands the command line's wish to whom it concerns.

// What is said leaves through `output`, where it is escaped, and where a failure ends nothing.
#![warn(clippy::print_stdout, clippy::print_stderr)]

mod allocator;
mod assemble;
mod attach;
mod attachment;
mod bench;
mod beneath;
mod cli;
mod control;
mod daemon;
mod detach;
mod devices;
mod door;
mod end_report;
mod fuse;
mod helper;
mod info;
mod io_flusher;
mod net;
mod os_text;
mod output;
mod patience;
mod pid_file;
mod serve;
mod size;
mod stop;
mod systemd;
mod trust;
mod ublk;
mod volume;

use std::ffi::OsString;
use std::process::ExitCode;

use anyhow::{Context, Result};

use cli::{Action, AttachAction, BlockDoor, RecoverArgs};

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
        Action::Ublk(args) => {
            cli::logging::init(args.process.verbose)?;
            ublk::run(*args)
        }
        Action::Recover(args) => {
            cli::logging::init(args.verbose())?;
            recover(*args)
        }
        Action::Attach(action) => attach(*action),
        Action::Devices(args) => devices::run(&args).map(|()| ExitCode::SUCCESS),
        Action::Detach(args) => detach::run(&args).map(|()| ExitCode::SUCCESS),
        Action::Create(args) => cli::create::run(&args).map(|()| ExitCode::SUCCESS),
        Action::Ask(action) => control::command::run(&action).map(|()| ExitCode::SUCCESS),
        Action::Volumed { verbose, args } => {
            cli::logging::init(verbose)?;
            volume::run_daemon(&args)
        }
        Action::Bench(args) => bench::run(&args).map(|()| ExitCode::SUCCESS),
        Action::Volume(action) => {
            cli::logging::init(0)?;
            volume::command::run(&action).map(|()| ExitCode::SUCCESS)
        }
        Action::Helper(words) => helper::run_task(&words),
        Action::GuardFrozen { point, limit } => {
            volume::freeze::guard(&point, limit).map(|()| ExitCode::SUCCESS)
        }
        Action::Info(args) => info::run(&args),
        Action::Completions(shell) => cli::print_completions(shell).map(|()| ExitCode::SUCCESS),
    }
}

/// Takes a device over, with the command line that it was made with, in the folder where that was given.
fn recover(recover: RecoverArgs) -> Result<ExitCode> {
    let record = ublk::left(recover.id)?;
    let folder = record.folder();
    std::env::set_current_dir(&folder)
        .with_context(|| format!("{}: the device was made in this folder", folder.display()))?;
    let words = [OsString::from("nbdbridge"), OsString::from("ublk")].into_iter().chain(record.words());
    match cli::parse(words) {
        Ok(Action::Ublk(mut args)) => {
            recover.apply(&mut args);
            ublk::run(*args)
        }
        Ok(_) => anyhow::bail!("what is remembered of ublk device {} makes no sense", recover.id),
        Err(status) => Ok(status),
    }
}

/// Makes a block device by the best door of this host, or the one that is asked for.
fn attach(action: AttachAction) -> Result<ExitCode> {
    let by_ublk = match action.door {
        BlockDoor::Auto => ublk::is_here() && ublk::can_show(&action.by_loop),
        BlockDoor::Ublk => true,
        BlockDoor::Fuse => false,
    };
    if !by_ublk {
        cli::logging::init(action.by_loop.process.verbose)?;
        return serve::run(&action.by_loop);
    }
    match cli::parse(action.ublk_words) {
        Ok(action) => run(action),
        Err(status) => Ok(status),
    }
}
